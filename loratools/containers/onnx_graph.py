"""An ONNX file: its nodes, weights and texts by a bounded walk, without onnx and without torch.

The messages are those of onnx/onnx:onnx/onnx.proto. Weights are leaves, inline or in files beside
the graph; nothing of them is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from loratools.adapter import Source
from loratools.containers.bundle import Bundle
from loratools.containers.looks import is_onnx
from loratools.containers.onnx_tensors import Tensor, Tensors, entry
from loratools.containers.protobuf import Field, Span, Walk
from loratools.errors import error, shown

SIZE = (1 << 31) - 1  # bytes of a protobuf
DEPTH = 16  # graphs within graphs
PROPERTY = 1 << 26  # bytes of one text among the model's own
SCOPES = "pkg.torch.onnx.name_scopes"  # torch's dynamo exporter, on every node

Value = int | float | bytes | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One node; `graph` is the place of the node whose attribute holds its graph, if one does."""

    op_type: str
    name: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Value]
    scopes: str  # of torch's exporter, as written
    input_fields: tuple[Field, ...]
    within: tuple[Span, ...]
    graph: int | None = None


@dataclass(slots=True)
class Graph:
    """An ONNX model as its file describes it; subgraphs' nodes stand after the node with them."""

    source: Source
    ir_version: int = 0
    producer: str = ""
    opsets: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    metadata_fields: dict[str, Field] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sparse: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()  # names of tensors in two graphs; `tensors` has neither
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    files: dict[str, Source] = field(default_factory=dict)  # beside it, by location
    span: Span = field(default=Span(0, 0, 0))


def is_graph(source: Source) -> bool:
    """Whether a file begins as an ONNX model does."""
    return is_onnx(source.read(0, min(4, source.size)))


def read(bundle: Bundle, name: str) -> Graph:
    """The graph in file `name` of a bundle; its weights are leaves.

    Raises not_weights, malformed, duplicate, and hostile for a location outside the folder.
    """
    folder = PurePosixPath(name).parent
    return read_source(bundle.open(name), lambda location: bundle.open(str(folder / location)))


def read_source(source: Source, beside: Callable[[str], Source]) -> Graph:
    """The graph of a file; `beside` opens the files that it names."""
    if not is_graph(source):
        raise error("not_weights", f"{shown(source.name)} does not begin as an ONNX model does")
    if source.size > SIZE:
        raise error("malformed", f"{shown(source.name)}: {source.size} bytes, {SIZE} at most")
    return _Reader(source, beside).model()


