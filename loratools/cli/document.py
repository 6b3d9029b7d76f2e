"""The page specs/cli.md, made from the commands themselves: `python -m loratools.cli.document`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from loratools.cli.app import build
from loratools.cli.pages import sections, usage
from loratools.errors import CODES

EXITS = {
    0: "done",
    1: "a bug of ours (one line; the traceback with `--debug`)",
    2: "usage; also: the output equals an input or lies inside one",
    3: "an input is malformed or hostile",
    4: "adapter and base do not fit",
    5: "refused because the result would lose something or very likely be wrong",
    6: "reading or writing failed: disk full, permission, an input changed meanwhile",
    7: "the output exists or is locked; the Hub moved on meanwhile",
    8: "the proof failed",
    9: "authentication or permission on the Hub",
    10: "not found, or gated",
    11: "network, or offline",
    130: "interrupted",
    143: "terminated",
}


def document() -> str:
    """The whole page in Markdown."""
    app: Any = get_command(build())
    lines = [
        "# Command line",
        "",
        "Made by `python -m loratools.cli.document > specs/cli.md`; do not edit it by hand.",
        "",
        "Results go to stdout, errors and progress to stderr. With `--json` stdout has exactly one",
        'object: `{"schema": 1, ...}`, with `items` where several paths were asked about, and',
        '`{"schema": 1, "error": {"code", "exit", "message", "problems"}}` for an error.',
    ]
    for name, command in app.commands.items():
        if not command.hidden:
            lines += _command(command, f"loratools {name}")
    lines += ["", "## Exit status", "", "| exit | meaning |", "|---:|---|"]
    lines += [f"| {number} | {meaning} |" for number, meaning in EXITS.items()]
    lines += ["", "With several problems the lowest of 3, 4 and 5.", "", "## Problem codes", ""]
    lines += ["| code | exit | `--allow` | meaning | remedy |", "|---|---:|---|---|---|"]
    for name, code in CODES.items():
        may = "yes" if code.waivable else "no"
        lines.append(f"| `{name}` | {code.exit} | {may} | {code.meaning} | {code.remedy} |")
    return "\n".join(lines) + "\n"


def _command(command: Any, path: str) -> Iterator[str]:
    yield from ("", f"## {path}", "", "```", usage(command, path), "```")
    for paragraph in command.help.split("\n\n"):
        yield from ("", " ".join(paragraph.split()))
    for title, entries in sections(command).items():
        yield from ("", f"| {title} | |", "|---|---|")
        for name, text in entries:
            said = name.strip().replace("|", "\\|")
            yield f"| `{said}` | {text} |"
    yield from ("", "```", *command.epilog.splitlines(), "```")


if __name__ == "__main__":
    sys.stdout.write(document())
