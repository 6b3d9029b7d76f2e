"""Wavelets: the reconstruction filters of Daubechies' families computed, and one inverse level."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from loratools.errors import error, shown

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 38
# Least asymmetric members: which of the roots, by their size, are taken from outside the circle.
OUTSIDE: dict[int, tuple[int, ...]] = {
    2: (0,), 3: (0,), 4: (0, 1), 5: (1, 0), 6: (1, 0, 1), 7: (1, 0, 0), 8: (0, 1, 0, 1),
    9: (0, 1, 1, 0), 10: (1, 0, 1, 0, 1),
}  # fmt: skip


def taps(family: str) -> int:
    """How many taps the filters of a family have; RefusedError for families not computed here."""
    name, order = family[:2], family[2:]
    if family == "haar":
        return 2
    good = order.isascii() and order.isdigit() and len(order) < 3 and not order.startswith("0")
    if family[:3] == "sym" and family[3:] in {str(n) for n in OUTSIDE}:
        return 2 * int(family[3:])
    if name != "db" or not good or int(order) > LARGEST:
        raise error(
            "unknown_type",
            f"the wavelet {shown(family)} is not known here, only haar, db1-{LARGEST}, sym2-10",
        )
    return 2 * int(order)


@cache
def low_pass(family: str) -> tuple[float, ...]:
    """The low-pass reconstruction filter, by the product's roots.

    |H|² = (cos²)ᴺ·P(sin²) with P(y) = Σ C(N-1+k, k)·yᵏ (Daubechies 1988), in 120 digits.
    """
    import mpmath  # type: ignore[import-untyped]

    order = taps(family) // 2
    with mpmath.workdps(120):
        powers = [mpmath.binomial(order - 1 + k, k) for k in range(order - 1, -1, -1)]
        found = mpmath.polyroots(powers, maxsteps=500, extraprec=500) if order > 1 else []
        inside = [_inside(1 - 2 * y) for y in found]
        # One of each conjugate pair, by size.
        halves = sorted((z for z in inside if z.imag > -1e-60), key=abs)
        product = [mpmath.mpc(1)]
        outside = OUTSIDE[order] if family.startswith("sym") else [0 for _ in halves]
        for z, turned in zip(halves, outside, strict=True):
            root = 1 / z if turned else z
            both = [root] if abs(root.imag) < 1e-60 else [root, mpmath.conj(root)]
            for each in both:
                product = _times(product, [1, -each])
        for _ in range(order):
            product = _times(product, [1, 1])
        total = mpmath.fsum(t.real for t in product)
        return tuple(float(t.real * mpmath.sqrt(2) / total) for t in product)


def _inside(half: Any) -> Any:
    """The root of z + 1/z = 2·half that lies in the unit circle."""
    import mpmath

    square = mpmath.sqrt(half * half - 1)
    return half + square if abs(half + square) < 1 else half - square


def _times(a: list[Any], b: list[Any]) -> list[Any]:
    found: list[Any] = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for k, y in enumerate(b):
            found[i + k] += x * y
    return found


def high_pass(low: tuple[float, ...]) -> tuple[float, ...]:
    """The quadrature mirror of a low-pass filter."""
    return tuple((-1) ** i * tap for i, tap in enumerate(reversed(low)))


def inverse(spectrum: Tensor, family: str, rows: int, columns: int) -> Tensor:
    """A matrix (rows, columns) of its four quarters of coefficients, the middle of what comes.

    Top right are details along rows, bottom left along columns (peft:tuners/waveft/layer.py).
    """
    low = low_pass(family)
    high = high_pass(low)
    half, middle = spectrum.shape[0] // 2, spectrum.shape[1] // 2
    approx, along = spectrum[:half, :middle], spectrum[:half, middle:]
    down, both = spectrum[half:, :middle], spectrum[half:, middle:]
    left, right = _joined(approx, along, low, high), _joined(down, both, low, high)
    whole = _joined(left.T, right.T, low, high).T
    top, edge = (whole.shape[0] - rows) // 2, (whole.shape[1] - columns) // 2
    return whole[top : top + rows, edge : edge + columns]


def _joined(
    approx: Tensor, detail: Tensor, low: tuple[float, ...], high: tuple[float, ...]
) -> Tensor:
    """One level put together along the rows, without what the borders spoil."""
    count, many = len(approx), len(low)
    whole = approx.new_zeros(2 * count - 2 + many, approx.shape[1])
    for i in range(many):
        whole[i : i + 2 * count - 1 : 2] += low[i] * approx + high[i] * detail
    return whole[many - 2 : len(whole) - (many - 2)]
