"""Safetensors files with real headers and holes for data: files of any size that take no room."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

BITS = {"F32": 32, "F16": 16, "BF16": 16, "I64": 64, "U8": 8}


def sparse(
    path: Path, shapes: Mapping[str, Sequence[int]], alpha: float = 1.0, dtype: str = "F32"
) -> Path:
    """A file of these tensors, all zero but the alphas."""
    header, at = {}, 0
    for key, shape in shapes.items():
        size = math.prod(shape) * BITS[dtype] // 8
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    raw = struct.pack("<f", alpha)
    number = {"F32": raw, "BF16": raw[2:], "F16": struct.pack("<e", alpha)}.get(dtype, b"")
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for key, entry in header.items():
            if key.endswith(".alpha"):
                out.seek(8 + len(text) + entry["data_offsets"][0])
                out.write(number)
        out.truncate(8 + len(text) + at)
    return path
