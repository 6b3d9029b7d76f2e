"""What runs code where it is loaded, told from content: pickles, however they are packed."""

from __future__ import annotations

import bz2
import io
import lzma
import pickletools
import re
import zlib
from collections.abc import Callable

from loratools.adapter import Source
from loratools.containers import tar
from loratools.containers.zip_directory import members
from loratools.errors import LoratoolsError

HEAD = 1 << 20  # bytes in which a pickle shows itself, packed or not
MEMBERS = 10_000  # of an archive that are looked at


def pickled(source: Source) -> str | None:
    """What makes a file one that runs code where it is loaded, in words; None for all others.

    By content and never by name: pickles of every protocol, bare, as joblib writes them, inside
    zip archives (torch, npz), tar archives (NeMo, old torch) and compressed files, and arrays of
    objects. Nothing is unpickled.
    """
    head = source.read(0, min(source.size, HEAD))
    if head.startswith(b"PK"):
        return _in_zip(source)
    if tar.is_tar(source):
        return _in_tar(source)
    return _bare(_unpacked(head))


def _bare(head: bytes) -> str | None:
    if head.startswith(b"\x93NUMPY"):
        objects = re.search(rb"'descr': *'[|<>=]?O'|\('[^']{0,99}', *'[|<>=]?O'", head[:10_000])
        return "an array of Python objects, which is a pickle inside" if objects else None
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 9:
        return "a pickle"
    return "a pickle" if _calls(head) else None


def _calls(head: bytes) -> bool:
    """Whether bytes without a magic number are a pickle that names code and calls it.

    Protocols 0 and 1 have none, and of the later ones it may be left out. Plain text is no pickle:
    an operation that names something must name it as Python does.
    """
    named = called = False
    steps = 0
    said = ""  # the last text that was put on the stack, which STACK_GLOBAL takes for a name
    try:
        for operation, argument, _ in pickletools.genops(io.BytesIO(head)):
            steps += 1
            if operation.name in ("GLOBAL", "INST"):
                if not all(_NAME.fullmatch(part) for part in str(argument).split(" ")):
                    return False
                named = True
            if isinstance(argument, str):
                said = argument
            named |= operation.name == "STACK_GLOBAL" and _NAME.fullmatch(said) is not None
            called |= operation.name in ("INST", "REDUCE", "OBJ", "BUILD", "NEWOBJ", "NEWOBJ_EX")
            if (named and called) or steps > 100_000:
                break
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError):
        return named and called
    return named and called


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,200}")


def _in_zip(source: Source) -> str | None:
    try:
        found = list(members(source).items())[:MEMBERS]
    except LoratoolsError:
        return "a zip archive whose members cannot be told for sure"
    for name, member in found:
        if name.endswith((".pkl", ".pickle")):
            return "a zip archive with a pickle inside (torch writes such)"
        packed = source.read(member.start, min(member.size, HEAD))
        said = _bare(_inflated(packed) if member.method == 8 else _unpacked(packed))
        if said:
            return f"a zip archive with {said} inside"
    return None


def _in_tar(source: Source) -> str | None:
    try:
        for count, (_, inside) in enumerate(tar.walk(source)):
            head = inside.read(0, min(inside.size, HEAD))
            said = "a torch file" if head.startswith(b"PK") else _bare(_unpacked(head))
            if said:
                return f"a tar archive with {said} inside"
            if count == MEMBERS:
                return "a tar archive of too many members"
    except LoratoolsError:
        return "a tar archive whose members cannot be told for sure"
    return None


def _unpacked(head: bytes) -> bytes:
    """The beginning of what a compressed file holds; bytes that are not compressed as they are."""
    for magic, unpack in _PACKED:
        if head.startswith(magic):
            try:
                return unpack(head)
            except (zlib.error, OSError, EOFError, lzma.LZMAError, ValueError):
                return head
    return head


def _inflated(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj(-15).decompress(packed, HEAD)
    except zlib.error:
        return b""


_PACKED: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", lambda head: zlib.decompressobj(31).decompress(head, HEAD)),
    (b"x\x01", lambda head: zlib.decompressobj().decompress(head, HEAD)),
    (b"x^", lambda head: zlib.decompressobj().decompress(head, HEAD)),
    (b"x\x9c", lambda head: zlib.decompressobj().decompress(head, HEAD)),
    (b"x\xda", lambda head: zlib.decompressobj().decompress(head, HEAD)),
    (b"BZh", lambda head: bz2.BZ2Decompressor().decompress(head, HEAD)),
    (b"\xfd7zXZ", lambda head: lzma.LZMADecompressor().decompress(head, HEAD)),
    (b"]\0\0", lambda head: lzma.LZMADecompressor().decompress(head, HEAD)),
)
