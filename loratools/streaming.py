"""The fold over files: a few threads read, compute and write shards, and sync them."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loratools.adapter import Leaf, Source
from loratools.containers.local import LocalFile
from loratools.desk import Desk, one_thread
from loratools.errors import error, shown
from loratools.folding import Cut, Tally, fold_target, leaf_rows, torch_dtype
from loratools.plan import Target
from loratools.stored import as_bytes, stored_scale
from loratools.untouched import converts, rounded
from loratools.weights import disk
from loratools.weights.layout import OutputShard, Piece, runs
from loratools.weights.publishing import Output
from loratools.weights.spool import Spool, SpooledFile, Writer

COPY = 64 << 20  # bytes of untouched weights that one task copies
Progress = Callable[[int, int], None]  # bytes done, bytes in all
Work = Callable[[], None]


def default_threads() -> int:
    """One more than there are usable cores: one waits for the disk while the others compute."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, cores or 1) + 1


@dataclass(slots=True)
class _Open:
    """One shard being written: its descriptors, and how many tasks it still waits for.

    They are opened by its first task and closed by its last, so that many shards need few.
    """

    shard: OutputShard
    path: Path
    left: int
    file: SpooledFile | None = None
    inputs: dict[int, int] = field(default_factory=dict)  # by id of the source
    tallies: dict[str, Tally] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, run: _Run) -> None:
        """Makes the file, with its header and room for the rest, unless another task has."""
        with self.lock:
            if self.file is not None:
                return
            self.file = SpooledFile(run.spool, self.path, self.shard.size)
            disk.write_from(self.file.fd, memoryview(self.shard.header), 0)
        run.advance(len(self.shard.header))

    @property
    def fd(self) -> int:
        assert self.file is not None
        return self.file.fd

    def input(self, run: _Run, source: Source | None) -> int | None:
        """A descriptor for a local file; None for sources that only read themselves."""
        if not isinstance(source, LocalFile):
            return None
        with self.lock:
            if id(source) not in self.inputs:
                with disk.reported(source.path):
                    self.inputs[id(source)] = os.open(source.path, os.O_RDONLY)
                run.read.add(source)
            return self.inputs[id(source)]

    def close(self) -> None:
        """Close it when the system has its bytes."""
        fds, self.inputs = self.inputs, {}
        for fd in fds.values():
            os.close(fd)
        file, self.file = self.file, None
        if file is not None:
            try:
                file.wait()
            finally:
                file.close()


@dataclass(slots=True)
class Streamed:
    """What was written: a tally for every touched tensor, bytes, files taken over."""

    tallies: dict[str, Tally]
    nbytes: int
    continued: tuple[str, ...]


