"""LoHa against its definition in long floats: products, cores, tiles, transposed, as factors."""

import numpy as np
import pytest
import torch

from loratools import algebra, kinds
from loratools.adapter import Hadamard, LowRank, Renormed
from loratools.rewriting import lowered, permute, rows, stack, transpose
from tests.kinds.laws import close, exact, laws, leaf, numbers
from tests.refusing import refused


def plain(shape, rank=2, scaling=1.0, seed=1):
    """Four factors for a weight of this shape, flat where it has a kernel."""
    inner = int(np.prod(shape[1:]))
    sizes = [(shape[0], rank), (rank, inner)] * 2
    factors = [leaf(seed + i, *size) for i, size in enumerate(sizes)]
    return Hadamard(*factors, shape=shape, scaling=scaling)


def cored(shape, rank=2, scaling=1.0, seed=20):
    """Factors (rank, out) and (rank, in) with cores (rank, rank, *kernel)."""
    sizes = [(rank, shape[0]), (rank, shape[1])] * 2
    factors = [leaf(seed + i, *size) for i, size in enumerate(sizes)]
    t1, t2 = (leaf(seed + i, rank, rank, *shape[2:]) for i in (5, 6))
    return Hadamard(*factors, shape=shape, scaling=scaling, t1=t1, t2=t2)


def update(delta):
    """ΔW by the formula, term by term."""
    w1_a, w1_b, w2_a, w2_b = map(exact, (delta.w1_a, delta.w1_b, delta.w2_a, delta.w2_b))
    if delta.t1 is None:
        first, second = w1_a @ w1_b, w2_a @ w2_b
    else:
        first, second = (
            np.einsum("pq...,po,qi->oi...", exact(t), a, b)
            for t, a, b in ((delta.t1, w1_a, w1_b), (delta.t2, w2_a, w2_b))
        )
    return np.longdouble(delta.scaling) * first.reshape(delta.shape) * second.reshape(delta.shape)


DELTAS = {
    "matrix": plain((6, 5), scaling=0.5),
    "of rank 1": plain((6, 5), rank=1),
    "of a rank beyond both sides": plain((6, 5), rank=7),
    "tall": plain((40, 3)),
    "kernel, flat": plain((6, 4, 3, 2), scaling=-2.0),
    "kernel": cored((6, 4, 3, 2), scaling=0.5),
    "kernel of one axis": cored((6, 4, 3), rank=3),
    "kernel of three axes": cored((4, 3, 2, 1, 2)),
    "wide enough for factors": plain((12, 30), rank=2, scaling=3.0),
    "kernel wide enough for factors": cored((12, 8, 3, 3), rank=2),
}


@pytest.mark.parametrize("name", DELTAS)
def test_the_formula_and_its_laws(name):
    delta = DELTAS[name]
    laws(delta, numbers(9, *delta.shape), lambda w: w + update(delta))


@pytest.mark.parametrize("name", DELTAS)
def test_factors_are_exact_or_none(name):
    delta = DELTAS[name]
    height, width = delta.shape[0], int(np.prod(delta.shape[1:]))
    rank = kinds.hadamard.rank(delta) ** 2
    pair = kinds.low_rank(delta)
    if rank >= min(height, width):
        assert pair is None
        close(algebra.materialise(lowered(delta)), update(delta))
        return
    assert isinstance(pair, LowRank)
    assert (pair.rank, pair.b.shape[0], pair.a.shape[1:]) == (rank, height, delta.shape[1:])
    assert pair.a.tensor().shape == pair.a.shape
    assert pair.b.tensor().shape == pair.b.shape
    close(algebra.materialise(pair), update(delta))


@pytest.mark.parametrize("name", ["matrix", "wide enough for factors"])
def test_rows_order_and_stacks(name):
    delta, wanted = DELTAS[name], update(DELTAS[name])
    close(algebra.materialise(rows(delta, 2, 5)), wanted[2:5])
    order = list(range(len(wanted)))[::-1]
    close(algebra.materialise(permute(delta, order)), wanted[order])
    close(algebra.materialise(transpose(delta)), wanted.T)
    both = stack([delta, delta])
    close(algebra.materialise(both), np.concatenate([wanted, wanted]))


def test_a_magnitude_over_it():
    delta = DELTAS["matrix"]
    m = leaf(50, 6)
    w0 = torch.from_numpy(numbers(51, 6, 5))

    def formula(w):
        v = w + update(delta)
        return exact(m)[:, None] * v / np.sqrt((v * v).sum(1, keepdims=True))

    laws(Renormed(delta, m), w0.numpy(), formula, turns=False)


@pytest.mark.parametrize("name", ["kernel", "kernel, flat"])
def test_a_kernel_is_not_transposed(name):
    assert "no matrix" in refused("usage", kinds.transposed, DELTAS[name])
