"""Local files as sources: what is refused at once, and what is noticed when a file changes."""

import errno
import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from loratools.containers import local
from loratools.containers.local import LocalFile
from loratools.errors import LoratoolsError

CONTENT = bytes(range(256)) * 3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize(("offset", "length"), [(0, 768), (0, 0), (768, 0), (5, 1), (767, 1)])
def test_reads_exactly_what_is_asked_for(file, offset, length):
    assert LocalFile(file).read(offset, length) == CONTENT[offset : offset + length]


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 769), (768, 1), (-1, 1), (0, -1), (0, 2**62), (2**62, 0)]
)
def test_what_lies_outside_is_refused_before_anything_is_allocated(file, offset, length):
    with pytest.raises(LoratoolsError, match="the file has 768") as caught:
        LocalFile(file).read(offset, length)
    assert caught.value.code == "storage"


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_advice_changes_nothing_and_may_be_refused(file, monkeypatch):
    given = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *said: given.append(said))
    LocalFile(file).expect([(5, 10), (700, 4000)])
    assert given == [(5, 10, os.POSIX_FADV_WILLNEED), (700, 4000, os.POSIX_FADV_WILLNEED)]

    def refuse(*_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    LocalFile(file).expect([(0, 768)])
    monkeypatch.delattr(os, "posix_fadvise")
    LocalFile(file).expect([(0, 768)])
    assert LocalFile(file).read(0, 768) == CONTENT


def test_knows_the_file_it_was_given(file):
    source = LocalFile(file)
    found = file.stat()
    assert source.identity == (768, found.st_mtime_ns, found.st_ino, found.st_dev)
    assert source.size == 768


def test_name_is_the_path_as_typed(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert LocalFile(Path("weights.bin")).name == "weights.bin"


def test_links_are_followed(file, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(file)
    source = LocalFile(link)
    assert source.read(0, 768) == CONTENT
    assert source.name == str(link)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_child_of_a_file(path: Path) -> None:
    path.parent.write_bytes(b"a file where a folder is named")


REFUSED = {
    "missing": (lambda path: None, "not_found", "no such file"),
    "folder": (Path.mkdir, "not_weights", "a folder"),
    "FIFO": (os.mkfifo, "not_weights", "a FIFO"),
    "socket": (make_socket, "not_weights", "a socket"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "not_weights", "a device"),
    "link to nowhere": (lambda path: path.symlink_to("nowhere"), "not_found", "no such file"),
    "link to itself": (lambda path: path.symlink_to(path), "not_found", "no such file"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_refused_at_once(tmp_path, monkeypatch, row):
    make, code, fragment = REFUSED[row]
    monkeypatch.chdir(tmp_path)  # the path of a socket may have 108 bytes only
    make(Path("x"))
    with pytest.raises(LoratoolsError, match=fragment) as caught:
        LocalFile(Path("x"))
    assert caught.value.code == code


@pytest.mark.parametrize(
    "path", ["weights.bin/x", "a\0b", "x" * 5000, "\ud800"], ids=["below", "nul", "long", "half"]
)
def test_paths_that_cannot_be_are_not_found(file, monkeypatch, path):
    monkeypatch.chdir(file.parent)
    with pytest.raises(LoratoolsError) as caught:
        LocalFile(Path(path))
    assert caught.value.code == "not_found"
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("path", ["", "weights.bin"], ids=["folder", "file"])
def test_without_permission(file, monkeypatch, path):
    # The tests may run as root, to whom nothing is forbidden; Windows says this of folders.
    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(LoratoolsError) as caught:
        LocalFile(file.parent / path)
    assert caught.value.code == ("storage" if path else "not_weights")


def append(file: Path) -> None:
    with file.open("ab") as f:
        f.write(b"x")


def replace(file: Path) -> None:
    found = file.stat()
    other = file.with_suffix(".new")
    other.write_bytes(CONTENT)
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.rename(file)


CHANGES = {
    "longer": append,
    "shorter": lambda file: os.truncate(file, 700),
    "written again": lambda file: os.utime(file, ns=(0, 0)),
    "another file of one size and time": replace,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("act", [lambda s: s.read(0, 1), LocalFile.fingerprint])
def test_a_changed_file_is_refused(file, change, act):
    source = LocalFile(file)
    CHANGES[change](file)
    with pytest.raises(LoratoolsError, match="when nothing writes") as caught:
        act(source)
    assert caught.value.code == "input_changed"


@pytest.mark.parametrize("change", [append, lambda file: os.truncate(file, 0)])
def test_a_change_while_reading_is_noticed(file, monkeypatch, change):
    source = LocalFile(file)
    read = os.read

    def read_late(fd, length):
        change(file)
        return read(fd, length)

    monkeypatch.setattr(os, "read", read_late)
    with pytest.raises(LoratoolsError) as caught:
        source.read(0, 768)
    assert caught.value.code == "input_changed"


def test_an_early_end_of_an_unchanged_file_is_no_data(file, monkeypatch):
    source = LocalFile(file)
    monkeypatch.setattr(os, "read", lambda fd, length: b"")
    with pytest.raises(LoratoolsError, match="ends 768 bytes early") as caught:
        source.read(0, 768)
    assert caught.value.code == "input_changed"


def test_a_removed_file_is_not_found(file):
    source = LocalFile(file)
    file.unlink()
    with pytest.raises(LoratoolsError) as caught:
        source.read(0, 1)
    assert caught.value.code == "not_found"


def test_short_reads_are_continued(file, monkeypatch):
    read = os.read
    monkeypatch.setattr(os, "read", lambda fd, length: read(fd, min(length, 7)))
    assert LocalFile(file).read(3, 700) == CONTENT[3:703]


def test_large_reads_are_split(file, monkeypatch):
    monkeypatch.setattr(local, "_PIECE", 100)
    assert LocalFile(file).read(3, 700) == CONTENT[3:703]


def test_a_failing_disk_is_reported(file, monkeypatch):
    source = LocalFile(file)

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "read", broken)
    with pytest.raises(LoratoolsError, match="Input/output error") as caught:
        source.read(0, 1)
    assert caught.value.code == "storage"


@pytest.mark.parametrize("chunk", [1 << 22, 100, 768, 767])
def test_fingerprint_is_the_sha256_of_all(file, monkeypatch, chunk):
    monkeypatch.setattr(local, "_CHUNK", chunk)
    assert LocalFile(file).fingerprint() == hashlib.sha256(CONTENT).hexdigest()


def test_works_without_the_flags_of_unix(file, monkeypatch):
    monkeypatch.setattr(local, "_FLAGS", os.O_RDONLY)
    assert LocalFile(file).read(0, 768) == CONTENT


CHILD = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
from loratools.containers.local import LocalFile
sources = [LocalFile(Path(sys.argv[1])) for _ in range(300)]
assert all(s.read(0, 3) == bytes([0, 1, 2]) for s in sources)
for _ in range(100):
    try:
        LocalFile(Path(sys.argv[1]).parent)
    except Exception as refused:
        assert refused.code == "not_weights", refused
assert not {"torch", "numpy", "mmap"} & set(sys.modules)
"""


def test_three_hundred_files_fit_into_32_descriptors(file):
    subprocess.run([sys.executable, "-c", CHILD, file], check=True)
