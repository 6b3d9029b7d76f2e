"""A sum followed by a root-mean-square norm, made one SkipSimplifiedLayerNormalization node.

onnxruntime's session makes one node of the norm itself, and leaves the sum before it alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import helper

from loratools.exporting.net import DOMAIN, Net


@dataclass(frozen=True, slots=True)
class Norm:
    """x / sqrt(mean(x²) + epsilon) · weight over the last axis."""

    x: str
    weight: str
    epsilon: float
    last: onnx.NodeProto  # the product with the weight


def plain(net: Net, name: str) -> str:
    """A value before the casts on its way (float32 to float32, as the exporters leave them)."""
    while (node := net.maker(name, "Cast", "Identity")) is not None:
        name = node.input[0]
    return name


def norm(net: Net, power: onnx.NodeProto) -> Norm | None:
    """The norm that begins with this square; None where something else does."""
    if net.scalar(power.input[1]) != 2.0:
        return None
    node, epsilon = power, 0.0
    for kinds in (("ReduceMean",), ("Add",), ("Sqrt",), ("Div", "Reciprocal"), ("Mul",)):
        readers = net.readers[node.output[0]]
        if len(readers) != 1 or readers[0].op_type not in kinds:
            return None
        before, node = node.output[0], readers[0]
        if node.op_type == "Add":
            other = node.input[1] if node.input[0] == before else node.input[0]
            found = net.scalar(other)
            if found is None:
                return None
            epsilon = found
        if node.op_type == "Div" and (net.scalar(node.input[0]) != 1.0 or node.input[1] != before):
            return None
    if power.input[0] not in node.input:
        return None
    at = node
    while len(readers := net.readers[at.output[0]]) == 1 and readers[0].op_type == "Cast":
        at = readers[0]
    if len(readers) != 1 or readers[0].op_type != "Mul":
        return None
    last = readers[0]
    weight = last.input[1] if last.input[0] == at.output[0] else last.input[0]
    held = net.constant(weight)
    if held is None or held.ndim != 1:
        return None
    return Norm(plain(net, power.input[0]), weight, epsilon, last)


def fuse_skips(net: Net) -> int:
    """Every sum that a norm reads, with that norm, as one node; how many."""
    count = 0
    for power in [n for n in net.graph.node if n.op_type == "Pow"]:
        found = norm(net, power)
        total = net.maker(found.x, "Add") if found is not None else None
        if found is None or total is None or total.output[0] in net.outputs:
            continue
        # A bias is no second row of the same shape.
        if any(net.constant(name) is not None for name in total.input):
            continue
        reads = list(total.input)
        stem = f"fused_norm_{count}"
        node = helper.make_node(
            "SkipSimplifiedLayerNormalization", [*reads, found.weight],
            [found.last.output[0], "", "", total.output[0]], stem, domain=DOMAIN,
        )  # fmt: skip
        node.attribute.append(helper.make_attribute("epsilon", found.epsilon))
        net.fresh.append(node)
        for old in (total, found.last):
            net.graph.node.remove(old)
        count += 1
    return count


def fuse_norms(model: onnx.ModelProto) -> int:
    """The same of a graph whose attention stays as it is."""
    net = Net(model)
    count = fuse_skips(net)
    model.graph.node.extend(net.fresh)
    return count
