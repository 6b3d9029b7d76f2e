"""What the shapes of a base's weights say about deltas: whose they may be, and what they become."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from loratools import views
from loratools.adapter import Adapter, Leaf, Rotated, Scaled
from loratools.kinds import seeded, sized

Shape = tuple[int, ...]


def settled(adapter: Adapter, find: Callable[[str], tuple[Leaf, bool] | None]) -> Adapter:
    """The adapter with what depends on the shapes of its weights made plain.

    `find` gives the weight that a key names, and whether it is stored (in, out).
    """

    def weight(key: str) -> Leaf | None:
        found = find(key)
        if found is None:
            return None
        leaf, turned = found
        return views.turned(leaf) if turned and len(leaf.shape) == 2 else leaf

    def shape_of(key: str) -> Shape | None:
        leaf = weight(key)
        return None if leaf is None else leaf.shape

    deltas = sized.settled(adapter.deltas, shape_of)
    asked = {key: shape_of(key) for key, delta in deltas.items() if seeded.unsettled(delta)}
    shapes = {key: shape for key, shape in asked.items() if shape is not None}
    if shapes:
        deltas = seeded.settled(deltas, shapes, weight)
    return adapter if deltas is adapter.deltas else replace(adapter, deltas=deltas)


def may_be_absent(key: str, adapter: Adapter) -> bool:
    """Whether a base may lack a weight without loss: a bias that is 0 stays so when scaled."""
    delta = adapter.deltas[key]
    turns = isinstance(delta, Rotated) or (isinstance(delta, Scaled) and delta.by != "elements")
    return key.endswith(".bias") and turns


def one_weight(shape: Shape, stored: Shape) -> bool:
    """Whether an update is one of a stored weight; of a convolution's perhaps as a matrix."""
    flat = (*stored[:1], math.prod(stored[1:]))
    return without_ones(shape) == without_ones(stored) or shape == flat


def without_ones(shape: Shape) -> Shape:
    """A 1x1 convolution and a linear layer hold the same matrix, as (k, 1) and (k,) one kernel."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
