"""`loratools check`: every problem of fitting adapters to a base, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from loratools.cli import options
from loratools.cli.screen import counted, problem_lines, safe, say, say_json, strong
from loratools.errors import shown

if TYPE_CHECKING:
    from loratools.commands.check import CheckResult

EXAMPLES = """\
loratools check my-lora --base Llama-3.1-8B
loratools check a b --base model --data      # reads the adapters' numbers too
loratools check my-lora --for vllm@0.11      # will that reader take it?"""

Data = Annotated[
    bool,
    typer.Option(
        "--data",
        help="Read the adapters' numbers too, and some rows of the base: NaN, untrained factors, "
        "an update larger than the base.",
        rich_help_panel=options.FILES,
    ),
]

For = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="READER[@VERSION]",
        help="What this reader will refuse, ignore or misread, and the line to paste: vllm, "
        "sglang, llama.cpp, ollama, comfyui, a1111, diffusers, mlx, onnxruntime, tensorrt-llm, "
        "peft.",
        rich_help_panel=options.JUDGING,
    ),
]


def command(
    adapters: options.Adapters,
    base: options.Base = None,
    data: Data = False,
    reference: options.Reference = None,
    reader: For = None,
    assume: options.Assume = None,
    only: options.Only = None,
    skip: options.Skip = None,
    tied: options.Tied = False,
    untie: options.Untie = False,
    allow: options.Allow = None,
    fail_on: options.FailOn = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
    help_page: options.Help = False,
) -> None:
    """Find every problem of fitting adapters to a base, before anything is made.

    It reads headers, no weights (but see --data). With --for it ends in the line that loads the
    adapters in that reader, or that makes them acceptable first. The exit status is 0 where all is
    well, else 3 (a file is malformed), 4 (they do not fit) or 5 (the result would be wrong), the
    lowest.
    """
    from loratools.commands.check import check

    result = check(
        adapters,
        base,
        data=data,
        only=only or (),
        skip=skip or (),
        tied=tied,
        untie=untie,
        allow=allow or (),
        fail_on=fail_on or (),
        assume=assume or (),
        for_=reader,
        reference=reference,
    )
    errors = [p for p in result.problems if p.severity == "error"]
    table = result.as_json()
    if as_json:
        say_json(table)
    else:
        shown_problems = errors if quiet else result.problems
        for line in problem_lines(shown_problems):
            say(line)
        if not quiet:
            for prefix in table["prefixes"]:
                say(f"names: {shown(prefix)}")
            say(strong("ok" if result.ok else _failed(result)) + f": {_verdict(result)}")
        if result.line and not quiet:
            say(safe(result.line))
    if errors:
        raise typer.Exit(min(p.exit for p in errors))


def _failed(result: CheckResult) -> str:
    """What an error means: that it does not fit the base, or only that the reader is no good."""
    errors = [p.code for p in result.problems if p.severity == "error"]
    if result.reader and all(code.startswith("reader_") for code in errors):
        return f"not for {result.reader}"
    return "does not fit"


def _verdict(result: CheckResult) -> str:
    found = counted(result.problems)
    if result.matched is None:
        fit = f"{result.total} targets read; --base BASE checks their fit"
    else:
        fit = f"{result.matched} of {result.total} targets match the base"
    return f"{found}; {fit}" if found else fit
