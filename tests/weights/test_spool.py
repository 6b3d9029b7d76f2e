"""Large outputs past the page cache: the same bytes, and no memory lost whatever fails."""

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import folding
from loratools.errors import LoratoolsError, StorageError
from loratools.weights import disk, spool
from loratools.weights.spool import BLOCK, Spool, SpooledFile, Writer
from tests.examples_of_deltas import pair
from tests.refusing import refused
from tests.small_models import (
    DELTAS,
    UNTIED,
    base_in,
    contents,
    everything,
    model,
    planned,
    split,
    stream_into,
)

PORTION = 4 * BLOCK
Answer = Callable[[memoryview], int | None]


class Watched:
    """Every write past the page cache, held to what such writes must be; and what refuses some."""

    def __init__(self) -> None:
        self.fds: set[int] = set()
        self.asked: list[int] = []  # bytes
        self.direct: Answer = lambda _: None  # None: the system's own answer
        self.plain: Answer = lambda _: None
        self.native_open, self.native_write = disk.open_direct, os.pwrite
        self.native_close = os.close

    def open(self, path: Path) -> int:
        fd = self.native_open(path)
        if fd < 0:  # the tests' disk has none: at least the rules are held to
            fd = os.open(path, os.O_WRONLY)
        self.fds.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self.fds.discard(fd)  # the next file may have its number
        self.native_close(fd)

    def write(self, fd: int, buffer: memoryview, offset: int) -> int:
        if fd not in self.fds:
            said = self.plain(buffer)
            return self.native_write(fd, buffer, offset) if said is None else said
        assert offset % BLOCK == 0
        assert len(buffer) % BLOCK == 0
        assert not len(buffer) or np.frombuffer(buffer, np.uint8).ctypes.data % BLOCK == 0
        self.asked.append(len(buffer))
        said = self.direct(buffer)
        return self.native_write(fd, buffer if said is None else buffer[:said], offset)


@contextmanager
def watching() -> Iterator[Watched]:
    """Small portions, and an eye on what is written."""
    watched = Watched()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "PORTION", PORTION)
        patch.setattr(disk, "open_direct", watched.open)
        patch.setattr(os, "pwrite", watched.write)
        patch.setattr(os, "close", watched.close)
        yield watched


@pytest.fixture
def watched() -> Iterator[Watched]:
    with watching() as found:
        yield found


@contextmanager
def spooled(path: Path, size: int, *, threads: int = 1, direct: bool = True) -> Iterator[Any]:
    """An output of one file; in the end all its portions are free."""
    shared = Spool(spool.LARGE - (not direct), threads)
    assert shared.direct is direct
    file = SpooledFile(shared, path, size)
    try:
        yield file
    finally:
        shared.close()
        file.close()
        assert shared.free.qsize() == 2 * threads + spool.WRITERS


def in_time(act: Callable[[], Any]) -> Any:
    """What a call returns or raises, which has a minute: a deadlock is a failure here."""
    ended: list[Any] = []

    def call() -> None:
        try:
            ended.append(act())
        except BaseException as problem:
            ended.append(problem)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(60)
    assert ended, "still waiting"
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return ended[0]


