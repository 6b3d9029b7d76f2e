"""The algebra of deltas in float64: apply, combine, add, materialise; no names, no files.

Weights are matrices here: a tensor of shape (out, in, *kernel) is handled as (out, in * kernel).
Leaves widen to float64 where they enter, in `widen`; where tensors live and how results are
narrowed is decided by `loratools.folding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar, assert_never

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
    Leaf,
    LowRank,
    Made,
    Renormed,
    Replace,
    Rotated,
    Scaled,
    Sparse,
    Spectral,
)  # fmt: skip
from loratools.errors import error
from loratools.kinds import experts
from loratools.rewriting import additive, lowered, shape, within

K = TypeVar("K", bound=Kind)
Then = LowRank | Renormed | Replace
Tiles = Callable[[], Iterable[tuple[int, Tensor]]]  # (first row, float64 rows of W0), in order


def widen(leaf: Leaf) -> Tensor:
    """A leaf's tensor in float64."""
    return leaf.tensor().to(torch.float64)


def held(tensor: Tensor, name: str = "") -> Leaf:
    """A leaf around a tensor."""
    return Leaf.of(name, tensor)


def matrix(tensor: Tensor) -> Tensor:
    """(out, in, *kernel) as (out, in * kernel); a vector (out,) as (out, 1)."""
    return tensor.reshape(*tensor.shape[:1] or (1,), math.prod(tensor.shape[1:]))


def map_leaves(delta: K, change: Callable[[Leaf], Leaf]) -> K:
    """The same delta with every leaf changed."""
    new: dict[str, Any] = {}
    for name in delta.__dataclass_fields__:
        value = getattr(delta, name)
        if isinstance(value, Leaf):
            new[name] = change(value)
        elif isinstance(value, Kind):
            new[name] = map_leaves(value, change)
        elif name == "parts":
            new[name] = {part: change(leaf) for part, leaf in value.items()}
    return replace(delta, **new)


def factors(delta: LowRank) -> tuple[Tensor, Tensor]:
    """B (out, rank), scaled, and A (rank, in * kernel), so that ΔW = B·A."""
    b, a = widen(delta.b), matrix(widen(delta.a))
    b = b.reshape(b.shape[0], delta.rank)
    return (b if delta.scaling == 1 else b * delta.scaling), a


def product(b: Tensor, a: Tensor, inner: Sequence[int]) -> LowRank:
    """B·A of scaling 1, from matrices, for a weight of (out, *inner)."""
    kernel = [1 for _ in inner[1:]]
    return LowRank(held(a.reshape(len(a), *inner)), held(b.reshape(*b.shape, *kernel)), 1.0)


# ------------------------------------------------------------------------------- applying


def reach(delta: Kind) -> Literal["rows", "pass"]:
    """What a tile of rows needs: only itself ("rows"), or a first pass over all of W0 ("pass")."""
    match delta:
        case Renormed(axis="in", norm=None):
            return "pass"
        case Replace(then=then) if then is not None:
            return reach(then)
        case LowRank() | Dense() | Replace() | Renormed():
            return "rows"
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
            return "rows"
        case _:
            assert_never(delta)


def block(delta: Kind) -> int:
    """Rows that a tile must hold together: 1, or n where blocks of n mix; 0 for all of them."""
    match delta:
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
            return kinds.block(delta)
        case Replace(then=then) if then is not None:
            return block(then)
        case LowRank() | Dense() | Replace() | Renormed():
            return 1
        case _:
            assert_never(delta)


def prepare(delta: Kind, tiles: Tiles) -> Kind:
    """The delta ready for tiles: float64 factors with their scaling taken in, column norms found.

    The norms take a first pass over W0, in the order that `tiles` gives.
    """
    match delta:
        case LowRank():
            b, a = factors(delta)
            return LowRank(held(a), held(b), 1.0)
        case Dense(diff=diff, scaling=scaling):
            return Dense(held(matrix(widen(diff)) * scaling))
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
            return kinds.ready(delta)
        case Replace(value=value, rows=rows, then=then):
            new = Replace(held(matrix(widen(value))), rows)

            def replaced() -> Iterable[tuple[int, Tensor]]:
                if rows is None:
                    return [(0, new.value.tensor())]
                return ((at, apply(new, w0, at)) for at, w0 in tiles())

            return replace(new, then=within(then, lambda d: prepare(d, replaced)))
        case Renormed():
            ready = additive(prepare(delta.delta, tiles))
            norm = None
            if delta.axis == "in":
                parts = (_plus(ready, w0, at).square().sum(dim=0) for at, w0 in tiles())
                squares = sum(parts, torch.zeros((), dtype=torch.float64))
                # A convolution has one magnitude per input, over its whole kernel.
                norm = held(squares.reshape(delta.magnitude.numel, -1).sum(dim=1).sqrt())
            return replace(delta, delta=ready, norm=norm)
        case _:
            assert_never(delta)


