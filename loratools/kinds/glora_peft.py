"""GLoRA as PEFT has it: W0 + W0∘A + B, and of the bias b + b∘D + E + W0·C."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.adapter import Chained, Leaf
from loratools.errors import error
from loratools.kinds.glora import Functions
from loratools.kinds.spectral import turned

if TYPE_CHECKING:
    from torch import Tensor

NAME = "glora of peft"
BIAS = "glora bias of peft"


def fits(delta: Chained, stored: tuple[int, ...]) -> str | None:
    """Why the paths are not of a weight, or a bias, of this module shape."""
    for part, leaf in delta.parts.items():
        path, _, form = part.partition(".")
        if path == "C":  # over the inputs of the weight
            inner = delta.parts["weight"].shape[1:] if "weight" in delta.parts else leaf.shape[:1]
            if form != "Xu" and leaf.shape[:1] != inner:
                return f"adapter's {part} is {leaf.shape}, the weight has {inner} inputs"
            continue
        if part == "weight" or leaf.numel == 1:
            continue
        wanted = stored[1] if form == "Xu" else stored[0]
        has = leaf.shape[-1] if form == "Xu" else leaf.shape[0]
        if has != wanted:
            return f"adapter's {part} is {leaf.shape}, base is {stored}"
    return None


def _shape(delta: Chained) -> tuple[int, ...] | None:
    """What a path of two factors says; a vector or a number says less."""
    if delta.method == NAME and "A.Xd" in delta.parts and "A.Xu" in delta.parts:
        shape = (delta.parts["A.Xd"].shape[0], delta.parts["A.Xu"].shape[1])
        return shape[::-1] if delta.settings.get("turned") else shape
    return None


def _ready(delta: Chained) -> Chained:
    import torch

    parts = {
        name: leaf if name == "weight" else Leaf.of("", leaf.tensor().to(torch.float64))
        for name, leaf in delta.parts.items()
    }
    return replace(delta, parts=parts)


def _path(delta: Chained, name: str, start: int, stop: int) -> Tensor | float:
    """Rows of a path: of a product, of a vector, or its one number; 0 where it is empty."""
    import torch

    turned = bool(delta.settings.get("turned"))
    if f"{name}.Xd" in delta.parts:
        down, up = (delta.parts[f"{name}.{x}"].tensor().to(torch.float64) for x in ("Xd", "Xu"))
        down, up = (up.T, down.T) if turned else (down, up)
        return down[start:stop] @ up
    if f"{name}.X" not in delta.parts:
        return 0.0
    leaf = delta.parts[f"{name}.X"]
    column = leaf.tensor().to(torch.float64).reshape(-1, 1)
    if turned:
        return column.T
    # One number is for all rows; a vector has one for each, also of a single row.
    return column if leaf.numel == 1 else column[start:stop]


def _apply(delta: Chained, w0: Tensor, start: int) -> Tensor:
    stop = start + len(w0)
    return w0 + w0 * _path(delta, "A", start, stop) + _path(delta, "B", start, stop)


def _transposed(delta: Chained) -> Chained:
    """Marked: the paths are those of the module's weight."""
    return replace(delta, settings=turned(delta.settings))


def _apply_bias(delta: Chained, b0: Tensor, start: int) -> Tensor:
    import torch

    stop = start + len(b0)
    b = b0 + b0 * _path(delta, "D", start, stop) + _path(delta, "E", start, stop)
    if not any(part.startswith("C.") for part in delta.parts):
        return b
    if "weight" not in delta.parts:
        raise error("needs_base", "GLoRA's bias takes W0·C: it needs the weight beside it")
    weight = delta.parts["weight"].tensor()
    inner = _path(delta, "C", 0, weight.shape[1])
    return b + weight[start:stop].to(torch.float64) @ inner


METHODS = {
    NAME: Functions(_shape, lambda _: 1, _ready, _apply, _transposed),
    BIAS: Functions(lambda _: None, lambda _: 1, _ready, _apply_bias),
}
