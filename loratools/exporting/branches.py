"""Where a graph multiplies by a weight, and the branch x·A·B beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.adapter import TORCH_NAMES, Leaf, LowRank
from loratools.errors import error, shown
from loratools.views import later

if TYPE_CHECKING:
    import onnx

    from loratools.exporting.switchable import Switch


THROUGH = ("Identity", "Cast", "Transpose", "DequantizeLinear")


@dataclass(frozen=True, slots=True)
class Use:
    """A node that reads an initialiser: y = x·M with M the initialiser, or (turned) its transpose.

    `why` says why no branch can stand beside it.
    """

    within: Any  # the graph, or subgraph, whose node it is
    node: Any
    number: int  # of the node, as `containers.onnx_graph` counts them
    turned: bool = False
    why: str = ""

    @property
    def looks_up(self) -> bool:
        """Whether it takes rows by their number, as an embedding does."""
        return self.node is not None and self.node.op_type == "Gather"


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all that lie in its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
                yield from graphs(inner)


def names(graph: onnx.GraphProto) -> set[str]:
    """Every name of a value in a graph."""
    found: set[str] = set()
    for one in graphs(graph):
        found |= {t.name for t in one.initializer} | {v.name for v in one.input}
        for node in one.node:
            found |= {*node.input, *node.output}
    return found


def nodes(graph: onnx.GraphProto) -> Iterator[tuple[onnx.GraphProto, onnx.NodeProto]]:
    """All nodes with the graph that each is in; those of subgraphs stand after the node with them.

    As `containers.onnx_graph` counts them.
    """
    for node in graph.node:
        yield graph, node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)
            for inner in attribute.graphs:
                yield from nodes(inner)


def uses(graph: onnx.GraphProto) -> dict[str, list[Use]]:
    """What reads each initialiser, also through Transpose, Identity, Cast and DequantizeLinear."""
    every = list(nodes(graph))
    held = {t.name for one in graphs(graph) for t in one.initializer}
    # A weight may be a Constant node.
    held |= {n.output[0] for _, n in every if n.op_type == "Constant" and n.output}
    found: dict[str, list[Use]] = {}
    seen_as: dict[str, tuple[str, bool]] = {name: (name, False) for name in held}
    for number, (within, node) in enumerate(every):
        for at, name in enumerate(node.input):
            if name not in seen_as:
                continue
            source, turned = seen_as[name]
            if at == 0 and node.op_type in THROUGH:
                flips = node.op_type == "Transpose"
                if not flips or _permutation(node) in (None, (1, 0)):
                    seen_as[node.output[0]] = source, turned ^ flips
                    continue
            found.setdefault(source, []).append(_use(within, node, number, at, turned))
    for name in {v.name for v in graph.output} & set(seen_as):
        why = "it is an output of the graph"
        found.setdefault(seen_as[name][0], []).append(Use(graph, None, -1, why=why))
    return found


def _permutation(node: onnx.NodeProto) -> tuple[int, ...] | None:
    return next((tuple(a.ints) for a in node.attribute if a.name == "perm"), None)


def _number(node: onnx.NodeProto, name: str, default: float) -> float:
    for attribute in node.attribute:
        if attribute.name == name:
            return float(attribute.f if attribute.type == attribute.FLOAT else attribute.i)
    return default


def _use(within: onnx.GraphProto, node: onnx.NodeProto, number: int, at: int, turned: bool) -> Use:
    kind = node.op_type
    if kind in ("MatMul", "MatMulNBits") and at == 1:  # of (in, out), however it is stored
        return Use(within, node, number, turned)
    if kind == "Gemm" and at == 1:
        if _number(node, "transA", 0) or _number(node, "alpha", 1.0) != 1:
            return Use(
                within, node, number, why=f"{shown(node.name)} is a Gemm with transA or alpha"
            )
        return Use(within, node, number, turned ^ bool(_number(node, "transB", 0)))
    if kind == "Gather" and at == 0 and not turned and not _number(node, "axis", 0):
        return Use(within, node, number, turned)
    if kind == "Conv":
        return Use(within, node, number, why=f"{shown(node.name)} is a convolution")
    return Use(
        within, node, number, why=f"{shown(node.name)} ({shown(kind)}) reads it as no right factor"
    )


# ------------------------------------------------------------------------------- inserting


def insert(graph: onnx.GraphProto, switch: Switch, found: Sequence[Use]) -> None:
    """Add A and B to the graph, and x·A·B to what every use of the weight computes.

    `found` are turned as they see the weight of the checkpoint.
    """
    import onnx
    from onnx import helper

    kind = {"F32": 1, "F16": 10, "F64": 11, "BF16": 16}[switch.dtype]
    rank = f"{switch.target}.rank"  # each has its own
    for name, shape, dims in (
        (switch.a, (switch.inner, 0), (switch.inner, rank)),
        (switch.b, (0, switch.outer), (rank, switch.outer)),
    ):
        graph.initializer.append(
            onnx.TensorProto(name=name, data_type=kind, dims=shape, raw_data=b"")
        )
        graph.input.append(helper.make_tensor_value_info(name, kind, dims))
    for number, use in enumerate(found):
        straight = use.turned == switch.turned
        first, second = (switch.a, switch.b) if straight else (switch.b, switch.a)
        stem = f"{switch.target}.lora" + (f".{number}" if number else "")
        nodes = []
        if not straight:
            for name in (first, second):
                nodes.append(
                    helper.make_node("Transpose", [name], [f"{name}.T{number}"], perm=[1, 0])
                )
            first, second = f"{first}.T{number}", f"{second}.T{number}"
        node, inner = use.node, f"{stem}.inner"
        if node.op_type == "Gather":
            nodes.append(helper.make_node("Gather", [first, node.input[1]], [inner], axis=0))
        else:
            nodes.append(helper.make_node("MatMul", [node.input[0], first], [inner]))
        nodes.append(helper.make_node("MatMul", [inner, second], [f"{stem}.update"]))
        result = node.output[0]
        node.output[0] = f"{stem}.base"
        nodes.append(helper.make_node("Add", [f"{stem}.base", f"{stem}.update"], [result]))
        for new in nodes:
            new.name = f"/{new.output[0]}/{new.op_type}"
        place = next(i for i, one in enumerate(use.within.node) if one is node or one == node)
        for new in reversed(nodes):
            use.within.node.insert(place + 1, new)


# ------------------------------------------------------------------------------- parameters


def parameters(switch: Switch, pairs: Sequence[tuple[float, LowRank]]) -> dict[str, Leaf]:
    """A and B of a pack: weighted deltas (as stored) behind one another, scaling in B.

    Multiplied in float64 and rounded once to the graph's dtype; `overflow` beyond it.
    """
    rank = sum(low.rank for _, low in pairs)

    def side(which: int) -> Any:
        import torch

        dtype = getattr(torch, TORCH_NAMES[switch.dtype])
        height, width = (switch.inner, rank) if which == 0 else (rank, switch.outer)
        parts = []
        for weight, low in pairs:
            a, b = low.a.tensor().to(torch.float64), low.b.tensor().to(torch.float64)
            first, second = (a.T, b.T) if switch.turned else (b, a)
            parts.append(first if which == 0 else second * (weight * low.scaling))
        if not parts:
            return torch.zeros((height, width), dtype=dtype)
        whole = torch.cat(parts, 1 - which).to(dtype).contiguous()
        if not bool(torch.isfinite(whole).all()):
            message = f"{shown(switch.target)}: an adapter's numbers are beyond {switch.dtype}"
            raise error("overflow", f"{message}, which the graph computes with")
        return whole

    return {
        switch.a: later(switch.a, switch.dtype, (switch.inner, rank), lambda: side(0)),
        switch.b: later(switch.b, switch.dtype, (rank, switch.outer), lambda: side(1)),
    }
