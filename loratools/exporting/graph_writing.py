"""A graph's files written with folded weights: the rest copied, every weight computed once.

Weights stored (in, out) are folded in their own rows where the sum is rounded exactly, so that no
order of adding shows. Others are read once, folded in tiles of (out, in) rows as in any other base,
and each tile is put back where it came from, in one buffer of the weight's size.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from loratools.adapter import Source
from loratools.containers.local import LocalFile
from loratools.desk import Desk, one_thread
from loratools.errors import error
from loratools.exporting.into_graph import Layout, Patch
from loratools.exporting.requantised import HELD, fold_codes, source_of
from loratools.folding import Cut, Tally, exactly_rounded, extents, fold_target, torch_dtype
from loratools.plan import Plan, Target
from loratools.stored import as_bytes
from loratools.streaming import COPY, Progress, default_threads
from loratools.weights import disk
from loratools.weights.spool import WRITEBACK, Spool, SpooledFile, Writer

NEAR = 1 << 20  # bytes that are hashed and written while they are in the caches of a core
AT_ONCE = 2  # of the largest weights are held at a time, however many threads there are


@dataclass(slots=True)
class _Gate:
    """Lets work in while what it holds together stays below a size; alone it always may."""

    size: int
    used: int = 0
    turn: threading.Condition = field(default_factory=threading.Condition)
    free: list[Tensor] = field(default_factory=list)  # buffers of weights that are done

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        with self.turn:
            self.turn.wait_for(lambda: not self.used or self.used + nbytes <= self.size)
            self.used += nbytes
        try:
            yield
        finally:
            with self.turn:
                self.used -= nbytes
                self.turn.notify_all()

    @contextmanager
    def buffer(self, nbytes: int) -> Iterator[Tensor]:
        """That many bytes of memory; what a weight before had is taken again: new pages cost as
        much as the arithmetic.
        """
        with self.holding(nbytes):
            with self.turn:
                fit = [b for b in self.free if b.numel() >= nbytes]
                found = min(fit, key=len, default=None)
                self.free = [b for b in self.free if b is not found] if fit else []
            if found is None:
                found = torch.empty(nbytes, dtype=torch.uint8)
            yield found[:nbytes]
            with self.turn:
                self.free.append(found)


@dataclass(slots=True)
class _File:
    """One file of the output and the one of the base that it comes from."""

    source: Source
    out: SpooledFile
    input: int | None


def write_graph(
    plan: Plan,
    layout: Layout,
    folder: Path,
    *,
    graph: str,
    cut: Cut | None = None,
    device: torch.device | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Tally]:
    """Write the graph as `graph` in the folder, and its data files beside it; tallies by target.

    Raises overflow and nonfinite with the weight's name, input_changed, disk_full and storage.
    """
    base = plan.base.graph
    assert base is not None
    place = folder / graph
    total, done, lock = sum(size for size in layout.sizes.values()), 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            now = done
        if progress:
            progress(now, total)

    sources: dict[str | None, Source] = {None: base.graph.source}
    sources.update(base.graph.files)
    local, at_device = threading.local(), device or torch.device("cpu")
    gate = _Gate(AT_ONCE * max((_held(p) for p in _by_target(layout.patches)), default=0))
    tallies: dict[str, Tally] = {}
    stopped = threading.Event()
    files: dict[str | None, _File] = {}
    threads = threads or default_threads()
    spool = Spool(total, threads)

    def work(task: Callable[[Desk], int]) -> None:
        if stopped.is_set():
            return
        if not hasattr(local, "desk"):
            local.desk = Desk(at_device)
        with local.desk.at_work():
            advance(task(local.desk))

    try:
        for name, source in sources.items():
            path = place if name is None else place.parent / name
            files[name] = _opened(spool, source, path, layout.sizes[name])
        tasks = [
            (some[0].nbytes, _folding(some, files, cut, gate, tallies))
            for some in sorted(_by_target(layout.patches), key=lambda some: -_held(some))
        ]
        tasks += [(length, t) for name in files for length, t in _copies(layout, name, files[name])]
        with one_thread(), ThreadPoolExecutor(threads, "graph") as pool:
            pending = [pool.submit(work, task) for _, task in tasks]
            try:
                for future in pending:
                    future.result()
            except BaseException:
                stopped.set()
                raise
        for one in files.values():
            one.out.wait()
        for source in sources.values():
            if isinstance(source, LocalFile):
                _require_unchanged(source)
    finally:
        spool.close()
        for one in files.values():
            one.out.close()
            if one.input is not None:
                os.close(one.input)
    return tallies


def _require_unchanged(source: LocalFile) -> None:
    if LocalFile(source.path).identity != source.identity:
        raise error("input_changed", f"{source.name} was changed while it was read")


def _opened(spool: Spool, source: Source, path: Path, size: int) -> _File:
    out = SpooledFile(spool, path, size)
    try:
        given = os.open(source.path, os.O_RDONLY) if isinstance(source, LocalFile) else None
    except OSError:
        out.close()
        raise
    return _File(source, out, given)


def _copies(
    layout: Layout, name: str | None, file: _File
) -> Iterator[tuple[int, Callable[[Desk], int]]]:
    """What stays as it is, in portions; and the graph's edits."""
    for piece in layout.pieces(name, file.source.size):
        for part in range(0, piece.length, COPY):
            start, to = piece.start + part, piece.to + part
            length = min(COPY, piece.length - part)
            yield length, _copying(file, start, to, length)
    if name is not None:
        return
    shift = 0
    holes = [(p.offset, p.offset + p.nbytes) for p in layout.patches if p.file is None]
    for edit in layout.edits:
        at, content = edit.start + shift, memoryview(edit.content)
        shift += len(content) - (edit.end - edit.start)
        for low, high in [
            *sorted(h for h in holes if at <= h[0] < at + len(content)),
            (None, None),
        ]:
            stop = at + len(content) if low is None else low
            yield stop - at, _placing(file, content[: stop - at], at)
            if low is not None and high is not None:
                content, at = content[high - at :], high


