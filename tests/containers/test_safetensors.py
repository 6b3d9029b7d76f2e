"""The safetensors container: bytes spelt out, a hostile corpus, and the library as the judge."""

import hashlib
import json
import os
import stat
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter import DTYPE_BITS, TORCH_NAMES, Leaf
from loratools.containers import safetensors as ours
from loratools.containers.local import LocalFile
from loratools.errors import LoratoolsError, MalformedError


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


def read(raw: bytes) -> ours.Header:
    return ours.read_header(Memory(raw))


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


# ------------------------------------------------------------------------- what is read, in bytes


def test_header_spelt_out():
    raw = (
        b"\x88\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"U8","shape":[],"data_offsets":[4,5]},'
        b'"b":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}'
        b"\x00\x3c\x00\xc0\x07"
    )
    header = read(raw)
    assert list(header.leaves) == ["b", "a"]
    assert header.metadata == {"format": "pt"}
    assert header.data_start == 8 + 0x88
    assert header.digest == hashlib.sha256(raw[: 8 + 0x88]).hexdigest()
    a, b = header.leaves["a"], header.leaves["b"]
    assert (a.name, a.dtype, a.shape, a.offset) == ("a", "U8", (), 8 + 0x88 + 4)
    assert (b.name, b.dtype, b.shape, b.offset) == ("b", "F16", (2,), 8 + 0x88)
    assert a.read() == b"\x07"
    assert b.numbers() == (1.0, -2.0)


def test_layout_spelt_out():
    head, offsets = ours.plan_layout(
        [("é", "F32", (2, 1)), ("half", "BF16", (3,)), ("none", "F4", (0, 5))],
        {"z": "1", "format": "pt"},
    )
    text = (
        '{"__metadata__":{"format":"pt","z":"1"},'
        '"é":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        '"half":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},'
        '"none":{"dtype":"F4","shape":[0,5],"data_offsets":[14,14]}}'
    ).encode()
    assert len(text) == 213
    text += b"   "
    assert head == struct.pack("<Q", len(text)) + text
    assert offsets == {"é": len(head), "half": len(head) + 8, "none": len(head) + 14}


def test_nothing_at_all():
    assert ours.plan_layout([], {}) == (b"\x08\0\0\0\0\0\0\0{}      ", {})
    assert read(b"\x08\0\0\0\0\0\0\0{}      ").leaves == {}


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


@pytest.mark.parametrize("row", ACCEPTED)
def test_accepted_as_by_the_library(row):
    assert_library_agrees(ACCEPTED[row], read(ACCEPTED[row]))


def assert_library_agrees(raw: bytes, header: ours.Header) -> None:
    found = safetensors.deserialize(raw)
    assert {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found} == {
        name: (leaf.dtype, leaf.shape, leaf.read()) for name, leaf in header.leaves.items()
    }


def test_metadata_as_by_the_library(tmp_path):
    for i, raw in enumerate(ACCEPTED.values()):
        path = tmp_path / str(i)
        path.write_bytes(raw)
        with safetensors.safe_open(path, "pt") as file:
            assert read(raw).metadata == (file.metadata() or {})


# ----------------------------------------------------------------------------- the hostile corpus

Hostile = tuple[bytes, str, str]
HOSTILE: dict[str, Hostile] = {
    # A1 row 1, 2
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
    # 3
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
    # 4
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
    # 6
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
    # 7, 8, 9
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
    # 10
    **{
        f"dtype {dtype}": (
            built({"a": entry(dtype, [4], 0, 4)}, b"1234"), "malformed", "unknown dtype"
        )
        for dtype in ("F33", "u8", "", None, 8, ["U8"], "\x1b[2J")
    },
    "half a byte": (built({"a": entry("F4", [3], 0, 2)}, b"12"), "malformed", "no whole number"),
    "F6 of 3": (built({"a": entry("F6_E2M3", [3], 0, 3)}, b"123"), "malformed", "no whole number"),
    # 14
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
    # 15
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


@pytest.mark.parametrize("row", HOSTILE)
def test_refused(row):
    raw, code, fragment = HOSTILE[row]
    with pytest.raises(MalformedError) as caught:
        read(raw)
    assert caught.value.code == code
    assert fragment in caught.value.message
    assert caught.value.message.startswith("x.safetensors")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500


# ------------------------------------------------------------------------ the library as the judge


def mutated(draw: st.DrawFn) -> bytes:
    """A sound file, or one with up to two things changed."""
    names = draw(st.lists(st.sampled_from(["a", "b", "é", "", "ab"]), max_size=4, unique=True))
    pairs: list[tuple[str, object]] = []
    at = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 4]), max_size=3))
        shape += [4] * (DTYPE_BITS[dtype] < 8)
        nbytes = Leaf(name, dtype, tuple(shape)).nbytes
        pairs.append((name, entry(dtype, shape, at, at + nbytes)))
        at += nbytes
    if draw(st.booleans()):
        pairs.append(
            ("__metadata__", draw(st.sampled_from([{}, {"a": "b"}, None, {"a": "1", "b": "2"}])))
        )
    pairs = draw(st.permutations(pairs))
    raw = bytearray(built(pairs, bytes(at)))
    for _ in range(draw(st.integers(0, 2))):
        where = draw(st.integers(0, len(raw)))
        piece = draw(st.sampled_from([b"", b"0", b"1", b"-", b" ", b",", b'"', b"{", b"}", b"[]"]))
        raw[where : where + draw(st.integers(0, 1))] = piece
        if where > 8:  # mostly the header is to be judged, not its length
            found = raw.rfind(b"}") + 1
            raw[:8] = struct.pack("<Q", max(0, found - 8))
    return bytes(raw)


