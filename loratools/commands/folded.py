"""The half of `merge` that folds: plan, sample, write shards and companions, receipt."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools import receipt
from loratools.algebra import block
from loratools.commands.companions import Companions, plan_companions
from loratools.commands.inspect import as_json, human, pair
from loratools.commands.judging import Judged, judge, known
from loratools.commands.merge import MergeResult, Progress
from loratools.commands.numbers import KEPT, Sampled, lost, pooled, sampled, survives
from loratools.desk import choose_device
from loratools.errors import Problem, error, shown
from loratools.folding import Cut, Tally
from loratools.plan import Plan
from loratools.streaming import stream
from loratools.untouched import is_whole
from loratools.weights.layout import OutputShard, index_files, plan_shards
from loratools.weights.placing import resolved
from loratools.weights.publishing import publish


def fold(
    plan: Plan,
    problems: Sequence[Problem],
    recipe: dict[str, Any],
    *,
    out: Path | None,
    allow: Sequence[str],
    fail_on: Sequence[str],
    min_kept: float | None,
    force: bool,
    restart: bool,
    dry_run: bool,
    device: str,
    threads: int | None,
    hash: str,
    progress: Progress | None,
) -> MergeResult:
    """Fold a plan into its base at `out`; every check comes before the first byte."""
    dtype = recipe["dtype"]
    rank, energy = recipe["rank"], recipe["energy"]
    cut = None if rank is None and energy is None else Cut(rank, energy)
    where = choose_device(device, plan)
    as_file = out is not None and out.suffix == ".safetensors"
    named = [(plan.base.name, plan.base.bundle.path), *((a.name, a.folder) for a in plan.adapters)]
    inputs = [_input(name, folder) for name, folder in named if folder]
    if plan.base.graph is not None:
        from loratools.commands.graph_fold import fold_graph

        return fold_graph(
            plan, problems, recipe, out=out, inputs=inputs, allow=allow, fail_on=fail_on,
            min_kept=min_kept, force=force, dry_run=dry_run, device=device, threads=threads,
            hash=hash, progress=progress,
        )  # fmt: skip
    if out is not None:
        resolved(out, as_file=as_file, inputs=inputs)  # a wrong call comes before all that it finds
    if any(p.severity == "error" for p in judge(problems, known(allow, problems)).problems):
        judge(problems, allow, fail_on).require()
    sample = sampled(plan, dtype=dtype, cut=cut, min_kept=min_kept)
    judged = judge([*problems, *sample.problems], allow, fail_on)
    judged.require()
    companions = plan_companions(plan, dtype=dtype, tokenizer=recipe["tokenizer"])
    shards = output_shards(plan, dtype)
    if as_file and out is not None:
        if len(shards) > 1 or plan.base.components:
            folder = shown(str(out.with_suffix("")))
            raise error(
                "usage",
                f"-o {shown(str(out))}: the base is a folder of {len(shards)} files of weights, "
                f"and so is the output; name a folder, such as -o {folder}",
            )
        shards = (replace(shards[0], name=out.name),)
        companions = Companions()
    nbytes = sum(s.size for s in shards)
    result = announced(
        plan,
        "model",
        nbytes,
        sample,
        judged,
        method=recipe["method"],
        out=out,
        notes=(*companions.notes, *_pickled(shards), *_whole(plan)),
        dry_run=dry_run,
        device=str(where),
    )
    if dry_run or out is None:
        return result
    recipe = {"base": receipt.base_entry(plan.base), **recipe}
    with publish(
        out,
        as_file=as_file,
        inputs=inputs,
        force=force,
        needed=nbytes + 1_000_000,
        plan=receipt.plan_hash(recipe),
        restart=restart,
        check=lambda path, record: is_whole(path, record, shards),
    ) as output:
        streamed = stream(
            shards, {plan.output_name(n): t for n, t in plan.targets.items()}, output, cut=cut,
            device=where, threads=threads, progress=progress,
        )  # fmt: skip
        files = [s.name for s in shards] + companions.write(output.folder)
        for name, table in index_files(plan.base, shards).items():
            (output.folder / name).write_bytes(table)
            files.append(name)
        tallies = streamed.tallies
        receipt.write(
            output.folder,
            makes=result.makes,
            recipe=recipe,
            device=str(where),
            files=files,
            hash=hash,
            name=f"{out.name}.{receipt.NAME}" if as_file else receipt.NAME,
            **accounted(plan, judged, tallies),
        )
    by_target = {n: t for n in plan.targets if (t := tallies.get(plan.output_name(n)))}
    finished(result, tallies, groups(plan, by_target, sample.tallies))
    result.continued = streamed.continued
    result.weaker = output.weaker
    return result


def accounted(plan: Plan, judged: Judged, tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """What a fold's receipt says of coverage, waivers and touched weights."""
    return {
        "coverage": {
            "matched": list(plan.matched),
            "total": list(plan.total),
            "prefixes": [str(p) for p in plan.prefixes if p],
        },
        "waived": [as_json(p) for p in judged.waived],
        "targets": {n: entry(t) for n, t in sorted(tallies.items())},
    }


