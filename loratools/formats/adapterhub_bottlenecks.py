"""AdapterHub's bottlenecks: Pfeiffer's, Houlsby's, parallel ones, and Compacter's expanded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratools.adapter import Leaf, Needs, Runtime
from loratools.errors import shown
from loratools.formats.adapterhub_keys import Part
from loratools.formats.reading import Reading
from loratools.runtime import BOTTLENECK, COMPACTER, hypercomplex, layer_of, zeros

Parts = Mapping[str, tuple[Part, Leaf]]

_DOWN = re.compile(r"adapter_down\.\d\.weight")
_COMPACT = re.compile(r"(adapter_down\.\d)\.(?:b|W|W_left|W_right)$")


def layers_of(parts: Parts) -> tuple[str, ...]:
    found = (layer_of(part.module) for part, _ in parts.values())
    return tuple(dict.fromkeys(layer for layer in found if layer is not None))


def only(values: set[int]) -> int | None:
    return next(iter(values)) if len(values) == 1 else None


def is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def bottleneck(
    reading: Reading, config: Mapping[str, Any], parts: Parts, every: Mapping[str, Parts]
) -> Runtime | None:
    places: dict[str, dict[str, Leaf]] = {}
    stems: dict[str, str] = {}
    for key, (part, leaf) in parts.items():
        places.setdefault(part.module, {})[part.leaf] = leaf
        stems[part.module] = key.removesuffix(part.leaf)
    shared = {part.leaf: leaf for part, leaf in every["shared_parameters"].values()}
    plain: dict[str, Leaf] = {}
    widths: dict[str, int] = {}
    hidden: set[int] = set()
    compact = False
    for place, leaves in places.items():
        stem = stems[place]
        down = next((n for n in leaves if _DOWN.fullmatch(n) and len(leaves[n].shape) == 2), None)
        side = next((found[1] for n in leaves if (found := _COMPACT.match(n))), None)
        if down is None and (side is not None or config.get("phm_layer")):
            compact = True
            sides = {
                s: _weight(leaves, shared, s) for s in (side or "adapter_down.0", "adapter_up")
            }
            for side, made in sides.items():
                if made is None:
                    message = f"{shown(place)}: {side} has no weights or no rules of its own"
                    reading.problem("missing", message, place)
            weights = [made for made in sides.values() if made is not None]
            if len(weights) < 2:
                continue
            plain |= _expanded(stem, leaves, dict(zip(sides, weights, strict=True)))
            pair = weights[0], weights[1]
        else:
            up = leaves.get("adapter_up.weight")
            if down is None or up is None:
                here, lost = ("adapter_down", "adapter_up")[:: -1 if down is None else 1]
                reading.problem("missing", f"{shown(place)} has {here} without {lost}", place)
                continue
            pair = leaves[down], up
            plain |= {stem + name: leaf for name, leaf in leaves.items()}
        if pair[0].shape != pair[1].shape[::-1]:
            message = f"{shown(place)}: down is {pair[0].shape}, up is {pair[1].shape}"
            reading.problem("shape_factors", message, place)
            continue
        widths[place] = pair[0].shape[0]
        hidden.add(pair[0].shape[1])
    if len(hidden) > 1:
        message = f"its places are of several widths: {sorted(hidden)[:8]}"
        reading.problem("shape_factors", message)
    _check_width(reading, config, widths, only(hidden))
    layers = layers_of(parts)
    numbers: dict[str, Any] = {"variant": _variant(config, places)}
    numbers |= {"layers": len(layers), "places": len(places)}
    if widths:
        width = only(set(widths.values()))
        numbers["width"] = width if width is not None else sorted(set(widths.values()))
    factor = config.get("reduction_factor")
    if is_positive(factor):
        numbers["reduction_factor"] = factor
    elif len(hidden) == 1 and isinstance(numbers.get("width"), int) and numbers["width"]:
        numbers["reduction_factor"] = next(iter(hidden)) / numbers["width"]
    if isinstance(config.get("non_linearity"), str):
        numbers["non_linearity"] = shown(config["non_linearity"])
    if compact:
        rules = next((x for x in (*shared.values(), *(leaf for _, leaf in parts.values()))
                      if len(x.shape) == 3), None)  # fmt: skip
        numbers["phm_dim"] = rules.shape[0] if rules is not None else None
    if config.get("use_gating") or any("gate.weight" in leaves for leaves in places.values()):
        numbers["gated"] = True
    if every["invertible_adapters"]:
        numbers["invertible"] = True
    needs = Needs(hidden=only(hidden), modules=layers)
    name = COMPACTER if compact else BOTTLENECK
    return Runtime(name, {}, numbers, needs, None, plain if compact and widths else {})


def _variant(config: Mapping[str, Any], places: Mapping[str, object]) -> str:
    """Houlsby has two to a layer, Pfeiffer one; parallel ones run beside, by the config alone."""
    if config.get("is_parallel") is True:
        return "parallel"
    layers = {layer_of(place) for place in places}
    return "Houlsby" if len(places) > len(layers) else "Pfeiffer"


def _check_width(
    reading: Reading, config: Mapping[str, Any], widths: Mapping[str, int], hidden: int | None
) -> None:
    """The widths against the reduction factor, by adapters' rule: hidden // factor, at least 1."""
    said = config.get("reduction_factor")
    if hidden is None or said is None:
        return
    # By layer the number of a decoder's layers goes on after the encoder's, which no name says.
    some = list(said.values()) if isinstance(said, Mapping) else [said]
    wanted = {
        max(1, int(hidden // f))
        for f in some
        if isinstance(f, int | float) and not isinstance(f, bool) and 1e-6 < f < 1e9
    }
    for place, width in widths.items():
        if wanted and width not in wanted:
            message = (
                f"{shown(place)}: {hidden} reduced by {shown(said)} is {sorted(wanted)[0]}, "
                f"the file has a bottleneck of {width}"
            )
            reading.problem("config_conflict", message, place)
            return


def _weight(leaves: Mapping[str, Leaf], shared: Mapping[str, Leaf], side: str) -> Leaf | None:
    """One Compacter layer's weight (out, in); None where parts of it are absent or do not fit."""
    position = "up" if side == "adapter_up" else "down"
    w = _whole_or_halves(leaves, f"{side}.W") or _whole_or_halves(shared, f"W_{position}")
    rule = _whole_or_halves(leaves, f"{side}.phm_rule") or _whole_or_halves(shared, "phm_rule")
    if w is None or rule is None or any(len(x.shape) != 3 for x in (*w, *rule)):
        return None
    count = rule[0].shape[0]
    square = (rule[0].shape[1], rule[-1].shape[2]) == (count, count)
    if not square or any(x.shape[0] != count for x in (*w, *rule)) or not count:
        return None
    if any(len(x) == 2 and x[0].shape[2] != x[1].shape[1] for x in (w, rule)):
        return None
    return hypercomplex(rule, w)


def _whole_or_halves(leaves: Mapping[str, Leaf], name: str) -> tuple[Leaf, ...] | None:
    if name in leaves:
        return (leaves[name],)
    halves = leaves.get(f"{name}_left"), leaves.get(f"{name}_right")
    return (halves[0], halves[1]) if halves[0] is not None and halves[1] is not None else None


def _expanded(
    stem: str, leaves: Mapping[str, Leaf], weights: Mapping[str, Leaf]
) -> dict[str, Leaf]:
    """The tensors of the plain bottleneck that a Compacter's place is."""
    found = {
        stem + name: leaf for name, leaf in leaves.items() if not name.startswith(tuple(weights))
    }
    for side, weight in weights.items():
        found[f"{stem}{side}.weight"] = weight
        bias = leaves.get(f"{side}.b")  # which plain ones always have
        found[f"{stem}{side}.bias"] = zeros(weight.shape[0]) if bias is None else bias
    return found
