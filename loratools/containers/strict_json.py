"""JSON read strictly: one meaning per text, nothing infinite, nothing deep, nothing twice."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from loratools.errors import error, shown

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_PLAIN = bytes(b for b in range(256) if b not in b'[]{}"')
_SLICE = 1 << 20


def loads(raw: bytes, what: str, *, limit: int = 1_000_000, depth: int = 32) -> Any:
    """The value of a JSON text in UTF-8; `what` is how messages call the text.

    Raises malformed (also for a byte order mark, UTF-16, NUL, lone surrogates, NaN, Infinity,
    numbers beyond float64, more than `limit` bytes or `depth` levels) and duplicate for a key
    that stands twice in one object. "-0" is the float, so that it never passes for an index.
    """
    try:
        return _loads(raw, limit, depth)
    except _Refused as cause:
        # Not cut short where it is safe: callers compose it of a path and a place in the file.
        where = what if what.isprintable() else shown(what)
        raise error(cause.code, f"{where}: {cause.message}") from None


def require(found: Any, fields: Mapping[str, str], what: str) -> dict[str, Any]:
    """An object in which every one of `fields` holds what it must, or null; others hold anything.

    `fields` gives each its sort, a key of `SORTS`. Raises malformed.
    """
    where = what if what.isprintable() else shown(what)
    if not isinstance(found, dict):
        raise error("malformed", f"{where} holds a {type(found).__name__}, expected an object")
    for name, sort in fields.items():
        value = found.get(name)
        if value is not None and not SORTS[sort](value):
            raise error(
                "malformed", f"{where}: {name} is {shown(reprlib.repr(value))}, expected {sort}"
            )
    return found


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and {str}.issuperset(map(type, value))


SORTS: dict[str, Callable[[Any], bool]] = {
    "true or false": lambda value: isinstance(value, bool),
    "text": lambda value: isinstance(value, str),
    "an object": lambda value: isinstance(value, dict),
    "a list of texts": _are_texts,
    "text or a list of texts": lambda value: isinstance(value, str) or _are_texts(value),
}


class _Refused(Exception):
    def __init__(self, message: str, code: str = "malformed") -> None:
        self.message, self.code = message, code


def _loads(raw: bytes, limit: int, depth: int) -> Any:
    if len(raw) > limit:
        raise _Refused(f"{len(raw)} bytes of JSON, at most {limit} are read")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise _Refused("begins with a byte order mark; save it as UTF-8 without one")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _Refused("is UTF-16; save it as UTF-8")
    if (nul := raw.find(b"\0")) >= 0:
        raise _Refused(f"NUL at byte {nul}; it is UTF-16 or damaged, JSON is text in UTF-8")
    try:
        text = raw.decode()
    except UnicodeDecodeError as cause:
        raise _Refused(f"no UTF-8 at byte {cause.start}; save it as UTF-8") from None
    if raw.count(b"[") + raw.count(b"{") > depth and _deeper(raw, depth):
        raise _Refused(f"nested deeper than {depth} levels")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as cause:
        where = f"line {cause.lineno}, column {cause.colno}"
        raise _Refused(f"no valid JSON: {cause.msg} ({where})") from None
    if b"\\u" in raw and _SURROGATE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _Refused("a string holds half of a surrogate pair") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) == len(pairs):
        return whole
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            both = f"{shown(reprlib.repr(found[key]))} and {shown(reprlib.repr(value))}"
            raise _Refused(f'"{shown(key)}" stands twice ({both})', "duplicate")
        found[key] = value
    return found


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Refused(f"the number {shown(digits)} is too large")
    return value


def _int(digits: str) -> int | float:
    if len(digits) > 300:  # near the end of float64, and before int() itself gives up
        _float(digits)
    return -0.0 if digits == "-0" else int(digits)


def _constant(word: str) -> Any:
    raise _Refused(f"{word} is no JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_float, parse_int=_int, parse_constant=_constant
)


def _deeper(raw: bytes, depth: int) -> bool:
    """Whether brackets outside strings nest deeper than `depth`, told before anything recurses.

    Each pass over the bare brackets takes away the innermost pairs, so that `depth` passes must
    leave none. Unpaired brackets are left for the parser to name, up to `depth` of them.
    """
    bare = raw.replace(rb"\\", b"").replace(rb"\"", b"").translate(_BRACKETS, _PLAIN)
    bare = bare.replace(b'""', b"")  # strings without brackets; the others are cut out below
    if b'"' in bare:
        outside: list[bytes] = []
        inside = 0
        for at in range(0, len(bare), _SLICE):
            parts = bare[at : at + _SLICE].split(b'"')
            outside.append(b"".join(parts[inside::2]))
            inside = (inside + len(parts) - 1) % 2
        bare = b"".join(outside)
    for _ in range(depth):
        bare = bare.replace(b"[]", b"")
    return b"[]" in bare or bare.count(b"[") > depth
