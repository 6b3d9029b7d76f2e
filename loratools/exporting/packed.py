"""A quantised graph as the base of switches: its weights under the shapes that adapters know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratools.adapter import FLOATS, TORCH_NAMES, Leaf
from loratools.containers.onnx_graph import Graph, Node
from loratools.errors import error, shown
from loratools.views import later
from loratools.weights.base import Base
from loratools.weights.graph_names import Stored

if TYPE_CHECKING:
    import torch

    from loratools.exporting.switchable import Switches


def seen(base: Base, switches: Switches | None = None) -> Base:
    """The base with float weights where the graph has codes; nothing is read before it is asked.

    Those of MatMulNBits by its K and N, those behind a DequantizeLinear as they are; others
    (dynamically quantised) only where the graph's own `switches` say what they were.
    """
    graph = base.graph
    if graph is None:
        return base
    found: dict[str, Leaf] = {}
    readers = _readers(graph.graph)
    for name, stored in graph.found.stored.items():
        leaf = stored.tensor.leaf
        if leaf is None or leaf.dtype not in FLOATS:
            node = readers.get(stored.tensor.name)
            made = _weight(graph.graph, name, stored, node) if node is not None else None
            if made is not None:
                found[name] = made
    for switch in switches.parameters if switches is not None else ():
        there = base.tensors.get(switch.target)
        if switch.target not in found and (there is None or there.dtype not in FLOATS):
            shape = (switch.inner, switch.outer)[:: -1 if switch.turned else 1]
            found[switch.target] = later(switch.target, switch.dtype, shape, _lost(switch.target))
    # a tied head has no tensor of its own, and gets none here
    known = {n: leaf for n, leaf in found.items() if n in graph.found.stored}
    return replace(base, tensors={**base.tensors, **known}) if known else base


def _lost(name: str) -> Callable[[], Any]:
    def make() -> Any:
        raise error("quantised_base", f"{shown(name)}: its numbers are codes of another operator")

    return make


def _readers(graph: Graph) -> dict[str, Node]:
    """By its codes, the node that holds a weight."""
    found: dict[str, Node] = {}
    for node in graph.nodes:
        at = {"MatMulNBits": 1, "DequantizeLinear": 0}.get(node.op_type)
        if at is not None and len(node.inputs) > at + 1:
            found.setdefault(node.inputs[at], node)
    return found


def _weight(graph: Graph, name: str, stored: Stored, node: Node) -> Leaf | None:
    """The weight of a node as torch has the parameter; None where the node does not say enough."""
    scales = graph.tensors.get(node.inputs[2 if node.op_type == "MatMulNBits" else 1])
    dtype = scales.leaf.dtype if scales is not None and scales.leaf is not None else ""
    if node.op_type == "MatMulNBits":
        rows, columns = node.attributes.get("K"), node.attributes.get("N")
        shape: tuple[Any, ...] = (rows, columns)
    else:
        shape = stored.tensor.shape
    if dtype not in FLOATS or not all(isinstance(n, int) and n > 0 for n in shape):
        return None

    def make() -> torch.Tensor:
        import torch

        from loratools.exporting.requantising import Stored as Held
        from loratools.exporting.requantising import dequantise

        held = {}
        for one in node.inputs:
            leaf = graph.tensors[one].leaf if one in graph.tensors else None
            if leaf is not None:
                held[one] = Held(leaf.dtype, leaf.shape, leaf.read())
        found = torch.from_numpy(dequantise(node, held))
        found = found.T if stored.turned else found
        return found.to(getattr(torch, TORCH_NAMES[dtype])).contiguous()

    return later(name, dtype, shape[::-1] if stored.turned else shape, make)
