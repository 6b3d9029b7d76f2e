"""One target folded: each element rounded once, the same bits on any grid, sums that are true."""

import hashlib
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import desk, folding
from loratools.adapter import Dense, Leaf, LowRank, Renormed, Replace
from loratools.folding import Cut, fold_target, fold_tensor, leaf_rows
from loratools.sampling import fold_sample
from tests.examples_of_deltas import (
    EXAMPLES,
    MIXABLE,
    PAIR,
    SHAPE,
    diff,
    folded,
    from_bytes,
    from_columns,
    leaf,
    lengths,
    numbers,
    pair,
)
from tests.floats import FORMATS, exact
from tests.refusing import refused
from tests.small_models import raw, target, tensor

each = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
each_dtype = pytest.mark.parametrize("dtype", FORMATS, ids=lambda d: str(d)[6:])


@pytest.fixture(params=[1 << 16, 7], ids=["one tile", "many tiles"])
def grid(request, monkeypatch):
    monkeypatch.setattr(folding, "TILE", request.param)
    monkeypatch.setattr(folding, "COUNTED", 1)


def require_rounded_once(
    found: torch.Tensor, wanted: np.ndarray, size: float | None = None
) -> None:
    """That every element is the rounding of a number within float64's own error of the wanted."""
    form = FORMATS[found.dtype]
    error = Fraction(1e-13 * (size or max(1.0, float(np.abs(wanted).max(initial=0)))))

    def rounded(value: Fraction) -> Fraction:
        size = form.value(form.nearest(abs(value)))
        return size if value > 0 else -size

    for value, near in zip(exact(found).flat, np.asarray(wanted).flat, strict=True):
        assert rounded(Fraction(near) - error) <= value <= rounded(Fraction(near) + error)