def _placing(file: _File, content: memoryview, at: int) -> Callable[[Desk], int]:
    def task(_: Desk) -> int:
        disk.write_from(file.out.fd, content, at)
        return len(content)

    return task


def _copying(file: _File, start: int, to: int, length: int) -> Callable[[Desk], int]:
    def task(_: Desk) -> int:
        with Writer(file.out, to, length) as write:
            if file.input is None:
                write(memoryview(file.source.read(start, length)))
            else:
                write.copy(file.input, start)
        return length

    return task


def _by_target(patches: Iterable[Patch]) -> list[list[Patch]]:
    """Patches that are one piece of work: a weight's numbers, or its codes and their scales."""
    found: dict[str, list[Patch]] = {}
    for patch in patches:
        found.setdefault(patch.target.name, []).append(patch)
    return list(found.values())


def _held(patches: Sequence[Patch]) -> int:
    """The bytes of memory that a piece of work takes."""
    codes = source_of(patches[0].target)
    return patches[0].nbytes if codes is None else HELD * math.prod(codes.form.shape)


def _folding(
    patches: Sequence[Patch],
    files: dict[str | None, _File],
    cut: Cut | None,
    gate: _Gate,
    tallies: dict[str, Tally],
) -> Callable[[Desk], int]:
    target = patches[0].target

    def task(desk: Desk) -> int:
        if patches[0].part:
            with gate.holding(_held(patches)):
                tallies[target.name] = _folded_codes(patches, files, cut, desk)
        else:
            tallies[target.name] = _folded(patches[0], files, cut, desk, gate)
        return sum(p.nbytes for p in patches)

    return task


