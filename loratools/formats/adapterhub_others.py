"""AdapterHub's relatives of LoRA that a weight can take in: IA3, VeRA, MTL-LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loratools.adapter import FLOATS, TORCH_NAMES, Leaf, Scaled
from loratools.errors import error, shown
from loratools.formats.adapterhub_keys import LORAS, Method, Part
from loratools.formats.grouped import FUSED
from loratools.formats.reading import Reading
from loratools.formats.state_dicts import ask
from loratools.views import later, reshaped, scaled, widest

if TYPE_CHECKING:
    import torch

OTHERS = ("IA3", "VeRA", "MTL-LoRA")
Parts = Mapping[str, tuple[Part, Leaf]]


def read_other(reading: Reading, method: Method, config: Mapping[str, Any], parts: Parts) -> None:
    """The deltas of one of OTHERS; tensors that are none of it are problems, by name."""
    for key, (_, leaf) in parts.items():
        if leaf.dtype not in FLOATS:
            raise error("dtype_unusable", f"{shown(key)} is {leaf.dtype}, not floats")
    match method.name:
        case "IA3":
            _ia3(reading, config, parts)
        case "VeRA":
            _vera(reading, config, parts)
        case _:
            _mtl(reading, config, parts)


def _modules(reading: Reading, parts: Parts, *wanted: str) -> dict[str, dict[str, Leaf]]:
    """The leaves of each module's LoRA by name; others are unexplained."""
    found: dict[str, dict[str, Leaf]] = {}
    for key, (part, leaf) in parts.items():
        if part.group != LORAS or part.leaf not in wanted:
            reading.unexplained([key])
        else:
            found.setdefault(part.module, {})[part.leaf] = leaf
    return found


