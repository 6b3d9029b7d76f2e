"""Transforms against their sums written out, PEFT's own tables of wavelets, and torch's seeds."""

import numpy as np
import pytest
import torch
from peft.tuners.waveft.wavelet import Wavelet
from peft.tuners.waveft.waverec2d import waverec2d

from loratools import kinds
from loratools.adapter import Chained, Leaf, LowRank, Sparse, Spectral
from loratools.kinds import seeded, spectral, wavelets
from tests.kinds.laws import close, exact, laws, leaf, numbers
from tests.refusing import refused


def permutation(seed, extent, count):
    return torch.randperm(extent, generator=torch.Generator().manual_seed(seed))[:count].numpy()


def fourier(spectrum, seed, shape, scaling):
    """Re Σ s_k·exp(2πi·(…))/n, number by number."""
    height, width = shape
    at = permutation(seed, height * width, len(spectrum))
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    whole = np.zeros(shape, dtype=np.longdouble)
    turn = 2 * np.arctan2(np.longdouble(0), np.longdouble(-1))
    for value, place in zip(spectrum, at, strict=True):
        k, m = divmod(int(place), width)
        phase = rows * np.longdouble(k) / height + columns * np.longdouble(m) / width
        whole += value * np.cos(turn * phase)
    return whole / (height * width) * scaling


SPECTRUM = leaf(1, 9)


def test_fourierft():
    delta = Spectral("fourier", {"spectrum": SPECTRUM}, (6, 5), 2.5, {"seed": 3})
    update = fourier(exact(SPECTRUM), 3, (6, 5), np.longdouble(2.5))
    laws(delta, numbers(2, 6, 5), lambda w: w + update)


def test_fourierft_before_its_base_is_known():
    delta = Chained("fourier", {"spectrum": SPECTRUM}, 2.5, {"seed": 3})
    update = fourier(exact(SPECTRUM), 3, (6, 5), np.longdouble(2.5))
    laws(delta, numbers(2, 6, 5), lambda w: w + update)
    assert kinds.shape(delta) is None
    made = seeded.settled({"x": delta, "y": delta}, {"x": (6, 5)})
    assert made["y"] is delta
    assert isinstance(made["x"], Spectral)
    laws(made["x"], numbers(2, 6, 5), lambda w: w + update)


@pytest.mark.parametrize(
    "family", [f"db{n}" for n in range(1, 11)] + [f"sym{n}" for n in range(2, 11)] + ["haar"]
)
def test_filters_are_those_of_pefts_tables(family):
    wavelet = Wavelet(family)
    low = wavelets.low_pass(family)
    assert len(low) == wavelets.taps(family)
    np.testing.assert_allclose(low, wavelet.rec_lo, atol=2e-11)
    np.testing.assert_allclose(wavelets.high_pass(low), wavelet.rec_hi, atol=2e-11)


@pytest.mark.parametrize("family", ["db1", "db2", "db5", "sym4"])
def test_one_level_back_is_pefts(family):
    grid = torch.from_numpy(numbers(4, 22, 26))
    quarters = (grid[:11, :13], (grid[:11, 13:], grid[11:, :13], grid[11:, 13:]))
    wanted = waverec2d(quarters, family)
    found = wavelets.inverse(grid, family, *wanted.shape)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "family", ["db0", "db39", "db01", "coif2", "sym11", "", "db", "db" + "9" * 400]
)
def test_other_wavelets_are_refused(family):
    refused("unknown_type", wavelets.taps, family)


def test_haar_by_hand():
    # One coefficient of each quarter, at the first place.
    spread = np.array([[1, 1], [1, 1]]), np.array([[1, 1], [-1, -1]])
    for corner, quarter in (((0, 0), spread[0]), ((0, 2), spread[1]), ((2, 0), spread[1].T)):
        grid = torch.zeros(4, 4, dtype=torch.float64)
        grid[corner] = 2
        found = wavelets.inverse(grid, "haar", 4, 4)
        wanted = np.zeros((4, 4))
        wanted[:2, :2] = quarter
        close(found, wanted)


def test_waveft_without_a_transform_is_its_places():
    settings = {"seed": 8, "family": "db1", "idwt": False}
    delta = Spectral("wavelet", {"spectrum": SPECTRUM}, (6, 5), -0.5, settings)
    update = np.zeros(30, dtype=np.longdouble)
    update[permutation(8, 30, 9)] = exact(SPECTRUM) / -2
    laws(delta, numbers(5, 6, 5), lambda w: w + update.reshape(6, 5))


def test_circulant_blocks():
    kernel = leaf(6, 2, 3, 4)
    w = exact(kernel)
    update = np.zeros((8, 12), dtype=np.longdouble)
    for m in range(2):
        for n in range(3):
            for k in range(4):
                for t in range(4):
                    update[4 * m + k, 4 * n + t] = w[m, n, (t - k) % 4]
    delta = Spectral("circulant", {"kernel": kernel}, (8, 12), 1 / 12)
    laws(delta, numbers(7, 8, 12), lambda x: x + update * np.longdouble(1 / 12))


