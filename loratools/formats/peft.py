"""Hugging Face PEFT adapters: adapter_config.json beside adapter_model.safetensors, .bin or .pt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter, Kind, Leaf, Original, Replace
from loratools.containers import safetensors
from loratools.containers.bundle import Bundle
from loratools.errors import Problem, error, shown
from loratools.formats import peft_prompts
from loratools.formats.peft_config import (
    KNOWN,
    VARIANTS,
    config_problems,
    names,
    read_config,
    saves,
    saves_itself,
    token_rows,
    understood,
    unknown_fields,
)
from loratools.formats.peft_experts import taken
from loratools.formats.peft_keys import TOKENS, group, is_lora
from loratools.formats.peft_lora import read_pair
from loratools.formats.peft_methods import COMMON, METHODS, REFUSED, Found, Method
from loratools.formats.peft_writing import beyond, disassemble, remedy_for
from loratools.formats.reading import Reading, contents
from loratools.formats.residual import rebase

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
READ_TYPES = ("LORA", "TRAINABLE_TOKENS")
SUFFIX: str | None = None
VOCABULARY = "hf"


def detect(bundle: Bundle) -> bool:
    """Whether a bundle is a PEFT adapter: by its config's peft_type, or PEFT's names and keys."""
    if bundle.chosen is not None and not _is_weights(bundle.chosen):
        return False
    if CONFIG in bundle:
        raw = bundle.read(CONFIG, 1_000_000)
        config = read_config(raw, f"{bundle.name}/{CONFIG}")
        has_weights = bundle.chosen is not None or any(w in bundle for w in WEIGHTS)
        return "peft_type" in config and has_weights
    if bundle.chosen is None:
        return any(w in bundle for w in WEIGHTS)
    if not bundle.chosen.endswith(".safetensors"):
        return bundle.chosen in WEIGHTS
    return is_lora(contents(bundle, bundle.chosen)[0])


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt"))


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """A PEFT adapter from its headers; contradictions become `problems`, malformed files raise."""
    weights = bundle.chosen or next(w for w in WEIGHTS if w in bundle)
    tensors, metadata, extras = contents(bundle, weights)
    has_config = CONFIG in bundle
    config: dict[str, Any] = {}
    if has_config:
        config = read_config(bundle.read(CONFIG, 1_000_000), f"{bundle.name}/{CONFIG}")
    adapter = assemble(tensors, config, name=bundle.name, assume=assume, has_config=has_config)
    reading = Reading(bundle.name, problems=list(adapter.problems))
    reading.extras(extras, weights)
    reading.mention(bundle, weights, [w for w in WEIGHTS if w in bundle])
    return replace(
        adapter,
        metadata=metadata,
        folder=bundle.path,
        files=(weights, CONFIG) if has_config else (weights,),
        problems=tuple(reading.problems),
    )


def assemble(
    tensors: Mapping[str, Leaf],
    config: dict[str, Any],
    *,
    name: str,
    assume: Mapping[str, str] | None = None,
    has_config: bool = True,
) -> Adapter:
    """An adapter from PEFT's tensors and config."""
    if peft_prompts.is_runtime(config, assume):
        return peft_prompts.assembled(tensors, config, name=name, assume=assume)
    reading = Reading(name, assume or {})
    problem, deltas = reading.problem, reading.deltas
    kind = config.get("peft_type", "LORA")
    method = METHODS.get(kind) if isinstance(kind, str) else None
    known = kind in READ_TYPES or method is not None
    if isinstance(kind, str) and kind in REFUSED:
        problem("not_foldable", f"peft_type {kind}: {REFUSED[kind]}")
    elif not known:
        problem("unknown_type", f"peft_type {shown(kind)}: its tensors are not read as deltas")
    if not known or any(config.get(field) for field in VARIANTS):
        tensors = {}
    readable, beyond = understood(config, name) if kind != "ADALORA" else (config, [])
    reading.problems += beyond
    settled = _settle_alpha(readable, assume or {}, has_config, problem, _alpha_field(kind, method))
    rest = taken(tensors, settled, reading) if method is None else tensors
    stacks = list(deltas)
    found = group(rest) if method is None else group(tensors, method.parts, method.shared)
    if len(found.adapters) > 1:
        listed = ", ".join(sorted(shown(s) for s in found.adapters))
        problem("unexplained", f"the file holds {len(found.adapters)} adapters: {listed}")
    for leaf in found.copies:
        problem("unexplained", f"{shown(leaf.name)} is a copy of PEFT's own", severity="note")
    tokens = {m: p.leaves.pop(TOKENS) for m, p in found.modules.items() if TOKENS in p.leaves}
    parts = {m: p.leaves for m, p in found.modules.items() if p.leaves}
    shared = parts.pop("", {}) if method is not None and method.shared else {}
    given = Found(parts, shared, found.plain)
    if method is not None:
        method.read(given, settled, reading)
    for module in parts if method is None else ():
        read_pair(module, found.modules[module], settled, reading, given.transposed)
    rebased = method is None and known and rebase(settled, reading, given.transposed)
    for module, leaf in tokens.items():
        rows = _token_rows(settled, module, leaf, problem)
        if rows is not None:
            key = f"{module}.weight"
            deltas[key] = Replace(leaf, rows, deltas.get(key))
    for key, leaf in found.plain.items():
        # What was trained upon a weight that the file has in full goes on top of it.
        deltas[key] = Replace(leaf, None, deltas.get(key))
    if known:
        _judge(config, readable, reading, [*parts, *stacks], method)
        _saved(config, found.plain, deltas, problem)
        odd = ("unexplained", "config_conflict")
        unexplained = any(p.code in odd and p.severity == "error" for p in reading.problems)
        fields = KNOWN if method is None else COMMON | method.fields
        reading.problems += unknown_fields(config, name, fields, unexplained=unexplained)
    for key in deltas:
        if not key.isprintable() or key.startswith("."):
            problem("malformed", f'"{shown(key)}" is no name of a module\'s parameter', key)
    return Adapter(
        deltas=deltas,
        format="peft",
        vocabulary="hf",
        config=config,
        name=name,
        transposed=frozenset(given.transposed),
        problems=reading.settle(),
        assumed=dict(assume or {}),
        original=Original(tensors, deltas)
        if method or stacks or rebased or config.get("use_bdlora")
        else {},
    )


