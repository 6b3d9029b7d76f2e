"""`loratools explain`: one code, all codes, none of them."""

from loratools.errors import CODES


def test_one_code(run):
    ended = run("explain", "large_update")
    assert ended.status == 0
    lines = ended.out.splitlines()
    assert lines[0] == f"large_update: {CODES['large_update'].meaning}"
    assert any(line.startswith("  remedy") for line in lines)
    assert "--allow large_update turns it into a warning" in ended.out
    assert "cannot be waived" in run("explain", "shape_mismatch").out
    assert all(len(line) <= 80 for line in lines)


def test_all_codes(run):
    listed = [line.split()[0] for line in run("explain").out.splitlines()[1:] if line[2] != " "]
    assert listed == list(CODES)
    assert [i["code"] for i in run("explain", "--json").json["items"]] == list(CODES)


def test_json(run):
    table = run("explain", "tied", "--json").json
    assert table["code"] == "tied"
    assert set("code exit waivable meaning example remedy".split()) <= table.keys()


def test_typical_mistakes(run):
    near = run("explain", "unmached")
    assert near.status == 2
    assert "unmached is no problem code; perhaps unmatched" in near.err
    number = run("explain", "5")
    assert number.status == 2
    assert "5 is no problem code; perhaps " in number.err
    twice = run("explain", "tied", "loss")
    assert twice.status == 2
    assert "loss" in twice.err
