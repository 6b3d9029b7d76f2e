"""AdapterHub's tensors and config for an adapter: what is written, and what has no place there."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter, Leaf, LowRank, Renormed, Replace
from loratools.errors import Problem, shown
from loratools.formats.grouped import FUSED, gathered
from loratools.views import joined, padded, part, reshaped, scaled

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_CONFIG = "head_config.json"
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
VERSION = "adapters.1.3.0"  # from 1.1.0 on alpha is heeded
# What the reader adds to a config; never written.
ADDED = ("head_config", "method", "base_model_name_or_path")
# Where adapters 1.3.0 puts LoRA: models/*/mixin_*.py and wrappers/interfaces.py.
LETTERS = {
    name: letter
    for letter, names in {
        "q": "query q_proj q_lin query_proj q",
        "k": "key k_proj k_lin key_proj k",
        "v": "value v_proj v_lin value_proj v",
    }.items()
    for name in names.split()
}
_FUSED = FUSED & {"c_attn", "in_proj", "Wqkv", "qkv"}
_MLP = re.compile(
    r"(^|\.)(intermediate\.dense|fc1|fc2|fc_in|fc_out|lin1|lin2|ffn|ffn_output|c_fc|mlp\.c_proj|"
    r"(mlp\.)?(up_proj|down_proj)|mlp\.Wi|mlp\.Wo|wi|wi_1|wo)$"
)
_ATTENTION_OUTPUT = re.compile(r"(^|\.)(\w*attention)\.output\.dense$")
_OUTPUT = re.compile(r"(^|\.)output\.dense$")


@dataclass(slots=True)
class _Layout:
    """What of an adapter goes where: pairs, magnitudes, a head's parameters; and what does not."""

    pairs: dict[str, LowRank] = field(default_factory=dict)
    magnitudes: dict[str, Leaf] = field(default_factory=dict)
    head: dict[str, Leaf] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


def place_of(module: str) -> str | None:
    """Where adapters has LoRA at a module: "q", "k", "v", "qkv", "mlp", or nowhere."""
    last = module.rpartition(".")[2]
    if last in LETTERS:
        return LETTERS[last]
    if last in _FUSED:
        return "qkv"
    output = _OUTPUT.search(module) and not _ATTENTION_OUTPUT.search(module)
    return "mlp" if output or _MLP.search(module) else None


def losses(adapter: Adapter) -> list[Problem]:
    """What AdapterHub's LoRA cannot hold, by name; and what its DoRA does to biases."""
    layout = _layout(adapter)
    found = [
        Problem("loss", f"{shown(key)}: {why}", "error", adapter.name, key)
        for key, why in layout.lost.items()
    ]
    if layout.magnitudes and adapter.format != "adapterhub":
        message = (
            f"{shown(adapter.name)}: DoRA of adapters multiplies a layer's bias too where it runs; "
            "the same for layers without"
        )
        found.append(Problem("loss", message, "warning", adapter.name))
    return found


def _layout(adapter: Adapter) -> _Layout:
    layout = _Layout()
    dora = any(isinstance(d, Renormed) for d in adapter.deltas.values())
    # A head is what lies outside the base model, by the first word of its name.
    within = {k.split(".")[0] for k, d in adapter.deltas.items() if not isinstance(d, Replace)}
    headed = "head_config" in adapter.config
    for key, delta in adapter.deltas.items():
        module, _, parameter = key.rpartition(".")
        match delta:
            case Replace(value=value, rows=None, then=None) if (
                headed and key.split(".")[0] not in within
            ):
                layout.head[key] = value
            case Renormed(delta=LowRank() as pair, axis="out") if parameter == "weight":
                why = _why_not(adapter, key, module, pair, dora=True)
                if why is None:
                    layout.pairs[module], layout.magnitudes[module] = pair, delta.magnitude
                else:
                    layout.lost[key] = why
            case LowRank() as pair if parameter == "weight":
                why = _why_not(adapter, key, module, pair, dora=False)
                if why is None and dora:
                    why = "AdapterHub has DoRA for all modules of an adapter or for none"
                if why is None:
                    layout.pairs[module] = pair
                else:
                    layout.lost[key] = why
            case _:
                what = type(delta).__name__
                layout.lost[key] = f"AdapterHub's LoRA has no place for this {what}"
    return layout


