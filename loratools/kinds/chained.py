"""Sums whose terms contain W0: GLoRA of LyCORIS and of PEFT, and their kin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.adapter import Chained, Leaf, LowRank
from loratools.errors import error, shown
from loratools.kinds import glora, glora_peft, residual, seeded, sized, subspaces, tlora

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Method:
    """What a sum needs and does."""

    shape: Callable[[Chained], tuple[int, ...] | None]
    block: Callable[[Chained], int]
    ready: Callable[[Chained], Chained]
    apply: Callable[[Chained, Tensor, int], Tensor]  # (delta, rows of W0, first row): W
    transposed: Callable[[Chained], Chained] | None = None


METHODS: Mapping[str, Method] = {
    name: Method(*made)
    for family in (glora, tlora, glora_peft, residual, seeded, sized, subspaces)
    for name, made in family.METHODS.items()
}


FITS: Mapping[str, Callable[[Chained, tuple[int, ...]], str | None]] = {
    **dict.fromkeys(glora_peft.METHODS, glora_peft.fits),
    **dict.fromkeys(seeded.METHODS, seeded.fits),
    **dict.fromkeys(sized.METHODS, sized.fits),
    **dict.fromkeys(subspaces.METHODS, subspaces.fits),
}


def _method(delta: Chained) -> Method:
    if delta.method not in METHODS:
        raise error("unknown_type", f"no sum over W0 is called {shown(delta.method)}")
    return METHODS[delta.method]


def shape(delta: Chained) -> tuple[int, ...] | None:
    """(out, in, *kernel) of the weight, where the parts say it."""
    return _method(delta).shape(delta)


def fits(delta: Chained, stored: tuple[int, ...]) -> str | None:
    """Why the parts are not those of a weight of this module shape."""
    own = FITS.get(delta.method)
    if own is not None:
        return own(delta, stored)
    mine = shape(delta)
    if mine is None or _without_ones(mine) == _without_ones(stored):
        return None
    return f"adapter is {mine}, base is {stored}"


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution and a linear layer hold the same matrix."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def ready(delta: Chained) -> Chained:
    """What all tiles share, computed once in float64."""
    return _method(delta).ready(delta)


def block(delta: Chained) -> int:
    """Rows that belong together."""
    return _method(delta).block(delta)


def apply(delta: Chained, w0: Tensor, start: int) -> Tensor:
    """W for whole blocks of rows."""
    return _method(delta).apply(delta, w0, start)


def given(delta: Chained, w0: Tensor) -> LowRank | None:
    """W - W0 as factors, exactly, where W0 (whole, in float64) gives them; else None."""
    made = {**subspaces.FACTORS, **residual.FACTORS, **glora.FACTORS}.get(delta.method)
    if made is None or delta.settings.get("turned"):
        return None
    b, a = made(delta, w0)
    return LowRank(Leaf.of("", a), Leaf.of("", b), 1.0)


def transposed(delta: Chained) -> Chained:
    """The same sum over the transposed weight, where the method has one."""
    turn = _method(delta).transposed
    if turn is None:
        raise error("usage", f"{shown(delta.method)} has no transposed form")
    return turn(delta)
