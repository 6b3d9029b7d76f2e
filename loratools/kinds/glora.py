"""GLoRA as LyCORIS has it: W0·(A1·A2) + B1·B2, both added to W0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from loratools.adapter import Chained, Leaf
from loratools.errors import error

if TYPE_CHECKING:
    from torch import Tensor

NAME = "glora of lycoris"
WHOLE = 0  # of `block`: all rows belong together


class Functions(NamedTuple):
    """What `chained.Method` is made of."""

    shape: Callable[[Chained], tuple[int, ...] | None]
    block: Callable[[Chained], int]
    ready: Callable[[Chained], Chained]
    apply: Callable[[Chained, Tensor, int], Tensor]
    transposed: Callable[[Chained], Chained] | None = None


def ordered(delta: Chained) -> tuple[Leaf, Leaf, Leaf, Leaf]:
    """A1 (in, r), A2 (r, in), B1 (out, r), B2 (r, in, ...); the old files have them swapped."""
    a1, a2, b1, b2 = (delta.parts[name] for name in ("a1", "a2", "b1", "b2"))
    return (a2, a1, b2, b1) if delta.settings.get("age") == "old" else (a1, a2, b1, b2)


def _shape(delta: Chained) -> tuple[int, ...]:
    _, _, b1, b2 = ordered(delta)
    kernel = delta.parts["bm"].shape if "bm" in delta.parts else b2.shape
    shape = (b1.shape[0], b2.shape[1], *kernel[2:])
    return shape[::-1] if delta.settings.get("turned") else shape


def _block(delta: Chained) -> int:
    """W0·A takes row by row; of the transposed weight every row needs all others."""
    return WHOLE if delta.settings.get("turned") else 1


def _ready(delta: Chained) -> Chained:
    """Four matrices in float64, the core in B2, the scaling in A1 and B1."""
    if delta.settings.get("ready"):
        return delta
    import torch

    a1, a2, b1, b2 = (leaf.tensor().to(torch.float64) for leaf in ordered(delta))
    if "bm" in delta.parts:
        core = delta.parts["bm"].tensor().to(torch.float64)
        b2 = torch.einsum("mn...,ni->mi...", core, b2.flatten(1))
    tensors = {
        "a1": a1.flatten(1) * delta.scaling, "a2": a2.flatten(1),
        "b1": b1.flatten(1) * delta.scaling, "b2": b2.flatten(1),
    }  # fmt: skip
    parts = {name: Leaf.of("", tensor) for name, tensor in tensors.items()}
    return Chained(NAME, parts, settings={"turned": delta.settings.get("turned"), "ready": True})


def _apply(delta: Chained, w0: Tensor, start: int) -> Tensor:
    import torch

    delta = _ready(delta)
    a1, a2, b1, b2 = (leaf.tensor() for leaf in ordered(delta))
    if delta.settings.get("turned"):
        return _apply(replace(delta, settings={"ready": True}), w0.T, 0).T.contiguous()
    # A convolution's kernel belongs to its input channel: (rows, in, kernel).
    wide = w0.reshape(len(w0), len(a1), -1)
    chained = torch.einsum("oik,ir,rj->ojk", wide, a1, a2)
    return w0 + chained.reshape(w0.shape) + b1[start : start + len(w0)] @ b2


def _transposed(delta: Chained) -> Chained:
    """(W0·A + B)ᵀ = Aᵀ·W0ᵀ + Bᵀ: marked, for no file holds it."""
    if len(_shape(delta)) != 2:
        raise error("usage", f"a {_shape(delta)} GLoRA is no matrix: it cannot be transposed")
    turned = not delta.settings.get("turned")
    return replace(delta, settings={**delta.settings, "turned": turned})


def on_rows(delta: Chained, pick: Callable[[Leaf], Leaf]) -> Chained:
    """The same of some rows, or of rows in another order: W0·A takes row by row, B1 has rows."""
    if delta.settings.get("turned"):
        raise error("usage", "a GLoRA of a transposed weight mixes rows: none has one of its own")
    rows = "b2" if delta.settings.get("age") == "old" else "b1"
    return replace(delta, parts={**delta.parts, rows: pick(delta.parts[rows])})


def _factors(delta: Chained, w0: Tensor) -> tuple[Tensor, Tensor]:
    """ΔW = [W0·A1, B1]·[A2; B2]: rank 2r; of a kernel of k places r·k + r, W0·A1 being k matrices.

    `w0` is the whole weight (out, in * kernel) in float64.
    """
    import torch

    a1, a2, b1, b2 = (leaf.tensor() for leaf in ordered(_ready(delta)))
    places = w0.shape[1] // len(a1)
    wide = torch.einsum("oik,ir->ork", w0.reshape(len(w0), len(a1), places), a1)
    each = torch.eye(places, dtype=w0.dtype, device=w0.device)
    spread = torch.einsum("ri,kl->rkil", a2, each).reshape(-1, w0.shape[1])
    return torch.cat([wide.reshape(len(w0), -1), b1], 1), torch.cat([spread, b2])


FACTORS = {NAME: _factors}
METHODS = {NAME: Functions(_shape, _block, _ready, _apply, _transposed)}
