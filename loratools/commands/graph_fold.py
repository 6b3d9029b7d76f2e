"""The half of `merge` that folds into an ONNX graph: checks, files in its layout, receipt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from loratools import receipt
from loratools._version import VERSION
from loratools.adapter import LowRank
from loratools.commands.companions import TOKENIZER, Companions, plan_companions
from loratools.commands.judging import judge, known
from loratools.commands.merge import MergeResult, Progress
from loratools.commands.numbers import sampled
from loratools.containers import onnx_graph
from loratools.containers.bundle import local
from loratools.desk import choose_device
from loratools.errors import Problem, error, shown
from loratools.exporting.graph_writing import as_stored, write_graph
from loratools.exporting.into_graph import Layout, laid_out
from loratools.exporting.requantised import source_of
from loratools.folding import Cut, Tally
from loratools.plan import Plan
from loratools.views import same
from loratools.weights.placing import resolved
from loratools.weights.publishing import publish

SETTINGS = (".json", ".txt", ".model", ".jinja")  # beside one graph among other files


def fold_graph(
    plan: Plan,
    problems: Sequence[Problem],
    recipe: dict[str, Any],
    *,
    out: Path | None,
    inputs: Sequence[Path],
    allow: Sequence[str],
    fail_on: Sequence[str],
    min_kept: float | None,
    force: bool,
    dry_run: bool,
    device: str,
    threads: int | None,
    hash: str,
    progress: Progress | None,
) -> MergeResult:
    """Fold a plan into its graph at `out`; all or nothing, every check before the first byte."""
    from loratools.commands.folded import accounted, announced, finished, groups

    base = plan.base.graph
    assert base is not None
    rank, energy = recipe["rank"], recipe["energy"]
    cut = None if rank is None and energy is None else Cut(rank, energy)
    if recipe["dtype"]:
        raise error("usage", "--dtype: a graph keeps the dtypes of its weights; leave it out")
    where = choose_device(device, plan)
    as_file = out is not None and out.suffix == ".onnx"
    if out is not None:
        resolved(out, as_file=as_file, inputs=inputs)
    if any(p.severity == "error" for p in judge(problems, known(allow, problems)).problems):
        judge(problems, allow, fail_on).require()
    layout = laid_out(plan, _lineage(plan, recipe))
    sample = sampled(_rows_as_stored(plan), cut=cut, min_kept=min_kept)
    judged = judge([*problems, *sample.problems], allow, fail_on)
    judged.require()
    if as_file and out is not None and base.graph.files:
        folder = shown(str(out.with_suffix("")))
        raise error(
            "usage",
            f"-o {shown(str(out))}: the weights of this graph lie in files beside it, and so do "
            f"the output's; name a folder, such as -o {folder}",
        )
    companions = Companions() if as_file else _companions(plan, recipe["tokenizer"])
    graph = out.name if as_file and out is not None else base.file
    nbytes = sum(layout.sizes.values())
    result = announced(
        plan,
        "graph",
        nbytes,
        sample,
        judged,
        method=recipe["method"],
        out=out,
        notes=(*companions.notes, *_told(layout)),
        dry_run=dry_run,
        device=str(where),
    )
    if dry_run or out is None:
        return result
    recipe = {"base": receipt.base_entry(plan.base), **recipe}
    with publish(
        out, as_file=as_file, inputs=inputs, force=force, needed=nbytes + 1_000_000
    ) as output:
        tallies = write_graph(
            plan, layout, output.folder, graph=graph, cut=cut, device=where, threads=threads,
            progress=progress,
        )  # fmt: skip
        beside = PurePosixPath(graph).parent
        files = [graph, *(str(beside / location) for location in base.graph.files)]
        unchanged = _require_written(plan, layout, output.folder, graph, hash, nbytes)
        files += companions.write(output.folder)
        receipt.write(
            output.folder,
            makes=result.makes,
            recipe=recipe,
            device=str(where),
            files=files,
            hash=hash,
            name=f"{out.name}.{receipt.NAME}" if as_file else receipt.NAME,
            **accounted(plan, judged, tallies),
            graph={"split": list(layout.split), "unchanged": unchanged},
        )
    finished(result, dict(tallies), groups(plan, dict(tallies), sample.tallies))
    result.notes += tuple(_kept(plan, tallies))
    result.weaker = output.weaker
    return result


def _rows_as_stored(plan: Plan) -> Plan:
    """The plan with low-rank updates turned as their weights are stored, for a sample."""
    graph = plan.base.graph
    assert graph is not None
    targets = dict(plan.targets)
    for name, target in plan.targets.items():
        stored = graph.found.stored.get(name)
        plain = all(isinstance(t.delta, LowRank) for t in target.terms)
        if stored is None or not stored.turned or not plain or not target.terms:
            continue
        if source_of(target) is None:
            targets[name] = as_stored(target)
    return replace(plan, targets=targets)


def _told(layout: Layout) -> list[str]:
    if not layout.split:
        return []
    first = shown(layout.split[0])
    more = f" and {len(layout.split) - 1} more" if len(layout.split) > 1 else ""
    return [f"{first}{more}: shared with other weights in the graph, now a tensor of its own"]


def _kept(plan: Plan, tallies: Mapping[str, Tally]) -> list[str]:
    """How much of the update the codes kept, from the weight that kept least."""
    found = {
        name: kept
        for name, tally in tallies.items()
        if source_of(plan.targets[name]) is not None and (kept := tally.update_kept) is not None
    }
    if not found:
        return []
    least, most = min(found, key=lambda n: found[n]), max(found, key=lambda n: found[n])
    return [
        f"quantised again in the same scheme: {len(found)} weights keep {found[least]:.0%} "
        f"({shown(least)}) to {found[most]:.0%} ({shown(most)}) of their update; the receipt has "
        "each"
    ]


def _lineage(plan: Plan, recipe: Mapping[str, Any]) -> dict[str, str]:
    """What the graph itself says of where it comes from; no paths, no dates."""
    base = plan.base.graph
    assert base is not None
    before = base.graph.metadata.get("loratools.adapters", "[]")
    try:
        listed = json.loads(before)
    except ValueError:
        listed = []
    folded = [*(listed if isinstance(listed, list) else []), *recipe["adapters"]]
    return {
        "loratools.version": VERSION,
        "loratools.adapters": json.dumps(folded, sort_keys=True, separators=(",", ":")),
        "loratools.base_sha256": _content(plan),
    }


def _content(plan: Plan) -> str:
    """sha256 of the base's files as its fingerprint samples them, whatever they are called."""
    found = hashlib.sha256()
    for shard in plan.base.shards:
        source = plan.base.bundle.open(shard.name)
        found.update(str(source.size).encode())
        last = max(0, source.size - receipt.SAMPLE)
        for i in range(receipt.SAMPLES):
            at = last * i // (receipt.SAMPLES - 1)
            found.update(source.read(at, min(receipt.SAMPLE, source.size - at)))
    return found.hexdigest()