def stored(w0: np.ndarray, dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
    """A base weight in a dtype, and its numbers."""
    base = torch.tensor(w0).to(dtype)
    return base, exact(base)


# ------------------------------------------------------------------------------- results


@each
@pytest.mark.parametrize(
    ("dtype", "tile"),
    [
        (torch.bfloat16, 7),
        (torch.float16, 1 << 16),
        (torch.float32, 7),
        (torch.float64, 12),
        (torch.float8_e5m2, 1),
    ],
    ids=["bf16", "f16", "f32", "f64", "f8"],
)
def test_each_element_is_rounded_once(example, dtype, tile, monkeypatch):
    monkeypatch.setattr(folding, "TILE", tile)
    base, w0 = stored(example.w0 / 4, dtype)
    wanted = folded(example.delta, w0)
    one = target("w", Leaf.of("w", base), base.shape, (1.0, example.delta))
    found, tally = fold_tensor(one, base, dtype=dtype)
    assert (found.dtype, found.shape) == (dtype, base.shape)
    require_rounded_once(found, wanted)
    assert tally.elements == base.numel()


@pytest.mark.parametrize(
    ("apart", "rows"), [(1, [0, 4, 8, 12]), (4, [0, 1, 2, 12, 13, 14])]
)  # a tile is three rows here
def test_every_so_many_rows_are_measured_and_all_are_watched(apart, rows, monkeypatch):
    monkeypatch.setattr(folding, "APART", apart)
    monkeypatch.setattr(folding, "TILE", 24)
    monkeypatch.setattr(folding, "SMALL", 0)
    monkeypatch.setattr(folding, "COUNTED", 4)
    base = torch.from_numpy(numbers(5, 16, 8)).to(torch.float16)
    delta = pair(3, (16, 8), rank=2)
    one = target("w", Leaf.of("w", base), (16, 8), (1.0, delta))
    found, tally = fold_tensor(one, base, dtype=torch.float16)
    update = folded(delta, np.zeros((16, 8)))
    changed = (found.double() - base.double()).numpy()
    assert tally.update == pytest.approx(float((update[rows] ** 2).sum()), rel=1e-9)
    assert tally.kept == pytest.approx(float((changed[rows] * update[rows]).sum()), rel=1e-9)
    assert tally.elements == 16 * 8
    for row in range(16):
        for bad in (torch.nan, torch.inf):
            broken = base.clone()
            broken[row, 3] = bad
            one = target("w", Leaf.of("w", broken), (16, 8), (1.0, delta))
            refused("nonfinite", fold_tensor, one, broken, dtype=torch.float16)
        a = torch.ones(1, 8)
        b = torch.zeros(16, 1)
        b[row] = 70_000
        large = LowRank(Leaf.of("a", a), Leaf.of("b", b), 1.0)
        one = target("w", Leaf.of("w", base), (16, 8), (1.0, large))
        refused("overflow", fold_tensor, one, base, dtype=torch.float16)


@settings(max_examples=25)
@given(
    terms=st.lists(
        st.tuples(st.sampled_from([1.0, 0.5, -0.7]), st.sampled_from([e.delta for e in MIXABLE])),
        min_size=1,
        max_size=4,
    ),
    tile=st.integers(1, 40),
)
def test_mixtures_are_rounded_once_and_alike_on_any_grid(terms, tile):
    base, w0 = stored(numbers(1, *SHAPE), torch.bfloat16)
    one = target("w", Leaf.of("w", base), SHAPE, *terms)
    updates = [np.float64(w) * (folded(d, w0) - w0) for w, d in terms]
    found, _ = fold_tensor(one, base, dtype=torch.bfloat16)
    require_rounded_once(found, w0 + sum(updates), 1 + sum(abs(u).max() for u in updates))
    before, folding.TILE = folding.TILE, tile
    try:
        again, _ = fold_tensor(one, base, dtype=torch.bfloat16)
    finally:
        folding.TILE = before
    assert raw(again) == raw(found)


TURNED = {
    "low rank": pair(1, (4, 11), scaling=2.0),
    "low rank, square": pair(1, (6, 6)),
    "renormed": Renormed(pair(1, (4, 11)), lengths(3, 1, 4)),
    "renormed, dense": Renormed(Dense(leaf(4, 4, 11)), lengths(3, 4)),
}


@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize("weight", [1.0, -0.4])
@pytest.mark.usefixtures("grid")
def test_a_weight_stored_in_out_is_folded_as_its_module_has_it(name, weight):
    """Conv1D and embeddings; a DoRA then needs column norms, and a first pass over the weight."""
    delta = TURNED[name]
    shape = delta.delta.diff.shape if name == "renormed, dense" else (
        (6, 6) if "square" in name else (4, 11))  # fmt: skip
    base, w0 = stored(numbers(9, *shape[::-1]), torch.bfloat16)
    wanted = w0 + weight * (folded(delta, w0.T).T - w0)
    one = target("w", Leaf.of("w", base), base.shape, (weight, delta, "transposed"))
    found, _ = fold_tensor(one, base, dtype=torch.float32)
    require_rounded_once(found, wanted)


@pytest.mark.parametrize(
    "make", [lambda x: x, from_bytes, from_columns], ids="held bytes columns".split()
)
@pytest.mark.usefixtures("grid")
def test_a_base_is_read_from_wherever_it_lies(make):
    base = Leaf.of("w", tensor(1, 9, 5, dtype=torch.float16))
    one = target("w", make(base), (9, 5), (0.5, pair(3, (9, 5))))
    parts = []
    tally = fold_target(one, leaf_rows(one.base), lambda at, t: parts.append((at, t.clone())),
                        dtype=torch.float16)  # fmt: skip
    assert [at for at, _ in parts] == list(np.cumsum([0, *(len(t) for _, t in parts[:-1])]))
    found = torch.cat([t for _, t in parts])
    require_rounded_once(
        found, exact(base.tensor()) + 0.5 * folded(pair(3, (9, 5)), np.zeros((9, 5)))
    )
    assert tally.elements == 45


def test_a_base_that_is_no_contiguous_tensor():
    wide = tensor(1, 5, 18, dtype=torch.bfloat16)
    base = wide[:, ::2].T
    one = target("w", Leaf.of("w", base), (9, 5), (1.0, pair(3, (9, 5))))
    found, _ = fold_tensor(one, base, dtype=torch.bfloat16)
    assert raw(found) == raw(fold_tensor(one, base.contiguous(), dtype=torch.bfloat16)[0])
    assert raw(base) == raw(wide[:, ::2].T)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), ()])
