"""PEFT's methods that no weight can take in: prompts, prefixes, LLaMA-adapters, routers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.adapter import FLOATS, Adapter, Kind, Leaf, Needs, Replace, Runtime
from loratools.containers import safetensors
from loratools.errors import error, shown
from loratools.formats.peft_keys import PREFIX as FRONT
from loratools.formats.reading import Reading
from loratools.runtime import PREFIX, PROMPT, layer_of, named, refusal

# By peft_type: the method's name, and the last words of its keys.
RUNTIME: dict[str, tuple[str, str]] = {
    "PROMPT_TUNING": (PROMPT, r"prompt_embeddings"),
    "P_TUNING": ("P-tuning", r"prompt_embeddings"),
    "PREFIX_TUNING": (PREFIX, r"prompt_embeddings"),
    "CARTRIDGE": ("cartridge", r"prompt_embeddings"),
    "CPT": ("CPT", r"prompt_embeddings"),
    "MULTITASK_PROMPT_TUNING": (
        "multitask prompt tuning", r"prompt_embeddings|prefix_task_cols|prefix_task_rows"
    ),
    "ADAPTION_PROMPT": ("LLaMA-adapter", r".+\.adaption_(?:prompt|gate)"),
    "XLORA": ("X-LoRA", r".*internal_xlora_classifier\..+"),
    "POLY": ("Poly", r".+\.(?:poly_lora_[AB]|poly_router\.module_logits)"),
    "LILY": ("Lily", r".+\.lily_(?:A|B|router)\.weight"),
}  # fmt: skip
PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_runtime(config: Mapping[str, Any], assume: Mapping[str, str] | None = None) -> bool:
    """Whether a PEFT config is of a method that acts where the model runs.

    Poly's skills are mixed by task alone: of one task, its only one or a chosen one, it folds.
    """
    one_task = config.get("n_tasks", 1) == 1 or "task" in (assume or {})
    if config.get("peft_type") == "POLY" and one_task:
        return False
    return str(config.get("peft_type")) in RUNTIME


def assembled(
    tensors: Mapping[str, Leaf],
    config: Mapping[str, Any],
    *,
    name: str,
    assume: Mapping[str, str] | None = None,
) -> Adapter:
    """A runtime adapter from PEFT's tensors and config; saved heads are deltas beside it."""
    reading = Reading(name, assume or {})
    method, pattern = RUNTIME[str(config["peft_type"])]
    own: dict[str, Leaf] = {}
    deltas: dict[str, Kind] = {}
    for key, leaf in tensors.items():
        if leaf.dtype not in FLOATS:
            raise error("dtype_unusable", f"{shown(key)} is {leaf.dtype}, not floats")
        if re.fullmatch(pattern, key[:1000]):
            own[key] = leaf
        elif key.startswith("base_model.") and _is_saved(config, key):
            deltas[key.removeprefix(FRONT).removeprefix("base_model.")] = Replace(leaf)
        else:
            reading.unexplained([key])
    runtime = Runtime(method, own, {})
    if own:
        runtime = _described(reading, method, config, own)
        said = f"{method} ({_words(runtime.numbers)})" if runtime.numbers else method
        reading.problems.append(refusal(method, said, name))
    return Adapter(
        deltas=deltas,
        format="peft",
        vocabulary="hf",
        config=config,
        name=name,
        problems=reading.settle(),
        assumed=dict(assume or {}),
        original=dict(tensors),
        runtime=runtime if own else None,
    )


def _is_saved(config: Mapping[str, Any], key: str) -> bool:
    saved = config.get("modules_to_save")
    names = saved if isinstance(saved, list) else []
    return any(isinstance(n, str) and f".{n}." in f".{key}" for n in names)


