"""The exact weighted sum of deltas, and its optimal truncation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loratools.adapter import Additive, Experts, Kind, Leaf, LowRank, Made, Replace
from loratools.algebra import add, held, scaled, widen
from loratools.errors import error
from loratools.rewriting import lowered, shape
from loratools.truncating import to_low_rank, truncate_stack


@dataclass(frozen=True, slots=True)
class Merged:
    """One target's merged delta, and the squared norms of what was cut away and of the whole."""

    delta: Kind
    residual: float = 0.0
    total: float = 0.0


def linear(
    deltas: Sequence[tuple[float, Kind]],
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> Merged:
    """Σ w_i ΔW_i, exact; with `rank` or `energy` its best low-rank approximation (Eckart–Young).

    Raises FitError `needs_base` for kinds whose sum depends on W0.
    """
    if len(deltas) == 1 and deltas[0][0] == 1 and rank is None and energy is None:
        return Merged(deltas[0][1])
    replaced = [(w, d) for w, d in deltas if isinstance(d, Replace)]
    additive = [(w, d) for w, d in deltas if isinstance(d, Additive)]
    if len(replaced) + len(additive) < len(deltas):
        names = ", ".join(sorted({type(d).__name__ for _, d in deltas}))
        raise error("needs_base", f"a weighted or truncated {names} depends on the base")
    if replaced:
        return _replaced(replaced, additive, rank, energy)
    total = add([scaled(d, w) for w, d in additive])
    if rank is None and energy is None:
        return Merged(total)
    if isinstance(total, Experts):
        return Merged(*truncate_stack(total, rank=rank, energy=energy))
    if isinstance(total, Made):
        total = lowered(total)
    made = any(isinstance(d, Made) for _, d in additive)  # a full difference stays one
    if isinstance(total, LowRank) or (made and len(shape(total) or ()) > 1):
        short = to_low_rank(total, rank=rank, energy=energy)
        return Merged(short.delta, short.residual, short.total)
    return Merged(total)


def _replaced(
    deltas: Sequence[tuple[float, Replace]],
    additive: Sequence[tuple[float, Additive]],
    rank: int | None,
    energy: float | None,
) -> Merged:
    """(1 − Σw)·W0 + Σ w_i V_i + Σ w_j ΔW_j, where W0 is not needed.

    It is not where Σw = 1, or where all V are one copy of the base's own (resized) weight, which
    an adapter brings along to be changed: then what stands upon it is summed.
    """
    first, upon = deltas[0][1], [(w, d.then) for w, d in deltas if d.then is not None]
    if all(d.rows is not None for _, d in deltas) and not (upon or additive):
        return Merged(_rows(deltas))
    if any(d.rows is not None for _, d in deltas):
        raise error("needs_base", "the weighted sum of trained tokens and more depends on the base")
    if any(d.value.shape != first.value.shape for _, d in deltas):
        raise error("head_conflict", "replacements of one weight differ in shape")
    total = sum(w for w, _ in deltas)
    value = first.value
    if len(upon) < len(deltas) or not all(_equal(value, d.value) for _, d in deltas):
        if abs(total - 1) > 1e-12:
            raise error(
                "needs_base",
                f"replaced weights with weights that sum to {total:g}: the rest is a part of W0",
            )
        mean = torch.stack([w * widen(d.value) for w, d in deltas]).sum(0)
        kind = value.tensor().dtype  # a BatchNorm's counter stays a whole number
        value = held(mean if kind.is_floating_point else mean.round().to(kind))
    rows = [(w, d) for w, d in upon if isinstance(d, Replace)]
    pairs = [*((w, d) for w, d in upon if isinstance(d, Additive)), *additive]
    if rows and not pairs and len(rows) == len(upon) and value is first.value:
        return Merged(Replace(value, None, _rows(rows, value)))
    if len(pairs) < len(upon) + len(additive):
        raise error("needs_base", "what is trained upon a replaced weight has no sum of its own")
    if not pairs:
        return Merged(Replace(value))
    then = linear(pairs, rank=rank, energy=energy)
    return Merged(Replace(value, None, then.delta), then.residual, then.total)


def _equal(one: Leaf, other: Leaf) -> bool:
    return one is other or torch.equal(widen(one), widen(other))


def _rows(deltas: Sequence[tuple[float, Replace]], weight: Leaf | None = None) -> Replace:
    """V + Σ w_i (rows_i − V) in every row that some delta has; without V, Σw = 1 in each row."""
    at = {r: i for i, r in enumerate(dict.fromkeys(r for _, d in deltas for r in d.rows or ()))}
    old = torch.zeros(len(at), *deltas[0][1].value.shape[1:], dtype=torch.float64)
    if weight is not None:
        old += weight.tensor()[list(at)]
    new, total = old.clone(), torch.zeros(len(at), dtype=torch.float64)
    for w, delta in deltas:
        here = [at[row] for row in delta.rows or ()]
        new[here] += w * (widen(delta.value) - old[here])
        total[here] += w
    if weight is None and bool(((total - 1).abs() > 1e-12).any()):
        raise error("needs_base", "tokens replaced with weights that do not sum to 1 need W0")
    return Replace(held(new), tuple(at))
