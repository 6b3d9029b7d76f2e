"""What numbers show before anything is written: NaN, untrained, too large, lost in rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from loratools.adapter import FLOATS, Adapter, Experts, Leaf, LowRank, leaves
from loratools.desk import one_thread
from loratools.errors import Problem, Severity, shown
from loratools.exporting.requantised import sample_codes, source_of
from loratools.folding import Cut, Tally, torch_dtype
from loratools.narrowing import not_finite
from loratools.plan import Plan
from loratools.runtime import distinct
from loratools.sampling import expect_samples, fold_sample, is_light, is_near
from loratools.streaming import default_threads

KEPT = 0.9  # below this share of the update a fold warns, and as far above 1
ALREADY = (0.8, 1.2)  # projections of W0 on ΔW between these look like an adapter folded before


def adapter_numbers(adapters: Sequence[Adapter]) -> list[Problem]:
    """NaN and infinity (by tensor, with counts), and low-rank pairs that change nothing."""
    problems = []
    for adapter in adapters:
        zero, pairs = [], 0
        for leaf in distinct(adapter.runtime.tensors) if adapter.runtime is not None else ():
            if bad := not_finite(leaf.tensor()):
                message = f"{shown(leaf.name)}: {bad} NaN or infinite values"
                problems.append(Problem("nonfinite", message, "error", adapter.name, leaf.name))
        for key, delta in adapter.deltas.items():
            ranges = {leaf.name: _range(leaf) for leaf in leaves(delta)}
            for leaf in leaves(delta):
                if all(math.isfinite(end) for end in ranges[leaf.name]):
                    continue
                bad = not_finite(leaf.tensor())
                message = f"{shown(leaf.name)}: {bad} NaN or infinite values"
                problems.append(Problem("nonfinite", message, "error", adapter.name, key))
            if isinstance(delta, LowRank | Experts):
                pairs += 1
                if (0, 0) in (ranges[delta.a.name], ranges[delta.b.name]):
                    zero.append(key)
        if zero and len(zero) == pairs == len(adapter.deltas):
            message = f"all {pairs} pairs of {shown(adapter.name)} are zero: it was never trained"
            problems.append(Problem("no_effect", message, "error", adapter.name))
        elif zero:
            message = f"{len(zero)} of {pairs} pairs are zero, {shown(zero[0])} first"
            problems.append(Problem("no_effect", message, "warning", adapter.name, zero[0]))
    return problems


def _range(leaf: Leaf) -> tuple[float, float]:
    """The least and the greatest value; NaN where there is one, (1, 1) of no values at all."""
    tensor = leaf.tensor()
    if not tensor.numel():
        return (1, 1)
    if tensor.dtype.itemsize == 1:  # which torch does not compare
        tensor = tensor.to(torch.float32)
    least, most = torch.aminmax(tensor)
    return (least.item(), most.item())


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tallies of a few rows of every target, and what they give reason to say."""

    tallies: dict[str, Tally]
    problems: list[Problem]

    @property
    def update_kept(self) -> float | None:
        """The estimate of how much of the update the output's dtype keeps."""
        return pooled(self.tallies.values())


def lost(kept: float | None, wanted: float) -> bool:
    """Whether rounding keeps less of an update than wanted; far above 1 it drowns in the noise."""
    return kept is not None and not wanted <= kept <= 2 - wanted


def survives(kept: float | None) -> str:
    """What rounding leaves of an update, in words."""
    if kept is not None and kept > 1:
        return f"the update drowns in rounding (it measures {kept:.0%} of itself)"
    return f"{kept or 0:.0%} of the update survives rounding"


def pooled(tallies: Iterable[Tally]) -> float | None:
    """`update_kept` over several targets together."""
    found = list(tallies)
    update = sum(t.update for t in found)
    return sum(t.kept for t in found) / update if update else None


def sampled(
    plan: Plan,
    *,
    dtype: str | None = None,
    cut: Cut | None = None,
    min_kept: float | None = None,
) -> Sampled:
    """Fold a few rows of every target: what is too large, already there, or lost in the dtype."""

    def one(name: str) -> Tally:
        stored = plan.targets[name].base
        assert stored is not None
        if source_of(plan.targets[name]) is not None:
            return sample_codes(plan.targets[name], cut=cut)
        out = dtype if dtype and stored.dtype in FLOATS else stored.dtype
        return fold_sample(plan.targets[name], dtype=torch_dtype(out), cut=cut)

    names = [n for n, t in plan.targets.items() if t.base is not None and t.terms]
    targets = [plan.targets[n] for n in names]
    # Of light samples Python's own share is most: threads would wait for each other.
    light = all(is_light(t, cut) and is_near(t) and source_of(t) is None for t in targets)
    if light:
        expect_samples(targets)
    threads = 1 if light else default_threads()
    with one_thread(), ThreadPoolExecutor(threads, "sample") as pool:
        tallies = dict(zip(names, pool.map(one, names), strict=True))
    problems = [*_zeros(plan, tallies), *_too_large(plan, tallies), *_there_already(tallies)]
    kept = pooled(tallies.values())
    if lost(kept, KEPT if min_kept is None else min_kept):
        severity = "warning" if min_kept is None else "error"
        problems.append(
            Problem(
                "loss",
                f"in {dtype or 'the base dtype'} {survives(kept)}",
                severity,  # type: ignore[arg-type]
                remedy=(
                    "--dtype fp32 keeps all of it"
                    if plan.base.graph is None
                    else "fold into the float32 graph, and quantise that"
                ),
            )
        )
    return Sampled(tallies, problems)


def _zeros(plan: Plan, tallies: dict[str, Tally]) -> list[Problem]:
    """A disk that lost its power may leave zeros where a file was to be: no shape shows it."""
    matrices = [n for n in tallies if len(plan.targets[n].shape) > 1]
    zero = [n for n in matrices if not tallies[n].base]
    if not zero:
        return []
    message = f"all rows looked at of {len(zero)} of {len(matrices)} base weights hold only zeros"
    severity: Severity = "error" if len(zero) == len(matrices) else "warning"
    return [Problem("zero_base", f"{message}, {shown(zero[0])} first", severity)]


def _too_large(plan: Plan, tallies: dict[str, Tally]) -> list[Problem]:
    matrices = {n: t for n, t in tallies.items() if len(plan.targets[n].shape) > 1 and t.update}
    large = [n for n, t in matrices.items() if t.update > t.base]
    if len(large) * 2 <= len(matrices):
        return []
    message = (
        f"the update is larger than the base weight on {len(large)} of {len(matrices)} targets"
    )
    return [Problem("large_update", f"{message}, {shown(large[0])} first")]


def _there_already(tallies: dict[str, Tally]) -> list[Problem]:
    """<W0, ΔW> / <ΔW, ΔW> is near 1 where ΔW is in W0 already, near 0 where it is not."""
    update, base = sum(t.update for t in tallies.values()), sum(t.base for t in tallies.values())
    elements = sum(t.elements for t in tallies.values())
    if not update or not elements:
        return []
    noise = (base / update / elements) ** 0.5  # of the projection of an unrelated W0
    share = sum(t.along for t in tallies.values()) / update
    if noise > 0.1 or not ALREADY[0] < share < ALREADY[1]:
        return []
    message = f"the base looks as if it held this update already (projection {share:.2f})"
    return [Problem("already_merged", message, "warning")]
