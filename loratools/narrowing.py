"""Rounding float64 to a storage dtype, once and to nearest even; torch's own cast rounds twice.

Where the numbers are sums of low-rank updates, what is rounded is the exact sum (`exact`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loratools.exact import TileSum, differ

_HALFWAY = torch.iinfo(torch.int32).min  # the pattern 0x8000 in the low half, shifted to the top
_EPSILON = torch.finfo(torch.float64).eps  # twice its unit roundoff
_E4M3_END = 464  # halfway between its largest number, 448, and the next that it would have


Room = Callable[[str, Tensor, torch.dtype], Tensor]  # (use, like, dtype): memory to work in


def fresh(_use: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """New memory of the shape of `like`; callers that round many tiles give the same again."""
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def narrow(
    values: Tensor, dtype: torch.dtype, room: Room = fresh, sums: TileSum | None = None
) -> Tensor:
    """`values` (float64) in `dtype`, each the correctly rounded one (IEEE 754 nearest even).

    torch casts float64 to 16 bits by way of float32, so that 1 + 2^-8 + 2^-40 becomes 1.0 in
    bfloat16 instead of 1.0078125. Only values that float32 puts exactly halfway can go wrong.
    What is too large becomes infinite, in E4M3 NaN. With `sums`, what float64 computed `values`
    for, it is these that are rounded, in dtypes of 16 and 32 bits.
    """
    if not dtype.is_floating_point:  # a counter that a module keeps (BatchNorm's)
        return values.round().to(dtype)
    if dtype == torch.float64:
        return values.clone()  # the caller may go on computing in `values`
    single = room("single", values, torch.float32).copy_(values)
    if dtype == torch.float32:
        if sums is not None:
            at = _open_in_single(values, single, sums, room)
            settle(sums, single, at, values.reshape(-1)[at])
        return single
    if dtype == torch.float8_e4m3fn:  # without infinity; torch would make its largest number of it
        single.masked_fill_(values.abs() > _E4M3_END, torch.nan)
    out = room("out", values, dtype).copy_(single)
    at = _doubtful(single.view(-1), dtype, room)
    if sums is not None and dtype.itemsize == 2:
        at = torch.cat([at, _tiny(out, sums, room)])
        settle(sums, out, at, values.reshape(-1)[at])
    elif at.numel():
        out.view(-1)[at] = _rounded(values.reshape(-1)[at].cpu().numpy(), dtype).to(out.device)
    return out


def settle(sums: TileSum, out: Tensor, at: Tensor, values: Tensor) -> None:
    """Round the elements `at` of a tile as the exact sum is; `values` is what float64 computed."""
    if not len(at):
        return
    near = values.cpu().numpy()  # so few that numpy's smaller overhead counts
    with np.errstate(over="ignore"):
        error = sums.relative * np.abs(near) + sums.absolute
        error[~np.isfinite(near)] = 0
        ends = np.concatenate([near - error, near + error])
    low, high = _rounded(ends, out.dtype).chunk(2)
    out.view(-1)[at] = low.to(out.device)
    open_ = differ(low, high)
    if open_.any():
        here = open_.nonzero().view(-1).to(at.device)
        settle_open(sums, out, at[here], values[here])


def settle_open(sums: TileSum, out: Tensor, at: Tensor, values: Tensor) -> None:
    """`settle` for elements that the error of `values` leaves open."""
    if len(at):
        exact = sums.settled(at, values, partial(_rounded, dtype=out.dtype))
        out.view(-1)[at] = exact.to(out.device)


def _tiny(out: Tensor, sums: TileSum, room: Room) -> Tensor:
    """Indices of the numbers so small that float64's error reaches beyond float32's precision."""
    bound = torch.tensor(2.0**27 * sums.absolute, dtype=torch.float64).to(out.dtype)
    size = torch.bitwise_and(out.view(torch.int16), 0x7FFF, out=room("size", out, torch.int16))
    limit = int(bound.view(torch.int16))
    if int(size.min()) > limit:
        return torch.empty(0, dtype=torch.int64, device=out.device)
    return (size.view(-1) <= limit).nonzero().view(-1)


def _open_in_single(values: Tensor, single: Tensor, sums: TileSum, room: Room) -> Tensor:
    """Indices of the values whose rounding to float32 the error of float64 may change.

    The 29 bits that are cut off say how far the middle is, in units of the last place. That is
    asked of all numbers with one margin, and those so small that their error is more are all taken.
    """
    roundings = sums.whole.roundings
    margin = max(min(roundings << 13, 1 << 20), 2 * roundings)  # as many of either sort
    # Subnormals have their middle at another bit.
    least = max(sums.absolute / (_EPSILON * margin / 4), 2.0**-125)
    if least > torch.finfo(torch.float32).max:
        least = math.inf  # what became infinite may be doubtful too
    low = room("low", values, torch.int32).copy_(values.view(torch.int64))
    torch.add(torch.tensor(8 * margin, dtype=torch.int32), low, alpha=8, out=low)
    size = torch.abs(single, out=room("size", single, torch.float32))
    if values.device.type != "cpu":
        return ((low <= _HALFWAY + 16 * margin) | (size <= least)).view(-1).nonzero().view(-1)
    found, small = (room(use, values, torch.bool).numpy() for use in ("half", "small"))
    np.less_equal(low.numpy(), np.int32(_HALFWAY + 16 * margin), out=found)
    np.less_equal(size.numpy(), np.float32(least), out=small)
    np.bitwise_or(found, small, out=found)
    return torch.from_numpy(_few(found.reshape(-1)))


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


def _rounded(values: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """A few numbers of float64 correctly rounded, by way of a float32 that is rounded to odd.

    There what is cut off leaves the last bit set; a second rounding to 22 bits or fewer is then
    correct (Boldo & Melquiond 2008, doi:10.1109/TC.2007.70819).
    """
    with np.errstate(over="ignore", invalid="ignore"):  # which the callers look for themselves
        single = values.astype(np.float32)
        if dtype == torch.float32:
            return torch.from_numpy(single)
        back = single.astype(np.float64)
        bits = single.view(np.int32)
        bits -= np.abs(back) > np.abs(values)
        bits |= back != values
    return torch.from_numpy(single).to(dtype)
