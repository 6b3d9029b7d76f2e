"""T-LoRA: the change of a few singular directions of W0, from which it was started."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loratools import views
from loratools.adapter import Chained, Leaf
from loratools.errors import error
from loratools.kinds.glora import WHOLE, Functions

if TYPE_CHECKING:
    from torch import Tensor

NAME = "tlora of lycoris"
STARTS = ("principal", "last", "middle")


def _shape(delta: Chained) -> tuple[int, ...]:
    q, p = delta.parts["q"], delta.parts["p"]
    return (p.shape[0], *q.shape[1:])


def _ready(delta: Chained) -> Chained:
    """Factors in float64: P·λ and Q."""
    import torch

    q, p, lam = (delta.parts[name].tensor().to(torch.float64) for name in ("q", "p", "lambda"))
    p, q = p.flatten(1), q.flatten(1)
    parts = {"q": q, "p": p, "lambda": lam}
    return replace(delta, parts={name: Leaf.of("", tensor) for name, tensor in parts.items()})


def _apply(delta: Chained, w0: Tensor, start: int) -> Tensor:
    """W0 + scaling · (P·λ·Q - the part of W0 that it was started from)."""
    import torch

    q, p, lam = (leaf.tensor() for leaf in _ready(delta).parts.values())
    u, s, v = torch.linalg.svd(w0, full_matrices=False)
    chosen = _chosen(str(delta.settings.get("start", STARTS[0])), lam.numel(), len(s))
    begun: Tensor = (u[:, chosen] * s[chosen]) @ v[chosen]
    return w0 + delta.scaling * ((p * lam.reshape(-1)) @ q - begun)


def _chosen(start: str, rank: int, count: int) -> slice:
    """The singular values that a start takes (LyCORIS:lycoris/modules/tlora.py)."""
    if start == "last":
        return slice(max(count - rank, 0), count)
    begin = (count - rank) // 2 if start == "middle" and rank < count else 0
    return slice(begin, begin + rank)


def _transposed(delta: Chained) -> Chained:
    """P and Q change places; the singular values stay."""
    q, p = delta.parts["q"], delta.parts["p"]
    if len(q.shape) != 2:
        raise error("usage", f"a {_shape(delta)} T-LoRA is no matrix: it cannot be transposed")
    return replace(delta, parts={**delta.parts, "q": views.turned(p), "p": views.turned(q)})


METHODS = {NAME: Functions(_shape, lambda _: WHOLE, _ready, _apply, _transposed)}
