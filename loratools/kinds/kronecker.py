"""LoKr: the Kronecker product of a small matrix and a large one, either of them factored or not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools import views
from loratools.adapter import Kronecker, Leaf, LowRank
from loratools.errors import error

if TYPE_CHECKING:
    from torch import Tensor


def first(delta: Kronecker) -> Tensor:
    """W1 (out1, in1) in float64."""
    import torch

    return _whole(delta.w1, delta.w1_a, delta.w1_b).to(torch.float64)


def second(delta: Kronecker) -> Tensor:
    """W2 (out2, in2 * kernel) in float64."""
    import torch

    if delta.t2 is not None:
        assert delta.w2_a is not None
        assert delta.w2_b is not None
        a, b, t = (x.tensor().to(torch.float64) for x in (delta.w2_a, delta.w2_b, delta.t2))
        # t[i, j, k, l] · w_b[j, in2] · w_a[i, out2] (LyCORIS:lycoris/functional/lokr.py)
        core = torch.einsum("ij...,jn,ip->pn...", t, b, a)
        return core.reshape(len(core), -1)
    whole = _whole(delta.w2, delta.w2_a, delta.w2_b).to(torch.float64)
    return whole.reshape(len(whole), -1)


def _whole(whole: Leaf | None, a: Leaf | None, b: Leaf | None) -> Tensor:
    import torch

    if whole is not None:
        return whole.tensor()
    assert a is not None
    assert b is not None
    up, down = a.tensor().to(torch.float64), b.tensor().to(torch.float64)
    return up @ down.reshape(len(down), -1)


def ready(delta: Kronecker) -> Kronecker:
    """Both factors whole, in float64, the scaling in the smaller."""
    w1, w2 = first(delta) * delta.scaling, second(delta)
    return Kronecker(delta.shape, 1.0, w1=Leaf.of("", w1), w2=Leaf.of("", w2))


def rows(delta: Kronecker, start: int, stop: int) -> Tensor:
    """Rows of W1 ⊗ W2 as (out, in * kernel): row p·out2 + q is the row p of W1 with q of W2."""
    import torch

    w1, w2 = first(delta), second(delta)
    at = torch.arange(start, stop, device=w1.device)
    left, right = w1[at // len(w2)], w2[at % len(w2)]
    # in = in1 · in2, and the kernel belongs to W2: (in1, in2 * kernel) in a row.
    product = left[:, :, None] * right[:, None, :]
    return product.reshape(len(at), math.prod(delta.shape[1:])).mul_(delta.scaling)


def low_rank(delta: Kronecker) -> LowRank | None:
    """(U1·V1) ⊗ (U2·V2) = (U1 ⊗ U2)·(V1 ⊗ V2), exactly; a whole factor is its own with I.

    None where the rank, the product of both, is no less than the weight's own.
    """
    out, inner = delta.shape[0], delta.shape[1:]
    r1, r2 = (_rank(*sides) for sides in (_sides_of_first(delta), _sides_of_second(delta)))
    if r1 * r2 >= min(out, math.prod(inner)):
        return None

    def up() -> Tensor:
        (u1, _), (u2, _) = _factors(delta, r1, r2)
        return _product(u1, u2).reshape(out, -1, *kernel)

    def down() -> Tensor:
        (_, v1), (_, v2) = _factors(delta, r1, r2)
        return _product(v1, v2).reshape(-1, *inner)

    kernel = [1 for _ in inner[1:]]
    small = delta.w1 or delta.w1_a
    large = delta.w2 or delta.w2_a
    assert small is not None
    assert large is not None
    return LowRank(
        views.later(large.name, "F64", (r1 * r2, *inner), down),
        views.later(small.name, "F64", (out, r1 * r2, *kernel), up),
        delta.scaling,
    )


def _product(one: Tensor, other: Tensor) -> Tensor:
    """one ⊗ other; torch.kron fails on strides that a transposed row has."""
    whole = one[:, None, :, None] * other[None, :, None, :]
    return whole.reshape(len(one) * len(other), -1)


def rank(delta: Kronecker) -> int | None:
    """The number that alpha is divided by: the rank of the factors; None where both are whole."""
    if delta.w1_b is not None:
        return delta.w1_b.shape[0]
    return None if delta.w2_b is None else delta.w2_b.shape[0]


def _sides_of_first(delta: Kronecker) -> tuple[int, int, int | None]:
    """Rows, columns and inner rank of W1."""
    if delta.w1 is not None:
        return delta.w1.shape[0], delta.w1.shape[1], None
    assert delta.w1_a is not None
    assert delta.w1_b is not None
    return delta.w1_a.shape[0], delta.w1_b.shape[1], delta.w1_b.shape[0]


def _sides_of_second(delta: Kronecker) -> tuple[int, int, int | None]:
    """Rows, columns (with the kernel) and inner rank of W2."""
    rows1, columns1, _ = _sides_of_first(delta)
    inner = None if delta.w2_b is None else delta.w2_b.shape[0]
    return delta.shape[0] // rows1, math.prod(delta.shape[1:]) // columns1, inner


def _rank(height: int, width: int, inner: int | None) -> int:
    return min(height, width) if inner is None else min(height, width, inner)


def _factors(
    delta: Kronecker, r1: int, r2: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """U and V of both factors, of these ranks."""
    return (
        _split(first(delta), delta.w1_a, delta.w1_b, None, r1),
        _split(second(delta), delta.w2_a, delta.w2_b, delta.t2, r2),
    )


def _split(
    whole: Tensor, a: Leaf | None, b: Leaf | None, core: Leaf | None, rank: int
) -> tuple[Tensor, Tensor]:
    """U·V = the factor: as it is stored, or with a unit matrix on its smaller side."""
    import torch

    if a is not None and b is not None and b.shape[0] == rank < min(whole.shape):
        up, down = a.tensor().to(torch.float64), b.tensor().to(torch.float64)
        if core is None:
            return up, down.reshape(len(down), -1)
        turned = torch.einsum("ij...,jn->in...", core.tensor().to(torch.float64), down)
        return up.T, turned.reshape(len(turned), -1)
    eye = torch.eye(rank, dtype=whole.dtype, device=whole.device)
    return (eye, whole) if len(whole) == rank else (whole, eye)


def transposed(delta: Kronecker) -> Kronecker:
    """(W1 ⊗ W2)ᵀ = W1ᵀ ⊗ W2ᵀ."""
    if len(delta.shape) != 2:
        raise error("usage", f"a {delta.shape} LoKr is no matrix: it cannot be transposed")

    def turn(leaf: Leaf | None) -> Leaf | None:
        return None if leaf is None else views.turned(leaf)

    return replace(
        delta, shape=delta.shape[::-1], w1=turn(delta.w1), w2=turn(delta.w2),
        w1_a=turn(delta.w1_b), w1_b=turn(delta.w1_a), w2_a=turn(delta.w2_b),
        w2_b=turn(delta.w2_a),
    )  # fmt: skip