def apply(delta: Kind, w0: Tensor, start: int = 0, out: Tensor | None = None) -> Tensor:
    """W for the rows `w0` (rows, in * kernel) of a base weight that begin at row `start`.

    `out`, where given, may be used for the result, and may be `w0`, which is else never changed.
    """
    match delta:
        case LowRank() | Dense() | Hadamard() | Kronecker() | Sparse() | Spectral() | Experts():
            return _plus(delta, w0, start, out)
        case Scaled() | Rotated() | Chained():
            return kinds.apply(delta, w0, start)
        case Renormed(delta=inner, magnitude=magnitude, axis=axis, norm=norm):
            w = _plus(inner, w0, start, out)
            m = widen(magnitude).reshape(-1)
            if axis == "out":
                scale = m[start : start + len(w)] / torch.linalg.vector_norm(w, dim=1)
                return w.mul_(scale[:, None])
            if norm is None:
                raise error("usage", "a column renormalisation needs algebra.prepare first")
            scale = m / widen(norm)
            return w.mul_(scale.repeat_interleave(w.shape[1] // len(scale)))
        case Replace(value=value, rows=rows, then=then):
            new, w = matrix(widen(value)), w0.clone()
            if rows is None:
                new = new[start : start + len(w)]
                w[: len(new)] = new
            for i, row in enumerate(rows or ()):
                if start <= row < start + len(w):
                    w[row - start] = new[i]
            return w if then is None else apply(then, w, start)
        case _:
            assert_never(delta)


def update(delta: Additive, start: int, height: int) -> Tensor:
    """ΔW's rows start:start+height as a matrix (fewer where the delta has no more)."""
    match delta:
        case LowRank():
            b, a = factors(delta)
            return b[start : start + height] @ a
        case Dense(diff=diff, scaling=scaling):
            return matrix(widen(diff))[start : start + height] * scaling
        case Hadamard() | Kronecker() | Sparse() | Spectral() | Experts():
            return kinds.rows(delta, start, min(start + height, delta.shape[0]))
        case _:
            assert_never(delta)


def _plus(delta: Additive, w0: Tensor, start: int, out: Tensor | None = None) -> Tensor:
    """W0 + ΔW for rows of W0; rows that lie beyond the delta's own stay as they are."""
    if isinstance(delta, LowRank):
        b, a = factors(delta)
        b = b[start : start + len(w0)]
        if len(b) == len(w0):
            return torch.addmm(w0, b, a, out=out)
    tile = update(delta, start, len(w0))
    if len(tile) == len(w0):
        return torch.add(w0, tile, out=out)
    return torch.cat([w0[: len(tile)] + tile, w0[len(tile) :]])


def combine(
    terms: Sequence[tuple[float, Kind]], w0: Tensor, start: int = 0, out: Tensor | None = None
) -> Tensor:
    """W0 + Σ w_i (apply_i(W0) − W0); one term of weight 1 is apply(W0) itself, bit for bit."""
    if len(terms) == 1 and terms[0][0] == 1:
        return apply(terms[0][1], w0, start, out)
    w = w0.clone()
    for weight, delta in terms:
        if isinstance(delta, Additive):
            w = _plus(scaled(delta, weight), w, start)
        else:
            w += weight * (apply(delta, w0, start) - w0)
    return w


def grown(terms: Sequence[tuple[float, Kind]], like: Tensor, start: int) -> Tensor:
    """Rows that W0 does not have (a new head, a longer vocabulary): Σ w_i V_i / Σ w_i.

    The sums are over the adapters that have a row. `like` gives shape and device; additive terms
    that reach these rows are added.
    """
    w, total = torch.zeros_like(like), like.new_zeros(len(like), 1)
    brought = [
        (weight, delta, [row - start for row in have if start <= row < start + len(like)])
        for weight, delta in terms
        if isinstance(delta, Replace)
        for have in [range(delta.value.shape[0]) if delta.rows is None else delta.rows]
    ]
    for weight, _, at in brought:
        total[at] += weight
    if not bool(total.all()):
        row = start + int((total == 0).flatten().nonzero()[0])
        raise error("head_conflict", f"the weights of what is new in row {row} sum to 0")
    for weight, new, at in brought:
        w[at] += (weight / total[at]) * apply(new, w, start)[at]
    for weight, delta in terms:
        if isinstance(delta, Additive):
            w = _plus(scaled(delta, weight), w, start)
    return w


def condense(terms: Sequence[tuple[float, Kind]]) -> list[tuple[float, Kind]]:
    """The same sum in fewer terms: all weighted low-rank deltas become one of their total rank."""
    parts = [part for term in terms for part in _apart(*term)]
    low = [scaled(d, w) for w, d in parts if isinstance(d, LowRank)]
    rest: list[tuple[float, Kind]] = [(w, d) for w, d in parts if not isinstance(d, LowRank)]
    return [(1.0, add(low)), *rest] if low else rest


def _apart(weight: float, delta: Kind) -> list[tuple[float, Kind]]:
    """A weighted update upon a replaced weight, as a term of its own: new rows take w·ΔW too."""
    if weight != 1 and isinstance(delta, Replace) and isinstance(delta.then, Additive):
        return [(weight, replace(delta, then=None)), (weight, delta.then)]
    return [(weight, delta)]


def materialise(delta: Kind, w0: Tensor | None = None) -> Tensor:
    """ΔW (out, in, *kernel) as a dense float64 tensor; kinds that depend on W0 need it."""
    match delta:
        case LowRank():
            b, a = factors(delta)
            return (b @ a).reshape(b.shape[0], *delta.a.shape[1:])
        case Dense(diff=diff, scaling=scaling):
            return widen(diff) * scaling
        case Hadamard() | Kronecker() | Sparse() | Spectral() | Experts():
            return kinds.rows(delta, 0, delta.shape[0]).reshape(delta.shape)
        case Renormed() | Replace() | Scaled() | Rotated() | Chained():
            if w0 is None:
                raise error("needs_base", f"{type(delta).__name__} has no ΔW without its base")
            wide = matrix(w0.to(torch.float64))
            ready = prepare(delta, lambda: [(0, wide)])
            return (apply(ready, wide) - wide).reshape(w0.shape)
        case _:
            assert_never(delta)


# ------------------------------------------------------------------------------- sums


def scaled(delta: Additive, weight: float) -> Additive:
    """weight · ΔW; weight 1 keeps the stored alpha. Other kinds interpolate, in `combine`."""
    if weight == 1:
        return delta
    match delta:
        case LowRank():
            return replace(delta, scaling=delta.scaling * weight, alpha=None)
        case Dense():
            return replace(delta, scaling=delta.scaling * weight)
        case Hadamard() | Kronecker() | Experts():
            return replace(delta, scaling=delta.scaling * weight, alpha=None)
        case Sparse() | Spectral():
            return replace(delta, scaling=delta.scaling * weight)
        case Renormed() | Replace() | Scaled() | Rotated() | Chained():
            raise error("needs_base", f"{type(delta).__name__} cannot be scaled without its base")
        case _:
            assert_never(delta)


def add(deltas: Sequence[Additive]) -> Additive:
    """The exact sum, of scaling 1: low-rank deltas concatenated (rank adds up), others dense.

    Raises FitError `shape_mismatch`.
    """
    if len(deltas) == 1 and deltas[0].scaling == 1:
        return deltas[0]
    same_shape(deltas)
    stacks = [d for d in deltas if isinstance(d, Experts)]
    if len(stacks) == len(deltas):
        if len({d.over for d in stacks}) > 1:
            raise error("needs_base", "which side of the experts A is on differs or is not known")
        return experts.added(stacks)
    deltas = [lowered(d) if isinstance(d, Made) else d for d in deltas]
    low = [d for d in deltas if isinstance(d, LowRank)]
    if len(low) == len(deltas):
        pairs = [factors(d) for d in low]
        b, a = torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs], 0)
        return product(b, a, low[0].a.shape[1:])
    total = materialise(deltas[0])
    for delta in deltas[1:]:
        total = total + materialise(delta).reshape(total.shape)
    return Dense(held(total))


def same_shape(deltas: Sequence[Additive]) -> None:
    """FitError `shape_mismatch` unless all deltas are of one matrix or kernel."""
    shapes = dict.fromkeys(_without_ones(shape(d)) for d in deltas)
    if len(shapes) > 1:
        listed = " and ".join(str(s) for s in shapes)
        raise error("shape_mismatch", f"updates of shapes {listed} have no sum; of two bases?")


def _without_ones(shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """A 1x1 convolution and a linear layer hold the same matrix."""
    assert shape is not None
    return shape[:2] if math.prod(shape[2:]) == 1 else shape
