"""Tar archives: what Python's tarfile packs, in all of its formats, and what is damaged."""

import gzip
import io
import tarfile

import pytest

from loratools.containers import tar
from loratools.containers.local import LocalFile
from loratools.errors import LoratoolsError

LONG = "a/" * 60 + "long.bin"  # too long for the name field, and for the prefix too
FILES = {
    "./model_config.yaml": b"x: 1\n",
    "weights.ckpt": bytes(range(256)) * 7,
    "mp_rank_00/weights.ckpt": b"",
    LONG: b"far",
    "ä/ü.bin": b"\x00\xff" * 300,
}
FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def packed(files=FILES, form=tarfile.GNU_FORMAT, mode="w", extra=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as archive:
        for entry in extra:
            archive.addfile(entry)
        for name, raw in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return buffer.getvalue()


def at(tmp_path, raw):
    path = tmp_path / "x.nemo"
    path.write_bytes(raw)
    return LocalFile(path)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_what_tarfile_packs(form, mode, tmp_path):
    source = at(tmp_path, packed(form=FORMATS[form], mode=mode))
    assert tar.is_tar(source)
    found = tar.members(source)
    assert {n: m.read(0, m.size) for n, m in found.items()} == {
        name.removeprefix("./"): raw for name, raw in FILES.items()
    }
    weights = found["weights.ckpt"]
    assert weights.read(250, 10) == FILES["weights.ckpt"][250:260]
    assert weights.name.endswith("x.nemo:weights.ckpt")
    with pytest.raises(LoratoolsError, match="were asked for"):
        weights.read(weights.size - 1, 2)


def test_members_after_the_one_wanted_are_not_unpacked(tmp_path):
    files = {"first": b"1", "huge": bytes(1 << 22)}
    source = at(tmp_path, packed(files, mode="w:gz"))
    name, member = next(tar.walk(source))
    assert (name, member.read(0, 1)) == ("first", b"1")
    assert len(member.whole._held) < 1 << 17


def entry(sort, name="x", link=""):
    made = tarfile.TarInfo(name)
    made.type, made.linkname = sort, link
    return made


def test_folders_are_no_members(tmp_path):
    found = tar.members(at(tmp_path, packed(extra=[entry(tarfile.DIRTYPE, "./folder/")])))
    assert len(found) == len(FILES)


def test_names_are_those_that_every_reader_finds(tmp_path):
    assert set(tar.members(at(tmp_path, packed({"./a//./b": b"1"})))) == {"a/b"}


# reliability rows 36 to 38: nothing is extracted, and it is refused all the same.
HOSTILE = {
    "out of the folder": packed({"../../etc/x": b"1"}),
    "out of it later": packed({"a/../../x": b"1"}),
    "absolute": packed({"/root/y": b"2"}),
    "absolute in an extended header": packed({"/" + "y" * 200: b"2"}, tarfile.PAX_FORMAT),
    "as on Windows": packed({"..\\x": b"2"}),
    "a link": packed(extra=[entry(tarfile.SYMTYPE, link="/etc/passwd")]),
    "a hard link": packed(extra=[entry(tarfile.LNKTYPE, link="weights.ckpt")]),
    "a device": packed(extra=[entry(tarfile.CHRTYPE)]),
    "a block device": packed(extra=[entry(tarfile.BLKTYPE)]),
    "a FIFO": packed(extra=[entry(tarfile.FIFOTYPE)]),
}


@pytest.mark.parametrize("row", HOSTILE)
def test_what_could_only_serve_to_write_elsewhere(row, tmp_path):
    with pytest.raises(LoratoolsError) as refused:
        tar.members(at(tmp_path, HOSTILE[row]))
    assert (refused.value.code, refused.value.exit) == ("hostile", 3)


def test_a_million_members_are_not_walked(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MEMBERS", 3)
    with pytest.raises(LoratoolsError, match="more than 3 members"):
        tar.members(at(tmp_path, packed()))


def test_the_empty_blocks_at_the_end_may_be_forgotten(tmp_path):
    raw = packed({"a": b"x" * 512}).rstrip(b"\0")
    assert set(tar.members(at(tmp_path, raw + bytes(-len(raw) % 512)))) == {"a"}


def changed(raw, start, new):
    """A header with other bytes, and the checksum that belongs to them."""
    head = bytearray(raw[:512])
    head[start : start + len(new)] = new
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + raw[512:]


ONE = packed({"a": b"x" * 600})
DOTTED = packed({"a": b"1"})[:1024] + packed({"./a": b"2"})
TWICE = packed({"a": b"1"})[:1024] + packed({"a": b"2"})
SPARSE = changed(ONE, 156, b"S")
ODD = {
    "a wrong checksum": (ONE[:10] + b"!" + ONE[11:], "malformed"),
    "a name twice": (TWICE, "duplicate"),
    "a name twice, once with a dot": (DOTTED, "duplicate"),
    "cut in the data": (ONE[:900], "truncated"),
    "cut in a header": (ONE[:1536] + b"\1" * 100, "truncated"),
    "a size that is none": (changed(ONE, 124, b"99999999999\0"), "malformed"),
    "a size beyond the file": (changed(ONE, 124, b"77777777777\0"), "truncated"),
    "a huge size in base 256": (changed(ONE, 124, b"\x80" + b"\x7f" * 11), "truncated"),
    "holes": (SPARSE, "malformed"),
    "a long header": (changed(changed(ONE, 156, b"L"), 124, b"00077777777\0"), "hostile"),
    "a damaged extended header": (changed(ONE, 156, b"x"), "malformed"),
    "gzip cut short": (gzip.compress(ONE)[:-30], "truncated"),
    "gzip with noise": (gzip.compress(ONE)[:20] + b"\xff" * 40, "malformed"),
    "gzip of a lie": (
        gzip.compress(changed(ONE, 124, b"\x80" + bytes(5) + b"\x7f" * 6)),
        "malformed",
    ),
}


def read_all(source):
    return [member.read(0, member.size) for member in tar.members(source).values()]


@pytest.mark.parametrize("row", ODD)
def test_damaged_archives_are_refused(row, tmp_path):
    raw, code = ODD[row]
    with pytest.raises(LoratoolsError) as refused:
        read_all(at(tmp_path, raw))
    assert refused.value.code == code


def test_an_archive_that_unpacks_to_more_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "HELD", 1 << 16)
    source = at(tmp_path, packed({"a": bytes(1 << 17), "b": b"1"}, mode="w:gz"))
    with pytest.raises(LoratoolsError, match="gzip -d"):
        tar.members(source)


@pytest.mark.parametrize("raw", [b"", b"\x1f\x8b\x08", b"PK\3\4", bytes(512), b"\x1f\x8b\x08" * 9])
def test_other_files_are_no_tar(raw, tmp_path):
    assert not tar.is_tar(at(tmp_path, raw))
