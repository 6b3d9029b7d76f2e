"""`loratools verify`: the proof that an output is what its receipt, or the maths, says."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from loratools.cli import options
from loratools.cli.merge import parsed
from loratools.cli.progress import progress
from loratools.cli.screen import LISTED, safe, say, say_json, strong

EXAMPLES = """\
loratools verify folded
loratools verify folded --require replay     # make it again and compare
loratools verify model --base base --adapter my-lora"""


class Proofs(StrEnum):
    """What a proof must consist of at least."""

    hashes = "hashes"
    replay = "replay"


Model = Annotated[str, typer.Argument(metavar="OUT", help="The output to prove.")]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="ADAPTER",
        help="An adapter that was folded in. Repeatable.",
        rich_help_panel=options.FILES,
    ),
]
Require = Annotated[
    Proofs | None,
    typer.Option(
        "--require",
        metavar="hashes|replay",
        help="The proof asked for; replay makes the output again and compares.",
        rich_help_panel=options.RUNNING,
    ),
]


def command(
    model: Model,
    base: options.Base = None,
    adapter: Adapter = None,
    weights: options.Weights = None,
    require: Require = None,
    quiet: options.Quiet = False,
    how: options.Progress = options.Bars.auto,
    as_json: options.Json = False,
    debug: options.Debug = False,
    help_page: options.Help = False,
) -> None:
    """Prove that an output is what its receipt says; or, of a model, what the maths says.

    The exit status is 8 where the proof fails.
    """
    from loratools.commands.verify import verify

    with progress(how, quiet=quiet) as told:
        result = verify(
            model,
            base=base,
            adapters=adapter or (),
            weights=parsed(weights),
            require=require and require.value,
            progress=told,
        )
    table = result.as_json()
    if as_json:
        say_json(table)
    elif not quiet or not result.ok:
        _verdict(table)
    if not result.ok:
        raise typer.Exit(8)


def _verdict(table: dict[str, Any]) -> None:
    wrong = table["mismatches"]
    for one in wrong[:LISTED]:
        say(f"  {safe(str(one))}")
    if len(wrong) > LISTED:
        say(f"  ... and {len(wrong) - LISTED} more")
    if table["ok"]:
        say(strong(f"proved by {table['proved']}") + f": {table['checked']} checked")
    else:
        say(strong("not proved") + f": {len(wrong)} of {table['checked']} differ")
