"""AdapterHub's adapters: adapter_config.json beside pytorch_adapter.bin or adapter.safetensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter, Kind, Leaf, LowRank, Renormed, Replace, Runtime
from loratools.containers import strict_json
from loratools.containers.bundle import Bundle
from loratools.errors import LoratoolsError, Problem, error, shown
from loratools.formats.adapterhub_keys import (
    HEADS,
    LORAS,
    PARTS,
    Part,
    is_adapterhub,
    is_faulty,
    method_of,
    part_of,
)
from loratools.formats.adapterhub_others import OTHERS, read_other
from loratools.formats.adapterhub_runtime import runtime_of
from loratools.formats.adapterhub_writing import (
    CONFIG,
    HEAD_CONFIG,
    HEAD_WEIGHTS,
    WEIGHTS,
    as_read,
    losses,
    unchanged,
    written,
)
from loratools.formats.grouped import FUSED, scattered
from loratools.formats.reading import Reading, contents
from loratools.formats.state_dicts import (
    ask,
    flags,
    keys_of,
    note_rest,
    unwrapped_all,
)
from loratools.runtime import refusal
from loratools.views import reshaped

SUFFIX = None
VOCABULARY = "hf"
FUSION = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
FUSION_CONFIG = "adapter_fusion_config.json"
_PAIRS = ("LoRA", "DoRA")
_CONFIGS = {CONFIG: WEIGHTS, FUSION_CONFIG: FUSION, HEAD_CONFIG: HEAD_WEIGHTS}


def detect(bundle: Bundle) -> bool:
    """Whether a bundle is AdapterHub's: by its config's fields, or by the keys of one file."""
    if bundle.chosen is not None:
        if not bundle.chosen.endswith((".bin", ".safetensors", ".pt")):
            return False
        named = any(bundle.chosen in names for names in _CONFIGS.values())
        return named or any(is_adapterhub(key) for key in keys_of(bundle))
    if any(name in bundle for name in WEIGHTS) and CONFIG not in bundle:
        return True
    for config, names in _CONFIGS.items():
        if config in bundle and any(name in bundle for name in names):
            return is_ours(_json(bundle, config, lenient=True))
    return False


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a config is AdapterHub's: `adapter_config.json` is used by four libraries."""
    marks = ("version", "model_class", "model_type", "model_name")
    return "peft_type" not in config and "config" in config and any(m in config for m in marks)


def _json(bundle: Bundle, name: str, *, lenient: bool = False) -> dict[str, Any]:
    what = f"{bundle.name}/{name}"
    try:
        found = strict_json.loads(bundle.read(name, 1_000_000), what)
        return strict_json.require(found, {}, what)
    except LoratoolsError:
        if lenient:
            return {}
        raise


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """An adapter from its headers: deltas where a weight can hold it, else a runtime adapter."""
    reading = Reading(bundle.name, assume)
    file = bundle.chosen or next(
        (n for names in _CONFIGS.values() for n in names if n in bundle), None
    )
    assert file is not None
    head_alone = file in HEAD_WEIGHTS
    config = {}
    files = [file]
    for name, names in _CONFIGS.items():
        fits = file in names or (name == CONFIG and file not in (*FUSION, *HEAD_WEIGHTS))
        if fits and name in bundle:
            config = _json(bundle, name)
            files.append(name)
    tensors, metadata, extras = contents(bundle, file)
    parts: dict[str, tuple[Part, Leaf]] = {}
    heads: dict[str, Leaf] = {}
    for key, leaf in unwrapped_all(tensors).items():
        part = part_of(key)
        if head_alone or (part is not None and part.group == HEADS):
            heads[key] = leaf
        elif part is None:
            reading.unexplained([key])
        else:
            parts[key] = (part, leaf)
    runtime = None if head_alone else _adapter(reading, config, parts)
    for names in _CONFIGS.values():
        if file in names:
            reading.mention(bundle, file, [n for n in names if n in bundle])
    head_file = next((n for n in HEAD_WEIGHTS if n in bundle), None)
    said: dict[str, Any] = dict(config)
    if head_file is not None and not head_alone and file in WEIGHTS:
        if bundle.chosen is None:
            reading.mention(bundle, head_file, [n for n in HEAD_WEIGHTS if n in bundle])
            more, _, beyond = contents(bundle, head_file)
            heads |= unwrapped_all(more)
            extras |= beyond
            files.append(head_file)
            if HEAD_CONFIG in bundle:
                said["head_config"] = _json(bundle, HEAD_CONFIG)
                files.append(HEAD_CONFIG)
        else:
            message = f"{head_file} lies beside {shown(file)} and was not read"
            reading.problem("unexplained", message, severity="note")
    _heads(reading, heads)
    note_rest(reading, extras, file)
    method = method_of(_inner(config), parts) if parts else None
    if method is not None:
        said["method"] = {"name": method.name, **method.numbers}
    if isinstance(config.get("model_name"), str) and config["model_name"]:
        said["base_model_name_or_path"] = config["model_name"]
    return Adapter(
        deltas=reading.deltas,
        format="adapterhub",
        vocabulary=VOCABULARY,
        config=said,
        metadata=metadata,
        name=bundle.name,
        folder=bundle.path,
        files=tuple(files),
        problems=reading.settle(),
        assumed=dict(assume),
        original={} if method is None or method.name in _PAIRS else tensors,
        runtime=runtime,
    )


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("config")
    return inner if isinstance(inner, Mapping) else {}


