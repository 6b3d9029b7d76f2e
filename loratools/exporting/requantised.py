"""Weights that are codes, folded: numbers from the codes, the sum, codes in the same scheme.

Rows of the weight whose numbers share scales among themselves alone are put back tile by tile;
what shares them across rows (one scale for all, blocks along torch's rows) is folded as a whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratools.desk import Desk
from loratools.folding import Cut, Tally, fold_target
from loratools.plan import Target
from loratools.sampling import sample_rows
from loratools.weights.quantised import Quantised
from loratools.weights.requantising import (
    KINDS,
    STEP,
    Weight,
    numbers_of,
    put_all,
    steps_of,
)

NUMPY: Final = "<f4"  # in which sums are rounded before they become codes, as quantisers take them
CONFIRMED: Final = 0.9  # of a weight's numbers are within a step of the reference's
HELD: Final = 10  # bytes of memory for each code, while a weight is folded as a whole


def source_of(target: Target) -> Quantised | None:
    """The codes that a target is stored as; None where it is stored as numbers."""
    source = target.base.source if target.base is not None else None
    return source if isinstance(source, Quantised) else None


@dataclass(slots=True)
class _Kept:
    """What becomes of an update: <W' - W0, ΔW> and <ΔW, ΔW>, over all numbers that are seen."""

    kept: float = 0.0
    update: float = 0.0

    def add(self, before: NDArray[Any], wanted: NDArray[Any], after: NDArray[Any]) -> None:
        update = (wanted - before).reshape(-1)
        self.kept += float(np.dot((after - before).reshape(-1), update))
        self.update += float(np.dot(update, update))


def fold_codes(
    target: Target,
    *,
    desk: Desk | None = None,
    cut: Cut | None = None,
    only_rows: Sequence[int] | None = None,
) -> tuple[Weight, Tally]:
    """A target's codes after the fold, and the tally: what dequantising them shows was kept.

    The digest is that of the numbers as its leaf has them. With `only_rows` just these are
    folded, where they have scales of their own; a tally of a sample then. Raises overflow and
    nonfinite.
    """
    source = source_of(target)
    assert source is not None
    weight, seen = source.weight(), _Kept()
    by_rows = source.straight and not source.form.single
    width = math.prod(source.shape[1:])

    def rows(start: int, stop: int) -> Tensor:
        found = numbers_of(source, weight, start, stop).astype(NUMPY)
        return torch.from_numpy(np.ascontiguousarray(found))

    emit: Callable[[int, Tensor], None]
    if by_rows:
        each = width // source.form.columns

        def emit(start: int, tile: Tensor) -> None:
            wanted = tile.numpy().reshape(len(tile), width)
            stop = start + len(tile)
            before = numbers_of(source, weight, start, stop)
            weight.put(start * each, wanted.reshape(-1, source.form.columns))
            seen.add(before, wanted, numbers_of(source, weight, start, stop))
    else:
        whole = np.empty((source.shape[0] if source.shape else 1, width), NUMPY)

        def emit(start: int, tile: Tensor) -> None:
            whole[start : start + len(tile)] = tile.numpy().reshape(len(tile), width)

        only_rows = None
    tally = fold_target(
        target, rows, emit, dtype=torch.float32, desk=desk, cut=cut, only_rows=only_rows
    )
    if not by_rows:
        old = source.weight()
        put_all(source, weight, whole)
        for start, stop in _steps(source):
            pair = (numbers_of(source, w, start, stop) for w in (old, weight))
            seen.add(next(pair), whole[start:stop], next(pair))
    tally.kept, tally.update = seen.kept, seen.update
    if only_rows is None:
        tally.digest = _digest(source, weight)
    return weight, tally


def sample_codes(target: Target, *, cut: Cut | None = None) -> Tally:
    """The tally of a few rows of a weight that is codes."""
    source, desk = source_of(target), Desk(torch.device("cpu"))
    assert source is not None
    with desk.at_work():
        rows = sample_rows(source.shape[0] if source.shape else 1)
        tally = fold_codes(target, desk=desk, cut=cut, only_rows=rows)[1]
    if not tally.base:  # it was folded as a whole
        weight = source.weight()
        for start, stop in _steps(source):
            tally.base += float(np.square(numbers_of(source, weight, start, stop)).sum())
    return tally


def compare_codes(
    source: Quantised, weight: Weight, compare: Callable[[int, Tensor], None]
) -> None:
    """Hand on the numbers of a weight, tile by tile, as its leaf has them."""
    for start, stop in _steps(source):
        tile = numbers_of(source, weight, start, stop).astype(KINDS[source.form.scale])
        compare(start, torch.from_numpy(np.ascontiguousarray(tile)))


def rounds(source: Quantised, numbers: Tensor) -> bool:
    """Whether codes are those of these numbers: nearly all lie within a step of the code.

    Quantisers choose steps and codes in their own ways (some by data), so bytes prove nothing; of
    other weights of the same size, at 4 bits, about a fifth do.
    """
    if tuple(numbers.shape) != source.shape:
        return False
    weight, near, count = source.weight(), 0, 0
    wanted = numbers.to(torch.float32).reshape(len(numbers) if numbers.dim() else 1, -1).numpy()
    for start, stop in _steps(source):
        off = np.abs(numbers_of(source, weight, start, stop) - wanted[start:stop])
        near += int((off <= steps_of(source, weight, start, stop)).sum())
        count += off.size
    return near >= CONFIRMED * count


def _digest(source: Quantised, weight: Weight) -> str:
    found = hashlib.sha256()
    for start, stop in _steps(source):
        tile = numbers_of(source, weight, start, stop).astype(KINDS[source.form.scale])
        found.update(np.ascontiguousarray(tile).data)
    return found.hexdigest()


def _steps(source: Quantised) -> list[tuple[int, int]]:
    rows = source.shape[0] if source.shape else 1
    step = max(1, STEP // max(1, math.prod(source.shape[1:])))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