@settings(max_examples=400)
@given(st.composite(mutated)())
def test_what_we_accept_the_library_accepts_alike(raw):
    try:
        header = read(raw)
    except MalformedError:
        return
    assert_library_agrees(raw, header)


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda s: s != "__metadata__"),
        st.tuples(
            st.sampled_from(sorted(TORCH_NAMES)),
            st.lists(st.integers(0, 3), max_size=4),
        ),
        max_size=6,
    ),
    st.none() | st.dictionaries(st.text(st.characters(codec="utf-8")), st.text('ab\\"{}é\n')),
)
def test_what_the_library_writes_is_accepted(tensors, metadata):
    held = {
        name: torch.zeros(shape, dtype=getattr(torch, TORCH_NAMES[dtype]))
        for name, (dtype, shape) in tensors.items()
    }
    # Of no tensors and an empty dict, 0.8.0 makes a header that it cannot read back itself.
    raw = safetensors.torch.save(held, metadata if held else metadata or None)
    header = read(raw)
    assert_library_agrees(raw, header)
    assert header.metadata == (metadata or {})


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda s: s != "__metadata__"),
        st.tuples(
            st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.sampled_from([0, 4, 8]), max_size=4)
        ),
        max_size=6,
    ).filter(lambda found: all(DTYPE_BITS[d] > 7 or s for d, s in found.values())),
    st.dictionaries(st.text(st.characters(codec="utf-8")), st.text('ab\\"{}é\n')),
)
def test_what_we_lay_out_the_library_loads(tensors, metadata):
    described = [(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    order = ours.aligned(described)
    head, offsets = ours.plan_layout(order, metadata)
    end = len(head)
    for name, dtype, shape in order:
        assert offsets[name] == end
        assert end * 8 % DTYPE_BITS[dtype] == 0 or DTYPE_BITS[dtype] == 6
        end += Leaf(name, dtype, shape).nbytes
    raw = head + bytes(i % 251 for i in range(end - len(head)))
    header = read(raw)
    assert_library_agrees(raw, header)
    assert list(header.leaves) == [name for name, _, _ in order]
    assert header.metadata == metadata
    assert header.data_start == len(head)


def test_aligned_keeps_the_order_among_equals():
    described = [
        ("c", "F4", (2,)),
        ("b", "BF16", ()),
        ("d", "F64", ()),
        ("a", "F16", ()),
        ("e", "U8", ()),
    ]
    assert "".join(name for name, _, _ in ours.aligned(described)) == "dbaec"


@pytest.mark.parametrize(
    ("described", "metadata", "code", "fragment"),
    [
        ([("a", "U8", (1,)), ("a", "U8", (1,))], {}, "duplicate", '"a" twice'),
        ([("__metadata__", "U8", (1,))], {}, "duplicate", '"__metadata__" twice'),
        ([("a", "F4", (3,))], {}, "malformed", "no whole number of bytes"),
        ([("a", "U8", (1,) * 9)], {}, "malformed", "9 dimensions"),
        ([("a", "U8", (2**41,))], {}, "malformed", "larger than any"),
        ([("\ud800", "U8", (1,))], {}, "malformed", "half a character"),
        ([], {"a": "\udc00"}, "malformed", "half a character"),
        ([], {"a": 1}, "malformed", "strings by name"),
        ([("x" * 50_000_000, "U8", ())], {}, "malformed", "at most 50000000 are read"),
    ],
)
def test_what_could_not_be_read_is_not_laid_out(described, metadata, code, fragment):
    with pytest.raises(LoratoolsError, match=fragment) as caught:
        ours.plan_layout(described, metadata)
    assert caught.value.code == code


# ----------------------------------------------------------------------------------------- writing


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {
        name: torch.randn(3, 5).mul(40).to(getattr(torch, dtype))
        for name, dtype in TORCH_NAMES.items()
    }
    found["scalar"] = torch.tensor(1.5)
    found["none"] = torch.empty(0, 4)
    found["turned"] = torch.arange(6.0).reshape(2, 3).T
    found["../é\n"] = torch.tensor([float("nan"), -0.0])
    return found


def leaves() -> dict[str, Leaf]:
    return {name: Leaf.of(name, tensor) for name, tensor in tensors().items()}


def test_written_files_load_bit_for_bit(tmp_path):
    path = tmp_path / "w.safetensors"
    digest = ours.write(path, leaves(), {"format": "pt", "a": "é"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    for leaf in ours.read_header(LocalFile(path)).leaves.values():
        assert leaf.offset * 8 % DTYPE_BITS[leaf.dtype] == 0
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        bits = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), bits)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "é"}


def test_copies_from_file_to_file_are_equal(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    written = ours.write(first, leaves(), {"b": "1", "a": "2"})
    header = ours.read_header(LocalFile(first))
    assert ours.write(second, header.leaves, {"a": "2", "b": "1"}) == written
    assert first.read_bytes() == second.read_bytes()


def test_a_stored_view_is_written_row_by_row(tmp_path):
    stored = Memory(struct.pack("<6f", *range(6)))
    turned = Leaf("t", "F32", (3, 2), stored, 0, (1, 3))
    ours.write(tmp_path / "w", {"t": turned}, {})
    loaded = safetensors.torch.load_file(tmp_path / "w")["t"]
    assert torch.equal(loaded, torch.arange(6.0).reshape(2, 3).T)


def test_mode_is_the_umask_and_data_reach_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "w"
    synced = []

    def fsync(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    before = os.umask(0o027)
    try:
        ours.write(path, leaves(), {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert synced == [path.stat().st_size]


@pytest.mark.parametrize(("path", "code"), [("/dev/full", "disk_full"), ("no/such", "storage")])
def test_failing_writes(tmp_path, monkeypatch, path, code):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoratoolsError, match="cannot be written") as caught:
        ours.write(Path(path), leaves(), {})
    assert caught.value.code == code


# --------------------------------------------------------------- in 300 MB, in time, without torch

CHILD = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))
signal.alarm(int(sys.argv[2]))
from pathlib import Path
from loratools.containers.local import LocalFile
from loratools.containers.safetensors import read_header
from loratools.errors import LoratoolsError
try:
    print("accepted", len(read_header(LocalFile(Path(sys.argv[1]))).leaves))
except LoratoolsError as refused:
    print(refused.code)
assert not {"torch", "numpy", "safetensors"} & set(sys.modules)
"""


def empties(count: int) -> bytes:
    one = b'"layers.%d.mlp.experts.weight.lora_A":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{%b}" % b",".join(one % i for i in range(count))


def experts(count: int) -> bytes:
    one = (
        b'"base_model.model.model.layers.%d.mlp.experts.%d.gate_proj.lora_A.weight":'
        b'{"dtype":"BF16","shape":[8,2048],"data_offsets":[%d,%d]}'
    )
    members = (one % (i // 2000, i % 2000, i << 15, i + 1 << 15) for i in range(count))
    return b"{%b}" % b",".join(members)


def write_raw(path: Path, raw: bytes, size: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    if size is not None:
        os.truncate(path, 8 + len(raw) + size)


MB = 1_000_000
BOMBS = {
    "length 2^63": (lambda path: path.write_bytes(b"\0\0\0\0\0\0\0\x80{}"), "malformed"),
    "600,000 empty tensors": (lambda path: write_raw(path, empties(600_000)), "malformed"),
    "FIFO": (os.mkfifo, "not_weights"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "not_weights"),
    "empty lists": (
        lambda path: write_raw(path, b'{"a":[' + b"[]," * (16 * MB) + b"[]]}"), "malformed"
    ),
    "short strings": (
        lambda path: write_raw(path, b'{"a":{"dtype":[' + b'"ab",' * (9 * MB) + b'""]}}'),
        "malformed",
    ),
    "short metadata": (
        lambda path: write_raw(path, b'{"__metadata__":{' + b'"ab":"",' * (6 * MB) + b'"":""}}'),
        "malformed",
    ),
    "brackets": (lambda path: write_raw(path, b"{" + b"[" * (49 * MB)), "malformed"),
    "blanks": (lambda path: write_raw(path, b"{" + b" " * (49 * MB)), "malformed"),
    "backslashes": (lambda path: write_raw(path, b'{"' + b"\\" * (49 * MB)), "malformed"),
    "138,850 honest tensors": (
        lambda path: write_raw(path, experts(138_850), 138_850 << 15), "accepted 138850"
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", BOMBS)
def test_bombs(tmp_path, row):
    make, expected = BOMBS[row]
    path = tmp_path / "x.safetensors"
    make(path)
    # The honest one may take as long as a busy machine needs.
    seconds = "60" if expected.startswith("accepted") else "5"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, path, seconds], capture_output=True, text=True
    )
    path.unlink()
    assert (child.stdout.strip(), child.stderr) == (expected, "")


# -------------------------------------------------------------------------------- files of others


def test_field_headers_as_by_the_library(field_data):
    paths = sorted(field_data.rglob("*.safetensors"))
    assert len(paths) > 3
    for path in paths:
        header = ours.read_header(LocalFile(path))
        with safetensors.safe_open(path, "pt") as file:
            assert header.metadata == (file.metadata() or {})
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            assert {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in found.items()} == {
                name: (leaf.dtype, leaf.shape) for name, leaf in header.leaves.items()
            }
