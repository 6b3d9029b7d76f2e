"""Comparing tensors element by element, in tiles: what differs, where first, and by how much."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor

from loratools.adapter import DTYPE_BITS, FLOATS, Leaf, Source
from loratools.desk import one_thread
from loratools.folding import extents, leaf_rows, torch_dtype
from loratools.narrowing import narrow
from loratools.streaming import default_threads

CHANGED = "changed, and no adapter touches it"
UNKNOWN = "neither in the base nor in an adapter"

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int], None]  # bytes done, bytes in all

TILE = 1 << 20  # elements compared at once
_CHUNK = 8 << 20  # bytes compared at once

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One thing that is not as it should be: a tensor, a file, or a field of a config."""

    what: str
    tensor: str | None = None
    file: str | None = None
    elements: int = 0
    first: tuple[int, ...] | None = None  # index of the first element
    worst: float | None = None  # the largest absolute difference

    def as_json(self) -> dict[str, Any]:
        """The entry of `mismatches` in `verify --json`."""
        return {
            "tensor": self.tensor,
            "file": self.file,
            "what": self.what,
            "elements": self.elements,
            "first": None if self.first is None else list(self.first),
            "worst": self.worst if self.worst is not None and isfinite(self.worst) else None,
        }


@dataclass(slots=True)
class Difference:
    """The elements of one tensor that differ, gathered tile by tile."""

    elements: int = 0
    first: int | None = None  # place in row-major order
    worst: float = 0.0

    def add(self, bad: Tensor, distance: Tensor, at: int) -> None:
        """Take in one tile: which elements are bad, how far off, and where the tile begins."""
        count = int(bad.sum())
        if not count:
            return
        self.elements += count
        place = at + int(bad.reshape(-1).to(torch.uint8).argmax())
        self.first = place if self.first is None else min(self.first, place)
        worst = float(distance[bad].nan_to_num(nan=inf, posinf=inf).max())
        self.worst = max(self.worst, worst)

    def mismatch(self, what: str, tensor: str, leaf: Leaf, file: str | None) -> Mismatch | None:
        """It as a mismatch of the tensor that `leaf` holds; None where nothing differs."""
        if self.first is None:
            return None
        rest, index = self.first, []
        for extent in reversed(leaf.shape):
            rest, here = divmod(rest, extent)
            index.append(here)
        return Mismatch(what, tensor, file, self.elements, tuple(reversed(index)), self.worst)


@dataclass(slots=True)
class Rows:
    """A stored tensor that is compared with the rows it should have."""

    leaf: Leaf
    tolerance: int = 0  # units in the last place that do not count as different
    found: Difference = field(default_factory=Difference)
    near: int = 0  # elements that differ within the tolerance

    def compare(self, start: int, tile: Tensor) -> None:
        """Compare rows `start`... with `tile`, of the same dtype, bit by bit."""
        tile = tile.reshape(tile.shape[0], -1)
        there = leaf_rows(replace(self.leaf, scale=None))(start, start + len(tile))
        integer = _INTEGERS[tile.dtype.itemsize]
        mine, its = tile.contiguous().view(integer), there.contiguous().view(integer)
        if torch.equal(mine, its):
            return
        bad = mine != its
        if self.tolerance:
            far = bad & ((_ordered(mine) - _ordered(its)).abs() > self.tolerance)
            self.near += int(bad.sum()) - int(far.sum())
            bad = far
        distance = (tile.to(torch.float64) - there.to(torch.float64)).abs()
        self.found.add(bad, distance, start * tile.shape[1])


def _ordered(bits: Tensor) -> Tensor:
    """The bits of floats as integers in the order of their values: neighbours differ by 1."""
    sign = torch.iinfo(bits.dtype).min
    wide = bits.to(torch.int64)
    return torch.where(bits < 0, sign - wide, wide)


def compare_leaves(expected: Leaf, found: Leaf) -> Difference:
    """Compare two stored tensors of one shape; `expected` is rounded where its dtype is another."""
    mine, its = expected.source, found.source
    plain = expected.strides is None and found.strides is None
    if expected.dtype == found.dtype and plain and mine is not None and its is not None:
        return _compare_bytes(mine, expected.offset, its, found)
    dtype, other = torch_dtype(found.dtype), Rows(found)
    height, width = extents(expected.shape)
    step = max(1, TILE // max(width, 1))
    for start in range(0, height if expected.numel else 0, step):
        tile = leaf_rows(expected)(start, min(start + step, height))
        if tile.dtype != dtype:
            tile = narrow(tile.to(torch.float64), dtype)
        other.compare(start, tile)
    return other.found


def _compare_bytes(mine: Source, offset: int, its: Source, found: Leaf) -> Difference:
    difference, size = Difference(), max(1, DTYPE_BITS[found.dtype] // 8)
    for at in range(0, found.nbytes, _CHUNK):
        length = min(_CHUNK, found.nbytes - at)
        a, b = mine.read(offset + at, length), its.read(found.offset + at, length)
        if a == b:
            continue
        left, right = (torch.frombuffer(bytearray(raw), dtype=torch.uint8) for raw in (a, b))
        bad = (left != right).view(-1, size).any(dim=1)
        if found.dtype in FLOATS:
            dtype = torch_dtype(found.dtype)
            left, right = left.view(dtype), right.view(dtype)
        else:
            left, right = (side.view(-1, size)[:, 0] for side in (left, right))
        distance = (left.to(torch.float64) - right.to(torch.float64)).abs()
        difference.add(bad, distance, at // size)
    return difference


def each(
    work: Callable[[T], R], items: Sequence[T], *, sizes: Sequence[int], progress: Progress | None
) -> list[R]:
    """`work` of every item in a few threads; the results in the items' order."""
    done, total, lock = 0, sum(sizes), threading.Lock()

    def one(item: T, size: int) -> R:
        nonlocal done
        with torch.inference_mode():
            result = work(item)
        with lock:
            done += size
            if progress is not None:
                progress(done, total)
        return result

    with one_thread(), ThreadPoolExecutor(default_threads(), "verify") as pool:
        return list(pool.map(one, items, sizes))
