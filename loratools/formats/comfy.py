"""ComfyUI's own names, `diffusion_model.` and the module: ai-toolkit and video trainers."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.adapter import Adapter
from loratools.containers.bundle import Bundle
from loratools.errors import error, shown
from loratools.formats.image_keys import (
    Part,
    clip_module,
    grouped,
    is_kohya,
    keys_of,
    part_of,
    said_copies,
    say_rest,
    take,
    weights_of,
    without_twins,
)
from loratools.formats.reading import Reading

FRONT = "diffusion_model."
# A checkpoint's front before it, which some extractors leave there.
WHOLE = "model.diffusion_model."
# Text encoders beside it, in ComfyUI's names or diffusers'.
TEXT = ("text_encoders.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
# Parts that no checkpoint has, each enough to know an adapter by.
SURE = ("A", "B", "diff", "diff_b", "diff_m", "set")
OTHERS = ("other LoKr", "other LoHa", "other OFT", "other GLoRA")


def detect(bundle: Bundle) -> bool:
    """Whether a file has adapter tensors of modules under `diffusion_model.`."""
    if weights_of(bundle) is None:
        return False
    return any(_is_ours(key) for key in keys_of(bundle)[0])


def _is_ours(key: str) -> bool:
    if FRONT not in key or ".processor." in key:
        return False
    part = part_of(key)
    if part is None or not part.module.startswith((FRONT, WHOLE)):
        return False
    return part.part in SURE or part.part.startswith(OTHERS)


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """An adapter from its headers, under the file's own names."""
    file = weights_of(bundle)
    leaves, metadata = keys_of(bundle)
    if file is None:
        raise error("unknown_type", f"{shown(bundle.name)} holds no tensors in ComfyUI's names")
    reading = Reading(bundle.name, assume)
    say_rest(reading, bundle, file)
    there = {p.module for key in leaves if (p := part_of(key)) and p.module.startswith(FRONT)}
    found = grouped(reading, leaves.values(), lambda part: _module(part, there))
    for module, parts in found.modules.items():
        take(reading, module, parts)
    reading.unexplained(list(without_twins(reading, found.rest, found.modules)))
    said_copies(reading, found)
    return reading.adapter(bundle, file, format="comfy", vocabulary="original", metadata=metadata)


def _module(part: Part, there: set[str]) -> str | None:
    """A part's address; a `transformer.` twin of a module that is there has that one's."""
    if part.module.startswith((FRONT, *TEXT)):
        return part.module
    if is_kohya(part):
        return clip_module(part)
    if part.module.startswith(WHOLE):
        return part.module.removeprefix("model.")
    twin = FRONT + part.module.removeprefix("transformer.")
    return twin if part.module.startswith("transformer.") and twin in there else None
