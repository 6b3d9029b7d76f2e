"""Weights that no adapter touches: what becomes of them, and whether a run has written them all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from loratools.adapter import DTYPE_BITS, Source
from loratools.containers.local import LocalFile
from loratools.errors import error, shown
from loratools.narrowing import narrow, not_finite
from loratools.stored import Rows, as_bytes, extents, leaf_rows, torch_dtype
from loratools.weights.layout import OutputShard, Piece
from loratools.weights.spool import WRITEBACK


def is_whole(path: Path, record: str, shards: Sequence[OutputShard]) -> bool:
    """Whether a shard of an interrupted run has every byte that it should: digests of its touched
    tensors, and the base's own numbers elsewhere.
    """
    # A pipeline's shards are paths, and no shard's path ends with another's.
    shard = next((s for s in shards if path.as_posix().endswith(f"/{s.name}")), None)
    if shard is None:
        return False
    tallies, file = json.loads(record), LocalFile(path)
    if file.size != shard.size or file.read(0, len(shard.header)) != shard.header:
        return False
    if shard.whole is not None:
        return all(
            file.read(at, len(wanted)) == wanted
            for at, wanted in _read_in_parts(shard.whole, 0, shard.size)
        )
    for piece in shard.pieces:
        at, hashed = piece.offset, hashlib.sha256()
        if piece.name not in tallies:
            for wanted in _untouched(piece):
                if file.read(at, len(wanted)) != wanted:
                    return False
                at += len(wanted)
            continue
        for start in range(at, at + piece.nbytes, WRITEBACK):
            hashed.update(file.read(start, min(WRITEBACK, at + piece.nbytes - start)))
        if tallies[piece.name]["digest"] != hashed.hexdigest():
            return False
    return True


def _untouched(piece: Piece) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor that no adapter touches."""
    leaf = piece.base
    assert leaf is not None
    if converts(piece):
        yield from map(as_bytes, rounded(piece, leaf_rows(leaf)))
        return
    assert leaf.source is not None
    for _, part in _read_in_parts(leaf.source, leaf.offset, piece.nbytes):
        yield part


def _read_in_parts(source: Source, offset: int, length: int) -> Iterator[tuple[int, bytes]]:
    for at in range(0, length, WRITEBACK):
        yield at, source.read(offset + at, min(WRITEBACK, length - at))


def converts(piece: Piece) -> bool:
    leaf = piece.base
    return leaf is None or piece.dtype != leaf.dtype or leaf.strides is not None or not leaf.source


def rounded(piece: Piece, rows: Rows) -> Iterator[Tensor]:
    """A tensor that no adapter touches, in the output's dtype (or from strides of a torch file)."""
    leaf, dtype = piece.base, torch_dtype(piece.dtype)
    assert leaf is not None
    height, width = extents(leaf.shape)
    step = max(1, WRITEBACK * 8 // (DTYPE_BITS[leaf.dtype] * max(1, width)) // 4)
    for start in range(0, height, step):
        tile = rows(start, min(start + step, height))
        if piece.dtype != leaf.dtype:
            values = tile.to(torch.float64)
            tile = narrow(values, dtype)
            if not_finite(tile) > not_finite(values):
                raise error(
                    "overflow", f"{shown(piece.name)} does not fit {piece.dtype}; try --dtype fp32"
                )
        yield tile.contiguous()
