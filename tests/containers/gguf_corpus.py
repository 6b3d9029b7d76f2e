"""GGUF files as bytes: odd ones that are sound, hostile ones and what is said of them."""

import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Memory:
    raw: bytes
    name: str = "x.gguf"

    @property
    def size(self) -> int:
        return len(self.raw)

    def read(self, offset: int, length: int) -> bytes:
        found = self.raw[offset : offset + length]
        assert len(found) == length
        return found


U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(raw: bytes | str, order: str = "<") -> bytes:
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack(f"{order}Q", len(raw)) + raw


def pair(key: bytes | str, kind: int, raw: bytes, order: str = "<") -> bytes:
    return text(key, order) + struct.pack(f"{order}I", kind) + raw


def u32(key: str, value: int) -> bytes:
    return pair(key, U32, struct.pack("<I", value))


def array(key: str, kind: int, count: int, raw: bytes = b"") -> bytes:
    return pair(key, ARRAY, struct.pack("<IQ", kind, count) + raw)


def info(name: bytes | str, ne: list[int], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's entry; `ne` has the fastest dimension first, as the file has it."""
    raw = text(name) + struct.pack("<I", len(ne))
    return raw + b"".join(struct.pack("<Q", n) for n in ne) + struct.pack("<IQ", kind, offset)


def built(
    pairs: list[bytes] = (),  # type: ignore[assignment]
    infos: list[bytes] = (),  # type: ignore[assignment]
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    tensors, values = counts or (len(infos), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, values)
    head += b"".join(pairs) + b"".join(infos)
    return head + (b"\0" * (-len(head) % alignment) + data if infos else b"")


ONE = info("a", [2, 3])
DATA = bytes(range(24))

# What the gguf package reads, and we too.
ACCEPTED = {
    "nothing": built(),
    "a tensor": built([], [ONE], DATA),
    "version 2": built([], [ONE], DATA, version=2),
    "every type": built(
        [
            pair("u8", U8, b"\xff"), pair("i8", I8, b"\xff"), pair("u16", U16, b"\xff\xff"),
            pair("i16", I16, b"\xff\xff"), pair("u32", U32, b"\xff" * 4),
            pair("i32", I32, b"\xff" * 4), pair("f32", F32, struct.pack("<f", 0.5)),
            pair("bool", BOOL, b"\x01"), pair("string", STRING, text("é\n")),
            pair("u64", U64, b"\xff" * 8), pair("i64", I64, b"\xff" * 8),
            pair("f64", F64, struct.pack("<d", 0.1)),
            array("strings", STRING, 2, text("a") + text("")),
            array("numbers", I16, 2, b"\xff\xff\1\0"),
        ]
    ),
    "a long vocabulary": built([array("t", STRING, 5000, text("ab") * 5000), u32("z", 7)]),
    "many numbers": built([array("t", F32, 5000, b"\0" * 20_000), u32("z", 7)]),
    "alignment 64": built(
        [u32("general.alignment", 64)], [ONE, info("b", [1], 0, 64)], DATA + b"\0" * 44,
        alignment=64,
    ),
    "padding between": built([], [ONE, info("b", [1], 1, 32)], DATA + b"\0" * 8 + b"\0\x3c"),
    "more after the data": built([], [ONE], DATA + b"\0" * 8),
    "no dimensions": built([], [info("a", [])], b"1234"),
    "no elements": built([], [info("a", [0, 5]), info("b", [1])], b"1234"),
    "quantised": built([], [info("a", [32, 2], 8), info("b", [1], 0, 96)], b"\0" * 96 + b"1234"),
    "a name of a path": built([], [info("../../etc/x", [2, 3])], DATA),
    "control characters": built([], [info("\x1b[2J\n", [2, 3])], DATA),
}  # fmt: skip

# Bytes, the code, and a part of the message.
HOSTILE: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "truncated", "is empty"),
    "magic alone": (b"GGUF", "truncated", "too few"),
    "another magic": (b"PK\3\4" + b"\0" * 40, "not_weights", "a zip archive"),
    "a web page": (b"<!DOCTYPE html><html>" + b" " * 30, "not_weights", "a web page"),
    "version 0": (built(version=0), "malformed", "version 0"),
    "version 1": (built(version=1), "malformed", "version 1"),
    "version 99": (built(version=99), "malformed", "version 99"),
    "2^63 key-values": (built(counts=(0, 1 << 63)), "malformed", "are promised"),
    "2^62 tensors": (built(counts=(1 << 62, 0)), "malformed", "are promised"),
    "a key-value that is not there": (built(counts=(0, 1)), "malformed", "cut short"),
    "a key of 2^60 bytes": (
        built([struct.pack("<Q", 1 << 60) + b"k" * 40]), "malformed", "byte 32: 1152921504606846976"
    ),
    "a key of 100 bytes too many": (
        built([struct.pack("<Q", 140) + b"k" * 40]), "truncated", "100 of them"
    ),
    "a string of 2^60 bytes": (
        built([pair("k", STRING, struct.pack("<Q", 1 << 60))]), "malformed", "are promised"
    ),
    "a string cut off": (
        built([pair("k", STRING, struct.pack("<Q", 9) + b"abc")]), "truncated", "6 of them"
    ),
    "an array of 2^60": (built([array("k", U8, 1 << 60, b"\0" * 9)]), "malformed", "are promised"),
    "an array of 2^63 doubles": (
        built([array("k", F64, 1 << 63, b"\0" * 9)]), "malformed", "are promised"
    ),
    "an array cut off": (built([array("k", U8, 99, b"\0" * 9)]), "truncated", "90 of them"),
    "strings cut off": (
        built([array("k", STRING, 5000, text("") * 4999 + struct.pack("<Q", 3))]),
        "truncated", "3 of them",
    ),
    "nested arrays": (
        built([array("k", ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 5000)]),
        "malformed", "array of arrays",
    ),
    "an unknown type": (built([pair("k", 13, b"\0" * 8)]), "malformed", "unknown type 13"),
    "an array of an unknown type": (built([array("k", 99, 1, b"\0" * 8)]), "malformed", "type 99"),
    "bad UTF-8 in a key": (built([pair(b"\xff", U8, b"\0")]), "malformed", "a key is no UTF-8"),
    "bad UTF-8 in a value": (
        built([pair("k", STRING, text(b"\xc3("))]), "malformed", 'value of "k" is no UTF-8'
    ),
    "bad UTF-8 in a name": (built([], [info(b"\xed\xa0\x80", [1])]), "malformed", "tensor's name"),
    "a key without a name": (built([pair("", U32, b"\0" * 4)]), "malformed", "without a name"),
    "a key twice": (built([u32("k", 1), u32("k", 2)]), "duplicate", 'key "k"'),
    "a tensor twice": (
        built([], [ONE, info("a", [1], 0, 32)], DATA + b"\0" * 12), "duplicate", 'tensor "a"'
    ),
    "200 dimensions": (built([], [info("a", [1] * 200)], b"1234"), "malformed", "200 dimensions"),
    "2^32-1 dimensions": (
        built([], [text("a") + b"\xff" * 4 + b"\0" * 40]), "malformed", "4294967295 dimensions"
    ),
    "2^40 x 2^40": (built([], [info("a", [1 << 40, 1 << 40])]), "malformed", "larger than any"),
    "2^63": (built([], [info("a", [1 << 63])]), "malformed", "larger than any"),
    "2^40": (built([], [info("a", [1 << 40])]), "truncated", "missing at the end"),
    "type 99": (built([], [info("a", [2, 3], 99)], DATA), "malformed", "unknown type 99"),
    "a retired type": (built([], [info("a", [4], 4)], DATA), "malformed", "unknown type 4"),
    "half a block": (built([], [info("a", [16, 2], 8)], b"\0" * 99), "malformed", "blocks of 32"),
    "an offset of 2^63": (
        built([], [info("a", [2, 3], 0, 1 << 63)], DATA), "malformed", "expected 0"
    ),
    "an offset into the one before": (
        built([], [ONE, info("b", [1], 0, 0)], DATA), "malformed", "expected 32"
    ),
    "an offset not aligned": (
        built([], [ONE, info("b", [1], 0, 24)], DATA + b"1234"), "malformed", "expected 32"
    ),
    "a hole": (
        built([], [ONE, info("b", [1], 0, 64)], DATA + b"\0" * 50), "malformed", "expected 32"
    ),
    "one byte short": (built([], [ONE], DATA[:-1]), "truncated", "1 bytes are missing"),
    "no data": (built([], [ONE]), "truncated", "24 bytes are missing"),
    "alignment 0": (built([u32("general.alignment", 0)]), "malformed", "alignment is 0"),
    "alignment 7": (built([u32("general.alignment", 7)]), "malformed", "alignment is 7"),
    "alignment 2^31": (built([u32("general.alignment", 1 << 31)]), "malformed", "2147483648"),
    "alignment true": (
        built([pair("general.alignment", BOOL, b"\1")]), "malformed", "alignment is True"
    ),
    "alignment in words": (
        built([pair("general.alignment", STRING, text("32"))]), "malformed", "alignment is 32"
    ),
}  # fmt: skip
