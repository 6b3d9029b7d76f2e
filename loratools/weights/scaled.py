"""Weights stored as 8-bit floats with their scale beside them (ComfyUI's scaled fp8)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratools.adapter import Leaf
from loratools.containers.strict_json import loads
from loratools.errors import LoratoolsError

FP8 = ("F8_E4M3", "F8_E5M2")
# The first scheme's and the present one's (ComfyUI:comfy/utils.py, convert_old_quants).
SCALES = ("scale_weight", "weight_scale")
# Scales of what a layer takes in, and which scheme it has.
BESIDE = (*SCALES, "scale_input", "input_scale", "comfy_quant")
# With one of these the numbers mean something else.
OTHER = ("weight_scale_2", "pre_quant_scale")
NUMBERS = ("F32", "F16", "BF16")  # of a scale
MARK = "scaled_fp8"  # an empty tensor that says so of the whole file
LAYERS = "_quantization_metadata"


def is_companion(name: str) -> bool:
    """Whether a tensor only belongs to a quantised weight."""
    return name.rpartition(".")[2] in (*BESIDE, *OTHER, MARK)


def with_scales(leaves: Mapping[str, Leaf], metadata: Mapping[str, str]) -> dict[str, Leaf]:
    """The leaves; those of 8-bit floats know the number that theirs are to be multiplied with.

    Only where the file says that it is of this scheme: without a mark ComfyUI ignores the scales,
    and other programs have other schemes under these names.
    """
    fronts = tuple(n.removesuffix(MARK) for n in leaves if n.rpartition(".")[2] == MARK)
    said = _layers(metadata)

    def seen(name: str, leaf: Leaf) -> Leaf:
        layer, _, parameter = name.rpartition(".")
        if parameter != "weight" or leaf.dtype not in FP8 or leaf.source is None or leaf.strides:
            return leaf
        if not (layer.startswith(fronts) or layer in said or f"{layer}.comfy_quant" in leaves):
            return leaf
        if any(f"{layer}.{other}" in leaves for other in OTHER):
            return leaf
        scales = [each for key in SCALES if (each := leaves.get(f"{layer}.{key}")) is not None]
        if len(scales) != 1 or scales[0].numel != 1 or scales[0].dtype not in NUMBERS:
            return leaf
        return replace(leaf, scale=scales[0])

    return {name: seen(name, leaf) for name, leaf in leaves.items()}


def unscaled(leaves: Mapping[str, Leaf]) -> set[str]:
    """The tensors that have no meaning once all scaled weights are written as their values."""
    layers = {name.rpartition(".")[0] for name, leaf in leaves.items() if leaf.scale is not None}
    gone = {f"{layer}.{key}" for layer in layers for key in BESIDE}
    gone |= {name for name in leaves if layers and name.rpartition(".")[2] == MARK}
    return gone & leaves.keys()


def unread(leaves: Mapping[str, Leaf]) -> str | None:
    """A weight of 8-bit floats beside scales of a scheme that is none of these."""
    for name, leaf in leaves.items():
        layer, _, parameter = name.rpartition(".")
        if parameter == "weight" and leaf.dtype in FP8 and leaf.scale is None:
            beside = (*SCALES, *OTHER, "weight_scale_inv")
            if any(f"{layer}.{key}" in leaves for key in beside):
                return name
    return None


def described(metadata: Mapping[str, str], leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """Metadata that no longer calls layers quantised which are written as their values."""
    layers = _layers(metadata)
    if not layers:
        return dict(metadata)
    done = {name.rpartition(".")[0] for name, leaf in leaves.items() if leaf.scale is not None}
    kept = {
        layer: said
        for layer, said in layers.items()
        if not any(name == layer or name.endswith(f".{layer}") for name in done)
    }
    rest = {key: value for key, value in metadata.items() if key != LAYERS}
    return {**rest, LAYERS: json.dumps({"layers": kept})} if kept else rest


def _layers(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """The quantised layers that a file's metadata lists."""
    try:
        table = loads(metadata[LAYERS].encode(), LAYERS) if LAYERS in metadata else {}
    except LoratoolsError:
        return {}
    layers = table.get("layers") if isinstance(table, dict) else None
    return layers if isinstance(layers, dict) else {}
