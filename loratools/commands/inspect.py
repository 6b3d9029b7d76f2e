"""`inspect`: what an adapter is, from its headers alone; no torch, no numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools import formats
from loratools.adapter import (
    Adapter,
    Chained,
    Experts,
    Kind,
    LowRank,
    Renormed,
    Replace,
    Source,
    leaves,
)
from loratools.commands.judging import assumptions
from loratools.commands.listing import bundles_at, duplicates
from loratools.commands.trained import architecture, frequent_tags, title, trigger_words
from loratools.containers.bundle import Bundle
from loratools.containers.hashes import EMPTY, Hashes, civitai, same
from loratools.errors import LoratoolsError, Problem, error, shown
from loratools.formats.looking import looks_like
from loratools.kinds import experts
from loratools.kinds.ranks import rank_of, scaling_of
from loratools.runtime import described, distinct


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
    error: Problem | None = None  # why it cannot be read, in a table; alone it is raised
    architecture: str | None = None  # the sort of base that its metadata names
    title: str | None = None
    trigger_words: tuple[str, ...] = ()
    tags: dict[str, int] | None = None  # the most frequent ones of the training captions
    hashes: Hashes | None = None
    stored_hash: str | None = None  # AutoV3 as the file itself gives it, uncut
    hash_agrees: bool | None = None  # None where it was not computed, or none is stored
    duplicate_of: str | None = None
    runtime: dict[str, Any] | None = None  # of an adapter that is no function of a weight

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
            "runtime": self.runtime,
            "problems": [as_json(p) for p in self.problems],
            "error": as_json(self.error) if self.error else None,
            "architecture": self.architecture,
            "title": self.title,
            "trigger_words": list(self.trigger_words),
            "tags": self.tags or {},
            "hashes": self._hashes(),
            "duplicate_of": self.duplicate_of,
        }

    def _hashes(self) -> dict[str, Any] | None:
        if self.hashes is None:
            return None
        return {
            "sha256": self.hashes.sha256,
            "autov1": self.hashes.autov1,
            "autov2": self.hashes.autov2,
            "autov3": self.hashes.autov3,
            "stored": self.stored_hash,
            "agrees": self.hash_agrees,
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


SORTS: dict[str, Callable[[Inspection], Any]] = {
    "name": lambda f: f.source,
    "format": lambda f: f.format or "",
    "base": lambda f: f.base or f.architecture or "~",
    "rank": lambda f: -max(f.ranks, default=0),
    "scaling": lambda f: -max(f.scalings, default=0.0),
    "targets": lambda f: -f.targets,
    "size": lambda f: -f.nbytes,
}


def inspect(
    *sources: str | Path,
    assume: Sequence[str] = (),
    sort: str | None = None,
    hash: bool = False,
) -> list[Inspection]:
    """Describe adapters from their headers; a folder of adapters gives one answer for each.

    What is no adapter gets `format=None` and what it looks like. What cannot be read raises where
    it is the only one asked for; among several it gets `error`, and the others are described all
    the same. `hash` reads whole files: the hashes that Civitai and A1111 search by. `sort` is one
    of SORTS: names upwards, numbers downwards.
    """
    if sort is not None and sort not in SORTS:
        raise error("usage", f"--sort {shown(sort)}: known are {', '.join(SORTS)}")
    settings = assumptions(assume, len(sources))
    asked = [(b, g) for s, g in zip(sources, settings, strict=True) for b in bundles_at(s)]
    files: list[Source | None] = []
    found: list[Inspection] = []
    for bundle, given in asked:
        try:
            one, name = _one(bundle, given)
            file = None
            if name is not None and (hash or bundle.path is not None):
                file = _whole(bundle, name) if hash else bundle.open(name)
            if hash and file is not None:
                one = _hashed(one, file)
        except LoratoolsError as cause:
            if len(asked) == 1:
                raise
            one, file = _unread(bundle.name, cause), None
        found.append(one)
        files.append(file)
    for i, first in enumerate(duplicates(files)):
        if first is not None:
            found[i] = replace(found[i], duplicate_of=found[first].source)
    return sorted(found, key=SORTS[sort]) if sort else found


def _whole(bundle: Bundle, name: str) -> Source:
    if bundle.path is not None:
        return bundle.open(name)
    from loratools.commands.sources import whole_file

    return whole_file(bundle, name)


def _one(bundle: Bundle, given: dict[str, str]) -> tuple[Inspection, str | None]:
    """What a bundle is, and the file that holds its tensors if it is an adapter of one file."""
    try:
        adapter = formats.read(bundle, assume=given)
    except LoratoolsError as cause:
        if cause.code != "unknown_type":
            raise
        known = formats.detected(bundle) is not None
        looks = cause.message if known else looks_like(bundle)
        return _empty(bundle.name, looks), None
    said = adapter.metadata
    described = replace(
        describe(adapter),
        architecture=architecture(said),
        title=title(said),
        trigger_words=trigger_words(said, bundle),
        tags=frequent_tags(said),
        stored_hash=said.get("sshs_model_hash"),
    )
    name = bundle.chosen or next(iter(adapter.files), None)
    return described, name if name is not None and name in bundle else None


def _empty(source: str, looks: str | None) -> Inspection:
    none: dict[Any, int] = {}
    return Inspection(
        source, None, looks, {}, none, none, 0, {}, 0, 0, {}, None, None, None, False, (), None
    )


def _unread(source: str, cause: LoratoolsError) -> Inspection:
    found = Problem(cause.code, cause.message, "error", source)
    return replace(_empty(source, None), error=found)


def _hashed(one: Inspection, file: Source) -> Inspection:
    """With the hashes of the whole file; a stored one that is not the file's is a warning."""
    hashes = civitai(file)
    stored = one.stored_hash
    if not stored or hashes.tensors is None:
        return replace(one, hashes=hashes)
    agrees = same(stored, hashes.tensors)
    if agrees:
        return replace(one, hashes=hashes, hash_agrees=True)
    why = (
        "the hash of nothing, a trainer's mistake" if stored.lower() == EMPTY else "another file's"
    )
    message = (
        f"{shown(one.source)}: sshs_model_hash is {shown(stored)[:16]} ({why}), "
        f"its tensors hash to {hashes.tensors[:16]}"
    )
    told = Problem("no_match", message, "warning", one.source, None, "search by the computed hash")
    return replace(one, hashes=hashes, hash_agrees=False, problems=(*one.problems, told))


