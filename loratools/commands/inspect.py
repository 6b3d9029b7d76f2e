"""`inspect`: what an adapter is, from its headers alone; no torch, no numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools import formats
from loratools.adapter import Adapter, Kind, LowRank, Renormed, Replace, leaves
from loratools.commands.judging import assumptions
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError, Problem


@dataclass(frozen=True, slots=True)
class Inspection:
    """What stands at one source; `format` is None where it is no adapter (`looks_like` says)."""

    source: str
    format: str | None
    looks_like: str | None
    kinds: dict[str, int]
    ranks: dict[int, int]  # rank → number of deltas
    scalings: dict[float, int]
    targets: int
    modules: dict[str, int]  # last name of the module → number of deltas
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    base: str | None
    revision: str | None
    task: str | None
    foldable: bool
    problems: tuple[Problem, ...]
    adapter: Adapter | None

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints; its keys never change."""
        return {
            "source": self.source,
            "format": self.format,
            "looks_like": self.looks_like,
            "kinds": self.kinds,
            "ranks": {str(r): n for r, n in self.ranks.items()},
            "scalings": {f"{s:g}": n for s, n in self.scalings.items()},
            "targets": self.targets,
            "modules": self.modules,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dtypes": self.dtypes,
            "base": {"id": self.base, "revision": self.revision},
            "task": self.task,
            "foldable": self.foldable,
            "problems": [as_json(p) for p in self.problems],
        }


def as_json(problem: Problem) -> dict[str, Any]:
    """A problem as JSON."""
    return {
        "code": problem.code,
        "severity": problem.severity,
        "adapter": problem.adapter,
        "target": problem.target,
        "message": problem.message,
        "remedy": problem.advice,
        "waivable": problem.waivable,
    }


def inspect(*sources: str | Path, assume: Sequence[str] = ()) -> list[Inspection]:
    """Describe adapters from their headers; a folder of adapters gives one answer for each.

    What is no adapter gets `format=None` and what it looks like; malformed files raise.
    """
    found: list[Inspection] = []
    settings = assumptions(assume, len(sources))
    for source, given in zip(sources, settings, strict=True):
        bundle = local(source)
        inner = formats.adapters_in(bundle)
        if inner and not any(f.detect(bundle) for f in formats.FORMATS):
            found += [_one(str(p), given) for p in inner]
        else:
            found.append(_one(str(source), given))
    return found


def _one(source: str, given: dict[str, str]) -> Inspection:
    try:
        adapter = formats.read(source, assume=given)
    except LoratoolsError as cause:
        if cause.code != "unknown_type":
            raise
        looks = cause.message.partition(": ")[2] or cause.message
        nothing: dict[Any, int] = {}
        return Inspection(
            source, None, looks, {}, nothing, nothing, 0, {}, 0, 0, {}, None, None, None, False, (),
            None,
        )  # fmt: skip
    return describe(adapter)


def describe(adapter: Adapter) -> Inspection:
    """An adapter in memory, described."""
    pairs = [p for d in adapter.deltas.values() if (p := pair(d)) is not None]
    kept = [leaf for d in adapter.deltas.values() for leaf in leaves(d)]
    base = adapter.config.get("base_model_name_or_path")
    stops = ("not_foldable", "unknown_type", "residual_base")
    return Inspection(
        source=adapter.name,
        format=adapter.format,
        looks_like=None,
        kinds=adapter.kinds,
        ranks=_counted(p.rank for p in pairs),
        scalings=_counted(p.scaling for p in pairs),
        targets=len(adapter.deltas),
        modules=_counted(key.split(".")[-2] for key in adapter.deltas if "." in key),
        parameters=sum(leaf.numel for leaf in kept),
        nbytes=sum(leaf.nbytes for leaf in kept),
        dtypes=_counted(leaf.dtype for leaf in kept),
        base=base if isinstance(base, str) and base else None,
        revision=adapter.config.get("revision"),
        task=adapter.config.get("task_type"),
        foldable=not any(p.code in stops for p in adapter.problems),
        problems=adapter.problems,
        adapter=adapter,
    )


def pair(delta: Kind) -> LowRank | None:
    """The low-rank pair within a delta, if there is one."""
    match delta:
        case LowRank():
            return delta
        case Renormed(delta=LowRank() as inner):
            return inner
        case Replace(then=then) if then is not None:
            return pair(then)
        case _:
            return None


def _counted(values: Any) -> dict[Any, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], str(item[0]))))


def human(nbytes: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
