"""Names of experts' weights: one by one, stacked, gate and up in one, in whatever library."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Where a layer keeps its experts: transformers, mlx-lm.
CONTAINERS = ("experts", "switch_mlp")
ROLES = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up",
    "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip
# The order in which a module registers its parameters, in which PEFT nests its wrappers.
ORDER = ("gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")
# What the feed-forward of a layer is called in memory and in checkpoints.
BLOCKS = ("mlp", "block_sparse_moe", "feed_forward")
# Of `model_type` in config.json: stacks stored (experts, in, out), and those whose gate and up lie
# in turn, row by row, where all others have one half after the other (transformers:
# models/*/modeling_*.py, 5.23).
IN_OUT = frozenset("gpt_oss llama4 llama4_text aria aria_text openai_privacy_filter".split())
IN_TURN = frozenset({"gpt_oss"})

# Where mlx-lm's class has its stacks, by `model_type` (mlx_lm/models/*.py).
_MLX = {
    "mixtral": "block_sparse_moe.switch_mlp",
    "phimoe": "block_sparse_moe.switch_mlp",
    "minimax": "block_sparse_moe.switch_mlp",
    "gpt_oss": "mlp.experts",
    "llama4_text": "feed_forward.experts",
    "lfm2_moe": "feed_forward.switch_mlp",
    **dict.fromkeys(
        "qwen2_moe qwen3_moe qwen3_next olmoe deepseek_v2 deepseek_v3 glm4_moe".split(),
        "mlp.switch_mlp",
    ),
}
_W = {"gate": "w1", "up": "w3", "down": "w2"}

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.\d{1,9}(?=\.)")


@dataclass(frozen=True, slots=True)
class Expert:
    """What a weight's name says: its layer, what it is there, and of which expert (None: of all).

    A name is `front` + `layer` + `rest`; only `front` differs between a model and one around it.
    """

    front: str
    layer: str
    rest: str
    role: str
    number: int | None


def expert_of(name: str) -> Expert | None:
    """A name taken apart; None where it is no expert's weight."""
    split = layer_of(name)
    if split is None:
        return None
    front, layer, rest = split
    pieces = rest.removesuffix(".weight").split(".")
    at = next((i for i, piece in enumerate(pieces) if piece in CONTAINERS), len(pieces))
    match pieces[at + 1 :]:
        case [number, leaf] if leaf in ROLES and number.isdecimal() and len(number) < 7:
            return Expert(front, layer, rest, ROLES[leaf], int(number))
        case [leaf] if leaf in ROLES:
            return Expert(front, layer, rest, ROLES[leaf], None)
        case _:
            return None


def layer_of(name: str) -> tuple[str, str, str] | None:
    """What is before a name's last numbered layer, the layer, and what is within it."""
    hits = list(_LAYER.finditer(name))
    if not hits:
        return None
    start, end = hits[-1].span()
    start += name[start] == "."
    return name[:start], name[start:end], name[end + 1 :]


def otherwise(rest: str) -> list[str]:
    """A name within a layer as others spell the feed-forward part of it."""
    first, dot, tail = rest.partition(".")
    return [f"{other}{dot}{tail}" for other in BLOCKS if other != first] if first in BLOCKS else []


def stack_name(role: str, to: str, model_type: str | None) -> str | None:
    """What a layer of this model calls its stack for a role, in MLX or beside GGUF's names.

    None where the model decides and is not known.
    """
    if to == "mlx":
        container = _MLX.get(model_type or "")
        return container and f"{container}.{role}_proj"
    if model_type == "mixtral":
        return f"block_sparse_moe.experts.{_W[role]}"
    return f"mlp.experts.{role}_proj" if model_type else None