def known(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def fails_with(code: int) -> Answer:
    def fail(_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def write_all(
    file: SpooledFile, data: bytes, pieces: Sequence[tuple[int, int]], threads: int = 1
) -> list[int]:
    """Feeds (offset, size) pieces of `data` in odd slices; the bytes told of each."""

    def one(piece: tuple[int, int]) -> list[int]:
        (at, size), told = piece, list[int]()
        end, chance = at + size, random.Random(size)
        with Writer(file, at, size, told.append) as written:
            while at < end:
                count = chance.choice([0, 1, 7, BLOCK - 1, BLOCK, PORTION, 3 * PORTION + 5])
                written(memoryview(data)[at : min(at + count, end)])
                at += count
        return told

    with ThreadPoolExecutor(threads) as pool:
        told = list(pool.map(one, pieces))
    file.wait()  # more is told until then
    return [sum(counts) for counts in told]


def past_the_cache(offset: int, size: int) -> int:
    """Bytes in blocks that hold nothing else; those of small tensors are not worth it."""
    whole = (offset + size) // BLOCK * BLOCK - -(-offset // BLOCK) * BLOCK
    return max(0, whole) if size >= PORTION else 0


near = st.builds(lambda n, d: max(0, n * BLOCK + d), st.integers(0, 13), st.integers(-2, 2))
sizes = st.one_of(near, st.integers(0, 3 * BLOCK), st.integers(PORTION, 4 * PORTION))
gaps = st.sampled_from([0, 0, 0, 1, 7, BLOCK - 1, BLOCK])


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(gaps, sizes), min_size=1, max_size=7),
    first=st.integers(0, 2 * BLOCK),
    threads=st.sampled_from([1, 2, 4]),
    direct=st.booleans(),
)
def test_every_byte_lies_where_it_should(tmp_path_factory, rows, first, threads, direct):
    pieces, at = [], first
    for gap, size in rows:
        pieces.append((at + gap, size))
        at += gap + size
    data = known(at)
    wanted = bytearray(at)
    for offset, size in pieces:
        wanted[offset : offset + size] = data[offset : offset + size]
    path = tmp_path_factory.mktemp("spool") / "new" / "out"
    with watching() as watched, spooled(path, at, threads=threads, direct=direct) as file:
        told = write_all(file, data, pieces, threads)
    assert path.read_bytes() == wanted
    assert told == [size for _, size in pieces]
    assert sum(watched.asked) == (sum(past_the_cache(*p) for p in pieces) if direct else 0)


def test_portions_of_the_real_size_from_more_threads_than_portions(tmp_path):
    size = 3 * spool.PORTION + 4321
    data = known(8 * size + 77)
    pieces = [(77 + i * size, size) for i in range(8)]
    with spooled(tmp_path / "out", len(data), threads=2) as file:
        told = in_time(lambda: write_all(file, data, pieces, 8))
    assert told == [size] * 8
    assert (tmp_path / "out").read_bytes()[77:] == data[77:]


# ------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("answer", [
    fails_with(errno.EINVAL), fails_with(errno.EIO), fails_with(errno.EAGAIN),
    lambda _: 0, lambda buffer: min(BLOCK, len(buffer)),
], ids=["EINVAL", "EIO", "EAGAIN", "nothing", "a block"])  # fmt: skip
@pytest.mark.parametrize("every", [1, 3])
def test_what_the_disk_does_not_take_directly_is_written_plainly(tmp_path, watched, answer, every):
    watched.direct = lambda buffer: None if len(watched.asked) % every else answer(buffer)
    data = known(9 * PORTION + 50)
    pieces = [(5, 5 * PORTION), (5 + 5 * PORTION, 4 * PORTION + 45)]
    with spooled(tmp_path / "out", len(data), threads=2) as file:
        assert write_all(file, data, pieces, 2) == [5 * PORTION, 4 * PORTION + 45]
    assert (tmp_path / "out").read_bytes()[5:] == data[5:]
    assert len(watched.asked) >= 9


@pytest.mark.parametrize("portable", [True, False])
def test_a_system_without_such_writes(tmp_path, monkeypatch, portable):
    native = os.open
    asked = []

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            asked.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return native(path, flags, *rest)

    monkeypatch.setattr(spool, "PORTION", PORTION)
    monkeypatch.setattr(disk, "PORTABLE", portable)
    monkeypatch.setattr(os, "open", refuse)
    data = known(3 * PORTION + 9)
    with spooled(tmp_path / "out", len(data)) as file:
        assert (file.past, Writer(file, 0, len(data)).direct) == (-1, False)
        assert write_all(file, data, [(0, len(data))]) == [len(data)]
    assert (tmp_path / "out").read_bytes() == data
    assert bool(asked) is (not portable and hasattr(os, "O_DIRECT"))


