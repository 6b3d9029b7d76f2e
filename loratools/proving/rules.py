"""How other tools round a fold: every rule replayed as the span of values that it may have written.

Rounding never swaps two numbers. So a sum that a tool computed in float32, in whatever order, lies
between bounds, and what it rounded lies between the rounded bounds: a sound test of each element
that leaves no room where there was none. specs/numerics.md derives the bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple, assert_never

import torch
from torch import Tensor

from loratools import kinds
from loratools.adapter import (
    Additive,
    Chained,
    Dense,
    Experts,
    Hadamard,
    Kind,
    Kronecker,
    LowRank,
    Renormed,
    Replace,
    Rotated,
    Scaled,
    Sparse,
    Spectral,
    leaves,
)  # fmt: skip
from loratools.algebra import held, map_leaves, matrix, scaled, widen
from loratools.folding import torch_dtype

F64, F32 = torch.float64, torch.float32
Order = Literal["chained", "unmerged", "summed", "halved"]
Terms = Sequence[tuple[float, Kind]]


class Span(NamedTuple):
    """Bounds of every element, both possible, and the value without any rounding; all float64."""

    low: Tensor
    high: Tensor
    exact: Tensor

    def to(self, *dtypes: torch.dtype) -> Span:
        """The span after rounding to each dtype in turn."""
        low, high = self.low, self.high
        for dtype in dtypes:
            if dtype != F64:
                low, high = low.to(dtype).to(F64), high.to(dtype).to(F64)
        return Span(low, high, self.exact)

    def plus(self, other: Span) -> Span:
        return Span(self.low + other.low, self.high + other.high, self.exact + other.exact)

    def minus(self, other: Span) -> Span:
        return Span(self.low - other.high, self.high - other.low, self.exact - other.exact)

    def times(self, other: Span) -> Span:
        return _around([a * b for a in self[:2] for b in other[:2]], self.exact * other.exact)

    def over(self, other: Span) -> Span:
        """The quotient, for an `other` that cannot be 0."""
        return _around([a / b for a in self[:2] for b in other[:2]], self.exact / other.exact)

    def scaled(self, scaling: float) -> Span:
        low, high = self[:2] if scaling >= 0 else (self.high, self.low)
        return Span(low * scaling, high * scaling, self.exact * scaling)


def _around(ends: Sequence[Tensor], exact: Tensor) -> Span:
    low, high = ends[0], ends[0]
    for end in ends[1:]:
        low, high = torch.minimum(low, end), torch.maximum(high, end)
    return Span(low, high, exact)


def point(values: Tensor) -> Span:
    """Values known exactly."""
    return Span(values, values, values)


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to round: the dtypes of weights and factors, and what is rounded on the way."""

    work: torch.dtype  # of the weights while adapters are merged into them
    factors: torch.dtype  # in which A and B are multiplied
    delta_first: bool = False  # the delta is rounded to `work` before it is added
    product_first: bool = False  # B·A is rounded to `factors` before it is scaled
    order: Order = "chained"

    def __str__(self) -> str:
        if self == EXACT:
            return "once from float64"
        if self.factors.itemsize < 4:
            said = f"factors{' and their product' if self.product_first else ''} in "
            said += _name(self.factors) + (
                f", delta rounded to {_name(self.work)} first" if self.delta_first else ""
            )
        elif self.delta_first:
            said = f"delta rounded to {_name(self.work)} first"
        else:
            said = f"once from {_name(self.factors)}"
        return (
            said
            + {
                "chained": "",
                "unmerged": ", norms from the unmerged base",
                "summed": ", adapters summed first",
                "halved": ", in two halves",
            }[self.order]
        )


EXACT = Rule(F64, F64, order="summed")  # ours: the float64 sum, rounded once


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rules_for(
    out: torch.dtype, base: torch.dtype, terms: Terms, *, halved: bool = False
) -> list[Rule]:
    """The rules that may have made a weight of dtype `out`, the usual ones first.

    `halved` adds those of nn.MultiheadAttention's out_proj, whose update PEFT applies two times.
    """
    kinds = [d.then if isinstance(d, Replace) else d for _, d in terms]
    stored = {torch_dtype(leaf.dtype) for _, d in terms for leaf in leaves(d)}
    orders: list[Order] = ["chained"]
    if len(terms) > 1 and any(isinstance(k, Renormed) for k in kinds):
        orders.append("unmerged")
    if len(terms) > 1 and all(isinstance(d, LowRank | Dense) for _, d in terms):
        orders.append("summed")
    if halved:
        orders.append("halved")
    multiplies = any(isinstance(k, LowRank) for k in kinds)
    found: dict[Rule, None] = {EXACT: None}
    for work in dict.fromkeys((out, base, F32)):
        wide = F64 if work == F64 else F32
        small = [f for f in dict.fromkeys((work, *stored)) if f.itemsize < 4]
        for factors, first, multiplied, order in product(
            (wide, *sorted(small, key=str)), (False, True), (False, True), orders
        ):
            rounds = first and multiplies and work.itemsize < 4 and factors != work
            found[Rule(work, factors, rounds, multiplied and factors in small, order)] = None
    return list(found)


