"""Methods whose tensors do not say how wide the weight is: VeRA, PVeRA, MiSS (once Bone)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.adapter import Chained
from loratools.errors import shown
from loratools.formats.peft_methods.found import Found, Method, Reader, flag, whole
from loratools.formats.reading import Reading


def _vera(prefix: str, times: int) -> Reader:
    """ΔW = diag(b)·B[:out]·diag(d)·A[:, :in], A and B stored or made from a seed."""

    def read(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
        a, b = (found.shared.get(f"{prefix}_{side}") for side in "AB")
        rank = whole(config, "r", 256)
        settings: dict[str, Any] = {"rank": rank, "rows": rank * times}
        if (a is None) != (b is None):
            there = a or b
            assert there is not None
            reading.problem("missing", f"{shown(there.name)} stands without its other projection")
            return
        if a is None or b is None:
            settings["seed"] = whole(config, "projection_prng_key", 0)
        elif (a.shape[0], b.shape[1:]) != (rank * times, (rank,)) or len(a.shape) != 2:
            message = f"projections of {a.shape} and {b.shape} at r={rank}"
            reading.problem("config_conflict", message)
            return
        if flag(config, "sample_at_inference"):
            message = "PEFT adds noise to every output; folded is the mean (sample_at_inference)"
            reading.problem("not_foldable", message, severity="warning")
        for module, parts in found.each(reading, f"{prefix}_lambda_b", f"{prefix}_lambda_d"):
            high, d = parts[f"{prefix}_lambda_b"], parts[f"{prefix}_lambda_d"]
            if d.numel != rank * times or not high.numel:
                message = f"{shown(module)}: lambda_d is {d.shape} at r={rank}"
                reading.problem("config_conflict", message, module)
                continue
            stored = {} if a is None or b is None else {"A": a, "B": b}
            made = {"lambda_b": high, "lambda_d": d, **stored}
            reading.deltas[f"{module}.weight"] = Chained("vera", made, 1.0, settings)

    return read


def _miss(part: str) -> Reader:
    """W0 with one block added along its columns again and again, or W0 + W0·M + M by blocks."""

    def read(found: Found, config: Mapping[str, Any], reading: Reading) -> None:
        how = config.get("init_weights", True)
        if not (how is None or isinstance(how, bool) or how in ("bat", "mini")):
            message = f"init_weights={shown(repr(how))}: no way of MiSS that loratools knows"
            reading.problem("unknown_type", message)
            return
        for module, parts in found.each(reading, part):
            block = parts[part]
            good = len(block.shape) == (3 if how == "bat" else 2) and block.numel > 0
            if not good or (how == "bat" and block.shape[1] != block.shape[2]):
                message = f"{shown(module)}: {part} is {block.shape} with init_weights={how}"
                reading.problem("config_conflict", message, module)
                continue
            method = "miss bat" if how == "bat" else "miss"
            made = Chained(method, {"block": block}, 1.0, {"mini": how == "mini"})
            reading.deltas[f"{module}.weight"] = made

    return read


_VERA = "r projection_prng_key save_projection d_initial"

METHODS = {
    "VERA": Method.of(
        _vera("vera", 1),
        "vera_lambda_b vera_lambda_d",
        shared="vera_A vera_B",
        fields=f"{_VERA} vera_dropout",
    ),
    "PVERA": Method.of(
        _vera("pvera", 2),
        "pvera_lambda_b pvera_lambda_d",
        shared="pvera_A pvera_B",
        fields=f"{_VERA} pvera_dropout sample_at_inference generator_seed",
    ),
    "MISS": Method.of(_miss("miss_block"), "miss_block", fields="r miss_dropout mini_r"),
    "BONE": Method.of(_miss("bone_block"), "bone_block", fields="r"),
}
