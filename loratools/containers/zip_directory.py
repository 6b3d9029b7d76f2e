"""The directory of a zip archive: where each member lies, told in one way only."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from loratools.adapter import Source
from loratools.errors import LoratoolsError, error, shown

LIMIT = 64 << 20  # bytes of directory, about 700,000 members

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ4x2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s4x2H4x3L4H2x2L")
_LOCAL = struct.Struct("<4s2x2H4x3L2H")

_LATER = 1 << 3  # flag: sizes stand behind the data, as torch writes them
_UTF8 = 1 << 11
_FOLDER = 1 << 4
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the zip64 field"
_ZIP64, _OTHER_NAME = 0x0001, 0x7075


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member's bytes begin in the file, how many they are, and their compression."""

    start: int
    size: int
    method: int  # 0: stored as they are


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of the directory; `at` is the offset of the member's local header."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    at: int


def members(source: Source) -> dict[str, Member]:
    """The members of a zip by name, in the order of their data (PKWARE APPNOTE 6.3.10).

    The directory and the local headers must agree, and the members must cover the file from its
    first byte to the directory exactly once, so that no reader can find anything else in it.
    Nothing is expanded. Raises truncated, duplicate, hostile, malformed.
    """
    what = shown(source.name)
    count, size, start = _directory(source)
    if size > LIMIT:
        raise error(
            "malformed", f"{what}: a zip directory of {size} bytes, at most {LIMIT} are read"
        )
    entries = sorted(_entries(source.read(start, size), count, what), key=lambda entry: entry.at)
    found: dict[str, Member] = {}
    folded: set[str] = set()  # torch looks members up without regard to case
    at = 0  # where the data of the member before ends
    before: _Entry | None = None
    for entry in entries:
        name = _name(entry, what)
        if name.lower() in folded:
            raise error("duplicate", f'{what}: the zip member "{shown(name)}" stands twice')
        folded.add(name.lower())
        gap = _gap(at, entry.at, f'"{shown(name)}"', what)
        raw = source.read(at, min(gap + _LOCAL.size + len(entry.name), source.size - at))
        _require_sizes_again(before, raw[:gap], what)
        data = entry.at + _local_length(raw[gap:], entry, source)
        found[name] = Member(data, entry.packed, entry.method)
        at, before = data + entry.packed, entry
    gap = _gap(at, start, "the directory", what)
    _require_sizes_again(before, source.read(at, gap), what)
    return found


def _directory(source: Source) -> tuple[int, int, int]:
    """How many members the directory lists, how many bytes it has, where it begins."""

    def malformed(message: str) -> LoratoolsError:
        return error("malformed", f"{shown(source.name)}: {message}")

    length = min(source.size, _END.size + _LOCATOR.size + _END64.size)
    tail = source.read(source.size - length, length)
    if not tail[-_END.size :].startswith(b"PK\5\6") or length < _END.size:
        raise error(
            "truncated",
            f"{shown(source.name)}: does not end with a zip's end record; it is cut short, or "
            "something was appended; fetch the file again",
        )
    _, disk, first, here, count, size, start, comment = _END.unpack(tail[-_END.size :])
    if disk or first or here != count or comment:
        raise malformed("the zip's end record tells of other disks or of a comment")
    top = source.size - _END.size
    locator = tail[: -_END.size][-_LOCATOR.size :]
    if locator.startswith(b"PK\6\7"):
        top -= _LOCATOR.size + _END64.size
        _, disk, where, disks = _LOCATOR.unpack(locator)
        if disk or disks != 1 or where != top:
            raise malformed(f"the zip64 end record does not lie at {top}, before its locator")
        mark, record, disk, first, here64, *wide = _END64.unpack(tail[: _END64.size])
        if mark != b"PK\6\6" or record != _END64.size - 12 or disk or first or here64 != wide[0]:
            raise malformed("the zip64 end record is damaged")
        narrow = ((count, _FULL16), (size, _FULL32), (start, _FULL32))
        if any(n not in (w, full) for (n, full), w in zip(narrow, wide, strict=True)):
            raise malformed("the zip's end record and its zip64 end record contradict each other")
        count, size, start = wide
    elif count == _FULL16 or _FULL32 in (size, start):
        raise malformed("the zip's end record points to a zip64 end record that is not there")
    if start + size != top:
        raise malformed(
            f"the zip's directory should end at {top} and ends at {start + size}; bytes were "
            "inserted before it or taken out"
        )
    return count, size, start


