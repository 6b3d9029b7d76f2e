"""`loratools merge`: adapters into one, or folded into a base; and the summary of what was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from loratools.cli import options
from loratools.cli.progress import progress
from loratools.cli.screen import columns, problem_lines, safe, say, say_json, share, strong, typed
from loratools.errors import error, shown

if TYPE_CHECKING:
    from loratools.commands.merge import MergeResult

EXAMPLES = """\
loratools merge my-lora --base Llama-3.1-8B -o folded
loratools merge a b -w 0.7,0.3 --rank 16 -o both
loratools merge style -w "unet=0.8;text_encoder=0.4" -b sdxl -o baked"""
USAGE = "-o OUT [OPTIONS]"

Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        "-o",
        metavar="OUT",
        help="The output: a folder, or one .safetensors file for a folded model.",
        rich_help_panel=options.FILES,
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="RECEIPT",
        help="Make the output of this receipt (OUT/loratools.json) again; adapters and base are "
        "looked for beside it, here, and among those given, and known by their fingerprints.",
        rich_help_panel=options.FILES,
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        "-m",
        metavar="METHOD",
        help="linear: the exact weighted sum; cat and svd are its names without and with --rank.",
        rich_help_panel=options.MATHS,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="base|adapter|PATH",
        help="Whose tokenizer a folded model gets; without it: the adapter's, where exactly one "
        "adapter has a different one.",
        rich_help_panel=options.FILES,
    ),
]
MinKept = Annotated[
    float | None,
    typer.Option(
        "--min-kept",
        metavar="SHARE",
        help="Refuse where rounding would keep less than this share of the update (0.5, say).",
        rich_help_panel=options.JUDGING,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", "-n", help="Check everything, show the plan, write nothing.",
        rich_help_panel=options.RUNNING,
    ),
]  # fmt: skip
Restart = Annotated[
    bool,
    typer.Option(
        "--restart", help="Discard what an interrupted run has finished, instead of going on.",
        rich_help_panel=options.RUNNING,
    ),
]  # fmt: skip
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda",
        help="Where a fold computes; auto takes a GPU only where arithmetic bounds the work.",
        rich_help_panel=options.RUNNING,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", min=1, help="Threads of a fold; the bytes never depend on it.",
        rich_help_panel=options.RUNNING,
    ),
]  # fmt: skip


def command(
    adapters: options.WeightedAdapters = None,
    base: options.Base = None,
    out: Out = None,
    reference: options.Reference = None,
    to: options.To = None,
    recipe: Recipe = None,
    tokenizer: Tokenizer = None,
    assume: options.Assume = None,
    weights: options.Weights = None,
    method: Method = "linear",
    rank: options.Rank = None,
    energy: options.Energy = None,
    dtype: options.Dtype = None,
    only: options.Only = None,
    skip: options.Skip = None,
    tied: options.Tied = False,
    untie: options.Untie = False,
    allow: options.Allow = None,
    fail_on: options.FailOn = None,
    min_kept: MinKept = None,
    dry_run: DryRun = False,
    force: options.Force = False,
    restart: Restart = False,
    device: Device = "auto",
    threads: Threads = None,
    hash: options.Hash = options.Hashes.auto,
    quiet: options.Quiet = False,
    how: options.Progress = options.Bars.auto,
    as_json: options.Json = False,
    debug: options.Debug = False,
    help_page: options.Help = False,
) -> None:
    """Merge adapters into one adapter; with --base, fold them into the model.

    The sum is exact: of the updates, not of the factors. Everything that can be known is checked
    before the first byte is written, and the output appears whole or not at all. An interrupted
    fold goes on where it stopped when the same command runs again.
    """
    from loratools.commands.merge import merge

    with progress(how, quiet=quiet) as told:
        result = merge(
            adapters or (),
            base,
            out=out,
            to=to,
            weights=parsed(weights),
            method=method,
            rank=rank,
            energy=energy,
            dtype=dtype,
            only=only or (),
            skip=skip or (),
            tied=tied,
            untie=untie,
            allow=allow or (),
            fail_on=fail_on or (),
            min_kept=min_kept,
            assume=assume or (),
            tokenizer=tokenizer,
            force=force,
            restart=restart,
            dry_run=dry_run,
            device=device,
            threads=threads,
            hash=hash.value,
            recipe=recipe,
            reference=reference,
            progress=told,
        )
    if as_json:
        say_json(result.as_json())
    elif not quiet:
        summary(result)


def parsed(weights: Sequence[str] | None) -> list[float | str] | str | None:
    """`-w` as given: numbers between commas or one by one, parts one by one, or "mean"."""
    texts = list(weights or ())
    if texts in ([], ["mean"]):
        return texts[0] if texts else None
    words: list[float | str] = []
    for text in texts:
        if "=" in text:  # the numbers of `lbw` have commas too
            words.append(text)
            continue
        try:
            words += [float(w) for w in text.split(",")]
        except ValueError:
            given = shown(",".join(texts))
            wanted = "numbers such as 0.7,0.3, or mean, or parts: unet=0.8;text_encoder=0.4"
            raise error("usage", f"--weights {given}: expected {wanted}") from None
    return words


def summary(result: MergeResult) -> None:
    """Print what was made: the sum of it, each group of targets, what was odd, what comes next."""
    folded = result.adapter is None
    say(strong(safe(result.makes)) + (" (dry run)" if result.dry_run else ""))
    say()
    if result.groups:
        say(_groups(result))
        say()
    say(f"  {result.targets} of {result.total} targets")
    if len(result.weights) > 1 or any(isinstance(w, str) for w in result.weights):
        words = [safe(w) if isinstance(w, str) else f"{w:g}" for w in result.weights]
        say(f"  {result.method}, weights {', '.join(words)}")
    if result.update_kept is not None:
        guess = " (estimated on some rows)" if result.dry_run else ""
        say(f"  {share(result.update_kept)} of the update kept{guess}")
    if result.truncation_error is not None:
        say(f"  {share(result.truncation_error)} truncation error, of the update's norm")
    for note in result.notes:
        say(f"  {safe(note)}")
    if result.continued:
        say(f"  went on after what was finished: {', '.join(result.continued)}")
    if result.weaker:
        say("  moved in file by file: the output's folder could not be renamed")
    for line in problem_lines(result.problems):
        say(line)
    say()
    if result.dry_run or result.output is None:
        say("Nothing was written.")
        return
    place = typed(result.output)
    where = f" on {result.device}" if folded and result.device != "cpu" else ""
    say(f"Written to {place} in {result.seconds:.1f} s{where}.")
    runs = result.adapter is not None and result.adapter.runtime is not None
    fold = f"loratools merge {place} --base BASE -o MODEL"
    follow = f"loratools check {place} --base BASE" if runs else fold
    say(f"Next: {f'loratools verify {place}' if folded else follow}")


def _groups(result: MergeResult) -> str:
    rows = [("targets", "count", "scaling", "relative size", "kept")]
    for group in result.groups:
        scalings = [f"{s:g}" for s in group["scalings"]]
        more = [*scalings[:2], "..."] if len(scalings) > 3 else scalings
        rows.append(
            (
                shown(group["group"].removesuffix(".weight")),
                str(group["targets"]),
                ", ".join(more) or "-",
                share(group["relative_size"]),
                share(group["update_kept"]),
            )
        )
    return columns(rows, right=(1, 2, 3, 4), cut=0, titled=True)
