"""`loratools inspect`: what stands at a path, on one screen; several paths as a table."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
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
loratools inspect loras/ --sort size     # a folder of adapters: a table
loratools inspect my-lora --json | jq .ranks"""

WORDS = 30  # characters of trigger words in a table


class Order(StrEnum):
    """What a table can be sorted by."""

    name = "name"
    format_ = "format"
    base = "base"
    rank = "rank"
    scaling = "scaling"
    targets = "targets"
    size = "size"


Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH...", help=f"Adapters, folders of adapters, or {options.ON_THE_HUB}."
    ),
]
Sort = Annotated[
    Order | None,
    typer.Option(
        "--sort",
        metavar="name|format|base|rank|scaling|targets|size",
        help="The order of the table: names upwards, numbers downwards.",
        rich_help_panel=options.PRINTING,
    ),
]
Hash = Annotated[
    bool,
    typer.Option(
        "--hash",
        help="Read the files whole for the hashes that Civitai and A1111 search by (AutoV2, "
        "AutoV3), and compare the latter with the stored one.",
        rich_help_panel=options.FILES,
    ),
]


def command(
    paths: Paths,
    assume: options.Assume = None,
    hash: Hash = False,
    sort: Sort = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
    help_page: options.Help = False,
) -> None:
    """Show what an adapter is, from its headers alone.

    Its format, kinds, ranks, scaling, targets, size, base and trigger words. Several paths, or a
    folder of adapters, print a table: files and sub-folders, and which of them are the same. What
    is no adapter is named; what cannot be read does not hide the others, but decides on the status.
    """
    from loratools.commands.inspect import inspect

    found = inspect(*paths, assume=assume or (), sort=sort.value if sort else None, hash=hash)
    alone = len(found) == 1 and len(paths) == 1
    if as_json:
        say_json(found[0].as_json() if alone else {"items": [f.as_json() for f in found]})
    elif alone:
        _one(found[0])
    else:
        _table(found)
    unread = [f.error.exit for f in found if f.error is not None]
    if unread:
        raise typer.Exit(min(unread))


def _one(found: Inspection) -> None:
    from loratools.commands.inspect import human

    if found.format is None:
        say(f"{safe(found.source)}: no adapter; it looks like {_looks(found)}")
        return
    dtypes = ", ".join(found.dtypes)
    say(strong(f"{safe(found.source)}: {found.format} adapter, {human(found.nbytes)}"))
    if found.runtime is not None:
        say(_runtime(found.runtime))
    rows = [
        ("kinds", _counted(found.kinds)),
        ("ranks", _counted(found.ranks)),
        ("scaling", _counted({f"{s:g}": n for s, n in found.scalings.items()})),
        ("targets", f"{found.targets}: {_counted(found.modules)}"),
        ("parameters", f"{found.parameters:,} in {dtypes}"),
        ("base", _base(found) or "not named"),
        ("task", shown(found.task) if found.task else "not named"),
        ("foldable", "yes" if found.foldable else "no"),
        *_about(found),
    ]
    for name, text in rows:
        lines = entry(name, text.replace(" (", "\N{NO-BREAK SPACE}("), 10, width())
        say("\n".join(lines).replace("\N{NO-BREAK SPACE}", " "))
    for line in problem_lines(found.problems):
        say(line)


def _runtime(said: dict[str, Any]) -> str:
    """A runtime adapter in its own terms; the parts of a union a line each."""
    lines: list[str] = []
    for one in said.get("parts") or [said]:
        words = [
            f"{key.replace('_', ' ')} {_value(value)}"
            for key, value in one.items()
            if key not in ("method", "parameters") and value is not None
        ]
        lines += entry("runtime", f"{shown(one['method'])}: {', '.join(words)}", 10, width())
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "+".join(shown(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else shown(value)


def _about(found: Inspection) -> list[tuple[str, str]]:
    """What only some adapters say of themselves, and what only `--hash` finds."""
    rows = []
    if found.title:
        rows.append(("title", shown(found.title)))
    if found.trigger_words:
        rows.append(("words", ", ".join(shown(w) for w in found.trigger_words)))
    if found.tags:
        rows.append(("tags", _counted(found.tags)))
    if found.hashes is not None:
        rows.append(("AutoV2", found.hashes.autov2))
        agrees = {True: " (as stored)", False: " (another one is stored)", None: ""}
        if found.hashes.autov3 is not None:
            rows.append(("AutoV3", found.hashes.autov3 + agrees[found.hash_agrees]))
    return rows


def _table(found: Sequence[Inspection]) -> None:
    from loratools.commands.inspect import human

    titles = ["adapter", "format", "kinds", "rank", "scaling", "targets", "size", "base"]
    words = any(f.trigger_words for f in found)
    hashed = any(f.hashes for f in found)
    titles += ["words"] * words + ["AutoV2", "AutoV3"] * hashed
    rows = [titles]
    for one in found:
        if one.format is None:
            continue
        row = [
            safe(one.source),
            one.format,
            "+".join(one.kinds) or (one.runtime or {}).get("method", ""),
            _span(one.ranks),
            _span(one.scalings),
            str(one.targets),
            human(one.nbytes),
            _base(one) or "-",
        ]
        if words:
            row.append(shown(", ".join(one.trigger_words))[:WORDS] or "-")
        if hashed:
            row += [one.hashes.autov2, one.hashes.autov3 or "-"] if one.hashes else ["-", "-"]
        rows.append(row)
    if len(rows) > 1:
        say(columns(rows, right=(3, 4, 5, 6), cut=0, titled=True))
    for one in found:
        if one.error is not None:
            for line in problem_lines([one.error])[:1]:
                say(f"  {line}")
        elif one.format is None:
            say(f"  {safe(one.source)}: no adapter; it looks like {_looks(one)}")
        elif one.problems:
            place = typed(one.source)
            say(f"  {safe(one.source)}: {counted(one.problems)}; see loratools inspect {place}")
        if one.duplicate_of is not None:
            say(f"  {safe(one.source)}: holds the same tensors as {safe(one.duplicate_of)}")


def _looks(found: Inspection) -> str:
    """What it looks like; that it is no adapter has been said before."""
    return safe((found.looks_like or "").replace(", not an adapter", ""))


def _base(found: Inspection) -> str:
    if not found.base:
        return shown(found.architecture) if found.architecture else ""
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
