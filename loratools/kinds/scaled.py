"""Weights times a factor: by rows, by columns ((IA)³) or element by element (HiRA)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools import views
from loratools.adapter import Leaf, LowRank, Scaled, leaves
from loratools.errors import error

if TYPE_CHECKING:
    from torch import Tensor


def shape(delta: Scaled) -> tuple[int, ...] | None:
    """The weight's shape where an update by elements says it."""
    if isinstance(delta.factor, LowRank):
        return (delta.factor.b.shape[0], *delta.factor.a.shape[1:])
    return None


def fits(delta: Scaled, stored: tuple[int, ...]) -> str | None:
    """Why the factor is not one of a weight of this module shape."""
    if not isinstance(delta.factor, Leaf):
        mine = shape(delta)
        return None if mine in (None, stored) else f"adapter is {mine}, base is {stored}"
    wanted = stored[0] if delta.by == "rows" else math.prod(stored[1:2])
    if delta.factor.numel == wanted:
        return None
    return f"adapter scales {delta.factor.numel} {delta.by}, base is {stored}"


def ready(delta: Scaled) -> Scaled:
    """The factor in float64, a plain vector; a pair as matrices."""
    import torch

    if isinstance(delta.factor, Leaf):
        flat = delta.factor.tensor().to(torch.float64).reshape(-1) + delta.offset
        return replace(delta, factor=Leaf.of(delta.factor.name, flat), offset=0.0)
    if isinstance(delta.factor, LowRank):
        b, a = _matrices(delta.factor)
        return replace(delta, factor=LowRank(Leaf.of("", a), Leaf.of("", b), 1.0))
    return delta


def _matrices(low: LowRank) -> tuple[Tensor, Tensor]:
    """B (out, rank), scaled, and A (rank, in * kernel) in float64."""
    import torch

    b = low.b.tensor().to(torch.float64).reshape(low.b.shape[0], -1)
    return b * low.scaling, low.a.tensor().to(torch.float64).reshape(low.rank, -1)


def apply(delta: Scaled, w0: Tensor, start: int) -> Tensor:
    """W0 ∘ (offset + factor)."""
    import torch

    if isinstance(delta.factor, LowRank):
        b, a = _matrices(delta.factor)
        return w0 * (torch.mm(b[start : start + len(w0)], a) + delta.offset)
    if not isinstance(delta.factor, Leaf):
        raise error("usage", f"no weight is scaled by a {type(delta.factor).__name__}")
    factor = delta.factor.tensor().to(torch.float64).reshape(-1) + delta.offset
    if delta.by == "rows":
        return w0 * factor[start : start + len(w0), None]
    per = w0.shape[1] // len(factor)  # a convolution's kernel belongs to its input channel
    return w0 * factor.repeat_interleave(per)


def transposed(delta: Scaled) -> Scaled:
    """Rows become columns."""
    for leaf in leaves(delta):
        if len(leaf.shape) > 2:
            what = f"a factor of {leaf.shape}"
            raise error("usage", f"{what} is of a convolution: it cannot be transposed")
    if isinstance(delta.factor, LowRank):
        low = delta.factor
        turned = replace(low, a=views.turned(low.b), b=views.turned(low.a))
        return replace(delta, factor=turned)
    match delta.by:
        case "rows":
            return replace(delta, by="columns")
        case "columns":
            return replace(delta, by="rows")
        case "elements":
            raise error("usage", f"no weight is scaled by a {type(delta.factor).__name__}")
