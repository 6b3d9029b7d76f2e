"""The GGUF container: its key-values and tensor infos, walked by our own few lines."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loratools.adapter import Leaf, Source
from loratools.containers.looks import what_it_is
from loratools.errors import LoratoolsError, error, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 had lengths of 32 bits; llama.cpp no longer reads it
HEADER_LIMIT = 1 << 26  # bytes; vocabulary and merges of 262,144 tokens take some 15 MB
ELEMENTS = 4096  # of an array that is kept; longer ones (vocabularies) are walked over
TEXT = 1 << 20  # bytes of a string that is kept: templates have some thousand
DIMENSIONS = 4  # GGML_MAX_DIMS
ALIGNMENT = "general.alignment"
_ALIGNED = 32
_WIDEST_ALIGNMENT = 1 << 16
_TOTAL = 1 << 60  # elements
_PIECE = 1 << 18  # bytes read at once

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_LEAST_VALUE = 14  # bytes of a key-value: length, one letter, type, one byte
_LEAST_INFO = 8 + 4 + 4 + 8  # of a tensor info without name and dimensions

# By number: name, elements of a block, bytes of a block (ggml-org/llama.cpp:ggml/src/ggml.c).
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Omitted:
    """A value that was walked over: how many elements or bytes it has."""

    count: int
    what: str

    def __str__(self) -> str:
        return f"({self.count} {self.what})"


@dataclass(frozen=True, slots=True)
class Info:
    """A tensor as the header has it; shape in numpy's order, `offset` from the file's start."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says before its data: values by key and tensors by name, in its order."""

    version: int
    values: dict[str, Any]
    tensors: dict[str, Info]
    source: Source
    big: bool = False  # whether numbers are big-endian

    def leaf(self, name: str) -> Leaf:
        """A tensor as a leaf; MalformedError `dtype_unusable` where it is quantised."""
        info = self.tensors[name]
        _, elements, width = next(row for row in TYPES.values() if row[0] == info.type)
        if elements != 1:
            raise error(
                "dtype_unusable",
                f'{shown(self.source.name)}: tensor "{shown(name)}" is {info.type}, quantised; '
                "F32, F16 and BF16 are read",
            )
        source: Source = self.source
        if self.big and width > 1:
            source = _Swapped(source, info.offset, width)
        return Leaf(name, info.type, info.shape, source, info.offset)


@dataclass(frozen=True, slots=True)
class _Swapped:
    """Numbers of a big-endian file, as a source that gives them in little-endian bytes."""

    inner: Source
    start: int
    width: int

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def size(self) -> int:
        return self.inner.size

    def read(self, offset: int, length: int) -> bytes:
        assert (offset - self.start) % self.width == 0 == length % self.width
        values = array({2: "H", 4: "I", 8: "Q"}[self.width], self.inner.read(offset, length))
        values.byteswap()
        return values.tobytes()


def is_gguf(source: Source) -> bool:
    """Whether a file begins as GGUF does."""
    return source.size >= len(MAGIC) and source.read(0, len(MAGIC)) == MAGIC


def read_header(source: Source) -> Header:
    """The header of a GGUF file (ggml-org/ggml:docs/gguf.md), as llama.cpp would take it.

    Raises malformed, truncated, duplicate, or not_weights for a file of another sort.
    """
    at = _Cursor(source)
    tensors, values = _counts(at)
    found: dict[str, Any] = {}
    for key, value in _values(at, values):
        if key in found:
            raise at.error("duplicate", f'key "{shown(key)}" stands twice')
        found[key] = value
    infos = _infos(at, tensors)
    alignment = found.get(ALIGNMENT, _ALIGNED)
    whole = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not whole or not 0 < alignment <= _WIDEST_ALIGNMENT or alignment & (alignment - 1):
        raise at.error(
            "malformed",
            f"{ALIGNMENT} is {shown(alignment)}, expected a power of two up to {_WIDEST_ALIGNMENT}",
        )
    start = at.offset + -at.offset % alignment
    return Header(at.version, found, _placed(infos, start, alignment, source), source, at.big)


