"""Tensors of an ONNX file: their numbers inline or in a file beside the graph, as leaves.

The messages are those of onnx/onnx:onnx/onnx.proto; nothing of the numbers is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from loratools.adapter import DTYPE_BITS, Leaf, Source
from loratools.containers.flatbuffer import TYPES
from loratools.containers.local import LocalFile
from loratools.containers.protobuf import BYTES, Field, Span, Walk
from loratools.errors import error, shown

# 4 and 2 bits: several numbers to a byte, the lower bits first.
PACKED = {21: ("U4", 4), 22: ("I4", 4), 25: ("U2", 2), 26: ("I2", 2)}
DIMENSIONS = 64
EXTENT = 1 << 40


@dataclass(frozen=True, slots=True)
class Tensor:
    """A stored tensor: an initialiser, or the value of a Constant node (named as its output).

    `leaf` is None for types that no safetensors name fits (texts, 4-bit numbers), `packed` has the
    bytes of those with less than 8 bits; `file` is the file beside the graph that holds the bytes.
    Where `patchable`, they lie as the leaf's, one after another.
    """

    name: str
    data_type: int
    shape: tuple[int, ...]
    leaf: Leaf | None
    file: str | None
    patchable: bool
    at: Span  # its message
    within: tuple[Span, ...]  # the messages around it, from outside, and itself
    node: int | None = None  # the Constant's place among the nodes
    packed: Leaf | None = None

    @property
    def content(self) -> Leaf | None:
        """The tensor's bytes, whatever they stand for."""
        return self.leaf if self.leaf is not None else self.packed

    @property
    def dtype(self) -> str:
        """As a leaf has it, or of fewer bits; empty for others."""
        if self.leaf is not None:
            return self.leaf.dtype
        return PACKED[self.data_type][0] if self.data_type in PACKED else ""


def entry(walk: Walk, f: Field, limit: int, wanted: str | None = None) -> tuple[str, str]:
    """A key and its text; the text of another key than the one `wanted` is not read."""
    key, place = "", None
    span = walk.inner(f)
    for g in walk.fields(span.start, span.end):
        if g.number == 1:
            key = walk.text(g)
        elif g.number == 2:
            place = g
    if place is None or (wanted is not None and key != wanted):
        return key, ""
    return key, walk.text(place, limit)


