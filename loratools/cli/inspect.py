"""`loratools inspect`: what stands at a path, on one screen; several paths as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratools.cli import options
from loratools.cli.pages import entry
from loratools.cli.screen import (
    columns,
    counted,
    problem_lines,
    safe,
    say,
    say_json,
    strong,
    typed,
    width,
)
from loratools.errors import shown

if TYPE_CHECKING:
    from loratools.commands.inspect import Inspection

EXAMPLES = """\
loratools inspect my-lora
loratools inspect runs/                  # a folder of adapters: a table
loratools inspect my-lora --json | jq .ranks"""

Paths = Annotated[
    list[str],
    typer.Argument(metavar="PATH...", help="Adapters, or folders of adapters."),
]


def command(
    paths: Paths,
    assume: options.Assume = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
    help_page: options.Help = False,
) -> None:
    """Show what an adapter is, from its headers alone.

    Its format, kinds, ranks, scaling, targets, size and base. Several paths, or a folder of
    adapters, print a table. What is no adapter is named.
    """
    from loratools.commands.inspect import inspect

    found = inspect(*paths, assume=assume or ())
    alone = len(found) == 1 and len(paths) == 1
    if as_json:
        say_json(found[0].as_json() if alone else {"items": [f.as_json() for f in found]})
    elif alone:
        _one(found[0])
    else:
        _table(found)


def _one(found: Inspection) -> None:
    from loratools.commands.inspect import human

    if found.format is None:
        say(f"{safe(found.source)}: no adapter; it looks like {safe(found.looks_like or '')}")
        return
    dtypes = ", ".join(found.dtypes)
    say(strong(f"{safe(found.source)}: {found.format} adapter, {human(found.nbytes)}"))
    rows = [
        ("kinds", _counted(found.kinds)),
        ("ranks", _counted(found.ranks)),
        ("scaling", _counted({f"{s:g}": n for s, n in found.scalings.items()})),
        ("targets", f"{found.targets}: {_counted(found.modules)}"),
        ("parameters", f"{found.parameters:,} in {dtypes}"),
        ("base", _base(found) or "not named"),
        ("task", shown(found.task) if found.task else "not named"),
        ("foldable", "yes" if found.foldable else "no"),
    ]
    for name, text in rows:
        lines = entry(name, text.replace(" (", "\N{NO-BREAK SPACE}("), 10, width())
        say("\n".join(lines).replace("\N{NO-BREAK SPACE}", " "))
    for line in problem_lines(found.problems):
        say(line)


def _table(found: Sequence[Inspection]) -> None:
    from loratools.commands.inspect import human

    rows = [("adapter", "format", "kinds", "rank", "scaling", "targets", "size", "base")]
    for one in found:
        if one.format is None:
            continue
        rows.append(
            (
                safe(one.source),
                one.format,
                "+".join(one.kinds),
                _span(one.ranks),
                _span(one.scalings),
                str(one.targets),
                human(one.nbytes),
                _base(one) or "-",
            )
        )
    if len(rows) > 1:
        say(columns(rows, right=(3, 4, 5, 6), cut=0, titled=True))
    for one in found:
        if one.format is None:
            say(f"  {safe(one.source)}: no adapter; it looks like {safe(one.looks_like or '')}")
        elif one.problems:
            place = typed(one.source)
            say(f"  {safe(one.source)}: {counted(one.problems)}; see loratools inspect {place}")


def _base(found: Inspection) -> str:
    if not found.base:
        return ""
    return shown(found.base) + (f" @ {shown(found.revision)}" if found.revision else "")


def _counted(counts: dict[Any, int]) -> str:
    """The values, the most frequent first, with how often where there are several."""
    if not counts:
        return "none"
    if len(counts) == 1:
        return shown(next(iter(counts)))
    return ", ".join(f"{shown(value)} ({n})" for value, n in counts.items())


def _span(counts: dict[Any, int]) -> str:
    """The only value, or the smallest and the largest."""
    if not counts:
        return "-"
    low, high = min(counts), max(counts)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"
