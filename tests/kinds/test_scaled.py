"""Scaled weights and updates that need their weight's sizes, against their formulas."""

import numpy as np
import pytest
import torch

from loratools import algebra, kinds
from loratools.adapter import Chained, Dense, LowRank, Replace, Scaled
from loratools.kinds import sized
from tests.kinds.laws import close, exact, laws, leaf, numbers
from tests.refusing import refused


def pair(seed, out, inner, rank=2, scaling=1.0):
    return LowRank(leaf(seed, rank, inner), leaf(seed + 1, out, rank), scaling)


# ------------------------------------------------------------------------------- scaled


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rows_columns_and_elements(offset):
    w0 = numbers(1, 6, 5)
    rows, columns, low = leaf(2, 6, 1), leaf(3, 1, 5), pair(4, 6, 5, scaling=0.5)
    laws(Scaled("rows", rows, offset), w0, lambda w: w * (offset + exact(rows)))
    laws(Scaled("columns", columns, offset), w0, lambda w: w * (offset + exact(columns)))
    laws(
        Scaled("elements", low, offset),
        w0,
        lambda w: w * (offset + 0.5 * exact(low.b) @ exact(low.a)),
    )


def test_columns_of_a_convolution_are_its_input_channels():
    factor = leaf(1, 1, 4, 1, 1)
    laws(Scaled("columns", factor), numbers(2, 6, 4, 3, 2), lambda w: w * exact(factor))


def test_a_vector_is_scaled_like_rows():
    factor, bias = leaf(1, 7), torch.from_numpy(numbers(2, 7, 1))
    close(algebra.apply(Scaled("rows", factor), bias), exact(factor)[:, None] * bias.numpy())


@pytest.mark.parametrize(
    ("delta", "good", "bad"),
    [
        (Scaled("rows", leaf(1, 6)), (6, 5), (5, 6)),
        (Scaled("columns", leaf(1, 5)), (6, 5, 3, 3), (5, 6)),
        (Scaled("elements", pair(1, 6, 5)), (6, 5), (6, 6)),
    ],
)
def test_what_does_not_fit_is_told(delta, good, bad):
    assert kinds.fits(delta, good) is None
    assert "base is" in kinds.fits(delta, bad)


def test_elements_are_scaled_by_factors_only():
    delta = Scaled("elements", Dense(leaf(1, 2, 2)))
    refused("usage", algebra.apply, delta, torch.zeros(2, 2, dtype=torch.float64))
    refused("usage", kinds.transposed, delta)


# ------------------------------------------------------------------------------- sized


def settled(delta, shape, key="a.weight"):
    return sized.settled({key: delta}, {key: shape}.get)[key]