def _why_not(adapter: Adapter, key: str, module: str, pair: LowRank, *, dora: bool) -> str | None:
    place = place_of(module)
    if key in adapter.transposed:
        return "AdapterHub has no LoRA on embeddings"
    if len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        return "AdapterHub has no LoRA on convolutions"
    if place is None:
        return "AdapterHub puts LoRA at query, key, value and the two layers of an MLP alone"
    if place == "qkv" and dora:
        return "AdapterHub has no DoRA on fused projections"
    if place == "qkv" and pair.b.shape[0] % 3:
        return f"its {pair.b.shape[0]} rows are no three equal parts q, k, v"
    return None


# ------------------------------------------------------------------------------- writing


def written(adapter: Adapter, folder: Path) -> dict[str, str]:
    """Write config and weights, and a head that came with them; sha256 by file name."""
    layout = _layout(adapter)
    source = dict(adapter.config) if adapter.format == "adapterhub" else {}
    name = source.get("name")
    name = name if isinstance(name, str) and name and "." not in name else "default"
    tensors, inner = _tensors(layout, source, name)
    unknown = dict.fromkeys(("hidden_size", "model_class", "model_type"))
    base = adapter.config.get("base_model_name_or_path") or ""
    kept = {key: value for key, value in source.items() if key not in ADDED}
    config = {
        **(kept or {**unknown, "model_name": base}),
        "config": inner,
        "name": name,
        "version": VERSION,
    }
    digests = {WEIGHTS[1]: _save(folder / WEIGHTS[1], tensors)}
    digests[CONFIG] = _save_json(folder / CONFIG, config)
    if layout.head:
        digests[HEAD_WEIGHTS[1]] = _save(folder / HEAD_WEIGHTS[1], layout.head)
        digests[HEAD_CONFIG] = _save_json(folder / HEAD_CONFIG, adapter.config["head_config"])
    return digests


def as_read(adapter: Adapter) -> Mapping[str, Leaf] | None:
    """The tensors of a method that is not LoRA, as they stand in AdapterHub's files."""
    if adapter.runtime is not None:
        return adapter.runtime.tensors
    return adapter.original if adapter.format == "adapterhub" and adapter.original else None


def unchanged(adapter: Adapter, tensors: Mapping[str, Leaf], folder: Path) -> dict[str, str]:
    """Write tensors and config as they are, and a head that came with them; sha256 by file name."""
    config = {key: value for key, value in adapter.config.items() if key not in ADDED}
    heads = {
        key: delta.value for key, delta in adapter.deltas.items()
        if isinstance(delta, Replace) and key not in tensors
    }  # fmt: skip
    digests = {WEIGHTS[1]: _save(folder / WEIGHTS[1], tensors)}
    digests[CONFIG] = _save_json(folder / CONFIG, {**config, "version": _version(config)})
    if heads:
        digests[HEAD_WEIGHTS[1]] = _save(folder / HEAD_WEIGHTS[1], heads)
    if "head_config" in adapter.config:
        digests[HEAD_CONFIG] = _save_json(folder / HEAD_CONFIG, adapter.config["head_config"])
    return digests


def _version(config: Mapping[str, Any]) -> object:
    """The version that was read, which tells how a method's numbers are meant; else today's."""
    return config.get("version") or VERSION


