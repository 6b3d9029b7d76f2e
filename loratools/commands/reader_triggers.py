"""What in an adapter sets off a reader's rule: each trigger names what it found."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratools.adapter import Adapter, Dense, Kind, LowRank, Renormed, Replace
from loratools.errors import shown

Trigger = Callable[["Seen"], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Seen:
    """An adapter as a reader meets it: what it says, and the names of the tensors in its file.

    `others` are the adapters asked about together with it, `base` the config of the base, if known.
    """

    adapter: Adapter
    keys: tuple[str, ...] = ()
    others: tuple[Adapter, ...] = ()
    base: Mapping[str, Any] | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.adapter.config


# ------------------------------------------------------------------------------- what triggers


def pairs(adapter: Adapter) -> dict[str, LowRank]:
    """The low-rank pair of each key that has one."""

    def inner(delta: Kind | None) -> LowRank | None:
        if isinstance(delta, LowRank):
            return delta
        nested = getattr(delta, "delta", None) or getattr(delta, "then", None)
        return inner(nested) if nested is not None else None

    return {k: p for k, d in adapter.deltas.items() if (p := inner(d)) is not None}


def not_in(*formats: str) -> Trigger:
    return lambda seen: [] if seen.adapter.format in formats else [_sort(seen.adapter)]


_IMAGE = re.compile(
    r"(?:down_blocks|up_blocks|mid_block|transformer_blocks|double_blocks|single_blocks"
    r"|input_blocks|joint_blocks|unet|diffusion_model)[._:]|^(?:text_encoder|blocks)[._:]"
)


def image_names(seen: Seen) -> bool:
    """Whether the names are those that readers of image models know."""
    known = seen.adapter.vocabulary in ("kohya", "diffusers", "original")
    return known and seen.adapter.format != "cloneofsimo"


def other_image_names(seen: Seen) -> Sequence[str]:
    """An adapter of an image model in names that readers of such adapters do not know."""
    if image_names(seen):
        return []
    told = any(_IMAGE.search(k) for k in (*seen.adapter.deltas, *seen.keys))
    return [_sort(seen.adapter)] if told else []


def no_image(seen: Seen) -> Sequence[str]:
    """An adapter of something else than an image model."""
    if image_names(seen) or other_image_names(seen):
        return []
    return [_sort(seen.adapter)]


def _sort(adapter: Adapter) -> str:
    return f"it is {adapter.format}"


def keys_like(pattern: str, within: str = "") -> Trigger:
    """Tensor names that match; `within`: only of adapters in this format."""
    match = re.compile(pattern).search

    def finds(seen: Seen) -> Sequence[str]:
        if within and seen.adapter.format != within:
            return []
        return [k for k in seen.keys if match(k)]

    return finds


def said(*fields: str) -> Trigger:
    """Fields of a PEFT config that are set, and not to what means nothing."""

    def finds(seen: Seen) -> Sequence[str]:
        if seen.adapter.format != "peft":
            return []
        return [f"{f}={shown(v)}" for f in fields if (v := seen.config.get(f)) and v != "none"]

    return finds


def peft_lacks(*fields: str) -> Trigger:
    def finds(seen: Seen) -> Sequence[str]:
        if seen.adapter.format != "peft":
            return []
        return [f"no {f}" for f in fields if seen.config.get(f) is None]

    return finds


def other_type(seen: Seen) -> Sequence[str]:
    kind = seen.config.get("peft_type", "LORA")
    return [f"peft_type={shown(kind)}"] if seen.adapter.format == "peft" and kind != "LORA" else []


def dora(seen: Seen) -> Sequence[str]:
    return [k for k, d in seen.adapter.deltas.items() if isinstance(d, Renormed)]


def dora_out(seen: Seen) -> Sequence[str]:
    found = seen.adapter.deltas.items()
    return [k for k, d in found if isinstance(d, Renormed) and d.axis == "out"]


def replaced(seen: Seen) -> Sequence[str]:
    return [k for k, d in seen.adapter.deltas.items() if isinstance(d, Replace)]


def saved(*allowed: str) -> Trigger:
    def finds(seen: Seen) -> Sequence[str]:
        said = seen.config.get("modules_to_save") if seen.adapter.format == "peft" else None
        names = said if isinstance(said, list) else []
        return [f"modules_to_save={shown(n)}" for n in names if n not in allowed]

    return finds


def scaled_otherwise(
    by: Callable[[Mapping[str, Any], int], float | None], *formats: str
) -> Trigger:
    """Pairs whose scaling is not what a reader makes of the config, given the pair's rank."""

    def finds(seen: Seen) -> Sequence[str]:
        if formats and seen.adapter.format not in formats:
            return []
        found = []
        for key, pair in pairs(seen.adapter).items():
            read = by(seen.config, pair.rank)
            if read is not None and not math.isclose(read, pair.scaling, rel_tol=1e-6):
                found.append(f"{key} has scaling {pair.scaling:g}, it would be {read:g}")
        return found

    return finds