def test_empty_and_single_tensors(shape):
    base = tensor(1, *shape)
    one = target("w", Leaf.of("w", base), shape, (0.5, Dense(Leaf.of("d", tensor(2, *shape)))))
    found, tally = fold_tensor(one, base, dtype=torch.float32)
    require_rounded_once(found, exact(base) + 0.5 * exact(tensor(2, *shape)))
    assert tally.elements == base.numel()
    assert tally.update_kept == (pytest.approx(1, abs=1e-6) if base.numel() else None)


# ------------------------------------------------------------------------------- new rows


@pytest.mark.usefixtures("grid")
def test_rows_beyond_the_base_come_from_those_who_have_them():
    base, w0 = stored(numbers(1, 6, 5), torch.bfloat16)
    first, second = leaf(2, 9, 5), leaf(3, 9, 5)
    upon = pair(4, (9, 5), scaling=0.5)
    terms = [(0.25, Replace(first)), (0.5, Replace(second)), (2.0, upon)]
    one = target("w", Leaf.of("w", base), (9, 5), *terms)
    found, tally = fold_tensor(one, base, dtype=torch.bfloat16)
    extra = 2 * folded(upon, np.zeros((9, 5)))
    a, b = exact(first.tensor()), exact(second.tensor())
    old = w0 + 0.25 * (a[:6] - w0) + 0.5 * (b[:6] - w0) + extra[:6]
    new = (0.25 * a[6:] + 0.5 * b[6:]) / 0.75 + extra[6:]
    require_rounded_once(found, np.concatenate([old, new]))
    assert tally.elements == 45


@pytest.mark.usefixtures("grid")
def test_adapters_that_grew_differently_are_averaged_where_both_have_rows():
    base, w0 = stored(numbers(1, 6, 5), torch.float32)
    short, long = leaf(2, 7, 5), leaf(3, 9, 5)
    one = target("w", Leaf.of("w", base), (9, 5), (1.0, Replace(short)), (3.0, Replace(long)))
    found, _ = fold_tensor(one, base, dtype=torch.float32)
    a, b = exact(short.tensor()), exact(long.tensor())
    old = w0 + (a[:6] - w0) + 3 * (b[:6] - w0)
    require_rounded_once(found, np.concatenate([old, (a[6:] + 3 * b[6:7]) / 4, b[7:]]), 20)


@pytest.mark.usefixtures("grid")
def test_an_adapter_that_has_fewer_rows_than_the_base_leaves_the_others():
    base, w0 = stored(numbers(1, 6, 5), torch.float32)
    one = target("w", Leaf.of("w", base), (6, 5), (0.5, Replace(leaf(2, 4, 5))), (1.0, PAIR))
    found, _ = fold_tensor(one, base, dtype=torch.float32)
    wanted = folded(PAIR, w0)
    wanted[:4] += 0.5 * (exact(leaf(2, 4, 5).tensor()) - w0[:4])
    require_rounded_once(found, wanted)


@pytest.mark.usefixtures("grid")
def test_a_vocabulary_may_become_shorter():
    base = tensor(1, 9, 5)
    one = target("w", Leaf.of("w", base), (6, 5), (1.0, Replace(leaf(2, 6, 5))))
    found, _ = fold_tensor(one, base, dtype=torch.float16)
    require_rounded_once(found, exact(leaf(2, 6, 5).tensor()))


@pytest.mark.parametrize("shape", [(3, 5), (3,), ()])
@pytest.mark.usefixtures("grid")
def test_a_new_head_is_the_weighted_mean(shape):
    first, second = leaf(1, *shape), leaf(2, *shape)
    one = target("score.weight", None, shape, (0.6, Replace(first)), (0.2, Replace(second)))
    found, tally = fold_tensor(one, None, dtype=torch.bfloat16)
    wanted = (0.6 * exact(first.tensor()) + 0.2 * exact(second.tensor())) / 0.8
    require_rounded_once(found, np.asarray(wanted))
    assert found.shape == shape
    assert tally.update_kept is None
    alone, _ = fold_tensor(
        target("s", None, shape, (0.3, Replace(first))), None, dtype=torch.float32
    )
    assert raw(alone) == raw(first.tensor())


# ------------------------------------------------------------------------------- figures


