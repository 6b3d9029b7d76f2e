"""The members of a tar archive, plain or gzipped, as sources of bytes; nothing is extracted."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from loratools.adapter import Source
from loratools.errors import error, shown

MEMBERS = 100_000
HEADER = 1 << 20  # bytes of a long name or of extended headers
HELD = 1 << 30  # bytes of a gzipped archive that are unpacked into memory
_BLOCK = 512
_PIECE = 1 << 20
# The most that deflate makes of a byte; a member that claims more than all could make lies.
_RATIO = 1032
_SORTS = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}
_GZIP = 31  # zlib: a gzip header, the largest window


@dataclass(frozen=True, slots=True)
class Inside:
    """A stretch of another source; it implements `loratools.adapter.Source`."""

    name: str
    whole: Source
    start: int
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; storage where there are no such bytes."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise error(
                "storage",
                f"{shown(self.name)}: {length} bytes were asked for at {offset}, "
                f"the member has {self.size}",
            )
        return self.whole.read(self.start + offset, length)


class Unpacked:
    """A gzipped source, unpacked as far as it was read and kept in memory."""

    __slots__ = ("_at", "_held", "_stream", "packed", "size")

    def __init__(self, packed: Source, limit: int) -> None:
        self.packed = packed
        self.size = limit  # the most that may be asked for: the end is known when it is reached
        self._held = bytearray()
        self._stream = zlib.decompressobj(_GZIP)
        self._at = 0

    @property
    def name(self) -> str:
        return self.packed.name

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of what is unpacked; truncated where the stream ends before."""
        end = offset + length
        if end > self.size:
            raise error(
                "malformed",
                f"{shown(self.name)}: more than {self.size} bytes would have to be unpacked into "
                "memory; unpack it with `gzip -d` and give the plain archive",
            )
        while len(self._held) < end:
            if not self._more(end - len(self._held)):
                raise error(
                    "truncated",
                    f"{shown(self.name)}: the gzip stream ends after {len(self._held)} bytes",
                )
        return bytes(memoryview(self._held)[offset:end])

    def _more(self, wanted: int) -> bool:
        """Whether the stream went on."""
        packed = self._stream.unconsumed_tail
        if not packed:
            packed = self.packed.read(self._at, min(_PIECE, self.packed.size - self._at))
            self._at += len(packed)
        if not packed or self._stream.eof:
            return False
        try:
            self._held += self._stream.decompress(packed, max(wanted, _BLOCK))
        except zlib.error as problem:
            raise error("malformed", f"{shown(self.name)}: no gzip: {problem}") from None
        return True


def is_tar(source: Source) -> bool:
    """Whether the bytes begin as a tar archive does, gzipped or not."""
    head = source.read(0, min(source.size, _BLOCK))
    if head.startswith(b"\x1f\x8b\x08"):
        try:
            head = zlib.decompressobj(_GZIP).decompress(
                source.read(0, min(source.size, 1 << 16)), _BLOCK
            )
        except zlib.error:
            return False
    return len(head) == _BLOCK and head[257:262] == b"ustar" and _checks(head)


def members(source: Source) -> dict[str, Inside]:
    """The regular files of a tar archive by name; raises as `walk` does."""
    return dict(walk(source))


