"""Safetensors files as bytes: odd ones that are sound, hostile ones and what is said of them."""

import json
import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Memory:
    raw: bytes
    name: str = "x.safetensors"

    @property
    def size(self) -> int:
        return len(self.raw)

    def read(self, offset: int, length: int) -> bytes:
        found = self.raw[offset : offset + length]
        assert len(found) == length
        return found


def built(header: object, data: bytes = b"") -> bytes:
    """A file; a dict is written as JSON, a list of pairs too (names may stand twice)."""
    if isinstance(header, list):
        members = (f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in header)
        header = "{" + ",".join(members) + "}"
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype: object, shape: object, begin: object, end: object, **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


ONE = entry("U8", [4], 0, 4)


# What the library reads, and we too.
ACCEPTED = {
    "no tensors": built("{}"),
    "blanks": built(
        '{\n"a"\t: {"dtype" :"U8" ,"shape":[ 4 ],"data_offsets":[0, 4]}\r}\n  ', b"1234"
    ),
    "fields in another order": built('{"a":{"data_offsets":[0,1],"dtype":"U8","shape":[]}}', b"1"),
    "metadata in the middle": built(
        [("a", ONE), ("__metadata__", {"k": "v"}), ("b", entry("U8", [1], 4, 5))], b"12345"
    ),
    "metadata is null": built('{"__metadata__":null}'),
    "metadata is empty": built('{"__metadata__":{}}'),
    "metadata in escapes": built(r'{"\u005f_metadata__":{"a":"b"}}'),
    "metadata of braces and quotes": built({"__metadata__": {'{"': '"}],{\\"', "": "\x00\n"}}),
    "long metadata": built({"__metadata__": {"ss_tags": '{"a \\" b": {"c": 1}}' * 50_000}}),
    "many metadata": built({"__metadata__": {str(i): "" for i in range(65_536)}}),
    "1,500 tensors": built({str(i): entry("U8", [1], i, i + 1) for i in range(1500)}, b"x" * 1500),
    "empty at both ends": built(
        {"z": entry("F32", [0], 0, 0), "a": ONE, "y": entry("I8", [3, 0], 4, 4)}, b"1234"
    ),
    "empty where another begins": built({"a": ONE, "z": entry("F32", [0], 0, 0)}, b"1234"),
    "several empty in one place": built({n: entry("F32", [0, 7], 0, 0) for n in "abc"}),
    "eight dimensions": built({"a": entry("U8", [1] * 8, 0, 1)}, b"1"),
    "unaligned": built({"a": entry("U8", [1], 0, 1), "b": entry("F64", [1], 1, 9)}, b"123456789"),
    "F4": built({"a": entry("F4", [3, 2], 0, 3)}, b"123"),
    "F6": built({"a": entry("F6_E2M3", [4], 0, 3), "b": entry("F6_E3M2", [8], 3, 9)}, b"1" * 9),
    "C64": built({"a": entry("C64", [1], 0, 8)}, b"12345678"),
    "BOOL with bytes 7 and 2": built({"a": entry("BOOL", [2], 0, 2)}, b"\7\2"),
    "name of a path": built({"../../etc/x": ONE}, b"1234"),
    "name of control characters": built({"\x1b[2J\x07\u202e\n\0": ONE}, b"1234"),
    "name raw in UTF-8": built('{"é\U0001f600":' + json.dumps(ONE) + "}", b"1234"),
    "empty name": built({"": ONE}, b"1234"),
    "name of 1 MB": built({"x" * 2**20: ONE}, b"1234"),
    "length that begins like gzip": built("{" + " " * (0x8B1F - 2) + "}"),
}  # fmt: skip