@each
@pytest.mark.usefixtures("grid")
def test_the_tally_is_what_numpy_sums(example):
    base, w0 = stored(example.w0, torch.bfloat16)
    one = target("w", Leaf.of("w", base), base.shape, (0.7, example.delta), (0.2, example.delta))
    found, tally = fold_tensor(one, base, dtype=torch.bfloat16)
    update = 0.9 * (folded(example.delta, w0) - w0)
    changed = exact(found) - w0
    whole = float(np.sum(update * update))
    assert tally.update == pytest.approx(whole, rel=1e-9, abs=1e-20)
    assert tally.kept == pytest.approx(float(np.sum(changed * update)), rel=1e-9, abs=1e-12)
    if whole > 1e-12:
        assert tally.update_kept == pytest.approx(float(np.sum(changed * update)) / whole, rel=1e-9)
    else:
        assert not tally.update_kept


def test_an_update_below_the_dtypes_steps_is_seen_as_lost():
    base = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    tiny = Dense(Leaf.of("d", torch.full((64, 64), 1e-4)))
    one = target("w", Leaf.of("w", base), (64, 64), (1.0, tiny))
    assert fold_tensor(one, base, dtype=torch.bfloat16)[1].update_kept == 0
    assert fold_tensor(one, base, dtype=torch.float32)[1].update_kept == pytest.approx(1, abs=1e-3)
    mixed = Dense(Leaf.of("d", torch.tensor([[1e-4, 1.0]]).repeat(64, 32)))
    one = target("w", Leaf.of("w", base), (64, 64), (1.0, mixed))
    assert fold_tensor(one, base, dtype=torch.bfloat16)[1].update_kept == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_process_that_flushes_small_numbers_folds_the_same(dtype, tmp_path):
    """torch.set_flush_denormal, which servers use: float16's subnormals are weights."""
    least = torch.finfo(dtype).smallest_normal
    base = (torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) * least).to(dtype)
    assert 0.1 < float((base.double().abs() < least).double().mean()) < 0.9
    a = torch.randint(1, 4, (3, 300), generator=torch.Generator().manual_seed(2)).float()
    delta = LowRank(Leaf.of("a", a), Leaf.of("b", torch.ones(40, 3)), least / 16)
    one = target("w", Leaf.of("w", base), (40, 300), (1.0, delta))
    wanted, _ = fold_tensor(one, base, dtype=dtype)
    sampled = fold_sample(one, dtype=dtype)
    small = sys.float_info.min
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor has no such mode")
        found, _ = fold_tensor(one, base, dtype=dtype)
        assert fold_sample(one, dtype=dtype) == sampled
        assert small / 2 == 0  # as the process had it
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
    assert small / 2 > 0


@pytest.mark.usefixtures("grid")
def test_a_cut_folds_the_best_approximation_of_the_sum_and_says_what_it_left():
    base, w0 = stored(numbers(1, 12, 9), torch.float64)
    terms = [(0.5, pair(2, (12, 9), rank=3)), (-1.0, pair(4, (12, 9), rank=2, scaling=2.0))]
    one = target("w", Leaf.of("w", base), (12, 9), *terms)
    found, tally = fold_tensor(one, base, dtype=torch.float64, cut=Cut(rank=2))
    update = sum(w * folded(d, np.zeros((12, 9))) for w, d in terms)
    u, s, vt = np.linalg.svd(update)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    assert np.abs(exact(found) - w0 - best).max() <= 1e-12
    assert tally.residual == pytest.approx(np.sum(s[2:] ** 2), rel=1e-9)
    assert tally.whole == pytest.approx(np.sum(s**2), rel=1e-9)
    # The update that is counted is the one that was folded.
    assert tally.update == pytest.approx(np.sum(best**2), rel=1e-9)


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("delta", [PAIR, diff(1), Replace(leaf(2, 1, 5), rows=(0,))])
@each_dtype
@pytest.mark.usefixtures("grid")
def test_a_base_that_is_not_finite_is_refused_with_the_count(value, delta, dtype):
    base = tensor(1, *SHAPE).to(torch.float32)
    base[5, 3] = value
    one = target("model.q.weight", Leaf.of("w", base), SHAPE, (1.0, delta))
    message = refused("nonfinite", fold_tensor, one, base, dtype=dtype)
    assert message.startswith("model.q.weight: the base has 1 NaN")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("known", [6, 3, 0])