def value_of(source: Source, key: str) -> Any:
    """The value of one key, read no further than there; None where the file has no such key."""
    at = _Cursor(source)
    return next((v for k, v in _values(at, _counts(at)[1]) if k == key), None)


# ------------------------------------------------------------------------------- the walk


class _Cursor:
    """A place in the header, from which values are taken one after another."""

    def __init__(self, source: Source) -> None:
        self.source, self.offset = source, 8
        self.what = shown(source.name)
        self._piece, self._begin = b"", 0
        if source.size == 0:
            raise error("truncated", f"{self.what} is empty; fetch it again")
        head = source.read(0, min(64, source.size))
        if head[:4] != MAGIC:
            sort = what_it_is(head) or "a file of some other sort"
            raise error("not_weights", f"{self.what} is no GGUF file but {sort}")
        if len(head) < 24:
            raise error("truncated", f"{self.what}: {len(head)} bytes are too few for any header")
        little = int.from_bytes(head[4:8], "little")
        self.big = little & 0xFFFF == 0 and little != 0
        self.version = int.from_bytes(head[4:8], "big" if self.big else "little")
        self._order = ">" if self.big else "<"
        if self.version not in VERSIONS:
            raise error(
                "malformed",
                f"{self.what}: byte 4: GGUF version {self.version}, versions 2 and 3 are read",
            )

    def error(self, code: str, message: str) -> LoratoolsError:
        return error(code, f"{self.what}: byte {self.offset}: {message}")

    def take(self, length: int) -> bytes:
        """The next bytes, as many as asked for."""
        begin = self.offset - self._begin
        if begin + length > len(self._piece):
            self.require(length)
            size = min(max(length, _PIECE), self.source.size - self.offset)
            self._piece, self._begin = self.source.read(self.offset, size), self.offset
            begin = 0
        self.offset += length
        return self._piece[begin : begin + length]

    def require(self, length: int) -> None:
        """That so many bytes of a header can follow."""
        end = self.offset + length
        if end > HEADER_LIMIT and length > HEADER_LIMIT // 2:
            raise self.error("malformed", f"{length} bytes are promised in a header")
        if end > HEADER_LIMIT:
            raise self.error("malformed", f"the header is longer than {HEADER_LIMIT} bytes")
        if end > self.source.size:
            raise self.error(
                "truncated",
                f"{length} bytes should follow, {end - self.source.size} of them and all data are "
                "missing; fetch the file again",
            )

    def number(self, code: str) -> Any:
        """One number by its struct letter."""
        (value,) = struct.unpack(self._order + code, self.take(struct.calcsize("=" + code)))
        return value

    def text(self, what: str) -> str:
        """A string: its length and its UTF-8."""
        length = self.number("Q")
        raw = self.take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.offset -= length
            raise self.error("malformed", f"{what} is no UTF-8") from None

    def skip(self, length: int) -> None:
        self.require(length)
        self.offset += length

    def skip_texts(self, count: int) -> None:
        """Walk over many strings, whole pieces of the file at a time."""
        length = struct.Struct(self._order + "Q")
        while count:
            if self.offset + 8 > self._begin + len(self._piece):
                self.take(8)
                self.offset -= 8
            piece, at = self._piece, self.offset - self._begin
            last = len(piece) - 8
            while count and at <= last:
                at += 8 + length.unpack_from(piece, at)[0]
                count -= 1
            self.skip(self._begin + at - self.offset)

    def value(self, kind: int, key: str) -> Any:
        """A value of a type by its number."""
        if kind == _STRING:
            begin = self.offset
            length = self.number("Q")
            if length > TEXT:
                self.skip(length)
                return Omitted(length, "bytes of text")
            self.offset = begin
            return self.text(f'the value of "{shown(key)}"')
        if kind == _ARRAY:
            return self.array(self.number("I"), self.number("Q"), key)
        if kind not in _NUMBERS:
            raise self.error("malformed", f'"{shown(key)}" has the unknown type {kind}')
        number = self.number(_NUMBERS[kind])
        return bool(number) if kind == _BOOL else number

    def array(self, kind: int, count: int, key: str) -> Any:
        """The elements of an array, or their number where they are many; no arrays of arrays."""
        name = f'"{shown(key)}"'
        if kind == _ARRAY:
            raise self.error("malformed", f"{name} is an array of arrays, which nobody reads")
        if kind != _STRING and kind not in _NUMBERS:
            raise self.error("malformed", f"{name} is an array of the unknown type {kind}")
        width = 8 if kind == _STRING else struct.calcsize("=" + _NUMBERS[kind])
        self.require(count * width)
        if kind == _STRING and count > ELEMENTS:
            self.skip_texts(count)
            return Omitted(count, "strings")
        if kind == _STRING:
            return [self.value(kind, key) for _ in range(count)]
        if count > ELEMENTS:
            self.skip(count * width)
            return Omitted(count, "numbers")
        raw = self.take(count * width)
        numbers = struct.unpack(f"{self._order}{count}{_NUMBERS[kind]}", raw)
        return [bool(v) for v in numbers] if kind == _BOOL else list(numbers)


