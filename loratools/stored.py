"""Stored weights as rows of a matrix, and the scale that those of 8-bit floats are kept with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loratools.adapter import TORCH_NAMES, Leaf
from loratools.algebra import matrix
from loratools.errors import error, shown

Rows = Callable[[int, int], Tensor]  # (start, stop) -> those stored rows of W0, as a matrix


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name."""
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def extents(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor taken as a matrix."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def leaf_rows(leaf: Leaf, into: Callable[[int, int], Tensor] | None = None) -> Rows:
    """Rows of a stored weight as a matrix, by offset where its bytes lie in row order.

    Numbers that have a scale come multiplied with it, in float64.

    `into(offset, length)` may read bytes in a faster way than the leaf's source (uint8 tensor).
    """
    dtype = torch_dtype(leaf.dtype)
    _, width = extents(leaf.shape)
    if leaf.source is None or leaf.strides is not None:
        whole = matrix(leaf.tensor())
        return times(lambda start, stop: whole[start:stop], scale_of(leaf))
    row, source = width * dtype.itemsize, leaf.source

    def read(start: int, stop: int) -> Tensor:
        offset, length = leaf.offset + start * row, (stop - start) * row
        if into is not None:
            raw = into(offset, length)
        elif length:
            raw = torch.frombuffer(bytearray(source.read(offset, length)), dtype=torch.uint8)
        else:
            raw = torch.empty(0, dtype=torch.uint8)
        return raw.view(dtype).view(stop - start, width)

    return times(read, scale_of(leaf))


def times(rows: Rows, unit: float) -> Rows:
    """Rows with their numbers multiplied, in float64; as they are where there is nothing to do."""
    return rows if unit == 1 else lambda a, b: rows(a, b).to(torch.float64) * unit


def scale_of(leaf: Leaf) -> float:
    """The number that a stored weight's numbers are multiplied with; 1 for most."""
    if leaf.scale is None:
        return 1.0
    (unit,) = leaf.scale.numbers()
    if not 0 < unit < math.inf:
        raise error("malformed", f"{shown(leaf.scale.name)} is {unit:g}: no scale of a weight")
    return unit


def fitting_scale(leaf: Leaf, peak: float, dtype: torch.dtype) -> float:
    """The scale with which numbers up to `peak` fit `dtype`: the stored one while it does.

    Else the smallest number of the scale's own dtype that does, as ComfyUI's tools choose it.
    """
    unit, most = scale_of(leaf), torch.finfo(dtype).max
    if leaf.scale is None or not peak > most * unit or not math.isfinite(peak):
        return unit
    kind = torch_dtype(leaf.scale.dtype)
    found = torch.tensor(peak / most, dtype=torch.float64).to(kind)
    if float(found) * most < peak:
        found = torch.nextafter(found, torch.tensor(math.inf, dtype=kind))
    if not found.isfinite():
        what = f"{shown(leaf.name)}: its scale would be {peak / most:g}, which does not fit"
        raise error("overflow", f"{what} {leaf.scale.dtype}; try --dtype bf16")
    return float(found)


def stored_scale(leaf: Leaf, unit: float | None) -> bytes:
    """The bytes of a weight's scale, if any: the base's, or of the number that took its place."""
    if leaf.scale is None:
        return b""
    if unit is None:
        return leaf.scale.read()
    return Leaf.of("scale", torch.tensor([unit], dtype=torch_dtype(leaf.scale.dtype))).read()