def stream(
    shards: Sequence[OutputShard],
    targets: Mapping[str, Target],
    output: Output,
    *,
    cut: Cut | None = None,
    device: torch.device | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Streamed:
    """Write all shards into the output's folder; those it has finished already are taken over.

    Every target is folded in float64 and rounded once; all other tensors are copied as bytes,
    or rounded where the output's dtype is another. Raises StorageError, `overflow`, `nonfinite`.
    """
    total = sum(s.size for s in shards)
    threads = threads or default_threads()
    spool = Spool(total, threads)
    run = _Run(targets, cut, device or torch.device("cpu"), total, progress, spool)
    pool = ThreadPoolExecutor(threads, "fold")
    flusher = ThreadPoolExecutor(1, "sync")
    continued = []
    try:
        with one_thread():
            pending: set[Future[None]] = set()
            for shard in shards:
                if shard.name in output.finished:
                    continued.append(shard.name)
                    run.take_over(shard, output.finished[shard.name])
                    continue
                for future in _start(run, shard, output, pool, flusher):
                    pending.add(future)
            for future in as_completed(pending):
                future.result()
            pool.shutdown()
            flusher.shutdown()
            for synced in run.synced:
                synced.result()
            run.require_unchanged()
    except BaseException:
        run.stopped.set()
        pool.shutdown(cancel_futures=True)
        flusher.shutdown()
        raise
    finally:
        try:
            run.close()
        finally:
            spool.close()
    return Streamed(run.tallies, total, tuple(continued))


class _Run:
    """What the threads share."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        cut: Cut | None,
        device: torch.device,
        total: int,
        progress: Progress | None,
        spool: Spool,
    ) -> None:
        self.targets, self.cut, self.device, self.spool = targets, cut, device, spool
        self.total, self.progress = total, progress
        self.done = 0
        self.read: set[LocalFile] = set()
        self.stopped = threading.Event()
        self.tallies: dict[str, Tally] = {}
        self.synced: list[Future[None]] = []
        self.local = threading.local()
        self.lock = threading.Lock()
        self.open: list[_Open] = []

    def desk(self) -> Desk:
        if not hasattr(self.local, "desk"):
            self.local.desk = Desk(self.device)
        desk: Desk = self.local.desk
        return desk

    def advance(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes
            done = self.done
        if self.progress:
            self.progress(done, self.total)

    def require_going(self) -> None:
        if self.stopped.is_set():
            raise error("storage", "another thread failed; this one stopped")

    def take_over(self, shard: OutputShard, record: str) -> None:
        for name, tally in json.loads(record).items():
            self.tallies[name] = Tally(**tally)
        self.advance(shard.size)

    def require_unchanged(self) -> None:
        """StorageError `input_changed` where a shard of the base was written to meanwhile."""
        for source in self.read:
            if LocalFile(source.path).identity != source.identity:
                raise error("input_changed", f"{shown(source.name)} was changed while it was read")

    def close(self) -> None:
        for one in self.open:
            with suppress(Exception):  # after a failure, which is the one to tell
                one.close()


def _start(
    run: _Run,
    shard: OutputShard,
    output: Output,
    pool: ThreadPoolExecutor,
    flusher: ThreadPoolExecutor,
) -> Iterator[Future[None]]:
    """Queue one shard: its tensors as tasks, its sync behind the last of them."""
    pieces = shard.pieces if shard.whole is None else ()
    touched = [p for p in pieces if p.name in run.targets and run.targets[p.name].terms]
    scales = _scales(shard, touched)
    names = {p.name for p in (*touched, *scales.values())}
    changed = [p for p in pieces if p.name not in names and converts(p)]
    areas = [
        (leaf.source, at, leaf.offset, length)
        for leaf, at, length in runs(pieces, lambda p: p.name not in names and not converts(p))
    ]
    if shard.whole is not None:
        areas = [(shard.whole, 0, 0, shard.size)]
    copies = [
        (source, to + part, at + part, min(COPY, length - part))
        for source, to, at, length in areas
        for part in range(0, length, COPY)
    ]
    one = _Open(shard, output.folder / shard.name, len(touched) + len(changed) + len(copies))
    run.open.append(one)

    def finish() -> None:
        record = json.dumps({n: t.as_json() for n, t in one.tallies.items()})
        output.finish(shard.name, record)
        with run.lock:
            run.tallies.update(one.tallies)

    def task(work: Work) -> None:
        if run.stopped.is_set():
            return
        one.begin(run)
        with run.desk().at_work():
            work()
        with one.lock:
            one.left -= 1
            last = one.left == 0
        if last:
            one.close()
            run.synced.append(flusher.submit(finish))

    if not one.left:  # asked now: the last task of a small shard may end before this loop does
        one.left = 1
        yield pool.submit(task, lambda: None)
    # The largest first: a long one at the end would leave the other threads idle. Copies lie
    # evenly between folds: the disk is busy with one while the cores are with the other.
    touched.sort(key=lambda p: -p.nbytes)
    folds = [partial(_fold, run, one, piece, scales.get(piece.name)) for piece in touched]
    changes = [partial(_convert, run, one, piece) for piece in changed]
    moves = [partial(_copy, run, one, *copy) for copy in copies]
    for work in _evenly(folds, changes, moves):
        yield pool.submit(task, work)


def _evenly(*lists: Sequence[Work]) -> list[Work]:
    """Several lists in one, each spread over the whole of it."""
    placed = [
        ((i + 0.5) / len(some), n, i) for n, some in enumerate(lists) for i in range(len(some))
    ]
    return [lists[n][i] for _, n, i in sorted(placed)]


def _scales(shard: OutputShard, touched: Sequence[Piece]) -> dict[str, Piece]:
    """The pieces with the scales of those weights that stay 8-bit floats, by the weight's name."""
    there = {p.base.offset: p for p in shard.pieces if p.base is not None and p.nbytes}
    return {
        piece.name: there[leaf.scale.offset]
        for piece in touched
        if (leaf := piece.base) is not None and leaf.scale is not None and piece.dtype == leaf.dtype
    }


def _copy(run: _Run, one: _Open, source: Source | None, to: int, at: int, length: int) -> None:
    assert source is not None
    fd = one.input(run, source)
    with _writer(run, one, to, length) as written:
        if fd is None:
            written(memoryview(source.read(at, length)))
        else:
            written.copy(fd, at)


def _reader(run: _Run, one: _Open, leaf: Leaf) -> Callable[[int, int], Tensor] | None:
    """Reads bytes of a local file into a buffer of this thread's desk."""
    fd = one.input(run, leaf.source)
    if fd is None:
        return None
    desk = run.desk()

    def into(offset: int, length: int) -> Tensor:
        view = desk.raw(length)
        disk.read_into(fd, as_bytes(view), offset)
        return view

    return into


def _fold(run: _Run, one: _Open, piece: Piece, scale: Piece | None) -> None:
    """Fold one weight; the scale that it is stored with is written after it, new where it must."""
    target = run.targets[piece.name]
    leaf, hashed = target.base, hashlib.sha256()
    rows = None if leaf is None else leaf_rows(leaf, _reader(run, one, leaf))
    with _writer(run, one, piece.offset, piece.nbytes) as written:

        def emit(_start: int, tile: Tensor) -> None:
            run.require_going()
            raw = as_bytes(tile)
            hashed.update(raw)
            written(raw)

        tally = fold_target(
            target, rows, emit, dtype=torch_dtype(piece.dtype), desk=run.desk(), cut=run.cut
        )
    tally.digest = hashed.hexdigest()
    one.tallies[piece.name] = tally
    if scale is not None:
        assert leaf is not None
        raw = stored_scale(leaf, tally.scale)
        with _writer(run, one, scale.offset, scale.nbytes) as written:
            written(memoryview(raw))
        one.tallies[scale.name] = Tally(digest=hashlib.sha256(raw).hexdigest())


def _writer(run: _Run, one: _Open, offset: int, nbytes: int) -> Writer:
    assert one.file is not None
    return Writer(one.file, offset, nbytes, run.advance)


def _convert(run: _Run, one: _Open, piece: Piece) -> None:
    assert piece.base is not None
    rows = leaf_rows(piece.base, _reader(run, one, piece.base))
    with _writer(run, one, piece.offset, piece.nbytes) as written:
        for tile in rounded(piece, rows):
            run.require_going()
            written(as_bytes(tile))