def prepared(terms: Terms, rule: Rule) -> list[Kind]:
    """The deltas with weights taken in and leaves rounded to the rule's dtype, held in float64."""
    halves = 2 if rule.order == "halved" else 1
    deltas = [
        map_leaves(
            _weighted(delta, weight / halves),
            lambda leaf: held(leaf.tensor().to(rule.factors).to(F64)),
        )
        for weight, delta in terms
    ]
    return [delta for delta in deltas for _ in range(halves)]


def _weighted(delta: Kind, weight: float) -> Kind:
    """PEFT's weights: a factor of the scaling, inside the norm of a DoRA, none for a new head."""
    match delta:
        case LowRank() | Dense() | Hadamard() | Kronecker() | Sparse() | Spectral() | Experts():
            return scaled(delta, weight)
        case Renormed(delta=inner):
            return Renormed(scaled(inner, weight), delta.magnitude, delta.axis)
        case Replace() | Scaled() | Rotated() | Chained():
            return delta
        case _:
            assert_never(delta)


# ------------------------------------------------------------------------------- the replay


@dataclass(slots=True)
class _Weight:
    """Rows of a weight while one adapter after another is merged into it."""

    rule: Rule
    start: int
    now: Span | None  # None: the base has no such rows
    seen: Tensor | None  # what was written, for the last adapter's norms
    done: list[tuple[Additive | Renormed, Span | None]]

    @property
    def wide(self) -> torch.dtype:
        """The dtype that sums are computed in."""
        return F64 if F64 in (self.rule.work, self.rule.factors) else F32

    @property
    def mixed(self) -> torch.dtype:
        """The dtype of weights plus delta in torch."""
        return torch.promote_types(self.rule.work, self.rule.factors)


def replayed(
    deltas: Sequence[Kind], w0: Tensor | None, start: int, rule: Rule, seen: Tensor
) -> Span | None:
    """What a rule may have made of the rows `w0` (rows, in) that begin at row `start`.

    `deltas` are `prepared`; `w0` is None where the base has no such rows. None where the rule
    says nothing of them.
    """
    now = None if w0 is None else point(w0.to(F64)).to(rule.work)
    weight = _Weight(rule, start, now, None, [])
    if rule.order == "summed":
        parts = [_change(weight, d, seen) for d in deltas if isinstance(d, Additive)]
        total = parts[0]
        for part in parts[1:]:
            total = total.plus(part)
        if rule.delta_first:
            total = total.to(rule.work)
        if weight.now is not None:
            weight.now = weight.now.plus(total).to(weight.wide, rule.work)
    else:
        for number, delta in enumerate(deltas):
            weight.seen = seen if number == len(deltas) - 1 else None
            _merge(weight, delta, seen)
    return None if weight.now is None else weight.now.to(seen.dtype)


def _merge(weight: _Weight, delta: Kind, seen: Tensor) -> None:
    match delta:
        case Replace(value=value, rows=rows, then=then):
            _replace(weight, matrix(widen(value)), rows, len(seen))
            if then is not None:
                _merge(weight, then, seen)
        case Scaled() | Rotated() | Chained():
            weight.now = None  # other tools' arithmetic for these is not known
        case (
            LowRank()
            | Dense()
            | Renormed()
            | Hadamard()
            | Kronecker()
            | Sparse()
            | Spectral()
            | Experts()
        ):
            if weight.now is None:
                return
            under = weight.now
            if isinstance(delta, Renormed) and weight.rule.order == "unmerged" and weight.done:
                under = _unmerged(weight, seen)
            factor = _onto(weight, delta, under, seen)
            weight.done.append((delta, factor))
        case _:
            assert_never(delta)


def _replace(weight: _Weight, value: Tensor, rows: tuple[int, ...] | None, count: int) -> None:
    start = weight.start
    if rows is None:
        new = point(value[start : start + count]).to(weight.rule.work)
        if len(new.exact) == count:
            weight.now = new
    elif weight.now is not None:
        low, high, exact = (t.clone() for t in weight.now)
        for number, row in enumerate(rows):
            if start <= row < start + count:
                one = point(value[number]).to(weight.rule.work)
                low[row - start], high[row - start], exact[row - start] = one
        weight.now = Span(low, high, exact)


def _onto(weight: _Weight, delta: Additive | Renormed, under: Span, seen: Tensor) -> Span | None:
    """Merge one delta into the weight; for a DoRA the factor of each row, found on `under`."""
    assert weight.now is not None
    rule = weight.rule
    if not isinstance(delta, Renormed):
        part = _change(weight, delta, seen)
        first_half = rule.order == "halved" and len(weight.done) % 2 == 0
        if isinstance(delta, LowRank) and (rule.delta_first or first_half):
            part = part.to(rule.work)
        weight.now = weight.now.plus(part).to(weight.wide, rule.work)
        return None
    part = _change(weight, delta.delta, seen)
    whole = weight.now.plus(part).to(weight.wide, weight.mixed)
    factor = _factor(weight, delta, under.plus(part).to(weight.wide, weight.mixed))
    if weight.seen is not None and rule.work.itemsize >= 4 and seen.dtype.itemsize >= 4:
        factor = _observed(factor, whole, weight.seen)
    weight.now = factor.times(whole).to(weight.wide, weight.mixed, rule.work)
    return factor


