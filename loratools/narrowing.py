"""Rounding float64 to a storage dtype, once and to nearest even; torch's own cast rounds twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_HALFWAY = torch.iinfo(torch.int32).min  # the pattern 0x8000 in the low half, shifted to the top
_E4M3_END = 464  # halfway between its largest number, 448, and the next that it would have


Room = Callable[[str, Tensor, torch.dtype], Tensor]  # (use, like, dtype): memory to work in


def fresh(_use: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """New memory of the shape of `like`; callers that round many tiles give the same again."""
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def narrow(values: Tensor, dtype: torch.dtype, room: Room = fresh) -> Tensor:
    """`values` (float64) in `dtype`, each the correctly rounded one (IEEE 754 nearest even).

    torch casts float64 to 16 bits by way of float32, so that 1 + 2^-8 + 2^-40 becomes 1.0 in
    bfloat16 instead of 1.0078125. Only values that float32 puts exactly halfway can go wrong.
    What is too large becomes infinite, in E4M3 NaN.
    """
    if not dtype.is_floating_point:  # a counter that a module keeps (BatchNorm's)
        return values.round().to(dtype)
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype, copy=True)  # the caller may go on computing in `values`
    single = room("single", values, torch.float32).copy_(values)
    if dtype == torch.float8_e4m3fn:  # without infinity; torch would make its largest number of it
        single.masked_fill_(values.abs() > _E4M3_END, torch.nan)
    out = room("out", values, dtype).copy_(single)
    at = _doubtful(single.view(-1), dtype, room)
    if at.numel():
        out.view(-1)[at] = _to_odd(values.reshape(-1)[at]).to(dtype)
    return out


def not_finite(values: Tensor) -> int:
    """How many values are NaN or infinite."""
    if values.dtype.itemsize == 1:  # which torch does not ask for all 8-bit floats
        values = values.to(torch.float32)
    return int((~values.isfinite()).sum())


def _doubtful(single: Tensor, dtype: torch.dtype, room: Room) -> Tensor:
    """Indices of the values that lie halfway between two of `dtype`, as far as float32 can tell."""
    if dtype == torch.bfloat16:  # its bits are the upper half of float32's
        low = room("low", single, torch.int32)
        torch.bitwise_left_shift(single.view(torch.int32), 16, out=low)
        if low.device.type != "cpu":
            return (low == _HALFWAY).nonzero().view(-1)
        found = room("half", single, torch.bool).numpy()
        np.equal(low.numpy(), _HALFWAY, out=found)
        return torch.from_numpy(_few(found))
    # Below the normal range the spacing is fixed, so a shift of bits does not find the middle:
    # twice the distance to the rounded value is a whole step exactly in the middle.
    near = single.to(dtype).to(torch.float32)
    other = single + (single - near)
    middle = (other.to(dtype).to(torch.float32) == other) & (other != near)
    return middle.nonzero().view(-1)


def _few(found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Where the few that are true lie among many: eight are looked at together."""
    end = len(found) // 8 * 8
    eights = np.flatnonzero(found[:end].view(np.uint64) != 0)
    near = np.concatenate(
        [(8 * eights[:, None] + np.arange(8)).reshape(-1), np.arange(end, len(found))]
    )
    few: np.ndarray[Any, Any] = near[found[near]]
    return few


def _to_odd(values: Tensor) -> Tensor:
    """float64 to float32 rounded to odd: what is cut off leaves the last bit set.

    A second rounding to 22 bits or fewer is then correct (Boldo & Melquiond 2008,
    doi:10.1109/TC.2007.70819).
    """
    single = values.to(torch.float32)
    back = single.to(torch.float64)
    bits = single.view(torch.int32).clone()
    bits -= (back.abs() > values.abs()).to(torch.int32)
    bits |= (back != values).to(torch.int32)
    return bits.view(torch.float32)
