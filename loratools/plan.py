"""The plan of a fold: targets with their deltas, and all problems of fitting them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from loratools.adapter import (
    FLOATS,
    Adapter,
    Chained,
    Dense,
    Experts,
    Hadamard,
    Kind,
    Kronecker,
    Leaf,
    LowRank,
    Place,
    Renormed,
    Replace,
    Rotated,
    Scaled,
    Sparse,
    Spectral,
)  # fmt: skip
from loratools.errors import Problem
from loratools.names.prefixes import Prefix
from loratools.weights.base import Base

Ties = Literal["tied", "untied"]


@dataclass(frozen=True, slots=True)
class Term:
    """One delta at its place, with the weight it is folded with."""

    adapter: int
    key: str
    delta: Kind
    place: Place
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """One weight of the output: where its values come from and what is applied to them."""

    name: str
    shape: tuple[int, ...]  # as stored, in the output
    base: Leaf | None  # None: the base has no such weight (a task head)
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a fold would do, tensor by tensor; `problems` tells whether it may be done."""

    base: Base
    adapters: tuple[Adapter, ...]
    targets: Mapping[str, Target]
    problems: tuple[Problem, ...]
    matched: tuple[int, ...]  # deltas that found their weight, by adapter
    total: tuple[int, ...]
    prefixes: tuple[Prefix, ...]
    untied: bool = False  # head and embedding are written as two tensors

    @property
    def new(self) -> tuple[str, ...]:
        """Names of the weights that the base does not store."""
        return tuple(n for n in self.targets if n not in self.base.tensors)

    @property
    def resized(self) -> dict[str, int]:
        """Rows of the weights whose first extent changes: a grown or cut vocabulary."""
        return {
            n: t.shape[0]
            for n, t in self.targets.items()
            if t.base is not None and t.shape != t.base.shape
        }

    @property
    def counts(self) -> dict[str, str]:
        """Dtypes of new weights that are no floats: a counter or a mask within a new head."""
        return {
            n: term.delta.value.dtype
            for n in self.new
            for term in self.targets[n].terms
            if isinstance(term.delta, Replace) and term.delta.value.dtype not in FLOATS
        }

    def output_name(self, name: str) -> str:
        """The name of a weight in the output: beside a new head, as the task's class has it."""
        removed = next((p.removed for p in self.prefixes if p.removed), "")
        renames = removed and name in self.base.tensors and not self.untied and self.new
        return removed + name if renames else name


def module_shape(delta: Kind) -> tuple[int, ...] | None:
    """(out, in, *kernel) of a delta given in its module's own orientation."""
    match delta:
        case LowRank(a=a, b=b):
            return (b.shape[0], *a.shape[1:])
        case Renormed(delta=Dense(diff=diff)):
            return diff.shape
        case Renormed(delta=inner):
            return module_shape(inner)
        case Hadamard() | Kronecker() | Sparse() | Spectral() | Experts():
            return delta.shape
        case Dense() | Replace() | Scaled() | Rotated() | Chained():
            return None


def stored_shape(delta: Kind, transposed: bool) -> tuple[int, ...]:
    """The shape that a delta needs its stored weight to have (rows aside, for Replace by rows)."""
    match delta:
        case Dense(diff=diff):
            return diff.shape
        case Replace(value=value):
            return value.shape
        case LowRank() | Renormed() | Hadamard() | Kronecker() | Sparse() | Spectral() | Experts():
            shape = module_shape(delta)
            assert shape is not None
            if isinstance(delta, Experts):  # (experts, in, out)
                return (shape[0], *shape[:0:-1]) if transposed else shape
            return shape[::-1] if transposed else shape
        case Scaled() | Rotated() | Chained():
            return ()  # any: `kinds.fits` tells
