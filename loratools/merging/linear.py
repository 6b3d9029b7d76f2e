"""The exact weighted sum of deltas, and its optimal truncation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratools.adapter import Dense, Kind, LowRank, Renormed, Replace
from loratools.algebra import add, held, scaled, widen
from loratools.errors import error
from loratools.truncating import truncate


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
    kinds = [d for _, d in deltas]
    if all(isinstance(d, LowRank | Dense) for d in kinds):
        total = add([scaled(d, w) for w, d in deltas if isinstance(d, LowRank | Dense)])
        if isinstance(total, LowRank) and (rank is not None or energy is not None):
            short = truncate(total, rank=rank, energy=energy)
            return Merged(short.delta, short.residual, short.total)
        return Merged(total)
    if all(isinstance(d, Replace) for d in kinds):
        return Merged(_replaced([(w, d) for w, d in deltas if isinstance(d, Replace)]))
    if len(deltas) == 1 and deltas[0][0] == 1 and isinstance(kinds[0], Renormed):
        raise error(
            "needs_base",
            "the rank of a DoRA cannot be reduced by itself: its magnitudes belong to W0 + BA",
        )
    names = ", ".join(sorted({type(d).__name__ for d in kinds}))
    raise error("needs_base", f"the weighted sum of {names} depends on the base")


def _replaced(deltas: Sequence[tuple[float, Replace]]) -> Replace:
    """Σ w_i V_i, which is (1 − Σw)·W0 + Σ w_i V_i only where the weights sum to 1."""
    total = sum(w for w, _ in deltas)
    first = deltas[0][1]
    if abs(total - 1) > 1e-12:
        raise error(
            "needs_base",
            f"replaced weights with weights that sum to {total:g}: the rest is a part of W0",
        )
    if any(d.value.shape != first.value.shape or d.rows != first.rows for _, d in deltas):
        raise error("head_conflict", "replacements of one weight differ in shape or rows")
    value = sum(w * widen(d.value) for w, d in deltas)
    thens = [(w, d.then) for w, d in deltas if d.then is not None]
    then = linear(thens).delta if thens else None
    if then is not None and not isinstance(then, LowRank | Renormed):
        raise error("needs_base", "a replaced weight with a dense update on top")
    return Replace(held(value), first.rows, then)  # type: ignore[arg-type]
