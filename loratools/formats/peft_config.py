"""PEFT's adapter_config.json: what its fields mean for rank and scaling, and writing it back."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter import LowRank
from loratools.containers.strict_json import loads, require
from loratools.errors import Problem, RefusedError, Severity, error, shown
from loratools.names.patterns import peft_targets, peft_value

# Initialisations that replace the base by a residual before training (peft:tuners/lora/layer.py).
RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")

# Last names of the modules that PEFT saves by itself when a vocabulary grew.
EMBEDDINGS = frozenset(
    "embed_tokens lm_head wte word_embeddings shared embed_in embed_out decoder output "
    "tok_embeddings embedding embeddings token_embedding proj_out".split()
)
# Fields that make a LoRA something that no weight can express, with the reason.
RUNTIME = {
    "alora_invocation_tokens": "an activated LoRA applies only after its invocation tokens",
    "arrow_config": "Arrow routes between adapters for every token",
    "layer_replication": "it was trained on a base with replicated layers",
}
# Fields whose variants store the same leaves with another meaning: code and reason.
VARIANTS = {
    "use_qalora": (
        "not_foldable",
        "QA-LoRA averages groups of inputs for a quantised base and goes into its zero points",
    ),
    "kasa_config": (
        "residual_base",
        "KaSA trains upon a base without its smallest singular values",
    ),
    "monteclora_config": ("not_foldable", "its factors are drawn at random around what is stored"),
}

# Fields that decide something, and what they must hold.
SORTED = {
    "rank_pattern": "an object",
    "alpha_pattern": "an object",
    "target_modules": "text or a list of texts",
    "modules_to_save": "text or a list of texts",
    "task_type": "text",
    "use_rslora": "true or false",
    "use_dora": "true or false",
    "fan_in_fan_out": "true or false",
}
# All fields that PEFT 0.21 knows for LoRA and trainable tokens.
KNOWN = frozenset(
    """alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias
    corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode
    init_lora_weights init_weights kasa_config layer_replication layers_pattern
    layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config
    megatron_config megatron_core modules_to_save monteclora_config peft_type peft_version
    qalora_group_size r rank_pattern revision runtime_config target_modules target_parameters
    task_type token_indices trainable_token_indices use_bdlora use_dora use_qalora use_rslora
    velora_config""".split()
)


def read_config(raw: bytes, what: str) -> dict[str, Any]:
    """The fields of an adapter_config.json, unknown ones included."""
    return require(loads(raw, what), SORTED, what)


@dataclass(frozen=True, slots=True)
class Scaling:
    """What the config says of one module's low-rank pair."""

    rank: int | None
    alpha: float | None
    rslora: bool

    def of(self, rank: int) -> float | None:
        """alpha / rank, or alpha / √rank for rsLoRA (arXiv 2312.03732)."""
        if self.alpha is None:
            return None
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


def scaling_of(config: Mapping[str, Any], module: str) -> Scaling:
    """Rank and alpha of a module by PEFT's own rule: first matching pattern in the file's order."""
    rank, _ = peft_value(_mapping(config, "rank_pattern"), module, config.get("r"))
    alpha, _ = peft_value(_mapping(config, "alpha_pattern"), module, config.get("lora_alpha"))
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        said = shown(repr(alpha))
        raise error("malformed", f"the alpha of {shown(module)} is {said}, expected a number")
    is_rank = isinstance(rank, int) and not isinstance(rank, bool)
    return Scaling(rank if is_rank else None, alpha, config.get("use_rslora") is True)


def understood(config: dict[str, Any], name: str) -> tuple[dict[str, Any], list[Problem]]:
    """The config without patterns that are beyond us (lookaheads, say), which are problems.

    A rank can be seen in the tensors, so that only an alpha is refused.
    """
    problems: list[Problem] = []
    for field in ("rank_pattern", "alpha_pattern"):
        for key in _mapping(config, field):
            try:
                peft_value({key: 1}, "", 0)
            except RefusedError as cause:
                is_rank = field == "rank_pattern"
                step = "; ranks are taken from the tensors" if is_rank else ""
                severity: Severity = "warning" if is_rank else "error"
                message = f"{field}: {cause.message}{step}"
                problems.append(Problem(cause.code, message, severity, name))
                kept = {k: v for k, v in config[field].items() if k != key}
                config = {**config, "rank_pattern": {}, "r": None} if is_rank else {
                    **config, field: kept}  # fmt: skip
    return config, problems


def unknown_fields(
    config: Mapping[str, Any], name: str, known: Collection[str] = KNOWN, *, unexplained: bool
) -> Iterator[Problem]:
    """Fields that PEFT 0.21 does not know; an error where one is set and tensors are unexplained.

    They are kept, and written again.
    """
    unknown = [k for k in config if k not in known]
    if unknown:
        listed = shown(", ".join(unknown))
        is_set = any(config[k] for k in unknown)
        yield Problem(
            "unknown_config",
            f"the config has fields that loratools does not know: {listed}",
            "error" if is_set and unexplained else "note",
            name,
        )