def _counts(at: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of key-values."""
    tensors, values = at.number("Q"), at.number("Q")
    room = min(HEADER_LIMIT, at.source.size) - at.offset
    if values * _LEAST_VALUE + tensors * _LEAST_INFO > max(room, 0):
        at.offset = 8
        raise at.error(
            "malformed",
            f"{tensors} tensors and {values} key-values are promised, which {room} bytes cannot "
            "hold; a damaged file, or one cut short",
        )
    return tensors, values


def _values(at: _Cursor, count: int) -> Iterator[tuple[str, Any]]:
    for _ in range(count):
        begin = at.offset
        key = at.text("a key")
        if not key:
            at.offset = begin
            raise at.error("malformed", "a key without a name")
        yield key, at.value(at.number("I"), key)


def _infos(at: _Cursor, count: int) -> list[tuple[str, int, tuple[int, ...], int]]:
    """Name, type, shape and offset within the data of every tensor."""
    infos: list[tuple[str, int, tuple[int, ...], int]] = []
    seen: set[str] = set()
    for _ in range(count):
        name = at.text("a tensor's name")
        if name in seen:
            raise at.error("duplicate", f'tensor "{shown(name)}" stands twice')
        seen.add(name)
        dimensions = at.number("I")
        if dimensions > DIMENSIONS:
            raise at.error(
                "malformed",
                f'tensor "{shown(name)}" has {dimensions} dimensions, at most {DIMENSIONS}',
            )
        shape = tuple(at.number("Q") for _ in range(dimensions))[::-1]
        kind = at.number("I")
        if kind not in TYPES:
            raise at.error("malformed", f'tensor "{shown(name)}" has the unknown type {kind}')
        if math.prod(filter(None, shape)) > _TOTAL:
            raise at.error("malformed", f'tensor "{shown(name)}" is {shape}, larger than any')
        called, block, _ = TYPES[kind]
        if block > 1 and (not shape or shape[-1] % block):
            raise at.error(
                "malformed",
                f'tensor "{shown(name)}" is {shape}, {called} has rows of whole blocks of {block}',
            )
        infos.append((name, kind, shape, at.number("Q")))
    return infos


def _placed(
    infos: list[tuple[str, int, tuple[int, ...], int]], start: int, alignment: int, source: Source
) -> dict[str, Info]:
    """The tensors where their data lie: each begins where the one before ends, and its padding.

    llama.cpp takes no other order, so that nothing can overlap or hide.
    """
    what = shown(source.name)
    tensors: dict[str, Info] = {}
    if not infos:
        return tensors  # then nothing has to follow, not even the padding
    at = end = start
    for name, kind, shape, offset in infos:
        called, block, width = TYPES[kind]
        if start + offset != at:
            raise error(
                "malformed",
                f'{what}: tensor "{shown(name)}" is said to begin at byte {offset} of the data, '
                f"expected {at - start}: each follows the one before and its padding",
            )
        nbytes = math.prod(shape) // block * width
        tensors[name] = Info(name, called, shape, at, nbytes)
        end = at + nbytes
        at = end + -end % alignment
    if end > source.size:
        raise error(
            "truncated",
            f"{what}: {end - source.size} bytes are missing at the end ({source.size} of {end}); "
            "fetch the file again",
        )
    return tensors
