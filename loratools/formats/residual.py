"""Initialisations of PEFT that change the base before training, and what can be made of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from loratools.adapter import Chained, LowRank, Renormed
from loratools.errors import error, shown
from loratools.formats.peft_config import RESIDUAL
from loratools.formats.reading import Reading

FIELD = "init_lora_weights"
# Those that W0 gives again without anything else; a `pissa_niter_N` drew random numbers.
REPEATABLE = ("pissa", "olora")
WHY = {
    "pissa": "a randomised decomposition",
    "corda": "the inputs that it was given",
    "lora_ga": "the gradients that it was given",
    "loftq": "a quantisation",
}


def is_residual(config: Mapping[str, Any]) -> bool:
    """Whether a config names an initialisation that changed the base before training."""
    init = config.get(FIELD)
    return isinstance(init, str) and init.lower().startswith(RESIDUAL)


def rebase(
    config: Mapping[str, Any], reading: Reading, embeddings: Collection[str], front: str = ""
) -> bool:
    """Make pairs that fit a residual base into functions of the plain one, where it can be had.

    Whether there are such pairs; `front` begins the keys that the config speaks of. `--assume
    residual=given`: the base to come is the residual one already. PEFT starts embeddings as ever,
    whatever the config says.
    """
    init, said = config.get(FIELD), reading.assume.get("residual")
    if said not in (None, "given"):
        raise error("usage", f"--assume residual={shown(said)}: expected given")
    name = init.lower() if isinstance(init, str) else ""
    if not is_residual(config):
        if said is not None:
            message = f"--assume residual={said}, but {FIELD} is {shown(init)}: it left the base"
            raise error("usage", f"{message} as it was")
        return False
    keys = [
        key
        for key, delta in reading.deltas.items()
        if isinstance(delta, LowRank | Renormed) and key not in embeddings and key.startswith(front)
    ]
    if said is not None:
        message = f"{FIELD}={shown(init)}: taken as trained on the base that is given"
        reading.problem("residual_base", message, severity="note")
        return False
    made = 0
    plain = [key for key in keys if isinstance(reading.deltas[key], LowRank)]
    if name not in REPEATABLE or len(plain) < len(keys):
        why = next((w for k, w in WHY.items() if name.startswith(k)), "")
        if name in REPEATABLE:
            why = "DoRA's norms upon it"
        reading.problem(
            "residual_base",
            f"{FIELD}={shown(init)}: the adapter fits only the residual base that this "
            f"initialisation made, which depends on {why}; fold onto that base (--assume "
            "residual=given), or have PEFT convert the adapter "
            "(path_initial_model_for_weight_conversion)",
        )
        return False
    # OLoRA decomposes a weight as it is stored (peft:tuners/lora/layer.py, olora_init).
    settings = {"side": "rows"} if name == "olora" and config.get("fan_in_fan_out") is True else {}
    for key in plain:
        delta = reading.deltas[key]
        if isinstance(delta, LowRank) and len(delta.a.shape) == 2:
            parts = {"a": delta.a, "b": delta.b}
            reading.deltas[key] = Chained(name, parts, delta.scaling, settings)
            made += 1
    if made:
        reading.problem(
            "residual_base",
            f"{FIELD}={shown(init)}: {made} pairs fit what it left of the base's weights, which "
            "is computed again from them (--assume residual=given: the base is that already)",
            severity="note",
        )
    return made > 0
