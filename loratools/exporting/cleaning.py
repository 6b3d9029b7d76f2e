"""A traced graph made fit to publish: its names, dimensions, weights and metadata, same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, numpy_helper
from torch import Tensor

from loratools._version import VERSION
from loratools.errors import error, shown
from loratools.exporting.graph_files import EXTERNAL_ABOVE, INLINE_BELOW, SIDECAR, graphs
from loratools.exporting.parameters import Contents, Found, seen

if TYPE_CHECKING:
    from numpy.typing import NDArray

Dims = Mapping[str, tuple[int | str, ...]]
ALIGNED = 4096  # where large weights begin in a data file: onnxruntime maps pages
MASKS = ("attention_mask", "encoder_attention_mask")


def array_of(tensor: TensorProto, folder: Path) -> NDArray[Any]:
    """The numbers of an initialiser; those beside the graph are mapped, not read."""
    if not external_data_helper.uses_external_data(tensor):
        return numpy_helper.to_array(tensor)
    said = {e.key: e.value for e in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    path = folder / Path(said["location"]).name
    if not path.stat().st_size or 0 in tensor.dims:
        return np.zeros(tuple(tensor.dims), dtype)
    return np.memmap(
        path, dtype, mode="r", offset=int(said.get("offset", 0)), shape=tuple(tensor.dims)
    )


def found_in(path: Path, contents: Contents) -> dict[str, Found]:
    """Which initialisers of a traced graph are parameters, by content."""
    model = onnx.load(path, load_external_data=False)
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
            what = contents.look(array_of(tensor, path.parent))
            if what is not None:
                found[tensor.name] = what
    return found


def clean(
    path: Path,
    out: Path,
    *,
    inputs: Dims,
    outputs: Dims,
    found: Mapping[str, Found],
    aliases: Mapping[str, list[str]],
    true: Mapping[str, Tensor],
    props: Mapping[str, str],
    ir: int,
    optional: Set[str] = frozenset(),
    external: bool = False,
) -> None:
    """Write a traced graph anew: named as the ecosystem does, nothing of this machine in it.

    `found` says which initialisers are parameters, `true` has the values of those that carried
    others while tracing. RefusedError `not_exportable` where the graph lost an input or fixed a
    dimension that should move.
    """
    model = onnx.load(path, load_external_data=False)
    if model.functions:
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(model)
    graph = model.graph
    _name_ends(graph, inputs, outputs, optional)
    arrays = {t.name: array_of(t, path.parent) for t in graph.initializer}
    used = {n for g in graphs(graph) for node in g.node for n in node.input}
    kept = [t for t in graph.initializer if t.name in used | set(outputs)]
    named = _parameter_names(graph, [t.name for t in kept], found, aliases)
    sidecar = {}
    for tensor in kept:
        what = found.get(tensor.name)
        if what is not None:
            if what.parameter in true:
                value = seen(true[what.parameter])
                arrays[tensor.name] = np.ascontiguousarray(value.T if what.transposed else value)
            alias = aliases_for(named[tensor.name], what, aliases)
            sidecar[named[tensor.name]] = [alias, what.transposed]
    fresh = [(named.get(t.name, t.name), arrays[t.name]) for t in kept]
    _rename(graph, named)
    _strip(model)
    model.ir_version = ir
    model.producer_name, model.producer_version = "loratools", VERSION
    del model.metadata_props[:]
    whole = {**props, SIDECAR: json.dumps(sidecar, separators=(",", ":"))}
    for key in sorted(whole):
        model.metadata_props.add(key=key, value=whole[key])
    write(model, fresh, out, external=external)


def aliases_for(name: str, what: Found, aliases: Mapping[str, list[str]]) -> str:
    """The parameter that an initialiser is called after, of several that are one tensor."""
    return name if name in aliases[what.parameter] else what.parameter


def write(
    model: onnx.ModelProto, arrays: list[tuple[str, NDArray[Any]]], out: Path, *, external: bool
) -> None:
    """Write a graph with these initialisers; above 1 GB, or asked to, the data beside it."""
    del model.graph.initializer[:]
    apart = external or sum(a.nbytes for _, a in arrays) > EXTERNAL_ABOVE
    data = out.with_name(f"{out.name}.data")
    at = 0
    with data.open("wb") as file:
        for name, array in arrays:
            tensor = model.graph.initializer.add(name=name, dims=array.shape)
            tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            if not apart or array.nbytes < INLINE_BELOW:
                tensor.raw_data = np.ascontiguousarray(array).tobytes()
                continue
            gap = -at % ALIGNED
            file.write(b"\0" * gap)
            at += gap
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", at), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            at += array.nbytes
    if not at:
        data.unlink()
    out.write_bytes(model.SerializeToString(deterministic=True))


# ------------------------------------------------------------------------------- inputs, outputs


def _name_ends(graph: onnx.GraphProto, inputs: Dims, outputs: Dims, optional: Set[str]) -> None:
    """Name inputs, outputs and their dimensions, in the order of the task."""
    from loratools.exporting.graphs import plain

    own = {plain(name): name for name in inputs}
    there = {own.get(i.name, i.name): i for i in graph.input}
    lost = [name for name in inputs if name not in there and name not in optional]
    if lost:
        why = "padded batches would be wrong" if lost[0] in MASKS else "it would be ignored"
        raise error("not_exportable", f"the graph lost its input {shown(lost[0])}; {why}")
    extra = there.keys() - inputs.keys()
    if extra:
        raise error("not_exportable", f"the graph has an input of its own, {shown(min(extra))}")
    if len(graph.output) != len(outputs):
        raise error(
            "not_exportable", f"the graph has {len(graph.output)} outputs, not {len(outputs)}"
        )
    named = {i.name: name for name, i in there.items()}
    _through_identity(graph)
    named |= {o.name: name for o, name in zip(graph.output, outputs, strict=True)}
    _rename(graph, named)
    for value in (*graph.input, *graph.output):
        dims = inputs.get(value.name) or outputs.get(value.name) or ()
        _dimensions(value, dims, strict=value.name in inputs)
    ordered = sorted(graph.input, key=lambda i: list(inputs).index(i.name))
    kept = [onnx.ValueInfoProto.FromString(i.SerializeToString()) for i in ordered]
    del graph.input[:]
    graph.input.extend(kept)


def _through_identity(graph: onnx.GraphProto) -> None:
    """Outputs that are an input, an initialiser or another output get a node of their own."""
    taken = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    for n, output in enumerate(graph.output):
        if output.name in taken:
            fresh = f"output_{n}"
            graph.node.append(onnx.helper.make_node("Identity", [output.name], [fresh]))
            output.name = fresh
        taken.add(output.name)


def _dimensions(value: onnx.ValueInfoProto, dims: tuple[int | str, ...], *, strict: bool) -> None:
    shape = value.type.tensor_type.shape
    if strict and len(shape.dim) == len(dims):
        for dim, wanted in zip(shape.dim, dims, strict=True):
            if isinstance(wanted, str) and dim.HasField("dim_value"):
                raise error(
                    "not_exportable",
                    f"{shown(value.name)}: its {wanted} became the constant {dim.dim_value}",
                )
    del shape.dim[:]
    for wanted in dims:
        if isinstance(wanted, str):
            shape.dim.add(dim_param=wanted)
        else:
            shape.dim.add(dim_value=wanted)


# ------------------------------------------------------------------------------- names


def _rename(graph: onnx.GraphProto, named: Mapping[str, str]) -> None:
    """Give values other names; one that stands in the way of a new name steps aside."""
    every = {n for g in graphs(graph) for node in g.node for n in (*node.input, *node.output)}
    every |= {v.name for v in (*graph.input, *graph.output, *graph.initializer)}
    named = {old: new for old, new in named.items() if old != new}
    for new in sorted(set(named.values()) & (every - named.keys())):
        aside = f"{new}_inner"
        while aside in every:
            aside += "_"
        named[new] = aside
        every.add(aside)
    for inner in graphs(graph):
        for node in inner.node:
            node.input[:] = [named.get(n, n) for n in node.input]
            node.output[:] = [named.get(n, n) for n in node.output]
        for value in (*inner.input, *inner.output, *inner.initializer):
            value.name = named.get(value.name, value.name)


def _parameter_names(
    graph: onnx.GraphProto,
    initialisers: list[str],
    found: Mapping[str, Found],
    aliases: Mapping[str, list[str]],
) -> dict[str, str]:
    """The parameter's own name for each initialiser that is one, where that is free.

    Of tied weights, what is looked up by row gets the first name, what is multiplied the last.
    """
    ends = {v.name for v in (*graph.input, *graph.output)}
    looked_up = {n.input[0] for g in graphs(graph) for n in g.node if n.op_type == "Gather"}
    named: dict[str, str] = {}
    taken = set(ends)
    for name in sorted(initialisers, key=lambda n: n not in looked_up):
        if name not in found:
            continue
        every = aliases[found[name].parameter]
        choice = every if name in looked_up else every[::-1]
        free = next((n for n in choice if n not in taken), None)
        named[name] = name if free is None else free
        taken.add(named[name])
    return named


# ------------------------------------------------------------------------------- metadata


def _strip(model: onnx.ModelProto) -> None:
    """Leave nothing out of the trace: stack traces, paths, comments, shapes of inner values."""
    model.doc_string = model.domain = ""
    model.model_version = 0
    for graph in graphs(model.graph):
        graph.doc_string = ""
        graph.name = "main"
        del graph.value_info[:]
        del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            for attribute in node.attribute:
                attribute.doc_string = ""
                if attribute.HasField("t"):
                    attribute.t.doc_string = ""
                    del attribute.t.metadata_props[:]
        for value in (*graph.input, *graph.output):
            value.doc_string = ""
            del value.metadata_props[:]