def test_values_and_a_pair():
    a, b, values = leaf(8, 2, 5), leaf(9, 6, 2), leaf(10, 4)
    at = Leaf.of("indices", torch.tensor([0, 7, 29, 7], dtype=torch.int32))
    parts = {"values": values, "indices": at, "a": a, "b": b}
    delta = Spectral("supra", parts, (6, 5), 1.0, {"pair": 1.5})
    update = np.longdouble(1.5) * exact(b) @ exact(a)
    for value, place in zip(exact(values), [0, 7, 29, 7], strict=True):
        update[place // 5, place % 5] += value
    laws(delta, numbers(11, 6, 5), lambda w: w + update)
    outside = Leaf.of("indices", torch.tensor([0, 7, 30, 7]))
    bad = Spectral("supra", {**parts, "indices": outside}, (6, 5), 1.0, {"pair": 1.5})
    refused("malformed", kinds.ready, bad)


def test_an_unknown_transform_is_refused():
    refused("unknown_type", spectral.whole, Spectral("sines", {}, (2, 2)))


# ------------------------------------------------------------------------------- random pairs


def randlora(shape, a, b, lam, gamma, scaling):
    """Each base's product written out, in the order in which PEFT flattens both sides."""
    rank, count = lam.shape
    small, large = min(shape), max(shape)
    narrow = [
        lam[r, i] * a[r, i if a.shape[1] > 1 else 0, :small] * gamma[i]
        for r in range(rank)
        for i in range(count)
    ]
    wide = [b[:large, i, r] for i in range(count) for r in range(rank)]
    whole = sum(np.outer(w, n) for w, n in zip(wide, narrow, strict=True))
    return scaling * (whole if shape[1] == small else whole.T)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (5, 5)])
@pytest.mark.parametrize("bases", [1, 3])
def test_randlora_of_stored_projections(shape, bases):
    parts = {
        "lambda": leaf(12, 2, 3),
        "gamma": leaf(13, 3, 5),
        "A": leaf(14, 2, bases, 6),
        "B": leaf(15, 9, 4, 2),
    }
    values = {name: exact(part) for name, part in parts.items()}
    update = randlora(
        shape, values["A"], values["B"], values["lambda"], values["gamma"], np.longdouble(0.5)
    )
    delta = Chained("randlora", parts, 0.5, {"seed": 0, "density": "dense"})
    assert kinds.fits(delta, shape) is None
    assert kinds.fits(delta, (4, 4)) is not None
    assert kinds.fits(delta, (5, 10)) is not None
    laws(delta, numbers(16, *shape), lambda w: w + update)
    made = seeded.settled({"x": delta}, {"x": shape})["x"]
    assert isinstance(made, LowRank)
    assert (made.b.shape[0], made.a.shape[1]) == shape


def test_randlora_of_a_seed_wants_every_shape():
    parts = {"lambda": leaf(12, 2, 3), "gamma": leaf(13, 3, 5)}
    delta = Chained("randlora", parts, 0.5, {"seed": 0, "density": "dense"})
    refused("needs_base", kinds.apply, delta, torch.zeros(5, 7, dtype=torch.float64), 0)
    both = {"x": delta, "y": delta}
    assert seeded.settled(both, {"x": (5, 7)})["x"] is delta
    assert isinstance(seeded.settled(both, {"x": (5, 7), "y": (9, 5)})["x"], LowRank)


# ------------------------------------------------------------------------------- places


def test_places_by_pairs_and_flat_are_one():
    values = leaf(17, 3)
    rows, columns = torch.tensor([5, 0, 2]), torch.tensor([4, 1, 2])
    update = np.zeros((6, 5), dtype=np.longdouble)
    update[rows.numpy(), columns.numpy()] = exact(values)
    for indices in (torch.stack([rows, columns]).int(), (rows * 5 + columns).int()):
        parts = {"values": values, "indices": Leaf.of("indices", indices)}
        delta = Chained("places", parts)
        laws(delta, numbers(18, 6, 5), lambda w: w + update)
        made = seeded.settled({"x": delta}, {"x": (6, 5)})["x"]
        assert isinstance(made, Sparse)
        laws(made, numbers(18, 6, 5), lambda w: w + update)


def test_places_outside_the_base_are_refused():
    at = Leaf.of("indices", torch.tensor([[0, 6], [0, 0]]))
    delta = Chained("places", {"values": leaf(17, 2), "indices": at})
    refused("malformed", kinds.apply, delta, torch.zeros(6, 5, dtype=torch.float64), 0)


def test_more_coefficients_than_numbers_do_not_fit():
    delta = Chained("fourier", {"spectrum": SPECTRUM}, 1.0, {"seed": 0})
    assert kinds.fits(delta, (2, 4)) == "adapter has 9 coefficients, base is (2, 4)"
    assert kinds.fits(delta, (3, 3)) is None
    assert kinds.fits(delta, (3, 3, 1)) is not None
    assert seeded.settled({"x": delta}, {"x": (2, 4)})["x"] is delta
