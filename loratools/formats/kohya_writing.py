"""Writing kohya's files: what they cannot hold, by name, and one safetensors of the rest."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

from loratools.adapter import (
    Adapter,
    Dense,
    Kind,
    Leaf,
    LowRank,
    Renormed,
    Replace,
    Rotated,
)
from loratools.containers import hashes, safetensors
from loratools.errors import Problem, shown
from loratools.formats.kohya_keys import OFT, prefix_of
from loratools.formats.kohya_metadata import fresh
from loratools.formats.lycoris_writing import KOHYA, Bytes, alpha, held, parts_of
from loratools.views import reshaped, scaled

SET = ".set_weight"


def lost(adapter: Adapter) -> list[Problem]:
    """What a kohya file cannot hold of this adapter, by name, with what to do instead."""
    found = []
    for key, delta in adapter.deltas.items():
        why = _why_not(adapter, key, delta)
        if why is not None:
            message, remedy = why
            text = f"{shown(key)}: {message}"
            found.append(Problem("loss", text, "error", adapter.name, key, remedy))
    return found


def _why_not(adapter: Adapter, key: str, delta: Kind) -> tuple[str, str | None] | None:
    """Why a delta has no place in a kohya file and the remedy; None where it has one."""
    module, _, parameter = key.rpartition(".")
    if "." in module or not prefix_of(module):
        return "no kohya name is known for it", None
    if key in adapter.transposed:
        text = "its weight is stored (in, out), which kohya's readers do not know"
        return text, "fold it into the base"
    match delta:
        case LowRank():
            return None if parameter == "weight" else ("kohya's pairs are of a weight only", None)
        case Dense():
            fits = parameter in ("weight", "bias")
            return None if fits else ("only differences of a weight or a bias have a key", None)
        case Renormed(delta=inner):
            fits = parameter == "weight" and (isinstance(inner, LowRank) or held(delta))
            return (
                None if fits else ("magnitudes have a key only beside a pair, LoHa or LoKr", None)
            )
        case Replace(value=value, rows=None, then=None) if value.name.endswith(SET):
            return None  # ComfyUI's alone: from such a file it may stay what it was
        case Replace(rows=None):
            text = "a whole module trained in full; kohya's files hold differences"
            return text, "fold it into the base, and publish that"
        case Replace():
            return "trained token rows", "fold them into the base, or keep them in a PEFT adapter"
        case _ if held(delta):
            what = type(delta).__name__
            return None if parameter == "weight" else (f"a {what} of a {parameter}", None)
        case _:
            return f"a {type(delta).__name__}", "fold it into the base"


def write(adapter: Adapter, out: Path) -> dict[str, str]:
    """Write one safetensors file; what `lost` names is left out. Its sha256 by its name.

    Factors stand as they are; alpha is the stored one, or scaling · rank, as one F32 number (F64
    where F32 would change it).
    """
    tensors = hashes.as_the_library(disassemble(adapter))
    kept = {k: d for k, d in adapter.deltas.items() if _why_not(adapter, k, d) is None}
    metadata = fresh(adapter, kept, tensors)
    return {out.name: safetensors.write(out, tensors, metadata)}


def disassemble(adapter: Adapter) -> dict[str, Leaf]:
    """The tensors of a kohya file, by key."""
    tensors: dict[str, Leaf] = {}
    for key, delta in adapter.deltas.items():
        if _why_not(adapter, key, delta) is None:
            module, _, parameter = key.rpartition(".")
            tensors |= _parts(module, parameter, delta, adapter.deltas)
    padded = adapter.config.get("reshape_weight")
    for module, shape in padded.items() if isinstance(padded, Mapping) else ():
        if f"{module}.lora_up.weight" in tensors:
            name = f"{module}.reshape_weight"
            raw = struct.pack(f"<{len(shape)}q", *shape)
            tensors[name] = Leaf(name, "I64", (len(shape),), source=Bytes(raw))
    return tensors


def _parts(module: str, parameter: str, delta: Kind, deltas: Mapping[str, Kind]) -> dict[str, Leaf]:
    """The tensors of one delta."""
    match delta:
        case LowRank(a=a, b=b):
            return {
                f"{module}.lora_down.weight": a,
                f"{module}.lora_up.weight": b,
                f"{module}.alpha": alpha(delta.alpha, delta.rank, delta.scaling),
            }
        case Renormed(delta=LowRank() as pair, magnitude=magnitude, axis=axis):
            ones = (1,) * (len(pair.a.shape) - 1)
            shape = (magnitude.numel, *ones) if axis == "out" else (1, magnitude.numel, *ones[1:])
            parts = _parts(module, parameter, pair, deltas)
            return parts | {f"{module}.dora_scale": reshaped(magnitude, *shape)}
        case Dense(diff=diff, scaling=scaling):
            beside = deltas.get(f"{module}.weight") if parameter == "bias" else delta
            norm = isinstance(beside, Dense) and len(beside.diff.shape) == 1
            names = {"weight": ("diff", "w_norm"), "bias": ("diff_b", "b_norm")}[parameter]
            return {f"{module}.{names[norm]}": scaled(diff, scaling)}
        case Replace(value=value):
            return {module + SET: value}
        case _:
            if isinstance(delta, Rotated) and delta.method == KOHYA:
                module = OFT + module.removeprefix("lora_unet_")
            return {f"{module}.{name}": leaf for name, leaf in parts_of(delta).items()}
