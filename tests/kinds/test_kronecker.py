"""LoKr against numpy's Kronecker product in long floats: whole, in factors, with cores."""

import numpy as np
import pytest

from loratools import algebra, kinds
from loratools.adapter import Kronecker, LowRank
from loratools.rewriting import lowered, permute, rows, stack, transpose
from tests.kinds.laws import close, exact, laws, leaf, numbers
from tests.refusing import refused


def update(delta):
    """ΔW: the kernel belongs to W2."""
    w1 = exact(delta.w1) if delta.w1 is not None else exact(delta.w1_a) @ exact(delta.w1_b)
    if delta.w2 is not None:
        w2 = exact(delta.w2)
    elif delta.t2 is None:
        w2 = exact(delta.w2_a) @ exact(delta.w2_b)
    else:
        t, a, b = map(exact, (delta.t2, delta.w2_a, delta.w2_b))
        w2 = np.einsum("pq...,po,qi->oi...", t, a, b)
    w1 = w1.reshape(*w1.shape, *(1 for _ in w2.shape[2:]))
    return np.longdouble(delta.scaling) * np.kron(w1, w2).reshape(delta.shape)


W1 = {"w1": (2, 4)}
W1_FACTORED = {"w1_a": (6, 2), "w1_b": (2, 5)}
DELTAS = {
    "whole": ((12, 20), W1 | {"w2": (6, 5)}, 10),
    "whole, one higher and one wider": ((16, 12), W1 | {"w2": (8, 3)}, 6),
    "whole, square": ((9, 9), {"w1": (3, 3), "w2": (3, 3)}, None),
    "second factored": ((12, 20), W1 | {"w2_a": (6, 2), "w2_b": (2, 5)}, 4),
    "both factored": ((48, 30), W1_FACTORED | {"w2_a": (8, 2), "w2_b": (2, 6)}, 4),
    "first factored": ((48, 30), W1_FACTORED | {"w2": (8, 6)}, 12),
    "kernel": ((24, 20, 3, 3), W1 | {"w2": (12, 5, 3, 3)}, None),
    "kernel, flat": ((24, 20, 3, 3), W1 | {"w2_a": (12, 1), "w2_b": (1, 45)}, 2),
    "kernel with a core": (
        (24, 20, 3, 2), W1 | {"w2_a": (2, 12), "w2_b": (2, 5), "t2": (2, 2, 3, 2)}, 4
    ),
    "kernel of one axis with a core": (
        (24, 20, 3), W1 | {"w2_a": (1, 12), "w2_b": (1, 5), "t2": (1, 1, 3)}, 2
    ),
    "a larger first factor": ((12, 20), {"w1": (6, 5), "w2": (2, 4)}, 10),
    "a rank larger than its factor": ((12, 20), W1 | {"w2_a": (6, 9), "w2_b": (9, 5)}, 10),
}  # fmt: skip


def delta_of(name, scaling=0.75):
    shape, parts, _ = DELTAS[name]
    leaves = {part: leaf(30 + i, *size) for i, (part, size) in enumerate(parts.items())}
    return Kronecker(shape, scaling, **leaves)


@pytest.mark.parametrize("name", DELTAS)
def test_the_formula_and_its_laws(name):
    delta = delta_of(name)
    laws(delta, numbers(9, *delta.shape), lambda w: w + update(delta))


@pytest.mark.parametrize("name", DELTAS)
def test_factors_are_exact_or_none(name):
    delta, rank = delta_of(name), DELTAS[name][2]
    pair = kinds.low_rank(delta)
    if rank is None:
        assert pair is None
        close(algebra.materialise(lowered(delta)), update(delta))
        return
    assert isinstance(pair, LowRank)
    assert (pair.rank, pair.b.shape[0], pair.a.shape[1:]) == (rank, delta.shape[0], delta.shape[1:])
    assert pair.a.tensor().shape == pair.a.shape
    assert pair.b.tensor().shape == pair.b.shape
    close(algebra.materialise(pair), update(delta))
    # No fewer would do, where nothing was wasted on a rank larger than its factor.
    assert np.linalg.matrix_rank(update(delta).astype(float).reshape(delta.shape[0], -1)) == rank


@pytest.mark.parametrize("name", ["whole", "whole, square", "second factored", "both factored"])
def test_rows_order_and_stacks(name):
    delta = delta_of(name)
    wanted = update(delta)
    close(algebra.materialise(rows(delta, 2, 5)), wanted[2:5])
    order = list(range(len(wanted)))[::-1]
    close(algebra.materialise(permute(delta, order)), wanted[order])
    close(algebra.materialise(transpose(delta)), wanted.T)
    close(algebra.materialise(stack([delta, delta])), np.concatenate([wanted, wanted]))


@pytest.mark.parametrize("name", ["kernel", "kernel with a core"])
def test_a_kernel_is_not_transposed(name):
    assert "no matrix" in refused("usage", kinds.transposed, delta_of(name))


def test_what_alpha_is_divided_by():
    wanted = {"whole": None, "second factored": 2, "both factored": 2, "first factored": 2,
              "a rank larger than its factor": 9}  # fmt: skip
    assert {name: kinds.kronecker.rank(delta_of(name)) for name in wanted} == wanted
