"""AdapterHub's key grammar and config: which method a key belongs to, and what its numbers are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter import Leaf
from loratools.errors import shown

LORAS, HEADS = "loras", "heads"
GROUPS = (
    LORAS, "adapters", "prefix_tunings", "prefix_gates", "prompt_tunings", "refts",
    "shared_parameters", "invertible_adapters", "adapter_fusion_layer",
)  # fmt: skip
# Before adapter-transformers 2 (adapter-hub/adapters:loading.py legacy_weights_mapping).
LEGACY = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
# Of one LoRA; those of its relatives (IA3, VeRA, MTL-LoRA, gated) are in `RELATIVES`.
PARTS = ("lora_A", "lora_B", "m.weight")
RELATIVES = ("gate.", "vera_", "weights", "task_specific.")


@dataclass(frozen=True, slots=True)
class Part:
    """What one key names: a leaf of the method `group`, of the adapter `name`, at `module`."""

    module: str
    group: str
    name: str
    leaf: str


@dataclass(frozen=True, slots=True)
class Method:
    """A method by its name, the numbers that describe it, and whether a weight can take it in."""

    name: str
    numbers: Mapping[str, Any]
    foldable: bool

    def __str__(self) -> str:
        listed = ", ".join(f"{k.replace('_', ' ')} {shown(v)}" for k, v in self.numbers.items())
        return f"{self.name} ({listed})" if listed else self.name


def part_of(key: str) -> Part | None:
    """A key in the grammar of specs/formats/adapterhub.md; None for what is none of it."""
    pieces = key.split(".")
    if pieces[0] == HEADS and len(pieces) > 2:
        return Part(HEADS, HEADS, pieces[1], ".".join(pieces[2:]))
    # The last such word counts: what stands before it is a path, which may use the word too. A
    # bare model (BertModel) has nothing before it: `invertible_adapters.N.F.0.weight`.
    for i in range(len(pieces) - 3, -1, -1):
        group = LEGACY.get(pieces[i], pieces[i])
        if group in GROUPS:
            module, leaf = ".".join(pieces[:i]), ".".join(pieces[i + 2 :])
            return Part(module, group, pieces[i + 1], leaf)
    return None


def is_adapterhub(key: str) -> bool:
    """Whether a key alone tells AdapterHub: other libraries have modules called adapters too."""
    part = part_of(key)
    if part is None or part.group == HEADS:
        return False
    if part.group == LORAS:
        return part.leaf in PARTS or part.leaf.startswith(RELATIVES)
    if part.group == "adapters":
        return part.leaf.startswith(("adapter_down.", "adapter_up."))
    return part.group in ("prefix_tunings", "prompt_tunings", "refts")


def is_faulty(version: object) -> bool:
    """Whether a file is of adapters before 1.1.0, whose LoRA ran without its scaling.

    adapter-hub/adapters pull 770; the bare versions of adapter-transformers are not meant.
    """
    found = re.match(r"adapters\.(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?(.{0,20})", str(version)[:60])
    if found is None:
        return False
    number = tuple(int(piece or 0) for piece in found.groups()[:3])
    early = re.match(r"[.-]?(dev|a|b|rc)\d*", found[4]) is not None
    return number < (1, 1, 0) or (number == (1, 1, 0) and early)


def method_of(config: Mapping[str, Any], parts: Mapping[str, tuple[Part, Leaf]]) -> Method:
    """The method of an adapter: by its config, or by its keys where there is none.

    `parts` are the tensors with their keys taken apart.
    """
    groups = {part.group for part, _ in parts.values()}
    leaves = {part.leaf for part, _ in parts.values() if part.group == LORAS}
    architecture = config.get("architecture")
    if architecture == "union" or len(groups & {LORAS, "adapters", "prefix_tunings", "refts"}) > 1:
        some = config.get("configs")
        inner = [c for c in some if isinstance(c, Mapping)] if isinstance(some, list) else []
        names = [method_of(c, {}).name for c in inner] or sorted(groups)
        return Method("union", {"of": " + ".join(names)}, False)
    if "adapter_fusion_layer" in groups:
        return Method("AdapterFusion", {"layers": _places(parts, "adapter_fusion_layer")}, False)
    if architecture == "mtl_lora" or any(leaf.startswith("task_specific.") for leaf in leaves):
        return Method("MTL-LoRA", _picked(config, "r", "alpha", "n_up_projection"), True)
    if architecture == "lora" or leaves:
        return _lora(config, leaves)
    if architecture == "prefix_tuning" or "prefix_tunings" in groups:
        return Method("prefix tuning", _picked(config, "prefix_length", "flat"), False)
    if architecture == "prompt_tuning" or "prompt_tunings" in groups:
        return Method("prompt tuning", _picked(config, "prompt_length", "combine"), False)
    if architecture == "reft" or "refts" in groups:
        return Method("ReFT", _picked(config, "r", "prefix_positions", "suffix_positions"), False)
    if architecture not in (None, "bottleneck"):
        return Method(f"architecture {shown(architecture)}", {}, True)
    return _bottleneck(config, parts)


def _lora(config: Mapping[str, Any], leaves: set[str]) -> Method:
    numbers = _picked(config, "r", "alpha")
    if config.get("composition_mode") == "scale" or leaves == {"lora_B"}:
        return Method("IA3", {}, True)
    # The library looks at the type of the two: a float makes it VeRA.
    if any(isinstance(config.get(k), float) for k in ("vera_d", "vera_b")) or "vera_D" in leaves:
        return Method("DVoRA" if config.get("use_dora") else "VeRA", numbers, True)
    if config.get("use_gating") or any(leaf.startswith("gate.") for leaf in leaves):
        return Method("gated LoRA", numbers, False)
    if config.get("use_dora") or "m.weight" in leaves:
        return Method("DoRA", numbers, True)
    return Method("LoRA", numbers, True)


def _bottleneck(config: Mapping[str, Any], parts: Mapping[str, tuple[Part, Leaf]]) -> Method:
    """Pfeiffer, Houlsby, parallel, Compacter: their width stands in the tensors alone."""
    compact = bool(config.get("phm_layer"))
    widths = {
        leaf.shape[0]
        for part, leaf in parts.values()
        if part.group == "adapters"
        and re.fullmatch(r"adapter_down\.\d\.weight", part.leaf)
        and len(leaf.shape) == 2
    }
    listed = ", ".join(str(width) for width in sorted(widths)[:8])
    numbers: dict[str, Any] = {"widths": listed} if len(widths) > 1 else {}
    if len(widths) == 1:
        numbers["width"] = next(iter(widths))
    numbers |= _picked(config, "reduction_factor", *(("phm_dim",) if compact else ()))
    if any(part.group == "adapters" for part, _ in parts.values()):
        numbers["places"] = _places(parts, "adapters")
    if any(part.group == "invertible_adapters" for part, _ in parts.values()):
        numbers["invertible"] = True
    return Method("Compacter" if compact else "bottleneck", numbers, False)


def _places(parts: Mapping[str, tuple[Part, Leaf]], group: str) -> int:
    return len({part.module for part, _ in parts.values() if part.group == group})


def _picked(config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: config[name] for name in names if config.get(name) is not None}
