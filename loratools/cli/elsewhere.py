"""The commands that other tools have, and those that this version lacks: what to type instead."""

from __future__ import annotations

from collections.abc import Callable

import typer

from loratools.errors import error

FOLD = "folding is: loratools merge ADAPTER --base BASE -o OUT"
INSTEAD = {
    "fold": FOLD,
    "fuse": FOLD,
    "merge-lora": FOLD,
    "resize": "another rank is: loratools convert ADAPTER --rank N -o OUT",
    "validate": "checking is: loratools check ADAPTER --base BASE",
    "diff": "comparing adapters is `compare`, which this version does not have",
    "upload": "publishing is: loratools push OUT ORG/NAME",
    "publish": "publishing is: loratools push OUT ORG/NAME",
}
LATER = {
    "extract": "it makes no adapter of a fine-tuned model",
    "compare": "it measures no overlap of adapters",
}


def add_all(app: typer.Typer) -> None:
    """Give the app all these names, hidden from its help."""
    for name, words in INSTEAD.items():
        _add(app, name, f"no command `{name}`; {words}")
    for name, words in LATER.items():
        _add(app, name, f"this version has no `{name}`: {words}")


def _add(app: typer.Typer, name: str, message: str) -> None:
    # Whatever options follow, this answer comes first.
    anything = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(name, hidden=True, add_help_option=False, context_settings=anything)(
        _answer(message)
    )


def _answer(message: str) -> Callable[[], None]:
    def command() -> None:
        raise error("usage", message)

    return command
