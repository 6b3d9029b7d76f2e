"""Updates made a plain LoRA where a format does not know their method: exactly, or not at all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from loratools import kinds
from loratools.adapter import Adapter, Chained, Hadamard, Kind, Kronecker, LowRank, Renormed
from loratools.errors import Problem, shown

# Modules of image models that are convolutions of more than one place, in any vocabulary.
_CONVOLUTION = re.compile(
    r"(?:^|[._])(?:conv(?:_in|_out|[12])?|op|in_layers[._]2|out_layers[._]3)$"
)

Shapes = Mapping[str, tuple[int, ...]]
Lost = Callable[[Adapter], list[Problem]]


def lowered_for(adapter: Adapter, lost: Lost, shapes: Shapes) -> Adapter:
    """The adapter with factors in place of every update that `lost` names and that has factors.

    An update whose rank would be no less than its weight's stays, and so stays lost.
    """
    if not any(_made(delta) is not None for delta in adapter.deltas.values()):
        return adapter
    adapter = replace(adapter, deltas=_shaped(adapter.deltas, shapes))
    new = dict(adapter.deltas)
    for problem in lost(adapter):
        key = problem.target
        if key is None or problem.code != "loss" or (made := _made(new.get(key))) is None:
            continue
        factors = kinds.low_rank(made)
        if factors is not None and not _needs_kernel(key, made):
            delta = new[key]
            new[key] = replace(delta, delta=factors) if isinstance(delta, Renormed) else factors
    return replace(adapter, deltas=new)


def _made(delta: Kind | None) -> Hadamard | Kronecker | None:
    inner = delta.delta if isinstance(delta, Renormed) else delta
    return inner if isinstance(inner, Hadamard | Kronecker) else None


def _shaped(deltas: Mapping[str, Kind], shapes: Shapes) -> dict[str, Kind]:
    """Updates of convolutions whose files do not say the kernel, with the base's."""
    new = dict(deltas)
    for key, delta in deltas.items():
        made, shape = _made(delta), shapes.get(key, ())
        if made is None or len(shape) < 3 or made.shape != (shape[0], math.prod(shape[1:])):
            continue
        known = replace(made, shape=shape)
        new[key] = replace(delta, delta=known) if isinstance(delta, Renormed) else known
    return new


def _needs_kernel(key: str, made: Hadamard | Kronecker) -> bool:
    """Whether factors would have to have a kernel's shape, which nothing here says."""
    return len(made.shape) == 2 and _CONVOLUTION.search(key.rpartition(".")[0]) is not None


def reasons(adapter: Adapter, problems: list[Problem]) -> list[Problem]:
    """What is lost, and what can be done where only factors are in the way."""
    said = []
    for problem in problems:
        made = _made(adapter.deltas.get(problem.target or ""))
        if problem.code == "loss" and made is not None and problem.remedy is None:
            shape = "x".join(str(n) for n in made.shape)
            remedy = f"as factors it has the full rank of {shape}: cut it with --rank, or fold it"
            if _needs_kernel(problem.target or "", made):
                remedy = "the file does not say its kernel: give the base (--base)"
            problem = replace(problem, remedy=remedy)
        said.append(problem)
    return said


def said_of(old: Adapter, new: Adapter) -> list[str]:
    """One line for each method that became a plain LoRA, with the ranks before and after."""
    said = []
    here = _counts(new)
    after = [d.rank for d in map(_inner, new.deltas.values()) if isinstance(d, LowRank)]
    for name, ranks in _counts(old).items():
        if len(here.get(name, [])) >= len(ranks) or not after:
            continue
        before = f"rank {max(ranks)} -> {max(after)}" if max(ranks) else f"rank {max(after)}"
        said.append(f"{shown(name)} -> LoRA, exact, {before}")
    return said


def _inner(delta: Kind) -> Kind:
    return delta.delta if isinstance(delta, Renormed) else delta


def _counts(adapter: Adapter) -> dict[str, list[int]]:
    """The ranks of an adapter's updates by their method; 0 where there is none."""
    found: dict[str, list[int]] = {}
    for delta in map(_inner, adapter.deltas.values()):
        match delta:
            case Hadamard():
                found.setdefault("LoHa", []).append(kinds.hadamard.rank(delta))
            case Kronecker():
                found.setdefault("LoKr", []).append(kinds.kronecker.rank(delta) or 0)
            case Chained(method=kinds.glora.NAME):
                found.setdefault("GLoRA", []).append(int(delta.settings["rank"]))
            case _:
                pass
    return found
