"""LoRA upon what an initialisation left of W0: PiSSA (arXiv 2404.02948) and OLoRA (2406.01775).

Before training, s·B0·A0 is taken out of W0 and put into the pair. Both initialisations project W0
onto a few directions, which W0 itself gives again: W = W0 - Q·Qᵀ·W0 (OLoRA: times s) + s·B·A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools import views
from loratools.adapter import Chained, Leaf
from loratools.kinds.glora import WHOLE, Functions

if TYPE_CHECKING:
    from torch import Tensor

Factors = tuple["Tensor", "Tensor"]


def _leading(w0: Tensor, rank: int) -> Tensor:
    """The `rank` left singular vectors of the largest singular values, by the smaller Gram matrix.

    Only their span counts, so that signs are free; in float64 what squaring costs is far below
    the float32 of the initialisation itself.
    """
    import torch

    wide = len(w0) <= w0.shape[1]
    _, vectors = torch.linalg.eigh(w0 @ w0.T if wide else w0.T @ w0)
    leading: Tensor = vectors[:, -rank:]
    if not wide:
        leading, _ = torch.linalg.qr(w0 @ leading)
    return leading


def _first(w0: Tensor, rank: int) -> Tensor:
    """An orthonormal basis of the first `rank` columns: the first columns of Q in W0 = Q·R."""
    import torch

    basis: Tensor = torch.linalg.qr(w0[:, :rank])[0]
    return basis


_SPANS: dict[str, Callable[[Tensor, int], Tensor]] = {"pissa": _leading, "olora": _first}


def _taken(delta: Chained, w0: Tensor) -> Factors:
    """What the initialisation took out of W0, as factors.

    `side` "rows": of the transposed weight, which differs for OLoRA alone.
    """
    rank = min(delta.parts["a"].shape[0], *w0.shape)
    factor = delta.scaling if delta.method == "olora" else 1.0
    if delta.settings.get("side") == "rows":
        q = _SPANS[delta.method](w0.T, rank)
        return w0 @ q * factor, q.T
    q = _SPANS[delta.method](w0, rank)
    return q * factor, q.T @ w0


def factors(delta: Chained, w0: Tensor) -> Factors:
    """W - W0 as factors: the trained pair beside what was taken out, of twice its rank."""
    import torch

    b0, a0 = _taken(delta, w0)
    a, b = (delta.parts[name].tensor().to(torch.float64) for name in "ab")
    return torch.cat([b * delta.scaling, -b0], 1), torch.cat([a, a0])


def _shape(delta: Chained) -> tuple[int, ...]:
    return (delta.parts["b"].shape[0], *delta.parts["a"].shape[1:])


def _whole(_: Chained) -> int:
    return WHOLE


def _ready(delta: Chained) -> Chained:
    import torch

    wide = {n: Leaf.of(x.name, x.tensor().to(torch.float64)) for n, x in delta.parts.items()}
    return replace(delta, parts=wide)


def _apply(delta: Chained, w0: Tensor, start: int) -> Tensor:
    import torch

    b, a = factors(delta, w0)
    return torch.addmm(w0, b, a)


def _transposed(delta: Chained) -> Chained:
    turned = {"a": views.turned(delta.parts["b"]), "b": views.turned(delta.parts["a"])}
    settings = {name: value for name, value in delta.settings.items() if name != "side"}
    if "side" not in delta.settings:
        settings["side"] = "rows"
    return replace(delta, parts=turned, settings=settings)


FACTORS = dict.fromkeys(_SPANS, factors)
METHODS = dict.fromkeys(_SPANS, Functions(_shape, _whole, _ready, _apply, _transposed))
