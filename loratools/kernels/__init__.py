"""The fold's arithmetic in C, where it was built: W0 + B·A rounded in one pass over a tile.

torch takes a dozen passes over memory for what a core can do in one. The bytes are the same without
(`loratools.exact` says why), so nothing depends on whether a machine has a compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from loratools.exact import TileSum

LANES = 8  # columns of A that lie together, as in fold.c
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
    names = [str(one).removeprefix("torch.") for one in (base, dtype)]
    library = _library()
    call: Callable[..., int] | None = getattr(library, f"fold_{names[0]}_{names[1]}", None)
    if call is not None:
        size, real, place = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
        call.argtypes = [*[place] * 4, *[size] * 3, real, real, place, place, size]  # type: ignore[attr-defined]
        call.restype = size  # type: ignore[attr-defined]
    return call


def panels(a: Tensor) -> Tensor:
    """A (rank, in) as `fold` reads it: (in / LANES, rank, LANES), filled with zeros at the end."""
    wide = torch.nn.functional.pad(a, (0, -a.shape[1] % LANES))
    return wide.view(len(a), -1, LANES).permute(1, 0, 2).contiguous()


def fold(
    raw: Tensor, b: Tensor, a: Tensor, out: Tensor, sums: TileSum
) -> tuple[Tensor, Tensor] | None:
    """Puts `raw` + B·A into `out`; which elements float64 leaves open, and its sums of them.

    B (rows, rank) and A in `panels` are float64. None, and nothing of use in `out`, where there is
    no kernel for these dtypes, a number is not finite, or too many are in doubt.
    """
    kernel = _kernel(raw.dtype, out.dtype)
    if kernel is None or not all(t.is_contiguous() for t in (raw, b, a, out)):
        return None
    at, near = torch.empty(MANY, dtype=torch.int64), torch.empty(MANY, dtype=torch.float64)
    found = kernel(
        raw.data_ptr(), b.data_ptr(), a.data_ptr(), out.data_ptr(), *raw.shape, b.shape[1],
        sums.relative, sums.absolute, at.data_ptr(), near.data_ptr(), MANY,
    )  # fmt: skip
    return None if found < 0 else (at[:found], near[:found])
