"""The flatbuffer of an .onnx_adapter file: a bounded walk to its leaves, and its bytes written.

The schema (microsoft/onnxruntime:onnxruntime/lora/adapter_format/adapter_schema.fbs) has two
tables, both of four fields: Adapter (format_version, adapter_version, model_version, parameters)
and Parameter (name, dims, data_type, raw_data).
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loratools.adapter import DTYPE_BITS, Leaf, Source
from loratools.errors import LoratoolsError, error, shown

IDENTIFIER = b"TORT"  # at byte 4
FORMAT_VERSION = 1
SIZE = (1 << 31) - 1  # bytes of a flatbuffer: its offsets are 32 bits
DIMENSIONS = 64
EXTENT = 1 << 40

# ONNX's numbers for dtypes (onnx/onnx: onnx/onnx.proto, TensorProto.DataType).
TYPES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16",
    11: "F64", 12: "U32", 13: "U64", 14: "C64", 16: "BF16", 17: "F8_E4M3", 18: "F8_E4M3FNUZ",
    19: "F8_E5M2", 20: "F8_E5M2FNUZ",
}  # fmt: skip
_NUMBERS = {name: number for number, name in TYPES.items()}

_FIELDS = 4
_HEAD = struct.Struct("<I4s")
_VTABLE = struct.pack("<6H", 12, 20, 4, 8, 12, 16)  # one for both tables
_PAGE, _KEPT = 4096, 8


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """The parameters of a file by name, and the versions that it carries."""

    leaves: dict[str, Leaf]
    adapter_version: int
    model_version: int


def is_adapter(source: Source) -> bool:
    """Whether a file has the identifier of an .onnx_adapter."""
    return source.size >= _HEAD.size and source.read(4, 4) == IDENTIFIER


def read(source: Source) -> AdapterFile:
    """The parameters of an .onnx_adapter as leaves; every offset is checked before it is followed.

    Raises not_weights, truncated, malformed, duplicate, hostile (data used twice) and
    dtype_unusable.
    """
    what = shown(source.name)
    if not is_adapter(source):
        raise error("not_weights", f"{what} has no {IDENTIFIER.decode()} at byte 4")
    walk = _Walk(source)
    version, adapter_version, model_version, parameters = walk.table(walk.followed(0))
    numbers = [walk.whole(at) for at in (version, adapter_version, model_version)]
    if numbers[0] != FORMAT_VERSION:
        raise error("malformed", f"{what}: version {numbers[0]} of the format, only 1 is known")
    leaves: dict[str, Leaf] = {}
    if parameters is None:
        raise error("malformed", f"{what}: its list of parameters is missing")
    start, count = walk.vector(parameters, 4)
    for at in range(start, start + 4 * count, 4):
        leaf = _parameter(walk, walk.followed(at))
        if leaf.name in leaves:
            raise error("duplicate", f'{what}: the parameter "{shown(leaf.name)}" stands twice')
        leaves[leaf.name] = leaf
    _require_apart(leaves, what)
    return AdapterFile(leaves, numbers[1], numbers[2])


def _parameter(walk: _Walk, at: int) -> Leaf:
    name_at, dims_at, type_at, raw_at = walk.table(at)
    if name_at is None or raw_at is None:
        raise walk.fault(at, "a parameter without a name or without bytes")
    start, length = walk.vector(name_at, 1)
    if walk.read(start + length, 1) != b"\0":
        raise walk.fault(start + length, "a name does not end with a zero")
    try:
        name = walk.read(start, length).decode()
    except UnicodeDecodeError:
        raise walk.fault(start, "a parameter's name is no UTF-8") from None
    if not name:
        raise walk.fault(start, "a parameter's name is empty")

    def fault(message: str, code: str = "malformed") -> LoratoolsError:
        return error(code, f'{shown(walk.source.name)}: parameter "{shown(name)}": {message}')

    number = walk.whole(type_at)
    if number not in TYPES:
        raise fault(f"data type {number} of ONNX, no numbers that are read", "dtype_unusable")
    dtype = TYPES[number]
    shape: tuple[int, ...] = ()
    if dims_at is not None:
        first, count = walk.vector(dims_at, 8)
        if count > DIMENSIONS:
            raise fault(f"{count} dimensions, at most {DIMENSIONS} are read")
        shape = struct.unpack(f"<{count}q", walk.read(first, 8 * count))
    if any(not 0 <= n <= EXTENT for n in shape):
        raise fault(f"its shape {shown(shape)} is none")
    offset, has = walk.vector(raw_at, 1)
    wanted = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if has != wanted:
        raise fault(f"{shape} of {dtype} are {wanted} bytes, it has {has}")
    return Leaf(name, dtype, shape, walk.source, offset)


def _require_apart(leaves: Mapping[str, Leaf], what: str) -> None:
    """That no two parameters have bytes in common."""
    end = 0
    for leaf in sorted((x for x in leaves.values() if x.nbytes), key=lambda x: x.offset):
        if leaf.offset < end:
            raise error(
                "hostile",
                f'{what}: the bytes of "{shown(leaf.name)}" begin at {leaf.offset}, inside those '
                f"of another parameter that end at {end}",
            )
        end = leaf.offset + leaf.nbytes


@dataclass(slots=True)
class _Walk:
    """Bounded steps through a flatbuffer; every fault names its byte."""

    source: Source
    pages: dict[int, bytes] = field(default_factory=dict, repr=False)

    def fault(self, at: int, message: str) -> LoratoolsError:
        return error("malformed", f"{shown(self.source.name)}, byte {at}: {message}")

    def read(self, at: int, length: int) -> bytes:
        if at < 0 or at + length > self.source.size:
            raise self.fault(at, f"{length} bytes were promised, the file has {self.source.size}")
        if length > _PAGE:
            return self.source.read(at, length)
        first = at // _PAGE
        found = b"".join(self._page(i) for i in range(first, (at + length - 1) // _PAGE + 1))
        return found[at - first * _PAGE :][:length]

    def _page(self, index: int) -> bytes:
        """A piece of the file; a few are kept, since tables, names and extents lie apart."""
        if index not in self.pages:
            if len(self.pages) == _KEPT:
                self.pages.pop(next(iter(self.pages)))
            start = index * _PAGE
            self.pages[index] = self.source.read(start, min(_PAGE, self.source.size - start))
        return self.pages[index]

    def whole(self, at: int | None) -> int:
        """The signed 32-bit number at a place; 0, the default, where the field is left out."""
        return 0 if at is None else int.from_bytes(self.read(at, 4), "little", signed=True)

    def followed(self, at: int) -> int:
        """Where the offset at a place leads: always forward, to a multiple of four."""
        to = at + int.from_bytes(self.read(at, 4), "little")
        if to == at or to % 4 or to + 4 > self.source.size:
            raise self.fault(at, f"an offset leads to byte {to}, where nothing can stand")
        return to

    def table(self, at: int) -> tuple[int | None, ...]:
        """Where the first four fields of a table lie; None for those left out."""
        vtable = at - self.whole(at)
        if vtable < 0 or vtable % 2:
            raise self.fault(at, f"its table of fields lies at {vtable}")
        size, extent = struct.unpack("<2H", self.read(vtable, 4))
        end = max(vtable + size, at + extent)
        if size < 4 or size % 2 or extent < 4 or end > self.source.size:
            raise self.fault(vtable, f"a table of fields of {size} bytes, for {extent} bytes")
        count = min(_FIELDS, (size - 4) // 2)
        places: list[int | None] = [None] * _FIELDS
        for i, offset in enumerate(struct.unpack(f"<{count}H", self.read(vtable + 4, 2 * count))):
            if offset and not 4 <= offset <= extent - 4:
                raise self.fault(vtable, f"field {i} lies at {offset} of {extent} bytes")
            places[i] = at + offset if offset else None
        return tuple(places)

    def vector(self, at: int, itemsize: int) -> tuple[int, int]:
        """Where the items of the vector (or text) that a field leads to begin; how many."""
        to = self.followed(at)
        count = int.from_bytes(self.read(to, 4), "little")
        if count * itemsize > self.source.size - to - 4:
            raise self.fault(to, f"{count} items of {itemsize} bytes, the file ends before")
        return to + 4, count


# ------------------------------------------------------------------------------- writing


def write(
    path: Path, leaves: Mapping[str, Leaf], *, adapter_version: int = 0, model_version: int = 0
) -> str:
    """Writes a whole .onnx_adapter to `path`, one tensor in memory at a time; its sha256 in hex.

    The same leaves in the same order give the same bytes. Raises loss (a dtype without a number,
    more than 2 GiB), disk_full or storage; a file begun is left behind.
    """
    head, starts = _layout(leaves, adapter_version, model_version)
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            for piece in _pieces(head, leaves, starts):
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as cause:
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise error(
            "disk_full" if full else "storage",
            f"{shown(path)} cannot be written: {cause.strerror}",
        ) from cause
    return digest.hexdigest()


def _layout(
    leaves: Mapping[str, Leaf], adapter_version: int, model_version: int
) -> tuple[bytes, dict[str, int]]:
    """All bytes before the first tensor's, and where each tensor's bytes begin.

    All tables come first, so that a reader of headers finds them together.
    """
    vtable, root = _HEAD.size, _HEAD.size + len(_VTABLE)
    vector = root + 20
    tables = vector + 4 + 4 * len(leaves)
    at = tables + 20 * len(leaves)
    names = {name: name.encode() for name in leaves}
    texts: dict[str, int] = {}
    dims: dict[str, int] = {}
    for name, raw in names.items():
        texts[name] = at
        at = _aligned(at + 4 + len(raw) + 1, 4)
        dims[name] = _aligned(at + 4, 8) - 4
        at = dims[name] + 4 + 8 * len(leaves[name].shape)
    starts: dict[str, int] = {}
    top = at
    for name, leaf in leaves.items():
        starts[name] = _aligned(at + 4, 8)
        at = starts[name] + leaf.nbytes
    if at > SIZE:
        raise error("loss", f"{at} bytes, and an .onnx_adapter holds {SIZE} at most")
    head = bytearray(top)
    _HEAD.pack_into(head, 0, root, IDENTIFIER)
    head[vtable:root] = _VTABLE
    versions = (FORMAT_VERSION, adapter_version, model_version)
    struct.pack_into("<5i", head, root, root - vtable, *versions, vector - root - 16)
    struct.pack_into("<I", head, vector, len(leaves))
    for i, (name, leaf) in enumerate(leaves.items()):
        if leaf.dtype not in _NUMBERS:
            raise error("loss", f"{shown(name)} is {leaf.dtype}, for which ONNX has no number")
        entry, table = vector + 4 + 4 * i, tables + 20 * i
        struct.pack_into("<I", head, entry, table - entry)
        offsets = texts[name] - table - 4, dims[name] - table - 8
        raw_offset = starts[name] - 4 - table - 16
        number = _NUMBERS[leaf.dtype]
        struct.pack_into("<iIIiI", head, table, table - vtable, *offsets, number, raw_offset)
        struct.pack_into("<I", head, texts[name], len(names[name]))
        head[texts[name] + 4 : texts[name] + 4 + len(names[name])] = names[name]
        count = len(leaf.shape)
        struct.pack_into(f"<I{count}q", head, dims[name], count, *leaf.shape)
    return bytes(head), starts


def _pieces(head: bytes, leaves: Mapping[str, Leaf], starts: Mapping[str, int]) -> Iterator[bytes]:
    yield head
    at = len(head)
    for name, leaf in leaves.items():
        yield bytes(starts[name] - 4 - at) + struct.pack("<I", leaf.nbytes)
        raw = leaf.read()
        assert len(raw) == leaf.nbytes, name
        yield raw
        at = starts[name] + leaf.nbytes


def _aligned(at: int, to: int) -> int:
    return -(-at // to) * to
