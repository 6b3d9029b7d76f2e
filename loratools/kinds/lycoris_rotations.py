"""LyCORIS's and kohya's rotations of rows: diagonal OFT, and BOFT, which mixes them in stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from loratools.adapter import Leaf, Rotated

if TYPE_CHECKING:
    from torch import Tensor

DIAGONAL = "oft of lycoris"
BUTTERFLY = "boft of lycoris"
KOHYA = "oft of kohya"
WHOLE = 0  # of `block`: all rows belong together


class Functions(NamedTuple):
    """What `rotated.Method` is made of."""

    extent: Callable[[Rotated], int]
    block: Callable[[Rotated], int]
    ready: Callable[[Rotated], Rotated]
    turn: Callable[[Rotated, Tensor, int], Tensor]


def _blocks(delta: Rotated) -> list[Leaf]:
    """The stored blocks (n, b, b), or (stages, n, b, b); several where rows come in parts."""
    return [leaf for name, leaf in sorted(delta.parts.items()) if name != "rescale"]


def _extent(delta: Rotated) -> int:
    return sum(leaf.shape[-3] * leaf.shape[-1] for leaf in _blocks(delta))


def _block(delta: Rotated) -> int:
    """Rows that mix: one block's; of a butterfly twice as many with every stage after the first."""
    blocks = _blocks(delta)
    if len(blocks) > 1:
        return WHOLE
    shape = blocks[0].shape
    return shape[-1] if len(shape) == 3 else shape[-1] << (shape[0] - 1)


def _ready(delta: Rotated) -> Rotated:
    """The orthogonal blocks in float64, in the order in which they are multiplied from the left."""
    if delta.settings.get("ready"):
        return delta
    import torch

    parts = {}
    for name, leaf in delta.parts.items():
        tensor = leaf.tensor().to(torch.float64)
        if name == "rescale":
            parts[name] = Leaf.of(leaf.name, tensor.reshape(-1, 1))
            continue
        turns = _cayley(tensor, delta)
        # Diagonal blocks multiply by their first index (LyCORIS:lycoris/functional/diag_oft.py,
        # sd-scripts:networks/oft.py), those of a butterfly by their second (functional/boft.py).
        turns = turns if delta.method == BUTTERFLY else turns.transpose(-1, -2).contiguous()
        parts[name] = Leaf.of(leaf.name, turns)
    return replace(delta, parts=parts, settings={**delta.settings, "ready": True})


def _cayley(blocks: Tensor, delta: Rotated) -> Tensor:
    """(I + Q)(I - Q)⁻¹ of Q = B - Bᵀ, whose norm over all blocks the constraint bounds."""
    import torch

    q = blocks - blocks.transpose(-1, -2)
    limit = float(delta.settings.get("alpha") or 0) * q.shape[-3] * q.shape[-1]
    norm = float(torch.linalg.vector_norm(q))
    if delta.method == KOHYA:
        q = q * ((min(norm, limit) + 1e-8) / (norm + 1e-8))  # an alpha of 0 leaves no rotation
    elif 0 < limit < norm + 1e-8:
        q = q * (limit / (norm + 1e-8))
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    turns: Tensor = torch.linalg.solve(eye - q, eye + q, left=False)
    return turns


def _turn(delta: Rotated, x: Tensor, first: int) -> Tensor:
    """R·x for rows x that begin at row `first`, times `rescale`."""
    delta = _ready(delta)
    blocks = [leaf.tensor() for leaf in _blocks(delta)]
    if delta.method == BUTTERFLY:
        y = _butterfly(blocks[0], x, first)
    elif len(blocks) == 1:
        y = _diagonal(blocks[0], x, first)
    else:
        import torch

        pieces = zip(blocks, torch.split(x, [len(r) * r.shape[-1] for r in blocks]), strict=True)
        y = torch.cat([_diagonal(r, rows, 0) for r, rows in pieces])
    if "rescale" in delta.parts:
        y = y * delta.parts["rescale"].tensor()[first : first + len(y)]
    return y


def _diagonal(turns: Tensor, x: Tensor, first: int) -> Tensor:
    import torch

    size, columns = turns.shape[-1], x.shape[1]
    rows = x.reshape(-1, size, columns)
    at = first // size
    return torch.bmm(turns[at : at + len(rows)], rows).reshape(-1, columns)


def _butterfly(turns: Tensor, x: Tensor, first: int) -> Tensor:
    """Stage i turns blocks of rows that lie 2^i · b/2 apart."""
    size, columns = turns.shape[-1], x.shape[1]
    for stage, blocks in enumerate(turns):
        apart = (size // 2) << stage
        mixed = x.reshape(-1, 2, apart, columns).transpose(1, 2).reshape(-1, columns)
        mixed = _diagonal(blocks, mixed, first)
        x = mixed.reshape(-1, apart, 2, columns).transpose(1, 2).reshape(-1, columns)
    return x


def divides(rows: int, stages: int, size: int) -> bool:
    """Whether a butterfly of so many stages has whole groups of rows at each of them."""
    return size % 2 == 0 and stages > 0 and rows % (size << min(stages - 1, 63)) == 0


METHODS = {name: Functions(_extent, _block, _ready, _turn) for name in (DIAGONAL, BUTTERFLY, KOHYA)}
