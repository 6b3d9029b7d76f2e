"""A few rows of every target, folded before anything is written: what a fold would keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loratools.adapter import LowRank
from loratools.algebra import held
from loratools.containers.local import LocalFile
from loratools.desk import Desk
from loratools.folding import Cut, Tally, exactly_rounded, fold_target, weighted
from loratools.plan import Target
from loratools.stored import Rows, extents, leaf_rows

_CPU = torch.device("cpu")


def sample_rows(height: int, count: int = 8) -> list[int]:
    """`count` rows spread evenly over a tensor."""
    return sorted({(2 * i + 1) * height // (2 * count) for i in range(count)}) if height else []


def is_light(target: Target, cut: Cut | None) -> bool:
    """Whether the sample of a target takes its rows alone: low-rank terms upon one whole leaf."""
    leaf = target.base
    return (
        cut is None and leaf is not None and leaf.shape == target.shape and exactly_rounded(target)
    )


def is_near(target: Target) -> bool:
    """Whether its base is in memory or in a local file: elsewhere each row is a request."""
    return target.base is None or isinstance(target.base.source, LocalFile | None)


def expect_samples(targets: Iterable[Target]) -> None:
    """Has the system read the rows that `fold_sample` will ask local files for."""
    ranges: dict[LocalFile, list[tuple[int, int]]] = {}
    for target in targets:
        leaf = target.base
        if leaf is None or not isinstance(leaf.source, LocalFile) or leaf.strides is not None:
            continue
        height, _ = extents(leaf.shape)
        size = leaf.nbytes // max(height, 1)
        rows = ((leaf.offset + row * size, size) for row in sample_rows(height))
        ranges.setdefault(leaf.source, []).extend(rows)
    for source, wanted in ranges.items():
        source.expect(wanted)


def _of_rows(target: Target, rows: Sequence[int], read: Rows) -> tuple[Target, Tensor]:
    """A target of low-rank terms with some of its rows alone, and these of its base."""
    assert target.base is not None
    shape = (len(rows), *target.shape[1:])
    terms = []
    for term, (weight, delta) in zip(target.terms, weighted(target, _CPU), strict=True):
        assert isinstance(delta, LowRank)
        some = replace(delta, b=held(delta.b.tensor()[rows], delta.b.name))
        place = replace(term.place, transposed=False)
        terms.append(replace(term, delta=some, weight=weight, place=place))
    stored = torch.cat([read(row, row + 1).clone() for row in rows])
    base = replace(held(stored.view(shape), target.name), dtype=target.base.dtype)
    return replace(target, shape=shape, base=base, terms=tuple(terms)), stored


def fold_sample(target: Target, *, dtype: torch.dtype, cut: Cut | None = None) -> Tally:
    """The tally of a few rows of one target, read from the base: what a fold would keep.

    For several threads at once, within `one_thread`.
    """
    leaf, desk = target.base, Desk(_CPU)
    assert leaf is not None
    rows, read = sample_rows(min(extents(leaf.shape)[0], extents(target.shape)[0])), leaf_rows(leaf)
    with desk.at_work():
        if rows and is_light(target, cut):
            target, stored = _of_rows(target, rows, read)
            rows, read = list(range(len(rows))), lambda start, stop: stored[start:stop]
        return fold_target(
            target,
            read,
            lambda *_: None,
            dtype=dtype,
            desk=desk,
            cut=cut,
            only_rows=rows,
        )