@pytest.mark.parametrize("width", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("each", [6, 3])
def test_miss_is_a_lora_of_its_block(width, each):
    if width < 2:
        return
    delta = Chained("miss", {"block": leaf(1, 2, each)}, 1.0, {"mini": each < 6})
    block = exact(delta.parts["block"])

    def formula(w):
        rows, columns = np.indices(w.shape)
        return w + block[columns % 2, rows % each]

    laws(delta, numbers(2, 6, width), formula)
    plain = settled(delta, (6, width))
    assert isinstance(plain, LowRank)
    laws(plain, numbers(2, 6, width), formula, turns=False)


def test_bat_multiplies_blocks_of_the_weight():
    block = leaf(1, 3, 2, 2)

    def formula(w):
        out = w.copy()
        for o in range(3):
            for i in range(4):
                part = w[2 * o : 2 * o + 2, 2 * i : 2 * i + 2]
                out[2 * o : 2 * o + 2, 2 * i : 2 * i + 2] += (
                    part @ exact(block)[o] + exact(block)[o]
                )
        return out

    laws(Chained("miss bat", {"block": block}), numbers(2, 6, 8), formula)


@pytest.mark.parametrize(
    ("delta", "good", "bad"),
    [
        (Chained("miss", {"block": leaf(1, 2, 6)}), (6, 5), [(5, 6), (12, 5), (6, 1), (6, 5, 1)]),
        (
            Chained("miss", {"block": leaf(1, 2, 3)}, 1.0, {"mini": True}),
            (6, 5),
            [(5, 6), (6, 1)],
        ),
        (Chained("miss bat", {"block": leaf(1, 3, 2, 2)}), (6, 8), [(6, 7), (8, 8)]),
        (Chained("vera", {"lambda_b": leaf(1, 6), "lambda_d": leaf(2, 2)}), (6, 5), [(5, 6)]),
    ],
)
def test_a_weight_of_another_size_is_told(delta, good, bad):
    assert kinds.fits(delta, good) is None
    for shape in bad:
        assert "base is" in kinds.fits(delta, shape)


def vera(rank=2, out=6, **more):
    parts = {"lambda_b": leaf(1, out), "lambda_d": leaf(2, rank), **more}
    return Chained("vera", parts, 1.0, {"rank": rank, "rows": rank, "seed": 11})


def test_vera_slices_what_all_layers_share():
    delta = vera(A=leaf(3, 2, 9), B=leaf(4, 8, 2))
    b, d = (exact(delta.parts[f"lambda_{x}"]) for x in "bd")
    a, up = exact(delta.parts["A"])[:, :5], exact(delta.parts["B"])[:6]
    plain = settled(delta, (6, 5))
    laws(plain, numbers(5, 6, 5), lambda w: w + b[:, None] * (up @ (d[:, None] * a)), turns=False)
    assert settled(delta, (6, 10)) is delta or not isinstance(settled(delta, (6, 10)), LowRank)


def test_seeded_projections_are_as_large_as_the_largest_layer():
    deltas = {"a.weight": vera(), "b.weight": vera(out=8)}
    shapes = {"a.weight": (6, 9), "b.weight": (8, 5)}
    plain = sized.settled(deltas, shapes.get)
    source = torch.Generator().manual_seed(11)
    a = torch.nn.init.kaiming_uniform_(torch.empty(2, 9), generator=source).double()
    b = torch.nn.init.kaiming_uniform_(torch.empty(8, 2), generator=source).double()
    for key, (out, inner) in shapes.items():
        lam = [deltas[key].parts[f"lambda_{x}"].tensor().double() for x in "bd"]
        wanted = (lam[0][:, None] * b[:out]) @ (lam[1][:, None] * a[:, :inner])
        assert torch.equal(algebra.materialise(plain[key]), wanted)


def test_projections_need_every_layer_of_theirs():
    deltas = {"a.weight": vera(), "b.weight": vera(out=8)}
    left = sized.settled(deltas, {"a.weight": (6, 9)}.get)
    assert not any(isinstance(d, LowRank) for d in left.values())
    refused("needs_base", algebra.apply, deltas["a.weight"], torch.zeros(6, 9).double())


def test_what_stands_upon_a_replaced_weight_is_settled_too():
    delta = Replace(leaf(1, 6, 5), then=Chained("miss", {"block": leaf(2, 2, 6)}))
    assert isinstance(settled(delta, (6, 5)).then, LowRank)


def test_a_factor_of_all_channels_is_one_by_elements_on_groups():
    factor = leaf(1, 1, 8, 1, 1)
    plain = settled(Scaled("columns", factor, 1.0), (6, 4, 3, 2))
    flat = exact(factor).reshape(2, 4)

    def formula(w):
        by = np.repeat(flat, 3, 0)[:, :, None, None]
        return w * (1 + by)

    laws(plain, numbers(2, 6, 4, 3, 2), formula)
    assert kinds.fits(plain, (6, 4, 3, 2)) is None


def test_what_needs_no_size_stays_what_it_is():
    deltas = {"a.weight": pair(1, 6, 5), "b.weight": Scaled("rows", leaf(2, 6))}
    assert sized.settled(deltas, {}.get) is deltas