def _alpha_field(kind: Any, method: Method | None) -> str | None:
    """Where the config of a type has its alpha; None where it has none."""
    if method is None:
        return "lora_alpha" if kind == "LORA" else None
    if kind in ("DEFT", "SUPERTUNING"):  # theirs may be left out
        return None
    return next((field for field in ("alpha", "lora_alpha") if field in method.fields), None)


def _judge(
    config: Mapping[str, Any],
    readable: Mapping[str, Any],
    reading: Reading,
    modules: list[str],
    method: Method | None,
) -> None:
    """What the config says that stands against folding, or that no module explains."""
    if method is not None and "init_lora_weights" in method.fields:
        readable = {**readable, "rank_pattern": {}}  # of AdaLoRA: masks of what was pruned
    elif method is not None:
        patterns = method.fields & {"rank_pattern", "alpha_pattern"}
        readable = {field: readable[field] for field in patterns if field in readable}
    reading.problems.extend(config_problems(readable, modules, reading.name))


def _settle_alpha(
    config: dict[str, Any],
    assume: Mapping[str, str],
    has_config: bool,
    problem: Any,
    field: str | None,
) -> dict[str, Any]:
    """The config with `--assume alpha=` taken in; a missing alpha is a problem of its own."""
    said = config.get(field or "lora_alpha")
    if "alpha" in assume:
        try:
            alpha = float(assume["alpha"])
        except ValueError:
            raise error("usage", f"--assume alpha={shown(assume['alpha'])}: not a number") from None
        if not math.isfinite(alpha):
            raise error("usage", f"--assume alpha={alpha:g}: expected a finite number")
        if said is not None and said != alpha:
            raise error("usage", f"--assume alpha={alpha:g}, but {CONFIG} says {shown(said)}")
        return {**config, field or "lora_alpha": alpha}
    if said is None and field is not None:
        where = f"{CONFIG} has no {field}" if has_config else f"there is no {CONFIG}"
        problem("alpha_missing", where)
        return {**config, field: None}
    return config


def _token_rows(
    config: Mapping[str, Any], module: str, leaf: Leaf, problem: Any
) -> tuple[int, ...] | None:
    """Which stored rows a trainable-tokens tensor replaces; only the config knows."""
    rows = token_rows(config, module)
    good = all(isinstance(r, int) and not isinstance(r, bool) and r >= 0 for r in rows)
    if not good or len(rows) != leaf.shape[0] or len(set(rows)) != len(rows):
        problem(
            "config_conflict",
            f"{shown(module)}: {leaf.shape[0]} trained token rows, and the config names "
            f"{len(rows)} indices for them",
            module,
        )
        return None
    return tuple(rows)


def _saved(
    config: Mapping[str, Any], plain: Mapping[str, Leaf], deltas: Mapping[str, Kind], problem: Any
) -> None:
    """Full tensors against `modules_to_save` and `bias`, both ways: none comes unannounced."""
    saved = names(config, "modules_to_save")
    for key in plain:
        module, _, parameter = key.rpartition(".")
        known = any(saves(s, module) for s in saved) or saves_itself(config, module, parameter)
        if config and not known:
            problem(
                "config_conflict",
                f"{shown(key)} is a full tensor that modules_to_save does not name",
                key,
            )
    absent = [s for s in saved if not any(saves(s, key.rpartition(".")[0]) for key in deltas)]
    if absent and len(absent) == len(saved):
        listed = ", ".join(shown(s) for s in absent)
        problem("missing", f"modules_to_save names {listed}, and the file has none of it")
    elif absent:
        listed = ", ".join(shown(s) for s in absent)
        problem("missing", f"modules_to_save also names {listed}, not in the file", severity="note")


# ------------------------------------------------------------------------------- writing


def lost(adapter: Adapter) -> list[Problem]:
    """What PEFT has no place for: differences in full, a bias alone, a norm over columns."""
    if adapter.runtime is not None:
        return []
    return [
        Problem(
            "loss",
            f"{shown(key)}: PEFT has no place for {what}",
            "error",
            adapter.name,
            key,
            remedy_for(adapter.deltas[key]),
        )
        for key, what in beyond(adapter).items()
    ]


def write(adapter: Adapter, folder: Path) -> dict[str, str]:
    """Write adapter_config.json and adapter_model.safetensors into a folder; sha256 by file name.

    Factors, alphas and dtypes stand as they are in the adapter; fields of a PEFT config are kept.
    What `lost` names is left out.
    """
    if adapter.runtime is not None:
        return peft_prompts.written(adapter, folder)
    left_out = beyond(adapter)
    kept = {key: delta for key, delta in adapter.deltas.items() if key not in left_out}
    tensors, config = disassemble(replace(adapter, deltas=kept))
    # Not sorted: the first pattern that matches counts, and PEFT reads them in the file's order.
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    digest = safetensors.write(folder / WEIGHTS[0], tensors, {**adapter.metadata, "format": "pt"})
    return {WEIGHTS[0]: digest}
