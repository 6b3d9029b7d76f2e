"""Zip directories that lie, each in one way."""

import struct
import zlib
from dataclasses import replace

import pytest

from tests.containers.torch_bytes import HONEST, File, archive, read, refused

DATA = HONEST[0]
OTHERS = HONEST[1:]
OTHER = File(b"archive/other", b"1234")


def inside_out() -> bytes:
    """A member within the data of another one."""
    inner = archive(DATA, end=b"")
    start = len(File(b"archive/outer").name) + 30
    return archive(File(b"archive/outer", inner), *OTHERS, replace(OTHER, at=start))


def ended(**changes: int) -> bytes:
    """The honest file, numbers of its end record changed."""
    raw = archive(*HONEST)
    names = ("disk", "first", "here", "count", "size", "start", "comment")
    numbers = dict(zip(names, struct.unpack("<4H2LH", raw[-18:]), strict=True))
    return raw[:-18] + struct.pack("<4H2LH", *(numbers | changes).values())


def ended64(**changes: int) -> bytes:
    """The honest file with a zip64 end record, numbers of it changed."""
    raw = archive(*HONEST)
    _, _, _, count, size, start, _ = struct.unpack("<4H2LH", raw[-18:])
    numbers = {
        "record": 44, "made": 45, "needs": 45, "disk": 0, "first": 0, "here": count,
        "count": count, "size": size, "start": start, "locator_disk": 0,
        "where": len(raw) - 22, "disks": 1,
    } | changes  # fmt: skip
    values = list(numbers.values())
    record = b"PK\6\6" + struct.pack("<Q2H2L4Q", *values[:9])
    return raw[:-22] + record + b"PK\6\7" + struct.pack("<LQL", *values[9:]) + raw[-22:]


def listed(at: int, new: bytes) -> bytes:
    """The honest file with other bytes at a place of its directory."""
    raw = archive(*HONEST)
    at += raw.index(b"PK\1\2")
    return raw[:at] + new + raw[at + len(new) :]


def half_an_entry() -> bytes:
    raw, (size,) = archive(*HONEST), struct.unpack("<L", archive(*HONEST)[-10:-6])
    return raw[:-22] + b"PK\1\2" + raw[-22:-10] + struct.pack("<L", size + 4) + raw[-6:]


