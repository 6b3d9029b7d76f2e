"""Flux adapters in Black Forest Labs' bare names: control LoRAs, and fal's with PEFT's front."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools.adapter import FLOATS, Adapter, Leaf, Replace
from loratools.containers.bundle import Bundle
from loratools.errors import error, shown
from loratools.formats.image_keys import (
    Part,
    grouped,
    keys_of,
    part_of,
    said_copies,
    say_rest,
    take,
    weights_of,
    without_twins,
)
from loratools.formats.reading import Reading, unwrapped

# The first pieces of Flux's own names; the last three are Flux 2's.
NAMES = frozenset(
    "img_in txt_in time_in vector_in guidance_in double_blocks single_blocks final_layer "
    "double_stream_modulation_img double_stream_modulation_txt single_stream_modulation".split()
)
BLOCKS = ("double_blocks", "single_blocks")
# Norms stand there with their new values, not with differences.
_NORM = re.compile(
    r"(double|single)_blocks\.[0-9]{1,4}\.([a-z_]{1,20}\.)?norm\.(query|key)_norm\.scale"
)


def detect(bundle: Bundle) -> bool:
    """Whether a file has pairs of modules in bare Flux names."""
    if weights_of(bundle) is None:
        return False
    named = (_named(part_of(key)) for key in keys_of(bundle)[0])
    return any(part is not None and part.part in "AB" for part in named)


def _named(part: Part | None) -> Part | None:
    first = part.module.split(".")[0] if part is not None else ""
    inside = part is not None and part.module.startswith(BLOCKS) and ".processor." in part.module
    return part if first in NAMES and not inside else None


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """An adapter from its headers; biases are added, norms are set, nothing is scaled."""
    file = weights_of(bundle)
    leaves, metadata = keys_of(bundle)
    if file is None:
        raise error("unknown_type", f"{shown(bundle.name)} holds no tensors in Flux's names")
    reading = Reading(bundle.name, assume)
    say_rest(reading, bundle, file)
    found = grouped(
        reading,
        leaves.values(),
        lambda part: f"diffusion_model.{part.module}" if _named(part) else None,
    )
    for module, parts in found.modules.items():
        take(reading, module, parts)
    for key, leaf in without_twins(reading, found.rest, found.modules).items():
        _norm(reading, key, leaf)
    said_copies(reading, found)
    return reading.adapter(bundle, file, format="bfl", vocabulary="original", metadata=metadata)


def _norm(reading: Reading, key: str, leaf: Leaf) -> None:
    name = unwrapped(key).removeprefix("base_model.model.")
    if leaf.dtype in FLOATS and _NORM.fullmatch(name):
        reading.deltas[f"diffusion_model.{name}"] = Replace(leaf)
    else:
        reading.unexplained([key])
