"""Bases and adapters that exist as headers only: reading a number of theirs fails the test."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratools.adapter import DTYPE_BITS, Adapter, Kind, Leaf, LowRank
from loratools.containers.bundle import Bundle
from loratools.weights.base import Base, headers

Tensors = Mapping[str, Sequence[int] | tuple[str, Sequence[int]]]


@dataclass
class Headed:
    """A file of which only the head exists; all reads are noted."""

    name: str
    head: bytes
    size: int
    reads: list[tuple[int, int]] = field(default_factory=list)

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        assert offset + length <= len(self.head), f"{self.name}: byte {offset} is of a weight"
        return self.head[offset : offset + length]


def described(tensors: Tensors) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names with dtype (F32 where none is given) and shape."""
    found = []
    for name, said in tensors.items():
        match said:
            case (str(dtype), shape):
                found.append((name, dtype, tuple(shape)))
            case shape:
                found.append((name, "F32", tuple(shape)))
    return found


def shard(name: str, tensors: Tensors, **metadata: str) -> Headed:
    """A safetensors file of these tensors, its header spelled out here."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for key, dtype, shape in described(tensors):
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        table[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table).encode()
    head = len(text).to_bytes(8, "little") + text
    return Headed(name, head, len(head) + at)


def whole(name: str, data: bytes | str | Mapping[str, Any]) -> Headed:
    """A small file that may be read to its end."""
    text = data if isinstance(data, bytes | str) else json.dumps(data)
    raw = text if isinstance(text, bytes) else text.encode()
    return Headed(name, raw, len(raw))


def bundle(*files: Headed, chosen: str | None = None) -> Bundle:
    table = {f.name: f for f in files}
    return Bundle("base", tuple(table), lambda name: table[name], chosen)


def base(tensors: Tensors, config: Mapping[str, Any] | None = None) -> Base:
    """One safetensors file and its config.json."""
    files = [shard("model.safetensors", tensors)]
    if config is not None:
        files.append(whole("config.json", config))
    return headers(bundle(*files))


def unread(name: str, *shape: int, dtype: str = "F32") -> Leaf:
    return Leaf(name, dtype, shape, Headed(f"file of {name}", b"", 1 << 60))


def lora(out: int, into: int, *kernel: int, rank: int = 2) -> LowRank:
    """A low-rank delta of a module of this shape."""
    a = unread("lora_A", rank, into, *kernel)
    return LowRank(a, unread("lora_B", out, rank, *[1 for _ in kernel]), 1.0, float(rank))


def adapter(deltas: Mapping[str, Kind], **config: Any) -> Adapter:
    return Adapter(deltas, name="a", config=config)
