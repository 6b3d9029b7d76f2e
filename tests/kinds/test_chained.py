"""Sums over W0 against their formulas in long floats; what they say of weights that do not fit."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional

from loratools import kinds
from loratools.adapter import Chained
from loratools.kinds import chained, seeded
from tests.kinds.laws import close, exact, held, inverse, laws, leaf, numbers
from tests.refusing import refused

# ------------------------------------------------------------------------------- GLoRA of PEFT


def paths(*names, rank=2, shape=(6, 5)):
    """Paths by their forms: "A.lora", "B.vector", "D.number"."""
    parts = {}
    for i, name in enumerate(names):
        path, _, form = name.partition(".")
        out, inner = (shape[1], 1) if path == "C" else shape
        match form:
            case "lora":
                parts[f"{path}.Xd"] = leaf(2 * i, out, rank)
                parts[f"{path}.Xu"] = leaf(2 * i + 1, rank, inner)
            case "vector":
                parts[f"{path}.X"] = leaf(2 * i, *((out,) if path in "DE" else (out, 1)))
            case _:
                parts[f"{path}.X"] = leaf(2 * i, 1)
    return parts


def value(parts, path):
    if f"{path}.Xd" in parts:
        return exact(parts[f"{path}.Xd"]) @ exact(parts[f"{path}.Xu"])
    if f"{path}.X" not in parts:
        return np.longdouble(0)
    found = exact(parts[f"{path}.X"])
    return found[0] if found.size == 1 else found.reshape(-1, 1)


@pytest.mark.parametrize("a", ["A.lora", "A.vector", "A.number", None])
@pytest.mark.parametrize("b", ["B.lora", "B.vector", "B.number", None])
def test_glora_of_peft(a, b):
    parts = paths(*(x for x in (a, b) if x))
    delta = Chained("glora of peft", parts)
    laws(
        delta,
        numbers(1, 6, 5),
        lambda w: w + w * value(parts, "A") + value(parts, "B"),
    )
    assert kinds.fits(delta, (6, 5)) is None
    if a in ("A.lora", "A.vector"):
        assert kinds.fits(delta, (7, 5)) is not None
    if a == "A.lora":
        assert kinds.fits(delta, (6, 4)) is not None


@pytest.mark.parametrize("c", ["C.lora", "C.vector"])
@pytest.mark.parametrize("form", ["vector", "number"])
def test_gloras_bias_takes_the_weight_in(c, form):
    parts = paths(f"D.{form}", f"E.{form}", c)
    weight = numbers(2, 6, 5)
    delta = Chained("glora bias of peft", parts, 1.0, {"of": "m.weight"})
    refused("needs_base", kinds.apply, delta, torch.zeros(6, 1, dtype=torch.float64), 0)
    made = seeded.settled({"m.bias": delta}, {"m.bias": (6,)}, {"m.weight": held(weight)}.get)[
        "m.bias"
    ]
    wanted = value(parts, "E") + weight.astype(np.longdouble) @ value(parts, "C").reshape(5, 1)
    laws(
        made, numbers(3, 6), lambda b: b.reshape(6, 1) * (1 + value(parts, "D")) + wanted,
    )  # fmt: skip


def test_gloras_bias_alone():
    parts = paths("D.vector", "E.number")
    delta = Chained("glora bias of peft", parts)
    laws(
        delta,
        numbers(3, 6),
        lambda b: b.reshape(6, 1) * (1 + value(parts, "D")) + value(parts, "E"),
    )
    assert kinds.fits(delta, (7,)) is not None


# ------------------------------------------------------------------------------- subspaces


def gram_schmidt(p):
    columns = []
    for column in p.T:
        for _ in range(2):
            for q in columns:
                column = column - (q @ column) * q
        columns.append(column / np.sqrt(column @ column))
    return np.stack(columns, 1)


@pytest.mark.parametrize("how", ["relu", "qr"])
@pytest.mark.parametrize("para", [False, True])
def test_deft_and_its_exact_factors(how, para):
    p = leaf(4, 6, 3)
    parts = {"P": p} if para else {"P": p, "R": leaf(5, 3, 5)}
    values = exact(p)
    if how == "relu":
        q, right = values, np.maximum(values, 0)
    else:
        q = gram_schmidt(values)
        # LAPACK's columns may be turned; what is put in turns with them.
        q = q * np.sign(np.sum(q * np.linalg.qr(p.tensor().double().numpy())[0], 0))
        right = q
    r = 0 if para else np.longdouble(1.5) * exact(parts["R"])
    delta = Chained("deft", parts, 1.5, {"decomposition": how})
    w0 = numbers(6, 6, 5)

    def formula(w):
        return w - q @ right.T @ w + (q @ r if not para else 0)

    laws(delta, w0, formula)
    low = chained.given(delta, torch.from_numpy(w0))
    assert low.rank == 3
    close(low.b.tensor() @ low.a.tensor(), formula(w0.astype(np.longdouble)) - w0)
    assert kinds.fits(delta, (6, 5)) is None
    assert kinds.fits(delta, (7, 5)) is not None


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (5, 5)])
def test_osf_replaces_what_is_behind(shape):
    kept = 2
    u, s, v = leaf(7, shape[0], 5 - kept), leaf(8, 5 - kept), leaf(9, 5 - kept, shape[1])
    delta = Chained("osf", {"U_low": u, "S_low": s, "V_low": v})
    w0 = numbers(10, *shape)
    left, middle, right = np.linalg.svd(w0, full_matrices=False)
    ahead = (left[:, :kept] * middle[:kept]) @ right[:kept]
    laws(delta, w0, lambda w: ahead + (exact(u) * exact(s)) @ exact(v))
    assert kinds.fits(delta, shape) is None
    assert kinds.fits(delta, (shape[0], 7)) is not None
    low = chained.given(delta, torch.from_numpy(w0))
    assert low.rank == 2 * (5 - kept)


def test_frod_is_the_weight_itself_in_its_own_terms():
    size = 5
    v, lengths, values = leaf(11, size, size), leaf(12, size), leaf(13, 3)
    at = torch.tensor([[0, 3, 0], [2, 1, 2]])
    indices = held(at.numpy(), "indices")
    parts = {"V": v, "lambda": lengths, "values": values, "indices": indices}
    delta = Chained("frod", parts)
    middle = np.diag(exact(lengths))
    for value_, row, column in zip(exact(values), *at.numpy(), strict=True):
        middle[row, column] += value_

    def formula(w):
        u = w @ inverse(exact(v)).T
        return (u / np.sqrt((u * u).sum(0))) @ middle @ exact(v).T

    laws(delta, numbers(14, 6, size), formula)
    assert kinds.fits(delta, (6, 4)) is not None
    assert chained.given(delta, torch.zeros(6, size)) is None


@pytest.mark.parametrize("act", ["relu", "gelu", "silu", "tanh", "sigmoid", "linear"])
def test_peanut_is_a_function_of_columns(act):
    from transformers.activations import ACT2FN

    a, b = leaf(15, 3, 6), leaf(16, 6, 3)
    inner = {f"{side}.0": leaf(17 + i, 3, 3) for i, side in enumerate(("encoders", "decoders"))}
    delta = Chained("peanut", {"A": a, "B": b, **inner}, 0.5, {"act": act, "depth": 1})
    apply = ACT2FN[act]
    w0 = torch.from_numpy(numbers(19, 6, 5))
    first = apply(functional.linear(w0.T, a.tensor().double()))
    hidden = apply(functional.linear(first, inner["encoders.0"].tensor().double()))
    hidden = apply(functional.linear(hidden, inner["decoders.0"].tensor().double())) + first
    wanted = w0 + 0.5 * functional.linear(hidden, b.tensor().double()).T
    laws(delta, w0.numpy(), lambda w: wanted.numpy())
    low = chained.given(delta, w0)
    assert low.rank == 3
    close(low.b.tensor() @ low.a.tensor(), (wanted - w0).numpy())


@pytest.mark.parametrize("start", ["psoft_init", "pissa_init"])
@pytest.mark.parametrize("free", [False, True])
def test_psoft_turns_the_leading_directions(start, free):
    size = 3
    r = leaf(20, size, size) if free else leaf(20, 3)
    parts = {"R": r, "vector_a": leaf(21, size), "vector_b": leaf(22, size)}
    settings = {"r": size, "free": free, "start": start, "svd": "full"}
    delta = Chained("psoft", parts, 1.0, settings)
    w0 = numbers(23, 6, 5).astype(np.float32).astype(np.float64)
    left, middle, right = (
        t.double().numpy()
        for t in torch.linalg.svd(torch.from_numpy(w0).float(), full_matrices=False)
    )
    m = exact(r)
    if not free:
        q = np.zeros((size, size), dtype=np.longdouble)
        q[np.triu_indices(size, 1)] = m
        q = q - q.T
        eye = np.eye(size, dtype=np.longdouble)
        m = (eye + q) @ inverse(eye - q)
    m = exact(parts["vector_b"])[:, None] * m * exact(parts["vector_a"])
    m = m - np.eye(size)
    u, s, v = left[:, :size], middle[:size], right[:size]
    if start == "psoft_init":
        update = (u * s) @ m @ v
    else:
        update = (u * np.sqrt(s)) @ m @ (np.sqrt(s)[:, None] * v)
    laws(delta, w0, lambda w: w + update)
    assert chained.given(delta, torch.from_numpy(w0)).rank == size
    assert kinds.fits(delta, (2, 9)) is not None


def test_psofts_random_directions_are_the_same_in_every_thread():
    settings = {
        "r": 3,
        "free": True,
        "start": "psoft_init",
        "svd": "lowrank",
        "seed": 4,
        "niter": 2,
    }
    delta = Chained("psoft", {"R": leaf(24, 3, 3)}, 1.0, settings)
    w0 = torch.from_numpy(numbers(25, 40, 30))
    before = torch.random.get_rng_state()
    alone = kinds.apply(delta, w0, 0)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: kinds.apply(delta, w0, 0), range(64)))
    assert all(torch.equal(one, alone) for one in found)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_matrices_only():
    for delta in (
        Chained("deft", {"P": leaf(4, 6, 3)}, 1.0, {"decomposition": "qr"}),
        Chained("fourier", {"spectrum": leaf(1, 4)}, 1.0, {"seed": 0}),
    ):
        assert "of a matrix" in kinds.fits(delta, (6, 5, 3, 3))


def test_an_unknown_sum_is_refused():
    refused("unknown_type", kinds.ready, Chained("chain", {}))
