"""`loratools convert`: the same adapter in another format, or at another rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from loratools.cli import options
from loratools.cli.screen import problem_lines, safe, say, say_json, strong, typed

if TYPE_CHECKING:
    from loratools.commands.convert import ConvertResult

EXAMPLES = """\
loratools convert my-lora --rank 8 -o smaller
loratools convert style.safetensors --to diffusers -o out.safetensors
loratools convert my-lora --to gguf --base Llama-3.2-1B -o my-lora.gguf"""
USAGE = "-o OUT [OPTIONS]"

Out = Annotated[
    str,
    typer.Option(
        "--out",
        "-o",
        metavar="OUT",
        help="The output; for several adapters the folder of their outputs.",
        rich_help_panel=options.FILES,
    ),
]


def command(
    adapters: options.Adapters,
    out: Out,
    to: options.To = None,
    base: options.Base = None,
    assume: options.Assume = None,
    rank: options.Rank = None,
    energy: options.Energy = None,
    dtype: options.Dtype = None,
    only: options.Only = None,
    skip: options.Skip = None,
    allow: options.Allow = None,
    fail_on: options.FailOn = None,
    force: options.Force = False,
    hash: options.Hash = options.Hashes.auto,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
    help_page: options.Help = False,
) -> None:
    """Write the same adapter in another format, or at another rank.

    Without --rank, --energy and --dtype every number keeps its bytes; with them the summary says
    by how much the update differs. Several adapters go into a folder, each under its own name.
    With --base, `--to peft` writes plain LoRA for any method that folds: exactly, or at --rank.
    `--to bottleneck` writes a Compacter as the plain bottleneck that it is.
    """
    from loratools.commands.convert import convert

    results = convert(
        adapters,
        to=to,
        out=out,
        base=base,
        rank=rank,
        energy=energy,
        dtype=dtype,
        only=only or (),
        skip=skip or (),
        allow=allow or (),
        fail_on=fail_on or (),
        assume=assume or (),
        force=force,
        hash=hash.value,
    )
    if as_json:
        items = [r.as_json() for r in results]
        say_json(items[0] if len(adapters) == 1 else {"items": items})
    elif not quiet:
        _summary(results)


def _summary(results: Sequence[ConvertResult]) -> None:
    for result in results:
        say(strong(safe(result.makes)))
        say(f"  {result.targets} targets, " + ("lossless" if result.lossless else "not lossless:"))
        for lost in result.lost:
            say(f"  - {safe(lost)}")
        for note in result.notes:
            say(f"  {safe(note)}")
        for line in problem_lines(result.problems):
            say(line)
        say(f"Written to {typed(result.output)} in {result.seconds:.1f} s.")
    if len(results) == 1:
        place = typed(results[0].output)
        fold = f"loratools merge {place} --base BASE -o MODEL"
        say(f"Next: {fold if results[0].foldable else f'loratools check {place} --base BASE'}")
