"""The safetensors container: headers walked by our own few lines, files written header-first."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from loratools.adapter import DTYPE_BITS, Leaf, Source
from loratools.containers import strict_json
from loratools.containers.local import LocalFile
from loratools.containers.looks import what_it_is
from loratools.errors import error, shown

HEADER_LIMIT = 50_000_000  # bytes; 138,850 per-expert tensors take 20 MB
METADATA = "__metadata__"
METADATA_STRINGS = 65_536  # trainers write some hundred
ENTRY_LIMIT = 4_000  # bytes; eight dimensions take 300
DIMENSIONS = 8
EXTENT = 1 << 40
_TOTAL = 1 << 60  # elements, zeros left out: the library multiplies in 64 bits
_FIELDS = {"dtype", "shape", "data_offsets"}

Described = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says before its data: leaves by name, in the order of their data.

    `data_start` is the offset of the first tensor byte; `digest` the sha256 of all bytes before.
    """

    leaves: dict[str, Leaf]
    metadata: dict[str, str]
    data_start: int
    digest: str


def read_header(source: Source) -> Header:
    """The header of a safetensors file (huggingface/safetensors: README "Format").

    Accepts a part of what the library accepts; specs/formats/safetensors.md lists the rest with
    reasons. Raises malformed, truncated, duplicate, or not_weights for a file of another sort.
    """
    if not isinstance(source, LocalFile):
        return _read(source)
    kept = _recent(source)
    return replace(kept, leaves=dict(kept.leaves), metadata=dict(kept.metadata))


@lru_cache(maxsize=2)  # every format that asks what a file is reads its header
def _recent(source: LocalFile) -> Header:
    return _read(source)


def _read(source: Source) -> Header:
    what = shown(source.name)
    start = 8 + _header_length(source)
    raw = source.read(0, start)
    metadata: dict[str, str] | None = None
    leaves: dict[str, Leaf] = {}
    for name, value in _members(raw, what):
        if name in leaves or (name == METADATA and metadata is not None):
            raise error("duplicate", f'{what}: "{shown(name)}" stands twice in the header')
        if name == METADATA:
            metadata = _metadata(value, what)
        else:
            leaves[name] = _leaf(name, value, source, start, what)
    in_order = sorted(leaves.values(), key=lambda leaf: (leaf.offset, leaf.nbytes))
    _require_gapless(in_order, start, source)
    return Header(
        {leaf.name: leaf for leaf in in_order},
        metadata or {},
        start,
        hashlib.sha256(raw).hexdigest(),
    )


def _header_length(source: Source) -> int:
    what = shown(source.name)
    if source.size == 0:
        raise error("truncated", f"{what} is empty; fetch it again")
    head = source.read(0, min(source.size, 64))
    length = int.from_bytes(head[:8], "little")
    rest = source.size - 8
    if head[8:9] == b"{" and 2 <= length <= min(rest, HEADER_LIMIT):
        return length
    if sort := what_it_is(head):
        raise error("not_weights", f"{what} is no safetensors file but {sort}")
    if rest < 2:
        raise error("truncated", f"{what}: {source.size} bytes are too few for any header")
    if length > HEADER_LIMIT:
        raise error(
            "malformed",
            f"{what}: bytes 0-7 promise a header of {length} bytes, at most {HEADER_LIMIT} "
            "are read; no safetensors file, or a damaged one",
        )
    if head[8:9] != b"{":
        raise error("malformed", f'{what}: the header begins with {head[8:9]!r}, not with "{{"')
    if length < 2:
        raise error("malformed", f"{what}: bytes 0-7 promise a header of {length} bytes")
    raise error(
        "truncated",
        f"{what}: the header has {length} bytes and {length - rest} of them are missing, and "
        "all data; fetch the file again",
    )


# Blanks, and a string as escaped. Nothing here backtracks: hostile text takes no longer than
# honest text.
_B = rb"[ \t\r\n]*+"
_S = rb'"[^"\\\x00-\x1f]*+(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*+)*+"'
_END = rb"%b(?:,|(?=\}))" % _B
_ENTRIES = re.compile(
    rb'(?:%b(?!"%b")%b%b:%b\{[^{}]{0,%d}+\}%b){1,%d}+'
    % (_B, METADATA.encode(), _S, _B, _B, ENTRY_LIMIT, _END, 512)
)
_STRINGS = re.compile(
    rb'%b"%b"%b:%b(?:null|\{%b(?:%b%b:%b%b%b%b){0,%d}+\})%b'
    % (_B, METADATA.encode(), _B, _B, _B, _S, _B, _B, _S, _END, _B, METADATA_STRINGS, _END)
)
_CLOSE = re.compile(rb"%b\}%b\Z" % (_B, _B))


def _members(raw: bytes, what: str) -> Iterator[tuple[str, Any]]:
    """Names and values of the header, some hundred decoded at a time.

    Decoded whole, a header takes up to thirty times its size in memory; so does a value that is
    neither an entry nor strings by name, which is why the shape of both is looked at before.
    """
    at, more = 9, not _CLOSE.match(raw, 9)
    while more:
        part = _ENTRIES.match(raw, at) or _STRINGS.match(raw, at)
        if part is None:
            found = shown(raw[at : at + 100].decode(errors="replace"))
            raise error(
                "malformed",
                f'{what}: byte {at} of the header: expected "name": {{entry}} (of at most '
                f"{ENTRY_LIMIT} bytes), or {METADATA} with strings, found {found}",
            )
        text = part[0].removesuffix(b",")
        where = f"{what}: header from byte {at}"
        yield from strict_json.loads(b"{%b}" % text, where, limit=HEADER_LIMIT).items()
        at, more = part.end(), part[0].endswith(b",")
    if not _CLOSE.match(raw, at):
        raise error(
            "malformed", f"{what}: byte {at} of the header: expected its last brace and blanks"
        )


