"""Sums of low-rank updates, correctly rounded: where float64 may err, and what the sum really is.

W0 + Σ s·B·A is computed in float64, whose error is bounded (Higham 2002, §3.1). An element that
lies farther than that from the middle between two values of the output's dtype is rounded as the
exact sum is; the few others are summed exactly. So a fold's bytes do not depend on the order in
which a BLAS, a GPU or a transposed layout adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import mul
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loratools.adapter import Kind, Leaf, LowRank
from loratools.algebra import matrix

U = 2.0**-53  # the unit roundoff of float64
# Roundings of an element beside those of its sum: the scaling of B, its product with A, the
# addition of W0; and of the bound itself.
BESIDE = 8
AT_ONCE = 1 << 20  # products that are bounded at a time
FEW = 32  # elements that are added exactly at once: bounds of their own would take longer

Rounded = Callable[[np.ndarray[Any, Any]], Tensor]


@dataclass(frozen=True, slots=True)
class LowRankSum:
    """Σ s·B·A of one weight, as stored: B (out, rank) and A (rank, in) of every term."""

    terms: tuple[tuple[float, Tensor, Tensor], ...]
    most: float  # what Σ|s·b·a| of an element does not exceed: Σ |s|·max ‖B_i‖·max ‖A_j‖
    roundings: int

    @classmethod
    def of(cls, terms: Sequence[tuple[float, Kind]], shape: tuple[int, int]) -> LowRankSum | None:
        """The sum of weighted deltas upon a matrix (out, in).

        None where they are not all low-rank, change nothing, or are not finite.
        """
        found = []
        for weight, delta in terms:
            if not isinstance(delta, LowRank):
                return None
            b, a = _stored(delta.b), _stored(delta.a)
            if (len(b), a.shape[1]) != shape:
                return None
            found.append((delta.scaling * weight, b, a))
        if not found or not all(shape):
            return None
        most = sum(abs(s) * _longest(b, 1) * _longest(a, 0) for s, b, a in found)
        if not 0 < most < math.inf:
            return None
        return cls(tuple(found), most, sum(len(a) for _, _, a in found) + BESIDE)


def _stored(leaf: Leaf) -> Tensor:
    tensor = matrix(leaf.tensor())
    return tensor if tensor.element_size() > 1 else tensor.to(torch.float32)  # torch counts on none


def _longest(factor: Tensor, axis: int) -> float:
    # Squares, because torch's norms along columns take ten times as long.
    return math.sqrt(float(factor.to(torch.float64).square().sum(axis).max()))


@dataclass(frozen=True, slots=True)
class TileSum:
    """Rows of a sum from `start` on; `base` gives W0's, as they are, when it is asked."""

    whole: LowRankSum
    start: int
    base: Callable[[], Tensor]

    @property
    def relative(self) -> float:
        return self.whole.roundings * U

    @property
    def absolute(self) -> float:
        """The part of the error of float64's numbers that does not shrink with them."""
        return 2 * self.relative * self.whole.most

    def settled(self, at: Tensor, values: Tensor, rounded: Rounded) -> Tensor:
        """The sum's elements `at` (flat in the tile) correctly rounded, on the CPU.

        `values` is what float64 made of them, `rounded` how a float64 is rounded.
        """
        if len(at) <= FEW and bool(values.isfinite().all()):
            return rounded(self._to_odd(at.cpu()))
        width = self.whole.terms[0][2].shape[1]
        step = max(1, AT_ONCE // self.whole.roundings)
        parts = []
        for begin in range(0, len(at), step):
            some, near = at[begin : begin + step], values[begin : begin + step]
            near = near + 0.0  # a sum that is zero has no sign: -0.0 becomes 0.0
            rows, columns = self.start + some // width, some % width
            size = torch.zeros_like(near)
            for s, b, a in self.whole.terms:
                products = b[rows].to(near.dtype) * a[:, columns].T.to(near.dtype)
                size += abs(s) * products.abs().sum(1)
            error = self.relative * (near.abs() + 2 * size)
            error.masked_fill_(size == 0, 0)  # W0 itself
            low, high = rounded((near - error).cpu().numpy()), rounded((near + error).cpu().numpy())
            doubtful = (differ(low, high) & near.isfinite().cpu()).nonzero().view(-1)
            if len(doubtful):
                low[doubtful] = rounded(self._to_odd(some.cpu()[doubtful]))
            parts.append(low)
        return torch.cat(parts)

    def _to_odd(self, at: Tensor) -> np.ndarray[Any, Any]:
        base = self.base()
        found = []
        for place in at.tolist():
            row, column = divmod(place, base.shape[1])
            total = Fraction(float(base[row, column]))
            for s, b, a in self.whole.terms:
                total += Fraction(s) * _dot(b[self.start + row].tolist(), a[:, column].tolist())
            found.append(_to_odd(total))
        return np.array(found)


def _dot(some: list[float], others: list[float]) -> Fraction:
    """Σ x·y; each list in whole numbers over one power of two: fractions take ten times as long."""
    (xs, below), (ys, under) = _over_one(some), _over_one(others)
    return Fraction(sum(map(mul, xs, ys)), below * under)


def _over_one(values: list[float]) -> tuple[list[int], int]:
    ratios = [value.as_integer_ratio() for value in values]
    largest = max(below for _, below in ratios)
    return [number * (largest // below) for number, below in ratios], largest


def differ(some: Tensor, others: Tensor) -> Tensor:
    """Where numbers of 16 or 32 bits are not the same, -0.0 and 0.0 among them."""
    bits = torch.int16 if some.dtype.itemsize == 2 else torch.int32
    return some.view(bits) != others.view(bits)


def _to_odd(value: Fraction) -> float:
    """The float64 that stands for a number when it is rounded again, to 51 bits or fewer.

    What is cut off leaves the last bit set (Boldo & Melquiond 2008, doi:10.1109/TC.2007.70819).
    """
    near = float(value)
    if Fraction(near) == value:
        return near
    if abs(Fraction(near)) > abs(value):
        near = math.nextafter(near, 0.0)
    odd = Fraction(near) / Fraction(math.ulp(near)) % 2 == 1
    return near if odd else math.nextafter(near, math.inf if value > 0 else -math.inf)