def _heads(reading: Reading, heads: Mapping[str, Leaf]) -> None:
    """Heads as new weights; those that only adapters' own classes have are said."""
    for key, leaf in heads.items():
        reading.deltas[key] = Replace(leaf)
    names = sorted({key.split(".")[1] for key in heads if key.startswith(f"{HEADS}.")})
    for name in names:
        message = (
            f"{HEADS}.{shown(name)} is a head of adapters' own classes; those of transformers do "
            f'not load it (--skip "{HEADS}.*" leaves it out)'
        )
        reading.problem("unexplained", message, f"{HEADS}.{shown(name)}", "note")


# ------------------------------------------------------------------------------- the adapter


def _adapter(
    reading: Reading, config: Mapping[str, Any], parts: Mapping[str, tuple[Part, Leaf]]
) -> Runtime | None:
    inner = _inner(config)
    method = method_of(inner, parts)
    names = sorted({part.name for part, _ in parts.values()})
    if len(names) > 1 and method.name != "MTL-LoRA":
        listed = ", ".join(shown(name) for name in names)
        reading.problem("unexplained", f"the file holds {len(names)} adapters: {listed}")
    if method.name in OTHERS:
        read_other(reading, method, inner, parts)
        return None
    if method.name not in _PAIRS:
        if method.foldable:
            message = f"{method} is recognised, and its tensors are not read as deltas"
            reading.problem("unknown_type", message)
            return None
        if not parts:
            return None
        found = runtime_of(reading, inner, method, parts)
        reading.problems.append(refusal(found.method, str(method), reading.name))
        return found
    modules: dict[str, dict[str, Leaf]] = {}
    for key, (part, leaf) in parts.items():
        if part.group == LORAS and part.leaf in PARTS:
            modules.setdefault(part.module, {}).setdefault(part.leaf, leaf)
        else:
            reading.unexplained([key])
    said = config.get("version")
    alpha = _alpha(reading, inner)
    faulty = is_faulty(said)
    for module, leaves in modules.items():
        _module(reading, module, leaves, inner, None if faulty else alpha)
    rank = _rank(inner)
    if faulty and alpha is not None and rank is not None and alpha != rank:
        _say_faulty(reading, modules, str(said), alpha, rank)
    if method.name == "DoRA" and modules:
        unlike = alpha is not None and rank is not None and alpha != rank and not faulty
        _say_dora(reading, f"alpha {alpha:g} and r {rank}" if unlike else "")
    return None


def _rank(inner: Mapping[str, Any]) -> int | None:
    """r of the config, where it says one."""
    rank = inner.get("r")
    return rank if type(rank) is int and rank > 0 else None


def _alpha(reading: Reading, inner: Mapping[str, Any]) -> float | None:
    """Alpha of all modules: the config's, or `--assume alpha=` where it says none."""
    said, given = inner.get("alpha"), reading.number("alpha")
    number = isinstance(said, int | float) and not isinstance(said, bool) and math.isfinite(said)
    if said is not None and not number:
        raise error("malformed", f"{shown(reading.name)}/{CONFIG}: alpha is {shown(said)}")
    if said is None:
        if given is None:
            message = f"{shown(reading.name)}: no {CONFIG} says its alpha"
            ask(reading, "alpha_missing", message, "--assume alpha=8 (from the training script)")
        return given
    if given is not None and given != said:
        raise error("usage", f"--assume alpha={given:g}, but {CONFIG} says {said:g}")
    return float(said)


