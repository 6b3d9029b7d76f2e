"""LoHa: the elementwise product of two low-rank matrices, with or without convolution cores."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools import views
from loratools.adapter import Hadamard, Leaf, LowRank
from loratools.errors import error

if TYPE_CHECKING:
    from torch import Tensor


def rank(delta: Hadamard) -> int:
    """The rank of each of the two products."""
    return delta.w1_b.shape[0]


def ready(delta: Hadamard) -> Hadamard:
    """Cores multiplied into W_b, factors in float64, the scaling in the first."""
    pairs = [
        _pair(a, b, t, delta.shape)
        for a, b, t in (
            (delta.w1_a, delta.w1_b, delta.t1),
            (delta.w2_a, delta.w2_b, delta.t2),
        )
    ]
    (a1, b1), (a2, b2) = pairs
    w1_a, w1_b, w2_a, w2_b = (Leaf.of("", t) for t in (a1 * delta.scaling, b1, a2, b2))
    return Hadamard(w1_a, w1_b, w2_a, w2_b, delta.shape, 1.0)


def _pair(a: Leaf, b: Leaf, core: Leaf | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(out, rank) and (rank, in * kernel) of one product."""
    import torch

    left, right = a.tensor().to(torch.float64), b.tensor().to(torch.float64)
    if core is None:
        return left, right.reshape(len(right), math.prod(shape[1:]))
    # t[i, j, k, l] · w_b[j, in] · w_a[i, out] (LyCORIS:lycoris/functional/loha.py)
    whole = torch.einsum("ij...,jn->in...", core.tensor().to(torch.float64), right)
    return left.T, whole.reshape(len(whole), math.prod(shape[1:]))


def rows(delta: Hadamard, start: int, stop: int) -> Tensor:
    """(W1a·W1b) ∘ (W2a·W2b) for some rows, times the scaling."""
    import torch

    (a1, b1), (a2, b2) = (
        _pair(delta.w1_a, delta.w1_b, delta.t1, delta.shape),
        _pair(delta.w2_a, delta.w2_b, delta.t2, delta.shape),
    )
    first = torch.mm(a1[start:stop], b1)
    return first.mul_(torch.mm(a2[start:stop], b2)).mul_(delta.scaling)


def low_rank(delta: Hadamard) -> LowRank | None:
    """Rank r² exactly: rows of W1a and W2a, and columns of W1b and W2b, multiplied pairwise.

    None where that is no less than the weight's own rank.
    """
    r, out, inner = rank(delta), delta.shape[0], delta.shape[1:]
    if r * r >= min(out, math.prod(inner)):
        return None

    def up() -> Tensor:
        (a1, _), (a2, _) = _both(delta)
        return (a1[:, :, None] * a2[:, None, :]).reshape(out, r * r, *[1 for _ in inner[1:]])

    def down() -> Tensor:
        (_, b1), (_, b2) = _both(delta)
        return (b1[:, None, :] * b2[None, :, :]).reshape(r * r, *inner)

    kernel = [1 for _ in inner[1:]]
    return LowRank(
        views.later(delta.w1_b.name, "F64", (r * r, *inner), down),
        views.later(delta.w1_a.name, "F64", (out, r * r, *kernel), up),
        delta.scaling,
    )


def _both(delta: Hadamard) -> list[tuple[Tensor, Tensor]]:
    return [
        _pair(delta.w1_a, delta.w1_b, delta.t1, delta.shape),
        _pair(delta.w2_a, delta.w2_b, delta.t2, delta.shape),
    ]


def transposed(delta: Hadamard) -> Hadamard:
    """The product of the transposed matrices."""
    if len(delta.shape) != 2 or delta.t1 is not None:
        raise error("usage", f"a {delta.shape} LoHa is no matrix: it cannot be transposed")
    turn = views.turned
    return replace(
        delta,
        w1_a=turn(delta.w1_b), w1_b=turn(delta.w1_a), w2_a=turn(delta.w2_b),
        w2_b=turn(delta.w2_a), shape=delta.shape[::-1],
    )  # fmt: skip