def _entries(raw: bytes, count: int, what: str) -> list[_Entry]:
    def malformed(message: str) -> LoratoolsError:
        return error("malformed", f"{what}: zip directory, byte {at}: {message}")

    found: list[_Entry] = []
    at = 0
    while at < len(raw):
        if len(raw) - at < _ENTRY.size or not raw.startswith(b"PK\1\2", at):
            raise malformed("no entry stands there")
        fields = _ENTRY.unpack_from(raw, at)
        _, flags, method, crc, packed, size, n, n_extra, n_comment, disk, external, local = fields
        end = at + _ENTRY.size + n + n_extra + n_comment
        if end > len(raw):
            raise malformed("an entry is longer than the directory")
        name = raw[at + _ENTRY.size : at + _ENTRY.size + n]
        if flags & ~(_LATER | _UTF8):
            raise malformed(f"{_quoted(name)} is encrypted or patched (flag bits 0x{flags:04x})")
        extra = raw[at + _ENTRY.size + n : at + _ENTRY.size + n + n_extra]
        narrow = (size, packed, local)
        try:
            size, packed, local = _widened(narrow, extra)
        except (ValueError, struct.error):
            raise malformed(f"the zip64 or extra fields of {_quoted(name)} are damaged") from None
        # torch takes a member with the attribute of a folder for one, and leaves memory unset.
        if external & _FOLDER and not name.endswith(b"/"):
            raise malformed(f"{_quoted(name)} is marked as a folder")
        if disk or (size != packed and not method):
            raise malformed(
                f"{_quoted(name)}: {packed} stored bytes are said to be {size} (disk {disk})"
            )
        found.append(_Entry(name, flags, method, crc, packed, size, local))
        at = end
    if len(found) != count:
        raise malformed(f"{len(found)} entries, the end record promises {count}")
    return found


def _widened(narrow: tuple[int, ...], extra: bytes) -> tuple[int, ...]:
    """The numbers of a header, those that are full replaced from its zip64 field, in order.

    ValueError or struct.error for a field that is absent, too long, or there without need.
    """
    wide = b""
    at = 0
    while at < len(extra):
        sort, length = struct.unpack_from("<2H", extra, at)
        if length > len(extra) - at - 4 or sort == _OTHER_NAME or (sort == _ZIP64 and wide):
            raise ValueError
        if sort == _ZIP64:
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    full = sum(n == _FULL32 for n in narrow)
    numbers = iter(struct.unpack(f"<{full}Q", wide))
    return tuple(next(numbers) if n == _FULL32 else n for n in narrow)


def _name(entry: _Entry, what: str) -> str:
    try:
        name = entry.name.decode("utf-8" if entry.flags & _UTF8 else "ascii")
    except UnicodeDecodeError:
        raise error(
            "malformed", f"{what}: a zip member's name is no text: {entry.name!r:.99}"
        ) from None
    parts = name.removesuffix("/").split("/")
    if not {"", ".", ".."}.isdisjoint(parts) or "\\" in name or not name.isprintable():
        raise error(
            "hostile",
            f'{what}: a zip member is called "{shown(name)}"; names lead down from one folder',
        )
    if name.endswith("/") and entry.size:
        raise error("malformed", f'{what}: the folder "{shown(name)}" has {entry.size} bytes')
    return name


def _gap(end: int, begin: int, follower: str, what: str) -> int:
    """The bytes between a member's data and what follows it: a repetition of its sizes at most."""
    if begin < end:
        raise error(
            "hostile",
            f"{what}: {follower} begins at {begin}, inside a zip member that ends at {end}",
        )
    if begin - end > 24:
        raise error(
            "malformed", f"{what}: {begin - end} bytes before {follower} belong to no zip member"
        )
    return begin - end


def _require_sizes_again(entry: _Entry | None, raw: bytes, what: str) -> None:
    """That the bytes behind a member's data are what its flags promise: its sizes, or nothing."""
    allowed = {b""}
    if entry is not None and entry.flags & _LATER:
        bodies = {struct.pack("<LQQ", entry.crc, entry.packed, entry.size)}
        if max(entry.packed, entry.size) < _FULL32:
            bodies.add(struct.pack("<LLL", entry.crc, entry.packed, entry.size))
        allowed = bodies | {b"PK\7\x08" + body for body in bodies}
    if raw not in allowed:
        name = _quoted(entry.name) if entry else "the first member"
        raise error("malformed", f"{what}: {len(raw)} bytes beside {name} are not its sizes again")


def _local_length(raw: bytes, entry: _Entry, source: Source) -> int:
    """The length of a member's local header, once it agrees with the directory."""

    def malformed(message: str) -> LoratoolsError:
        return error("malformed", f"{shown(source.name)}: {_quoted(entry.name)}: {message}")

    if len(raw) < _LOCAL.size or not raw.startswith(b"PK\3\4"):
        raise malformed(f"no local header at {entry.at}")
    _, flags, method, crc, packed, size, n, n_extra = _LOCAL.unpack_from(raw)
    if raw[_LOCAL.size :] != entry.name or n != len(entry.name):
        raise error(
            "hostile",
            f"{shown(source.name)}: the zip directory says {_quoted(entry.name)}, the member at "
            f"{entry.at} is called {_quoted(raw[_LOCAL.size : _LOCAL.size + n])}",
        )
    length: int = _LOCAL.size + n + n_extra
    if entry.at + length + entry.packed > source.size:
        raise malformed(f"{entry.packed} bytes at {entry.at + length} are more than the file has")
    if _FULL32 in (packed, size):
        extra = source.read(entry.at + length - n_extra, n_extra)
        try:
            size, packed = _widened((size, packed), extra)
        except (ValueError, struct.error):
            raise malformed("the zip64 or extra fields of its local header are damaged") from None
    told = (flags, method, crc, size, packed)
    expected = (entry.flags, entry.method, entry.crc, entry.size, entry.packed)
    later = (entry.flags, entry.method, 0, 0, 0)
    if told != expected and not (flags & _LATER and told == later):
        raise malformed("its local header and the zip directory contradict each other")
    return length


def _quoted(name: bytes) -> str:
    return f'"{shown(name.decode(errors="replace"))}"'
