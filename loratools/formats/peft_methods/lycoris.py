"""LoHa and LoKr as PEFT saves them: factors of the two products, with or without cores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loratools import views
from loratools.adapter import Hadamard, Kronecker, Leaf, Spectral
from loratools.errors import shown
from loratools.formats.peft_config import Scaling, scaling_of
from loratools.formats.peft_methods.found import Found, Method
from loratools.formats.reading import Reading

if TYPE_CHECKING:
    from torch import Tensor

FIELDS = "r alpha rank_dropout module_dropout use_effective_conv2d rank_pattern alpha_pattern"


def _scaling(
    module: str, rank: int | None, config: Mapping[str, Any], reading: Reading
) -> tuple[float, float | None]:
    """alpha / r of a module, and its alpha; a rank (None: unseen) that the config denies is told.

    PEFT divides by the config's r, also where both factors of a LoKr are whole
    (peft:tuners/lokr/layer.py).
    """
    said: Scaling = scaling_of({**config, "lora_alpha": config.get("alpha")}, module)
    if rank is not None and said.rank is not None and said.rank != rank:
        message = f"{shown(module)}: config says r={said.rank}, its factors have {rank}"
        reading.problem("config_conflict", message, module)
    divisor = rank if said.rank is None else said.rank
    alpha = reading.number("alpha") if said.alpha is None else said.alpha
    if alpha is None or not divisor:
        lacks = "alpha" if alpha is None else "r"
        reading.problem("alpha_missing", f"{shown(module)}: the config has no {lacks}", module)
        return 1.0, None
    return alpha / divisor, alpha


def read_loha(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """ΔW = alpha/r · (W1a·W1b) ∘ (W2a·W2b); with cores t the factors are (r, out) and (r, in)."""
    needed = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    for module, parts in found.each(reading, *needed):
        cores = [parts[t] for t in ("hada_t1", "hada_t2") if t in parts]
        if len(cores) == 1:
            reading.problem("missing", f"{shown(module)} has one core of two", module)
            continue
        factors = [parts[part] for part in needed]
        shape = _product_shape(factors, cores)
        if shape is None:
            shapes = ", ".join(str(leaf.shape) for leaf in (*factors, *cores))
            message = f"{shown(module)}: {shapes} are no factors of two products"
            reading.problem("shape_factors", message, module)
            continue
        rank = parts["hada_w1_b"].shape[0]
        scaling, alpha = _scaling(module, rank, config, reading)
        t1, t2 = cores or (None, None)
        reading.deltas[f"{module}.weight"] = Hadamard(
            factors[0], factors[1], factors[2], factors[3], shape, scaling, alpha, t1, t2
        )


def _product_shape(factors: list[Leaf], cores: list[Leaf]) -> tuple[int, ...] | None:
    """The weight's shape by the factors of a LoHa; None where they do not multiply."""
    if any(len(leaf.shape) != 2 or 0 in leaf.shape for leaf in factors):
        return None
    w1_a, w1_b, w2_a, w2_b = (leaf.shape for leaf in factors)
    if w1_a != w2_a or w1_b != w2_b:
        return None
    if not cores:
        return (w1_a[0], w1_b[1]) if w1_a[1] == w1_b[0] else None
    core, rank = cores[0].shape, w1_a[0]
    if core != cores[1].shape or len(core) < 3 or core[:2] != (rank, rank) or w1_b[0] != rank:
        return None
    return (w1_a[1], w1_b[1], *core[2:]) if math.prod(core) else None


def read_lokr(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """ΔW = alpha/r · W1 ⊗ W2, either of them whole or in two factors, W2 perhaps with a core."""
    for module, parts in found.each(reading):
        small = _factor(parts, "lokr_w1", None)
        core = parts.get("lokr_t2")
        large = _factor(parts, "lokr_w2", core)
        if small is None or large is None:
            shapes = ", ".join(f"{part} {leaf.shape}" for part, leaf in sorted(parts.items()))
            message = f"{shown(module)}: {shapes} are not two matrices to multiply"
            reading.problem("shape_factors", message, module)
            continue
        shape = (small[0] * large[0], small[1] * large[1], *large[2:])
        inner = next((parts[p] for p in ("lokr_w1_b", "lokr_w2_b") if p in parts), None)
        rank = None if inner is None else inner.shape[0]
        scaling, alpha = _scaling(module, rank, config, reading)
        given = {part.removeprefix("lokr_"): leaf for part, leaf in parts.items()}
        if len(large) == 3 and "w2" in given:
            whole = _backward(given, shape)
            reading.deltas[f"{module}.weight"] = Spectral("made", {"whole": whole}, shape, scaling)
            continue
        reading.deltas[f"{module}.weight"] = Kronecker(shape, scaling, alpha, **given)


def _backward(given: Mapping[str, Leaf], shape: tuple[int, ...]) -> Leaf:
    """ΔW (out, in * k) as PEFT 0.21 makes it of a whole W2 with one kernel axis: W2 ⊗ W1.

    torch.kron gives the matrix W1 a first axis, not a last one, so that W1's rows come to lie
    within W2's (peft:tuners/lokr/layer.py, make_kron).
    """

    def make() -> Tensor:
        import torch

        w1, w2 = first(given), given["w2"].tensor().to(torch.float64)
        whole: Tensor = torch.kron(w1, w2)
        return whole.reshape(matrix)

    matrix = (shape[0], math.prod(shape[1:]))
    return views.later(given["w2"].name, "F64", matrix, make)


def first(given: Mapping[str, Leaf]) -> Tensor:
    """W1 in float64, whole or of its factors."""
    import torch

    parts = [
        given[name].tensor().to(torch.float64) for name in ("w1", "w1_a", "w1_b") if name in given
    ]
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]


def _factor(parts: Mapping[str, Leaf], name: str, core: Leaf | None) -> tuple[int, ...] | None:
    """The shape of one factor of a Kronecker product; None where it is not whole."""
    whole, a, b = (parts.get(f"{name}{end}") for end in ("", "_a", "_b"))
    if whole is not None:
        good = a is b is core is None and len(whole.shape) >= 2 and whole.numel
        return whole.shape if good else None
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or not a.numel * b.numel:
        return None
    if core is None:
        return (a.shape[0], b.shape[1]) if a.shape[1] == b.shape[0] else None
    fits = len(core.shape) > 2 and core.shape[:2] == (a.shape[0], b.shape[0])
    return (a.shape[1], b.shape[1], *core.shape[2:]) if fits and core.numel else None


METHODS = {
    "LOHA": Method.of(
        read_loha,
        "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2",
        fields=FIELDS,
    ),
    "LOKR": Method.of(
        read_lokr,
        "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2",
        fields=f"{FIELDS} decompose_both decompose_factor rank_dropout_scale",
    ),
}
