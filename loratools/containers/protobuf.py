"""Protobuf messages walked field by field in a file, bounded, and the edits that keep them whole.

The wire format: https://protobuf.dev/programming-guides/encoding. Contents of fields are read only
where they are asked for, so that gigabytes of weights cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from loratools.adapter import Source
from loratools.errors import LoratoolsError, error, shown

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
TEXT = 1 << 16  # bytes of a name
_WINDOW = 1 << 18


class Field(NamedTuple):
    """One field of a message: its number, its bytes from `start` to `end`, or its number's value.

    `tag` is where its tag begins; for BYTES the length lies between tag and start, at `length`.
    """

    number: int
    wire: int
    tag: int
    length: int
    start: int
    end: int
    value: int


class Span(NamedTuple):
    """A message inside another: where its length is written, its first byte and its end."""

    length: int
    start: int
    end: int


@dataclass(slots=True)
class Walk:
    """Bounded steps through the messages of one file; every fault names its byte."""

    source: Source
    _held: bytes = field(default=b"", repr=False)
    _from: int = field(default=0, repr=False)

    def fault(self, at: int, message: str) -> LoratoolsError:
        return error("malformed", f"{shown(self.source.name)}, byte {at}: {message}")

    def read(self, at: int, length: int) -> bytes:
        """The bytes at a place that lie within the file, as the caller has made sure."""
        if length > _WINDOW:
            return self.source.read(at, length)
        low = at - self._from
        if low < 0 or low + length > len(self._held):
            self._held = self.source.read(at, min(_WINDOW, self.source.size - at))
            self._from, low = at, 0
        return self._held[low : low + length]

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """The number at a place, and where the next thing stands."""
        low = at - self._from
        if low < 0 or low + min(10, end - at) > len(self._held):
            self.read(at, min(10, end - at))
            low = at - self._from
        value = shift = 0
        held = self._held
        for i in range(low, low + min(10, end - at)):
            byte = held[i]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    break
                return value, self._from + i + 1
            shift += 7
        raise self.fault(at, "a number that does not end, or has more than 64 bits")

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of the message from `start` to `end`; malformed where they do not fill it."""
        at = start
        while at < end:
            tag = at
            key, at = self.varint(at, end)
            number, wire = key >> 3, key & 7
            if not 0 < number < 1 << 29:
                raise self.fault(tag, f"a field of number {number}")
            value, length = 0, at
            match wire:
                case 0:
                    value, stop = self.varint(at, end)
                case 1:
                    stop = at + 8
                case 2:
                    size, at = self.varint(at, end)
                    stop = at + size
                case 5:
                    stop = at + 4
                case _:
                    raise self.fault(tag, f"a field of wire type {wire}")
            if stop > end:
                raise self.fault(tag, f"field {number} ends at {stop}, what holds it at {end}")
            yield Field(number, wire, tag, length, at, stop, value)
            at = stop

    def inner(self, f: Field) -> Span:
        """The message that a field holds."""
        self.require(f, BYTES)
        return Span(f.length, f.start, f.end)

    def require(self, f: Field, *wires: int) -> None:
        if f.wire not in wires:
            raise self.fault(f.tag, f"field {f.number} is of wire type {f.wire}")

    def number(self, f: Field) -> int:
        """A signed number."""
        self.require(f, VARINT)
        return f.value - (1 << 64) if f.value >> 63 else f.value

    def numbers(self, f: Field) -> Iterator[int]:
        """Signed numbers: one alone, or several packed together."""
        if f.wire == VARINT:
            yield self.number(f)
            return
        self.require(f, BYTES)
        at = f.start
        while at < f.end:
            value, at = self.varint(at, f.end)
            yield value - (1 << 64) if value >> 63 else value

    def raw(self, f: Field, limit: int = TEXT) -> bytes:
        """A field's bytes; malformed above `limit`."""
        self.require(f, BYTES)
        if f.end - f.start > limit:
            raise self.fault(f.start, f"a text of {f.end - f.start} bytes, {limit} at most")
        return self.read(f.start, f.end - f.start)

    def text(self, f: Field, limit: int = TEXT) -> str:
        try:
            return self.raw(f, limit).decode()
        except UnicodeDecodeError:
            raise self.fault(f.start, "a text that is no UTF-8") from None


# ------------------------------------------------------------------------------- written


def varint(value: int) -> bytes:
    """A number of at least 0, as short as it can be."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def as_number(number: int, value: int) -> bytes:
    """A field that holds a number."""
    return varint(number << 3 | VARINT) + varint(value & (1 << 64) - 1)


def as_bytes(number: int, content: bytes) -> bytes:
    """A field that holds bytes, a text or a message."""
    return as_head(number, len(content)) + content


def as_head(number: int, length: int) -> bytes:
    """The beginning of a field of so many bytes."""
    return varint(number << 3 | BYTES) + varint(length)


@dataclass(frozen=True, slots=True)
class Edit:
    """The bytes `start:end` of a file replaced by others, within messages that must say so."""

    start: int
    end: int
    content: bytes
    within: tuple[Span, ...] = ()


def with_lengths(edits: Iterable[Edit]) -> list[Edit]:
    """The edits with those of the lengths of all messages around them, in file order.

    Edits may touch, not overlap; those at one place keep their order.
    """
    found = sorted(edits, key=lambda e: (e.start, e.end))
    spans = {span for edit in found for span in edit.within}
    lengths: list[Edit] = []
    for span in sorted(spans, key=lambda s: s.end - s.start):  # inner ones first
        grown = sum(
            len(e.content) - (e.end - e.start) for e in found if span in e.within
        ) + sum(
            len(e.content) - (e.end - e.start)
            for e in lengths
            if span.start <= e.start and e.end <= span.end
        )  # fmt: skip
        size = varint(span.end - span.start + grown)
        lengths.append(Edit(span.length, span.start, size))
    whole = sorted([*found, *lengths], key=lambda e: (e.start, e.end))
    for before, after in pairwise(whole):
        assert before.end <= after.start, (before, after)
    return whole


def moved(at: int, edits: Sequence[Edit]) -> int:
    """Where a byte that no edit replaces stands afterwards."""
    return at + sum(len(e.content) - (e.end - e.start) for e in edits if e.end <= at)
