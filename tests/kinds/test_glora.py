"""LyCORIS's GLoRA and T-LoRA against their formulas in long floats."""

import numpy as np
import pytest
import torch

from loratools import algebra, kinds
from loratools.adapter import Chained
from loratools.kinds import chained, glora, tlora
from loratools.rewriting import permute, rows
from tests.kinds.laws import exact, held, laws, leaf, numbers
from tests.refusing import refused

R, IN, OUT = 2, 5, 7
NEW = {"a1": (IN, R), "a2": (R, IN), "b1": (OUT, R), "b2": (R, IN)}
OLD = {"a1": (R, IN), "a2": (IN, R), "b1": (R, IN), "b2": (OUT, R)}


def made(shapes, age, scaling=0.5):
    parts = {name: leaf(i, *shape) for i, (name, shape) in enumerate(shapes.items(), 70)}
    return Chained(glora.NAME, parts, scaling, {"age": age})


def formula(delta):
    a1, a2, b1, b2 = (part.reshape(part.shape[0], -1) for part in map(exact, glora.ordered(delta)))
    if "bm" in delta.parts:
        b2 = np.einsum("mn...,ni->mi...", exact(delta.parts["bm"]), b2).reshape(len(b2), -1)

    def changed(w):
        chained = np.einsum("oi...,ij->oj...", w, a1 @ a2)
        return w + np.longdouble(delta.scaling) * (chained + (b1 @ b2).reshape(w.shape))

    return changed


@pytest.mark.parametrize(("shapes", "age"), [(NEW, "new"), (OLD, "old")])
def test_of_a_matrix(shapes, age):
    delta = made(shapes, age)
    assert kinds.shape(delta) == (OUT, IN)
    laws(delta, numbers(80, OUT, IN), formula(delta))


def test_the_two_ages_are_each_other_s_with_the_parts_swapped():
    new = made(NEW, "new")
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    old = Chained(glora.NAME, {k: new.parts[v] for k, v in swapped.items()}, 0.5, {"age": "old"})
    w0 = torch.from_numpy(numbers(81, OUT, IN))
    assert torch.equal(algebra.materialise(new, w0), algebra.materialise(old, w0))


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 1)])
def test_of_a_convolution(kernel, core):
    ones = (1,) * len(kernel)
    shapes = {name: (*shape, *ones) for name, shape in NEW.items()}
    if core:
        shapes["bm"] = (R, R, *kernel)
    else:
        shapes["b2"] = (*NEW["b2"], *kernel)
    delta = made(shapes, "new")
    assert kinds.shape(delta) == (OUT, IN, *kernel)
    laws(delta, numbers(82, OUT, IN, *kernel), formula(delta))
    assert "no matrix" in refused("usage", kinds.transposed, delta)


@pytest.mark.parametrize(("shapes", "age"), [(NEW, "new"), (OLD, "old")])
def test_some_rows_of_it_change_those_rows(shapes, age):
    delta = made(shapes, age)
    w0 = torch.from_numpy(numbers(83, OUT, IN))
    whole = algebra.materialise(delta, w0)
    part = algebra.materialise(rows(delta, 2, 5), w0[2:5])
    order = [3, 0, 6, 1, 2, 5, 4]
    torch.testing.assert_close(part, whole[2:5])
    mixed = algebra.materialise(permute(delta, order), w0[order])
    torch.testing.assert_close(mixed, whole[order])
    assert "mixes rows" in refused("usage", rows, kinds.transposed(delta), 0, 2)


@pytest.mark.parametrize("kernel", [(), (3, 2)])
def test_given_the_weight_it_has_factors(kernel):
    shapes = {n: (*shape, *(1 for _ in kernel)) for n, shape in NEW.items()}
    delta = made(shapes | {"b2": (*NEW["b2"], *kernel)}, "new")
    w0 = torch.from_numpy(numbers(84, OUT, IN, *kernel))
    pair = chained.given(delta, w0.reshape(OUT, -1))
    assert pair.rank == R * (1 + int(np.prod(kernel)))
    dense = algebra.materialise(delta, w0).reshape(OUT, -1)
    assert float((algebra.materialise(pair) - dense).abs().max()) < 1e-12


def test_what_it_fits():
    delta = made(NEW, "new")
    assert kinds.fits(delta, (OUT, IN)) is None
    assert kinds.fits(delta, (OUT, IN, 1, 1)) is None
    assert kinds.fits(delta, (IN, OUT)) == f"adapter is {(OUT, IN)}, base is {(IN, OUT)}"
    assert kinds.fits(kinds.transposed(delta), (IN, OUT)) is None


@pytest.mark.parametrize("start", tlora.STARTS)
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_tlora_is_the_change_of_what_it_was_started_from(shape, start):
    w0 = numbers(90, *shape)
    u, s, v = np.linalg.svd(w0, full_matrices=False)
    at = {"principal": slice(0, 2), "last": slice(len(s) - 2, len(s)), "middle": None}[start]
    at = slice((len(s) - 2) // 2, (len(s) - 2) // 2 + 2) if at is None else at
    parts = {"q": leaf(91, 2, shape[1]), "p": leaf(92, shape[0], 2), "lambda": leaf(93, 1, 2)}
    delta = Chained(tlora.NAME, parts, 1.5, {"start": start})
    q, p, lam = map(exact, parts.values())
    begun = (u[:, at] * s[at]) @ v[at]
    laws(delta, w0, lambda w: w + np.longdouble(1.5) * ((p * lam[0]) @ q - begun))


def test_tlora_that_was_not_trained_changes_nothing():
    w0 = numbers(94, 5, 4)
    u, s, v = np.linalg.svd(w0, full_matrices=False)
    parts = {"q": held(v[:2]), "p": held(u[:, :2]), "lambda": held(s[None, :2])}
    delta = Chained(tlora.NAME, parts, 2.0)
    assert float(algebra.materialise(delta, torch.from_numpy(w0)).abs().max()) < 1e-13
