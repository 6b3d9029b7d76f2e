"""Deltas rewritten for another layout of the same weight: transposed, sliced, permuted, stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor

from loratools.adapter import Dense, Kind, Leaf, LowRank, Renormed, Replace
from loratools.algebra import additive, factors, held, product, shape, widen, within
from loratools.errors import error


def transpose(delta: Kind) -> Kind:
    """The delta of the transposed matrix (2-D only)."""
    match delta:
        case LowRank(a=a, b=b):
            _flat(a, b)
            new_a, new_b = a.tensor().T.contiguous(), b.tensor().T.contiguous()
            return replace(delta, a=held(new_b, b.name), b=held(new_a, a.name))
        case Dense(diff=diff):
            _flat(diff)
            return replace(delta, diff=held(diff.tensor().T.contiguous(), diff.name))
        case Renormed(delta=inner, axis=axis):
            turned = additive(transpose(inner))
            return replace(delta, delta=turned, axis="in" if axis == "out" else "out", norm=None)
        case Replace(value=value, rows=None, then=then):
            _flat(value)
            new = held(value.tensor().T.contiguous(), value.name)
            return replace(delta, value=new, then=within(then, transpose))
        case Replace():
            raise error("usage", "rows of a stored tensor have no transposed form")
        case _:
            assert_never(delta)


def as_stored(delta: Kind) -> Kind:
    """The delta for a weight stored (in, out); full tensors are on disk as stored already."""
    match delta:
        case LowRank() | Renormed():
            return transpose(delta)
        case Replace(then=then):
            return replace(delta, then=within(then, as_stored))
        case Dense():
            return delta
        case _:
            assert_never(delta)


def rows(delta: Kind, start: int, stop: int) -> Kind:
    """The delta of rows start:stop of `out`, as in taking q out of a fused qkv."""
    return _on_rows(delta, lambda t: t[start:stop])


def permute(delta: Kind, order: Sequence[int]) -> Kind:
    """The delta whose row i is row order[i] of this one."""
    whole = shape(delta)
    if whole and sorted(order) != list(range(whole[0])):
        raise error("usage", f"an order of {len(order)} is no permutation of {whole[0]} rows")
    return _on_rows(delta, lambda t: t[torch.as_tensor(order)])


def _on_rows(delta: Kind, pick: Callable[[Tensor], Tensor]) -> Kind:
    def picked(leaf: Leaf) -> Leaf:
        if not leaf.shape:
            raise error("usage", f"{leaf.name} is a single number: it has no rows")
        return held(pick(leaf.tensor()).contiguous(), leaf.name)

    match delta:
        case LowRank():
            return replace(delta, b=picked(delta.b))
        case Dense():
            return replace(delta, diff=picked(delta.diff))
        case Renormed(axis="out", delta=inner):
            part = additive(_on_rows(inner, pick))
            m = pick(delta.magnitude.tensor().reshape(-1)).contiguous()
            return replace(delta, delta=part, magnitude=held(m, delta.magnitude.name))
        case Renormed():
            raise error("usage", "a column norm runs over all rows: it has no rows of its own")
        case Replace(rows=None, then=then):
            inner_rows = within(then, lambda d: _on_rows(d, pick))
            return replace(delta, value=picked(delta.value), then=inner_rows)
        case Replace():
            raise error("usage", "rows of rows: replace by rows names stored rows already")
        case _:
            assert_never(delta)


def stack(deltas: Sequence[Kind]) -> Kind:
    """One delta over the stacked rows of all, as in fusing q, k, v: B block-diagonal, A stacked."""
    first, inner = next(iter(deltas), None), {s[1:] for s in map(shape, deltas) if s is not None}
    match first if len(inner) == 1 else None:
        case LowRank(a=one):
            low = [d for d in deltas if isinstance(d, LowRank)]
            if len(low) == len(deltas):
                pairs = [factors(d) for d in low]
                b: Tensor = torch.block_diag(*[b for b, _ in pairs])  # type: ignore[no-untyped-call]
                return product(b, torch.cat([a for _, a in pairs]), one.shape[1:])
        case Dense():
            dense = [d for d in deltas if isinstance(d, Dense)]
            if len(dense) == len(deltas):
                return Dense(held(torch.cat([widen(d.diff) * d.scaling for d in dense])))
        case Renormed(axis="out"):
            normed = [d for d in deltas if isinstance(d, Renormed) and d.axis == "out"]
            if len(normed) == len(deltas):
                m = torch.cat([widen(d.magnitude).reshape(-1) for d in normed])
                return Renormed(additive(stack([d.delta for d in normed])), held(m))
        case Replace(rows=None, then=None):
            whole = [d for d in deltas if isinstance(d, Replace) and d.rows is None is d.then]
            if len(whole) == len(deltas):
                return Replace(held(torch.cat([d.value.tensor() for d in whole])))
        case Renormed() | Replace() | None:
            pass
        case other:
            assert_never(other)
    names = ", ".join(type(d).__name__ for d in deltas)
    shapes = ", ".join(str(shape(d)) for d in deltas)
    raise error("usage", f"these deltas have no stacked form: {names} of shapes {shapes}")


def _flat(*leaves: Leaf) -> None:
    for leaf in leaves:
        if len(leaf.shape) != 2:
            raise error("usage", f"{leaf.name} is {leaf.shape}: only matrices can be transposed")
