"""A graph read whole from its file and written again: same bytes each time, data beside it."""

from __future__ import annotations

import heapq
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import onnx
from onnx import TensorProto, external_data_helper

from loratools.errors import error, shown

SIDECAR: Final = "loratools.weights"  # initialiser → [parameter, transposed], as JSON
EXTERNAL_ABOVE: Final = 1_000_000_000  # bytes of weights that no longer stand in the graph's file
INLINE_BELOW: Final = (
    1024  # bytes: small tensors stay in the graph, where shape inference reads them
)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what onnxruntime's tools log, and without the handler that importing them adds."""
    root = logging.root
    before = root.manager.disable, root.level, list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:] = before[2]
        root.setLevel(before[1])
        logging.disable(before[0])


def has_external_data(model: onnx.ModelProto) -> bool:
    """Whether any initialiser of the graph lies in another file."""
    return any(external_data_helper.uses_external_data(t) for t in model.graph.initializer)


def read(path: Path) -> tuple[onnx.ModelProto, bool]:
    """The graph with its weights in memory, and whether they lay in a file beside it."""
    try:
        model = onnx.load(path, load_external_data=False)
        beside = has_external_data(model)
        if beside:
            external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as problem:
        raise error("malformed", f"{shown(path.name)}: {shown(problem)}") from problem
    except Exception as problem:  # protobuf's DecodeError, which no stub names
        raise error("malformed", f"{shown(path.name)} is no ONNX graph") from problem
    return model, beside


def write(model: onnx.ModelProto, out: Path, *, external: bool = False) -> list[str]:
    """Write a graph; the names of the files. Large ones get their weights in `<name>.data`."""
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    data = out.with_name(f"{out.name}.data")
    data.unlink(missing_ok=True)  # onnx appends to a file that is there
    if external or size > EXTERNAL_ABOVE:
        external_data_helper.convert_model_to_external_data(
            model, all_tensors_to_one_file=True, location=data.name, size_threshold=INLINE_BELOW
        )
        external_data_helper.write_external_data_tensors(model, str(out.parent))
    out.write_bytes(model.SerializeToString(deterministic=True))
    return [out.name, data.name] if data.exists() else [out.name]


def sidecar(model: onnx.ModelProto) -> dict[str, tuple[str, bool]]:
    """Which initialiser is which parameter of the model, and whether it is stored transposed."""
    for entry in model.metadata_props:
        if entry.key == SIDECAR:
            said = json.loads(entry.value)
            return {name: (str(where[0]), bool(where[1])) for name, where in said.items()}
    return {}


def set_sidecar(model: onnx.ModelProto, entries: Mapping[str, tuple[str, bool]]) -> None:
    """Write the sidecar; a graph without entries gets none."""
    if entries:
        table = {name: list(where) for name, where in sorted(entries.items())}
        text = json.dumps(table, separators=(",", ":"))
        set_props(model, props(model) | {SIDECAR: text})


def props(model: onnx.ModelProto) -> dict[str, str]:
    """The graph's metadata_props."""
    return {entry.key: entry.value for entry in model.metadata_props}


def set_props(model: onnx.ModelProto, entries: Mapping[str, str]) -> None:
    """Replace the graph's metadata_props, in order of their keys."""
    del model.metadata_props[:]
    for key in sorted(entries):
        model.metadata_props.add(key=key, value=entries[key])


def renamed_sidecar(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Let the sidecar follow initialisers that have new names; those that are gone leave it."""
    there = {t.name for t in model.graph.initializer}
    old = sidecar(model)
    if old:
        new: dict[str, tuple[str, bool]] = {}
        for name, where in old.items():
            for key in (name, names.get(name)):
                if key in there:
                    new[str(key)] = where
        set_sidecar(model, new)


def opset(model: onnx.ModelProto) -> int:
    """The version of the standard operators that the graph uses."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)


def use_domain(model: onnx.ModelProto, domain: str, version: int = 1) -> None:
    """Name another set of operators, once."""
    if all(o.domain != domain for o in model.opset_import):
        model.opset_import.add(domain=domain, version=version)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)
            for inner in attribute.graphs:
                yield from graphs(inner)


def tensors(model: onnx.ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Every constant of a graph with a name to call it by: initialisers, then Constant nodes."""
    for graph in graphs(model.graph):
        for tensor in graph.initializer:
            yield tensor.name, tensor
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield (node.output[0] if node.output else node.name), attribute.t


def remove_unused(model: onnx.ModelProto) -> None:
    """Take out the initialisers that nothing reads."""
    used = {name for g in graphs(model.graph) for node in g.node for name in node.input}
    used |= {value.name for value in model.graph.output}
    for at in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[at].name not in used:
            del model.graph.initializer[at]


def put_in_order(graph: onnx.GraphProto) -> None:
    """Bring the nodes into an order in which each comes after what it reads; ties stay as they are.

    onnxruntime opens a graph in any order, the checker and other runtimes do not.
    """
    made_by = {name: at for at, node in enumerate(graph.node) for name in node.output if name}
    needs = [{made_by[n] for n in _read_by(node) if n in made_by} for node in graph.node]
    readers: list[list[int]] = [[] for _ in needs]
    for at, wanted in enumerate(needs):
        for other in wanted:
            readers[other].append(at)
    waiting = [len(wanted) for wanted in needs]
    free = [at for at, count in enumerate(waiting) if count == 0]
    heapq.heapify(free)
    order: list[int] = []
    while free:
        at = heapq.heappop(free)
        order.append(at)
        for reader in readers[at]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(free, reader)
    if len(order) < len(needs):
        raise error("malformed", "the graph has a cycle")
    nodes = [graph.node[at] for at in order]
    del graph.node[:]
    graph.node.extend(nodes)


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node reads, also from inside its graphs."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in graph.node:
                yield from _read_by(inner)
            yield from (value.name for value in graph.output)