def _metadata(found: Any, what: str) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not {str}.issuperset(map(type, found.values())):
        raise error("malformed", f"{what}: {METADATA} may only hold strings by name")
    return found


def _leaf(name: str, entry: dict[str, Any], source: Source | None, start: int, what: str) -> Leaf:
    if fault := _fault(entry):
        raise error("malformed", f'{what}: tensor "{shown(name)}": {fault}')
    begin: int = entry["data_offsets"][0]
    return Leaf(name, entry["dtype"], tuple(entry["shape"]), source, start + begin)


def _fault(entry: dict[str, Any]) -> str | None:
    """What is wrong with a tensor's entry, in words."""
    if entry.keys() != _FIELDS:
        if absent := _FIELDS - entry.keys():
            return f"its entry lacks {', '.join(sorted(absent))}"
        extra = shown(", ".join(sorted(entry.keys() - _FIELDS)))
        return f"its entry has unknown fields ({extra})"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"unknown dtype {shown(dtype)}"
    if not _wholes(shape):
        return f"its shape {shown(shape)} is no list of whole numbers"
    if len(shape) > DIMENSIONS:
        return f"{len(shape)} dimensions, at most {DIMENSIONS} are read"
    if max(shape, default=0) > EXTENT or math.prod(filter(None, shape)) > _TOTAL:
        return f"its shape {shown(shape)} is larger than any tensor"
    nbytes, odd = divmod(math.prod(shape) * DTYPE_BITS[dtype], 8)
    if odd:
        return f"{dtype} {shown(shape)} is no whole number of bytes"
    if not _wholes(offsets) or len(offsets) != 2:
        return f"its data_offsets {shown(offsets)} are no two whole numbers"
    begin, end = offsets
    if end - begin != nbytes:
        return (
            f"{dtype} {shown(shape)} takes {nbytes} bytes, its data_offsets {shown(offsets)} "
            f"hold {end - begin}"
        )
    return None


def _wholes(found: Any) -> bool:
    # By type: True and 1.0 equal 1, and the library refuses both.
    return (
        isinstance(found, list)
        and {int}.issuperset(map(type, found))
        and min(found, default=0) >= 0
    )


def _require_gapless(leaves: list[Leaf], start: int, source: Source) -> None:
    """That the leaves, sorted, cover all bytes after the header exactly once."""
    what = shown(source.name)
    at = start
    for i, leaf in enumerate(leaves):
        if leaf.offset != at:
            before = f'"{shown(leaves[i - 1].name)}"' if i else "the header"
            how = (
                f"overlaps {before} by {at - leaf.offset} bytes"
                if leaf.offset < at
                else f"leaves a hole of {leaf.offset - at} bytes after {before}"
            )
            raise error("malformed", f'{what}: tensor "{shown(leaf.name)}" {how}')
        at += leaf.nbytes
    if at > source.size:
        raise error(
            "truncated",
            f"{what}: {at - source.size} bytes are missing at the end ({source.size} of {at}); "
            "fetch the file again",
        )
    if at < source.size:
        raise error(
            "malformed",
            f"{what}: {source.size - at} bytes follow the last tensor; nothing may stand there",
        )


# ---------------------------------------------------------------------------------------------


def aligned(tensors: Iterable[Described]) -> list[Described]:
    """The tensors by size of their elements, largest first, otherwise in the given order.

    Since no holes are allowed, this order is what keeps every tensor aligned to its dtype.
    """
    return sorted(tensors, key=lambda described: -DTYPE_BITS[described[1]])


def plan_layout(
    tensors: Iterable[Described], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and each tensor's absolute offset, in the given order.

    The same arguments give the same bytes. Raises malformed or duplicate where `read_header`
    would.
    """
    table: dict[str, Any] = {}
    if metadata:
        table[METADATA] = _metadata(dict(sorted(metadata.items())), "the output")
    leaves: dict[str, Leaf] = {}
    at = 0
    for name, dtype, shape in tensors:
        if name in leaves or name == METADATA:
            raise error("duplicate", f'the output would have "{shown(name)}" twice')
        nbytes = Leaf(name, dtype, shape).nbytes
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        leaves[name] = _leaf(name, table[name], None, 0, "the output")
        at += nbytes
    try:
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as cause:
        bad = shown(cause.object[cause.start : cause.start + 40])
        raise error(
            "malformed", f"the output's header would hold half a character: {bad}"
        ) from None
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise error(
            "malformed",
            f"the output's header would have {len(text)} bytes, at most {HEADER_LIMIT} are read; "
            "write several files",
        )
    start = 8 + len(text)
    return (
        len(text).to_bytes(8, "little") + text,
        {name: start + leaf.offset for name, leaf in leaves.items()},
    )


def write(path: Path, tensors: Mapping[str, Leaf], metadata: Mapping[str, str]) -> str:
    """Writes a whole file to `path`, one tensor in memory at a time, and makes it durable.

    The sha256 of the file in hex. Raises disk_full or storage, and what reading a leaf raises;
    a file begun is left behind.
    """
    order = aligned((name, leaf.dtype, leaf.shape) for name, leaf in tensors.items())
    head, _ = plan_layout(order, metadata)
    digest = hashlib.sha256(head)
    try:
        with path.open("wb") as file:
            file.write(head)
            for name, _, _ in order:
                raw = tensors[name].read()
                assert len(raw) == tensors[name].nbytes, name
                digest.update(raw)
                file.write(raw)
            file.flush()
            os.fsync(file.fileno())
    except OSError as cause:
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise error(
            "disk_full" if full else "storage",
            f"{shown(path)} cannot be written: {cause.strerror}",
        ) from cause
    return digest.hexdigest()