def _number(reading: Reading, config: Mapping[str, Any], name: str) -> float | None:
    value = config.get(name)
    if value is None:
        return reading.number(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise error("malformed", f"{shown(reading.name)}: its config's {name} is {shown(value)}")
    return float(value)


def _slots(config: Mapping[str, Any]) -> tuple[bool, ...]:
    letters = config.get("attn_matrices")
    given = letters if isinstance(letters, list) else []
    return tuple(letter in given for letter in "qkv")


# ------------------------------------------------------------------------------- IA3


def _ia3(reading: Reading, config: Mapping[str, Any], parts: Parts) -> None:
    """Rows of the weight, and the bias, times alpha · lora_B (arXiv 2205.05638).

    adapters multiplies a layer's whole output where it runs, and its bias not where it merges
    (adapter-hub/adapters:methods/lora.py); read is what it runs. Fused layers run without alpha
    what they merge with it.
    """
    alpha = _number(reading, config, "alpha")
    alpha = 1.0 if alpha is None else alpha
    for module, leaves in _modules(reading, parts, "lora_B").items():
        factor = leaves["lora_B"]
        if len(factor.shape) != 2 or factor.shape[1] != 1 or not factor.shape[0]:
            message = f"{shown(module)}: lora_B is {factor.shape}, expected (out, 1)"
            reading.problem("shape_factors", message, module)
            continue
        flat = reshaped(factor, factor.numel)
        if module.rpartition(".")[2] in FUSED:
            whole = _with_ones(flat, _slots(config))
            if whole is None:
                message = (
                    f"{shown(module)}: {flat.numel} factors are no equal groups of the "
                    f"{sum(_slots(config))} of q, k, v that attn_matrices names"
                )
                reading.problem("config_conflict", message, module)
                continue
            if alpha != 1:
                message = (
                    f"{shown(module)} is fused and alpha is {alpha:g}: adapters multiplies by it "
                    "where it merges and not where it runs; read is what it runs"
                )
                reading.problem("scaling_unusual", message, module, "warning")
            flat = whole
        else:
            flat = scaled(flat, alpha)
        reading.deltas[f"{module}.weight"] = Scaled("rows", flat)
        reading.deltas[f"{module}.bias"] = Scaled("rows", flat)


def _with_ones(flat: Leaf, slots: tuple[bool, ...]) -> Leaf | None:
    """Factors of some of q, k, v with ones for the others."""
    count = sum(slots)
    if not count or flat.numel % count:
        return None
    size = flat.numel // count

    def make() -> torch.Tensor:
        import torch

        given = iter(flat.tensor().reshape(count, size))
        ones = torch.ones(size, dtype=getattr(torch, TORCH_NAMES[flat.dtype]))
        return torch.cat([next(given) if has else ones for has in slots])

    return later(flat.name, flat.dtype, (3 * size,), make)


# ------------------------------------------------------------------------------- VeRA


def _vera(reading: Reading, config: Mapping[str, Any], parts: Parts) -> None:
    """ΔW = alpha/r · vera_B · B · vera_D · A, with A and B shared (arXiv 2310.11454).

    vera_B (out, out) and vera_D (r, r) are stored whole, and used so.
    """
    shared = {p.leaf: leaf for p, leaf in parts.values() if p.group == "shared_parameters"}
    own = {k: v for k, v in parts.items() if v[0].group != "shared_parameters"}
    odd = set(shared) - {"lora_A", "lora_B"}
    reading.unexplained([k for k, (p, _) in parts.items() if p.leaf in odd and k not in own])
    a, b = shared.get("lora_A"), shared.get("lora_B")
    if a is None or b is None:
        reading.problem("missing", "the shared matrices lora_A and lora_B are not in the file")
        return
    alpha = _number(reading, config, "alpha")
    if alpha is None:
        ask(reading, "alpha_missing", "no config says its alpha", "--assume alpha=8")
    for module, leaves in _modules(reading, own, "vera_D", "vera_B").items():
        d, left = leaves.get("vera_D"), leaves.get("vera_B")
        if d is None or left is None:
            lost = "vera_D" if d is None else "vera_B"
            reading.problem("missing", f"{shown(module)} has no {lost}", module)
            continue
        if module.rpartition(".")[2] in FUSED:
            message = (
                f"{shown(module)}: adapters itself cannot run VeRA on fused projections, so that "
                "nothing says what it means"
            )
            reading.problem("unknown_type", message, module)
            continue
        rank, fits = b.shape[-1], len(a.shape) == len(b.shape) == 2
        fits = fits and a.shape[0] == rank and d.shape == (rank, rank)
        if not fits or left.shape != (b.shape[0], b.shape[0]):
            message = (
                f"{shown(module)}: vera_B {left.shape}, lora_B {b.shape}, vera_D {d.shape}, "
                f"lora_A {a.shape} do not multiply"
            )
            reading.problem("shape_factors", message, module)
            continue
        reading.pair(
            module, _product(d, a), _product(left, b), scaling=(alpha or 0.0) / rank
            if alpha is not None else 1.0,
        )  # fmt: skip


def _product(*leaves: Leaf) -> Leaf:
    """Matrices multiplied in float64 and rounded once."""
    dtype = widest([*(leaf.dtype for leaf in leaves), "F32"])

    def make() -> torch.Tensor:
        import torch

        whole = leaves[0].tensor().to(torch.float64)
        for leaf in leaves[1:]:
            whole = whole @ leaf.tensor().to(torch.float64)
        return whole.to(getattr(torch, TORCH_NAMES[dtype]))

    return later(leaves[-1].name, dtype, (leaves[0].shape[0], leaves[-1].shape[1]), make)


# ------------------------------------------------------------------------------- MTL-LoRA


def _mtl(reading: Reading, config: Mapping[str, Any], parts: Parts) -> None:
    """ΔW = alpha/r · Σ w_i · B_i · Λᵀ · A, w = softmax(weights / sharpness) (arXiv 2410.09437).

    Λ and w are one task's; A and all B_i are shared by the tasks.
    """
    tasks = sorted({p.name for p, _ in parts.values() if p.group == LORAS})
    said = reading.assume.get("task")
    if said is not None and said not in tasks:
        listed = ", ".join(shown(t) for t in tasks)
        raise error("usage", f"--assume task={shown(said)}: the file has {listed}")
    if len(tasks) > 1 and said is None:
        listed = ", ".join(shown(t) for t in tasks)
        message = f"its updates are one for each task: {listed}"
        ask(reading, "missing", message, f"--assume task={shown(tasks[0])}")
        return
    task = said or tasks[0]
    if config.get("use_gating") is True or any(
        p.leaf.startswith("gate.") for p, _ in parts.values()
    ):
        message = "its gate is computed from the input: no weight is that"
        reading.problem("not_foldable", message)
        return
    alpha, sharpness = (_number(reading, config, n) for n in ("alpha", "weights_sharpness"))
    if alpha is None:
        ask(reading, "alpha_missing", "no config says its alpha", "--assume alpha=8")
    if sharpness is None or sharpness == 0:
        message = f"weights_sharpness is {config.get('weights_sharpness')}"
        ask(reading, "missing", message, "--assume weights_sharpness=0.05 (from the config)")
        return
    shared = {
        (p.module, p.leaf): leaf for p, leaf in parts.values() if p.group == "shared_parameters"
    }
    mine = {k: v for k, v in parts.items() if v[0].group == LORAS and v[0].name == task}
    wanted = ("lora_A", "lora_B", "weights", "task_specific.values")
    for module, found in _modules(reading, mine, *wanted).items():
        leaves = {n: found.get(n, shared.get((module, n))) for n in wanted}
        absent = [name for name, leaf in leaves.items() if leaf is None]
        if absent:
            reading.problem("missing", f"{shown(module)} has no {absent[0]}", module)
            continue
        a, b, weights, inner = (leaf for leaf in leaves.values() if leaf is not None)
        count, rank = weights.numel, b.shape[-1]
        fits = len(a.shape) == 2 and len(b.shape) == 3 and b.shape[0] == count
        if not fits or a.shape[0] != rank or inner.shape not in ((rank,), (rank, rank)):
            message = (
                f"{shown(module)}: lora_A {a.shape}, lora_B {b.shape}, weights {weights.shape}, "
                f"task_specific {inner.shape} do not multiply"
            )
            if module.rpartition(".")[2] in FUSED:
                message += " (adapters itself cannot run MTL-LoRA on fused projections)"
            reading.problem("shape_factors", message, module)
            continue
        reading.pair(
            module, _inner(inner, a), _mixed(b, weights, sharpness),
            scaling=1.0 if alpha is None else alpha / rank,
        )  # fmt: skip


def _inner(inner: Leaf, a: Leaf) -> Leaf:
    """Λᵀ · A, Λ a diagonal or whole."""
    dtype = widest([inner.dtype, a.dtype, "F32"])

    def make() -> torch.Tensor:
        import torch

        left = inner.tensor().to(torch.float64)
        left = left.diag() if left.ndim == 1 else left.T
        return (left @ a.tensor().to(torch.float64)).to(getattr(torch, TORCH_NAMES[dtype]))

    return later(a.name, dtype, a.shape, make)


def _mixed(b: Leaf, weights: Leaf, sharpness: float) -> Leaf:
    """Σ softmax(weights / sharpness)_i · B_i."""
    dtype = widest([weights.dtype, b.dtype, "F32"])

    def make() -> torch.Tensor:
        import torch

        shares = (weights.tensor().to(torch.float64) / sharpness).softmax(0)
        whole = torch.einsum("i,ior->or", shares, b.tensor().to(torch.float64))
        return whole.to(getattr(torch, TORCH_NAMES[dtype]))

    return later(b.name, dtype, b.shape[1:], make)
