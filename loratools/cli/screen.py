"""What reaches the terminal: text made safe, aligned columns, problems, the one JSON object."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

import typer

from loratools.errors import LoratoolsError, Problem, shown

LISTED = 20  # problems of one code that are printed; the rest is counted
COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
GAP = "  "


def safe(text: str) -> str:
    """Text with every control and direction character but the line end escaped, uncut."""
    if text.isprintable():
        return text
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def typed(path: object) -> str:
    """A path as the user would type it: whole, quoted for the shell where that is needed."""
    return shlex.quote(text) if (text := str(path)).isprintable() else shown(text)


def strong(text: str) -> str:
    """Bold on a terminal."""
    return typer.style(text, bold=True)


def say(text: str = "") -> None:
    """Print a line, which is safe already, to stdout."""
    _write(sys.stdout, text)


def tell(text: str) -> None:
    """Print a line, which is safe already, to stderr; if nobody can read it, the status says it."""
    with suppress(OSError):
        _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    try:
        typer.echo(text, file=stream, color=False if os.environ.get("NO_COLOR") else None)
    except BrokenPipeError:  # the reader has seen enough
        _to_nowhere(stream)
    except OSError:
        _to_nowhere(stream)
        raise


def _to_nowhere(stream: TextIO) -> None:
    """Nothing may be left to flush when Python ends: that would be one more error."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_json(value: Mapping[str, Any]) -> None:
    """Print the object that `--json` promises; numbers that JSON does not have become null."""
    say(json.dumps({"schema": 1, **_finite(value)}, indent=2))


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case _:
            return value


def width() -> int:
    """Columns to write text into, whatever the terminal's own width."""
    return min(100, shutil.get_terminal_size((80, 24)).columns)


# ------------------------------------------------------------------------------- columns


def columns(
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    cut: int | None = None,
    titled: bool = False,
) -> str:
    """Rows in aligned columns, indented by two; `right` ones flush right, the first row a title.

    On a terminal the column `cut` gives way where lines would be too long, keeping its end.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    over = len(GAP) * len(widths) + sum(widths) - shutil.get_terminal_size((80, 24)).columns
    if cut is not None and over > 0 and (sys.stdout.isatty() or "COLUMNS" in os.environ):
        widths[cut] = max(12, widths[cut] - over)
    lines = []
    for row in rows:
        cells = [
            (_end(cell, w).rjust(w) if i in right else _end(cell, w).ljust(w))
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(GAP + GAP.join(cells).rstrip())
    if titled:
        lines[0] = strong(lines[0])
    return "\n".join(lines)


def _end(text: str, size: int) -> str:
    return text if len(text) <= size else "..." + text[len(text) - size + 3 :]


def share(value: float | None) -> str:
    """A share in percent; very small ones by their power of ten."""
    if value is None:
        return "-"
    percent = 100 * value
    return f"{percent:.2f} %" if percent == 0 or abs(percent) >= 0.01 else f"{percent:.0e} %"


# ------------------------------------------------------------------------------- problems


def problem_lines(problems: Iterable[Problem]) -> list[str]:
    """Every problem on a line of its own, errors first, one code together with its remedies."""
    order = {"error": 0, "warning": 1, "note": 2}
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in sorted(problems, key=lambda p: order[p.severity]):
        groups.setdefault((problem.severity, problem.code), []).append(problem)
    lines = []
    for (severity, code), found in groups.items():
        label = typer.style(f"{severity}[{code}]", fg=COLOURS[severity], bold=severity == "error")
        lines += [f"{label}: {safe(_named(p))}" for p in found[:LISTED]]
        if len(found) > LISTED:
            lines.append(f"  ... and {len(found) - LISTED} more of {code}")
        if severity != "note":
            lines += [f"  -> {safe(a)}" for a in list(dict.fromkeys(p.advice for p in found))[:3]]
    return lines


def _named(problem: Problem) -> str:
    """The message, behind the name of its adapter where it does not say that itself."""
    name = shown(problem.adapter or "")
    return problem.message if name in problem.message else f"{name}: {problem.message}"


def counted(problems: Iterable[Problem]) -> str:
    """How many of each severity, in words: "2 errors, 1 warning"."""
    found = [p.severity for p in problems]
    words = [(found.count(s), s) for s in ("error", "warning", "note") if s in found]
    return ", ".join(f"{n} {s}{'s' if n > 1 else ''}" for n, s in words)


def refused(cause: LoratoolsError, *, as_json: bool, command: str = "loratools") -> None:
    """Tell an error: all its problems on stderr, and for `--json` the object on stdout."""
    lines = problem_lines(cause.problems)
    if len(cause.problems) > 1:
        # A proof that failed is of what was written.
        verb = "sent" if command.endswith(" push") else "written"
        end = "" if cause.exit == 8 else f"; nothing was {verb}"
        lines.append(counted(cause.problems) + end)
    for line in lines:
        tell(line.replace("loratools COMMAND", command))
    if as_json:
        failed(cause.code, cause.exit, cause.message, cause.problems)


def failed(code: str, exit: int, message: str, problems: Iterable[Problem] = ()) -> None:
    """The error as the object that `--json` promises; unwritten, it leaves its status."""
    from loratools.commands.inspect import as_json

    listed = [as_json(p) for p in problems]
    with suppress(OSError):
        say_json({"error": {"code": code, "exit": exit, "message": message, "problems": listed}})
