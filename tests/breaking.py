"""Ways to break a sound adapter `a` and its base: each gives a function of their folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loratools.adapter import DTYPE_BITS
from tests.containers.torch_bytes import called, named, pickled
from tests.tiny import MODULES, SIZE, numbers, safetensors, write_adapter, write_base

Make = Callable[[Path], object]
WEIGHTS, CONFIG = "a/adapter_model.safetensors", "a/adapter_config.json"
INDEX = "base/model.safetensors.index.json"
STEM = f"base_model.model.{MODULES[0]}"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def bytes_at(path: str, raw: bytes) -> Make:
    return lambda here: (here / path).write_bytes(raw)


def header(text: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of this header, as it stands, and these data."""
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any, shape: Any, *offsets: Any, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets), **more}


def weights(text: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> Make:
    return bytes_at(WEIGHTS, header(text, data, length))


def damaged(change: Callable[[bytes], bytes], path: str = WEIGHTS) -> Make:
    def make(here: Path) -> None:
        (here / path).write_bytes(change((here / path).read_bytes()))

    return make


Tensors = dict[str, tuple[list[int], bytes]]


def stored(path: Path) -> Tensors:
    """The tensors of a file of tests.tiny."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = json.loads(raw[8:start])
    return {
        n: (e["shape"], raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for n, e in found.items()
        if n != "__metadata__"
    }


def tensors(change: Callable[[Tensors], Tensors], path: str = WEIGHTS) -> Make:
    """The tensors of a file, changed."""

    def make(here: Path) -> None:
        (here / path).write_bytes(safetensors(change(stored(here / path))))

    return make


def plus(name: str, shape: list[int], raw: bytes | None = None) -> Callable[[Tensors], Tensors]:
    count = 1
    for n in shape:
        count *= n
    return lambda t: {**t, name: (shape, numbers(count, 3, 0.01) if raw is None else raw)}


def renamed(old: str, new: str) -> Make:
    return tensors(lambda t: {n.replace(old, new): v for n, v in t.items()})


def without(end: str) -> Make:
    return tensors(lambda t: {n: v for n, v in t.items() if not n.endswith(end)})


def factors(value: float, end: str = "lora_B.weight", count: int = 1) -> Make:
    """The first `count` values of every factor with this end, set."""

    def change(t: Tensors) -> Tensors:
        head = struct.pack(f"<{count}f", *[value] * count)
        return {
            n: (s, head + raw[len(head) :] if n.endswith(end) else raw) for n, (s, raw) in t.items()
        }

    return tensors(change)


def scaled(factor: float) -> Make:
    """Every B, times a factor."""

    def times(raw: bytes) -> bytes:
        values = struct.unpack(f"<{len(raw) // 4}f", raw)
        return struct.pack(f"<{len(values)}f", *(factor * v for v in values))

    return tensors(
        lambda t: {n: (s, times(raw) if "lora_B" in n else raw) for n, (s, raw) in t.items()}
    )


def retyped(dtype: str, end: str = "", path: str = WEIGHTS) -> Make:
    """Every tensor with this end, said to be of another dtype; its bytes stay."""

    def change(raw: bytes) -> bytes:
        start = 8 + int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8:start])
        for name in table:
            if name.endswith(end):
                *rest, last = table[name]["shape"]
                shape = [*rest, last * 32 // DTYPE_BITS[dtype]]
                table[name].update(dtype=dtype, shape=shape)
        return header(table, raw[start:])

    return damaged(change, path)


def config(path: str = CONFIG, **fields: Any) -> Make:
    def make(here: Path) -> None:
        table = json.loads((here / path).read_text())
        table.update(fields)
        (here / path).write_text(json.dumps({k: v for k, v in table.items() if v is not ...}))

    return make


def base_config(**fields: Any) -> Make:
    return config("base/config.json", **fields)


def config_text(change: Callable[[str], str | bytes]) -> Make:
    def make(here: Path) -> None:
        text = change((here / CONFIG).read_text())
        (here / CONFIG).write_bytes(text.encode() if isinstance(text, str) else text)

    return make


def then(*makes: Make) -> Make:
    def make(here: Path) -> None:
        for each in makes:
            each(here)

    return make


def instead(path: str, special: Callable[[Path], object]) -> Make:
    """Something else where a file was."""

    def make(here: Path) -> None:
        (here / path).unlink()
        special(here / path)

    return make


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # the path of a socket may have 108 bytes only


def torch_file(raw: bytes) -> Make:
    def make(here: Path) -> None:
        (here / WEIGHTS).unlink()
        (here / "a/adapter_model.bin").write_bytes(raw)

    return make


def calls(module: str, name: str, *arguments: Any) -> bytes:
    return pickled({"x": called(named(module, name), *arguments)})


def sharded(change: Callable[[dict[str, Any]], object] = lambda table: None) -> Make:
    """The base in two shards, its index changed."""

    def make(here: Path) -> None:
        shutil.rmtree(here / "base")
        write_base(here / "base", 2)
        table = json.loads((here / INDEX).read_text())
        change(table)
        (here / INDEX).write_text(json.dumps(table))

    return make


def shard_at(path: str) -> Make:
    return sharded(lambda t: t["weight_map"].update({f"{MODULES[0]}.weight": path}))


def adapter(**more: Any) -> Make:
    def make(here: Path) -> None:
        shutil.rmtree(here / "a")
        write_adapter(here / "a", **more)

    return make


def base_tensor(name: str, shape: list[int], raw: bytes | None = None) -> Make:
    return tensors(plus(name, shape, raw), "base/model.safetensors")


def without_base_tensor(name: str) -> Make:
    return tensors(lambda t: {n: v for n, v in t.items() if n != name}, "base/model.safetensors")


def zeroed(*modules: str) -> Make:
    return then(*(base_tensor(f"{m}.weight", [SIZE, SIZE], bytes(4 * SIZE**2)) for m in modules))


def on(module: str, out: int, into: int, rank: int = 4) -> Make:
    """A further pair of the adapter."""
    stem = f"base_model.model.{module}"
    a = plus(f"{stem}.lora_A.weight", [rank, into])
    b = plus(f"{stem}.lora_B.weight", [out, rank])
    return tensors(lambda t: b(a(t)))


def merged_before(here: Path) -> None:
    from loratools.commands.merge import merge

    merge([here / "a"], here / "base", out=here / "once")
    shutil.rmtree(here / "base")
    (here / "once").rename(here / "base")


def as_bf16(path: str) -> Make:
    """All tensors of a file, cut to BF16."""

    def change(raw: bytes) -> bytes:
        start = 8 + int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8:start])
        for old in table.values():
            old["dtype"], old["data_offsets"] = "BF16", [n // 2 for n in old["data_offsets"]]
        return header(table, b"".join(raw[i + 2 : i + 4] for i in range(start, len(raw), 4)))

    return damaged(change, path)


def as_half(name: str, value: float) -> Make:
    """A base of one value in F16 for one weight."""

    def change(raw: bytes) -> bytes:
        start = 8 + int.from_bytes(raw[:8], "little")
        table, at, data = json.loads(raw[8:start]), 0, b""
        for key, old in table.items():
            begin, end = old["data_offsets"]
            piece, old["dtype"] = raw[start + begin : start + end], "F16"
            values = [value] * 64 if key == name else struct.unpack(f"<{len(piece) // 4}f", piece)
            data += struct.pack(f"<{len(values)}e", *values)
            old["data_offsets"], at = [at, len(data)], len(data)
        return header(table, data)

    return damaged(change, "base/model.safetensors")