def _folded_codes(
    patches: Sequence[Patch], files: dict[str | None, _File], cut: Cut | None, desk: Desk
) -> Tally:
    weight, tally = fold_codes(patches[0].target, desk=desk, cut=cut)
    written = weight.written()
    for patch in patches:
        with Writer(files[patch.file].out, patch.offset, patch.nbytes) as write:
            write(memoryview(written[patch.part]))
    return tally


def _folded(
    patch: Patch, files: dict[str | None, _File], cut: Cut | None, desk: Desk, gate: _Gate
) -> Tally:
    leaf = patch.target.base
    assert leaf is not None
    given = next((f.input for f in files.values() if f.source is leaf.source), None)

    def read(view: memoryview, at: int) -> None:
        if given is not None:
            disk.read_into(given, view, leaf.offset + at)
        else:
            assert leaf.source is not None
            view[:] = leaf.source.read(leaf.offset + at, len(view))

    hashed = hashlib.sha256()
    with Writer(files[patch.file].out, patch.offset, patch.nbytes) as write:

        def written(raw: memoryview) -> None:
            hashed.update(raw)
            write(raw)

        if patch.turned and not (cut is None and exactly_rounded(patch.target)):
            tally = _folded_whole(patch, read, written, cut, desk, gate)
        else:
            target = as_stored(patch.target) if patch.turned else patch.target
            tally = _folded_rows(target, read, written, cut, desk)
    tally.digest = hashed.hexdigest()
    return tally


def as_stored(target: Target) -> Target:
    """A target upon a weight stored (in, out), turned as it is: its rows lie together."""
    leaf = target.base
    assert leaf is not None
    terms = tuple(
        replace(t, place=replace(t.place, transposed=not t.place.transposed)) for t in target.terms
    )
    turned = replace(leaf, shape=leaf.shape[::-1], strides=None)
    return replace(target, shape=target.shape[::-1], base=turned, terms=terms)


def _folded_rows(
    target: Target,
    read: Callable[[memoryview, int], None],
    written: Callable[[memoryview], None],
    cut: Cut | None,
    desk: Desk,
) -> Tally:
    leaf = target.base
    assert leaf is not None
    dtype = torch_dtype(leaf.dtype)
    _, width = extents(target.shape)
    row = width * dtype.itemsize

    def rows(start: int, stop: int) -> Tensor:
        raw = desk.raw((stop - start) * row)
        read(as_bytes(raw), start * row)
        return raw.view(dtype).view(stop - start, width)

    def emit(_: int, tile: Tensor) -> None:
        written(as_bytes(tile))

    return fold_target(target, rows, emit, dtype=dtype, desk=desk, cut=cut)


def _folded_whole(
    patch: Patch,
    read: Callable[[memoryview, int], None],
    written: Callable[[memoryview], None],
    cut: Cut | None,
    desk: Desk,
    gate: _Gate,
) -> Tally:
    """Of a weight stored (in, out), which each tile of (out, in) rows takes columns of."""
    target, leaf = patch.target, patch.target.base
    assert leaf is not None
    dtype = torch_dtype(leaf.dtype)
    with gate.buffer(patch.nbytes) as raw:
        view = as_bytes(raw)
        for at in range(0, len(view), WRITEBACK):
            read(view[at : at + WRITEBACK], at)
        stored = raw.view(dtype).view(target.shape[::-1])

        def block(count: int) -> Tensor:
            return desk.room("block", stored[:, :count], dtype)

        # Columns are copied out as a block before they are turned: a whole column's elements lie
        # one row apart, which for widths that are powers of two all fall into a few lines of the
        # cache.
        def rows(start: int, stop: int) -> Tensor:
            return block(stop - start).copy_(stored[:, start:stop]).T

        def emit(start: int, tile: Tensor) -> None:
            # No other tile needs what this one is made of: `prepare` has read it before.
            stored[:, start : start + len(tile)].copy_(block(len(tile)).copy_(tile.T))

        tally = fold_target(target, rows, emit, dtype=dtype, desk=desk, cut=cut)
        for at in range(0, len(view), NEAR):
            written(view[at : at + NEAR])
    return tally