@pytest.mark.usefixtures("grid")
def test_what_does_not_fit_the_dtype_is_refused_in_old_rows_and_new(dtype, known):
    limit = float(torch.finfo(dtype).max)
    value = torch.ones(SHAPE, dtype=torch.float64)
    base = value[:known].clone()
    value[5, 4] = limit * 1.2
    leaf_or_none = Leaf.of("w", base) if known else None
    one = target("q.weight", leaf_or_none, SHAPE, (1.0, Replace(Leaf.of("v", value))))
    message = refused("overflow", fold_tensor, one, base if known else None, dtype=dtype)
    assert "q.weight: 1 values" in message
    assert str(dtype)[6:] in message
    value[5, 4] = limit
    found, _ = fold_tensor(one, base if known else None, dtype=dtype)
    assert found[5, 4].double() == limit


def test_an_untouched_number_too_large_for_the_dtype_is_refused_too():
    base = torch.ones(SHAPE)
    base[2, 2] = 70000
    one = target("q.weight", Leaf.of("w", base), SHAPE, (1.0, Replace(leaf(1, 1, 5), rows=(0,))))
    assert "1 values" in refused("overflow", fold_tensor, one, base, dtype=torch.float16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@each_dtype
@pytest.mark.usefixtures("grid")
def test_an_update_that_is_not_finite_is_not_taken_for_an_overflow(value, dtype):
    bad = torch.zeros(SHAPE)
    bad[1, 1] = value
    base = torch.ones(SHAPE)
    one = target("q.weight", Leaf.of("w", base), SHAPE, (0.5, Dense(Leaf.of("d", bad))))
    message = refused("nonfinite", fold_tensor, one, base, dtype=dtype)
    assert message.startswith("q.weight: the update has 1 NaN")


def test_a_new_head_that_is_not_finite_is_not_taken_for_an_overflow():
    bad = Replace(Leaf.of("v", torch.tensor([[1.0, torch.nan]])))
    one = target("score.weight", None, (1, 2), (1.0, bad))
    message = refused("nonfinite", fold_tensor, one, None, dtype=torch.float16)
    assert message.startswith("score.weight: the update has 1 NaN")


def test_a_zero_row_cannot_be_renormed():
    base = torch.ones(SHAPE)
    base[2] = 0
    flat = LowRank(leaf(1, 2, 5), Leaf.of("b", torch.zeros(6, 2)), 1.0)
    one = target("q.weight", Leaf.of("w", base), SHAPE, (1.0, Renormed(flat, lengths(3, 6))))
    refused("nonfinite", fold_tensor, one, base, dtype=torch.float32)


def test_numbers_that_are_large_in_float64_are_finite():
    base = torch.full(SHAPE, 1e200, dtype=torch.float64)
    one = target("w", Leaf.of("w", base), SHAPE, (1e200, PAIR))
    found, _ = fold_tensor(one, base, dtype=torch.float64)
    assert found.isfinite().all()
    assert not torch.equal(found, base)


# ------------------------------------------------------------------------------- determinism


def test_bits_do_not_depend_on_torchs_threads():
    base = tensor(1, 700, 300, dtype=torch.bfloat16)
    terms = [
        (0.6, pair(2, (700, 300), rank=16)),
        (0.4, Renormed(pair(4, (700, 300)), lengths(5, 700))),
    ]
    one = target("w", Leaf.of("w", base), (700, 300), *terms)
    before, digests = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            found, _ = fold_tensor(one, base, dtype=torch.bfloat16)
            digests.add(hashlib.sha256(raw(found)).hexdigest())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


def test_arguments_are_not_changed():
    base = tensor(1, *SHAPE)
    kept = raw(base), raw(PAIR.a.tensor()), raw(PAIR.b.tensor())
    one = target("w", Leaf.of("w", base), SHAPE, (2.0, PAIR), (1.0, Replace(leaf(2, *SHAPE))))
    fold_tensor(one, base, dtype=torch.float64)
    assert kept == (raw(base), raw(PAIR.a.tensor()), raw(PAIR.b.tensor()))


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:x", "meta", ""])
def test_a_device_that_cannot_be_used_is_a_usage_error(name):
    message = refused("usage", desk.choose_device, name, None)
    assert name in message
