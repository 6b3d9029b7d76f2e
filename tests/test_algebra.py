"""Deltas applied, prepared, summed and scaled, against dense matrices from first principles."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import algebra
from loratools.adapter import (
    Chained,
    Dense,
    Experts,
    Kind,
    Leaf,
    LowRank,
    Renormed,
    Replace,
    Rotated,
    Scaled,
    leaves,
)
from tests.examples_of_deltas import (
    ADDITIVE,
    EXAMPLES,
    MIXABLE,
    NORMED,
    NORMED_IN,
    PAIR,
    SHAPE,
    Example,
    diff,
    folded,
    leaf,
    lengths,
    numbers,
    pair,
)
from tests.floats import exact
from tests.refusing import refused

each = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
each_additive = pytest.mark.parametrize("example", ADDITIVE, ids=lambda e: e.name)
BY_NAME = {e.name: e for e in EXAMPLES}


def close(found: torch.Tensor, wanted: np.ndarray, scale: float | None = None) -> None:
    """Equal up to some roundings of float64 at the size of the largest number met."""
    assert found.dtype == torch.float64
    assert found.shape == wanted.shape
    size = scale or float(max(1.0, np.abs(wanted).max(initial=0)))
    assert np.abs(found.numpy() - wanted).max(initial=0) <= 1e-13 * size


def rows_of(w0: np.ndarray) -> torch.Tensor:
    """A weight as the matrix that tiles are cut from."""
    return torch.tensor(w0).reshape(w0.shape[0] if w0.ndim else 1, -1)


def tiles_of(matrix: torch.Tensor, cuts: list[int]) -> list[tuple[int, torch.Tensor]]:
    edges = sorted({0, len(matrix), *(c % (len(matrix) + 1) for c in cuts)})
    return [(a, matrix[a:b]) for a, b in pairwise(edges)]


def together(cuts: list[int], *deltas: Kind) -> list[int]:
    """Cuts between blocks of rows that belong together; none where a delta wants them all."""
    sizes = [algebra.block(delta) for delta in deltas]
    size = 0 if 0 in sizes else math.lcm(*sizes)
    return [cut // size * size for cut in cuts] if size else []


# ------------------------------------------------------------------------------- applying


@each
@settings(max_examples=10)
@given(cuts=st.lists(st.integers(0, 40), max_size=4), first=st.lists(st.integers(0, 9), max_size=2))
def test_apply_on_any_tiles_is_the_formula(example, cuts, first):
    w0 = rows_of(example.w0)
    ready = algebra.prepare(example.delta, lambda: iter(tiles_of(w0, first)))
    cuts = together([c % (len(w0) + 1) for c in cuts], example.delta)
    parts = [algebra.apply(ready, tile, start) for start, tile in tiles_of(w0, cuts)]
    close(torch.cat(parts), rows_of(example.folded).numpy())


@each
def test_apply_changes_nothing_that_it_was_given(example):
    w0 = rows_of(example.w0)
    before = w0.clone(), [one.read() for one in leaves(example.delta)]
    ready = algebra.prepare(example.delta, lambda: [(0, w0)])
    kept = [one.read() for one in leaves(ready)]
    once, again = algebra.apply(ready, w0), algebra.apply(ready, w0)
    once.zero_()
    assert torch.equal(algebra.apply(ready, w0), again)
    assert torch.equal(w0, before[0])
    assert [one.read() for one in leaves(example.delta)] == before[1]
    assert [one.read() for one in leaves(ready)] == kept


@each
def test_apply_may_use_a_buffer(example):
    w0, room = rows_of(example.w0), torch.full_like(rows_of(example.w0), torch.nan)
    ready = algebra.prepare(example.delta, lambda: [(0, w0)])
    assert torch.equal(algebra.apply(ready, w0, 0, room), algebra.apply(ready, w0))


@each
def test_what_reaches_rows_only_needs_no_first_pass(example):
    w0 = rows_of(example.w0)
    if algebra.reach(example.delta) == "rows":
        cuts = together([1, 3], example.delta)
        parts = [algebra.apply(example.delta, tile, at) for at, tile in tiles_of(w0, cuts)]
        close(torch.cat(parts), rows_of(example.folded).numpy())
    else:
        refused("usage", algebra.apply, example.delta, w0)
        ready = algebra.prepare(example.delta, lambda: [(0, w0)])
        assert algebra.reach(ready) == "rows"


def test_only_column_norms_need_a_first_pass():
    passes = {e.name for e in EXAMPLES if algebra.reach(e.delta) == "pass"}
    assert passes == {n for n in BY_NAME if "renormed in" in n}


@each
def test_shape_is_that_of_the_weight(example):
    found = algebra.shape(example.delta)
    if isinstance(example.delta, Replace) and example.delta.rows is not None:
        assert found is None
    elif isinstance(example.delta, Scaled | Rotated | Chained):
        assert found in (None, example.w0.shape)
    elif "flat on" not in example.name:
        assert found == example.w0.shape


@each
def test_materialise_is_the_update(example):
    w0 = torch.from_numpy(example.w0)
    found = algebra.materialise(example.delta, w0)
    # W - W0 cancels: the error is that of the larger of the two.
    close(found.reshape(example.w0.shape), example.update, float(abs(example.folded).max() + 1))
    if example.is_additive:
        assert torch.equal(algebra.materialise(example.delta), found)
    else:
        refused("needs_base", algebra.materialise, example.delta)


# ------------------------------------------------------------------------------- sums


@each
@pytest.mark.parametrize("weight", [0.3, -2.0, 1.0])
def test_scaled_is_the_multiple(example, weight):
    if example.is_additive:
        found = algebra.scaled(example.delta, weight)
        wanted = weight * example.update
        # The reference subtracts W0 again: that costs its size in roundings.
        close(algebra.materialise(found).reshape(wanted.shape), wanted, 10 + abs(wanted).max())
    elif weight == 1:
        assert algebra.scaled(example.delta, 1) is example.delta
    else:
        refused("needs_base", algebra.scaled, example.delta, weight)


def test_a_scaled_pair_keeps_its_alpha_only_at_weight_1():
    delta = BY_NAME["low rank, alpha kept"].delta
    assert algebra.scaled(delta, 1).alpha == 4
    assert algebra.scaled(delta, 0.5).alpha is None
    assert algebra.scaled(delta, 0.5).scaling == 1


@pytest.mark.parametrize(
    "group",
    [
        [e for e in ADDITIVE if e.w0.shape == SHAPE],
        [e for e in ADDITIVE if e.w0.shape == SHAPE and isinstance(e.delta, LowRank)],
        [BY_NAME["low rank, conv2d"]] * 3,
        [BY_NAME["low rank, conv 1x1"]] * 2,
        [BY_NAME["dense, bias"]] * 2,
        [BY_NAME["dense, conv2d"]] * 2,
        [BY_NAME["low rank, negative scaling"]],
    ],
    ids=["mixed", "low rank", "conv2d", "conv 1x1", "bias", "dense conv", "one"],
)
def test_the_sum_of_deltas_is_the_sum_of_updates(group):
    deltas = [e.delta for e in group]
    total = algebra.add(deltas)
    wanted = sum(folded(d, np.zeros(group[0].w0.shape)) for d in deltas)
    close(algebra.materialise(total), wanted)
    assert total.scaling == 1 or len(deltas) == 1
    if all(isinstance(d, LowRank) for d in deltas):
        assert isinstance(total, LowRank)
        assert total.rank == sum(d.rank for d in deltas)
        assert len(total.b.shape) == len(deltas[0].b.shape)
        assert algebra.shape(total) == group[0].w0.shape


def test_a_linear_layer_and_a_1x1_convolution_are_one_matrix():
    flat, square = pair(1), diff(3, 6, 5, 1, 1)
    wanted = folded(flat, np.zeros(SHAPE)) + folded(square, np.zeros((6, 5, 1, 1)))[:, :, 0, 0]
    for deltas in ([flat, square], [square, flat], [pair(1, (6, 5, 1, 1)), square]):
        total = algebra.materialise(algebra.add(deltas))
        close(total.reshape(SHAPE), wanted)


def test_the_sum_of_one_is_itself():
    assert algebra.add([PAIR]) is PAIR


@pytest.mark.parametrize("others", [[pair(1, (6, 4))], [pair(1, (7, 5))], [diff(1, 7, 5)]])
def test_deltas_of_different_shapes_have_no_sum(others):
    refused("shape_mismatch", algebra.add, [PAIR, *others])
    refused("shape_mismatch", algebra.add, [diff(3), *others])


# ------------------------------------------------------------------------------- combining


def combined(terms, w0):
    """W0 + Σ w_i (W_i − W0), each from the original W0."""
    w0 = w0.astype(np.longdouble)
    total = sum((np.longdouble(w) * (folded(d, w0) - w0) for w, d in terms), w0)
    return total.astype(np.float64)


weights = st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3)
mixtures = st.lists(st.tuples(weights, st.sampled_from([e.delta for e in MIXABLE])), min_size=1,
                    max_size=5)  # fmt: skip


@given(terms=mixtures, cuts=st.lists(st.integers(0, 6), max_size=3))
def test_any_mixture_is_the_weighted_sum_of_task_vectors(terms, cuts):
    w0 = rows_of(numbers(100, *SHAPE))
    wanted = combined(terms, w0.numpy())
    size = 1 + sum(abs(w) * abs(folded(d, w0.numpy())).max() for w, d in terms)
    few = algebra.condense(terms)
    upon = sum(isinstance(d, Replace) and d.then is not None for _, d in terms)  # split off
    assert len(few) <= len(terms) + upon
    for some in (terms, few):
        ready = [(w, algebra.prepare(d, lambda: [(0, w0)])) for w, d in some]
        kept = w0.clone()
        tiles = tiles_of(w0, together([c % 7 for c in cuts], *[d for _, d in some]))
        parts = [algebra.combine(ready, tile, at) for at, tile in tiles]
        close(torch.cat(parts), wanted, size)
        assert torch.equal(w0, kept)


@each
def test_one_term_of_weight_1_is_apply_bit_for_bit(example):
    w0 = rows_of(example.w0)
    ready = algebra.prepare(example.delta, lambda: [(0, w0)])
    applied = algebra.apply(ready, w0)
    assert torch.equal(algebra.combine([(1.0, ready)], w0), applied)
    [(weight, alone)] = algebra.condense([(1.0, example.delta)])
    assert weight == 1
    ready = algebra.prepare(alone, lambda: [(0, w0)])
    assert torch.equal(algebra.combine([(1.0, ready)], w0), applied)


def test_condense_makes_one_pair_of_all_and_leaves_the_rest():
    terms = [(0.5, PAIR), (2.0, NORMED), (-1.0, pair(7, rank=3)), (1.0, diff(8))]
    (one, low), *rest = algebra.condense(terms)
    assert one == 1
    assert low.rank == PAIR.rank + 3
    assert rest == [terms[1], terms[3]]
    assert algebra.condense(rest) == rest


def test_bits_do_not_depend_on_the_number_of_threads():
    w0 = torch.from_numpy(numbers(7, 700, 300))
    terms = [(0.7, pair(8, (700, 300), rank=16)), (0.3, Renormed(pair(9, (700, 300), rank=8),
             lengths(10, 300), "in"))]  # fmt: skip
    found = []
    before = torch.get_num_threads()
    tiles = [(at, w0[at : at + 100]) for at in range(0, 700, 100)]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ready = [(w, algebra.prepare(d, lambda: iter(tiles))) for w, d in terms]
            found.append(torch.cat([algebra.combine(ready, tile, at) for at, tile in tiles]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


# ------------------------------------------------------------------------------- new rows


def grown(terms, height, start=0):
    like = torch.empty(height - start, 5, dtype=torch.float64)
    return algebra.grown([(w, algebra.prepare(d, list)) for w, d in terms], like, start)


def test_new_rows_are_the_weighted_mean_of_those_who_have_them():
    first, second = leaf(1, 9, 5), leaf(2, 9, 5)
    found = grown([(0.5, Replace(first)), (1.5, Replace(second))], 9, start=6)
    wanted = (0.5 * exact(first.tensor()) + 1.5 * exact(second.tensor()))[6:] / 2
    close(found, wanted)
    close(grown([(0.3, Replace(first))], 9), exact(first.tensor()))


def test_new_rows_take_what_is_added_to_them():
    value, upon = leaf(1, 9, 5), pair(3, (9, 5))
    wanted = exact(value.tensor()) + 0.5 * folded(upon, np.zeros((9, 5)))
    close(grown([(1.0, Replace(value)), (0.5, upon)], 9), wanted)
    close(grown([(1.0, Replace(value)), (0.5, upon)], 9, start=7), wanted[7:])
    normed = Renormed(upon, lengths(5, 9))
    close(grown([(2.0, Replace(value, then=normed))], 9), folded(normed, exact(value.tensor())))


@pytest.mark.parametrize("other", [PAIR, diff(4), NORMED, Replace(leaf(5, 2, 5), rows=(0, 4))])
def test_an_adapter_without_the_new_rows_changes_none_of_them(other):
    value = leaf(1, 9, 5)
    found = grown([(1.0, Replace(value)), (0.5, other)], 9, start=6)
    close(found, exact(value.tensor())[6:])


def test_a_row_trained_alone_counts_where_it_is_new_too():
    value, token = leaf(1, 9, 5), leaf(2, 1, 5)
    terms = [(1.0, Replace(value)), (3.0, Replace(token, rows=(7,)))]
    wanted = exact(value.tensor())
    wanted[7] = (wanted[7] + 3 * exact(token.tensor())[0]) / 4
    for start in (6, 7, 8):
        close(grown(terms, 9, start=start), wanted[start:])


def test_new_rows_whose_weights_cancel_are_refused():
    refused("head_conflict", grown, [(1.0, Replace(leaf(1, 9, 5))), (-1.0, Replace(leaf(2, 9, 5)))],
            9)  # fmt: skip


# ------------------------------------------------------------------------------- records


def test_map_leaves_reaches_every_leaf_and_nothing_else():
    delta = Replace(leaf(1, 6, 5), then=replace(NORMED_IN, norm=Leaf.of("n", torch.ones(5))))
    seen = []
    same = algebra.map_leaves(delta, lambda one: seen.append(one) or one)
    assert same == delta
    assert seen == list(leaves(delta))
    assert len(seen) == 5


def test_leaves_widen_exactly():
    for dtype in (torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32):
        one = leaf(3, 4, 5, dtype=dtype)
        assert np.array_equal(algebra.widen(one).numpy(), exact(one.tensor()))


@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (3, 2, 2), (0,), (0, 4), (4, 0), (2, 0, 3)])
def test_every_tensor_is_a_matrix(shape):
    rest = int(np.prod(shape[1:]))
    height = shape[0] if shape else 1
    assert algebra.matrix(torch.zeros(shape)).shape == (height, rest)


def test_the_examples_hold_every_kind_and_variant():
    kinds = {type(e.delta) for e in EXAMPLES}
    assert kinds >= {LowRank, Dense, Renormed, Replace, Experts}
    axes = {(e.delta.axis, type(e.delta.delta)) for e in EXAMPLES if isinstance(e.delta, Renormed)}
    assert axes >= {(a, k) for a in ("out", "in") for k in (LowRank, Dense)}
    over = {
        (e.delta.rows is None, type(e.delta.then)) for e in EXAMPLES if isinstance(e.delta, Replace)
    }
    assert over == {(w, k) for w in (True, False) for k in (type(None), LowRank, Renormed)} | {
        (True, Replace)
    }
    assert len(BY_NAME) == len(EXAMPLES)
    assert isinstance(EXAMPLES[0], Example)
