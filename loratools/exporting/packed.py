"""Quantised graphs with switches: adapters beside codes that nothing else could be added to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratools.adapter import FLOATS, Leaf
from loratools.errors import error, shown
from loratools.views import later
from loratools.weights.base import Base
from loratools.weights.quantised import Quantised

if TYPE_CHECKING:
    from loratools.exporting.switchable import Switches


def is_packed(leaf: Leaf | None) -> bool:
    """Whether a weight's numbers come from codes."""
    return leaf is not None and (isinstance(leaf.source, Quantised) or leaf.made is not None)


def beside(base: Base, switches: Switches) -> Base:
    """The base that packs of a switchable graph are fitted to, whatever became of its weights.

    A pack changes no weight, so that a dynamically quantised graph takes it too: where a weight is
    codes, its switch says its shape.
    """
    graph = base.graph
    if graph is None:
        return base
    found: dict[str, Leaf] = {}
    for switch in switches.parameters:
        there = base.tensors.get(switch.target)
        known = switch.target in graph.found.stored  # a tied head has no tensor of its own
        if known and (there is None or there.dtype not in FLOATS):
            shape = (switch.inner, switch.outer)[:: -1 if switch.turned else 1]
            found[switch.target] = later(switch.target, switch.dtype, shape, _lost(switch.target))
    plain = replace(graph, found=replace(graph.found, running=None))
    return replace(base, tensors={**base.tensors, **found}, graph=plain)


def _lost(name: str) -> Callable[[], Any]:
    def make() -> Any:
        raise error("quantised_base", f"{shown(name)}: its numbers are codes of another operator")

    return make
