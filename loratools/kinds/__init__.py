"""Deltas beyond low rank, one file per family; what all of them are asked stands here.

A family answers on float64 matrices (out, in * kernel), row by row where it can. Nothing here
imports torch before numbers are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from loratools.adapter import (
    Chained,
    Experts,
    Hadamard,
    Kronecker,
    LowRank,
    Made,
    Relative,
    Rotated,
    Scaled,
    Sparse,
    Spectral,
)
from loratools.kinds import chained, experts, hadamard, kronecker, rotated, scaled, sparse, spectral

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = 0  # of `block`: no tile smaller than the weight will do


def shape(delta: Made | Relative) -> tuple[int, ...] | None:
    """(out, in, *kernel) of the weight; None where the delta does not say it."""
    match delta:
        case Hadamard() | Kronecker() | Sparse() | Spectral() | Experts():
            return delta.shape
        case Scaled():
            return scaled.shape(delta)
        case Rotated():
            return rotated.shape(delta)
        case Chained():
            return chained.shape(delta)
        case _:
            assert_never(delta)


def fits(delta: Relative, stored: tuple[int, ...]) -> str | None:
    """Why a function of W0 is not one of a weight of this module shape; None where it is."""
    match delta:
        case Scaled():
            return scaled.fits(delta, stored)
        case Rotated():
            return rotated.fits(delta, stored)
        case Chained():
            return chained.fits(delta, stored)
        case _:
            assert_never(delta)


def ready(delta: Made | Relative) -> Made | Relative:
    """The delta with what all tiles share computed once: products, rotations; held in float64."""
    match delta:
        case Hadamard():
            return hadamard.ready(delta)
        case Kronecker():
            return kronecker.ready(delta)
        case Sparse():
            return sparse.ready(delta)
        case Spectral():
            return spectral.ready(delta)
        case Experts():
            return experts.ready(delta)
        case Scaled():
            return scaled.ready(delta)
        case Rotated():
            return rotated.ready(delta)
        case Chained():
            return chained.ready(delta)
        case _:
            assert_never(delta)


def rows(delta: Made, start: int, stop: int) -> Tensor:
    """ΔW's rows start:stop as a float64 matrix, its scaling included."""
    match delta:
        case Hadamard():
            return hadamard.rows(delta, start, stop)
        case Kronecker():
            return kronecker.rows(delta, start, stop)
        case Sparse():
            return sparse.rows(delta, start, stop)
        case Spectral():
            return spectral.rows(delta, start, stop)
        case Experts():
            return experts.rows(delta, start, stop)
        case _:
            assert_never(delta)


def low_rank(delta: Made) -> LowRank | None:
    """The same update as factors, exactly, where it has a rank below its size; unopened."""
    match delta:
        case Hadamard():
            return hadamard.low_rank(delta)
        case Kronecker():
            return kronecker.low_rank(delta)
        case Sparse() | Spectral() | Experts():
            return None
        case _:
            assert_never(delta)


def apply(delta: Relative, w0: Tensor, start: int) -> Tensor:
    """W for whole blocks of rows `w0` that begin at row `start`; `w0` is never changed."""
    match delta:
        case Scaled():
            return scaled.apply(delta, w0, start)
        case Rotated():
            return rotated.apply(delta, w0, start)
        case Chained():
            return chained.apply(delta, w0, start)
        case _:
            assert_never(delta)


def block(delta: Made | Relative) -> int:
    """Rows that belong together: 1, or n where blocks of n rows mix, or WHOLE."""
    match delta:
        case Hadamard() | Kronecker() | Sparse() | Spectral() | Experts() | Scaled():
            return 1
        case Rotated():
            return rotated.block(delta)
        case Chained():
            return chained.block(delta)
        case _:
            assert_never(delta)


def transposed(delta: Made | Relative) -> Made | Relative:
    """The delta of the transposed matrix; UsageError for a family that has none."""
    match delta:
        case Hadamard():
            return hadamard.transposed(delta)
        case Kronecker():
            return kronecker.transposed(delta)
        case Sparse():
            return sparse.transposed(delta)
        case Spectral():
            return spectral.transposed(delta)
        case Experts():
            return experts.transposed(delta)
        case Scaled():
            return scaled.transposed(delta)
        case Rotated():
            return rotated.transposed(delta)
        case Chained():
            return chained.transposed(delta)
        case _:
            assert_never(delta)
