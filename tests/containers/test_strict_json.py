"""Strict JSON: all that the standard reader would let pass, and nothing valid refused."""

import json
import math
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loratools.containers import strict_json
from loratools.errors import LoratoolsError, MalformedError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text('[]{}"\\a', max_size=3), inner)
    ),
    max_leaves=20,
)


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_reads_what_python_writes(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    found = strict_json.loads(text.encode(), "x", depth=64)
    assert found == value
    assert json.dumps(found) == json.dumps(value)


# Fragments from which both valid and broken texts arise often.
PIECES = st.sampled_from(
    [*'{}[]":,\\ ', '"a"', '"a":', "1", "-0", "1e5", "null", "NaN", '"\\u00e9"', "\n", "\x01"]
)


@given(st.lists(PIECES, max_size=12).map("".join))
@example('["\\\\"]')
@example('["\\""]')
def test_accepts_only_what_python_accepts_with_the_same_value(text):
    try:
        found = strict_json.loads(text.encode(), "x")
    except MalformedError:
        return
    assert found == json.loads(text)


REFUSED = {
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "UTF-16 with mark": ('{"a": 1}'.encode("utf-16"), "UTF-16"),
    "UTF-16 big-endian": (b"\xfe\xff\0{\0}", "UTF-16"),
    "UTF-16 without mark": ('{"a": 1}'.encode("utf-16-le"), "NUL at byte 1"),
    "NUL padding": (b"{}\0\0", "NUL at byte 2"),
    "NUL in a string": (b'"\0"', "NUL at byte 1"),
    "Latin-1": (b'"\xe9"', "no UTF-8 at byte 1"),
    "overlong": (b'"\xc0\x80"', "no UTF-8 at byte 1"),
    "surrogate as bytes": (b'"\xed\xa0\x80"', "no UTF-8 at byte 1"),
    "first half": (rb'["\ud800"]', "half of a surrogate pair"),
    "second half": (rb'["\uDC00x"]', "half of a surrogate pair"),
    "half in a key": (rb'{"\ud800\ud800": 1}', "half of a surrogate pair"),
    "NaN": (b'{"lora_alpha": NaN}', "NaN"),
    "Infinity": (b"[Infinity]", "Infinity"),
    "minus Infinity": (b"[-Infinity]", "-Infinity"),
    "float too large": (b"[1e400]", "1e400 is too large"),
    "float too small": (b"[-1e400]", "too large"),
    "whole number too large": (b"[1" + b"0" * 400 + b"]", "too large"),
    "minus whole number": (b"[-1" + b"0" * 400 + b"]", "too large"),
    "100,000 digits": (b"[" + b"7" * 100_000 + b"]", "too large"),
    "nothing": (b"", "Expecting value"),
    "cut off": (b'{"a": 1', "line 1, column 8"),
    "two values": (b"{}{}", "Extra data"),
    "comma at the end": (b"[1,]", "no valid JSON"),
    "leading zero": (b"[01]", "no valid JSON"),
    "plus": (b"[+1]", "no valid JSON"),
    "single quotes": (b"{'a': 1}", "no valid JSON"),
    "comment": (b"{} // x", "Extra data"),
    "control character": (b'"\x1b[2J"', "control character"),
    "bad escape": (rb'"\x41"', "escape"),
    "wrong bracket": (b"[}", "no valid JSON"),
    "33 levels": (b"[" * 33 + b"]" * 33, "deeper than 32"),
    "100,000 levels": (b"[" * 100_000 + b"]" * 100_000, "deeper than 32"),
    "100,000 objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deeper than 32"),
    "100,000 levels never closed": (b"[" * 100_000, "deeper than 32"),
    "levels behind a string": (b'["\\\\","[",' + b"[" * 33 + b"]" * 34, "deeper than 32"),
    "too long": (b" " * 999_999 + b"{}", "at most 1000000"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_refused(row):
    raw, fragment = REFUSED[row]
    # As other libraries leave it behind: our own limit must come first.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    try:
        with pytest.raises(MalformedError) as caught:
            strict_json.loads(raw, "config.json")
    finally:
        sys.setrecursionlimit(limit)
    assert caught.value.code == "malformed"
    assert caught.value.message.startswith("config.json: ")
    assert fragment in caught.value.message
    assert len(caught.value.message) < 300


ACCEPTED = {
    "a pair of surrogates": (rb'"\ud83d\ude00"', "\U0001f600"),
    "a backslash before u": (rb'"\\ud800"', r"\ud800"),
    "an escaped NUL": (rb'"\u0000"', "\0"),
    "32 levels": (b"[" * 32 + b"]" * 32, None),
    "33 levels inside a string": (b'["' + b"[" * 33 + b'"]', ["[" * 33]),
    "brackets behind escapes": (rb'["\\", "\"[[[[", "\\\"]]"]', ["\\", '"[[[[', '\\"]]']),
    "many siblings": (b"[" + b"{}," * 1000 + b"[]]", [{}] * 1000 + [[]]),
    "the largest float": (b"1.7976931348623157e308", sys.float_info.max),
    "long whole number": (b"1" + b"0" * 308, 10**308),
    "blanks": (b"\r\n\t {} \n", {}),
}


@pytest.mark.parametrize("row", ACCEPTED)
def test_accepted(row):
    raw, value = ACCEPTED[row]
    found = strict_json.loads(raw, "x")
    assert found == (value if value is not None else json.loads(raw))


def test_minus_zero_is_a_float():
    found = strict_json.loads(b"[-0, 0]", "x")
    assert [type(n) for n in found] == [float, int]
    assert math.copysign(1, found[0]) == -1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            b'{"lora_alpha": 8, "r": 4, "lora_alpha": 800}',
            'a/config.json: "lora_alpha" stands twice (8 and 800)',
        ),
        (rb'[{"a": "x", "\u0061": "y"}]', "a/config.json: \"a\" stands twice ('x' and 'y')"),
        (rb'{"\u001b[2J":1,"\u001b[2J":1}', r'a/config.json: "\x1b[2J" stands twice (1 and 1)'),
    ],
)
def test_a_key_may_stand_once(raw, message):
    with pytest.raises(MalformedError) as caught:
        strict_json.loads(raw, "a/config.json")
    assert caught.value.code == "duplicate"
    assert caught.value.message == message


def test_a_huge_value_standing_twice_is_cut_short():
    raw = b'{"a": [%b], "a": "%b"}' % (b",".join([b"[[[[]]]]"] * 10_000), b"x" * 10_000)
    with pytest.raises(MalformedError, match="stands twice") as caught:
        strict_json.loads(raw, "x")
    assert len(caught.value.message) < 300


def test_limits_can_be_set():
    assert strict_json.loads(b"[[1]]", "x", limit=5, depth=2) == [[1]]
    for limits in ({"limit": 4}, {"depth": 1}):
        with pytest.raises(LoratoolsError):
            strict_json.loads(b"[[1]]", "x", **limits)


def test_what_a_caller_names_is_safe_to_print():
    with pytest.raises(MalformedError) as caught:
        strict_json.loads(b"", "a\x1b[2Jb")
    assert caught.value.message.isprintable()


def measured(value) -> int:
    if isinstance(value, dict):
        return 1 + max(map(measured, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(measured, value), default=0)
    return 0


@given(VALUES, st.integers(0, 6), st.integers(1, 9))
def test_depth_is_counted_as_a_reader_nests(value, depth, slice_):
    raw = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict_json, "_SLICE", slice_)
        assert strict_json._deeper(raw, depth) == (measured(value) > depth)
