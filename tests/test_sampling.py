"""A sample of a few rows says what the whole fold would, for light and for other updates."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.adapter import Dense, Leaf, Renormed
from loratools.containers.local import LocalFile
from loratools.errors import LoratoolsError
from loratools.folding import Cut
from loratools.sampling import expect_samples, fold_sample, is_light, is_near, sample_rows
from tests.examples_of_deltas import folded, lengths, numbers, pair
from tests.floats import exact
from tests.small_models import raw, target, tensor

SHAPE = (100, 5)
DELTAS = {"light": pair(2, SHAPE), "other": Renormed(pair(2, SHAPE), lengths(3, 5), "in")}


def in_file(path, tensor: torch.Tensor) -> Leaf:
    """A leaf of a file that holds nothing else but some bytes before it."""
    path.write_bytes(b"before" + raw(tensor))
    return Leaf("w", "F16", tuple(tensor.shape), source=LocalFile(path), offset=6)


@pytest.mark.parametrize("kind", DELTAS)
def test_the_same_rows_and_sums(tmp_path, kind):
    base = torch.tensor(numbers(1, *SHAPE)).to(torch.float16)
    w0, delta = exact(base), DELTAS[kind]
    one = target("w", in_file(tmp_path / "w", base), SHAPE, (1.0, delta))
    assert is_light(one, None) is (kind == "light")
    assert not is_light(one, Cut(rank=1))
    rows = sample_rows(100)
    tally = fold_sample(one, dtype=torch.float16)
    update = (folded(delta, w0) - w0)[rows]
    assert tally.elements == 40
    assert tally.update == pytest.approx(np.sum(update**2), rel=1e-9)
    assert tally.base == pytest.approx(np.sum(w0[rows] ** 2), rel=1e-12)
    assert tally.along == pytest.approx(np.sum(w0[rows] * update), rel=1e-9)


def test_a_weight_stored_turned(tmp_path):
    base = torch.tensor(numbers(1, *SHAPE)).to(torch.float16)
    delta = pair(2, (5, 100))
    one = target("w", in_file(tmp_path / "w", base), SHAPE, (0.5, delta, "transposed"))
    update = 0.5 * (folded(delta, exact(base).T) - exact(base).T).T[sample_rows(100)]
    assert fold_sample(one, dtype=torch.float16).update == pytest.approx(np.sum(update**2))


def test_what_does_not_fit_is_told(tmp_path):
    base = torch.full(SHAPE, 65000.0).to(torch.float16)
    one = target("w", in_file(tmp_path / "w", base), SHAPE, (1e5, DELTAS["light"]))
    with pytest.raises(LoratoolsError, match="do not fit float16") as caught:
        fold_sample(one, dtype=torch.float16)
    assert caught.value.code == "overflow"


def test_the_system_is_told_of_the_rows_that_are_read(tmp_path, monkeypatch):
    leaf = in_file(tmp_path / "w", tensor(1, *SHAPE).to(torch.float16))
    one = target("w", leaf, SHAPE, (1.0, DELTAS["light"]))
    elsewhere = target("held", Leaf.of("held", tensor(1, *SHAPE)), SHAPE, (1.0, DELTAS["light"]))
    expected, native, found = [], LocalFile.read, []
    monkeypatch.setattr(LocalFile, "expect", lambda _, ranges: expected.extend(ranges))
    monkeypatch.setattr(LocalFile, "read", lambda *asked: found.append(asked[1:]) or native(*asked))
    expect_samples([one, elsewhere, target("new", None, SHAPE, (1.0, DELTAS["light"]))])
    fold_sample(one, dtype=torch.float16)
    assert found == expected == [(6 + 10 * row, 10) for row in sample_rows(100)]


class Far:
    """A source that is asked over a network."""

    name, size = "far", 0


def test_a_base_elsewhere_is_not_near(tmp_path):
    there = Leaf("w", "F16", SHAPE, source=Far())
    assert not is_near(target("w", there, SHAPE, (1.0, DELTAS["light"])))
    assert is_near(target("w", in_file(tmp_path / "w", tensor(1, *SHAPE).half()), SHAPE))
    assert is_near(target("w", Leaf.of("w", tensor(1, *SHAPE)), SHAPE))
    expect_samples([target("w", there, SHAPE, (1.0, DELTAS["light"]))])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_to_sample(shape):
    one = target("w", Leaf.of("w", tensor(1, *shape)), shape, (0.5, pair(2, shape)))
    expect_samples([one])
    assert fold_sample(one, dtype=torch.float32).elements == 0


@pytest.mark.parametrize("shape", [(0,), ()])
def test_vectors_and_scalars(shape):
    base, delta = (Leaf.of("w", tensor(seed, *shape)) for seed in (1, 2))
    one = target("w", base, shape, (0.5, Dense(delta)))
    assert fold_sample(one, dtype=torch.float32).elements == base.numel


@given(height=st.integers(0, 40), count=st.integers(1, 12))
def test_rows_exist_and_are_as_many_as_can_be(height, count):
    rows = sample_rows(height, count)
    assert len(rows) == min(height, count)
    assert rows == sorted(set(rows))
    assert all(0 <= r < height for r in rows)
