"""AdapterHub's methods that no weight can take in: read, checked against themselves, described."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratools.adapter import FLOATS, Leaf, Needs, Runtime
from loratools.errors import error, shown
from loratools.formats.adapterhub_bottlenecks import (
    Parts,
    bottleneck,
    is_positive,
    layers_of,
    only,
)
from loratools.formats.adapterhub_keys import LORAS, Method
from loratools.formats.reading import Reading
from loratools.runtime import (
    ACTIVATIONS,
    BOTTLENECK,
    COMPACTER,
    PREFIX,
    PROMPT,
    UNION,
    layer_of,
    projected,
)
from loratools.views import reshaped

_SIDE = r"(?:adapter_down\.\d|adapter_up)"
_BOTTLENECK = re.compile(
    rf"{_SIDE}\.(?:weight|bias|W|W_left|W_right|b|phm_rule|phm_rule_left|phm_rule_right)"
    r"|adapter_norm_(?:before|after)\.(?:weight|bias)|gate\.(?:weight|bias)|scaling"
)
_PREFIX = re.compile(r"(\w{1,60})\.(wte\.weight|control_trans(?:\.[02]\.(?:weight|bias))?)")
_REFT = re.compile(
    r"units\.\d{1,3}\.(?:learned_source\.(?:weight|bias)|projection\.(?:weight|"
    r"parametrizations\.weight\.(?:original|0\.base|0\.original)))"
)
_LORA = re.compile(r"lora_[AB]|m\.weight|gate\.(?:weight|bias)|vera_[DB]|weights|task_specific\..+")
_SHARED = re.compile(r"phm_rule(?:_left|_right)?|W_(?:down|up)(?:_left|_right)?|lora_[AB]")
_INVERTIBLE = re.compile(r"[\w.]{1,100}")
_LEAVES = {
    "adapters": _BOTTLENECK,
    "prefix_tunings": _PREFIX,
    "prefix_gates": re.compile(r"weight|bias"),
    "prompt_tunings": re.compile(r"prompt_embedding\.weight"),
    "refts": _REFT,
    "shared_parameters": _SHARED,
    "invertible_adapters": _INVERTIBLE,
    "adapter_fusion_layer": re.compile(r"(?:query|key|value|dense)\.(?:weight|bias)"),
    LORAS: _LORA,
}


def runtime_of(
    reading: Reading, config: Mapping[str, Any], method: Method, parts: Parts
) -> Runtime:
    """The method with all its tensors; what contradicts itself becomes a problem each."""
    for key, (part, leaf) in parts.items():
        if not _LEAVES[part.group].fullmatch(part.leaf):
            reading.unexplained([key])
        elif leaf.dtype not in FLOATS:
            raise error("dtype_unusable", f"{shown(key)} is {leaf.dtype}, not floats")
    some = {group: {k: v for k, v in parts.items() if v[0].group == group} for group in _LEAVES}
    found = [
        made
        for group, make in _METHODS.items()
        if some[group]
        and (made := make(reading, _config_of(config, group), some[group], some)) is not None
    ]
    tensors = {key: leaf for key, (_, leaf) in parts.items()}
    if not found:
        return Runtime(method.name, tensors, dict(method.numbers))
    if method.name != UNION:
        one = found[0]
        name = one.method if method.name in (BOTTLENECK, COMPACTER) else method.name
        plain = {**one.plain}
        if plain:  # a language adapter's invertible half stays what it is
            plain |= {key: leaf for key, (_, leaf) in some["invertible_adapters"].items()}
        return Runtime(name, tensors, one.numbers, one.needs, one.virtual, plain)
    each = [{"method": one.method, **one.numbers} for one in found]
    needs = Needs(
        hidden=next((r.needs.hidden for r in found if r.needs.hidden), None),
        prefix=next((r.needs.prefix for r in found if r.needs.prefix), None),
        layers=next((r.needs.layers for r in found if r.needs.layers), None),
        modules=tuple(dict.fromkeys(m for r in found for m in r.needs.modules)),
    )
    return Runtime(UNION, tensors, {"parts": each}, needs)


def _config_of(config: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    """The config of one method in a union, the config itself elsewhere."""
    inner = config.get("configs")
    if config.get("architecture") != UNION or not isinstance(inner, list):
        return config
    wanted = {
        "prefix_tunings": ("prefix_tuning",), "prompt_tunings": ("prompt_tuning",),
        "refts": ("reft",), LORAS: ("lora", "mtl_lora"),
    }.get(group, (None, "bottleneck"))  # fmt: skip
    some = [c for c in inner if isinstance(c, Mapping) and c.get("architecture") in wanted]
    return some[0] if some else {}


# ------------------------------------------------------------------------------- the others


def _prefix(
    reading: Reading, config: Mapping[str, Any], parts: Parts, every: Mapping[str, Parts]
) -> Runtime | None:
    found: dict[str, dict[str, Leaf]] = {}  # by location: the root's, else the first layer's copy
    pools: set[str] = set()
    for part, leaf in sorted(parts.values(), key=lambda p: p[0].module.endswith(".pool")):
        name = _PREFIX.fullmatch(part.leaf)
        if part.module.endswith(".pool"):
            pools.add(part.module)
        if name is None:
            continue
        one = found.setdefault(name[1], {}).setdefault(name[2], leaf)
        if one.shape != leaf.shape:
            message = f"{shown(part.leaf)}: {one.shape} in one layer, {leaf.shape} in another"
            reading.problem("shape_factors", message, part.module)
    said = config.get("prefix_length")
    length: int | None = said if type(said) is int and said > 0 else None
    made = {place: _rows(reading, place, leaves, length, config) for place, leaves in found.items()}
    rows = [x for x in made.values() if x is not None]
    if not rows:
        return None
    alone = len(made) == 1
    layers = len(pools) if alone and pools else None
    gated = bool(every["prefix_gates"] or config.get("use_gating"))
    numbers: dict[str, Any] = {"virtual_tokens": rows[0].shape[0]}
    if layers is not None:
        numbers["layers"] = layers
    if layers is not None and not rows[0].shape[1] % (2 * layers):
        numbers["key_width"] = rows[0].shape[1] // (2 * layers)
    numbers |= {"flat": all("control_trans" in x for x in found.values())}
    numbers |= {"locations": sorted(made)} | ({"gated": True} if gated else {})
    inner = next((x["wte.weight"] for x in found.values() if "wte.weight" in x), None)
    needs = Needs(
        hidden=inner.shape[1] if inner is not None and len(inner.shape) == 2 else None,
        prefix=rows[0].shape[1] if alone else None,
        layers=layers,
        modules=tuple(dict.fromkeys(x for p in sorted(pools) if (x := layer_of(p)))),
    )
    return Runtime(PREFIX, {}, numbers, needs, rows[0] if alone and not gated else None)


def _rows(
    reading: Reading,
    place: str,
    leaves: Mapping[str, Leaf],
    length: int | None,
    config: Mapping[str, Any],
) -> Leaf | None:
    """What one location's prefix comes to: (tokens, 2 · layers · width of its keys)."""
    flat = leaves.get("control_trans")
    if flat is not None:
        if length is None or flat.numel % length or not flat.numel:
            message = f"{shown(place)}: {flat.numel} numbers are no {length or '?'} virtual tokens"
            reading.problem("config_conflict", message, place)
            return None
        return reshaped(flat, length, flat.numel // length)
    names = ["wte.weight", *(f"control_trans.{i}.{x}" for i in (0, 2) for x in ("weight", "bias"))]
    some = [leaves[name] for name in names if name in leaves]
    if len(some) < len(names):
        lost = next(name for name in names if name not in leaves)
        reading.problem("missing", f"{shown(place)} has no {lost}", place)
        return None
    rows, down, down_bias, up, up_bias = some
    fits = len(rows.shape) == len(down.shape) == len(up.shape) == 2 and (
        rows.shape[1] == down.shape[1]
        and up.shape[1] == down.shape[0] == down_bias.numel
        and up.shape[0] == up_bias.numel
    )
    if not fits:
        message = f"{shown(place)}: {rows.shape}, {down.shape}, {up.shape} are no chain of layers"
        reading.problem("shape_factors", message, place)
        return None
    if length is not None and length != rows.shape[0]:
        message = f"config says prefix_length={length}, the file has {rows.shape[0]} rows"
        reading.problem("config_conflict", message, place)
    activation = str(config.get("non_linearity", "tanh")).lower()
    if activation not in ACTIVATIONS:
        message = f"non_linearity {shown(activation)} is not known here; it can only be kept as is"
        reading.problem("unknown_config", message, place, "note")
        return _unknown(up, rows)
    return projected(rows, down, down_bias, up, up_bias, activation)


def _unknown(up: Leaf, rows: Leaf) -> Leaf:
    def refuse() -> Any:
        raise error("unknown_config", f"{shown(rows.name)}: its non_linearity is not known here")

    return Leaf(rows.name, rows.dtype, (rows.shape[0], up.shape[0]), made=refuse)


def _prompt(
    reading: Reading, config: Mapping[str, Any], parts: Parts, every: Mapping[str, Parts]
) -> Runtime | None:
    leaf = next(iter(parts.values()))[1]
    if len(leaf.shape) != 2 or 0 in leaf.shape:
        reading.problem("shape_factors", f"{shown(leaf.name)} is {leaf.shape}, expected (n, width)")
        return None
    said = config.get("prompt_length")
    if said is not None and said != leaf.shape[0]:
        message = f"config says prompt_length={shown(said)}, the file has {leaf.shape[0]} rows"
        reading.problem("config_conflict", message)
    numbers = {"virtual_tokens": leaf.shape[0], "width": leaf.shape[1]}
    if isinstance(config.get("combine"), str):
        numbers["combine"] = config["combine"]
    return Runtime(PROMPT, {}, numbers, Needs(embedding=leaf.shape[1]), leaf)


def _reft(
    reading: Reading, config: Mapping[str, Any], parts: Parts, every: Mapping[str, Parts]
) -> Runtime | None:
    sources = [
        x for p, x in parts.values() if p.leaf.endswith("source.weight") and len(x.shape) == 2
    ]
    ranks, hidden = {x.shape[0] for x in sources}, {x.shape[1] for x in sources}
    said = config.get("r")
    if type(said) is int and ranks and ranks != {said}:
        message = f"config says r={said}, the file has {sorted(ranks)[:8]}"
        reading.problem("config_conflict", message)
    layers = layers_of(parts)
    numbers: dict[str, Any] = {"rank": only(ranks), "layers": len(layers)}
    for name in ("prefix_positions", "suffix_positions", "orthogonality", "tied_weights"):
        if isinstance(config.get(name), bool | int):
            numbers[name] = config[name]
    return Runtime("ReFT", {}, numbers, Needs(hidden=only(hidden), modules=layers))


def _fusion(
    reading: Reading, config: Mapping[str, Any], parts: Parts, every: Mapping[str, Parts]
) -> Runtime | None:
    hidden = {
        x.shape[1] for p, x in parts.values() if p.leaf.endswith("weight") and len(x.shape) == 2
    }
    names = sorted({name for part, _ in parts.values() for name in part.name.split(",")})
    layers = layers_of(parts)
    numbers = {"of": [shown(n) for n in names], "layers": len(layers)}
    return Runtime("AdapterFusion", {}, numbers, Needs(hidden=only(hidden), modules=layers))


def _gated(
    reading: Reading, config: Mapping[str, Any], parts: Parts, every: Mapping[str, Parts]
) -> Runtime | None:
    ranks = {x.shape[-1] for p, x in parts.values() if p.leaf == "lora_B" and len(x.shape) > 1}
    layers = layers_of(parts)
    gated = any(p.leaf.startswith("gate.") for p, _ in parts.values())
    numbers: dict[str, Any] = {"rank": only(ranks), "layers": len(layers)}
    if is_positive(config.get("alpha")):
        numbers["alpha"] = config["alpha"]
    return Runtime("gated LoRA" if gated else "LoRA", {}, numbers, Needs(modules=layers))


_METHODS = {
    "adapters": bottleneck,
    "prefix_tunings": _prefix,
    "prompt_tunings": _prompt,
    "refts": _reft,
    "adapter_fusion_layer": _fusion,
    LORAS: _gated,
}