class Tensors:
    """Reads the tensors of one graph's file, and opens the files beside it that they name."""

    def __init__(self, walk: Walk, beside: Callable[[str], Source]) -> None:
        self.walk, self.beside = walk, beside
        self.what = shown(walk.source.name)
        self.files: dict[str, Source] = {}

    def read(
        self, span: Span, within: tuple[Span, ...], name: str = "", node: int | None = None
    ) -> Tensor:
        walk = self.walk
        shape: list[int] = []
        data: dict[int, list[Field]] = {}
        external: dict[str, str] = {}
        data_type = location = 0
        for f in walk.fields(span.start, span.end):
            match f.number:
                case 1:
                    shape += walk.numbers(f)
                    if len(shape) > DIMENSIONS:
                        raise walk.fault(f.tag, f"more than {DIMENSIONS} dimensions")
                case 2:
                    data_type = walk.number(f)
                case 3:
                    raise walk.fault(f.tag, "a tensor in segments, which no program writes")
                case 4 | 5 | 6 | 7 | 9 | 10 | 11:
                    data.setdefault(f.number, []).append(f)
                case 8:
                    name = name or walk.text(f)
                case 13:
                    key, value = entry(walk, f, 1 << 12)
                    if key in external:
                        raise error("duplicate", f"{self.what}: {shown(key)} of a tensor twice")
                    external[key] = value
                case 14:
                    location = walk.number(f)
        what = f"{self.what}: {shown(name)}"
        big = any(n < 0 or n > EXTENT for n in shape)
        if big or math.prod(n for n in shape if n) > 1 << 62:
            raise error("malformed", f"{what} has the shape {shape}")
        dtype, extents = TYPES.get(data_type), tuple(shape)
        around = (*within, span)
        bits = PACKED[data_type][1] if data_type in PACKED else 0
        if bits:
            dtype, extents = "U8", (-(-math.prod(shape) * bits // 8),)
        if dtype is None or dtype == "C64":
            if location == 1:
                self._external(what, external, None)
            return Tensor(name, data_type, extents, None, None, False, span, around, node)
        empty = Leaf(name, dtype, extents)
        if location == 1:
            if data:
                raise error("malformed", f"{what} has data here and in another file")
            file, source, offset = self._external(what, external, empty.nbytes)
            leaf, patchable = Leaf(name, dtype, extents, source, offset), True
        else:
            file = None
            leaf, patchable = self._inline(what, empty, data)
        one, packed = (None, leaf) if bits else (leaf, None)
        place = (file, patchable, span, around, node, packed)
        return Tensor(name, data_type, tuple(shape), one, *place)

    def _inline(self, what: str, empty: Leaf, data: Mapping[int, list[Field]]) -> tuple[Leaf, bool]:
        """The leaf of bytes in the graph itself, and whether they lie there as they are."""
        if len(data) > 1 or any(len(fs) > 1 and n == 9 for n, fs in data.items()):
            raise error("malformed", f"{what} has its numbers twice")
        number, fields = next(iter(data.items()), (9, []))
        plain = {9: empty.dtype, 4: "F32", 10: "F64"}.get(number) == empty.dtype
        if plain and len(fields) == 1 and fields[0].wire == BYTES:
            (f,) = fields
            if f.end - f.start != empty.nbytes:
                has = f.end - f.start
                raise error("malformed", f"{what} needs {empty.nbytes} bytes, it has {has}")
            return Leaf(empty.name, empty.dtype, empty.shape, self.walk.source, f.start), True
        if not fields and empty.nbytes:
            raise error("malformed", f"{what} needs {empty.nbytes} bytes, it has none")
        kept = _Decoded(self.walk.source, tuple(fields), empty.dtype, what)
        if kept.size != empty.nbytes:
            raise error("malformed", f"{what} needs {empty.nbytes} bytes, it has {kept.size}")
        return Leaf(empty.name, empty.dtype, empty.shape, kept, 0), False

    def _external(
        self, what: str, external: Mapping[str, str], needed: int | None
    ) -> tuple[str, Source, int]:
        location = external.get("location", "")
        parts = location.split("/")
        plain = (
            location and not any(c in location for c in "\\:\0") and not location.startswith("/")
        )
        if not plain or any(p in ("", ".", "..") for p in parts):
            raise error("hostile", f"{what} lies in {shown(location)}, outside the graph's folder")
        if location not in self.files:
            _require_beside(self.walk.source, location, what)
            self.files[location] = self.beside(location)
        source = self.files[location]
        offset, length = (_whole(external.get(k), what) for k in ("offset", "length"))
        offset = offset or 0
        size = needed if needed is not None else length or 0
        if length is not None and needed is not None and length != needed:
            raise error("malformed", f"{what} needs {needed} bytes, it names {length}")
        if offset + size > source.size:
            end = offset + size
            message = f"{what} ends at byte {end} of {shown(location)}, which has {source.size}"
            raise error("truncated", message)
        return location, source, offset


def _whole(text: str | None, what: str) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise error("malformed", f"{what}: {shown(text)} is no place in a file")
    return int(text)


def _require_beside(graph: Source, location: str, what: str) -> None:
    """That a file really lies in the graph's folder: no link leads out, no second name leads in.

    Where the graph itself is a link, as in a cache of blobs, its neighbour may be one to the same
    folder.
    """
    if not isinstance(graph, LocalFile):
        return
    path = graph.path.parent / location
    home = graph.path.parent.resolve()
    if not path.exists() and not path.is_symlink():
        raise error("not_found", f"{what} lies in {shown(location)}, which is not beside the graph")
    real = path.resolve()
    linked = graph.path.is_symlink() and real.parent == graph.path.resolve().parent
    if not linked and real != home / location:
        raise error("hostile", f"{what}: {shown(location)} is a link to another place")
    if real.stat().st_nlink > 1 and graph.path.resolve().stat().st_nlink == 1:
        message = f"{what}: {shown(location)} is a second name of another file (a hard link)"
        raise error("hostile", f"{message}; copy the file if it belongs there")


# How the numbers of a type that has no field of its own lie in another's: bytes of each.
_WIDTHS = {
    5: {"I32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F16": 2, "BF16": 2,
        "F8_E4M3": 1, "F8_E4M3FNUZ": 1, "F8_E5M2": 1, "F8_E5M2FNUZ": 1},
    7: {"I64": 8},
    11: {"U64": 8, "U32": 4},
    4: {"F32": 4},
    10: {"F64": 8},
}  # fmt: skip


@dataclass(slots=True)
class _Decoded:
    """Numbers that the file holds one by one, as the bytes that they would be in a row."""

    source: Source
    fields: tuple[Field, ...]
    dtype: str
    name: str
    size: int = field(init=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        number = self.fields[0].number if self.fields else 5
        width = _WIDTHS.get(number, {}).get(self.dtype)
        if self.fields and width is None:
            raise error("malformed", f"{self.name}: numbers of another type than {self.dtype}")
        self.width = width or DTYPE_BITS[self.dtype] // 8
        self.size = sum(1 for _ in self._numbers()) * self.width

    def _numbers(self) -> Iterator[bytes]:
        walk, width = Walk(self.source), self.width
        for f in self.fields:
            if f.number in (4, 10):
                for at in range(f.start, f.end, width):
                    if at + width > f.end:
                        raise walk.fault(at, "half a number")
                    yield walk.read(at, width)
            else:
                for value in walk.numbers(f):
                    yield (value & (1 << 8 * width) - 1).to_bytes(width, "little")

    def read(self, offset: int, length: int) -> bytes:
        return b"".join(self._numbers())[offset : offset + length]