def finished(result: MergeResult, tallies: dict[str, Tally], table: list[dict[str, Any]]) -> None:
    """Put what was measured while writing in the place of what the sample told."""
    result.update_kept = pooled(tallies.values())
    result.truncation_error = truncation(tallies)
    result.groups = table
    if lost(result.update_kept, KEPT) and not any(p.code == "loss" for p in result.problems):
        result.problems += (Problem("loss", survives(result.update_kept), "warning"),)


def announced(
    plan: Plan,
    made: str,
    nbytes: int,
    sample: Sampled,
    judged: Judged,
    *,
    method: str,
    out: Path | None,
    notes: Sequence[str],
    dry_run: bool,
    device: str,
) -> MergeResult:
    """What a fold is going to make, as far as headers and a sample of rows can tell."""
    count = len(plan.adapters)
    base = Path(plan.base.name).name
    return MergeResult(
        makes=f"fold: {count} adapter{'s' if count > 1 else ''} into {base} -> "
        f"{made}, {human(nbytes)}",
        output=out,
        targets=sum(plan.matched),
        total=sum(plan.total),
        method=method,
        weights=[],
        truncation_error=None,
        update_kept=sample.update_kept,
        seconds=0.0,
        nbytes=nbytes,
        problems=judged.problems,
        notes=(*(f"names: {p}" for p in plan.prefixes if p.added or p.removed), *notes),
        groups=groups(plan, sample.tallies, sample.tallies),
        dry_run=dry_run,
        device=device,
    )


def _pickled(shards: Sequence[OutputShard]) -> list[str]:
    """That files stay torch's, which not every reader takes."""
    files = [shard.name for shard in shards if shard.whole is not None]
    if not files:
        return []
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    remedy = "push takes no pickles, and --dtype makes safetensors of every component"
    return [f"{shown(files[0])}{more}: copied as is, touched by no adapter; {remedy}"]


def _whole(plan: Plan) -> list[str]:
    """What kinds that mix all rows take beyond a tile: the weight, the result and the update."""
    sizes = [
        3 * 8 * math.prod(target.shape)
        for target in plan.targets.values()
        if any(block(term.delta) == 0 for term in target.terms)
    ]
    if not sizes:
        return []
    need = f"up to {human(max(sizes))} a thread"
    return [f"{len(sizes)} weights are held whole in float64, since all their rows mix: {need}"]


def _input(name: str, folder: Path) -> Path:
    """What was named: one file, beside which an output may stand, or its folder."""
    alone = not name.endswith("index.json") and Path(name).is_file()
    return Path(name) if alone else folder


def output_shards(plan: Plan, dtype: str | None) -> tuple[OutputShard, ...]:
    """The files of the folded model, in the base's own layout."""
    return plan_shards(
        plan.base,
        {n: t.shape for n, t in plan.targets.items()},
        new={n: plan.targets[n].base for n in plan.new},
        dtype=dtype,
        dtypes=plan.counts,
        rename=plan.output_name,
    )


def entry(tally: Tally) -> dict[str, Any]:
    """What a receipt says of one folded tensor."""
    entry: dict[str, Any] = {"sha256": tally.digest}
    if tally.update_kept is not None:
        entry["update_kept"] = float(f"{tally.update_kept:.6g}")
    if tally.whole:
        entry["truncation_error"] = float(f"{(tally.residual / tally.whole) ** 0.5:.6g}")
    return entry


def truncation(tallies: dict[str, Tally]) -> float | None:
    """sqrt(Σ‖residual‖² / Σ‖ΔW‖²) over all targets; None where nothing was truncated."""
    whole = sum(t.whole for t in tallies.values())
    return (sum(t.residual for t in tallies.values()) / whole) ** 0.5 if whole else None


def groups(plan: Plan, tallies: dict[str, Tally], sample: dict[str, Tally]) -> list[dict[str, Any]]:
    """Per group of like-named targets: how many, scaling, relative size, what was kept.

    The relative size of the update is that of the sampled rows.
    """
    found: dict[str, list[str]] = {}
    for name, target in plan.targets.items():
        if target.terms:
            found.setdefault(_family(name), []).append(name)
    table = []
    for family, names in sorted(found.items()):
        some = [tallies[n] for n in names if n in tallies]
        pairs = [pair(t.delta) for n in names for t in plan.targets[n].terms]
        scalings = sorted({p.scaling for p in pairs if p is not None})
        rows = [sample[n] for n in names if n in sample]
        base, update = sum(t.base for t in rows), sum(t.update for t in rows)
        table.append(
            {
                "group": family,
                "targets": len(names),
                "scalings": scalings,
                "relative_size": (update / base) ** 0.5 if base else None,
                "update_kept": pooled(some),
            }
        )
    return table


def _family(name: str) -> str:
    """A target's name with its layer numbers blurred."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
