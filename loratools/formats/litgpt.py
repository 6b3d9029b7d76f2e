"""litgpt's LoRA: lit_model.pth.lora, alpha and what was adapted in hyperparameters.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter, Leaf, LowRank
from loratools.containers import plain_yaml
from loratools.containers.bundle import Bundle
from loratools.errors import LoratoolsError, Problem, error, shown
from loratools.formats import litgpt_writing
from loratools.formats.evening import nothing
from loratools.formats.reading import Reading, contents, unwrapped
from loratools.names.heads import Facts, config_of, facts_from, group_order
from loratools.names.rules import pattern
from loratools.views import joined, padded, part, reordered

SUFFIX: str | None = None
VOCABULARY = "litgpt"
WEIGHTS, CONFIG, BASE = "lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"
SLOTS = ("lora_query", "lora_key", "lora_value")
FUSED, LEGACY = ".attn.qkv", ".attn.attn"
PARTS = {".lora_A": "lora_A", ".lora_B": "lora_B"}
MODULES = (
    "transformer.h.{n}.attn.qkv",
    "transformer.h.{n}.attn.attn",
    "transformer.h.{n}.attn.proj",
    "transformer.h.{n}.mlp.fc_1",
    "transformer.h.{n}.mlp.fc_2",
    "transformer.h.{n}.mlp.fc",
    "transformer.h.{n}.mlp.proj",
    "transformer.h.{n}.mlp.gate",
    "transformer.h.{n}.mlp.experts.{m}.fc_1",
    "transformer.h.{n}.mlp.experts.{m}.fc_2",
    "transformer.h.{n}.mlp.experts.{m}.proj",
    "lm_head",
)


def part_of(key: str) -> tuple[str, str] | None:
    """The module and the part of a key; None for any other tensor."""
    bare = unwrapped(key)
    for suffix, found in PARTS.items():
        module = bare.removesuffix(suffix)
        if module != bare and any(pattern(m).fullmatch(module) for m in MODULES):
            return module, found
    return None


def detect(bundle: Bundle) -> bool:
    """Whether a bundle is litgpt's: by the file's name, or by keys that only litgpt has."""
    if bundle.chosen is None:
        return WEIGHTS in bundle
    if bundle.chosen == WEIGHTS:
        return True
    if not bundle.chosen.endswith((".lora", ".pth", ".pt", ".ckpt")):
        return False
    try:
        keys = contents(bundle, bundle.chosen)[0]
    except LoratoolsError:
        return False
    found = [part_of(key) for key in keys]
    return any(known and known[0] != "lm_head" for known in found)


@dataclass(frozen=True, slots=True)
class Fusion:
    """Which of q, k, v are adapted, and how many rows each of them has in the fused weight."""

    slots: tuple[bool, ...]
    sizes: tuple[int, int, int]
    order: tuple[int, ...] = ()  # where rows do not lie [q; k; v]


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """A litgpt adapter from its headers; fused q, k, v become one pair with blocks in its B."""
    weights = bundle.chosen or WEIGHTS
    tensors, _, extras = contents(bundle, weights)
    reading = Reading(bundle.name, assume)
    config, files = _config(bundle)
    alpha = _alpha(config, reading)
    facts = facts_from(config)
    modules: dict[str, dict[str, Leaf]] = {}
    other: list[str] = []
    for key, leaf in tensors.items():
        found = part_of(key)
        if found is None:
            other.append(key)
        elif found[1] in modules.setdefault(found[0], {}):
            raise error("duplicate", f"{shown(weights)}: two tensors are {shown(key)}")
        else:
            modules[found[0]][found[1]] = leaf
    said = config.get("lora_r")
    guessed: list[str] = []
    for module, parts in modules.items():
        a, b = parts.get("lora_A"), parts.get("lora_B")
        rank = b.shape[1] if b is not None and len(b.shape) == 2 else 0
        if rank and said is not None and said != rank:
            message = f"{shown(module)}: {CONFIG} says lora_r={shown(said)}, lora_B has rank {rank}"
            reading.problem("config_conflict", message, module)
        fused = module.endswith((FUSED, LEGACY)) and rank and a is not None and len(a.shape) == 2
        if not fused or a is None or b is None or a.shape[0] % rank or 0 in (*a.shape, *b.shape):
            reading.pair(module, a, b, alpha=alpha)
            continue
        fusion = _fusion(module, a, b, config, facts, reading, guessed)
        if fusion is None:
            continue
        scaling = None if alpha is None else alpha / rank
        reading.pair(module, a, _spread(b, fusion), scaling=scaling)
    if guessed:
        message = (
            f"there is no {BASE}: for {len(guessed)} fused modules, {shown(guessed[0])} first, "
            "the query is taken to have as many rows as the module has columns"
        )
        reading.problem("missing", message, severity="warning")
    reading.unexplained(other)
    reading.extras(extras, weights)
    return Adapter(
        deltas=reading.deltas,
        format="litgpt",
        vocabulary=VOCABULARY,
        config=config,
        name=bundle.name,
        folder=bundle.path,
        files=(weights, *files),
        problems=reading.settle(),
        assumed=dict(assume),
    )


def _config(bundle: Bundle) -> tuple[dict[str, Any], list[str]]:
    """hyperparameters.yaml, with the base's counts from model_config.yaml under `base_config`."""
    config: dict[str, Any] = {}
    files = []
    for name in (CONFIG, BASE):
        if name in bundle:
            found = plain_yaml.parse(bundle.read(name, plain_yaml.LIMIT), f"{bundle.name}/{name}")
            if not isinstance(found, dict):
                raise error("malformed", f"{shown(bundle.name)}/{name} is no mapping")
            files.append(name)
            if name == CONFIG:
                config |= found
            else:
                config["base_config"] = config_of(facts_from(found))
    base = config.get("checkpoint_dir")
    if isinstance(base, str) and base:
        config.setdefault("base_model_name_or_path", base.removeprefix("checkpoints/"))
    return config, files