ZIPS = {
    "a member deflated": (
        archive(replace(DATA, data=zlib.compress(DATA.data)[2:-4], method=8), *OTHERS),
        "malformed", 'data.pkl" is compressed (zip method 8)',
    ),
    "a deflated bomb": (
        archive(*HONEST, replace(OTHER, data=zlib.compress(bytes(1 << 20))[2:-4], method=8,
                                 size=1 << 20, local_size=1 << 20)),
        "malformed", "is compressed",
    ),
    "a stored member that grows": (
        archive(replace(DATA, size=1 << 30, local_size=1 << 30), *OTHERS),
        "malformed", "are said to be 1073741824",
    ),
    "two data.pkl": (archive(DATA, *HONEST), "duplicate", 'data.pkl" stands twice'),
    "two of other case": (
        archive(replace(DATA, name=b"archive/DATA.pkl"), *HONEST), "duplicate", "stands twice"
    ),
    "a second data.pkl further down": (
        archive(*HONEST, replace(DATA, name=b"archive/x/data.pkl")), "hostile", "two pickles"
    ),
    "a second data.pkl beside": (
        archive(*HONEST, replace(DATA, name=b"other/data.pkl")), "hostile", "two pickles"
    ),
    "a second folder": (
        archive(*HONEST, File(b"other/x")), "not_weights", "is a zip, but none of torch.save"
    ),
    "no folder": (archive(replace(DATA, name=b"data.pkl")), "not_weights", "is a zip, but none"),
    "no data.pkl": (archive(*OTHERS), "not_weights", "is a zip, but none"),
    "no members": (archive(), "not_weights", "is a zip, but none"),
    "a TorchScript program": (
        archive(*HONEST, File(b"archive/constants.pkl")), "not_weights", "TorchScript program"
    ),
    "a TorchScript program, compressed": (
        archive(*HONEST, File(b"archive/code/a.py", b"x", method=8)), "not_weights", "TorchScript"
    ),
    "bytes before the zip": (
        b"#!/bin/sh" + archive(*HONEST), "not_weights", "is no file of torch.save"
    ),
    "bytes that look like a zip before it": (b"PK\3\4" + archive(*HONEST), "malformed", "inserted"),
    "bytes before the zip, counted": (
        archive(*HONEST, before=b"PK\3\4"), "malformed", "4 bytes beside the first member"
    ),
    "many bytes before the zip, counted": (
        archive(*HONEST, before=b"PK" * 50), "malformed", "100 bytes before"
    ),
    "bytes behind the zip": (archive(*HONEST, after=b"x"), "truncated", "end record"),
    "a zip in the comment": (archive(*HONEST, after=archive(*HONEST)), "malformed", "inserted"),
    "cut off": (archive(*HONEST)[:-1], "truncated", "end record"),
    "half": (archive(*HONEST)[:300], "truncated", "end record"),
    "half an end record": (b"PK\5\6" + bytes(10), "truncated", "end record"),
    "two letters": (b"PK", "truncated", "end record"),
    "bytes between members": (
        archive(replace(DATA, after=b"hidden"), *OTHERS), "malformed", "6 bytes beside"
    ),
    "many bytes between members": (
        archive(replace(DATA, after=b"hidden" * 9), *OTHERS), "malformed", "54 bytes before"
    ),
    "bytes before the directory": (
        archive(*HONEST, replace(OTHER, after=b"hidden")), "malformed", "6 bytes beside"
    ),
    "other sizes behind the data": (
        archive(replace(DATA, flags=8, after=b"PK\7\x08" + struct.pack("<3L", 1, 2, 3)), *OTHERS),
        "malformed", "16 bytes beside",
    ),
    "a member inside another": (inside_out(), "hostile", "inside a zip member"),
    "a member twice in the directory": (
        archive(*HONEST, replace(OTHER, name=b"archive/version2", at=0)), "hostile", "inside"
    ),
    "another name at the member": (
        archive(replace(DATA, local_name=b"archive/evil.pkl"), *OTHERS),
        "hostile", 'says "archive/data.pkl", the member at 0 is called "archive/evil.pkl"',
    ),
    "a longer name at the member": (
        archive(replace(DATA, local_name=b"archive/data.pkl.txt"), *OTHERS), "hostile", "is called"
    ),
    "a shorter name at the member": (
        archive(replace(DATA, local_name=b"archive/data"), *OTHERS), "hostile", "is called"
    ),
    "a name in Info-ZIP's field": (
        archive(replace(DATA, extra=struct.pack("<2HBL", 0x7075, 5, 1, 0)), *OTHERS),
        "malformed", "extra fields",
    ),
    "encrypted": (archive(replace(DATA, flags=1), *OTHERS), "malformed", "flag bits 0x0001"),
    "encrypted, said only there": (
        archive(replace(DATA, local_flags=1), *OTHERS), "malformed", "contradict"
    ),
    "masked headers": (archive(replace(DATA, flags=1 << 13), *OTHERS), "malformed", "flag bits"),
    "another size at the member": (
        archive(replace(DATA, local_size=3), *OTHERS), "malformed", "contradict"
    ),
    "sizes said to follow": (
        archive(replace(DATA, flags=8), *OTHERS), "malformed", "0 bytes beside"
    ),
    "a file marked as a folder": (
        archive(replace(DATA, external=0x10), *OTHERS), "malformed", "marked as a folder"
    ),
    "a folder with content": (
        archive(*HONEST, File(b"archive/x/", b"1")), "malformed", "has 1 bytes"
    ),
    "../": (archive(*HONEST, File(b"archive/../x")), "hostile", "lead down"),
    "../ at once": (archive(*HONEST, File(b"../archive/x")), "hostile", "lead down"),
    "an absolute name": (archive(*HONEST, File(b"/etc/passwd")), "hostile", "lead down"),
    "a drive": (archive(*HONEST, File(b"C:\\x")), "hostile", "lead down"),
    "a name with NUL": (archive(*HONEST, File(b"archive/data.pkl\0x")), "hostile", "lead down"),
    "a name in colours": (archive(*HONEST, File(b"archive/\x1b[2J")), "hostile", "\\x1b[2J"),
    "an empty name": (archive(*HONEST, File(b"")), "hostile", "lead down"),
    "a name that is no text": (archive(*HONEST, File(b"archive/\xff")), "malformed", "no text"),
    "a field longer than the entry": (
        archive(replace(DATA, extra=struct.pack("<2H", 1, 99)), *OTHERS),
        "malformed", "extra fields",
    ),
    "half a field": (archive(replace(DATA, extra=b"\1"), *OTHERS), "malformed", "extra fields"),
    "a zip64 field without need": (
        archive(replace(DATA, extra=struct.pack("<2HQ", 1, 8, 7)), *OTHERS), "malformed", "zip64"
    ),
    "no zip64 field at the member": (
        archive(replace(DATA, local_size=0xFFFFFFFF), *OTHERS), "malformed", "its local header"
    ),
    "no zip64 field": (archive(replace(DATA, size=0xFFFFFFFF), *OTHERS), "malformed", "zip64"),
    "a zip64 field that lies": (
        archive(replace(DATA, size=0xFFFFFFFF, extra=struct.pack("<2HQ", 1, 8, 1 << 60)), *OTHERS),
        "malformed", "are said to be 1152921504606846976",
    ),
    "two zip64 fields": (
        archive(replace(DATA, size=0xFFFFFFFF, extra=struct.pack("<2HQ", 1, 8, 7) * 2), *OTHERS),
        "malformed", "zip64",
    ),
    "a member that is not there": (
        archive(*HONEST, replace(OTHER, at=1 << 31)), "malformed", "belong to no zip member"
    ),
    "no entry": (listed(0, b"PK\7\x08"), "malformed", "no entry stands there"),
    "half an entry": (half_an_entry(), "malformed", "no entry stands there"),
    "an entry without end": (listed(30, b"\xff\xff"), "malformed", "longer than the directory"),
    "a member larger than the file": (
        listed(20, struct.pack("<2L", 1 << 30, 1 << 30)), "malformed", "more than the file has"
    ),
    "no member where it should begin": (
        archive(*HONEST, OTHER).replace(b"PK\3\4", b"PK\3\5").replace(b"PK\3\5", b"PK\3\4", 1),
        "malformed", "no local header at",
    ),
    "more entries": (ended(count=9, here=9), "malformed", "promises 9"),
    "fewer entries": (ended(count=1, here=1), "malformed", "promises 1"),
    "entries on another disk": (ended(here=1), "malformed", "other disks"),
    "another disk": (ended(disk=1), "malformed", "other disks"),
    "a directory on another disk": (ended(first=1), "malformed", "other disks"),
    "a comment": (ended(comment=1), "malformed", "comment"),
    "a directory elsewhere": (ended(start=0), "malformed", "ends at"),
    "a larger directory": (ended(size=1 << 31), "malformed", "ends at"),
    "a zip64 count that is not there": (ended(count=65535, here=65535), "malformed", "not there"),
    "a zip64 end that is not there": (ended(start=0xFFFFFFFF), "malformed", "not there"),
    "a zip64 end elsewhere": (ended64(where=0), "malformed", "does not lie at"),
    "a zip64 end of another size": (ended64(record=45), "malformed", "damaged"),
    "a zip64 end on another disk": (ended64(locator_disk=1), "malformed", "does not lie at"),
    "a zip64 end on two disks": (ended64(disks=2), "malformed", "does not lie at"),
    "a zip64 end that is none": (
        ended64().replace(b"PK\6\6", b"PK\6\5"), "malformed", "damaged"
    ),
    "a zip64 end of another disk": (ended64(disk=1), "malformed", "damaged"),
    "a zip64 directory on another disk": (ended64(first=1), "malformed", "damaged"),
    "zip64 entries on another disk": (ended64(here=1), "malformed", "damaged"),
    "a zip64 end of other counts": (ended64(count=9, here=9), "malformed", "contradict"),
    "a zip64 end of another start": (ended64(start=1 << 40), "malformed", "contradict"),
    "another byte order": (
        archive(*(replace(f, data=b"big") if f.data == b"little" else f for f in HONEST)),
        "malformed", "byte order b'big'",
    ),
    "no byte order": (
        archive(*(replace(f, data=b"pdp") if f.data == b"little" else f for f in HONEST)),
        "malformed", "byte order b'pdp'",
    ),
    "a later version": (
        archive(*(replace(f, data=b"11") if f.data == b"3\n" else f for f in HONEST)),
        "malformed", "version b'11'",
    ),
    "no version": (archive(*(f for f in HONEST if f.data != b"3\n")), "malformed", "version b''"),
}  # fmt: skip


@pytest.mark.parametrize("name", ZIPS)
def test_a_hostile_zip_is_refused(name):
    raw, code, message = ZIPS[name]
    refused(raw, code, message)


def test_the_builders_of_hostile_zips_build_honest_ones():
    for raw in (archive(*HONEST), ended(), ended64(), archive(*HONEST, OTHER)):
        assert read(raw)["w"].numbers() == (1, 2, 3, 4)


def test_a_directory_beyond_the_limit_is_refused_unread(monkeypatch):
    monkeypatch.setattr("loratools.containers.zip_directory.LIMIT", 100)
    refused(archive(*HONEST), "malformed", "at most 100 are read")