def _companions(plan: Plan, tokenizer: str | None) -> Companions:
    """Config, tokenizer and the other small files of the graph's folder; no other weights."""
    base, bundle = plan.base, plan.base.bundle
    graph = base.graph
    assert graph is not None
    alone = bundle.chosen is not None
    if alone and "config.json" not in bundle:
        return Companions()
    found = plan_companions(
        replace(plan, base=replace(base, bundle=replace(bundle, chosen=None))), tokenizer=tokenizer
    )
    beside = PurePosixPath(graph.file).parent
    weights = {str(beside / location) for location in graph.graph.files}
    graphs = tuple(n for n in bundle.names if n.endswith(".onnx"))
    for name in list(found.files):
        other = alone and not name.endswith(SETTINGS) and name not in TOKENIZER
        if name in weights or name.startswith(graphs) or other:
            del found.files[name]
    return found


def _require_written(
    plan: Plan, layout: Layout, folder: Path, name: str, hash: str, nbytes: int
) -> dict[str, str]:
    """Reads the output's graph again: every tensor is there, the unchanged ones as they were.

    Their hashes, where outputs of this size are hashed.
    """
    base = plan.base.graph
    assert base is not None
    written = onnx_graph.read(local(folder), name)
    changed = {p.tensor for p in layout.patches}
    full = receipt.HASHES[hash]
    hashed = nbytes < receipt.FULL_HASH if full is None else full
    found = {}
    for tensor, before in base.graph.tensors.items():
        after = written.tensors.get(tensor)
        there = after is not None and (after.shape, after.data_type) == (
            before.shape, before.data_type,
        )  # fmt: skip
        if after is None or not there:
            raise error("storage", f"{shown(tensor)} was not written as planned")
        was, now = before.content, after.content
        if tensor in changed or was is None or now is None or not hashed:
            continue
        if not same(was, now):
            raise error("storage", f"{shown(tensor)} was not copied as it is")
        found[tensor] = receipt.digest(now)
    return found