def _alpha(config: Mapping[str, Any], reading: Reading) -> float | None:
    said, given = config.get("lora_alpha"), reading.number("alpha")
    if said is None:
        if given is None:
            reading.problem("alpha_missing", f"no {CONFIG} says lora_alpha (--assume alpha=)")
        return given
    if isinstance(said, bool) or not isinstance(said, int | float):
        raise error("malformed", f"{CONFIG}: lora_alpha is {shown(said)}, expected a number")
    if given is not None and given != said:
        raise error("usage", f"--assume alpha={given:g}, but {CONFIG} says {shown(said)}")
    return float(said)


def _slots(config: Mapping[str, Any], count: int, reading: Reading) -> tuple[bool, ...] | None:
    """Which of q, k, v are adapted: by the config, `--assume enable_lora=`, or all three."""
    said = tuple(config[name] is True for name in SLOTS) if SLOTS[0] in config else None
    given = reading.assume.get("enable_lora")
    if given is not None:
        words = [w.strip().lower() for w in given.split(",")]
        if len(words) != 3 or not {*words} <= {"true", "false"}:
            raise error(
                "usage", f"--assume enable_lora={shown(given)}: expected three of true,false"
            )
        taken = tuple(w == "true" for w in words)
        if said is not None and said != taken:
            raise error(
                "usage", f"--assume enable_lora={shown(given)}, but {CONFIG} says otherwise"
            )
        return taken
    return (True,) * 3 if said is None and count == 3 else said