def _module(
    reading: Reading,
    module: str,
    leaves: Mapping[str, Leaf],
    inner: Mapping[str, Any],
    alpha: float | None,
) -> None:
    """One module's pair; `alpha` None is a scaling of 1."""
    a, b, m = (leaves.get(part) for part in PARTS)
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or 0 in b.shape:
        reading.pair(module, a, b)
        return
    rank = b.shape[1]
    if inner.get("r") is not None and _rank(inner) != rank:
        message = f"{shown(module)}: config says r={shown(inner['r'])}, lora_B has {rank} columns"
        reading.problem("config_conflict", message, module)
    magnitude = None if m is None else reshaped(m, m.numel)
    count, rest = divmod(a.shape[0], rank)
    if module.rpartition(".")[2] not in FUSED and (count != 1 or rest):
        reading.pair(module, a, b)
        return
    if module.rpartition(".")[2] not in FUSED:
        reading.pair(module, a, b, alpha=float(rank) if alpha is None else alpha,
                     magnitude=magnitude)  # fmt: skip
        if inner.get("use_dora") and magnitude is None:
            message = f"{shown(module)} has no m.weight, the config says use_dora"
            reading.problem("missing", message, module)
        return
    slots = _slots(reading, module, inner, count, rest)
    if slots is None:
        return
    if b.shape[0] % count:
        message = f"{shown(module)}: {b.shape[0]} rows of lora_B are no {count} equal groups"
        reading.problem("shape_factors", message, module)
        return
    scaling = 1.0 if alpha is None else alpha / rank
    reading.pair(module, a, scattered(b, slots), scaling=scaling, magnitude=magnitude)


def _slots(
    reading: Reading, module: str, inner: Mapping[str, Any], count: int, rest: int
) -> tuple[bool, ...] | None:
    """Which of query, key, value a fused projection's groups belong to: config.attn_matrices."""
    letters = inner.get("attn_matrices")
    if isinstance(letters, list):
        slots: tuple[bool, ...] | None = tuple(letter in letters for letter in "qkv")
    else:
        slots = flags(reading.assume, "enable_lora") or ((True,) * 3 if count == 3 else None)
    if slots is None:
        message = f"{shown(module)} has {count} groups, and nothing says of what"
        ask(reading, "missing", message, "--assume enable_lora=true,false,true", module)
    elif rest or sum(slots) != count:
        message = f"{shown(module)}: {sum(slots)} of q, k, v are named, the file has {count} groups"
        reading.problem("config_conflict", message, module)
        return None
    return slots


def _say_faulty(
    reading: Reading, modules: Mapping[str, object], version: str, alpha: float, rank: int
) -> None:
    """Files of before 1.1.0: what their LoRA was trained with, and how it is read today."""
    fused = [m for m in modules if m.rpartition(".")[2] in FUSED]
    message = f"{shown(version)} ran its LoRA with scaling 1, whatever alpha says: so here"
    reading.problem("scaling_unusual", message, severity="note")
    if fused:
        message = (
            f"{shown(fused[0])} is fused, and {shown(version)} trained such ones with "
            f"alpha/r = {alpha / rank:g} already; adapters from 1.1.0 loads all with 1: so here"
        )
        reading.problem("scaling_unusual", message, fused[0], "warning")


def _say_dora(reading: Reading, unlike: str) -> None:
    """DoRA of adapters runs otherwise than it merges; a fold can only be the merge."""
    if unlike:
        for key, delta in list(reading.deltas.items()):
            reading.deltas[key] = _unscaled(delta)
        message = (
            f"DoRA with {unlike}: adapters runs it with BA scaled and a norm of W0 + BA unscaled, "
            "and merges it unscaled; no weight does the first, read is the second"
        )
        reading.problem("not_foldable", message)
    message = (
        "DoRA of adapters also multiplies a layer's bias where it runs, and not where it merges; "
        "folded is what it merges"
    )
    reading.problem("not_foldable", message, severity="warning")


def _unscaled(delta: Kind) -> Kind:
    if isinstance(delta, Renormed) and isinstance(delta.delta, LowRank):
        return replace(delta, delta=replace(delta.delta, scaling=1.0))
    return delta


# ------------------------------------------------------------------------------- writing


def lost(adapter: Adapter) -> list[Problem]:
    """What AdapterHub's LoRA has no place for, each by its name; what was read it holds."""
    return [] if as_read(adapter) else losses(adapter)


def write(adapter: Adapter, out: Path) -> dict[str, str]:
    """Write adapter_config.json and pytorch_adapter.bin into a folder; sha256 by file name.

    The pickle, since `load_adapter` looks for nothing else unless it is told to.
    """
    tensors = as_read(adapter)
    return written(adapter, out) if tensors is None else unchanged(adapter, tensors, out)
