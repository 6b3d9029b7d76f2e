"""PEFT's methods beyond LoRA, one file per family: the table METHODS, by peft_type.

`METHODS[peft_type].read(found, config, reading)`: see `found.Found` and `found.Method`. A family's
file has a METHODS of its own, which is joined in below.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratools.formats.peft_methods import (
    low_rank,
    lowered,
    lycoris,
    rotations,
    scales,
    sized,
    spectral,
    sums,
)
from loratools.formats.peft_methods.found import COMMON, Found, Method

__all__ = ["COMMON", "METHODS", "REFUSED", "Found", "Method"]

METHODS: Mapping[str, Method] = {
    **lycoris.METHODS,
    **low_rank.METHODS,
    **sized.METHODS,
    **scales.METHODS,
    **rotations.METHODS,
    **spectral.METHODS,
    **lowered.METHODS,
    **sums.METHODS,
}

_ROUTED = "which of its parts apply is decided for every input"
_PROMPT = "it adds virtual tokens to the input and changes no weight"

# Types that no weight can express, with the reason.
REFUSED: Mapping[str, str] = {
    "ADAMSS": "which rows each of its parts changes is not in the file: PEFT finds that by k-means "
    "over the base (scikit-learn); merge it there",
    "ADAPTION_PROMPT": "it adds gated prompts to the attention and changes no weight",
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "LILY": _ROUTED,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "SHADOW": "it runs a small network beside the model and changes no weight",
    "XLORA": _ROUTED,
}
