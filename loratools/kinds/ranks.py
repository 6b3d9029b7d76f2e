"""The rank of a delta, and what it is multiplied with, whatever its kind."""

from __future__ import annotations

from loratools.adapter import (
    Chained,
    Experts,
    Hadamard,
    Kind,
    Kronecker,
    Leaf,
    LowRank,
    Renormed,
    Replace,
)


def rank_of(delta: Kind) -> int | None:
    """The number that its alpha is divided by; None where there is none."""
    match delta:
        case LowRank() | Experts():
            return delta.rank
        case Renormed(delta=inner):
            return rank_of(inner)
        case Replace(then=then):
            return None if then is None else rank_of(then)
        case Hadamard(w1_b=leaf) | Kronecker(w1_b=Leaf() as leaf) | Kronecker(w2_b=Leaf() as leaf):
            return leaf.shape[0]
        case Chained(method="glora of lycoris", settings=settings):
            return int(settings["rank"])
        case Chained(method="tlora of lycoris", parts=parts):
            return parts["q"].shape[0]
        case Chained(method="pissa" | "olora", parts=parts):
            return parts["a"].shape[0]
        case _:
            return None


def scaling_of(delta: Kind) -> float:
    """What its factors are multiplied with; 1 where nothing is."""
    match delta:
        case Renormed(delta=inner):
            return scaling_of(inner)
        case Replace(then=then):
            return 1.0 if then is None else scaling_of(then)
        case _:
            return float(getattr(delta, "scaling", 1.0))
