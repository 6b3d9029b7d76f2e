"""Sums over W0 in a few directions of it: DEFT, PSOFT, OSF, FRoD, PEANuT; each sees all of W0.

The directions come from W0 itself, so that a delta on its own has none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.adapter import Chained, Leaf
from loratools.errors import error, shown
from loratools.kinds import spectral
from loratools.kinds.glora import WHOLE, Functions
from loratools.kinds.rotated import cayley, neumann

if TYPE_CHECKING:
    from torch import Tensor

Factors = tuple["Tensor", "Tensor"]

# torch's randomised SVD draws from the one generator of the process, and targets have threads.
_DRAWING = threading.Lock()


def _wide(delta: Chained, part: str) -> Tensor:
    import torch

    return delta.parts[part].tensor().to(torch.float64)


def _deft(delta: Chained, w0: Tensor) -> Factors:
    """ΔW = Q·(s·R - rightᵀ·W0): a few directions taken out of W0, others put in.

    Q and right are P orthonormalised, or P and relu(P) (peft:tuners/deft/layer.py).
    """
    import torch

    p = _wide(delta, "P")
    if delta.settings["decomposition"] == "qr":
        q, _ = torch.linalg.qr(p)
        right = q
    else:
        q, right = p, p.relu()
    removed = right.T @ w0
    if "R" not in delta.parts:
        return q, -removed
    return q, _wide(delta, "R") * delta.scaling - removed


def _psoft(delta: Chained, w0: Tensor) -> Factors:
    """ΔW = U·S·(R - I)·V of the leading singular directions of W0 (peft:tuners/psoft/layer.py).

    Their signs are those that LAPACK gives in float32 on a CPU, as in PEFT: R mixes them, so that
    others would give another update.
    """
    import torch

    settings, weight = delta.settings, w0.to("cpu", torch.float32)
    size = int(settings["r"])
    if settings["svd"] == "full":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        with _DRAWING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(settings["seed"]))
            u, s, turned = torch.svd_lowrank(weight, q=size, niter=int(settings["niter"]))
            v = turned.T
    r = _between(delta, size).to("cpu")
    u, s, v = (t.to(torch.float64) for t in (u[:, :size], s[:size], v[:size]))
    middle = r - torch.eye(size, dtype=torch.float64)
    if settings["start"] == "psoft_init":
        left, right = u * s, middle @ v
    else:
        left, right = u * s.sqrt(), middle @ (s.sqrt()[:, None] * v)
    return left.to(w0.device), right.to(w0.device)


def _between(delta: Chained, size: int) -> Tensor:
    """PSOFT's R: skew numbers through Cayley's map, or as it is; its two scalings on its sides."""
    import torch

    settings, stored = delta.settings, _wide(delta, "R")
    if settings["free"]:
        r = stored
    else:
        q = stored.new_zeros(size, size)
        rows, columns = torch.triu_indices(size, size, 1)
        q[rows, columns] = stored
        q = q - q.T
        terms, bound = settings.get("terms"), settings.get("bound")
        if terms is None:
            r = cayley(-q[None])[0]
        else:
            norm = float(torch.linalg.matrix_norm(q))
            if bound is not None and norm > bound:
                q = q * (bound / (norm + 1e-12))
            r = neumann(q[None], int(terms))[0]
    if "vector_b" in delta.parts:
        r = _wide(delta, "vector_b")[:, None] * r
    if "vector_a" in delta.parts:
        r = r * _wide(delta, "vector_a")
    return r


def _osf(delta: Chained, w0: Tensor) -> Factors:
    """ΔW: the trailing singular part of W0 goes, the trained one comes (peft:tuners/osf/layer.py).

    The file has as many directions as there were trailing ones.
    """
    import torch

    left, middle, right = (_wide(delta, part) for part in ("U_low", "S_low", "V_low"))
    u, s, v = torch.linalg.svd(w0, full_matrices=False)
    kept = len(s) - len(middle)
    before = u[:, kept:] * s[kept:]
    return torch.cat([left * middle, -before], 1), torch.cat([right, v[kept:]])


def _peanut(delta: Chained, w0: Tensor) -> Factors:
    """ΔW = s·B·n(A·W0), n a small network over columns (peft:tuners/peanut/layer.py)."""
    from torch.nn import functional

    name, depth = str(delta.settings["act"]), int(delta.settings["depth"])

    def act(x: Tensor) -> Tensor:
        if name == "linear":
            return x
        if name == "gelu_new":
            return functional.gelu(x, approximate="tanh")
        made: Tensor = getattr(functional, "silu" if name == "swish" else name)(x)
        return made

    h = act(w0.T @ _wide(delta, "A").T)
    kept = []
    for i in range(depth):
        kept.append(h)
        h = act(h @ _wide(delta, f"encoders.{i}").T)
    for i in range(depth):
        h = act(h @ _wide(delta, f"decoders.{i}").T) + kept[depth - 1 - i]
    return _wide(delta, "B") * delta.scaling, h.T


def _frod(delta: Chained, w0: Tensor) -> Tensor:
    """W = U·(S + diag λ)·Vᵀ; U: the normed columns of W0·V⁻ᵀ (peft:tuners/frod/layer.py)."""
    import torch

    v, values, lengths = (_wide(delta, part) for part in ("V", "values", "lambda"))
    indices = delta.parts["indices"].tensor().to(torch.int64)
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(lengths):
        name = shown(delta.parts["indices"].name)
        raise error("malformed", f"{name} names places outside a matrix of {len(lengths)} columns")
    rows, columns = indices
    try:
        u = torch.linalg.solve(v, w0.T).T
    except RuntimeError:  # singular: PEFT's own way out
        u = w0 @ torch.linalg.pinv(v, rtol=1e-6).T
    norms = torch.linalg.vector_norm(u, dim=0)
    u = torch.where(norms > 1e-12, u / norms, torch.zeros_like(u))
    middle = torch.diag(lengths)
    middle.index_put_((rows, columns), values, accumulate=True)
    return u @ middle @ v.T


FACTORS: dict[str, Callable[[Chained, Tensor], Factors]] = {
    "deft": _deft, "psoft": _psoft, "osf": _osf, "peanut": _peanut,
}  # fmt: skip


def _shape(delta: Chained) -> tuple[int, ...] | None:
    match delta.method:
        case "deft":
            inner = delta.parts["R"].shape[1] if "R" in delta.parts else None
            found = None if inner is None else (delta.parts["P"].shape[0], inner)
        case "osf":
            found = delta.parts["U_low"].shape[0], delta.parts["V_low"].shape[1]
        case "frod":
            return None
        case _:
            return None
    return found[::-1] if found and delta.settings.get("turned") else found


def fits(delta: Chained, stored: tuple[int, ...]) -> str | None:
    """Why the parts are not those of a matrix of this module shape."""
    found = f"base is {stored}"
    if len(stored) != 2:
        return f"a {delta.method} update is of a matrix, {found}"
    mine, settings = _shape(delta), delta.settings
    if mine is not None:
        return None if mine == stored else f"adapter is {mine}, {found}"
    match delta.method:
        case "deft" if delta.parts["P"].shape[0] != stored[0]:
            return f"adapter has {delta.parts['P'].shape[0]} rows, {found}"
        case "frod" if delta.parts["V"].shape[0] != stored[1]:
            return f"adapter has {delta.parts['V'].shape[0]} columns, {found}"
        case "peanut" if delta.parts["A"].shape[1] != stored[0]:
            return f"adapter has {delta.parts['A'].shape[1]} rows, {found}"
        case "psoft" if int(settings["r"]) > min(stored):
            return f"adapter turns {settings['r']} directions, {found}"
        case _:
            return None


def _ready(delta: Chained) -> Chained:
    """The trained parts in float64."""
    import torch

    parts = {
        name: leaf if name == "indices" else Leaf.of(leaf.name, leaf.tensor().to(torch.float64))
        for name, leaf in delta.parts.items()
    }
    return replace(delta, parts=parts)


def _apply(delta: Chained, w0: Tensor, start: int) -> Tensor:
    turned = bool(delta.settings.get("turned"))
    weight = w0.T if turned else w0
    if delta.method in FACTORS:
        left, right = FACTORS[delta.method](delta, weight)
        w = weight + left @ right
    else:
        w = _frod(delta, weight)
    return w.T.contiguous() if turned else w


def _transposed(delta: Chained) -> Chained:
    """Marked: the directions are found in the weight as its module has it."""
    return replace(delta, settings=spectral.turned(delta.settings))


METHODS = {
    name: Functions(_shape, lambda _: WHOLE, _ready, _apply, _transposed)
    for name in (*FACTORS, "frod")
}
