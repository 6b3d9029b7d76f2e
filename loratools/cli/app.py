"""The commands put together, and what stands before any of them: --help and --version."""

from __future__ import annotations

import platform
from types import ModuleType
from typing import Annotated

import typer

from loratools.cli import (
    check,
    convert,
    elsewhere,
    explain,
    export,
    inspect,
    merge,
    options,
    push,
    verify,
)
from loratools.cli.pages import page
from loratools.cli.screen import say, width

EXAMPLES = """\
loratools inspect my-lora
loratools merge my-lora --base Llama-3.1-8B -o folded
loratools verify folded"""
COMMANDS: dict[str, ModuleType] = {
    "inspect": inspect,
    "check": check,
    "merge": merge,
    "convert": convert,
    "export": export,
    "verify": verify,
    "push": push,
    "explain": explain,
}
SHOWN_VERSIONS = ("loratools", "python", "torch", "safetensors", "numpy", "huggingface_hub")


def versions(wanted: bool) -> None:
    """The callback of `--version`: print what is installed, and end."""
    from importlib.metadata import PackageNotFoundError, version

    if not wanted:
        return
    for name in SHOWN_VERSIONS:
        try:
            found = platform.python_version() if name == "python" else version(name)
        except PackageNotFoundError:
            found = "not installed"
        say(f"{name} {found}")
    raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", is_eager=True, callback=versions, help="Show what is installed, and versions.",
        rich_help_panel=options.PRINTING,
    ),
]  # fmt: skip


def before(
    ctx: typer.Context,
    version: Version = False,
    debug: options.Debug = False,
    help_page: options.Help = False,
) -> None:
    """Read, check, merge, fold, convert and prove adapters (LoRA and its relatives).

    An adapter is a small file that says how to change a big model. `loratools COMMAND --help`
    tells more about each command, `loratools explain CODE` about a problem code.
    """
    if ctx.invoked_subcommand is None:
        say("\n".join(page(ctx.command, ctx.command_path, width())))
        raise typer.Exit(2)


def build() -> typer.Typer:
    """The app with all its commands."""
    app = typer.Typer(
        name="loratools",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_help_option=False,
    )
    app.callback(invoke_without_command=True, epilog=EXAMPLES, add_help_option=False)(before)
    for name, module in COMMANDS.items():
        app.command(
            name,
            epilog=module.EXAMPLES,
            add_help_option=False,
            options_metavar=getattr(module, "USAGE", "[OPTIONS]"),
        )(module.command)
    elsewhere.add_all(app)
    return app