def walk(source: Source) -> Iterator[tuple[str, Inside]]:
    """The regular files of a tar archive in order, named without "./" (POSIX pax, GNU tar).

    Folders are left out; a gzipped archive is unpacked into memory, up to `HELD` bytes. Nothing is
    extracted, yet what could only serve to write elsewhere (links, devices, paths out of the
    folder) is refused. Raises hostile, duplicate, malformed, truncated.
    """
    packed = source.read(0, min(source.size, 3)) == b"\x1f\x8b\x08"
    limit = min(HELD, source.size * _RATIO + _BLOCK)
    whole: Source = Unpacked(source, limit) if packed else source
    what = shown(source.name)
    seen: set[str] = set()
    at, said = 0, dict[str, str]()
    for _ in range(MEMBERS):
        if not packed and at == whole.size and seen:
            return  # the two empty blocks at the end are often forgotten
        head = _read(whole, at, _BLOCK, what)
        if not any(head):
            return
        if not _checks(head):
            raise error("malformed", f"{what}: the tar header at byte {at} has a wrong checksum")
        size, sort = _number(head[124:136], what), head[156:157]
        size = _number(said["size"].encode(), what, 10) if "size" in said else size
        extended = sort in (b"x", b"g", b"L", b"K")
        if extended and size > HEADER:
            raise error("hostile", f"{what}: a tar header of {size} bytes")
        start = at + _BLOCK
        if not packed and start + size > whole.size:
            raise error(
                "truncated",
                f"{what}: a member ends at byte {start + size}, the file at {whole.size}; "
                "fetch it again",
            )
        at = start + -(-size // _BLOCK) * _BLOCK
        if extended:
            raw = _read(whole, start, size, what)
            if sort == b"x":
                said |= _pax(raw, what)
            elif sort == b"L":
                said["path"] = _text(raw.rstrip(b"\0"))
            continue
        name = _inside(said.get("path") or _name(head), what)
        sparse = sort == b"S" or any(key.startswith("GNU.sparse") for key in said)
        said = {}
        if sort == b"5":
            continue
        if sort not in (b"0", b"\0", b"7", b"S"):
            kind = _SORTS.get(sort, "no regular file")
            raise error("hostile", f"{what}: {shown(name)} is {kind}, which no adapter needs")
        if sparse:
            raise error("malformed", f"{what}: {shown(name)} is stored with holes; pack it again")
        if name in seen:
            raise error("duplicate", f'{what}: the member "{shown(name)}" stands twice')
        seen.add(name)
        yield name, Inside(f"{source.name}:{name}", whole, start, size)
    raise error("hostile", f"{what}: more than {MEMBERS} members")


def _read(whole: Source, at: int, length: int, what: str) -> bytes:
    if not isinstance(whole, Unpacked) and at + length > whole.size:
        raise error("truncated", f"{what}: the archive ends inside a tar header; fetch it again")
    return whole.read(at, length)


def _checks(head: bytes) -> bool:
    """Whether a header's checksum is right: its bytes, with blanks in the sum's own place."""
    said = head[148:156].strip(b" \0")
    if not said or said.strip(b"01234567"):
        return False
    return int(said, 8) == sum(head[:148]) + 8 * 32 + sum(head[156:])


def _number(said: bytes, what: str, base: int = 8) -> int:
    if said[:1] == b"\x80":  # large sizes stand in base 256
        return int.from_bytes(said[1:], "big")
    digits = said.strip(b" \0")
    if digits.strip(b"0123456789"[:base]) or len(digits) > 20:
        raise error("malformed", f"{what}: a tar header says the size {shown(digits)}")
    return int(digits or b"0", base)


def _name(head: bytes) -> str:
    name = _text(head[:100].split(b"\0")[0])
    front = _text(head[345:500].split(b"\0")[0]) if head[257:263] == b"ustar\0" else ""
    return f"{front}/{name}" if front else name


def _inside(name: str, what: str) -> str:
    """A name without what changes nothing in it, as every reader would find it."""
    pieces = [piece for piece in name.split("/") if piece not in ("", ".")]
    if name.startswith("/") or ".." in pieces or "\\" in name:
        raise error("hostile", f"{what}: the member {shown(name)} would lie outside the archive")
    return "/".join(pieces)


def _pax(raw: bytes, what: str) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of an extended header."""
    found: dict[str, str] = {}
    at = 0
    while at < len(raw):
        digits = raw[at : at + 20].split(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = raw[at + len(digits) + 1 : at + length]
        if not length or at + length > len(raw) or b"=" not in record:
            raise error("malformed", f"{what}: an extended tar header is damaged")
        key, _, value = record.removesuffix(b"\n").partition(b"=")
        found[_text(key)] = _text(value)
        at += length
    return found


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
