"""`loratools convert`: what the screen and the JSON say of each output."""

import pytest


def test_a_lossless_copy(here, run):
    ended = run("convert", "a", "-o", "out")
    assert ended.status == 0
    assert "  4 targets, lossless" in ended.out.splitlines()
    table = run("convert", "a", "-o", "out", "-f", "--json").json
    assert (table["output"], table["lossless"], table["lost"]) == ("out", True, [])


def test_a_smaller_rank_says_how_far_off_it_is(here, run):
    ended = run("convert", "a", "-r", "1", "-o", "out")
    assert "  4 targets, not lossless:" in ended.out.splitlines()
    assert "  - the update differs by " in ended.out
    table = run("convert", "a", "-r", "1", "-o", "out", "-f", "--json").json
    assert table["lossless"] is False
    assert 0.1 < table["truncation_error"] < 1


def test_several_go_into_a_folder(here, run):
    table = run("convert", "a", "b", "-o", "out", "--json").json
    assert [i["output"] for i in table["items"]] == ["out/a", "out/b"]
    assert (here / "out" / "b" / "adapter_config.json").is_file()


@pytest.mark.parametrize("name", ["loralib", "xlabs"])
def test_a_format_that_cannot_be_written(here, run, name):
    ended = run("convert", "a", "--to", name, "-o", "out")
    assert ended.status == 2
    assert f"--to {name} can be read, not written; this version writes peft, kohya" in ended.err


def test_typical_mistakes(here, run):
    no_output = run("convert", "a", "--rank", "2")
    assert no_output.status == 2
    assert "Missing option" in no_output.err
    assert "-o" in no_output.err
    number = run("convert", "a", "--rank", "two", "-o", "out")
    assert number.status == 2
    assert "--rank" in number.err
    suffix = run("convert", "a", "-o", "out.safetensors")
    assert suffix.status == 2
    assert "a PEFT adapter is a folder" in suffix.err
    assert run("convert", "a", "-o", "lora-v1.5").status == 0
    assert run("convert", "a", "-t", "lorax", "-o", "out").err.startswith(
        "error[usage]: --to lorax is no format"
    )
