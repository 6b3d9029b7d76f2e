"""Files as torch.save writes them, built byte by byte, with every lie that a test needs."""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from loratools.adapter import Leaf
from loratools.containers import torch_zip
from loratools.errors import MalformedError


@dataclass(frozen=True)
class Memory:
    raw: bytes
    name: str = "x.pt"

    @property
    def size(self) -> int:
        return len(self.raw)

    def read(self, offset: int, length: int) -> bytes:
        found = self.raw[offset : offset + length]
        assert offset >= 0
        assert len(found) == length
        return found


def read(raw: bytes) -> Any:
    return torch_zip.read(Memory(raw))


def saved(value: object, *, legacy: bool = False, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


def loaded(raw: bytes, protocol: int = 2) -> Any:
    """What torch reads; its safe loader does not know all opcodes of the later protocols."""
    return torch.load(io.BytesIO(raw), weights_only=protocol == 2, map_location="cpu")


def differs(ours: Any, theirs: Any, at: str = "") -> str | None:
    """Where two objects differ, tensors compared bit for bit."""
    if isinstance(ours, Leaf):
        if not isinstance(theirs, torch.Tensor):
            return f"{at}: a tensor is {type(theirs)}"
        tensor = ours.tensor()
        theirs = theirs.detach().clone(memory_format=torch.contiguous_format)
        alike = (
            tensor.dtype == theirs.dtype
            and tensor.shape == theirs.shape == ours.shape
            and Leaf.of("", tensor).read() == Leaf.of("", theirs).read() == ours.read()
        )
        return None if alike else f"{at}: {tensor} is {theirs}"
    if isinstance(theirs, torch.dtype | torch.device):
        return None if ours == str(theirs) else f"{at}: {ours} is {theirs}"
    if isinstance(ours, dict):
        if not isinstance(theirs, dict) or list(ours) != list(theirs):
            return f"{at}: {list(ours)} is {theirs}"
        pairs = [(f"{at}/{key}", ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, list | tuple):
        if not isinstance(theirs, type(ours)) or len(ours) != len(theirs):
            return f"{at}: {ours} is {theirs}"
        pairs = [(f"{at}/{i}", *pair) for i, pair in enumerate(zip(ours, theirs, strict=True))]
    else:
        alike = type(ours) is type(theirs) and repr(ours) == repr(theirs)
        return None if alike else f"{at}: {ours!r} is {theirs!r}"
    return next((d for name, a, b in pairs if (d := differs(a, b, name))), None)


def refused(raw: bytes, code: str, message: str) -> None:
    with pytest.raises(MalformedError) as caught:
        read(raw)
    assert caught.value.code == code, caught.value.message
    assert message in caught.value.message
    assert len(caught.value.message) < 500
    assert caught.value.message.isprintable()


class Op(bytes):
    """Opcodes that stand for themselves."""


def named(module: str, name: str) -> Op:
    return Op(f"c{module}\n{name}\n".encode())


def put(value: Any) -> bytes:
    """The opcodes (protocol 2) that push a plain value."""
    match value:
        case Op():
            return value
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            length = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)
        case str():
            return b"X" + struct.pack("<L", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(put, value)) + b"t"
        case list():
            return b"](" + b"".join(map(put, value)) + b"e"
        case dict():
            return b"}(" + b"".join(put(k) + put(v) for k, v in value.items()) + b"u"
    raise AssertionError(value)


def called(function: Op, *arguments: Any) -> Op:
    return Op(function + put(arguments) + b"R")


ORDERED = named("collections", "OrderedDict")
REBUILD = named("torch._utils", "_rebuild_tensor_v2")


def stored(key: Any = "0", numel: Any = 4, kind: str = "FloatStorage", *view: Any) -> Op:
    pid = ("storage", named("torch", kind), key, "cpu", numel, *view)
    return Op(put(pid) + b"Q")


def tensor(
    storage: Op | None = None, offset: Any = 0, shape: Any = (4,), strides: Any = (1,), *more: Any
) -> Op:
    rest = more or (False, called(ORDERED))
    return called(REBUILD, storage or stored(), offset, shape, strides, *rest)


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + put(value) + b"."


@dataclass(frozen=True)
class File:
    """A zip member, and the lies told about it."""

    name: bytes
    data: bytes = b""
    local_name: bytes | None = None
    flags: int = 0
    local_flags: int | None = None
    method: int = 0
    size: int | None = None  # in the directory
    local_size: int | None = None
    crc: int | None = None
    external: int = 0
    extra: bytes = b""
    after: bytes = b""
    at: int | None = None


def archive(
    *files: File, before: bytes = b"", end: bytes | None = None, after: bytes = b""
) -> bytes:
    body, directory = before, b""
    for f in files:
        crc = zlib.crc32(f.data) if f.crc is None else f.crc
        name = f.name if f.local_name is None else f.local_name
        flags = f.flags if f.local_flags is None else f.local_flags
        size = len(f.data) if f.local_size is None else f.local_size
        at = len(body) if f.at is None else f.at
        body += b"PK\3\4" + struct.pack(
            "<5H3L2H", 0, flags, f.method, 0, 0, crc, len(f.data), size, len(name), 0
        )
        body += name + f.data + f.after
        size = len(f.data) if f.size is None else f.size
        numbers = (0, 0, f.flags, f.method, 0, 0, crc, len(f.data), size)
        numbers += (len(f.name), len(f.extra), 0, 0, 0, f.external, at)
        directory += b"PK\1\2" + struct.pack("<6H3L5H2L", *numbers) + f.name + f.extra
    if end is None:
        counts = (0, 0, len(files), len(files), len(directory), len(body), 0)
        end = b"PK\5\6" + struct.pack("<4H2LH", *counts)
    return body + directory + end + after


def members(pickle: bytes, storages: dict[str, bytes] | None = None) -> list[File]:
    """The members of an honest file, the pickle first."""
    if storages is None:
        storages = {"0": struct.pack("<4f", 1, 2, 3, 4)}
    parts = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
    parts |= {f"data/{key}": data for key, data in storages.items()}
    return [File(b"archive/" + name.encode(), data) for name, data in parts.items()]


def built(value: Any, storages: dict[str, bytes] | None = None) -> bytes:
    return archive(*members(value if type(value) is bytes else pickled(value), storages))


HONEST = members(pickled({"w": tensor()}))
MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
HEAD = MAGIC + pickled(1001)
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


def old(
    value: Any, *storages: tuple[str, int, bytes], system: Any = SYSTEM, keys: Any = None
) -> bytes:
    """A file of the format before torch 1.6; storages are (key, elements, bytes)."""
    keys = [key for key, _, _ in storages] if keys is None else keys
    runs = b"".join(struct.pack("<q", numel) + data for _, numel, data in storages)
    return HEAD + pickled(system) + pickled(value) + pickled(keys) + runs


NESTED = {
    "nested lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "nested tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "nested dicts": b"\x80\x02" + b"}K\x01" * 200_000 + b"N" + b"s" * 200_000 + b".",
}


def doubled(new: bytes, add: bytes) -> bytes:
    """60 containers, each holding the one before twice."""
    each = (b"%bq%c" % (new, i) + add.replace(b"BEFORE", b"h%c" % (i - 1)) for i in range(1, 61))
    return b"\x80\x02(" + new + b"q\x00" + b"".join(each) + b"t."


DOUBLED = {
    "lists doubled": doubled(b"]", b"BEFOREaBEFOREa"),
    "dicts doubled": doubled(b"}", b"K\x01BEFOREsK\x02BEFOREs"),
    "tuples doubled": b"\x80\x02N" + b"q\x00h\x00\x86" * 60 + b".",
}
