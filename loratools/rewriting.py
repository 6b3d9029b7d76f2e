"""Deltas rewritten for another layout of the same weight: transposed, sliced, permuted, stacked.

All of it on leaves that nobody has opened yet: shapes are known at once, numbers come later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, assert_never

from loratools import kinds, views
from loratools.adapter import (
    Additive,
    Chained,
    Dense,
    Experts,
    Hadamard,
    Kind,
    Kronecker,
    Leaf,
    LowRank,
    Made,
    Renormed,
    Replace,
    Rotated,
    Scaled,
    Sparse,
    Spectral,
    leaves,
)  # fmt: skip
from loratools.errors import error


def shape(delta: Kind) -> tuple[int, ...] | None:
    """(out, in, *kernel) of what the delta changes; None where it only names rows."""
    match delta:
        case LowRank(a=a, b=b):
            return (b.shape[0], *a.shape[1:])
        case Dense(diff=diff):
            return diff.shape
        case Renormed(delta=inner):
            return shape(inner)
        case Replace(value=value, rows=rows):
            return value.shape if rows is None else None
        case (
            Hadamard()
            | Kronecker()
            | Sparse()
            | Spectral()
            | Experts()
            | Scaled()
            | Rotated()
            | Chained()
        ):
            return kinds.shape(delta)
        case _:
            assert_never(delta)


def within(then: Kind | None, change: Callable[[Kind], Kind]) -> Kind | None:
    """What is applied on top of a replaced weight, changed."""
    return None if then is None else change(then)


def additive(delta: Kind) -> Additive:
    """An inner delta, known to be additive."""
    assert isinstance(delta, Additive)
    return delta


def lowered(delta: Made) -> LowRank | Dense:
    """The same update as factors where it has them exactly, else in full; unopened."""
    if isinstance(delta, Experts) and delta.over != "in":
        raise error("needs_base", f"{delta.a.name}: the base tells which side of it A is on")
    factors = kinds.low_rank(delta)
    if factors is not None:
        return factors

    def whole() -> Any:
        return kinds.rows(delta, 0, delta.shape[0]).reshape(delta.shape)

    return Dense(views.later(next(leaves(delta)).name, "F64", delta.shape, whole))


def transpose(delta: Kind) -> Kind:
    """The delta of the transposed matrix (2-D only)."""
    match delta:
        case LowRank(a=a, b=b):
            _flat(a, b)
            return replace(delta, a=views.turned(b), b=views.turned(a))
        case Dense(diff=diff):
            _flat(diff)
            return replace(delta, diff=views.turned(diff))
        case Renormed(delta=inner, axis=axis):
            turned = additive(transpose(inner))
            return replace(delta, delta=turned, axis="in" if axis == "out" else "out", norm=None)
        case Replace(value=value, rows=None, then=then):
            _flat(value)
            return replace(delta, value=views.turned(value), then=within(then, transpose))
        case Replace():
            raise error("usage", "rows of a stored tensor have no transposed form")
        case (
            Hadamard()
            | Kronecker()
            | Sparse()
            | Spectral()
            | Experts()
            | Scaled()
            | Rotated()
            | Chained()
        ):
            return kinds.transposed(delta)
        case _:
            assert_never(delta)


def as_stored(delta: Kind) -> Kind:
    """The delta for a weight stored (in, out); full tensors are on disk as stored already."""
    match delta:
        case LowRank() | Renormed():
            return transpose(delta)
        case (
            Hadamard()
            | Kronecker()
            | Sparse()
            | Spectral()
            | Experts()
            | Scaled()
            | Rotated()
            | Chained()
        ):
            return transpose(delta)
        case Replace(then=then):
            return replace(delta, then=within(then, as_stored))
        case Dense():
            return delta
        case _:
            assert_never(delta)


def rows(delta: Kind, start: int, stop: int) -> Kind:
    """The delta of rows start:stop of `out`, as in taking q out of a fused qkv."""
    return _on_rows(delta, lambda leaf: views.part(leaf, start, stop))


def permute(delta: Kind, order: Sequence[int]) -> Kind:
    """The delta whose row i is row order[i] of this one."""
    whole = shape(delta)
    if whole and sorted(order) != list(range(whole[0])):
        raise error("usage", f"an order of {len(order)} is no permutation of {whole[0]} rows")
    return _on_rows(delta, lambda leaf: views.reordered(leaf, order))


def spread(delta: Kind, start: int, total: int) -> Kind:
    """The delta as rows start... of a weight with `total` rows, the others unchanged."""
    match delta:
        case LowRank(b=b):
            return replace(delta, b=views.padded(b, start, total - start - b.shape[0]))
        case Dense(diff=diff):
            return replace(delta, diff=views.padded(diff, start, total - start - diff.shape[0]))
        case Hadamard() | Kronecker() | Sparse() | Spectral() | Experts():
            return spread(lowered(delta), start, total)
        case Renormed() | Replace() | Scaled() | Rotated() | Chained():
            what = type(delta).__name__
            raise error("usage", f"{what} on some rows of a weight is nothing on the others")
        case _:
            assert_never(delta)


def _on_rows(delta: Kind, pick: Callable[[Leaf], Leaf]) -> Kind:
    def picked(leaf: Leaf) -> Leaf:
        if not leaf.shape:
            raise error("usage", f"{leaf.name} is a single number: it has no rows")
        return pick(leaf)

    match delta:
        case LowRank():
            return replace(delta, b=picked(delta.b))
        case Dense():
            return replace(delta, diff=picked(delta.diff))
        case Renormed(axis="out", delta=inner, magnitude=magnitude):
            part = additive(_on_rows(inner, pick))
            m = pick(views.reshaped(magnitude, magnitude.numel))
            return replace(delta, delta=part, magnitude=m)
        case Renormed():
            raise error("usage", "a column norm runs over all rows: it has no rows of its own")
        case Replace(rows=None, then=then):
            inner_rows = within(then, lambda d: _on_rows(d, pick))
            return replace(delta, value=picked(delta.value), then=inner_rows)
        case Replace():
            raise error("usage", "rows of rows: replace by rows names stored rows already")
        case Hadamard() | Kronecker() | Sparse() | Spectral() | Experts():
            return _on_rows(lowered(delta), pick)
        case Scaled(by="columns"):
            return delta
        case Scaled(by="rows", factor=Leaf() as factor):
            return replace(delta, factor=pick(views.reshaped(factor, factor.numel)))
        case Scaled(by="elements", factor=LowRank() as factor):
            return replace(delta, factor=additive(_on_rows(factor, pick)))
        case Rotated(side="in", parts={"scale": scale}):  # which belongs to the rows
            one = pick(views.reshaped(scale, scale.numel))
            return replace(delta, parts={**delta.parts, "scale": one})
        case Rotated(side="in"):
            return delta
        case Chained(method=kinds.glora.NAME):
            return kinds.glora.on_rows(delta, picked)
        case Scaled() | Rotated() | Chained():
            what = type(delta).__name__
            raise error("usage", f"a {what} mixes rows: some of them have no delta of their own")
        case _:
            assert_never(delta)


def same_place(one: Leaf, other: Leaf) -> bool:
    """Whether two leaves are the same bytes of the same source, or the same tensor."""
    if one.source is None or other.source is None:
        return one is other or (one.held is not None and one.held is other.held)
    places = [(x.source, x.offset, x.strides, x.shape, x.dtype) for x in (one, other)]
    return places[0] == places[1]


def stack(deltas: Sequence[Kind], alike: Callable[[Leaf, Leaf], bool] = same_place) -> Kind:
    """One delta over the stacked rows of all, as in fusing q, k, v: B block-diagonal, A stacked.

    Where all have one A, by `alike`, it stays one, and the rank is theirs.
    """
    deltas = [lowered(d) if isinstance(d, Made) else d for d in deltas]
    first, inner = next(iter(deltas), None), {s[1:] for s in map(shape, deltas) if s is not None}
    match first if len(inner) == 1 else None:
        case LowRank():
            low = [d for d in deltas if isinstance(d, LowRank)]
            if len(low) == len(deltas):
                return _stacked(low, alike)
        case Dense():
            dense = [d for d in deltas if isinstance(d, Dense)]
            if len(dense) == len(deltas):
                scaling = _one([d.scaling for d in dense])
                parts = [_scaled(d.diff, d.scaling, scaling) for d in dense]
                return Dense(views.joined(parts), scaling)
        case Renormed(axis="out"):
            normed = [d for d in deltas if isinstance(d, Renormed) and d.axis == "out"]
            if len(normed) == len(deltas):
                m = [views.reshaped(d.magnitude, d.magnitude.numel) for d in normed]
                return Renormed(additive(stack([d.delta for d in normed], alike)), views.joined(m))
        case Replace(rows=None, then=None):
            whole = [d for d in deltas if isinstance(d, Replace) and d.rows is None is d.then]
            if len(whole) == len(deltas):
                return Replace(views.joined([d.value for d in whole]))
        case Renormed() | Replace() | Scaled() | Rotated() | Chained() | None:
            pass
        case Hadamard() | Kronecker() | Sparse() | Spectral() | Experts():
            pass  # lowered above
        case other:
            assert_never(other)
    names = ", ".join(type(d).__name__ for d in deltas)
    shapes = ", ".join(str(shape(d)) for d in deltas)
    raise error("usage", f"these deltas have no stacked form: {names} of shapes {shapes}")


def _stacked(low: Sequence[LowRank], alike: Callable[[Leaf, Leaf], bool]) -> LowRank:
    scaling = _one([d.scaling for d in low])
    b = [_scaled(d.b, d.scaling, scaling) for d in low]
    if all(alike(d.a, low[0].a) for d in low):
        alpha = _one_or_none([d.alpha for d in low])
        return LowRank(low[0].a, views.joined(b), scaling, alpha)
    return LowRank(views.joined([d.a for d in low]), views.diagonal(b), scaling)


def _one(scalings: Sequence[float]) -> float:
    """The scaling that all have, else 1."""
    return scalings[0] if len(set(scalings)) == 1 else 1.0


def _one_or_none(alphas: Sequence[float | None]) -> float | None:
    return alphas[0] if len(set(alphas)) == 1 else None


def _scaled(leaf: Leaf, own: float, common: float) -> Leaf:
    return leaf if own == common else views.scaled(leaf, own, "F64")


def _flat(*leaves: Leaf) -> None:
    for leaf in leaves:
        if len(leaf.shape) != 2:
            raise error("usage", f"{leaf.name} is {leaf.shape}: only matrices can be transposed")


def columns(delta: Kind) -> int | None:
    """How many columns the weight has as a matrix; None for a vector, or where only rows stand."""
    extents = shape(delta)
    return None if extents is None or len(extents) < 2 else math.prod(extents[1:])


def added(deltas: Sequence[Kind]) -> Kind:
    """The sum of low-rank deltas (their ranks one after another), or of dense ones, unopened."""
    if len(deltas) == 1:
        return deltas[0]
    deltas = [lowered(d) if isinstance(d, Made) else d for d in deltas]
    low = [d for d in deltas if isinstance(d, LowRank)]
    dense = [d for d in deltas if isinstance(d, Dense)]
    if len(low) == len(deltas):
        scaling = _one([d.scaling for d in low])
        b = [_scaled(d.b, d.scaling, scaling) for d in low]
        return LowRank(views.joined([d.a for d in low]), views.joined(b, 1), scaling)
    if len(dense) == len(deltas):
        return Dense(views.total([views.scaled(d.diff, d.scaling, "F64") for d in dense]))
    names = ", ".join(type(d).__name__ for d in deltas)
    raise error("usage", f"these deltas have no sum that stays unopened: {names}")