def describe(adapter: Adapter) -> Inspection:
    """An adapter in memory, described."""
    ranked = [(r, scaling_of(d)) for d in adapter.deltas.values() if (r := rank_of(d)) is not None]
    kept = [leaf for d in adapter.deltas.values() for leaf in leaves(d)]
    if adapter.runtime is not None:
        kept += distinct(adapter.runtime.tensors)
    base = adapter.config.get("base_model_name_or_path")
    stops = ("not_foldable", "unknown_type", "residual_base")
    return Inspection(
        source=adapter.name,
        format=adapter.format,
        looks_like=None,
        kinds=adapter.kinds,
        ranks=_counted(rank for rank, _ in ranked),
        scalings=_counted(scaling for _, scaling in ranked),
        targets=len(adapter.deltas),
        modules=_counted(key.split(".")[-2] for key in adapter.deltas if "." in key),
        parameters=sum(leaf.numel for leaf in kept),
        nbytes=sum(leaf.nbytes for leaf in kept),
        dtypes=_counted(leaf.dtype for leaf in kept),
        base=base if isinstance(base, str) and base else None,
        revision=adapter.config.get("revision"),
        task=adapter.config.get("task_type"),
        foldable=not any(p.code in stops and p.severity == "error" for p in adapter.problems),
        problems=adapter.problems,
        adapter=adapter,
        runtime=None if adapter.runtime is None else described(adapter.runtime),
    )


def pair(delta: Kind) -> LowRank | None:
    """The low-rank pair within a delta, if there is one."""
    match delta:
        case LowRank():
            return delta
        case Renormed(delta=LowRank() as inner):
            return inner
        case Experts():
            return experts.single(delta, 0)
        case Chained(method="pissa" | "olora", parts=parts):
            return LowRank(parts["a"], parts["b"], delta.scaling)
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
