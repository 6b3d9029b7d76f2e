"""Leaves seen otherwise: turned, cut, joined, reordered; nothing is read before they are opened."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.adapter import DTYPE_BITS, TORCH_NAMES, Leaf

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 20  # bytes compared at once


def later(name: str, dtype: str, shape: Sequence[int], make: Callable[[], torch.Tensor]) -> Leaf:
    """A leaf that `make` computes each time it is opened; dtype and shape are known before."""
    return Leaf(name, dtype, tuple(shape), made=make)


def turned(leaf: Leaf, axes: Sequence[int] = (1, 0)) -> Leaf:
    """The leaf with its axes in another order: (in, rank) as (rank, in)."""
    shape = tuple(leaf.shape[i] for i in axes)
    if leaf.source is None:
        return later(leaf.name, leaf.dtype, shape, lambda: leaf.tensor().permute(*axes))
    strides = leaf.strides if leaf.strides is not None else row_major(leaf.shape)
    turned_strides = tuple(strides[i] for i in axes)
    flat = turned_strides == row_major(shape)
    return replace(leaf, shape=shape, strides=None if flat else turned_strides)


def part(leaf: Leaf, start: int, stop: int, axis: int = 0) -> Leaf:
    """The slice start:stop along an axis."""
    shape = (*leaf.shape[:axis], stop - start, *leaf.shape[axis + 1 :])
    if leaf.source is None:
        return later(
            leaf.name, leaf.dtype, shape, lambda: leaf.tensor().narrow(axis, start, stop - start)
        )
    strides = leaf.strides if leaf.strides is not None else row_major(leaf.shape)
    offset = leaf.offset + start * strides[axis] * DTYPE_BITS[leaf.dtype] // 8
    flat = leaf.strides is None and axis == 0
    return replace(leaf, shape=shape, offset=offset, strides=None if flat else strides)


def reshaped(leaf: Leaf, *shape: int) -> Leaf:
    """The same numbers, row by row, in another shape."""
    if leaf.source is None or leaf.strides is not None:
        return later(leaf.name, leaf.dtype, shape, lambda: leaf.tensor().reshape(shape))
    return replace(leaf, shape=tuple(shape))


def reordered(leaf: Leaf, order: Sequence[int], axis: int = 0) -> Leaf:
    """The leaf whose row i (along `axis`) is row order[i] of this one."""

    def make() -> torch.Tensor:
        import torch

        return leaf.tensor().index_select(axis, torch.as_tensor(order))

    return later(leaf.name, leaf.dtype, leaf.shape, make)


def scaled(leaf: Leaf, factor: float, dtype: str = "F32") -> Leaf:
    """The leaf times a number, in `dtype` or wider; the leaf itself where the number is 1."""
    if factor == 1:
        return leaf
    wide = widest([leaf.dtype, dtype])

    def make() -> torch.Tensor:
        import torch

        return (leaf.tensor().to(torch.float64) * factor).to(getattr(torch, TORCH_NAMES[wide]))

    return later(leaf.name, wide, leaf.shape, make)


def joined(leaves: Sequence[Leaf], axis: int = 0) -> Leaf:
    """Leaves one after another along an axis, in the widest of their dtypes."""
    first = leaves[0]
    shape = list(first.shape)
    shape[axis] = sum(leaf.shape[axis] for leaf in leaves)
    dtype = widest([leaf.dtype for leaf in leaves])

    def make() -> torch.Tensor:
        import torch

        kind = getattr(torch, TORCH_NAMES[dtype])
        return torch.cat([leaf.tensor().to(kind) for leaf in leaves], axis)

    return later(first.name, dtype, shape, make)


def diagonal(leaves: Sequence[Leaf]) -> Leaf:
    """Factors B (out_i, rank_i, 1, ...) as blocks on a diagonal: (Σout, Σrank, 1, ...)."""
    first = leaves[0]
    kernel = first.shape[2:]
    shape = (sum(b.shape[0] for b in leaves), sum(b.shape[1] for b in leaves), *kernel)
    dtype = widest([leaf.dtype for leaf in leaves])

    def make() -> torch.Tensor:
        import torch

        kind = getattr(torch, TORCH_NAMES[dtype])
        blocks = [leaf.tensor().to(kind).reshape(leaf.shape[0], -1) for leaf in leaves]
        whole: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return whole.reshape(shape)

    return later(first.name, dtype, shape, make)


def padded(leaf: Leaf, before: int, after: int, axis: int = 0) -> Leaf:
    """The leaf with zeros before and behind it along an axis."""
    if not before and not after:
        return leaf
    shape = list(leaf.shape)
    shape[axis] += before + after

    def make() -> torch.Tensor:
        tensor = leaf.tensor()
        whole = tensor.new_zeros(shape)
        whole.narrow(axis, before, leaf.shape[axis]).copy_(tensor)
        return whole

    return later(leaf.name, leaf.dtype, shape, make)


def total(leaves: Sequence[Leaf]) -> Leaf:
    """The sum of leaves of one shape, in float64."""

    def make() -> torch.Tensor:
        import torch

        tensors = [leaf.tensor().to(torch.float64) for leaf in leaves]
        return torch.stack(tensors).sum(0)

    return later(leaves[0].name, "F64", leaves[0].shape, make)


def renamed(leaf: Leaf, name: str) -> Leaf:
    """The leaf under another name."""
    return replace(leaf, name=name)


def same(one: Leaf, other: Leaf) -> bool:
    """Whether two leaves hold the same numbers in the same dtype and shape."""
    if one is other:
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.source is None or other.source is None or one.strides or other.strides:
        return one.read() == other.read()
    for at in range(0, one.nbytes, _CHUNK):
        size = min(_CHUNK, one.nbytes - at)
        if one.source.read(one.offset + at, size) != other.source.read(other.offset + at, size):
            return False
    return True


def all_zero(leaf: Leaf) -> bool:
    """Whether a leaf holds zeros alone; mostly its first bytes tell."""
    if leaf.source is None or leaf.strides:
        return not any(leaf.read())
    at, size = 0, 4096
    while at < leaf.nbytes:
        size = min(size, leaf.nbytes - at)
        if any(leaf.source.read(leaf.offset + at, size)):
            return False
        at, size = at + size, _CHUNK
    return True


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of numbers that lie row by row."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def widest(dtypes: Sequence[str]) -> str:
    """The dtype that holds all values of these: F32 where 16-bit ones differ."""
    some = set(dtypes)
    if len(some) == 1:
        return dtypes[0]
    return "F64" if "F64" in some else "F32"
