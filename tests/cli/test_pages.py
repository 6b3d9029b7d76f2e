"""Help: every command and option is explained, by group, with three examples."""

import shlex

import pytest
from typer.main import get_command

from loratools.cli.app import COMMANDS, build

APP = get_command(build())
SHORT = {
    "base": "-b", "weights": "-w", "method": "-m", "rank": "-r", "to": "-t", "dry-run": "-n",
    "force": "-f", "quiet": "-q", "out": "-o", "help": "-h",
}  # fmt: skip

each_command = pytest.mark.parametrize("name", COMMANDS)


@each_command
def test_every_command_and_option_has_help(name):
    command = APP.commands[name]
    assert command.help.split("\n")[0].endswith(".")
    for param in command.params:
        assert param.help, param.name
        assert param.help.endswith(".")
        assert param.param_type_name == "argument" or param.rich_help_panel
        assert param.param_type_name == "argument" or param.is_flag or param.metavar


@each_command
def test_daily_options_have_their_short_form(name):
    for param in APP.commands[name].params:
        long = next((o[2:] for o in param.opts if o.startswith("--")), "")
        if long in SHORT:
            assert SHORT[long] in param.opts


@each_command
def test_a_page_fits_the_terminal_and_shows_every_option(run, name):
    for word in ("--help", "-h"):
        ended = run(name, word)
        assert ended.status == 0
        lines = ended.out.splitlines()
        assert lines[0].startswith(f"Usage: loratools {name} ")
        assert all(len(line) <= 80 for line in lines)
        for param in APP.commands[name].params:
            assert any(line.strip().startswith(tuple(param.opts)) for line in lines) or (
                param.metavar in ended.out
            )


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_three_examples_that_parse(run, name):
    page = run(*name.split(), "--help").out
    examples = page.partition("Examples:\n")[2].splitlines()
    assert len(examples) == 3
    for example in examples:
        words = shlex.split(example.partition("|")[0], comments=True)
        assert words[0] == "loratools"
        command = APP.commands[words[1]]
        if name:
            assert words[1] == name
        command.make_context(words[1], words[2:])  # fails where an option does not exist


def test_the_first_page(run):
    for arguments, status in (([], 2), (["--help"], 0), (["-h"], 0)):
        ended = run(*arguments)
        assert ended.status == status
        for name in COMMANDS:
            assert f"  {name} " in ended.out


def test_versions(run):
    ended = run("--version")
    assert ended.status == 0
    names = [line.split()[0] for line in ended.out.splitlines()]
    assert names == ["loratools", "python", "torch", "safetensors", "numpy", "huggingface_hub"]