def _tensors(
    layout: _Layout, source: Mapping[str, Any], name: str
) -> tuple[dict[str, Leaf], dict[str, Any]]:
    given = source.get("config")
    inner: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    fused = {m: p for m, p in layout.pairs.items() if place_of(m) == "qkv"}
    slots, groups = _grouped(fused)
    pairs = layout.pairs | groups
    ranks = {m: p.b.shape[1] for m, p in pairs.items()}
    rank = max(ranks.values(), default=1)
    dora = bool(layout.magnitudes)
    common = 1.0 if dora else _common([p.scaling for p in pairs.values()])
    tensors: dict[str, Leaf] = {}
    for module, pair in pairs.items():
        stem, more = f"{module}.loras.{name}", rank - ranks[module]
        count = sum(slots) if module in fused else 1
        factor = pair.scaling / common if common else 1.0
        tensors[f"{stem}.lora_A"] = _wider(pair.a, count, ranks[module], more)
        tensors[f"{stem}.lora_B"] = padded(scaled(pair.b, factor), 0, more, axis=1)
        if dora:
            magnitude = layout.magnitudes[module]
            tensors[f"{stem}.m.weight"] = _column(magnitude)
    places = {place_of(m) for m in pairs}
    letters = [letter for letter in "qkv" if letter in places]
    if fused:
        letters = [letter for letter, has in zip("qkv", slots, strict=True) if has]
    mlp = "mlp" in places
    alpha = _alpha(common, rank)
    inner |= {
        "architecture": "lora",
        "r": rank,
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "composition_mode": "add",
        "init_weights": "lora",  # modules that the file lacks begin without an effect
        "use_gating": False,
        "use_dora": dora,
        "vera_d": None,
        "vera_b": None,
        "selfattn_lora": bool(letters),
    }
    old = inner.get("attn_matrices")
    said = [x for x in "qkv" if x in old] if isinstance(old, list) else []
    if (said != letters) if fused else not set(letters) <= set(said):
        inner["attn_matrices"] = letters
    inner.setdefault("attn_matrices", letters)
    # Which of the two a layer counts as differs between architectures: both are switched on.
    if mlp and not (inner.get("intermediate_lora") or inner.get("output_lora")):
        inner["intermediate_lora"] = inner["output_lora"] = True
    for key, usual in (("intermediate_lora", False), ("output_lora", False), ("dropout", 0.0)):
        inner.setdefault(key, usual)
    inner.setdefault("leave_out", [])
    return tensors, inner


def _common(scalings: list[float]) -> float:
    """The scaling that most pairs have: the others' ratio to it goes into their B."""
    found = Counter(s for s in scalings if s)
    return found.most_common(1)[0][0] if found else 0.0


def _alpha(scaling: float, rank: int) -> float:
    """The number whose share by the rank is the scaling, to the last bit where there is one."""
    near = scaling * rank
    some = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((number for number in some if number / rank == scaling), near)


def _grouped(fused: Mapping[str, LowRank]) -> tuple[tuple[bool, ...], dict[str, LowRank]]:
    """Fused pairs in groups: as they were made, or A once for each of q, k, v (exact as well)."""
    for slots in _all_slots():
        blocks = {m: gathered(p.b, slots) for m, p in fused.items()}
        if fused and all(b is not None for b in blocks.values()):
            found = {m: replace(fused[m], b=b) for m, b in blocks.items() if b is not None}
            return slots, found
    three = (True, True, True)
    return three, {m: replace(p, a=joined([p.a] * 3), alpha=None) for m, p in fused.items()}


def _all_slots() -> Iterator[tuple[bool, ...]]:
    every = [s for s in itertools.product((True, False), repeat=3) if any(s)]
    return iter(sorted(every, key=sum, reverse=True))


def _wider(a: Leaf, count: int, rank: int, more: int) -> Leaf:
    """A of `count` groups with rows of zeros behind each group's own."""
    if not more:
        return a
    groups = [part(a, i * rank, (i + 1) * rank) for i in range(count)]
    return joined([padded(group, 0, more) for group in groups])


def _column(magnitude: Leaf) -> Leaf:
    return reshaped(magnitude, magnitude.numel, 1)


def _save(path: Path, tensors: Mapping[str, Leaf]) -> str:
    import torch

    # A dict of tensors alone, each with a storage of its own: no code, nothing shared.
    torch.save({name: leaf.tensor().contiguous().clone() for name, leaf in tensors.items()}, path)
    return _digest(path)


def _save_json(path: Path, config: Mapping[str, Any]) -> str:
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
