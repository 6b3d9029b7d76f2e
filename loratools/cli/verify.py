"""`loratools verify`: the proof that an output is what its receipt, or the maths, says."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from loratools.cli import options
from loratools.cli.merge import parsed
from loratools.cli.progress import progress
from loratools.cli.screen import LISTED, safe, say, say_json, strong
from loratools.errors import shown

EXAMPLES = """\
loratools verify folded
loratools verify folded --key public.pem      # model.sig, over all its files
loratools verify model --base base --adapter my-lora"""


class Proofs(StrEnum):
    """What a proof must consist of at least."""

    hashes = "hashes"
    replay = "replay"


Model = Annotated[
    str,
    typer.Argument(
        metavar="OUT",
        help=f"The output to prove, or the fold of another tool; also {options.ON_THE_HUB}.",
    ),
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="ADAPTER",
        help="An adapter it was made from; PATH:0.7 gives one its weight. Repeatable.",
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


Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="PUBLIC.pem",
        help="Check the folder's signature, model.sig, with this public key.",
        rich_help_panel=options.FILES,
    ),
]


def command(
    model: Model,
    base: options.Base = None,
    adapter: Adapter = None,
    weights: options.Weights = None,
    only: options.Only = None,
    skip: options.Skip = None,
    tied: options.Tied = False,
    untie: options.Untie = False,
    allow: options.Allow = None,
    require: Require = None,
    key: Key = None,
    quiet: options.Quiet = False,
    how: options.Progress = options.Bars.auto,
    as_json: options.Json = False,
    debug: options.Debug = False,
    help_page: options.Help = False,
) -> None:
    """Prove that an output is what its receipt says; of another tool's fold, what the maths says.

    A receipt's hashes are compared, and where the inputs are found (given here, beside the output
    or in the working folder) everything is computed again. Without a receipt --base and every
    --adapter are needed. The exit status is 8 where the proof fails.
    """
    from loratools.commands.verify import verify

    with progress(how, quiet=quiet) as told:
        result = verify(
            model,
            base=base,
            adapters=adapter or (),
            weights=parsed(weights),
            require=require and require.value,
            key=key,
            only=only or (),
            skip=skip or (),
            tied=tied,
            untie=untie,
            allow=allow or (),
            progress=told,
        )
    if as_json:
        say_json(result.as_json())
    elif not quiet or not result.ok:
        _verdict(result.as_json())
    if not result.ok:
        raise typer.Exit(8)


def _verdict(table: Mapping[str, Any]) -> None:
    wrong = table["mismatches"]
    for one in wrong[:LISTED]:
        say(f"  {_mismatch(one)}")
    if len(wrong) > LISTED:
        say(f"  ... and {len(wrong) - LISTED} more")
    if table["rule"]:
        say(f"  rounding: {safe(table['rule'])}")
    match table["strength"]:
        case {"scaling": scaling, "standard_error": error}:
            say(f"  strength: {scaling:.4g} of the update, give or take {error:.1g}")
        case str(unclear):
            say(f"  strength: {unclear}")
    for note in table["notes"]:
        say(f"  {safe(note)}")
    checked = f"{table['checked']} {table['unit']} checked"
    if table["proved"] == "signature":
        checked = f"{table['signed']} signed files"
    if table["ok"]:
        say(strong(f"proved by {table['proved']}") + f": {checked}")
    else:
        count = f"{len(wrong)} mismatch{'es' if len(wrong) > 1 else ''}"
        say(strong("not proved") + f": {checked}, {count}")


def _mismatch(one: Mapping[str, Any]) -> str:
    """One line: where, what, and by how much."""
    where = one["tensor"] or one["file"]
    line = f"{shown(where)}: {safe(one['what'])}" if where else safe(one["what"])
    if one["elements"]:
        worst = "" if one["worst"] is None else f", by up to {one['worst']:.2g}"
        count = f"{one['elements']} element{'s' if one['elements'] > 1 else ''}"
        line += f" ({count}, the first at {one['first']}{worst})"
    return line
