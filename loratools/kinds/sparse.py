"""Sparse updates: values at some places of a weight, nothing else (SHiRA, arXiv 2406.13175)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools import views
from loratools.adapter import Leaf, Sparse
from loratools.errors import error, shown

if TYPE_CHECKING:
    from torch import Tensor


def ready(delta: Sparse) -> Sparse:
    """Values in float64 with their scaling, in the order of their places; places checked.

    Raises MalformedError for a place outside the weight.
    """
    import torch

    place = delta.indices.tensor().to(torch.int64)
    height, width = delta.shape[0], math.prod(delta.shape[1:])
    for axis, extent in enumerate((height, width)):
        if place.numel() and not 0 <= int(place[axis].min()) <= int(place[axis].max()) < extent:
            raise error(
                "malformed",
                f"{shown(delta.indices.name)} names {'rows' if axis == 0 else 'columns'} outside "
                f"the weight, which is {delta.shape}",
            )
    order = torch.argsort(place[0] * width + place[1], stable=True)
    values = delta.values.tensor().to(torch.float64)[order] * delta.scaling
    return replace(
        delta, values=Leaf.of(delta.values.name, values),
        indices=Leaf.of(delta.indices.name, place[:, order].contiguous()), scaling=1.0,
    )  # fmt: skip


def rows(delta: Sparse, start: int, stop: int) -> Tensor:
    """Rows of the update; values at one place add up."""
    import torch

    place, width = delta.indices.tensor().to(torch.int64), math.prod(delta.shape[1:])
    here = (place[0] >= start) & (place[0] < stop)
    values = delta.values.tensor().to(torch.float64)[here] * delta.scaling
    flat = torch.zeros((stop - start) * width, dtype=torch.float64, device=values.device)
    flat.index_add_(0, (place[0, here] - start) * width + place[1, here], values)
    return flat.view(stop - start, width)


def transposed(delta: Sparse) -> Sparse:
    """Rows and columns change places."""
    if len(delta.shape) != 2:
        raise error("usage", f"a sparse update of {delta.shape} is no matrix")
    return replace(delta, indices=views.reordered(delta.indices, (1, 0)), shape=delta.shape[::-1])