# ------------------------------------------------------------------------------- failed


@pytest.mark.parametrize(("code", "ours"), [(errno.EDQUOT, "disk_full"), (errno.EIO, "storage")])
def test_a_failure_is_told_by_a_later_portion_and_no_thread_waits_for_ever(
    tmp_path, watched, code, ours
):
    watched.direct = watched.plain = fails_with(code)
    size, data = 40 * PORTION, memoryview(bytes(PORTION))

    def feed(file: SpooledFile, at: int) -> None:
        told: list[int] = []
        with Writer(file, at, size, told.append) as written:
            for _ in range(40):
                written(data)
        pytest.fail("none of 40 writes was missed")

    with spooled(tmp_path / "out", 3 * size, threads=3) as file, ThreadPoolExecutor(3) as pool:
        fed = [pool.submit(feed, file, i * size) for i in range(3)]
        for one in fed:
            said = refused(ours, in_time, one.result)
            assert said.startswith(f"{tmp_path / 'out'}: {os.strerror(code)}")


def test_a_failure_of_the_last_portion_is_told_in_the_end(tmp_path, watched):
    watched.direct = watched.plain = fails_with(errno.ENOSPC)
    told: list[int] = []
    with spooled(tmp_path / "out", PORTION) as file:
        with Writer(file, 0, PORTION, told.append) as written:
            written(memoryview(bytes(PORTION)))
        message = refused("disk_full", in_time, file.wait)
        assert f"{PORTION:,} bytes to write" in message
        in_time(file.wait)  # told once
    assert told == []


def test_a_failure_is_told_when_nothing_is_on_its_way_any_more(tmp_path, watched):
    """Who is told closes the file, whose descriptor may be another file's a moment later."""
    fails, ends = threading.Event(), threading.Event()

    def answer(buffer: memoryview) -> None:
        small = len(buffer) == BLOCK
        (fails if small else ends).wait(60)
        if small:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    watched.direct, watched.plain = answer, fails_with(errno.ENOSPC)
    with spooled(tmp_path / "out", 2 * PORTION) as file:
        file.send(file.spool.take(), 0, BLOCK, 0, lambda _: None)
        file.send(file.spool.take(), 0, PORTION, PORTION, lambda _: None)
        fails.set()
        told: list[str] = []

        def end() -> None:
            try:
                file.wait()
            except StorageError as problem:
                told.append(problem.code)

        thread = threading.Thread(target=end)
        thread.start()
        thread.join(0.2)
        early = list(told)
        ends.set()
        thread.join(60)
        assert (early, told) == ([], ["disk_full"])


def test_a_writer_that_is_left_gives_its_portion_back(tmp_path, watched):
    def leave(file: SpooledFile) -> None:
        for _ in range(10):  # there are 4 portions
            with suppress(KeyError), Writer(file, 3, 9 * PORTION) as written:
                written(memoryview(bytes(2 * PORTION)))
                raise KeyError
            file.wait()
            assert file.spool.free.qsize() == 4

    with spooled(tmp_path / "out", 10 * PORTION) as file:
        in_time(lambda: leave(file))


def test_a_rest_that_is_not_taken_gives_its_portion_back(tmp_path, watched):
    watched.plain = fails_with(errno.ENOSPC)
    with spooled(tmp_path / "out", PORTION + 9) as file:
        with Writer(file, 0, PORTION + 9) as written:
            written(memoryview(bytes(PORTION + 9)))
        refused("disk_full", file.wait)
    assert watched.asked == [PORTION]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("size", "at"), [(9, 0), (PORTION, 3), (5 * PORTION + 70, BLOCK - 1)])