def _fusion(
    module: str,
    a: Leaf,
    b: Leaf,
    config: Mapping[str, Any],
    facts: Facts,
    reading: Reading,
    guessed: list[str],
) -> Fusion | None:
    """How a fused module's blocks lie; None where that is a problem, which is then noted."""
    count = a.shape[0] // b.shape[1]
    slots = _slots(config, count, reading)
    if slots is None:
        message = (
            f"{shown(module)}: {count} of query, key and value are adapted, and no {CONFIG} says "
            "which (--assume enable_lora=true,false,true)"
        )
        reading.problem("missing", message, module)
        return None
    if sum(slots) != count:
        said = ", ".join(name for name, on in zip(SLOTS, slots, strict=True) if on) or "none"
        message = f"{shown(module)}: lora_A has {count} blocks, the config says {said}"
        reading.problem("config_conflict", message, module)
        return None
    columns, rows = a.shape[1], b.shape[0]
    # With all three adapted, litgpt up to 0.5.0 added [q; k; v] to rows that lay group by group,
    # in training as in merging (litgpt:lora.py `zero_pad`), so that is what they mean.
    grouped = module.endswith(LEGACY) and not all(slots)
    if facts.heads and facts.kv_heads and facts.head_dim:
        query, other = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    elif (slots[1] or slots[2]) and not grouped:
        guessed.append(module)
        query = columns
        other = (rows - (columns if slots[0] else 0)) // (slots[1] + slots[2])
    else:
        message = f"{shown(module)}: without {BASE} the rows of query, key and value are unknown"
        reading.problem("missing", message, module)
        return None
    sizes = (query, other, other)
    if other < 1 or sum(n for n, on in zip(sizes, slots, strict=True) if on) != rows:
        message = (
            f"{shown(module)}: lora_B has {rows} rows; query, key and value have {sizes} "
            f"and {slots} are adapted"
        )
        reading.problem("config_conflict", message, module)
        return None
    if grouped and facts.heads and facts.kv_heads and facts.head_dim:
        return Fusion(slots, sizes, group_order(facts.heads, facts.kv_heads, facts.head_dim))
    return Fusion(slots, sizes)


def _spread(b: Leaf, fusion: Fusion) -> Leaf:
    """B (rows of those adapted, r) as B (all rows, r · blocks): block i on columns i·r onwards.

    So it is in a convolution of groups (litgpt:lora.py `LoRAQKVLinear.conv1d`, `zero_pad`).
    """
    rank, count = b.shape[1], sum(fusion.slots)
    pieces, start, block = [], 0, 0
    for size, on in zip(fusion.sizes, fusion.slots, strict=True):
        if not on:
            pieces.append(nothing(b.name, (size, rank * count), b.dtype))
            continue
        rows = part(b, start, start + size)
        pieces.append(padded(rows, block * rank, (count - 1 - block) * rank, axis=1))
        start, block = start + size, block + 1
    whole = joined(pieces)
    return reordered(whole, fusion.order) if fusion.order else whole


# ------------------------------------------------------------------------------- writing


def lost(adapter: Adapter) -> list[Problem]:
    """What litgpt cannot hold, by name: all but plain pairs of its linear layers."""
    reasons = {key: _refusal(key.rpartition("."), kind) for key, kind in adapter.deltas.items()}
    return [
        Problem("loss", f"{shown(key)}: {reason}", "error", adapter.name, key)
        for key, reason in reasons.items()
        if reason
    ]


def _refusal(key: tuple[str, str, str], kind: object) -> str:
    module, _, parameter = key
    if not isinstance(kind, LowRank) or parameter != "weight":
        return f"litgpt has low-rank updates of weights only, this is {type(kind).__name__}"
    if len(kind.a.shape) != 2:
        return "litgpt adapts linear layers only, this is a convolution"
    if not any(pattern(m).fullmatch(module) for m in MODULES):
        return "litgpt has no such linear layer"
    return ""


def write(adapter: Adapter, out: Path) -> dict[str, str]:
    """Write lit_model.pth.lora and hyperparameters.yaml into a folder; sha256 by file name.

    litgpt has one rank and one alpha for all layers: smaller ranks are padded with zeros, what
    another scaling says goes into B. What it adapts, it adapts in all layers, so that layers
    without an update get one of zeros. q, k, v keep factors of their own.
    """
    left = {p.target for p in lost(adapter)}
    pairs = {
        k.removesuffix(".weight"): d
        for k, d in adapter.deltas.items()
        if k not in left and isinstance(d, LowRank)
    }
    return litgpt_writing.write(pairs, adapter.config, out / WEIGHTS, out / CONFIG)
