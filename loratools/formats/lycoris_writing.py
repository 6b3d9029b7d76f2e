"""LyCORIS's methods as their tensors, and which deltas they can hold."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from loratools import views
from loratools.adapter import (
    Chained,
    Hadamard,
    Kind,
    Kronecker,
    Leaf,
    Renormed,
    Rotated,
    Scaled,
)
from loratools.kinds.ranks import rank_of

if TYPE_CHECKING:
    import torch

KOHYA = "oft of kohya"
_ROTATIONS = ("oft of lycoris", "boft of lycoris", KOHYA)
_CHAINS = {
    "glora of lycoris": {name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm")},
    "tlora of lycoris": {"q": "q_layer.weight", "p": "p_layer.weight", "lambda": "lambda_layer"},
}


def held(delta: Kind) -> bool:
    """Whether one of LyCORIS's methods says what this delta says."""
    match delta:
        case Hadamard() | Kronecker():
            return True
        case Renormed(delta=inner):
            return isinstance(inner, Hadamard | Kronecker)
        case Scaled(by="rows" | "columns", factor=Leaf(), offset=offset):
            return offset in (0.0, 1.0)
        case Rotated(method=method, side=side):
            return method in _ROTATIONS and side == "out"
        case Chained(method=method, settings=settings):
            return method in _CHAINS and not settings.get("turned")
        case _:
            return False


def parts_of(delta: Kind) -> dict[str, Leaf]:
    """The tensors of a delta, by what stands behind its module's name."""
    match delta:
        case Hadamard():
            return _factors("hada", delta) | _alpha(delta)
        case Kronecker():
            if rank_of(delta) is not None:
                return _factors("lokr", delta) | _alpha(delta)
            # Both whole: no reader asks alpha, so a scaling has to be in a factor.
            parts = _factors("lokr", delta)
            parts["lokr_w1"] = views.scaled(parts["lokr_w1"], delta.scaling)
            return parts | {"alpha": number(1.0 if delta.alpha is None else delta.alpha)}
        case Renormed(delta=Hadamard() | Kronecker() as inner, magnitude=magnitude, axis=axis):
            ones = max(len(magnitude.shape), len(inner.shape)) - 1
            rest = (1,) * ones
            shape = (magnitude.numel, *rest) if axis == "out" else (1, magnitude.numel, *rest[1:])
            return parts_of(inner) | {"dora_scale": views.reshaped(magnitude, *shape)}
        case Scaled(factor=Leaf() as factor, by=by):
            flag = Leaf("on_input", "I64", (), source=Bytes(struct.pack("<q", by == "columns")))
            shape = (factor.numel,)
            if len(factor.shape) > 2:
                shape = (1, factor.numel, *(1 for _ in factor.shape[2:]))
            leaf = factor if delta.offset == 1.0 else _less_one(factor)
            return {"weight": views.reshaped(leaf, *shape), "on_input": flag}
        case Rotated(parts=parts, settings=settings):
            alpha = settings.get("alpha")
            return dict(parts) | ({} if alpha is None else {"alpha": number(alpha)})
        case Chained(method=method, parts=parts):
            return {_CHAINS[method][name]: leaf for name, leaf in parts.items()} | _alpha(delta)
        case _:
            return {}


def _factors(front: str, delta: Hadamard | Kronecker) -> dict[str, Leaf]:
    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")
    there = {name: getattr(delta, name, None) for name in names}
    return {f"{front}_{name}": leaf for name, leaf in there.items() if leaf is not None}


def _alpha(delta: Hadamard | Kronecker | Chained) -> dict[str, Leaf]:
    """The number that makes alpha / rank the scaling: the stored one where it does."""
    rank = rank_of(delta)
    assert rank is not None
    stored: Any = delta.settings.get("alpha") if isinstance(delta, Chained) else delta.alpha
    return {"alpha": alpha(stored, rank, delta.scaling)}


def alpha(stored: float | None, rank: int, scaling: float) -> Leaf:
    """The number that makes alpha / rank the scaling: the stored one where it does."""
    value = scaling * rank if stored is None or stored / rank != scaling else stored
    return number(value)


def number(value: float) -> Leaf:
    """A number as one F32, or F64 where F32 would change it."""
    try:
        raw = struct.pack("<f", value)
    except OverflowError:
        raw = b""
    if raw and struct.unpack("<f", raw)[0] == value:
        return Leaf("alpha", "F32", (), source=Bytes(raw))
    return Leaf("alpha", "F64", (), source=Bytes(struct.pack("<d", value)))


def _less_one(factor: Leaf) -> Leaf:
    """LyCORIS stores how far a factor is from 1, PEFT the factor itself."""

    def make() -> torch.Tensor:
        return (factor.tensor().double() - 1).float()

    return views.later(factor.name, "F32", factor.shape, make)


class Bytes:
    """A few bytes as a source."""

    def __init__(self, raw: bytes, name: str = "made here") -> None:
        self.name, self.size, self._raw = name, len(raw), raw

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from `offset`."""
        return self._raw[offset : offset + length]
