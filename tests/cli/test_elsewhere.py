"""Words of other tools, and commands that this version lacks, get an answer."""

import pytest

from loratools.cli.elsewhere import INSTEAD, LATER


@pytest.mark.parametrize("name", "fold fuse merge-lora resize diff validate upload publish".split())
def test_commands_of_the_field_answer_with_the_right_one(run, name):
    assert name in INSTEAD
    ended = run(name, "x", "--model", "y", "--help")
    assert ended.status == 2
    assert ended.out == ""
    assert ended.err.startswith(f"error[usage]: no command `{name}`; ")


def test_the_answers_name_real_commands(run):
    assert "loratools merge ADAPTER --base BASE -o OUT" in run("fuse").err
    assert "loratools convert ADAPTER --rank N -o OUT" in run("resize").err
    assert "loratools check ADAPTER --base BASE" in run("validate").err
    assert "loratools push OUT ORG/NAME" in run("upload").err


@pytest.mark.parametrize("name", LATER)
def test_commands_that_are_not_there_say_so(run, name):
    ended = run(name, "--json")
    assert ended.status == 2
    assert f"this version has no `{name}`" in ended.err
    assert ended.json["error"]["code"] == "usage"


def test_none_of_them_is_in_the_help(run):
    page = run("--help").out
    assert not any(f"  {name} " in page for name in [*INSTEAD, *LATER])