def _change(weight: _Weight, delta: Additive, seen: Tensor) -> Span:
    """What is added to the weight's rows: s·B·A in the rule's arithmetic."""
    rule, rows = weight.rule, slice(weight.start, weight.start + len(seen))
    unit = 2.0**-53 if weight.wide == F64 else 2.0**-24
    match delta:
        case LowRank(a=a, b=b, scaling=scaling):
            down, up = matrix(widen(a)), widen(b).reshape(-1, delta.rank)[rows]
            exact = up @ down
            # A dot product of r terms, two more roundings for the scaling, one for its order;
            # Σ|b||a| is at most the product of the norms.
            size = torch.outer(up.norm(dim=1), down.norm(dim=0))
            noise = size.mul_((delta.rank + 4) * unit)
        case Dense(diff=diff, scaling=scaling):
            exact = matrix(widen(diff))[rows]
            noise = exact.abs() * (3 * unit)
        case Hadamard() | Kronecker() | Sparse() | Spectral() | Experts():
            scaling = 1.0  # taken in already
            exact = kinds.rows(delta, rows.start, min(rows.stop, delta.shape[0]))
            noise = exact.abs().amax() * torch.ones_like(exact) * (64 * unit)
        case _:
            assert_never(delta)
    span = Span(exact - noise, exact + noise, exact)
    if rule.product_first:
        span = span.to(F32, rule.factors)
    span = span.scaled(scaling)
    if rule.factors.itemsize < 4:
        span = span.to(F32, rule.factors)
    missing = len(seen) - len(exact)  # rows of the weight that the delta does not reach
    if missing:
        zero = torch.zeros(missing, exact.shape[1], dtype=F64)
        span = Span(*(torch.cat([end, zero]) for end in span))
    return span


def _factor(weight: _Weight, delta: Renormed, whole: Span) -> Span:
    """m / ‖W0 + ΔW‖ for every row."""
    unit = 2.0**-53 if weight.wide == F64 else 2.0**-24
    least = torch.where(whole.low > 0, whole.low, (-whole.high).clamp(min=0))
    most = torch.maximum(whole.low.abs(), whole.high.abs())
    slack = (whole.exact.shape[1] / 2 + 4) * unit  # a sum of squares in any order, and its root
    low, high, exact = (t.norm(dim=1, keepdim=True) for t in (least, most, whole.exact))
    norm = Span(low * (1 - slack), high * (1 + slack), exact).to(weight.wide, weight.mixed)
    rows = slice(weight.start, weight.start + len(exact))
    magnitude = point(widen(delta.magnitude).reshape(-1, 1)[rows])
    return magnitude.over(norm).to(weight.wide, weight.mixed)


def _observed(factor: Span, whole: Span, seen: Tensor) -> Span:
    """The factor's span, narrowed by the rows themselves: all elements of one share it.

    The bound on a norm grows with the row. Where the output is float32, W / (W0 + ΔW) tells the
    factor more closely: the median over the larger elements, which one odd element cannot move.
    """
    middle = (whole.low + whole.high) / 2
    size = middle.abs()
    large = size >= size.square().mean(dim=1, keepdim=True).sqrt() / 2
    found = (seen.to(F64) / middle).masked_fill(~large, torch.nan).nanmedian(1, keepdim=True)[0]
    half = ((whole.high - whole.low) / size / 2).masked_fill(~large, 0).amax(1, keepdim=True)
    slack = (half + 2.0**-23) * found.abs()  # W itself is rounded once more
    low, high = torch.maximum(found - slack, factor.low), torch.minimum(found + slack, factor.high)
    apart = ~(low <= high)  # another factor was used: the elements shall show it
    return Span(
        torch.where(apart, factor.low, low), torch.where(apart, factor.high, high), factor.exact
    )


def _unmerged(weight: _Weight, seen: Tensor) -> Span:
    """PEFT's own base weight for a DoRA's norm: what was merged is taken out, and put in again."""
    done, weight.done = weight.done, []
    assert weight.now is not None
    under = weight.now
    for delta, factor in reversed(done):
        inner = delta.delta if isinstance(delta, Renormed) else delta
        part = _change(weight, inner, seen)
        if factor is None:
            under = under.minus(part.to(weight.rule.work)).to(weight.wide, weight.rule.work)
        else:
            raw = under.over(factor).to(weight.wide, weight.mixed)
            under = raw.minus(part).to(weight.wide, weight.mixed, weight.rule.work)
    weight.now = under
    kept, weight.seen = weight.seen, None
    for delta, _ in done:
        weight.done.append((delta, _onto(weight, delta, under, seen)))
    weight.seen = kept
    return under
