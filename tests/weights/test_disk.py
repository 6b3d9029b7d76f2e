"""The calls that are not portable, with and without what the system offers beyond the plain."""

import errno
import fcntl
import mmap
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from loratools.errors import OutputError, StorageError
from loratools.weights import disk


@pytest.fixture(params=["native", "portable"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(disk, "PORTABLE", request.param == "portable")
    return str(request.param)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A file of 3,000,000 known bytes, open for reading, and an empty one open for both."""
    (tmp_path / "src").write_bytes(known(3_000_000))
    src = os.open(tmp_path / "src", os.O_RDONLY)
    dst = os.open(tmp_path / "dst", os.O_RDWR | os.O_CREAT)
    yield src, dst
    os.close(src)
    os.close(dst)


def known(size: int) -> bytes:
    return (b"".join(i.to_bytes(4, "little") for i in range(size // 4 + 1)))[:size]


def test_the_switch_is_read_from_the_environment() -> None:
    code = "from loratools.weights import disk; print(disk.PORTABLE)"
    for value, said in (("1", "True"), ("", "False")):
        environment = {**os.environ, "LORATOOLS_PORTABLE": value}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == said, done.stderr


# Bytes


@pytest.mark.usefixtures("way")
def test_reads_the_whole_buffer_at_an_offset(pair: tuple[int, int]) -> None:
    buffer = bytearray(2_500_000)
    disk.read_into(pair[0], memoryview(buffer), 123)
    assert buffer == known(3_000_000)[123 : 123 + 2_500_000]


@pytest.mark.usefixtures("way")
def test_goes_on_after_short_reads_and_writes(
    pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = pair
    monkeypatch.setattr(disk, "_PIECE", 70_001)
    buffer = bytearray(1_000_003)
    disk.read_into(src, memoryview(buffer), 1)
    disk.write_from(dst, memoryview(buffer), 7)
    assert os.pread(dst, 2_000_000, 0) == bytes(7) + known(3_000_000)[1:1_000_004]


@pytest.mark.usefixtures("way")
def test_a_file_that_ends_early_is_no_short_answer(pair: tuple[int, int]) -> None:
    buffer = memoryview(bytearray(100))
    with pytest.raises(StorageError, match=r"src: ends at byte 3000000, 60 bytes short") as caught:
        disk.read_into(pair[0], buffer, 3_000_000 - 40)
    assert caught.value.exit == 6


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("start", "at", "length"), [(0, 0, 3_000_000), (5, 9, 2_000_001), (8, 0, 0)]
)
def test_copies_a_range(pair: tuple[int, int], start: int, at: int, length: int) -> None:
    src, dst = pair
    disk.copy_range(src, dst, start, at, length)
    wanted = known(3_000_000)[start : start + length]
    assert os.pread(dst, 4_000_000, 0) == (bytes(at) + wanted if length else b"")


@pytest.mark.usefixtures("way")
def test_copying_past_the_end_is_an_error(pair: tuple[int, int]) -> None:
    with pytest.raises(StorageError, match=r"src: ends at byte 3000000, 1 bytes short"):
        disk.copy_range(*pair, 10, 0, 3_000_000 - 10 + 1)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_copies_plainly_what_the_kernel_stops_copying(
    pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    native = os.copy_file_range
    calls = []

    def once(src: int, dst: int, count: int, offset_src: int, offset_dst: int) -> int:
        calls.append(count)
        if len(calls) == 1:
            return native(src, dst, 1000, offset_src, offset_dst)
        if code is None:
            return 0
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", once)
    disk.copy_range(*pair, 0, 0, 2_000_000)
    assert calls == [2_000_000, 1_999_000]
    assert os.pread(pair[1], 3_000_000, 0) == known(2_000_000)


def test_a_file_of_a_strange_file_system_is_copied(pair: tuple[int, int]) -> None:
    """/proc answers 0 to the kernel's copy although there is something to read."""
    status = os.open("/proc/self/limits", os.O_RDONLY)
    disk.copy_range(status, pair[1], 0, 0, 64)
    assert os.pread(pair[1], 100, 0) == os.pread(status, 64, 0)
    os.close(status)


@pytest.mark.usefixtures("way")
def test_a_full_disk_says_how_much_was_to_be_written(pair: tuple[int, int]) -> None:
    full = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(StorageError, match=r"/dev/full: No space left .*5,000 bytes to write") as e:
        disk.write_from(full, memoryview(bytes(5000)), 0)
    assert (e.value.code, e.value.exit) == ("disk_full", 6)
    with pytest.raises(StorageError, match="/dev/full: No space left"):
        disk.copy_range(pair[0], full, 0, 0, 4096)
    os.close(full)


@pytest.mark.usefixtures("way")
def test_a_limit_of_the_file_size_is_a_full_disk(pair: tuple[int, int]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    codes = []
    try:
        for act in (
            lambda: disk.write_from(pair[1], memoryview(bytes(20_000)), 0),
            lambda: disk.reserve(pair[1], 20_000),
            lambda: disk.copy_range(*pair, 0, 0, 20_000),
        ):
            try:
                act()
            except StorageError as problem:
                codes.append((problem.code, "dst: File too large" in problem.message))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert codes == [("disk_full", True)] * 3


@pytest.mark.parametrize(
    ("code", "ours"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EDQUOT, "disk_full"),
        (errno.EFBIG, "disk_full"),
        (errno.EIO, "storage"),
        (errno.EACCES, "storage"),
    ],
)
def test_what_the_system_says_in_our_words(tmp_path: Path, code: int, ours: str) -> None:
    found = disk.failure(OSError(code, os.strerror(code)), tmp_path / "a\nb")
    assert (found.code, found.exit) == (ours, 6)
    assert found.message.startswith(f"{tmp_path}/a\\nb: {os.strerror(code)}")


def test_writes_past_the_page_cache_where_there_is_such_a_way(
    pair: tuple[int, int], tmp_path: Path, way: str
) -> None:
    direct = disk.open_direct(tmp_path / "dst")
    if way == "portable":
        assert direct == -1
    elif direct >= 0:
        assert fcntl.fcntl(direct, fcntl.F_GETFL) & os.O_DIRECT
    assert disk.open_direct(tmp_path / "nothing") == -1
    assert not (tmp_path / "nothing").exists()
    room = mmap.mmap(-1, 1 << 20)
    room[:] = known(1 << 20)
    disk.write_direct(direct, pair[1], memoryview(room), 8192)
    # Neither the place nor the length nor the memory is a disk's: the plain descriptor takes it.
    disk.write_direct(direct, pair[1], memoryview(room)[1:1000], 8192 + (1 << 20))
    disk.write_direct(direct, pair[1], memoryview(room)[:0], 4096)
    assert os.pread(pair[1], 2 << 20, 0) == bytes(8192) + known(1 << 20) + known(1000)[1:]
    if direct >= 0:
        os.close(direct)


@pytest.mark.parametrize("taken", [0, 4096, 5000, None])
def test_the_plain_way_takes_what_the_direct_one_leaves(
    pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch, taken: int | None
) -> None:
    native, other = os.pwrite, os.dup(pair[1])
    plain = []

    def pwrite(fd: int, buffer: memoryview, offset: int) -> int:
        if fd == other and taken is None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if fd != other:
            plain.append((len(buffer), offset))
        return native(fd, buffer[:taken] if fd == other else buffer, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    disk.write_direct(other, pair[1], memoryview(known(8192)), 4096)
    os.close(other)
    assert os.pread(pair[1], 20_000, 0) == bytes(4096) + known(8192)
    assert plain == [(8192 - (taken or 0), 4096 + (taken or 0))]


def test_what_neither_way_takes_names_the_file(
    pair: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(StorageError, match=r"dst: No space left .*; 4,096 bytes to write") as e:
        disk.write_direct(-1, pair[1], memoryview(bytes(4096)), 0)
    assert e.value.code == "disk_full"


def test_reserves_and_never_shortens(pair: tuple[int, int], way: str) -> None:
    disk.reserve(pair[1], 1 << 20)
    state = os.fstat(pair[1])
    assert state.st_size == 1 << 20
    if way == "native":
        assert state.st_blocks * 512 >= 1 << 20
    disk.reserve(pair[1], 0)
    disk.reserve(pair[1], 100)
    assert os.fstat(pair[1]).st_size == 1 << 20


@pytest.mark.usefixtures("way")
def test_reserving_more_than_there_is(
    pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(
        StorageError, match=r"dst: No space left on device; 999 bytes to write, [\d,]+"
    ):
        disk.reserve(pair[1], 999)


def test_reserves_plainly_where_blocks_cannot_be_promised(
    pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    disk.reserve(pair[1], 5000)
    assert os.fstat(pair[1]).st_size == 5000


def test_free_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < disk.free_bytes(tmp_path) <= shutil.disk_usage(tmp_path).total
    with pytest.raises(StorageError, match="nowhere: No such file"):
        disk.free_bytes(tmp_path / "nowhere")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, free=0))
    assert disk.free_bytes(tmp_path) == sys.maxsize  # some network disks do not say


# Lasting


@pytest.mark.usefixtures("way")
def test_syncing_reaches_the_right_files(
    pair: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    native = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        native(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    disk.sync_file(pair[1])
    disk.sync_path(tmp_path / "src")
    disk.sync_folder(tmp_path)
    assert synced == [str(tmp_path / "dst"), str(tmp_path / "src"), str(tmp_path)]


@pytest.mark.usefixtures("way")
def test_a_sync_that_fails_is_an_error(
    pair: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    for act in (
        lambda: disk.sync_file(pair[1]),
        lambda: disk.sync_path(tmp_path / "dst"),
        lambda: disk.sync_folder(tmp_path),
    ):
        with pytest.raises(StorageError, match="Input/output error"):
            act()


@pytest.mark.usefixtures("way")
def test_early_writeback_changes_nothing(pair: tuple[int, int]) -> None:
    disk.write_from(pair[1], memoryview(known(8192)), 0)
    disk.start_writeback(pair[1], 0, 8192)
    disk.start_writeback(-1, 0, 8192)  # only a hint: no failure either
    assert os.pread(pair[1], 9000, 0) == known(8192)


def test_exchange_swaps_two_folders_or_leaves_them(tmp_path: Path, way: str) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    assert disk.exchange(tmp_path / "a", tmp_path / "b") is (way == "native")
    moved = "ba" if way == "native" else "ab"
    assert (tmp_path / "a" / "is").read_text() + (tmp_path / "b" / "is").read_text() == moved
    assert not disk.exchange(tmp_path / "a", tmp_path / "nothing")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


# Locking

HOLD = """
import sys
from pathlib import Path
from loratools.weights import disk
with disk.lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path, way: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "LORATOOLS_PORTABLE": "1" if way == "portable" else ""}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_a_held_lock_names_its_holder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    said = f"process {holder.pid} on host {re.escape(socket.gethostname())} holds .*lock"
    with pytest.raises(OutputError, match=said) as caught, disk.lock(tmp_path / "lock"):
        pytest.fail("entered")
    assert (caught.value.code, caught.value.exit) == ("locked", 7)
    holder.communicate()
    assert os.listdir(tmp_path) == []
    with disk.lock(tmp_path / "lock") as left:
        assert not left


def test_a_killed_holder_leaves_a_lock_that_is_taken_over(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / "lock").read_text().split()[0] == str(holder.pid)
    with disk.lock(tmp_path / "lock") as left:
        assert left
        assert (tmp_path / "lock").read_text() == f"{os.getpid()} {socket.gethostname()}\n"
        with (
            pytest.raises(OutputError, match=f"process {os.getpid()} "),
            disk.lock(tmp_path / "lock"),
        ):
            pytest.fail("entered")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["4242 elsewhere\n", "", "0 {host}\n", "-1 {host}\n", "x"])
def test_without_locks_of_the_system_only_the_dead_of_this_host_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(disk, "PORTABLE", True)
    text = text.format(host=socket.gethostname())
    (tmp_path / "lock").write_text(text)
    with pytest.raises(OutputError, match="another run"), disk.lock(tmp_path / "lock"):
        pytest.fail("entered")
    assert (tmp_path / "lock").read_text() == text


def test_of_two_that_take_over_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("17 h\n")  # by now the faster one's
    assert not disk._take_away(tmp_path / "lock", "16 h")
    assert (tmp_path / "lock").read_text() == "17 h\n"
    assert disk._take_away(tmp_path / "lock", "17 h")
    assert not disk._take_away(tmp_path / "lock", "17 h")
    assert os.listdir(tmp_path) == []


def test_a_lock_whose_file_was_removed_meanwhile_is_had_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last holder ends between our opening the file and our locking it."""
    answers = []

    def system_lock(_: int) -> bool:
        if not answers:
            (tmp_path / "lock").unlink()
        answers.append(True)
        return True

    monkeypatch.setattr(disk, "_system_lock", system_lock)
    with disk.lock(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text().startswith(f"{os.getpid()} ")
    assert len(answers) == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_where_the_file_system_has_no_locks_the_file_is_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with disk.lock(tmp_path / "lock"):
        with (
            pytest.raises(OutputError, match=f"process {os.getpid()} "),
            disk.lock(tmp_path / "lock"),
        ):
            pytest.fail("entered")
        assert (tmp_path / "lock").exists()
    assert os.listdir(tmp_path) == []


def test_a_lock_that_cannot_be_written_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(StorageError, match="lock: No space left"), disk.lock(tmp_path / "lock"):
        pytest.fail("entered")
    assert os.listdir(tmp_path) == []


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "lock").symlink_to("mine")
    with pytest.raises(StorageError, match="lock: "), disk.lock(tmp_path / "lock"):
        pytest.fail("entered")
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_failure_within_the_block_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk.lock(tmp_path / "lock"):
        (tmp_path / "absent").read_bytes()
    assert os.listdir(tmp_path) == []
