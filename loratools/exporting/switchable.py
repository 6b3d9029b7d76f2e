"""Graphs whose adapters are chosen call by call: y = x·W + x·A·B, where A and B come from outside.

A and B are initialisers of rank 0 that are graph inputs too, which ONNX (IR 4 and later) lets a
caller override and onnxruntime fills from an .onnx_adapter (microsoft/onnxruntime:
onnxruntime/core/session/lora_adapters.cc). Without any the graph computes what the base does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools import kinds, views
from loratools.adapter import Adapter, Kind, Leaf, LowRank, Made, Replace
from loratools.bind import bind
from loratools.containers.bundle import local
from loratools.containers.strict_json import loads
from loratools.errors import Problem, error, refusal, shown
from loratools.exporting import branches, outline, packed
from loratools.plan import Plan, Target, Ties
from loratools.rewriting import as_stored
from loratools.weights.base import Base
from loratools.weights.graph_names import SIDECAR
from loratools.weights.graphs import graph_base

if TYPE_CHECKING:
    import onnx

PROPERTY = "loratools.switchable"  # of metadata_props: what `pack` and `session` need to know
NAMES = "{module}.lora_{side}.weight"  # as Olive has them
ONNX = {"F32": 1, "F16": 10, "F64": 11, "BF16": 16}


@dataclass(frozen=True, slots=True)
class Switch:
    """The parameters of one weight: names of A (inner, rank) and B (rank, outer), their sizes.

    `turned`: A·B is added to the transpose of the weight that a checkpoint stores.
    """

    target: str
    a: str
    b: str
    inner: int
    outer: int
    dtype: str
    turned: bool


@dataclass(frozen=True, slots=True)
class Switches:
    """All parameters of a switchable graph, and the fingerprint of the weights in it."""

    base: str
    parameters: tuple[Switch, ...]

    @property
    def version(self) -> int:
        """A number for the model_version of packs, by which a session tells another base."""
        return int(self.base[:8], 16) & 0x7FFFFFFF

    def as_json(self) -> dict[str, Any]:
        rows = {s.target: [s.a, s.b, s.inner, s.outer, s.dtype, s.turned] for s in self.parameters}
        return {"schema": 1, "base": self.base, "parameters": rows}

    @staticmethod
    def read(text: str, name: str) -> Switches:
        """What `as_json` wrote; MalformedError for anything else."""
        try:
            said = json.loads(text)
            rows = tuple(
                Switch(str(t), str(a), str(b), int(n), int(m), str(d), bool(turned))
                for t, (a, b, n, m, d, turned) in said["parameters"].items()
            )
            base = str(said["base"])
            int(base[:8], 16)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as cause:
            message = f"{shown(name)}: {PROPERTY} is not what loratools writes"
            raise error("malformed", message) from cause
        return Switches(base, rows)


# ------------------------------------------------------------------------------- the graph


def switchable(
    graph: Path,
    out: Path,
    adapters: Sequence[Adapter],
    *,
    names: str = NAMES,
    ties: Ties | None = None,
    plan: Plan | None = None,
) -> Switches:
    """Write `out`: the base graph with a switch at every weight that some adapter changes.

    `names` makes the parameters' names from {module} and {side}. A `plan` over `base_of(graph)`,
    judged by the caller, stands instead of fitting here. Raises every problem at once: what does
    not fit, kinds that are no exact product, weights that meet no matrix product.
    """
    if not all(f"{{{word}}}" in names for word in ("module", "side")) or names.count("{") != 2:
        raise error("usage", f"{shown(names)}: names are made of {{module}} and {{side}}")
    base = plan.base if plan is not None else base_of(graph)
    plan = plan or _plan(adapters, base, ties)
    problems = list(_inexact(plan))
    model = outline.opened(graph)
    uses = branches.uses(model.graph)
    switches: list[Switch] = []
    places: list[list[branches.Use]] = []
    for name, target in plan.targets.items():
        if not target.terms:
            continue
        found = _uses(plan, name, uses)
        wrong = [use.why for use in found if use.why]
        if wrong or not found:
            why = wrong[0] if wrong else "no node of the graph reads it"
            problems.append(_cannot(name, why))
            continue
        dtype = target.base.dtype if target.base is not None else ""
        switches.append(_switch(target, found[0].turned, names, dtype))
        places.append(found)
    problems += _clashes(switches, model)
    refused = refusal(problems)
    if refused:
        raise refused
    for switch, found in zip(switches, places, strict=True):
        branches.insert(model.graph, switch, found)
    made = Switches(fingerprint(base), tuple(switches))
    _describe(model, made, base)
    outline.written(model, graph, out)
    return made


def _plan(
    adapters: Sequence[Adapter],
    base: Base,
    ties: Ties | None,
    weights: Sequence[float] | None = None,
) -> Plan:
    """The adapters at the graph's weights; what is refused there is raised here."""
    plan = bind(adapters, base, weights=weights, ties=ties)
    refused = refusal(plan.problems)
    if refused:
        raise refused
    return plan


