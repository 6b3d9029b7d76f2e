"""A graph with its values looked up: what makes and reads each, and room for new nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

DOMAIN = "com.microsoft"


class Net:
    """A graph with what makes and what reads each value, and room for new nodes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.inputs = {v.name for v in model.graph.input}
        self.outputs = {v.name for v in model.graph.output}
        self.initialisers = {t.name: t for t in model.graph.initializer}
        self.made_by: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            self.made_by.update({name: node for name in node.output if name})
            for name in node.input:
                self.readers[name].append(node)
        self.fresh: list[onnx.NodeProto] = []
        self._known: dict[tuple[object, ...], str] = {}

    def maker(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """The node that makes a value, if it is one of these operators."""
        node = self.made_by.get(name)
        return node if node is not None and node.op_type in kinds else None

    def constant(self, name: str) -> NDArray[np.generic] | None:
        """A value that the graph holds; small ones also through Identity and Cast."""
        if name in self.initialisers:
            return numpy_helper.to_array(self.initialisers[name])
        node = self.maker(name, "Constant", "Identity", "Cast")
        if node is None:
            return None
        if node.op_type != "Constant":
            return self.constant(node.input[0])
        for attribute in node.attribute:
            if attribute.name == "value":
                return numpy_helper.to_array(attribute.t)
            if attribute.name.startswith("value_"):
                return np.asarray(helper.get_attribute_value(attribute))
        return None

    def scalar(self, name: str) -> float | None:
        """The one number that a constant holds."""
        found = self.constant(name)
        return float(found.reshape(-1)[0]) if found is not None and found.size == 1 else None

    def initialiser(self, name: str, array: NDArray[np.generic]) -> str:
        if name not in self.initialisers:
            tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
            self.initialisers[name] = tensor
            self.graph.initializer.append(tensor)
        return name

    def add(
        self, kind: str, inputs: Iterable[str], name: str, *, domain: str = "", **attributes: object
    ) -> str:
        """A new node with one output, or the one that computes the same already."""
        given = list(inputs)
        key = (kind, tuple(given), tuple(sorted((k, str(v)) for k, v in attributes.items())))
        if key not in self._known:
            node = helper.make_node(kind, given, [name], name, domain=domain)
            node.attribute.extend(
                helper.make_attribute(k, v) for k, v in sorted(attributes.items())
            )
            self.fresh.append(node)
            self.made_by[name] = node
            self._known[key] = name
        return self._known[key]

    def ints(self, *values: int) -> str:
        """A constant of int64 numbers."""
        name = "fused_" + "_".join(f"{v}" for v in values)
        return self.initialiser(name, np.array(values, np.int64))


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    for one in node.attribute:
        if one.name == name:
            found: object = helper.get_attribute_value(one)
            return found
    return default


def permutes(node: onnx.NodeProto | None, *order: int) -> bool:
    said = attribute(node, "perm") if node is not None and node.op_type == "Transpose" else None
    return isinstance(said, list) and tuple(said) == order