def test_a_copy_of_another_files_bytes(tmp_path, watched, direct, size, at):
    data = known(size + at)
    (tmp_path / "in").write_bytes(b"before" + data[at:])
    told: list[int] = []
    with (
        spooled(tmp_path / "out", len(data), direct=direct) as file,
        open(tmp_path / "in", "rb") as source,
    ):
        with Writer(file, at, size, told.append) as written:
            written.copy(source.fileno(), 6)
        file.wait()
    assert (tmp_path / "out").read_bytes()[at:] == data[at:]
    assert sum(told) == size
    assert sum(watched.asked) == (past_the_cache(at, size) if direct else 0)


def test_a_source_that_ends_early_is_told_and_no_portion_is_lost(tmp_path, watched):
    (tmp_path / "in").write_bytes(bytes(3 * PORTION - 1))
    with (
        spooled(tmp_path / "out", 3 * PORTION) as file,
        open(tmp_path / "in", "rb") as source,
        Writer(file, 0, 3 * PORTION) as written,
    ):
        refused("storage", written.copy, source.fileno(), 0)


def test_no_memory_for_a_portion_is_no_portion_less(tmp_path, monkeypatch):
    def none() -> Any:
        raise MemoryError

    monkeypatch.setattr(spool, "_pages", none)
    with spooled(tmp_path / "out", spool.PORTION) as file:
        for _ in range(10):
            with pytest.raises(MemoryError):
                in_time(file.spool.take)


def test_a_file_that_cannot_be_made_leaves_no_descriptor(tmp_path, watched):
    (tmp_path / "there").write_text("a file")
    shared = Spool(spool.LARGE, 1)
    assert "there" in refused("storage", SpooledFile, shared, tmp_path / "there" / "out", 10)
    if not os.path.isdir("/proc/self/fd"):
        return
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StorageError):
        SpooledFile(shared, tmp_path / "out", 1 << 60)
    assert len(os.listdir("/proc/self/fd")) == before
    shared.close()


# ------------------------------------------------------------------------------- through a fold


@pytest.mark.parametrize("dtype", [None, "F32"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_fold_writes_the_same_bytes_either_way(tmp_path, watched, monkeypatch, dtype, count):
    plan = planned(base_in(tmp_path / "base", count), DELTAS)
    plainly = stream_into(tmp_path / "plain", plan, dtype=dtype)
    assert watched.asked == []
    monkeypatch.setattr(spool, "LARGE", 0)
    for threads in (1, 3):
        out = tmp_path / f"direct {threads}"
        watched.asked.clear()
        streamed = stream_into(out, plan, dtype=dtype, threads=threads)
        assert contents(out) == contents(tmp_path / "plain")
        assert streamed == plainly
        # The one large tensor, 700 × 300 numbers of 2 or 4 bytes, but for its two ends.
        assert sum(watched.asked) >= 700 * 300 * (4 if dtype else 2) - 2 * BLOCK


@pytest.mark.parametrize("failing", ["a number", "the disk"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_fold_that_fails_leaves_nothing(tmp_path, watched, monkeypatch, failing, threads):
    monkeypatch.setattr(spool, "LARGE", 0)
    tensors = everything()
    if failing == "a number":
        tensors["layers.1.q.weight"][699, 299] = torch.nan
    else:
        full = fails_with(errno.ENOSPC)
        watched.direct = full
        watched.plain = lambda buffer: full(buffer) if len(buffer) >= PORTION else None
    monkeypatch.setattr(folding, "TILE", 1 << 15)  # the number is met after portions were sent
    deltas = DELTAS | {"layers.1.q.weight": pair(14, (700, 300), rank=8)}
    plan = planned(model(tmp_path / "base", *split(tensors, 7), config=UNTIED), deltas)
    there = Path("/proc/self/fd")
    before = len(list(there.iterdir())) if there.exists() else 0
    with pytest.raises(LoratoolsError) as caught:
        in_time(lambda: stream_into(tmp_path / "out", plan, threads=threads))
    assert caught.value.code == ("nonfinite" if failing == "a number" else "disk_full")
    assert watched.asked
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    assert (len(list(there.iterdir())) if there.exists() else 0) == before
    assert not [t for t in threading.enumerate() if t.name.startswith(("write", "fold"))]
