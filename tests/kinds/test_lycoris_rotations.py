"""LyCORIS's and kohya's rotations of rows against their formulas in long floats."""

import numpy as np
import pytest

from loratools import kinds
from loratools.adapter import Rotated
from loratools.kinds import lycoris_rotations as forms
from tests.kinds.laws import exact, held, inverse, laws, leaf, numbers


def cayley(block):
    """(I + Q)(I - Q)⁻¹."""
    eye = np.eye(len(block), dtype=np.longdouble)
    return (eye + block) @ inverse(eye - block)


def skewed(blocks):
    return blocks - np.swapaxes(blocks, -1, -2)


def bounded(q, limit):
    """As LyCORIS bounds it: over all blocks together, not at all at 0."""
    norm = np.sqrt((q * q).sum()) + np.longdouble(1e-8)
    return q * (limit / norm) if 0 < limit < norm else q


def diagonal(q):
    """Row j of a block becomes Σ_n R[n, j]·row n."""
    size = q.shape[-1]
    whole = np.zeros((len(q) * size, len(q) * size), dtype=np.longdouble)
    for i, block in enumerate(q):
        at = slice(i * size, (i + 1) * size)
        whole[at, at] = cayley(block).T
    return whole


def butterfly(q):
    """Stage i turns rows that lie 2^i·b/2 apart, two of such groups in turn."""
    stages, count, size, _ = q.shape
    extent = count * size
    whole = np.eye(extent, dtype=np.longdouble)
    for stage in range(stages):
        apart = (size // 2) * 2**stage
        order = []
        for chunk in range(0, extent, 2 * apart):
            order += [chunk + g * apart + k for k in range(apart) for g in range(2)]
        turn = np.zeros((extent, extent), dtype=np.longdouble)
        for i in range(count):
            at = order[i * size : (i + 1) * size]
            turn[np.ix_(at, at)] = cayley(q[stage, i])
        whole = turn @ whole
    return whole


def made(method, shape, alpha, rescale=False, seed=100):
    parts = {"oft_blocks": leaf(seed, *shape, size=0.4)}
    if rescale:
        rows = shape[-3] * shape[-1]
        parts["rescale"] = leaf(seed + 1, rows, 1)
    return Rotated(method, "out", parts, {"alpha": alpha})


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.03, 5.0])
@pytest.mark.parametrize("shape", [(3, 2, 2), (2, 4, 4), (1, 5, 5), (4, 1, 1)])
def test_diagonal(shape, alpha, rescale):
    delta = made(forms.DIAGONAL, shape, alpha, rescale)
    rows = shape[0] * shape[1]
    r = diagonal(bounded(skewed(exact(delta.parts["oft_blocks"])), (alpha or 0) * rows))
    r = exact(delta.parts["rescale"]) * r if rescale else r
    laws(delta, numbers(5, rows, 3), lambda w: r @ w)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.02])
@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 2, 4, 4), (3, 4, 2, 2), (2, 4, 2, 2)])
def test_butterfly(shape, alpha, rescale):
    delta = made(forms.BUTTERFLY, shape, alpha, rescale)
    rows = shape[1] * shape[2]
    r = butterfly(bounded(skewed(exact(delta.parts["oft_blocks"])), (alpha or 0) * rows))
    r = exact(delta.parts["rescale"]) * r if rescale else r
    laws(delta, numbers(6, rows, 3), lambda w: r @ w)


def test_a_kernel_belongs_to_the_columns():
    delta = made(forms.DIAGONAL, (2, 3, 3), 0.0)
    r = diagonal(skewed(exact(delta.parts["oft_blocks"])))
    laws(delta, numbers(7, 6, 2, 3, 3), lambda w: np.einsum("po,o...->p...", r, w))


@pytest.mark.parametrize("alpha", [0.0, 0.01, 3.0])
def test_kohya_bounds_at_zero_too(alpha):
    delta = made(forms.KOHYA, (2, 3, 3), alpha)
    q = skewed(exact(delta.parts["oft_blocks"]))
    norm = np.sqrt((q * q).sum())
    tiny = np.longdouble(1e-8)
    r = diagonal(q * ((min(norm, np.longdouble(alpha * 6)) + tiny) / (norm + tiny)))
    laws(delta, numbers(8, 6, 4), lambda w: r @ w)
    if alpha == 0:
        assert np.abs(r - np.eye(6)).max() < 1e-7


def test_kohya_in_parts_of_rows():
    """Flux's fused weights: q, k, v and mlp each with blocks of their own (oft_flux.py)."""
    sizes, alpha = (2, 2, 2, 4), 0.05
    parts = {f"oft_blocks.{i}": leaf(110 + i, 3, size, size) for i, size in enumerate(sizes)}
    delta = Rotated(forms.KOHYA, "out", parts, {"alpha": alpha})
    rows = 3 * sum(sizes)
    whole = np.zeros((rows, rows), dtype=np.longdouble)
    at = 0
    for part, size in zip(parts.values(), sizes, strict=True):
        q = skewed(exact(part))
        norm, limit = np.sqrt((q * q).sum()), np.longdouble(alpha) * 3 * size
        turn = diagonal(q * ((min(norm, limit) + 1e-8) / (norm + 1e-8)))
        whole[at : at + 3 * size, at : at + 3 * size] = turn
        at += 3 * size
    assert kinds.block(delta) == 0
    laws(delta, numbers(9, rows, 3), lambda w: whole @ w, turns=True)


def test_what_they_fit():
    delta = made(forms.DIAGONAL, (2, 3, 3), 0.0)
    assert kinds.fits(delta, (6, 9)) is None
    assert kinds.fits(delta, (6, 4, 3, 3)) is None
    assert kinds.fits(delta, (9, 6)) == "adapter rotates 6 rows, base is (9, 6)"
    assert kinds.fits(kinds.transposed(delta), (9, 6)) is None
    still = Rotated(forms.DIAGONAL, "out", {"oft_blocks": held(np.zeros((2, 3, 3)))}, {})
    laws(still, numbers(3, 6, 2), lambda w: w)