def _number(config: Mapping[str, Any], key: str) -> float | None:
    value = config.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def overall(config: Mapping[str, Any], rank: int) -> float | None:
    """alpha / r of the config for every module, rsLoRA honoured."""
    alpha, r = _number(config, "lora_alpha"), _number(config, "r")
    if alpha is None or not r or r < 0:
        return None
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def overall_plain(config: Mapping[str, Any], rank: int) -> float | None:
    """alpha / r of the config for every module, rsLoRA or not."""
    alpha, r = _number(config, "lora_alpha"), _number(config, "r")
    return None if alpha is None or not r else alpha / r


def by_rank(config: Mapping[str, Any], rank: int) -> float | None:
    """The config's alpha over each module's own rank, rsLoRA honoured."""
    alpha = _number(config, "lora_alpha")
    if alpha is None:
        return None
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def alpha_by_rank(config: Mapping[str, Any], rank: int) -> float | None:
    """The config's alpha over each module's own rank, rsLoRA or not."""
    alpha = _number(config, "lora_alpha")
    return None if alpha is None else alpha / rank


def unscaled(config: Mapping[str, Any], rank: int) -> float | None:
    return 1.0


def without_alpha_keys(seen: Seen) -> Sequence[str]:
    """Scalings that stand in a config or in metadata, not in `.alpha` tensors."""
    if any(k.endswith(".alpha") for k in seen.keys) or not image_names(seen):
        return []
    return scaled_otherwise(unscaled)(seen)


def rank_above(limit: int) -> Trigger:
    def finds(seen: Seen) -> Sequence[str]:
        found = pairs(seen.adapter).items()
        return [f"{k} has rank {p.rank}" for k, p in found if p.rank > limit]

    return finds


def ranks_differ(seen: Seen) -> Sequence[str]:
    ranks = {p.rank for p in pairs(seen.adapter).values()}
    return [f"ranks {min(ranks)} to {max(ranks)}"] if len(ranks) > 1 else []


def ranks_without_alpha(seen: Seen) -> Sequence[str]:
    """Ranks that differ in a file that has no `.alpha` tensors."""
    return [] if any(k.endswith(".alpha") for k in seen.keys) else ranks_differ(seen)


def mlx_ranks(seen: Seen) -> Sequence[str]:
    """Ranks that differ in an MLX adapter, whose config has one for all."""
    return ranks_differ(seen) if seen.adapter.format == "mlx" else []


def misnamed_mlx(seen: Seen) -> Sequence[str]:
    """The file of an MLX adapter, where it is not the one that mlx-lm opens."""
    files = seen.adapter.files[:1] if seen.adapter.format == "mlx" else ()
    return [f"it is {shown(f)}" for f in files if f != "adapters.safetensors"]


