"""`loratools explain`: what a problem code means; without one, the list of all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from loratools.cli import options
from loratools.cli.pages import entry
from loratools.cli.screen import say, say_json, strong, width
from loratools.errors import CODES

EXAMPLES = """\
loratools explain unmatched
loratools explain large_update --json
loratools explain                            # all codes"""


def _codes(incomplete: str) -> Iterator[str]:
    return (code for code in sorted(CODES) if code.startswith(incomplete))


Code = Annotated[
    str | None,
    typer.Argument(metavar="CODE", help="A code as messages show it.", autocompletion=_codes),
]


def command(
    code: Code = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
    help_page: options.Help = False,
) -> None:
    """Say what a problem code means, with an example and the remedy."""
    from loratools.commands.explain import explain

    found = [explain(c) for c in (CODES if code is None else [code])]
    if as_json:
        say_json(found[0].as_json() if code else {"items": [f.as_json() for f in found]})
        return
    if code is None:
        say(strong(f"  {'code':<18}  exit  meaning"))
        for one in found:
            say("\n".join(entry(f"{one.code:<18}  {one.exit:>4}", one.meaning, 24, width())))
        return
    one = found[0]
    say(f"{strong(one.code)}: {one.meaning}")
    waive = f"--allow {one.code} turns it into a warning" if one.waivable else "cannot be waived"
    for name, text in (
        ("example", one.example),
        ("remedy", one.remedy),
        ("exit", f"{one.exit}; {waive}"),
    ):
        say("\n".join(entry(name, text, 8, width())))
