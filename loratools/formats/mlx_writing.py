"""MLX's tensors and config for an adapter: what is written, and what MLX has no place for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter, Experts, Kind, Leaf, LowRank, Renormed, Replace, leaves
from loratools.containers import safetensors
from loratools.errors import Problem, shown
from loratools.views import later, padded, renamed, reshaped, scaled, turned

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
BASE = "base_model_name_or_path"

# What MLX reads as numbers: float64 and 8-bit floats it does not.
NATIVE = ("F32", "F16", "BF16")


def lost(adapter: Adapter) -> list[Problem]:
    """What MLX cannot hold: mixtures of its three types, other kinds, wide and tiny dtypes."""
    kind = _type(adapter)
    problems: list[Problem] = []

    def loss(key: str, message: str) -> None:
        text = f"{shown(key)}: {message}"
        problems.append(Problem("loss", text, "error", adapter.name, key))

    for key, delta in adapter.deltas.items():
        why = _refused(key, delta, kind, embedding=key in adapter.transposed)
        if why:
            loss(key, why)
        elif any(leaf.dtype == "F64" for leaf in leaves(delta)):
            loss(key, "MLX reads no float64, it is rounded to float32 (--dtype fp32 says so)")
    return problems


def _type(adapter: Adapter) -> str:
    """fine_tune_type of what is written: a file has one, so the most frequent decides."""
    counts = Counter(
        "dora"
        if isinstance(d, Renormed)
        else "lora"
        if isinstance(d, LowRank | Experts)
        else "full"
        for d in adapter.deltas.values()
        if isinstance(d, LowRank | Experts | Renormed)
        or (isinstance(d, Replace) and d.then is None)
    )
    if counts["lora"] or counts["dora"]:
        return "dora" if counts["dora"] >= counts["lora"] else "lora"
    return "full" if counts["full"] else "lora"


def _refused(key: str, delta: Kind, kind: str, *, embedding: bool) -> str | None:
    """Why a delta has no place in a file of this fine_tune_type."""
    match delta:
        case LowRank(a=a):
            if not key.endswith(".weight"):
                return "MLX names factors after modules; this is another parameter than weight"
            if len(a.shape) != 2:
                return "MLX has no factors for convolutions"
            return None if kind == "lora" else f"a plain pair in an adapter written as {kind}"
        case Experts():
            if delta.over != "in" or not key.endswith(".weight"):
                return "which side of the experts A is on is known with their base only"
            return None if kind == "lora" else f"a stack of experts in an adapter written as {kind}"
        case Renormed(delta=LowRank() as inner, axis=axis):
            if axis != ("in" if embedding else "out"):
                return "MLX has magnitudes per row of the stored weight only"
            if kind != "dora":
                return f"magnitudes (DoRA) in an adapter written as {kind}"
            return _refused(key, inner, "lora", embedding=embedding)
        case Renormed():
            return "MLX has magnitudes over low-rank updates only"
        case Replace(rows=None, then=None):
            full = kind == "full"
            return None if full else f"a parameter in full in an adapter written as {kind}"
        case _:
            return f"MLX has no place for this {type(delta).__name__}"


def write(adapter: Adapter, folder: Path) -> dict[str, str]:
    """Write adapters.safetensors and adapter_config.json into a folder; sha256 by file name.

    One rank and one scale hold for the whole file: smaller ranks get zeros, other scalings go
    into lora_b, in float32.
    """
    kind = _type(adapter)
    kept = {
        key: delta
        for key, delta in adapter.deltas.items()
        if not _refused(key, delta, kind, embedding=key in adapter.transposed)
    }
    tensors: dict[str, Leaf] = {}
    pairs: dict[str, LowRank | Experts] = {}
    for key, delta in kept.items():
        module = key.removesuffix(".weight")
        match delta:
            case LowRank() | Experts():
                pairs[module] = delta
            case Renormed(delta=LowRank() as inner, magnitude=m):
                pairs[module] = inner
                tensors[f"{module}.m"] = reshaped(m, m.numel)
            case Replace(value=value):
                tensors[key] = value
    rank = max((pair.rank for pair in pairs.values()), default=0)
    scale = _common(pairs)
    for module, pair in pairs.items():
        b = pair.b if pair.scaling == scale else scaled(pair.b, pair.scaling / scale)
        more = rank - pair.rank
        if isinstance(pair, Experts):
            tensors[f"{module}.lora_a"] = padded(pair.a, 0, more, axis=1)
            tensors[f"{module}.lora_b"] = padded(b, 0, more, axis=2)
            continue
        tensors[f"{module}.lora_a"] = turned(padded(pair.a, 0, more))
        tensors[f"{module}.lora_b"] = turned(padded(b, 0, more, axis=1))
    held = {name: renamed(_readable(leaf), name) for name, leaf in tensors.items()}
    config = _config_for(adapter, kind, pairs or [k.rpartition(".")[0] for k in kept], rank, scale)
    text = json.dumps(config, indent=4, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    metadata = adapter.metadata if adapter.format == "mlx" else {}
    return {WEIGHTS: safetensors.write(folder / WEIGHTS, held, metadata)}


def _common(pairs: Mapping[str, LowRank | Experts]) -> float:
    """The scaling that most pairs have; of equally frequent ones the first, 0 only if all are."""
    counts = Counter(pair.scaling for pair in pairs.values() if pair.scaling)
    return counts.most_common(1)[0][0] if counts else 0.0


def _readable(leaf: Leaf) -> Leaf:
    """The leaf in a dtype that MLX reads: float32 where its own is none of them."""
    if leaf.dtype in NATIVE:
        return leaf

    def make() -> Any:
        import torch

        return leaf.tensor().to(torch.float32)

    return later(leaf.name, "F32", leaf.shape, make)


def _config_for(
    adapter: Adapter, kind: str, modules: Iterable[str], rank: int, scale: float
) -> dict[str, Any]:
    """The config: mlx-lm builds layers from it before it loads the tensors into them."""
    ours = adapter.format == "mlx"
    config = dict(adapter.config) if ours else {}
    for gone in (BASE, "lora_layers", "use_dora"):
        config.pop(gone, None)
    before = config.get("lora_parameters")
    said = dict(before) if isinstance(before, dict) else {}
    said.pop("alpha", None)  # not used, and misread by others
    keys, layers = _keys(modules, adapter, config.get("num_layers"))
    base = adapter.config.get(BASE)
    if isinstance(base, str) and base:
        config["model"] = base
    config["fine_tune_type"] = kind
    config["num_layers"] = layers
    if kind != "full":
        said |= {"rank": rank, "scale": scale, "dropout": said.get("dropout") or 0.0, "keys": keys}
        config["lora_parameters"] = said
    return config


def _keys(modules: Iterable[str], adapter: Adapter, said: Any) -> tuple[list[str], int]:
    """Names of the adapted modules as mlx-lm wants them, and how many blocks from the end.

    Within a block the name is relative to it, elsewhere it is the whole. A block that lacks a
    module of the list gets zeros there.
    """
    split = {module: _within_block(module) for module in modules}
    stacks = Counter(found[0] for found in split.values() if found)
    stack = stacks.most_common(1)[0][0] if stacks else None
    keys: set[str] = set()
    blocks: set[int] = set()
    for module, found in split.items():
        if found and found[0] == stack:
            keys.add(found[2])
            blocks.add(found[1])
        else:
            keys.add(module)
    if not blocks:
        return sorted(keys), 0
    span = max(blocks) - min(blocks) + 1
    if adapter.format == "mlx" and type(said) is int and (said < 0 or said >= span):
        return sorted(keys), said
    # How many blocks the base has, an adapter cannot tell; -1 means all of them.
    return sorted(keys), -1


def _within_block(module: str) -> tuple[str, int, str] | None:
    """(the stack of blocks, the number, the rest) of a module's name."""
    parts = module.split(".")
    for i, part in enumerate(parts[1:-1], 1):
        if part.isascii() and part.isdigit() and len(part) < 9:
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return None
