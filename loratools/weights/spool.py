"""Bytes of large outputs on their way to the disk: aligned portions, past the page cache.

Filling pages that the kernel has to find, and writing them back, costs a core as much as the
arithmetic of a fold. Where the system writes from our memory straight to the disk, threads of their
own wait for it; elsewhere, and for outputs that will be read again at once, writes are plain.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratools.weights import disk

LARGE = 1_000_000_000  # bytes of an output that is not read again for its hashes (receipt)
PORTION = 2 << 20  # bytes of one write: the disk is as fast as with more
# What a direct write is aligned to: no disk's blocks are larger, and no page of the cache (64 KiB
# on some machines) holds bytes of both ways: the kernel takes that for a failure of the disk.
BLOCK = max(4096, mmap.PAGESIZE)
WRITERS = 2  # one write is on its way while the other's end is seen to
WRITEBACK = 8 << 20  # bytes after which the disk may begin: the sync at the end is short then

Bytes = NDArray[np.uint8]


def _view(portion: Any) -> memoryview:
    return memoryview(portion)


class Spool:
    """What the files of one output share: the threads that write, and their memory."""

    def __init__(self, nbytes: int, threads: int) -> None:
        self.direct = nbytes >= LARGE
        self.pool = ThreadPoolExecutor(WRITERS, "write")
        self.free: SimpleQueue[Bytes | None] = SimpleQueue()
        for _ in range(2 * threads + WRITERS):  # one is filled by each thread, as many are written
            self.free.put(None)

    def take(self) -> Bytes:
        """A portion's memory, on a page boundary; waits until one is free."""
        free = self.free.get()
        if free is not None:
            return free
        try:
            return _pages()
        except BaseException:
            self.free.put(None)  # or others would wait for it for ever
            raise

    def close(self) -> None:
        """Waits for all that is on its way."""
        self.pool.shutdown()


def _pages() -> Bytes:
    return np.frombuffer(mmap.mmap(-1, PORTION), dtype=np.uint8)


class SpooledFile:
    """One file of an output, its bytes reserved; `fd` takes plain writes anywhere."""

    def __init__(self, spool: Spool, path: Path, size: int) -> None:
        self.spool, self.past = spool, -1
        with disk.reported(path, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            disk.reserve(self.fd, size)
            if spool.direct:
                self.past = disk.open_direct(path)
        except BaseException:
            self.close()
            raise
        self.lock = threading.Lock()
        self.sent: list[Future[None]] = []

    def send(
        self, portion: Bytes, first: int, last: int, offset: int, told: Callable[[int], None]
    ) -> None:
        """Have the bytes `first` to `last` of a portion written, whose memory is free again then.

        `offset` is where in the file the portion begins, a multiple of `BLOCK`. Raises what became
        of writes before it.
        """

        def write() -> None:
            # The block in which a tensor begins may hold another's end, and the one in which it
            # ends another's beginning: these are written plainly.
            view, begin = _view(portion), min(last, -(-first // BLOCK) * BLOCK)
            end = max(begin, last // BLOCK * BLOCK)
            try:
                if first < begin:
                    disk.write_from(self.fd, view[first:begin], offset + first)
                if begin < end:
                    disk.write_direct(self.past, self.fd, view[begin:end], offset + begin)
                if end < last:
                    disk.write_from(self.fd, view[end:last], offset + end)
            finally:
                self.spool.free.put(portion)
            told(last - first)

        with self.lock:
            ended = [f for f in self.sent if f.done()]
            self.sent = [f for f in self.sent if f not in ended]
            self.sent.append(self.spool.pool.submit(write))
        for future in ended:
            future.result()

    def wait(self) -> None:
        """Returns when the system has all bytes, or raises what went wrong; none is on its way."""
        with self.lock:
            sent, self.sent = self.sent, []
        # All of them before the first failure: the caller closes the descriptors, whose numbers
        # may be another file's a moment later.
        wait(sent)
        for future in sent:
            future.result()

    def close(self) -> None:
        """Close it, whatever became of its bytes; none may be on its way."""
        for fd in (self.fd, self.past):
            if fd >= 0:
                with suppress(OSError):
                    os.close(fd)
        self.fd = self.past = -1


class Writer:
    """Writes one tensor's bytes in order, as a context; `told` hears how many are written."""

    def __init__(
        self,
        file: SpooledFile,
        offset: int,
        nbytes: int,
        told: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.file, self.told = file, told
        self.at = self.begun = offset
        self.end = offset + nbytes
        self.direct = file.past >= 0 and nbytes >= PORTION
        self.portion: Bytes | None = None
        self.first = self.filled = 0  # of the portion

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.portion is not None:  # after a failure
            self.file.spool.free.put(self.portion)

    def __call__(self, raw: memoryview) -> None:
        if not self.direct:
            self._plain(raw)
            return
        given = np.frombuffer(raw, dtype=np.uint8)
        while len(given):
            room = self._room()
            count = min(len(room), len(given))
            # numpy lets other threads run meanwhile, a memoryview does not
            room[:count] = given[:count]
            self._fill(count)
            given = given[count:]

    def copy(self, fd: int, offset: int) -> None:
        """Write the whole tensor as it lies in another file."""
        if not self.direct:
            count = self.end - self.at
            disk.copy_range(fd, self.file.fd, offset, self.at, count)
            disk.start_writeback(self.file.fd, self.at, count)
            self.told(count)
            return
        while self.at < self.end:
            room = self._room()
            disk.read_into(fd, _view(room), offset + self.at - self.begun)
            self._fill(len(room))

    def _room(self) -> Bytes:
        """What is free of the present portion, and no more than the tensor still has."""
        if self.portion is None:
            self.portion = self.file.spool.take()
            self.first = self.filled = self.at % BLOCK
        return self.portion[self.filled : min(PORTION, self.filled + self.end - self.at)]

    def _fill(self, count: int) -> None:
        portion, self.filled, self.at = self.portion, self.filled + count, self.at + count
        assert portion is not None
        if self.filled == PORTION or self.at == self.end:
            self.portion = None
            self.file.send(portion, self.first, self.filled, self.at - self.filled, self.told)

    def _plain(self, raw: memoryview) -> None:
        disk.write_from(self.file.fd, raw, self.at)
        self.at += len(raw)
        if self.at - self.begun >= WRITEBACK or self.at == self.end:
            disk.start_writeback(self.file.fd, self.begun, self.at - self.begun)
            self.told(self.at - self.begun)
            self.begun = self.at
