"""Help pages: usage, what it does, the options by group, examples."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

import typer

from loratools.cli.screen import say, strong, width

LEFT = 24  # columns for the names of options; help of longer ones begins on the next line


def print_page(ctx: typer.Context, wanted: bool) -> None:
    """The callback of `--help`: print the page of the command, and end."""
    if wanted and not ctx.resilient_parsing:
        say("\n".join(page(ctx.command, ctx.command_path, width())))
        raise typer.Exit


def page(command: Any, path: str, columns: int) -> Iterator[str]:
    """The lines of a command's help page."""
    yield f"{strong('Usage:')} {usage(command, path)}"
    for paragraph in (command.help or "").split("\n\n"):
        yield ""
        yield from wrap(paragraph, columns)
    for title, entries in sections(command).items():
        yield ""
        yield strong(f"{title}:")
        left = max(len(name) for name, _ in entries) if title == "Commands" else LEFT
        for name, text in entries:
            yield from entry(name, text, left, columns)
    if command.epilog:
        yield ""
        yield strong("Examples:")
        yield from (f"  {line}" for line in command.epilog.splitlines())


def usage(command: Any, path: str) -> str:
    """The command with its arguments."""
    if getattr(command, "commands", None):
        return f"{path} COMMAND ..."
    words = [p.metavar if p.required else f"[{p.metavar}]" for p in _of(command, "argument")]
    return " ".join([path, *words, command.options_metavar])


def sections(command: Any) -> dict[str, list[tuple[str, str]]]:
    """The commands or arguments, then the options by group: (names, help) of each."""
    found: dict[str, list[tuple[str, str]]] = {}
    inside = getattr(command, "commands", None) or {}
    for name, inner in inside.items():
        if not inner.hidden:
            found.setdefault("Commands", []).append((name, inner.help.split("\n\n")[0]))
    for param in _of(command, "argument"):
        found.setdefault("Arguments", []).append((param.metavar, param.help))
    for param in _of(command, "option"):
        if not param.hidden:
            group = "Options" if inside else param.rich_help_panel
            found.setdefault(group, []).append((names(param), param.help))
    return found


def names(param: Any) -> str:
    """The names of an option, the short one first, and what follows it."""
    short = [o for o in param.opts if not o.startswith("--")]
    long = [o for o in param.opts if o.startswith("--")]
    text = ", ".join([*short, *long]) if short else f"    {', '.join(long)}"
    return text if param.is_flag else f"{text} {param.metavar}"


def _of(command: Any, kind: str) -> list[Any]:
    return [p for p in command.params if p.param_type_name == kind]


def entry(name: str, text: str, left: int, columns: int) -> Iterator[str]:
    """A name in a column of `left` characters, and beside it what it means."""
    lines = wrap(text, columns - left - 4)
    if len(name) > left:
        yield f"  {name}"
    else:
        yield f"  {name.ljust(left)}  {lines.pop(0)}"
    for line in lines:
        yield f"  {' ' * left}  {line}"
