"""An .ort file made the same every time: onnxruntime writes one of its lists in a random order.

An .ort file is a flatbuffer (microsoft/onnxruntime:onnxruntime/core/flatbuffers/schema/ort.fbs):
InferenceSession (ort_version, model, -, kernel_type_str_resolver). The last, a table of which
types each operator's kernels take, comes out of a hash map and stands before everything else in
the file. It is read and written again, sorted; what follows it is kept byte by byte.
"""

from __future__ import annotations

import struct
from typing import Any, Final

IDENTIFIER: Final = b"ORTM"
ALIGNED: Final = 16  # of what is kept: its own alignment must not move
_VERSION, _MODEL, _RESOLVER = 0, 1, 3  # fields of InferenceSession

Argument = tuple[int, int]  # input or output, its number
Entry = tuple[bytes, list[tuple[bytes, list[Argument]]]]  # operator → (type's name, arguments)


def in_fixed_order(data: bytes) -> bytes:
    """The file that onnxruntime has just written, its table of kernels sorted."""
    view = _View(data)
    root = view.follow(0)
    model = view.follow(_there(view.field(root, _MODEL)))
    # A table is written after all that it refers to, in front of it, and after its own vtable.
    start = min(model, view.vtable(model))
    resolver = view.field(root, _RESOLVER)
    entries = _entries(view, view.follow(resolver)) if resolver else []
    version = view.text(_there(view.field(root, _VERSION)))
    head, at = _head(version, entries)
    padding = -(len(head) - start) % ALIGNED
    moved = model - start + len(head) + padding
    head[at : at + 4] = struct.pack("<I", moved - at)
    return bytes(head) + b"\0" * padding + data[start:]


def _there(at: int) -> int:
    if not at:
        raise ValueError("a field that every .ort file has is missing")
    return at


class _View:
    """A flatbuffer read by positions."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def number(self, at: int, kind: str) -> int:
        return int(struct.unpack_from(f"<{kind}", self.data, at)[0])

    def follow(self, at: int) -> int:
        return at + self.number(at, "I")

    def vtable(self, table: int) -> int:
        return table - self.number(table, "i")

    def field(self, table: int, index: int) -> int:
        """Where a field of a table stands; 0 where it is absent."""
        vtable = self.vtable(table)
        if 4 + 2 * index >= self.number(vtable, "H"):
            return 0
        offset = self.number(vtable + 4 + 2 * index, "H")
        return table + offset if offset else 0

    def text(self, at: int) -> bytes:
        start = self.follow(at)
        return self.data[start + 4 : start + 4 + self.number(start, "I")]

    def tables(self, table: int, index: int) -> list[int]:
        """The tables of a vector in a field."""
        at = self.field(table, index)
        if not at:
            return []
        start = self.follow(at)
        return [self.follow(start + 4 + 4 * i) for i in range(self.number(start, "I"))]


def _entries(view: _View, resolver: int) -> list[Entry]:
    found: list[Entry] = []
    for table in view.tables(resolver, 0):
        types = []
        for inner in view.tables(table, 1):
            arguments = []
            for argument in view.tables(inner, 1):
                kind, number = view.field(argument, 0), view.field(argument, 1)
                arguments.append(
                    (
                        view.number(kind, "b") if kind else 0,
                        view.number(number, "I") if number else 0,
                    )
                )
            types.append((view.text(view.field(inner, 0)), arguments))
        found.append((view.text(view.field(table, 0)), sorted(types)))
    return sorted(found)


def _head(version: bytes, entries: list[Entry]) -> tuple[bytearray, int]:
    """The file up to its model, and where the offset of the model has to be filled in."""
    import flatbuffers  # type: ignore[import-untyped]

    made: Any = flatbuffers.Builder(1024)

    def vector(offsets: list[int]) -> int:
        made.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            made.PrependUOffsetTRelative(offset)
        return int(made.EndVector())

    def named(name: bytes, content: int) -> int:
        text = made.CreateString(name)
        made.StartObject(2)
        made.PrependUOffsetTRelativeSlot(0, text, 0)
        made.PrependUOffsetTRelativeSlot(1, content, 0)
        return int(made.EndObject())

    operators = []
    for operator, types in entries:
        inner = []
        for name, arguments in types:
            pairs = []
            for kind, number in arguments:
                made.StartObject(2)
                made.PrependUint32Slot(1, number, 0)
                made.PrependInt8Slot(0, kind, 0)
                pairs.append(int(made.EndObject()))
            inner.append(named(name, vector(pairs)))
        operators.append(named(operator, vector(inner)))
    listed = vector(operators)
    made.StartObject(1)
    made.PrependUOffsetTRelativeSlot(0, listed, 0)
    resolver = made.EndObject()
    text = made.CreateString(version)
    made.StartObject(4)
    made.PrependUOffsetTRelativeSlot(_VERSION, text, 0)
    made.PrependUint32Slot(_MODEL, 0xFFFFFFFF, 0)  # filled in later
    made.PrependUOffsetTRelativeSlot(_RESOLVER, resolver, 0)
    made.Finish(made.EndObject(), IDENTIFIER)
    head = bytearray(made.Output())
    view = _View(bytes(head))
    return head, view.field(view.follow(0), _MODEL)
