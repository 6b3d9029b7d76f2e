"""Sums whose terms contain the weight: DEFT, PSOFT, OSF, FRoD, GLoRA, PEANuT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratools.adapter import Chained, Leaf
from loratools.errors import shown
from loratools.formats.peft_methods.found import Found, Method, few, flag, real, seed, whole
from loratools.formats.reading import Reading


def _misfit(reading: Reading, module: str, parts: Mapping[str, Leaf], more: str = "") -> None:
    said = ", ".join(f"{part} is {leaf.shape}" for part, leaf in sorted(parts.items()))
    reading.problem("shape_factors", f"{shown(module)}: {said}{more}", module)


def _unknown(reading: Reading, field: str, value: Any) -> None:
    reading.problem("unknown_type", f"{field}={shown(repr(value))} is no setting that is known")


def read_deft(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """W0 - Q·rightᵀ·W0 + Q·s·R; with para=true nothing is put in."""
    how = config.get("decomposition_method", "relu")
    if how not in ("relu", "qr"):
        _unknown(reading, "decomposition_method", how)
        return
    para = flag(config, "para")
    alpha = None if config.get("alpha") is None else real(config, "alpha")
    for module, parts in found.each(reading, *(("deft_P",) if para else ("deft_P", "deft_R"))):
        p, r = parts["deft_P"], parts.get("deft_R")
        good = len(p.shape) == 2 and p.numel and (r is None) == para
        if not good or (r is not None and (len(r.shape) != 2 or r.shape[0] != p.shape[1])):
            _misfit(reading, module, parts, f", with para={para}")
            continue
        held = {"P": p} if r is None else {"P": p, "R": r}
        scaling = alpha / p.shape[1] if alpha else 1.0
        made = Chained("deft", held, scaling, {"decomposition": how})
        reading.deltas[f"{module}.weight"] = made


def read_psoft(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """A small matrix between the leading singular directions of W0; its scaling cancels."""
    start, svd = config.get("ab_svd_init", "psoft_init"), config.get("psoft_svd", "full")
    if start not in ("psoft_init", "pissa_init") or svd not in ("full", "lowrank"):
        _unknown(reading, "ab_svd_init, psoft_svd", (start, svd))
        return
    rank, free = whole(config, "r", 32), not flag(config, "psoft_orth", True)
    if real(config, "psoft_alpha", 32) <= 0:
        message = "psoft_alpha is not above 0: PEFT divides by it, and by its root"
        reading.problem("config_conflict", message)
        return
    settings: dict[str, Any] = {"r": rank, "free": free, "start": start, "svd": svd}
    if svd == "lowrank":
        settings["seed"] = seed(config, "random_seed", 0)
        settings["niter"] = few(config, "psoft_svd_lowrank_niter", 10)
    if flag(config, "use_cayley_neumann"):
        settings["terms"] = few(config, "num_cayley_neumann_terms", 5)
        if config.get("cayley_neumann_eps") is not None:
            settings["bound"] = real(config, "cayley_neumann_eps")
    vectors = {f"vector_{s}": flag(config, f"psoft_mag_{s}", True) for s in "ab"}
    for module, parts in found.each(reading, "psoft_R.weight"):
        r = parts["psoft_R.weight"]
        held = {"R": r}
        held |= {v: parts[f"psoft_R.{v}"] for v in vectors if f"psoft_R.{v}" in parts}
        wanted = (rank, rank) if free else (rank * (rank - 1) // 2,)
        good = r.shape == wanted and rank > 0
        good = good and all((v in held) == said for v, said in vectors.items())
        if not good or any(leaf.shape != (rank,) for v, leaf in held.items() if v != "R"):
            _misfit(reading, module, parts, f", with r={rank}")
            continue
        reading.deltas[f"{module}.weight"] = Chained("psoft", held, 1.0, settings)


def read_osf(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """The trailing singular part of W0 replaced by U·S·V."""
    for module, parts in found.each(reading, *_OSF):
        u, s, v = (parts[part] for part in _OSF)
        good = len(u.shape) == len(v.shape) == 2 and s.shape == (u.shape[1],) == (v.shape[0],)
        if not good or s.numel > min(u.shape[0], v.shape[1]) or not s.numel:
            _misfit(reading, module, parts)
            continue
        reading.deltas[f"{module}.weight"] = Chained("osf", {"U_low": u, "S_low": s, "V_low": v})


_OSF = tuple(f"osf_svd_params.{part}" for part in ("U_low", "S_low", "V_low"))


def read_frod(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """U·(S + diag λ)·Vᵀ, V shared by the modules of one role, U found from W0 and V."""
    for module, parts in found.each(reading, "frod_lambda_l", "frod_lambda_s_values"):
        category = category_of(module)
        lengths, values = parts["frod_lambda_l"], parts["frod_lambda_s_values"]
        v, indices = (found.shared.get(f"frod_{x}.{category}") for x in ("V", "s_indices"))
        if v is None or indices is None:
            message = (
                f"{shown(module)}: the projections of {shown(category)} are not in the file (PEFT "
                "finds them again from all of the base's weights of that role); save with "
                "save_projection=True"
            )
            reading.problem("missing", message, module)
            continue
        size = lengths.numel
        flat = lengths.shape == (size,) and values.shape == (values.numel,)
        if not flat or v.shape != (size, size) or indices.shape != (2, values.numel) or not size:
            _misfit(reading, module, {**parts, "V": v, "s_indices": indices})
            continue
        held = {"V": v, "indices": indices, "values": values, "lambda": lengths}
        reading.deltas[f"{module}.weight"] = Chained("frod", held)


def category_of(module: str) -> str:
    """The role of a module by its name's end, in PEFT's words (peft:tuners/frod/model.py)."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def read_glora(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """W0 + W0∘A + B, and b + b∘D + E + W0·C where the layer has a bias."""
    for module, parts in found.each(reading):
        paths = {
            part.removeprefix("glora_"): leaf
            for part, leaf in parts.items()
            if not part.endswith(".zeros")  # a path that was left empty
        }
        weight = {p: leaf for p, leaf in paths.items() if p[0] in "AB"}
        bias = {p: leaf for p, leaf in paths.items() if p[0] in "CDE"}
        for name in "ABCDE":
            if not _is_path([paths.get(f"{name}.{form}") for form in ("Xd", "Xu", "X")], name):
                _misfit(reading, module, parts)
                break
        else:
            if weight:
                made = Chained("glora of peft", weight)
                reading.deltas[f"{module}.weight"] = made
            if bias:
                settings = {"of": f"{module}.weight"}
                made = Chained("glora bias of peft", bias, 1.0, settings)
                reading.deltas[f"{module}.bias"] = made


def _is_path(leaves: Sequence[Leaf | None], name: str) -> bool:
    """Whether a path is empty, two factors, a vector or a number; those to the bias (in, 1)."""
    down, up, one = leaves
    if one is not None:
        shape = one.shape
        column = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
        return down is None is up and one.numel > 0 and column
    if down is None or up is None:
        return down is up
    good = len(down.shape) == len(up.shape) == 2 and down.shape[1] == up.shape[0]
    return good and down.numel > 0 < up.numel and (name != "C" or up.shape[1] == 1)


def read_peanut(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """ΔW: columns of W0 through a small network, which is none of the input (PEANuT)."""
    depth, act = whole(config, "depth", 0), config.get("act_fn", "relu")
    if act not in ACTIVATIONS or not 0 <= depth <= MOST:
        _unknown(reading, "act_fn, depth", (act, depth))
        return
    scaling = real(config, "scaling", 1.0)
    inner = [f"{side}.{i}" for side in ("encoders", "decoders") for i in range(depth)]
    needed = ("peanut_A.weight", "peanut_B.weight", *(f"peanut_{x}.weight" for x in inner))
    for module, parts in found.each(reading, *needed):
        a, b, *middle = (parts[part] for part in needed)
        good = len(a.shape) == 2 and a.shape == b.shape[::-1] and len(parts) == len(needed)
        if not good or any(m.shape != (a.shape[0], a.shape[0]) for m in middle):
            _misfit(reading, module, parts, f", with depth={depth}")
            continue
        held = {"A": a, "B": b, **dict(zip(inner, middle, strict=True))}
        settings = {"act": act, "depth": depth}
        reading.deltas[f"{module}.weight"] = Chained("peanut", held, scaling, settings)


ACTIVATIONS = ("relu", "gelu", "silu", "swish", "tanh", "sigmoid", "linear", "gelu_new", "relu6",
               "leaky_relu", "mish")  # fmt: skip
MOST = 64  # layers of a network


_PATHS = " ".join(f"glora_{p}.{x}" for p in "ABCDE" for x in ("Xd", "Xu", "X", "zeros"))
METHODS = {
    "DEFT": Method.of(
        read_deft,
        "deft_P deft_R",
        fields="r decomposition_method deft_dropout init_scale para alpha",
    ),
    "PSOFT": Method.of(
        read_psoft,
        "psoft_R.weight psoft_R.vector_a psoft_R.vector_b",
        fields="r psoft_alpha psoft_dropout ab_svd_init psoft_svd psoft_svd_lowrank_niter "
        "random_seed psoft_orth psoft_mag_a psoft_mag_b use_cayley_neumann "
        "num_cayley_neumann_terms cayley_neumann_eps",
    ),
    "OSF": Method.of(
        read_osf, " ".join(_OSF), fields="effective_rank rank_pattern target_svd_config"
    ),
    "FROD": Method.of(
        read_frod,
        "frod_lambda_l frod_lambda_s_values",
        shared="frod_V.* frod_s_indices.* frod_s_size.*",
        fields="projection_prng_key save_projection frod_dropout sparse_rate regularization_alpha "
        "progressbar runtime_offload_base_weight",
    ),
    "GLORA": Method.of(read_glora, _PATHS, fields="r config_A_B config_C config_D_E"),
    "PEANUT": Method.of(
        read_peanut,
        "peanut_A.weight peanut_B.weight peanut_encoders.*.weight peanut_decoders.*.weight",
        fields="r depth act_fn scaling",
    ),
}
