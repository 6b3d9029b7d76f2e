"""`loratools verify`: the verdict, the exit status, what differs."""

KEYS = ["ok", "proved", "checked", "mismatches"]


def changed(file):
    """The file with its last byte another."""
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def test_a_fold_is_proved_and_a_changed_one_is_not(here, run):
    run("merge", "a", "-b", "base", "-o", "out")
    ended = run("verify", "out")
    assert ended.status == 0
    assert ended.out == "proved by replay: 5 tensors checked\n"
    changed(here / "out" / "model.safetensors")
    ended = run("verify", "out", "-q")
    assert ended.status == 8
    assert "  model.safetensors: has another sha256" in ended.out.splitlines()
    assert ended.out.splitlines()[-1].startswith("not proved: 5 tensors checked, ")
    table = run("verify", "out", "--json").json
    assert list(table)[1:5] == KEYS
    assert table["ok"] is False
    assert table["mismatches"][0]["file"] == "model.safetensors"


def test_a_converted_adapter_is_proved_too(here, run):
    run("convert", "a", "--rank", "2", "-o", "out")
    ended = run("verify", "out", "--require", "replay")
    assert (ended.status, ended.out) == (0, "proved by replay: 4 tensors checked\n")


def test_a_fold_without_receipt(here, run):
    run("merge", "a", "b", "-w", "1,-0.5", "-b", "base", "-o", "out")
    (here / "out" / "loratools.json").unlink()
    given = ["verify", "out", "-b", "base", "--adapter", "a", "--adapter", "b"]
    assert "rounding: once from float64" in run(*given, "-w", "1,-0.5").out
    wrong = run(*given, "-w", "1,0.5")
    assert wrong.status == 8
    assert "model.layers.0.self_attn.q_proj.weight: values (64 elements, the first at " in wrong.out


def test_typical_mistakes(here, run):
    no_receipt = run("verify", "base")
    assert no_receipt.status == 2
    assert "base has no receipt: give the --base and every --adapter" in no_receipt.err
    run("merge", "a", "-b", "base", "-o", "out")
    assert run("verify", "out", "-w", "2").status == 2
    unknown = run("verify", "out", "--require", "proof")
    assert unknown.status == 2
    assert "hashes" in unknown.err