def exact(delta: Kind, base: Leaf | None) -> LowRank | None:
    """The delta as one product of two matrices, where it is exactly that.

    PEFT saves the base's own embedding along with a LoRA upon it: a replacement by equal numbers.
    """
    if isinstance(delta, Replace) and delta.rows is None and base is not None:
        known = delta.then is not None and not packed.is_packed(base)
        same = known and _same(delta.value, base)
        return exact(delta.then, base) if delta.then is not None and same else None
    if isinstance(delta, Made):
        return kinds.low_rank(delta)
    return delta if isinstance(delta, LowRank) else None


def _same(value: Leaf, base: Leaf) -> bool:
    """Whether two weights are equal, in the dtype of the graph."""
    if value.dtype == base.dtype or value.shape != base.shape:
        return views.same(value, base)
    stored = base.tensor()
    return bool((value.tensor().to(stored.dtype) == stored).all())


def _inexact(plan: Plan) -> Iterator[Problem]:
    for name, target in plan.targets.items():
        for term in target.terms:
            low = exact(term.delta, target.base)
            if low is not None and len(low.a.shape) == 2:
                continue
            what = type(term.delta).__name__ if low is None else "convolution"
            message = (
                f"{shown(name)}: a {what} is no x·A·B that a graph could add beside a weight: fold "
                "it instead (without --switchable)"
            )
            if isinstance(term.delta, Replace) and packed.is_packed(target.base):
                message = (
                    f"{shown(name)}: the adapter brings a copy of this weight, and the graph has "
                    "it quantised: make the float graph switchable, then quantise that"
                )
            yield Problem(
                "not_exportable", message, "error", plan.adapters[term.adapter].name, name
            )


def base_of(graph: Path) -> Base:
    """The base that a graph is, from its headers."""
    return graph_base(local(graph), graph.name)


def _uses(plan: Plan, name: str, uses: Mapping[str, Sequence[branches.Use]]) -> list[branches.Use]:
    """The nodes that read a weight, turned as they see what the checkpoint stores.

    Head and embedding of one tensor are told apart by what they do, where they are to differ.
    """
    graph, tie = plan.base.graph, plan.base.tied()
    assert graph is not None
    known = graph.found.stored
    stored = known.get(name) or (known.get(tie[1]) if tie and name == tie[0] else None)
    if stored is None:
        return []
    nodes = {use.node for use in stored.uses}
    found = [
        replace(use, turned=use.turned ^ stored.turned)
        for use in uses.get(stored.tensor.name, ())
        if stored.alone or use.number in nodes
    ]
    if plan.untied and tie and name in tie and not any(n in known for n in tie if n != name):
        found = [use for use in found if use.looks_up == (name == tie[1])]
    return found


def _cannot(name: str, why: str) -> Problem:
    message = f"{shown(name)}: {why}; fold this adapter instead, or --skip the weight"
    return Problem("not_exportable", message, "error", None, name)


def _switch(target: Target, turned: bool, names: str, dtype: str) -> Switch:
    """The parameters at a weight; `turned` where its first use multiplies by the transpose."""
    inner, outer = target.shape[::-1] if turned else target.shape
    module = target.name.removesuffix(".weight")
    a, b = (names.format(module=module, side=side) for side in "AB")
    return Switch(target.name, a, b, inner, outer, dtype, turned)


def _clashes(switches: Sequence[Switch], model: onnx.ModelProto) -> Iterator[Problem]:
    taken = branches.names(model.graph)
    for switch in switches:
        for name in (switch.a, switch.b):
            if name in taken:
                message = f"{shown(name)}: the graph has this name already; is it switchable?"
                yield Problem("duplicate", message, "error", None, switch.target)
            taken.add(name)
        if switch.dtype not in ONNX:
            yield _cannot(switch.target, f"it is stored as {switch.dtype}")


