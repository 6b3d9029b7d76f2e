"""Methods that scale or set what is there: (IA)³, HiRA, tuned norms, BEFT's biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools import views
from loratools.adapter import Dense, LowRank, Replace, Scaled
from loratools.errors import shown
from loratools.formats.peft_config import names
from loratools.formats.peft_methods.found import Found, Method
from loratools.formats.reading import Reading, multiplies
from loratools.names.patterns import compile_pattern


def read_ia3(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """W0 times a vector: by columns in feedforward modules, else by rows, and then the bias too."""
    for module, parts in found.each(reading, "ia3_l"):
        factor = parts["ia3_l"]
        shape = factor.shape
        columns = _feedforward(config, module)
        if len(shape) == 2 and shape != (1, 1):  # a matrix's, whose orientation is seen
            good = shape == (1, factor.numel) if columns else shape == (factor.numel, 1)
        else:
            good = len(shape) >= 2 and factor.numel == max(shape)
        if not good or not factor.numel:
            side = "columns (it is in feedforward_modules)" if columns else "rows"
            message = f"{shown(module)}: ia3_l is {shape}, the config says that it scales {side}"
            reading.problem("config_conflict", message, module)
            continue
        reading.deltas[f"{module}.weight"] = Scaled("columns" if columns else "rows", factor)
        if not columns:
            reading.deltas[f"{module}.bias"] = Scaled("rows", factor)


def _feedforward(config: Mapping[str, Any], module: str) -> bool:
    """PEFT compares ends of names without a dot before them (peft:tuners/ia3/model.py)."""
    said = config.get("feedforward_modules")
    if isinstance(said, str):
        return compile_pattern(said).fullmatch(module)
    return any(module.endswith(name) for name in names(config, "feedforward_modules"))


def read_hira(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """W0 ∘ (1 + B·A) (HiRA, ICLR 2025)."""
    for module, parts in found.each(reading):
        embedding = "hira_embedding_A" in parts
        middle = "hira_embedding_" if embedding else "hira_"
        a, b = parts.get(f"{middle}A"), parts.get(f"{middle}B")
        if a is None or b is None or len(parts) != 2:
            there = ", ".join(sorted(parts))
            reading.problem("missing", f"{shown(module)} has {there}: no pair", module)
            continue
        if not multiplies(a, b):
            message = f"{shown(module)}: A is {a.shape}, B is {b.shape}"
            reading.problem("shape_factors", message, module)
            continue
        key = f"{module}.weight"
        reading.deltas[key] = Scaled("elements", LowRank(a, b, 1.0), 1.0)
        if embedding:
            found.transposed.add(key)


def read_norms(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """A norm's parameters in full."""
    for module, parts in found.each(reading):
        for part, leaf in parts.items():
            reading.deltas[f"{module}.{part.rpartition('.')[2]}"] = Replace(leaf)


def read_beft(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
    """A vector added to the bias."""
    for module, parts in found.each(reading, "beft_bias"):
        bias = parts["beft_bias"]
        reading.deltas[f"{module}.bias"] = Dense(views.reshaped(bias, bias.numel))


METHODS = {
    "IA3": Method.of(read_ia3, "ia3_l", fields="feedforward_modules init_ia3_weights"),
    "HIRA": Method.of(
        read_hira,
        "hira_A hira_B hira_embedding_A hira_embedding_B",
        fields="r hira_dropout rank_pattern",
    ),
    "LN_TUNING": Method.of(read_norms, "ln_tuning_layers.weight ln_tuning_layers.bias"),
    "BEFT": Method.of(read_beft, "beft_bias"),
}
