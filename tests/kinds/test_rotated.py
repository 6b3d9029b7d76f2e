"""Rotations against their papers' formulas in long floats, and PEFT's own butterfly."""

import numpy as np
import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.oft.layer import OFTRotationModule

from loratools import kinds
from loratools.adapter import Leaf, Rotated
from loratools.kinds import rotated
from tests.kinds.laws import close, exact, held, inverse, laws, leaf, numbers
from tests.refusing import refused


def skew(vector, size):
    q = np.zeros((size, size), dtype=np.longdouble)
    q[np.triu_indices(size, 1)] = vector
    return q - q.T


def diagonal(blocks):
    size = sum(len(b) for b in blocks)
    whole, at = np.zeros((size, size), dtype=np.longdouble), 0
    for block in blocks:
        whole[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return whole


def cayley(q):
    eye = np.eye(len(q), dtype=np.longdouble)
    return (eye - q) @ inverse(eye + q)


VECTORS = leaf(1, 2, 3, size=0.3)  # two blocks of 3


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("turned", [False, True])
def test_oft_of_exact_blocks(side, turned):
    settings = {"size": 3, "share": False, **({"turned": True} if turned else {})}
    r = diagonal([cayley(skew(v, 3)) for v in exact(VECTORS)])
    r = r.T if turned else r
    delta = Rotated("oft", side, {"vectors": VECTORS}, settings)
    if side == "in":
        laws(delta, numbers(2, 4, 6), lambda w: w @ r.T)
    else:
        laws(delta, numbers(2, 6, 4), lambda w: r @ w)


def test_oft_on_a_convolution_takes_its_kernel_as_columns():
    r = diagonal([cayley(skew(v, 3)) for v in exact(VECTORS)])
    delta = Rotated("oft", "in", {"vectors": VECTORS}, {"size": 3, "share": False})
    laws(delta, numbers(3, 4, 3, 2), lambda w: w.reshape(4, 6) @ r.T)


def test_oft_of_one_block_for_all():
    one = leaf(4, 1, 3, size=0.3)
    r = diagonal([cayley(skew(exact(one)[0], 3))] * 4)
    delta = Rotated("oft", "in", {"vectors": one}, {"size": 3, "share": True})
    assert kinds.fits(delta, (5, 12)) is None
    assert kinds.fits(delta, (5, 11)) is not None
    laws(delta, numbers(5, 5, 12), lambda w: w @ r.T)


@pytest.mark.parametrize("terms", range(1, 9))
def test_neumann_terms_are_pefts(terms):
    q = torch.from_numpy(numbers(6, 2, 4, 4))
    q = q - q.transpose(1, 2)
    module = OFTRotationModule(2, 6, 4, 8, num_cayley_neumann_terms=terms)
    rows, columns = torch.triu_indices(4, 4, 1)
    wanted = module._cayley_batch(q[:, rows, columns], 4, True, terms)
    torch.testing.assert_close(rotated.neumann(q, terms), wanted, rtol=1e-13, atol=1e-13)


def test_neumann_terms_before_0_18_count_the_last_power_twice():
    # peft 0.17.1:tuners/oft/layer.py, by hand.
    q = torch.from_numpy(numbers(6, 1, 3, 3))
    q = q - q.transpose(1, 2)
    eye = torch.eye(3, dtype=torch.float64)
    wanted = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + 2 * q @ q @ q @ q
    torch.testing.assert_close(rotated.neumann(q, 5, old=True), wanted)
    torch.testing.assert_close(rotated.neumann(q, 3, old=True), eye + 2 * q + 2 * q @ q)


def test_neumann_goes_the_other_way_round_than_cayley():
    q = torch.from_numpy(0.01 * numbers(7, 1, 3, 3))
    q = q - q.transpose(1, 2)
    torch.testing.assert_close(
        rotated.neumann(q, 9), rotated.cayley(q).transpose(1, 2), rtol=1e-9, atol=1e-9
    )


def test_constrained_oft_clips_each_block():
    eps = 0.2
    bound = np.longdouble(eps) / np.sqrt(np.longdouble(2))
    blocks = []
    for vector in exact(VECTORS):
        q = skew(vector, 3)
        norm = np.sqrt((q * q).sum())
        blocks.append(cayley(q if norm <= bound else q * (bound / norm)))
    r = diagonal(blocks)
    settings = {"size": 3, "share": False, "eps": eps}
    delta = Rotated("oft", "in", {"vectors": VECTORS}, settings)
    laws(delta, numbers(8, 4, 6), lambda w: w @ r.T)


# ------------------------------------------------------------------------------- BOFT


def boft(blocks, extent):
    """The product of the stages as PEFT builds it, by its own permutation."""
    stages, count, size, _ = blocks.shape
    layer = object.__new__(BOFTLayer)
    whole = np.eye(extent, dtype=np.longdouble)
    for stage in range(stages):
        order = layer.block_butterfly_perm(extent, count // 2**stage, size // 2, stages - 1)
        p = np.eye(extent, dtype=np.longdouble)[order.numpy()]
        turns = [cayley((b - b.T) / 2) for b in blocks[stage]]
        whole = p @ diagonal(turns) @ p.T @ whole
    return whole


@pytest.mark.parametrize(("stages", "count", "size"), [(1, 3, 4), (2, 4, 2), (3, 4, 4), (2, 2, 6)])
def test_boft_of_any_stages(stages, count, size):
    extent = count * size
    blocks, scale = leaf(9, stages, count, size, size), leaf(10, 5)
    r, s = boft(exact(blocks), extent), exact(scale)
    delta = Rotated("boft", "in", {"blocks": blocks, "scale": scale})
    laws(delta, numbers(11, 5, extent), lambda w: (w @ r.T) * s[:, None])


def test_a_butterfly_of_rows_wants_them_all():
    blocks = leaf(9, 2, 4, 2, 2)
    assert kinds.block(Rotated("boft", "out", {"blocks": blocks})) == 0
    assert kinds.block(Rotated("boft", "in", {"blocks": blocks})) == 1


# ------------------------------------------------------------------------------- HRA


def reflections(u, orthogonal):
    whole = np.eye(len(u), dtype=np.longdouble)
    done = []
    for i in range(u.shape[1]):
        v = u[:, i]
        for w in done if orthogonal else ():
            v = v - (w @ v) * w
        v = v / np.sqrt(v @ v)
        done.append(v)
        whole = whole @ (np.eye(len(u), dtype=np.longdouble) - 2 * np.outer(v, v))
    return whole


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("side", ["in", "out"])
def test_hra_and_its_exact_factors(orthogonal, side):
    u = leaf(12, 6, 3)
    m = reflections(exact(u), orthogonal)
    delta = Rotated("householder", side, {"u": u}, {"orthogonal": orthogonal})
    w0 = numbers(13, 4, 6) if side == "in" else numbers(13, 6, 4)
    formula = (lambda w: w @ m) if side == "in" else (lambda w: m.T @ w)
    laws(delta, w0, formula)
    for one in (delta, kinds.ready(delta)):
        low = rotated.given(one, torch.from_numpy(w0))
        assert low.rank == 3
        close(low.b.tensor() @ low.a.tensor(), formula(w0.astype(np.longdouble)) - w0)


def test_hras_exact_factors_on_a_convolution():
    u = leaf(14, 18, 2)
    m = reflections(exact(u), False)
    w0 = numbers(15, 4, 18)
    low = rotated.given(Rotated("householder", "in", {"u": u}), torch.from_numpy(w0))
    assert (low.a.shape, low.b.shape) == ((2, 18), (4, 2))
    close(low.b.tensor() @ low.a.tensor(), w0 @ m - w0)


def test_blocks_have_no_exact_factors():
    delta = Rotated("oft", "in", {"vectors": VECTORS}, {"size": 3, "share": False})
    assert rotated.given(delta, torch.zeros(4, 6)) is None


# ------------------------------------------------------------------------------- RoAd


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_turns_pairs_of_rows(variant):
    rows, group = 8, 4
    per_row = {"road_1": 0.5, "road_2": 1, "road_4": 2}[variant]
    theta, alpha = leaf(16, int(rows * per_row)), leaf(17, int(rows * per_row))
    t, a = exact(theta), exact(alpha)
    r = np.zeros((rows, rows), dtype=np.longdouble)
    for g in range(rows // group):
        for i in range(group):
            row, half = g * group + i, group // 2
            other = row + half if i < half else row - half
            sign = -1 if i < half else 1
            match variant:
                case "road_1":
                    near = far = g * half + i % half
                case "road_2":
                    near = far = row
                case _:
                    near, far = 2 * g * group + i, (2 * g + 1) * group + i
            r[row, row] = a[near] * np.cos(t[near])
            r[row, other] = sign * a[far] * np.sin(t[far])
    delta = Rotated(
        "road", "out", {"theta": theta, "alpha": alpha}, {"variant": variant, "group": group}
    )
    laws(delta, numbers(18, rows, 3), lambda w: r @ w)
    assert kinds.block(delta) == group
    assert kinds.fits(delta, (rows,)) is None, "its bias too"


# ------------------------------------------------------------------------------- all


def test_a_rotation_says_which_side_does_not_fit():
    delta = Rotated("householder", "in", {"u": leaf(19, 6, 2)})
    assert kinds.fits(delta, (4, 6)) is None
    assert kinds.fits(delta, (4, 2, 3, 1)) is None
    assert kinds.fits(delta, (6, 4)) == "adapter rotates 6 columns, base is (6, 4)"
    scaled = Rotated("boft", "in", {"blocks": leaf(9, 1, 3, 2, 2), "scale": leaf(10, 5)})
    assert kinds.fits(scaled, (5, 6)) is None
    assert kinds.fits(scaled, (4, 6)) == "adapter scales 5 rows, base is (4, 6)"


def test_pefts_oft_of_a_large_kernel_is_none_of_its_weight():
    delta = Rotated("oft", "in", {"vectors": VECTORS}, {"size": 3, "share": False, "flat": True})
    assert kinds.fits(delta, (4, 6, 1, 1)) is None
    assert "no weight of that shape" in kinds.fits(delta, (4, 1, 3, 2))


def test_an_unknown_rotation_is_refused():
    refused("unknown_type", kinds.ready, Rotated("spun", "in", {"u": leaf(1, 2)}))


def test_held_parts_of_any_float_are_widened():
    half = Leaf.of("u", torch.from_numpy(numbers(20, 6, 2)).bfloat16())
    m = reflections(exact(half), False)
    laws(Rotated("householder", "in", {"u": half}), numbers(21, 3, 6), lambda w: w @ m)
    assert held(np.zeros(2)).dtype == "F64"
