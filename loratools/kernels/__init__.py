"""The fold's arithmetic in C, where it was built: W0 + B·A rounded in one pass over a tile.

torch takes a dozen passes over memory for what a core can do in one. The bytes are the same without
(`loratools.exact` says why), so nothing depends on whether a machine has a compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from loratools.exact import TileSum

LANES, SINGLES = 8, 16  # columns of A that lie together, as in fold.c, in float64 and float32
CHUNK = 8  # and products of float32 that are added before they are added to others
TOO_MANY = -2
MANY = 4096  # elements of a tile for a second look; where there are more it takes the plain way


@cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("LORATOOLS_PORTABLE"):
        return None
    source = Path(__file__).with_name("fold.c")
    try:
        digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
        return ctypes.CDLL(str(source.with_name(f"fold-{digest}.so")))
    except OSError:  # it was not built, or for another machine
        return None


def available() -> bool:
    """Whether this installation has its kernels."""
    return _library() is not None


def serves(base: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether there is a kernel from rows of one dtype to those of another."""
    return _kernel(base, dtype) is not None


@cache
def _kernel(base: torch.dtype, dtype: torch.dtype) -> Callable[..., int] | None:
    return _function(f"fold_{_name(base)}_{_name(dtype)}", 4, 3)


@cache
def _short_kernel(base: torch.dtype) -> Callable[..., int] | None:
    return _function(f"short_{_name(base)}", 7, 4)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _function(name: str, places: int, sizes: int) -> Callable[..., int] | None:
    call: Callable[..., int] | None = getattr(_library(), name, None)
    if call is not None:
        size, real, place = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
        notes = [real, real, place, place, size]
        call.argtypes = [*[place] * places, *[size] * sizes, *notes]  # type: ignore[attr-defined]
        call.restype = size  # type: ignore[attr-defined]
    return call


class Product:
    """B (out, rank) and A (rank, in) of an update in float64, and as the kernels read them.

    For bfloat16 the product is taken in float32 where A is exact there; what its error leaves open
    is taken in float64.
    """

    def __init__(self, b: Tensor, a: Tensor, dtype: torch.dtype) -> None:
        self.b, self.a = b.contiguous(), a
        self.short = _short(self.b, a) if dtype == torch.bfloat16 else None
        self._panels: Tensor | None = None

    @property
    def panels(self) -> Tensor:
        """A as (in / LANES, rank, LANES)."""
        if self._panels is None:
            self._panels = _panels(self.a, LANES)
        return self._panels


def _panels(a: Tensor, lanes: int) -> Tensor:
    """Columns of A side by side, `lanes` of them, filled with zeros at the end."""
    wide = torch.nn.functional.pad(a, (0, -a.shape[1] % lanes))
    return wide.view(len(a), -1, lanes).permute(1, 0, 2).contiguous()


@dataclass(frozen=True, slots=True)
class _Short:
    """A product in float32, the rank filled with zeros; a row's norm times a column's bounds its
    error.
    """

    b: Tensor
    panels: Tensor
    rows: Tensor
    columns: Tensor


def _short(b: Tensor, a: Tensor) -> _Short | None:
    single = a.to(torch.float32)
    rows, columns = (x.square().sum(axis).sqrt() for x, axis in ((b, 1), (a, 0)))
    # Where numbers are of usual sizes, what float32 is too small for is far below any error.
    usual = len(a) and max(float(rows.max()), float(columns.max())) < 2.0**20 / len(a)
    if not usual or not torch.equal(single.to(torch.float64), a):
        return None
    more = -len(a) % CHUNK
    # Of a chunk's sum, of the sums of chunks, of B; some for the bound itself.
    roundings = CHUNK + (len(a) + more) // CHUNK + 4
    pad = torch.nn.functional.pad
    return _Short(
        pad(b.to(torch.float32), (0, more)),
        _panels(pad(single, (0, 0, 0, more)), SINGLES),
        (rows * (1.05 * roundings * 2.0**-24)).to(torch.float32),
        pad(columns, (0, -len(columns) % SINGLES)).to(torch.float32),
    )


def fold(
    raw: Tensor, product: Product, start: int, out: Tensor, sums: TileSum
) -> tuple[Tensor, Tensor] | None:
    """Puts `raw` + B·A, rows from `start` on, into `out`; which elements float64 leaves open, and
    its sums of them.

    None, and nothing of use in `out`, where there is no kernel for these dtypes, a number is not
    finite, or too many are in doubt.
    """
    stop, rank = start + len(raw), len(product.a)
    kernel = _kernel(raw.dtype, out.dtype)
    if kernel is None or not (raw.is_contiguous() and out.is_contiguous()):
        return None
    at, near = torch.empty(MANY, dtype=torch.int64), torch.empty(MANY, dtype=torch.float64)
    notes = sums.relative, sums.absolute, at.data_ptr(), near.data_ptr(), MANY
    b, found, short = product.b[start:stop].data_ptr(), TOO_MANY, product.short
    by_singles = _short_kernel(raw.dtype)
    if short is not None and by_singles is not None:
        found = by_singles(
            raw.data_ptr(), b, short.b[start:stop].data_ptr(), short.panels.data_ptr(),
            short.rows[start:stop].data_ptr(), short.columns.data_ptr(), out.data_ptr(),
            *raw.shape, rank, short.b.shape[1], *notes,
        )  # fmt: skip
    if found == TOO_MANY:
        product.short = None  # nor would it serve the tiles after this one
        found = kernel(
            raw.data_ptr(), b, product.panels.data_ptr(), out.data_ptr(), *raw.shape, rank, *notes
        )
    return None if found < 0 else (at[:found], near[:found])
