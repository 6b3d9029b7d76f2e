"""Sparse updates: values at places, and nothing elsewhere."""

import numpy as np
import pytest
import torch

from loratools import kinds
from loratools.adapter import Leaf, Sparse
from tests.kinds.laws import exact, laws, leaf, numbers
from tests.refusing import refused

PLACES = [(5, 4), (0, 0), (2, 1), (2, 1), (3, 3)]  # one of them twice


def sparse(dtype=torch.int32, scaling=1.0, places=PLACES, shape=(6, 5)):
    indices = Leaf.of("indices", torch.tensor(places).T.contiguous().to(dtype))
    return Sparse(leaf(1, len(places)), indices, shape, scaling)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("scaling", [1.0, -0.25])
def test_values_at_one_place_add_up(dtype, scaling):
    update = np.zeros((6, 5), dtype=np.longdouble)
    delta = sparse(dtype, scaling)
    for value, place in zip(exact(delta.values), PLACES, strict=True):
        update[place] += value * np.longdouble(scaling)
    laws(delta, numbers(2, 6, 5), lambda w: w + update)


def test_nothing_at_all_changes_nothing():
    none = Sparse(leaf(1, 0), Leaf.of("indices", torch.zeros(2, 0, dtype=torch.int32)), (6, 5))
    laws(none, numbers(2, 6, 5), lambda w: w)


@pytest.mark.parametrize("place", [(6, 0), (0, 5), (-1, 0), (0, -1)])
def test_places_outside_are_refused(place):
    refused("malformed", kinds.ready, sparse(places=[*PLACES, place]))
