"""Two decoders made one: the first step and those on a cache, as branches over the same weights.

The layout is optimum's `decoder_model_merged.onnx` (optimum/onnx/graph_transformations.py): the
input `use_cache_branch` says which branch runs. Where optimum gives the cross-attention's cache
back empty, it is given back as it came.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, helper

from loratools.exporting.cleaning import array_of, write
from loratools.exporting.graph_files import SIDECAR, sidecar
from loratools.exporting.parameters import digest

if TYPE_CHECKING:
    from numpy.typing import NDArray

SWITCH = "use_cache_branch"


def merge(first: Path, next_: Path, out: Path, *, external: bool = False) -> None:
    """Write one graph of two cleaned ones; weights that both hold stand in it once."""
    models = [onnx.load(path, load_external_data=False) for path in (first, next_)]
    weights: dict[str, NDArray[Any]] = {}
    known: dict[str, list[Any]] = {}
    branches = []
    for model, front, path in zip(models, ("first", "next"), (first, next_), strict=True):
        said = sidecar(model)
        named = {}
        for tensor in model.graph.initializer:
            array = array_of(tensor, path.parent)
            name = _place(tensor.name, array, said, front, weights, known)
            named[tensor.name] = name
        branches.append(_branch(model.graph, front, named))
    outputs = [v.name for v in models[0].graph.output]
    _hand_over(branches[1], outputs, models[0].graph)
    for branch, front in zip(branches, ("first", "next"), strict=True):
        del branch.output[:]
        branch.output.extend(
            helper.make_value_info(f"{front}/{name}", _type(models[0].graph.output, name))
            for name in outputs
        )
    graph = onnx.GraphProto(name="main")
    inputs = {v.name: v for model in models for v in model.graph.input}
    graph.input.extend(inputs[n] for n in _in_order(models, inputs))
    graph.input.append(helper.make_tensor_value_info(SWITCH, TensorProto.BOOL, [1]))
    node = helper.make_node(
        "If", [SWITCH], outputs, name="decode", then_branch=branches[1], else_branch=branches[0]
    )
    graph.node.append(node)
    graph.output.extend(_loosened(v) for v in models[0].graph.output)
    whole = models[0]
    whole.graph.CopyFrom(graph)
    for entry in whole.metadata_props:
        if entry.key == SIDECAR:
            entry.value = json.dumps(known, separators=(",", ":"))
    write(whole, list(weights.items()), out, external=external)


def _place(
    name: str, array: NDArray[Any], said: Mapping[str, tuple[str, bool]], front: str,
    weights: dict[str, NDArray[Any]], known: dict[str, list[Any]],
) -> str:  # fmt: skip
    """Where a branch's initialiser stands in the whole: a parameter once, all else by branch."""
    if name not in said:
        weights[f"{front}/{name}"] = array
        return f"{front}/{name}"
    entry = list(said[name])
    if name in known and (known[name] != entry or digest(weights[name]) != digest(array)):
        name = f"{front}/{name}"
    weights.setdefault(name, array)
    known[name] = entry
    return name


def _branch(graph: onnx.GraphProto, front: str, named: Mapping[str, str]) -> onnx.GraphProto:
    """The nodes of a decoder, with names that stand in no other's way."""
    outside = dict(named) | {v.name: v.name for v in graph.input}
    made = onnx.GraphProto(name=front)
    made.node.extend(graph.node)
    _renamed(made.node, front, outside)
    return made


def _renamed(nodes: Iterable[onnx.NodeProto], front: str, outside: Mapping[str, str]) -> None:
    def to(name: str) -> str:
        return outside.get(name, f"{front}/{name}") if name else name

    for node in nodes:
        node.input[:] = [to(n) for n in node.input]
        node.output[:] = [to(n) for n in node.output]
        node.name = f"{front}/{node.name}"
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _renamed(inner.node, front, outside)
                for value in (*inner.input, *inner.output, *inner.initializer):
                    value.name = to(value.name)


def _hand_over(branch: onnx.GraphProto, outputs: list[str], graph: onnx.GraphProto) -> None:
    """In the branch with a cache, what it does not compute comes out as it came in."""
    made = {n for node in branch.node for n in node.output}
    for name in outputs:
        if f"next/{name}" not in made:
            given = name.replace("present.", "past_key_values.")
            branch.node.append(
                helper.make_node("Identity", [given], [f"next/{name}"], name=f"next/keep/{name}")
            )


def _type(values: Iterable[onnx.ValueInfoProto], name: str) -> onnx.TypeProto:
    return next(_loosened(v) for v in values if v.name == name).type


def _loosened(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """A decoder's output as both branches have it: their lengths differ."""
    made = onnx.ValueInfoProto()
    made.CopyFrom(value)
    if value.name.startswith("present.") and ".decoder." in value.name:
        made.type.tensor_type.shape.dim[2].dim_param = "total_sequence"
    return made


def _in_order(models: list[onnx.ModelProto], inputs: Mapping[str, Any]) -> list[str]:
    """The inputs as optimum orders them: mask, ids, states, then the cache."""
    first = [v.name for v in models[0].graph.input]
    return first + [v.name for v in models[1].graph.input if v.name not in first]