# Bytes, the code, and a part of the message.
Hostile = tuple[bytes, str, str]
HOSTILE: dict[str, Hostile] = {
    # what stands twice
    "name twice": (
        built([("a", ONE), ("a", entry("F32", [1], 0, 4))], b"1234"),
        "duplicate",
        "\"a\" stands twice ({'data_offsets': [0, 4], 'dtype': 'U8', 'shape': [4]} and",
    ),
    "name twice, far apart": (
        built([(str(i % 1000), entry("U8", [0], 0, 0)) for i in range(1001)]),
        "duplicate",
        '"0" stands twice',
    ),
    "name twice, once in escapes": (
        built('{"a":%s,"\\u0061":%s}' % ((json.dumps(entry("U8", [0], 0, 0)),) * 2)),
        "duplicate",
        '"a" stands twice',
    ),
    "metadata twice": (
        built([("__metadata__", {}), ("__metadata__", {"a": "b"})]),
        "duplicate",
        '"__metadata__" stands twice',
    ),
    "metadata key twice": (
        built('{"__metadata__":{"a":"b","a":"c"}}'),
        "duplicate",
        "\"a\" stands twice ('b' and 'c')",
    ),
    "dtype twice": (
        built('{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
        "duplicate",
        '"dtype" stands twice',
    ),
    # entries
    "unknown field": (
        built({"a": entry("U8", [4], 0, 4, scale=2)}, b"1234"),
        "malformed",
        'tensor "a": its entry has unknown fields (scale)',
    ),
    "field missing": (
        built({"a": {"dtype": "U8", "shape": [0]}}),
        "malformed",
        'tensor "a": its entry lacks data_offsets',
    ),
    "entry as a list": (built({"a": ["U8", [0], [0, 0]]}), "malformed", 'found "a": ["U8"'),
    "entry in an entry": (
        built({"a": {"dtype": {"dtype": "U8"}}}), "malformed", "byte 9 of the header"
    ),
    "entry of 1 MB": (
        built({"a": entry("U8", [1] * 10_000, 0, 1)}, b"1"), "malformed", "at most 4000 bytes"
    ),
    # the length of the header
    "length 2^63": (b"\0\0\0\0\0\0\0\x80{}", "malformed", f"a header of {2**63} bytes"),
    "length 200 MB": (
        struct.pack("<Q", 200_000_000) + b"{}", "malformed", "at most 50000000 are read"
    ),
    "length past the end": (
        struct.pack("<Q", 100) + b"{}", "truncated", "has 100 bytes and 98 of them are missing"
    ),
    "length 0": (struct.pack("<Q", 0) + b"{}", "malformed", "a header of 0 bytes"),
    "length 1": (struct.pack("<Q", 1) + b"{}", "malformed", "a header of 1 bytes"),
    "length within a name": (
        struct.pack("<Q", 4) + b'{"a":' + b"x" * 9, "malformed", "byte 9 of the header"
    ),
    # places of the data
    "overlap": (
        built({"a": ONE, "b": entry("U8", [4], 2, 6)}, b"123456"),
        "malformed",
        'tensor "b" overlaps "a" by 2 bytes',
    ),
    "one place for two": (
        built({"a": ONE, "b": ONE}, b"1234"), "malformed", 'tensor "b" overlaps "a" by 4 bytes'
    ),
    "one within another": (
        built({"a": ONE, "b": entry("U8", [1], 1, 2)}, b"1234"), "malformed", '"b" overlaps "a"'
    ),
    "hole": (
        built({"a": ONE, "b": entry("U8", [1], 6, 7)}, b"1234567"),
        "malformed",
        'tensor "b" leaves a hole of 2 bytes after "a"',
    ),
    "hole at the start": (
        built({"a": entry("U8", [4], 3, 7)}, b"1234567"),
        "malformed",
        'tensor "a" leaves a hole of 3 bytes after the header',
    ),
    "trailing bytes": (
        built({"a": ONE}, b"1234PK\x05\x06"), "malformed", "4 bytes follow the last tensor"
    ),
    "data without tensors": (built({}, b"1"), "malformed", "1 bytes follow"),
    "truncated": (built({"a": ONE}, b"1"), "truncated", "3 bytes are missing at the end"),
    "offsets reversed": (
        built({"a": entry("U8", [4], 4, 0)}, b"1234"),
        "malformed",
        "U8 [4] takes 4 bytes, its data_offsets [4, 0] hold -4",
    ),
    # shapes and offsets
    "shape too large": (
        built({"a": entry("U8", [2**33, 2**33], 0, 4)}, b"1234"), "malformed", "larger than any"
    ),
    "too large behind a zero": (
        built({"a": entry("U8", [0, 2**62, 2**62], 0, 0)}), "malformed", "larger than any tensor"
    ),
    "extent too large": (built({"a": entry("U8", [0, 2**41], 0, 0)}), "malformed", "larger than"),
    "product too large": (
        built({"a": entry("U8", [0, 2**40, 2**21], 0, 0)}), "malformed", "larger than any tensor"
    ),
    "nine dimensions": (
        built({"a": entry("U8", [1] * 9, 0, 1)}, b"1"), "malformed", "9 dimensions, at most 8"
    ),
    "shape of 300 digits": (
        built('{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % ("9" * 300), b"1"),
        "malformed",
        "larger than any tensor",
    ),
    "empty inside another": (
        built({"a": ONE, "z": entry("U8", [0], 2, 2)}, b"1234"), "malformed", '"z" overlaps "a"'
    ),
    "empty beyond the end": (
        built({"a": ONE, "z": entry("U8", [0], 9, 9)}, b"1234"), "malformed", "hole of 5 bytes"
    ),
    "empty with bytes": (
        built({"z": entry("U8", [0], 0, 4)}, b"1234"), "malformed", "U8 [0] takes 0 bytes"
    ),
    "shape and offsets differ": (
        built({"a": entry("F32", [2], 0, 4)}, b"1234"), "malformed", "F32 [2] takes 8 bytes"
    ),
    **{
        f"shape {shape}": (
            built({"a": entry("U8", shape, 0, 1)}, b"1"), "malformed", "no list of whole numbers"
        )
        for shape in ([-1], [1.0], [True], ["1"], [None], [[1]], 1, None, "1")
    },
    **{
        f"offsets {begin} {end}": (
            built({"a": entry("U8", [1], begin, end)}, b"1"), "malformed", "no two whole numbers"
        )
        for begin, end in ((-1, 0), (0.0, 1), (False, 1), (False, True), ("0", "1"), (0, None))
    },
    "three offsets": (
        built({"a": {**ONE, "data_offsets": [0, 4, 4]}}, b"1234"), "malformed", "no two whole"
    ),
    "minus zero": (
        built('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "malformed", "no list of"
    ),
    "offset NaN": (
        built('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,NaN]}}', b"1"), "malformed", "NaN"
    ),
    "exponent": (
        built('{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', b"1"),
        "malformed",
        "no list of whole numbers",
    ),
    # dtypes
    **{
        f"dtype {dtype}": (
            built({"a": entry(dtype, [4], 0, 4)}, b"1234"), "malformed", "unknown dtype"
        )
        for dtype in ("F33", "u8", "", None, 8, ["U8"], "\x1b[2J")
    },
    "half a byte": (built({"a": entry("F4", [3], 0, 2)}, b"12"), "malformed", "no whole number"),
    "F6 of 3": (built({"a": entry("F6_E2M3", [3], 0, 3)}, b"123"), "malformed", "no whole number"),
    # the text of the header
    "byte order mark": (built(b"\xef\xbb\xbf{}"), "malformed", "begins with b'\\xef'"),
    "leading blank": (built(" {}"), "malformed", "begins with b' '"),
    "UTF-16": (built("{}".encode("utf-16")), "malformed", "begins with b'\\xff'"),
    "NUL padding": (built("{}\0\0"), "malformed", "byte 9 of the header"),
    "NUL after a tensor": (
        built(json.dumps({"a": ONE}) + "\0", b"1234"), "malformed", "its last brace and blanks"
    ),
    "lone surrogate": (built({"\ud800": ONE}, b"1234"), "malformed", "half of a surrogate pair"),
    "no UTF-8": (built(b'{"\xff":%b}' % json.dumps(ONE).encode(), b"1234"), "malformed", "UTF-8"),
    "control character raw": (
        built('{"a\x1b[2J":' + json.dumps(ONE) + "}", b"1234"), "malformed", "byte 9 of the header"
    ),
    "comma at the end": (
        built(json.dumps({"a": ONE})[:-1] + ",}", b"1234"), "malformed", "found }"
    ),
    "comma at the start": (built('{,"a":1}'), "malformed", "found ,"),
    "comma missing": (
        built(json.dumps({"a": ONE, "b": ONE}).replace("}, ", "} "), b"1234"), "malformed", "byte 9"
    ),
    "brace at the end twice": (
        built(json.dumps({"a": ONE}) + "}", b"1234"), "malformed", "its last brace and blanks"
    ),
    "two headers": (built("{}{}"), "malformed", "byte 9 of the header"),
    "a list": (built("[]"), "malformed", "begins with b'['"),
    "never closed": (built(json.dumps({"a": ONE})[:-1], b"1234"), "malformed", "byte 9"),
    "string never closed": (built('{"a' + "\\\\" * 1000), "malformed", "byte 9"),
    **{
        f"metadata {value}": (
            built(f'{{"__metadata__":{value}}}'), "malformed", "__metadata__ with strings"
        )
        for value in (
            '{"a":1}', '{"a":null}', '{"a":{"b":"c"}}', '{"a":["b"]}', "[]", '"a"', "1"
        )
    },
    "metadata with a comma at the end": (
        built('{"__metadata__":{"a":"b",}}'), "malformed", "no valid JSON"
    ),
    "a tensor named metadata in escapes": (
        built(r'{"\u005f_metadata__":' + json.dumps(ONE) + "}", b"1234"),
        "malformed",
        "may only hold strings by name",
    ),
    "more metadata than anyone writes": (
        built({"__metadata__": {str(i): "" for i in range(65_537)}}), "malformed", "byte 9"
    ),
    # other files
    "empty": (b"", "truncated", "x.safetensors is empty"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "truncated", "7 bytes are too few for any header"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "not_weights",
        "a git-lfs pointer; run `git lfs pull`",
    ),
    "web page": (b"\n<!DOCTYPE html><html><body>401</body></html>", "not_weights", "a web page"),
    "web page without doctype": (b"<html lang='en'>", "not_weights", "a web page"),
    "cloud error": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "not_weights", "web page"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "not_weights", "gzip"),
    "zip": (b"PK\x03\x04\x00\x00\x08\x08\x00\x00", "not_weights", "a zip archive"),
    "empty zip": (b"PK\x05\x06" + b"\0" * 18, "not_weights", "an empty zip archive"),
    "GGUF": (b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0", "not_weights", "GGUF"),
    "pickle": (b"\x80\x02}q\x00(X\x01\x00\x00\x00a", "not_weights", "a pickle"),
    "JSON text": (b'{"error": "not found"}', "not_weights", "JSON text"),
}  # fmt: skip
