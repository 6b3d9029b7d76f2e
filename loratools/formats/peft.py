"""Hugging Face PEFT adapters: adapter_config.json beside adapter_model.safetensors, .bin or .pt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.adapter import FLOATS, Adapter, Dense, Kind, Leaf, LowRank, Renormed, Replace
from loratools.containers import safetensors, torch_zip
from loratools.containers.bundle import Bundle
from loratools.errors import Problem, Severity, error, shown
from loratools.formats.peft_config import (
    config_problems,
    names,
    read_config,
    saves,
    saves_itself,
    scaling_of,
    token_rows,
    twice,
    understood,
    unknown_fields,
    unusual,
)
from loratools.formats.peft_keys import PARTS, TOKENS, Module, group, is_lora
from loratools.formats.peft_writing import beyond, disassemble

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
    return is_lora(_tensors(bundle, bundle.chosen)[0])


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt"))


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """A PEFT adapter from its headers; contradictions become `problems`, malformed files raise."""
    weights = bundle.chosen or next(w for w in WEIGHTS if w in bundle)
    tensors, metadata, extras = _tensors(bundle, weights)
    has_config = CONFIG in bundle
    config: dict[str, Any] = {}
    if has_config:
        config = read_config(bundle.read(CONFIG, 1_000_000), f"{bundle.name}/{CONFIG}")
    adapter = assemble(tensors, config, name=bundle.name, assume=assume, has_config=has_config)
    problems = list(adapter.problems)
    for key in extras:
        message = f"{shown(key)} in {weights} is no tensor"
        problems.append(Problem("unexplained", message, "error", bundle.name, shown(key)))
    others = [w for w in WEIGHTS if w in bundle and w != weights]
    if others and bundle.chosen is None:
        message = f"{', '.join(others)} lies beside {weights} and was not read"
        problems.append(Problem("unexplained", message, "note", bundle.name))
    return replace(
        adapter,
        metadata=metadata,
        folder=bundle.path,
        files=(weights, CONFIG) if has_config else (weights,),
        problems=tuple(problems),
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
    problems: list[Problem] = []

    def problem(
        code: str, message: str, target: str | None = None, severity: Severity = "error"
    ) -> None:
        problems.append(Problem(code, message, severity, name, target))

    kind = config.get("peft_type", "LORA")
    if kind not in READ_TYPES:
        problem("unknown_type", f"peft_type {shown(kind)}: its tensors are not read as deltas")
    if kind not in READ_TYPES or config.get("target_parameters"):
        tensors = {}
    readable, beyond = understood(config, name)
    problems += beyond
    settled = _settle_alpha(readable, assume or {}, has_config, problem)
    found = group(tensors)
    modules, plain = found.modules, found.plain
    if len(found.adapters) > 1:
        listed = ", ".join(sorted(shown(s) for s in found.adapters))
        problem("unexplained", f"the file holds {len(found.adapters)} adapters: {listed}")
    for leaf in found.copies:
        problem("unexplained", f"{shown(leaf.name)} is a copy of PEFT's own", severity="note")
    deltas: dict[str, Kind] = {}
    transposed: set[str] = set()
    for module, parts in modules.items():
        _pair(module, parts, settled, deltas, transposed, problem)
    for module, parts in modules.items():
        if TOKENS in parts.leaves:
            key, leaf = f"{module}.weight", parts.leaves[TOKENS]
            rows = _token_rows(settled, module, leaf, problem)
            if rows is not None:
                deltas[key] = Replace(leaf, rows, deltas.get(key))
    for key, leaf in plain.items():
        # What was trained upon a weight that the file has in full goes on top of it.
        deltas[key] = Replace(leaf, None, deltas.get(key))
    if kind in READ_TYPES:
        lora = [m for m, parts in modules.items() if any(p in parts.leaves for p in PARTS)]
        problems.extend(config_problems(readable, lora, name))
        _saved(config, plain, deltas, problem)
        odd = ("unexplained", "config_conflict")
        unexplained = any(p.code in odd and p.severity == "error" for p in problems)
        problems += unknown_fields(config, name, unexplained=unexplained)
    for key in deltas:
        if not key.isprintable() or key.startswith("."):
            problem("malformed", f'"{shown(key)}" is no name of a module\'s parameter', key)
    if deltas and all(isinstance(d, LowRank) and d.scaling == 0 for d in deltas.values()):
        problem("no_effect", f"every alpha of {shown(name)} is 0")
    if not deltas and not any(p.severity == "error" for p in problems):
        problem("no_effect", f"{shown(name)} holds no adapter tensors")
    return Adapter(
        deltas=deltas,
        format="peft",
        vocabulary="hf",
        config=config,
        name=name,
        transposed=frozenset(transposed),
        problems=tuple(problems),
        assumed=dict(assume or {}),
    )


def _tensors(bundle: Bundle, name: str) -> tuple[dict[str, Leaf], dict[str, str], dict[str, Any]]:
    source = bundle.open(name)
    if name.endswith(".safetensors"):
        header = safetensors.read_header(source)
        return header.leaves, header.metadata, {}
    file = torch_zip.state_dict(source)
    return dict(file.tensors), {}, dict(file.extras)


def _settle_alpha(
    config: dict[str, Any], assume: Mapping[str, str], has_config: bool, problem: Any
) -> dict[str, Any]:
    """The config with `--assume alpha=` taken in; a missing alpha is a problem of its own."""
    said = config.get("lora_alpha")
    if "alpha" in assume:
        try:
            alpha = float(assume["alpha"])
        except ValueError:
            raise error("usage", f"--assume alpha={shown(assume['alpha'])}: not a number") from None
        if not math.isfinite(alpha):
            raise error("usage", f"--assume alpha={alpha:g}: expected a finite number")
        if said is not None and said != alpha:
            raise error("usage", f"--assume alpha={alpha:g}, but {CONFIG} says {shown(said)}")
        return {**config, "lora_alpha": alpha}
    if said is None and config.get("peft_type", "LORA") == "LORA":
        where = f"{CONFIG} has no lora_alpha" if has_config else f"there is no {CONFIG}"
        problem("alpha_missing", where)
        return {**config, "lora_alpha": None}
    return config


# ------------------------------------------------------------------------------- modules


def _pair(
    module: str,
    found: Module,
    config: Mapping[str, Any],
    deltas: dict[str, Kind],
    transposed: set[str],
    problem: Any,
) -> None:
    """The low-rank delta of one module, with its DoRA magnitude and its bias."""
    leaves = found.leaves
    embedding = "lora_embedding_A" in leaves or "lora_embedding_B" in leaves
    down, up = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    a, b = leaves.get(down), leaves.get(up)
    if a is None and b is None:
        if set(leaves) - {TOKENS}:
            lost = ", ".join(sorted(set(leaves) - {TOKENS}))
            problem("missing", f"{shown(module)} has {lost} without {down} and {up}", module)
        return
    if a is None or b is None:
        here, lost = (up, down) if a is None else (down, up)
        problem("missing", f"{shown(module)} has {here} without {lost}", module)
        return
    for leaf in leaves.values():
        if leaf.dtype not in FLOATS:
            raise error("dtype_unusable", f"{shown(leaf.name)} is {leaf.dtype}, expected floats")
    if not _multiplies(a, b):
        problem(
            "shape_factors",
            f"{shown(module)}: A is {a.shape}, B is {b.shape}; expected (rank, in, ...) and "
            "(out, rank, ...) (an empty or flat factor is one part of a sharded save)",
            module,
        )
        return
    rank, said = a.shape[0], scaling_of(config, found.owner or module)
    if said.rank is not None and said.rank != rank:
        message = f"{shown(module)}: config says r={said.rank}, A has {rank} rows"
        problem("config_conflict", message, module)
    elif said.rank is None and config.get("r") is not None:
        message = f"{shown(module)}: config's r is no whole number, A has {rank}"
        problem("config_conflict", message, module)
    scaling = said.of(rank)
    if scaling is None:
        scaling = 1.0  # alpha_missing is among the problems
    elif scaling == 0:
        problem("no_effect", f"{shown(module)}: alpha is 0, so its update is", module, "warning")
    elif unusual(scaling):
        message = f"{shown(module)}: scaling {scaling:g} (alpha {said.alpha:g} / rank {rank})"
        problem("scaling_unusual", message, module, "warning")
    if found.owner is not None and twice(config):
        scaling *= 2
        message = f"{shown(module)}: PEFT trained and merges its update twice (peft#3774), so here"
        problem("scaling_unusual", message, module, "note")
    pair = LowRank(a, b, scaling, said.alpha)
    key = f"{module}.weight"
    magnitude = leaves.get("lora_magnitude_vector")
    if magnitude is not None and not config.get("use_dora"):
        problem(
            "config_conflict",
            f"{shown(module)} has a DoRA magnitude, and the config says use_dora=false",
            module,
        )
    if magnitude is None and config.get("use_dora"):
        problem("missing", f"{shown(module)} has no magnitude, the config says use_dora", module)
    if magnitude is not None and magnitude.numel != b.shape[0]:
        problem(
            "shape_factors",
            f"{shown(module)}: {magnitude.numel} magnitudes for {b.shape[0]} outputs",
            module,
        )
        magnitude = None
    deltas[key] = pair if magnitude is None else Renormed(pair, magnitude)
    if embedding:
        transposed.add(key)
    bias = leaves.get("lora_B.bias")
    if bias is not None:
        deltas[f"{module}.bias"] = Dense(bias, scaling)
    unused = set(leaves) - {down, up, "lora_magnitude_vector", "lora_B.bias", TOKENS}
    if unused:
        problem("unexplained", f"{shown(module)}: {', '.join(sorted(unused))}", module)


def _multiplies(a: Leaf, b: Leaf) -> bool:
    if len(a.shape) < 2 or len(b.shape) < 2 or 0 in a.shape or 0 in b.shape:
        return False
    flat = all(n == 1 for n in b.shape[2:])
    return a.shape[0] == b.shape[1] and flat and len(a.shape) in (len(b.shape), 2)


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
    return [
        Problem("loss", f"{shown(key)}: PEFT has no place for {what}", "error", adapter.name, key)
        for key, what in beyond(adapter).items()
    ]


def write(adapter: Adapter, folder: Path) -> dict[str, str]:
    """Write adapter_config.json and adapter_model.safetensors into a folder; sha256 by file name.

    Factors, alphas and dtypes stand as they are in the adapter; fields of a PEFT config are kept.
    What `lost` names is left out.
    """
    left_out = beyond(adapter)
    kept = {key: delta for key, delta in adapter.deltas.items() if key not in left_out}
    tensors, config = disassemble(replace(adapter, deltas=kept))
    # Not sorted: the first pattern that matches counts, and PEFT reads them in the file's order.
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    digest = safetensors.write(folder / WEIGHTS[0], tensors, {**adapter.metadata, "format": "pt"})
    return {WEIGHTS[0]: digest}
