"""Updates of a weight that stacks experts: one pair of factors for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools import views
from loratools.adapter import Experts, Leaf, LowRank
from loratools.errors import error

if TYPE_CHECKING:
    from torch import Tensor


def ready(delta: Experts) -> Experts:
    """Both stacks in float64, the scaling in the smaller of an expert's factors."""
    import torch

    a, b = delta.a.tensor().to(torch.float64), delta.b.tensor().to(torch.float64)
    if b[0].numel() <= a[0].numel():
        b = b * delta.scaling
    else:
        a = a * delta.scaling
    return replace(delta, a=Leaf.of("", a), b=Leaf.of("", b), scaling=1.0, alpha=None)


def rows(delta: Experts, start: int, stop: int) -> Tensor:
    """The updates of experts start:stop, each of them one row of (out * in)."""
    import torch

    a, b = (x.tensor()[start:stop].to(torch.float64) for x in (delta.a, delta.b))
    return torch.bmm(b, a).reshape(stop - start, -1).mul_(delta.scaling)


def transposed(delta: Experts) -> Experts:
    """(B·A)ᵀ = Aᵀ·Bᵀ in every expert: for a weight stored (experts, in, out)."""
    return replace(delta, a=views.turned(delta.b, (0, 2, 1)), b=views.turned(delta.a, (0, 2, 1)))


def single(delta: Experts, expert: int) -> LowRank:
    """One expert's pair, of a weight of its own."""
    a = views.part(delta.a, expert, expert + 1)
    b = views.part(delta.b, expert, expert + 1)
    alpha = delta.alpha
    return LowRank(
        views.reshaped(a, *a.shape[1:]), views.reshaped(b, *b.shape[1:]), delta.scaling, alpha
    )


def stacked(pairs: Sequence[LowRank | None]) -> Experts:
    """Pairs of single experts as one stack; an expert without one (None) is left as it is.

    Smaller ranks are filled up with zeros, and unequal scalings go into B. Raises `usage` where
    the pairs are not of one shape.
    """
    known = [p for p in pairs if p is not None]
    shapes = {(p.b.shape[0], *p.a.shape[1:]) for p in known}
    if len(shapes) != 1 or any(len(p.a.shape) != 2 for p in known):
        raise error("usage", f"experts of shapes {sorted(shapes)} have no stack")
    out, inner = shapes.pop()
    rank = max(p.rank for p in known)
    scalings, alphas = {p.scaling for p in known}, {p.alpha for p in known}
    same = len(scalings) == 1 and len({p.rank for p in known}) == 1
    scaling = known[0].scaling if len(scalings) == 1 else 1.0
    downs, ups = [], []
    for pair in pairs:
        if pair is None:
            downs.append(_zeros(known[0].a, rank, inner))
            ups.append(_zeros(known[0].b, out, rank))
            continue
        b = pair.b if scaling == pair.scaling else views.scaled(pair.b, pair.scaling, "F64")
        downs.append(views.padded(pair.a, 0, rank - pair.rank))
        ups.append(views.padded(b, 0, rank - pair.rank, 1))
    alpha = known[0].alpha if same and len(alphas) == 1 else None
    return Experts(_stack(downs), _stack(ups), scaling, alpha)


def _zeros(like: Leaf, *shape: int) -> Leaf:
    def make() -> Tensor:
        return like.tensor().new_zeros(shape)

    return views.later("", like.dtype, shape, make)


def _stack(leaves: Sequence[Leaf]) -> Leaf:
    whole = views.joined(leaves)
    return views.reshaped(whole, len(leaves), *leaves[0].shape)


def added(deltas: Sequence[Experts]) -> Experts:
    """The sum, exactly: in every expert the ranks stand one after another."""
    scalings = {d.scaling for d in deltas}
    scaling = deltas[0].scaling if len(scalings) == 1 else 1.0
    b = [d.b if len(scalings) == 1 else views.scaled(d.b, d.scaling, "F64") for d in deltas]
    return replace(
        deltas[0], a=views.joined([d.a for d in deltas], 1), b=views.joined(b, 2),
        scaling=scaling, alpha=None,
    )  # fmt: skip


def halves(deltas: Mapping[int, Experts]) -> Experts:
    """One or both halves of `out` as one stack: A stacked, B block-diagonal.

    A half that is not there is left as it is.
    """
    some = list(deltas.values())
    scalings = {d.scaling for d in some}
    scaling = some[0].scaling if len(scalings) == 1 else 1.0
    ranks, size = [deltas[i].a.shape[1] for i in sorted(deltas)], some[0].b.shape[1]
    ups = []
    for i, (half, delta) in enumerate(sorted(deltas.items())):
        b = delta.b if len(scalings) == 1 else views.scaled(delta.b, delta.scaling, "F64")
        b = views.padded(b, sum(ranks[:i]), sum(ranks[i + 1 :]), 2)
        ups.append(b if len(some) == 2 else views.padded(b, half * size, (1 - half) * size, 1))
    a = views.joined([d.a for _, d in sorted(deltas.items())], 1)
    return Experts(a, views.joined(ups, 1), scaling)


def part(delta: Experts, start: int, stop: int, step: int = 1) -> Experts:
    """Rows start:stop:step of `out` in every expert: gate or up out of both in one."""
    if step == 1:
        return replace(delta, b=views.part(delta.b, start, stop, 1))
    size = len(range(start, stop, step))
    shape = (delta.b.shape[0], size, delta.b.shape[2])
    b = delta.b
    picked = views.later(b.name, b.dtype, shape, lambda: b.tensor()[:, start:stop:step])
    return replace(delta, b=picked)


def interleaved(delta: Experts) -> Experts:
    """The two halves of `out` with their rows in turn: first of one, first of the other, ..."""
    half = delta.b.shape[1] // 2
    order = [i // 2 + half * (i % 2) for i in range(2 * half)]
    return replace(delta, b=views.reordered(delta.b, order, 1))
