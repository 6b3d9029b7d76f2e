"""`loratools check`: every problem of fitting adapters to a base, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from loratools.cli import options
from loratools.cli.screen import counted, problem_lines, say, say_json, strong
from loratools.errors import shown

if TYPE_CHECKING:
    from loratools.commands.check import CheckResult

EXAMPLES = """\
loratools check my-lora --base Llama-3.1-8B
loratools check a b --base model --data      # reads the adapters' numbers too
loratools check my-lora --fail-on warning    # nothing at all may be odd"""

Data = Annotated[
    bool,
    typer.Option(
        "--data",
        help="Read the adapters' numbers too, and some rows of the base: NaN, untrained factors, "
        "an update larger than the base.",
        rich_help_panel=options.FILES,
    ),
]


def command(
    adapters: options.Adapters,
    base: options.Base = None,
    data: Data = False,
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

    It reads headers, no weights (but see --data). The exit status is 0 where all is well, else 3
    (a file is malformed), 4 (they do not fit) or 5 (the result would be wrong), the lowest.
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
            say(strong("ok" if result.ok else "does not fit") + f": {_verdict(result)}")
    if errors:
        raise typer.Exit(min(p.exit for p in errors))


def _verdict(result: CheckResult) -> str:
    found = counted(result.problems)
    if result.matched is None:
        fit = f"{result.total} targets read; --base BASE checks their fit"
    else:
        fit = f"{result.matched} of {result.total} targets match the base"
    return f"{found}; {fit}" if found else fit