def _describe(model: onnx.ModelProto, made: Switches, base: Base) -> None:
    """What was done, and which weights are which, lest new nodes make that hard to see."""
    model.ir_version = max(model.ir_version, 4)
    there = {entry.key for entry in model.metadata_props}
    if SIDECAR not in there and base.graph is not None:
        stored = base.graph.found.stored
        table = {s.tensor.name: [name, s.turned] for name, s in sorted(stored.items()) if s.alone}
        entry = model.metadata_props.add()
        entry.key, entry.value = SIDECAR, json.dumps(table, separators=(",", ":"))
    for entry in model.metadata_props:
        if entry.key == PROPERTY:
            message = "the graph is switchable already: begin with the base's own graph"
            raise error("not_exportable", message)
    entry = model.metadata_props.add()
    entry.key = PROPERTY
    entry.value = json.dumps(made.as_json(), separators=(",", ":"))


def fingerprint(base: Base) -> str:
    """sha256 of all weights that have a name, by name, dtype, shape and bytes."""
    found = hashlib.sha256()
    for name, leaf in sorted(base.tensors.items()):
        inner = hashlib.sha256()
        for piece in outline.pieces(leaf):
            inner.update(piece)
        found.update(f"{name} {leaf.dtype} {leaf.shape} {inner.hexdigest()}\n".encode())
    return found.hexdigest()


def switches_of(graph: Path) -> Switches | None:
    """The switches that a graph's metadata describe; None where it has none."""
    text = outline.property_of(graph, PROPERTY)
    return None if text is None else Switches.read(text, graph.name)


# ------------------------------------------------------------------------------- packs


def pack(
    adapters: Adapter | Sequence[Adapter],
    graph: Path,
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    ties: Ties | None = None,
    plan: Plan | None = None,
) -> dict[str, str]:
    """Write the .onnx_adapter `out` for a switchable graph, and what it is made for beside it.

    Every parameter of the graph is in it (rank 0 where the adapter has nothing), scaling and
    weight in B; several adapters become one exactly, by their ranks one behind another. A `plan`
    with weights, judged by the caller, stands instead of fitting here. Raises what does not fit,
    `overflow` beyond the graph's dtype; returns sha256 by file name.
    """
    from loratools.containers import flatbuffer

    some = [adapters] if isinstance(adapters, Adapter) else list(adapters)
    factors = [1.0] * len(some) if weights is None else list(weights)
    made = switches_of(graph)
    if made is None:
        message = f"{shown(graph.name)} has no switches: make it with `export --switchable`"
        raise error("not_exportable", message)
    plan = plan or _plan(some, packed.beside(base_of(graph), made), ties, factors)
    problems = list(_inexact(plan))
    known = {s.target: s for s in made.parameters}
    for name, target in plan.targets.items():
        if target.terms and name not in known:
            problems.append(
                Problem(
                    "unmatched",
                    f"{shown(name)} has no switch in {shown(graph.name)}, made for other adapters",
                    "error",
                    plan.adapters[target.terms[0].adapter].name,
                    name,
                    "export the graph again with this adapter among its --adapter",
                )
            )
    refused = refusal(problems)
    if refused:
        raise refused
    leaves: dict[str, Leaf] = {}
    for switch in made.parameters:
        leaves |= branches.parameters(switch, _pairs(plan.targets.get(switch.target)))
    digest = flatbuffer.write(out, leaves, adapter_version=1, model_version=made.version)
    beside = out.with_name(out.name + ".json")
    said = {
        "schema": 1,
        "graph": graph.name,
        "base": made.base,
        "adapters": [Path(a.name).name for a in some],
        "weights": factors,
        "ranks": {s.target: leaves[s.a].shape[1] for s in made.parameters},
        "sha256": digest,
    }
    text = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
    beside.write_text(text, encoding="utf-8")
    return {out.name: digest, beside.name: hashlib.sha256(text.encode()).hexdigest()}


def _pairs(target: Target | None) -> list[tuple[float, LowRank]]:
    """What adapters add to a weight, each as the weight is stored, with what it weighs."""
    found = []
    for term in target.terms if target is not None else ():
        low = exact(term.delta, target.base if target is not None else None)
        turned = as_stored(low) if low is not None and term.place.transposed else low
        if isinstance(turned, LowRank):
            found.append((term.weight, turned))
    return found


def described(pack_file: Path) -> Mapping[str, Any] | None:
    """What stands beside a pack of ours; None beside others' files."""
    beside = pack_file.with_name(pack_file.name + ".json")
    if not beside.is_file():
        return None
    found = loads(local(pack_file).read(beside.name, 1 << 24), beside.name)
    return found if isinstance(found, Mapping) else None