def _words(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {shown(value)}" for key, value in numbers.items())


def _count(config: Mapping[str, Any], field: str) -> int | None:
    value = config.get(field)
    return value if type(value) is int and 0 < value < 1 << 31 else None


# ------------------------------------------------------------------------------- each method


def _described(
    reading: Reading, method: str, config: Mapping[str, Any], own: Mapping[str, Leaf]
) -> Runtime:
    if "prompt_embeddings" in own:
        return _virtual(reading, method, config, own)
    if method == "LLaMA-adapter":
        return _llama_adapter(reading, config, own)
    places = {k.removeprefix(FRONT).rpartition(".")[0] for k in own}
    layers = tuple(dict.fromkeys(x for p in sorted(places) if (x := layer_of(p))))
    names = ("r", "n_tasks", "n_skills", "n_splits", "num_B", "stride_A", "xlora_depth", "act_fn")
    numbers: dict[str, Any] = {"layers": len(layers)} if layers else {}
    for name in names:
        if isinstance(config.get(name), int | str) and not isinstance(config[name], bool):
            numbers["rank" if name == "r" else name] = config[name]
    some = config.get("adapters")
    if isinstance(some, Mapping):
        numbers["of"] = [shown(n) for n in list(some)[:16]]
    return Runtime(method, own, numbers, Needs(modules=layers))


def _virtual(
    reading: Reading, method: str, config: Mapping[str, Any], own: Mapping[str, Leaf]
) -> Runtime:
    """Virtual tokens (n, width): embeddings, or of a prefix keys and values of every layer."""
    leaf = own["prompt_embeddings"]
    if len(leaf.shape) != 2 or 0 in leaf.shape:
        reading.problem("shape_factors", f"prompt_embeddings is {leaf.shape}, expected (n, width)")
        return Runtime(method, own, {})
    rows, width = leaf.shape
    is_prefix = config["peft_type"] in PREFIXES
    tokens, copies = _count(config, "num_virtual_tokens"), 1
    if not is_prefix:
        copies = _count(config, "num_transformer_submodules") or 1
        if config.get("peft_type") == "CPT":
            copies = 1
    if tokens is not None and tokens * copies != rows:
        said = f"num_virtual_tokens={tokens}" + (f" for {copies} sub-modules" if copies > 1 else "")
        message = f"config says {said}, prompt_embeddings has {rows} rows"
        reading.problem("config_conflict", message, "prompt_embeddings")
    layers, dim = _count(config, "num_layers"), _count(config, "token_dim")
    numbers: dict[str, Any] = {"virtual_tokens": rows // copies}
    if copies > 1:
        numbers["submodules"] = copies
    wanted = 2 * layers * dim if layers and dim and is_prefix else None if is_prefix else dim
    grouped = is_prefix and _is_grouped(config, layers, dim, width)
    if wanted is not None and wanted != width and not grouped:
        message = (
            f"config says token_dim={dim}"
            + (f", num_layers={layers}" if is_prefix else "")
            + f", which is {wanted} wide; prompt_embeddings is {width}"
        )
        reading.problem("config_conflict", message, "prompt_embeddings")
    for field in ("num_tasks", "num_ranks", "num_frozen_tokens"):
        if (count := _count(config, field)) is not None:
            numbers[field] = count
    if not is_prefix:
        numbers["width"] = width
        needs = Needs(embedding=width, tokens=_tokens(reading, config, rows))
    else:
        if layers is not None:
            numbers["layers"] = layers
            if width % (2 * layers) == 0:
                numbers["key_width"] = width // (2 * layers)
        needs = Needs(prefix=width, layers=layers)
    if method == "multitask prompt tuning":
        _check_tasks(reading, config, own, rows, width)
    return Runtime(method, own, numbers, needs, leaf)


def _is_grouped(config: Mapping[str, Any], layers: int | None, dim: int | None, width: int) -> bool:
    """Whether a prefix is as wide as some of the heads: PEFT takes their number from the base."""
    heads = _count(config, "num_attention_heads")
    if not (layers and dim and heads) or dim % heads:
        return False
    kept, rest = divmod(width, 2 * layers * (dim // heads))
    return not rest and 0 < kept <= heads


def _tokens(reading: Reading, config: Mapping[str, Any], rows: int) -> int | None:
    """CPT's virtual tokens began as real ones: the greatest of their ids."""
    ids = config.get("cpt_token_ids")
    if config.get("peft_type") != "CPT" or not isinstance(ids, list):
        return None
    good = [i for i in ids if type(i) is int and i >= 0]
    if len(good) != len(ids) or len(ids) != rows:
        message = f"cpt_token_ids names {len(ids)} tokens, prompt_embeddings has {rows} rows"
        reading.problem("config_conflict", message, "prompt_embeddings")
    return max(good, default=None)


def _check_tasks(
    reading: Reading, config: Mapping[str, Any], own: Mapping[str, Leaf], rows: int, width: int
) -> None:
    cols, lines = own.get("prefix_task_cols"), own.get("prefix_task_rows")
    if cols is None or lines is None:
        lost = "prefix_task_cols" if cols is None else "prefix_task_rows"
        reading.problem("missing", f"the file has no {lost}")
        return
    fits = len(cols.shape) == len(lines.shape) == 3
    fits = fits and (cols.shape[0], cols.shape[2]) == lines.shape[:2]
    if not fits or cols.shape[1] != rows or lines.shape[2] != width:
        message = (
            f"prefix_task_cols {cols.shape} and prefix_task_rows {lines.shape} do not multiply to "
            f"({rows}, {width}) for each task"
        )
        reading.problem("shape_factors", message)
    tasks = _count(config, "num_tasks")
    if fits and tasks is not None and tasks != cols.shape[0]:
        message = f"config says num_tasks={tasks}, the file has {cols.shape[0]}"
        reading.problem("config_conflict", message)


def _llama_adapter(reading: Reading, config: Mapping[str, Any], own: Mapping[str, Leaf]) -> Runtime:
    """A prompt (1, n, hidden) and a gate (1,) at each of the last layers (arXiv 2303.16199)."""
    places: dict[str, dict[str, Leaf]] = {}
    for key, leaf in own.items():
        place, _, what = key.removeprefix(FRONT).rpartition(".")
        places.setdefault(place, {})[what] = leaf
    shapes = set()
    for place, leaves in places.items():
        prompt, gate = leaves.get("adaption_prompt"), leaves.get("adaption_gate")
        if prompt is None or gate is None:
            lost = "adaption_prompt" if prompt is None else "adaption_gate"
            reading.problem("missing", f"{shown(place)} has no {lost}", place)
        elif len(prompt.shape) != 3 or prompt.shape[0] != 1 or gate.numel != 1:
            message = f"{shown(place)}: prompt {prompt.shape}, gate {gate.shape}"
            reading.problem("shape_factors", f"{message}; expected (1, n, hidden) and (1,)", place)
        else:
            shapes.add(prompt.shape[1:])
    if len(shapes) > 1:
        reading.problem("shape_factors", f"its prompts are of several shapes: {sorted(shapes)[:8]}")
    layers = tuple(dict.fromkeys(x for p in places if (x := layer_of(p))))
    said = _count(config, "adapter_layers")
    if said is not None and said != len(places):
        message = f"config says adapter_layers={said}, the file has {len(places)}"
        reading.problem("config_conflict", message)
    if len(shapes) != 1:
        return Runtime("LLaMA-adapter", own, {"layers": len(layers)}, Needs(modules=layers))
    tokens, hidden = next(iter(shapes))
    length = _count(config, "adapter_len")
    if length is not None and length != tokens:
        message = f"config says adapter_len={length}, the prompts have {tokens} rows"
        reading.problem("config_conflict", message)
    numbers = {"virtual_tokens": tokens, "layers": len(layers), "width": hidden}
    return Runtime("LLaMA-adapter", own, numbers, Needs(hidden=hidden, modules=layers))


# ------------------------------------------------------------------------------- writing


def written(adapter: Adapter, folder: Path) -> dict[str, str]:
    """Write the config and the tensors as they stand, saved heads too; sha256 by file name."""
    assert adapter.runtime is not None
    tensors = {**adapter.original, **adapter.runtime.tensors}
    text = json.dumps(dict(adapter.config), indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    metadata = {**adapter.metadata, "format": "pt"}
    return {WEIGHTS: safetensors.write(folder / WEIGHTS, named(tensors), metadata)}
