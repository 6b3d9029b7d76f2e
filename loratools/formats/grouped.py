"""Updates of fused projections in groups: blocks of B on the rows of the slots that have one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.adapter import TORCH_NAMES, Leaf
from loratools.views import joined, later, padded, part

if TYPE_CHECKING:
    import torch

# Modules that hold query, key and value, one after another.
FUSED = frozenset("c_attn in_proj Wqkv qkv qkv_proj query_key_value to_qkv".split())


def scattered(b: Leaf, slots: Sequence[bool]) -> Leaf:
    """B of groups, (out/slots · n, r), as B (out, r · n) of one pair with A (r · n, in).

    n of the slots have a block; block i multiplies rows i·r to (i+1)·r of A, and all else of B is
    zero, as in a convolution of n groups (microsoft/LoRA:loralib/layers.py MergedLinear).
    """
    count, rank = sum(slots), b.shape[1]
    height = b.shape[0] // count
    pieces, block = [], 0
    for has in slots:
        if has:
            rows = part(b, block * height, (block + 1) * height)
            pieces.append(padded(rows, block * rank, (count - 1 - block) * rank, axis=1))
            block += 1
        else:
            pieces.append(_zeros(b.name, b.dtype, (height, rank * count)))
    return pieces[0] if len(pieces) == 1 else joined(pieces)


def gathered(b: Leaf, slots: Sequence[bool]) -> Leaf | None:
    """The other way: the blocks (out/slots · n, r) of a B (out, r · n); None where it has more."""
    count, height = sum(slots), b.shape[0] // len(slots)
    if not count or b.shape[0] % len(slots) or b.shape[1] % count:
        return None
    rank = b.shape[1] // count
    whole = b.tensor()
    rest = whole.clone()
    blocks: list[torch.Tensor] = []
    for slot, has in enumerate(slots):
        if has:
            rows = slice(slot * height, (slot + 1) * height)
            columns = slice(len(blocks) * rank, (len(blocks) + 1) * rank)
            blocks.append(whole[rows, columns])
            rest[rows, columns] = 0
    if rest.any():
        return None
    import torch

    return Leaf.of(b.name, torch.cat(blocks))


def _zeros(name: str, dtype: str, shape: tuple[int, ...]) -> Leaf:
    def make() -> torch.Tensor:
        import torch

        return torch.zeros(shape, dtype=getattr(torch, TORCH_NAMES[dtype]))

    return later(name, dtype, shape, make)