def _mapping(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = config.get(field)
    return value if isinstance(value, Mapping) else {}


def names(config: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """A field that holds a name, a list of names or nothing."""
    value = config.get(field)
    if isinstance(value, str):
        return (value,)
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()


def saves(name: str, module: str) -> bool:
    """Whether a name in `modules_to_save` covers a module: the end of its path or of a parent's.

    PEFT compares ends of text, so that "norm" names every "input_layernorm" too
    (peft:utils/other.py).
    """
    return f"{name}." in f"{module}."


def saves_itself(config: Mapping[str, Any], module: str, parameter: str) -> bool:
    """Whether PEFT saves a full parameter that `modules_to_save` does not name."""
    bias = parameter == "bias" and config.get("bias", "none") != "none"
    return bias or module.rpartition(".")[2] in EMBEDDINGS


def config_problems(config: Mapping[str, Any], modules: list[str], name: str) -> Iterator[Problem]:
    """What the config says that stands against folding or merging, or that no module explains."""
    for field, reason in RUNTIME.items():
        if config.get(field):
            yield Problem("not_foldable", f"{field} is set: {reason}", adapter=name)
    for field, (code, reason) in VARIANTS.items():
        if config.get(field):
            yield Problem(code, f"{field} is set: {reason}", adapter=name)
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = _mapping(config, field)
        for key in patterns:
            if not any(peft_value({key: 1}, m, 0)[0] for m in modules):
                yield Problem(
                    "config_conflict",
                    f'{field} names "{shown(key)}", and no module of the adapter matches it',
                    adapter=name,
                )


def twice(config: Mapping[str, Any]) -> bool:
    """Whether PEFT applies the pair of nn.MultiheadAttention's out_proj two times, as up to 0.21.

    In training too, so that the adapter has learnt it (peft pull 3774;
    peft:tuners/lora/layer.py, MultiheadAttention.merge).
    """
    found = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version")))
    return found is None or (int(found[1]), int(found[2])) < (0, 22)


def unusual(scaling: float) -> bool:
    """Whether a scaling lies far from what trainings use; a warning, never a refusal."""
    return not (1 / 1024 <= abs(scaling) <= 64)


# ------------------------------------------------------------------------------------ writing


def config_for(
    pairs: Mapping[str, LowRank],
    source: Mapping[str, Any],
    *,
    saved: tuple[str, ...],
    rows: Mapping[str, list[int]],
    said: Mapping[str, Any],
    parameters: Mapping[str, LowRank] | None = None,
) -> dict[str, Any]:
    """A config under which PEFT gives every pair its rank and scaling; `said` stands in it as is.

    The source's own fields are kept while they say the right thing; otherwise rank, alpha and the
    two patterns are written anew with plain scaling, exceptions named by full module path.
    `parameters` are pairs of parameters, by name, that are targeted themselves.
    """
    config = dict(source)
    config.setdefault("peft_type", "LORA")
    config.setdefault("base_model_name_or_path", None)
    config.setdefault("task_type", None)
    config["inference_mode"] = True
    every = {**pairs, **(parameters or {})}
    if not _says(config, every):
        config.update(_plain(every))
    targets = config.get("target_modules")
    if pairs and not _names_all(targets, pairs):
        config["target_modules"] = sorted(pairs)
        for field in ("layers_to_transform", "layers_pattern", "exclude_modules"):
            if config.get(field) is not None:
                config[field] = None
    known = names(config, "modules_to_save")
    missing = [s for s in dict.fromkeys(saved) if not any(saves(k, s) for k in known)]
    if missing:
        config["modules_to_save"] = [*known, *missing]
    if config["peft_type"] == "LORA":
        config.setdefault("bias", "none")
    for flag in ("use_dora", "lora_bias"):
        if flag in config:
            config[flag] = False
    if config.get("bias", "none") != "none":
        said = {k: v for k, v in said.items() if k != "bias"}
    config.update(said)
    _name_rows(config, rows)
    return config


def token_rows(config: Mapping[str, Any], module: str) -> list[Any]:
    """The indices that the config names for a module with trained token rows.

    A mapping goes by ends of names, and a tied head by its embedding's entry.
    """
    said = config.get("trainable_token_indices", config.get("token_indices"))
    if isinstance(said, Mapping):
        named = [v for k, v in said.items() if module.endswith(k)]
        said = next(iter(named or said.values()), None)
    return said if isinstance(said, list) else []


def _name_rows(config: dict[str, Any], rows: Mapping[str, list[int]]) -> None:
    if any(token_rows(config, module) != at for module, at in rows.items()):
        config["trainable_token_indices"] = dict(rows)


def _names_all(targets: Any, pairs: Mapping[str, LowRank]) -> bool:
    if not isinstance(targets, str | list) or targets == "all-linear":
        return False
    try:
        return all(peft_targets(targets, module) for module in pairs)
    except RefusedError:  # a pattern beyond us: the names themselves say it as well
        return False


def _says(config: dict[str, Any], pairs: Mapping[str, LowRank]) -> bool:
    if understood(config, "")[1]:
        return False
    for module, pair in pairs.items():
        said = scaling_of(config, module)
        if said.rank != pair.rank or said.of(pair.rank) != pair.scaling:
            return False
    return "r" in config or not pairs


def _plain(pairs: Mapping[str, LowRank]) -> dict[str, Any]:
    alphas = {m: plain_number(p.scaling * p.rank) for m, p in pairs.items()}
    rank = Counter(p.rank for p in pairs.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {exactly(m): p.rank for m, p in pairs.items() if p.rank != rank},
        "alpha_pattern": {exactly(m): a for m, a in alphas.items() if a != alpha},
    }


def plain_number(value: float) -> int | float:
    """A whole number without its point."""
    return int(value) if value == int(value) else value


def exactly(module: str) -> str:
    """A pattern that PEFT's rule matches with this module alone (its keys are regexes)."""
    return "^" + module.replace(".", r"\.")