def not_mangled(seen: Seen) -> Sequence[str]:
    """Names of image models that are not kohya's."""
    dotted = seen.adapter.vocabulary in ("diffusers", "original")
    return [_sort(seen.adapter)] if dotted else []


def bias_outside_bfl(seen: Seen) -> Sequence[str]:
    """Biases of B anywhere but in the control LoRAs of Black Forest Labs."""
    return [] if seen.adapter.format == "bfl" else keys_like(r"\.lora_B\.bias$")(seen)


def rank_not_said(seen: Seen) -> Sequence[str]:
    r = _number(seen.config, "r")
    if seen.adapter.format != "peft" or r is None:
        return []
    return [f"{k} has rank {p.rank}" for k, p in pairs(seen.adapter).items() if p.rank != r]


def init(seen: Seen) -> Sequence[str]:
    init = seen.config.get("init_lora_weights")
    plain = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
    if seen.adapter.format != "peft" or not isinstance(init, str) or init.lower() in plain:
        return []
    return [f"init_lora_weights={shown(init)}"]


def without_v(seen: Seen) -> Sequence[str]:
    """Layers whose q_proj has an update while their v_proj has none."""
    modules = {k.rpartition(".")[0] for k in pairs(seen.adapter)}
    asked = (m for m in modules if m.endswith(".q_proj"))
    return sorted(m for m in asked if m.removesuffix("q_proj") + "v_proj" not in modules)


def without_q(seen: Seen) -> Sequence[str]:
    modules = {k.rpartition(".")[0] for k in pairs(seen.adapter)}
    asked = (m for m in modules if m.endswith((".k_proj", ".v_proj")) and "self_attn" in m)
    return sorted(m for m in asked if m[:-6] + "q_proj" not in modules)


def pattern_string(seen: Seen) -> Sequence[str]:
    said = seen.config.get("target_modules")
    pattern = isinstance(said, str) and said not in ("all-linear", "all")
    return [f"target_modules={shown(said)}"] if seen.adapter.format == "peft" and pattern else []


def norms(seen: Seen) -> Sequence[str]:
    found = seen.adapter.deltas.items()
    return [
        k for k, d in found if isinstance(d, Dense) and re.search(r"norm\w*\.(weight|bias)$", k)
    ]


def fractional_alpha(seen: Seen) -> Sequence[str]:
    alpha = seen.config.get("lora_alpha")
    at_fault = seen.adapter.format == "peft" and isinstance(alpha, float)
    return [f"lora_alpha={alpha}"] if at_fault else []


def several(seen: Seen) -> Sequence[str]:
    return [f"{len(seen.others) + 1} adapters"] if seen.others else []


def overlapping(seen: Seen) -> Sequence[str]:
    taken = {k for other in seen.others for k in other.deltas}
    return [k for k in seen.adapter.deltas if k in taken]


def architecture(*known: str) -> Trigger:
    def finds(seen: Seen) -> Sequence[str]:
        named = seen.base.get("model_type") if seen.base else None
        if seen.adapter.format == "gguf" or not isinstance(named, str) or named in known:
            return []
        return [f"the base is {shown(named)}"]

    return finds


def lycoris_keys(seen: Seen) -> Sequence[str]:
    """Tensors of kohya files that diffusers' converters do not take."""
    if seen.adapter.vocabulary != "kohya":
        return []
    return [k for k in seen.keys if re.search(r"\.(?:hada_|diff|w_norm|b_norm|oft_|[ab][12]\.)", k)]


def modules_outside(pattern: str) -> Trigger:
    match = re.compile(pattern).search

    def finds(seen: Seen) -> Sequence[str]:
        if seen.adapter.format != "peft":
            return []
        modules = (k.rpartition(".")[0] for k in pairs(seen.adapter))
        return [m for m in modules if not match(m)]

    return finds


def has(field: str) -> Trigger:
    """A field that stands in a PEFT config, set or not."""
    return lambda seen: [field] if seen.adapter.format == "peft" and field in seen.config else []
