"""Singular values, truncation and low-rank forms, against dense decompositions and exact sums."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import algebra, truncating
from loratools.adapter import Dense, Leaf, LowRank
from loratools.errors import LoratoolsError
from tests.examples_of_deltas import EXAMPLES, NORMED, PAIR, chosen, folded, leaf, numbers, pair
from tests.floats import exact
from tests.refusing import refused

each = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
LOW_RANK = chosen(lambda e: isinstance(e.delta, LowRank))
each_pair = pytest.mark.parametrize("example", LOW_RANK, ids=lambda e: e.name)


def dense(delta: LowRank | Dense) -> np.ndarray:
    """ΔW as a matrix, by numpy."""
    whole = delta.diff.shape if isinstance(delta, Dense) else (delta.b.shape[0], *delta.a.shape[1:])
    return folded(delta, np.zeros(whole)).reshape(whole[0], -1)


def sigma(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


def tail(values: np.ndarray, kept: int) -> float:
    return float(np.sum(values[kept:] ** 2))


@each_pair
def test_singular_values_and_norm_are_those_of_the_dense_matrix(example):
    matrix = dense(example.delta)
    wanted = sigma(matrix)
    found = truncating.singular_values(example.delta).numpy()
    assert len(found) <= example.delta.rank
    assert np.all(np.diff(found) <= 0)
    size = max(float(wanted.max()), 1e-300)
    some = min(len(found), len(wanted))
    assert np.abs(found[:some] - wanted[:some]).max() <= 1e-13 * size
    assert wanted[some:].max(initial=0) <= 1e-13 * size
    squared = truncating.norm_squared(example.delta)
    assert squared == pytest.approx(float(np.sum(matrix**2)), rel=1e-12)


@each_pair
@pytest.mark.parametrize("rank", [1, 2, 50])
def test_a_truncation_is_as_near_as_any_matrix_of_its_rank(example, rank):
    matrix = dense(example.delta)
    values, size = sigma(matrix), np.linalg.norm(matrix)
    short = truncating.truncate(example.delta, rank=rank)
    kept = short.delta.rank
    assert 1 <= kept <= min(rank, example.delta.rank)
    assert (short.delta.scaling, short.delta.a.dtype) == (1, "F64")
    assert algebra.shape(short.delta) == algebra.shape(example.delta)
    assert len(short.delta.b.shape) == max(2, len(short.delta.a.shape))
    # Eckart–Young: the error is the norm of what comes after.
    apart = np.linalg.norm(dense(short.delta) - matrix)
    assert apart == pytest.approx(tail(values, min(rank, len(values))) ** 0.5, abs=1e-13 * size)
    assert short.residual == pytest.approx(tail(values, kept), abs=1e-13 * size**2)
    assert short.total == pytest.approx(size**2, rel=1e-12)


@each_pair
def test_the_square_root_of_each_singular_value_goes_to_either_side(example):
    short = truncating.truncate(example.delta).delta
    a, b = exact(short.a.tensor()).reshape(short.rank, -1), exact(short.b.tensor())
    b = b.reshape(-1, short.rank)
    values = truncating.singular_values(example.delta).numpy()[: short.rank]
    for gram in (a @ a.T, b.T @ b):
        assert np.abs(gram - np.diag(values)).max() <= 1e-13 * max(values[0], 1e-300)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 3), step=st.sampled_from([1e-6, 1e-3, 0.1]))
def test_no_other_matrix_of_the_rank_is_nearer(seed, rank, step):
    delta = pair(seed, rank=4)
    matrix, short = dense(delta), truncating.truncate(delta, rank=rank)
    a = exact(short.delta.a.tensor()) + step * numbers(seed + 2, rank, 5)
    b = exact(short.delta.b.tensor()) + step * numbers(seed + 3, 6, rank)
    assert np.linalg.norm(b @ a - matrix) ** 2 >= short.residual * (1 - 1e-12)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    energy=st.one_of(st.floats(0.01, 1), st.sampled_from([0.5, 0.9, 0.99, 1.0])),
    ceiling=st.one_of(st.none(), st.integers(1, 4)),
)
def test_energy_keeps_the_fewest_that_hold_the_share(seed, energy, ceiling):
    delta = pair(seed, rank=4)
    values = sigma(dense(delta))
    short = truncating.truncate(delta, energy=energy, rank=ceiling)
    kept = short.delta.rank
    enough = [k for k in range(1, 5) if 1 - tail(values, k) / tail(values, 0) >= energy - 1e-13]
    assert kept in {min(k, ceiling or 4) for k in (enough[0] if enough else 4,)}


@pytest.mark.parametrize(
    ("values", "options", "kept"),
    [
        ([4.0, 2.0, 1.0], {}, 3),
        ([4.0, 2.0, 1.0], {"rank": 2}, 2),
        ([4.0, 2.0, 1.0], {"energy": 16 / 21}, 1),
        ([4.0, 2.0, 1.0], {"energy": 16.01 / 21}, 2),
        ([4.0, 2.0, 1.0], {"energy": 1.0}, 3),
        ([4.0, 2.0, 1.0], {"energy": 1.0, "rank": 1}, 1),
        ([4.0, 4e-17], {"energy": 1.0}, 1),
        ([4.0, 4e-17], {}, 1),
        ([0.0, 0.0], {}, 1),
        ([0.0, 0.0], {"rank": 2, "energy": 1.0}, 1),
        ([3e-200, 1e-200], {"energy": 0.99}, 2),
        ([3e-200, 1e-200], {"energy": 0.5}, 1),
        ([3e200, 1e200], {"energy": 0.99}, 2),
        ([], {}, 0),
    ],
)
def test_how_many_are_kept(values, options, kept):
    found = truncating.kept_rank(
        torch.tensor(values, dtype=torch.float64), **{"rank": None, "energy": None, **options}
    )
    assert found == kept


def test_equal_inputs_give_equal_bytes_whatever_sign_the_library_returns():
    for example in LOW_RANK:
        short = truncating.truncate(example.delta).delta
        peaks = exact(short.b.tensor()).reshape(-1, short.rank)
        highest = peaks[np.abs(peaks).argmax(axis=0), range(short.rank)]
        assert (highest >= 0).all()


def test_a_thin_svd_agrees_with_a_dense_one():
    delta = pair(5, (768, 768), rank=16, dtype=torch.float64)
    matrix = exact(delta.b.tensor()) @ exact(delta.a.tensor())
    u, s, vt = np.linalg.svd(matrix)
    size = np.linalg.norm(matrix)
    for rank in (16, 5):
        short = truncating.truncate(delta, rank=rank).delta
        product = exact(short.b.tensor()) @ exact(short.a.tensor())
        wanted = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert np.linalg.norm(product - wanted) <= 1e-12 * size


# ------------------------------------------------------------------------------- hard numbers


def rationals(matrix: np.ndarray) -> list[list[Fraction]]:
    return [[Fraction(float(x)) for x in row] for row in matrix]


def exact_product(delta: LowRank) -> np.ndarray:
    """B·A in rational numbers, rounded once."""
    b, a = rationals(exact(delta.b.tensor())), rationals(exact(delta.a.tensor()))
    columns = list(zip(*a, strict=True))
    rows = [[sum(x * y for x, y in zip(r, c, strict=True)) for c in columns] for r in b]
    return np.array([[float(Fraction(delta.scaling) * x) for x in row] for row in rows])


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 4))
def test_the_difference_of_nearly_equal_adapters_keeps_its_digits(seed, rank):
    first = pair(seed, (9, 8), rank=2, dtype=torch.float64)
    near = {
        name: Leaf.of(name, (one := getattr(first, name).tensor()) + 1e-6 * torch.from_numpy(
            numbers(seed + 7, *one.shape)))
        for name in ("a", "b")
    }  # fmt: skip
    second = LowRank(near["a"], near["b"], 1.0)
    both = algebra.add([first, algebra.scaled(second, -1.0)])
    wanted = exact_product(both)
    u, s, vt = np.linalg.svd(wanted)
    assert s[0] < 1e-4
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    short = truncating.truncate(both, rank=rank)
    found = exact_product(short.delta)
    # Where singular values are near each other several matrices are best: the error decides.
    gap = s[rank - 1] - s[rank] if rank < len(s) else s[0]
    if gap > 0.01 * s[0]:
        assert np.linalg.norm(found - best) <= 1e-8 * np.linalg.norm(best)
    off = np.linalg.norm(found - wanted)
    assert off <= tail(s, rank) ** 0.5 + 1e-8 * np.linalg.norm(wanted)


@pytest.mark.parametrize("scale", [1e6, 1e-6, 1e100, 1e-100])
def test_factors_of_very_different_size_lose_nothing(scale):
    a, b = numbers(1, 3, 8) * scale, numbers(2, 9, 3) / scale
    delta = LowRank(Leaf.of("a", torch.from_numpy(a)), Leaf.of("b", torch.from_numpy(b)), 1.0)
    wanted = exact_product(delta)
    u, s, vt = np.linalg.svd(wanted)
    for rank in (3, 2):
        found = exact_product(truncating.truncate(delta, rank=rank).delta)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert np.linalg.norm(found - best) <= 1e-13 * s[0]


def test_rows_of_very_different_size_keep_their_singular_values():
    b = np.diag([1.0, 1e-5, 1e-9]) @ np.linalg.qr(numbers(3, 3, 3))[0]
    a = np.linalg.qr(numbers(4, 8, 3))[0].T
    delta = LowRank(
        Leaf.of("a", torch.from_numpy(a.copy())), Leaf.of("b", torch.from_numpy(b)), 1.0
    )
    found = truncating.singular_values(delta).numpy()
    assert np.abs(found - [1.0, 1e-5, 1e-9]).max() <= 1e-15


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["a", "b"])
def test_what_is_not_finite_is_named(value, side):
    bad = torch.ones(2, 2)
    bad[1, 0] = value
    leaves = {"a": torch.ones(2, 2), "b": torch.ones(2, 2), side: bad}
    delta = LowRank(Leaf.of("q.lora_A", leaves["a"]), Leaf.of("q.lora_B", leaves["b"]), 1.0)
    for call in (truncating.truncate, truncating.singular_values):
        with pytest.raises(LoratoolsError, match=f"q.lora_{side.upper()}") as caught:
            call(delta)
        assert caught.value.code == "nonfinite"


def test_the_norm_of_what_cancels_is_not_below_zero():
    found = []
    for seed in range(40):
        first = pair(seed, dtype=torch.float64)
        moved = replace(first, b=Leaf.of("b", first.b.tensor() * (1 + 1e-9)))
        nothing = algebra.add([first, algebra.scaled(moved, -1.0)])
        found.append(truncating.norm_squared(nothing))
    assert min(found) >= 0
    assert max(found) <= 1e-13


# ------------------------------------------------------------------------------- low-rank forms


@each
def test_every_update_of_a_matrix_has_a_low_rank_form(example):
    w0 = torch.from_numpy(example.w0)
    if example.w0.ndim < 2:
        refused("usage", truncating.to_low_rank, example.delta, w0=w0)
        return
    if not example.is_additive:
        refused("needs_base", truncating.to_low_rank, example.delta, rank=2)
    matrix = example.update.reshape(len(example.w0), -1)
    values, size = sigma(matrix), np.abs(example.folded).max() + 1
    whole = truncating.to_low_rank(example.delta, w0=w0)
    assert np.abs(dense(whole.delta) - matrix).max() <= 2e-13 * size
    assert whole.residual <= (1e-12 * size) ** 2
    assert whole.total == pytest.approx(tail(values, 0), rel=1e-9, abs=1e-24)
    short = truncating.to_low_rank(example.delta, rank=2, w0=w0)
    assert short.delta.rank <= 2
    assert short.residual == pytest.approx(tail(values, 2), rel=1e-9, abs=1e-12 * size**2)
    off = np.linalg.norm(dense(short.delta) - matrix)
    assert off == pytest.approx(tail(values, 2) ** 0.5, rel=1e-9, abs=1e-12 * size)
    if "flat on" not in example.name:
        assert algebra.shape(short.delta) == example.w0.shape


def test_a_low_rank_delta_is_its_own_low_rank_form():
    assert truncating.to_low_rank(PAIR).delta is PAIR
    assert truncating.to_low_rank(PAIR, energy=1.0).delta is not PAIR


def test_what_depends_on_the_base_needs_it():
    refused("needs_base", truncating.to_low_rank, NORMED)


def test_a_low_rank_difference_is_found_in_a_dense_one():
    spread = dense(pair(1, (30, 20), rank=3))
    delta = Dense(Leaf.of("diff", torch.from_numpy(spread)))
    found = truncating.to_low_rank(delta)
    assert found.delta.rank == 3
    assert truncating.to_low_rank(Dense(leaf(4, 6, 5))).delta.rank == 5