class _Reader:
    def __init__(self, source: Source, beside: Callable[[str], Source]) -> None:
        self.source = source
        self.walk = Walk(source)
        self.tensors = Tensors(self.walk, beside)
        self.graph = Graph(source)

    def model(self) -> Graph:
        walk, graph = self.walk, self.graph
        body: Span | None = None
        for f in walk.fields(0, self.source.size):
            match f.number:
                case 1:
                    graph.ir_version = walk.number(f)
                case 2:
                    graph.producer = walk.text(f)
                case 7:
                    if body is not None:
                        raise walk.fault(f.tag, "a second graph")
                    body = walk.inner(f)
                case 8:
                    domain, version = self._opset(f)
                    graph.opsets[domain] = version
                case 14:
                    key, value = entry(walk, f, PROPERTY)
                    if key in graph.metadata:
                        raise error("duplicate", f"{self._what()}: the text {shown(key)} twice")
                    graph.metadata[key], graph.metadata_fields[key] = value, f
        if body is None:
            raise error("malformed", f"{self._what()} holds no graph")
        graph.span = body
        self._graph(body, (body,), None, frozenset(), 0)
        graph.files = self.tensors.files
        return graph

    def _what(self) -> str:
        return shown(self.source.name)

    def _opset(self, f: Field) -> tuple[str, int]:
        domain, version = "", 0
        span = self.walk.inner(f)
        for g in self.walk.fields(span.start, span.end):
            if g.number == 1:
                domain = self.walk.text(g)
            elif g.number == 2:
                version = self.walk.number(g)
        return domain, version

    # --------------------------------------------------------------------------- graphs

    def _graph(
        self,
        span: Span,
        within: tuple[Span, ...],
        owner: int | None,
        known: frozenset[str],
        depth: int,
    ) -> None:
        walk, graph = self.walk, self.graph
        if depth > DEPTH:
            raise walk.fault(span.start, f"more than {DEPTH} graphs within each other")
        nodes: list[Span] = []
        inputs: list[str] = []
        outputs: list[str] = []
        here: set[str] = set()
        for f in walk.fields(span.start, span.end):
            match f.number:
                case 1:
                    nodes.append(walk.inner(f))
                case 5:
                    tensor = self.tensors.read(walk.inner(f), within)
                    if tensor.name in here:
                        raise error("duplicate", f"{self._what()}: {shown(tensor.name)} twice")
                    self._keep(tensor)
                    here.add(tensor.name)
                case 11 | 12:
                    (inputs if f.number == 11 else outputs).append(self._value_name(f))
                case 15:
                    name = self._sparse(walk.inner(f), within)
                    here.add(name)
                    graph.sparse += (name,)
        if owner is None:
            graph.inputs, graph.outputs = tuple(inputs), tuple(outputs)
        made = set(known) | here | set(inputs)
        for place in nodes:
            self._node(place, (*within, place), owner, made, depth)
        for name in outputs:
            if name and name not in made:
                raise walk.fault(span.start, f"nothing makes the output {shown(name)}")

    def _keep(self, tensor: Tensor) -> None:
        graph, name = self.graph, tensor.name
        if name in graph.tensors or name in graph.twice:  # branches of an If may use one name
            graph.tensors.pop(name, None)
            graph.twice += (name,)
        else:
            graph.tensors[name] = tensor

    def _value_name(self, f: Field) -> str:
        span = self.walk.inner(f)
        names = [self.walk.text(g) for g in self.walk.fields(span.start, span.end) if g.number == 1]
        return names[-1] if names else ""

    def _sparse(self, span: Span, within: tuple[Span, ...]) -> str:
        for f in self.walk.fields(span.start, span.end):
            if f.number == 1:
                return self.tensors.read(self.walk.inner(f), (*within, span)).name
        return ""

    def _node(
        self, span: Span, within: tuple[Span, ...], owner: int | None, made: set[str], depth: int
    ) -> None:
        walk, graph = self.walk, self.graph
        fields: dict[int, list[Field]] = {}
        for f in walk.fields(span.start, span.end):
            fields.setdefault(f.number, []).append(f)
        inputs = tuple(walk.text(f) for f in fields.get(1, ()))
        outputs = tuple(walk.text(f) for f in fields.get(2, ()))
        name, op_type, domain = (walk.text(fields[n][-1]) if n in fields else "" for n in (3, 4, 7))
        for one in inputs:
            if one and one not in made:
                message = f"node {shown(name)} takes {shown(one)}, which nothing before it makes"
                raise walk.fault(span.start, message)
        scopes = ""
        for f in fields.get(9, ()):
            key, value = entry(walk, f, 1 << 20, SCOPES)
            scopes = value if key == SCOPES else scopes
        attributes: dict[str, Value] = {}
        graphs: list[Span] = []
        tensors: list[tuple[str, Span]] = []
        held: dict[int, Span] = {}
        for f in fields.get(5, ()):
            self._attribute(f, attributes, graphs, tensors, held)
        here = len(graph.nodes)
        places = tuple(fields.get(1, ()))
        made_of = (op_type, name, domain, inputs, outputs, attributes, scopes, places)
        graph.nodes.append(Node(*made_of, within, owner))
        if op_type == "Constant" and len(tensors) == 1 and len(outputs) == 1:
            place = tensors[0][1]
            around = (*within, held[place.start])
            self._keep(self.tensors.read(place, around, outputs[0], here))
        else:
            for _, place in tensors:
                self.tensors.read(place, within)
        for inner in graphs:
            around = (*within, held[inner.start], inner)
            self._graph(inner, around, here, frozenset(made), depth + 1)
        for one in outputs:
            if one and one in made:
                raise walk.fault(span.start, f"{shown(one)} is made twice")
            made.add(one)

    def _attribute(
        self,
        f: Field,
        attributes: dict[str, Value],
        graphs: list[Span],
        tensors: list[tuple[str, Span]],
        held: dict[int, Span],
    ) -> None:
        walk, span = self.walk, self.walk.inner(f)
        name, several = "", list[int]()
        value: Value | None = None
        for g in walk.fields(span.start, span.end):
            match g.number:
                case 1:
                    name = walk.text(g)
                case 3:
                    value = walk.number(g)
                case 4:
                    value = walk.read(g.start, min(g.end - g.start, 1 << 16))
                case 5 | 10:
                    place = walk.inner(g)
                    tensors.append((name, place))
                    held[place.start] = span
                case 6 | 11:
                    place = walk.inner(g)
                    graphs.append(place)
                    held[place.start] = span
                case 8:
                    several += walk.numbers(g)
        if several:
            attributes[name] = tuple(several)
        elif value is not None:
            attributes[name] = value
