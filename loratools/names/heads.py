"""How rows of attention weights are ordered and divided, from head counts; no tensors here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratools.errors import error, shown
from loratools.names import orders
from loratools.names.rules import Rule


@dataclass(frozen=True, slots=True)
class Facts:
    """What a base says about its own sizes; None where it does not say."""

    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    layers: int | None = None
    experts: int | None = None
    model_type: str | None = None


# ---------------------------------------------------------------------------------------------
# Orders: row i of the result is row order[i] of what was given (as `views.reordered` takes it).


def rope_order(rows: int, heads: int) -> tuple[int, ...]:
    """From Hugging Face's rows to interleaved ones (Meta, GGUF): per head (2, d/2) -> (d/2, 2)."""
    half = _halved(rows, heads)
    return tuple(
        head * 2 * half + k * half + j for head in range(heads) for j in range(half) for k in (0, 1)
    )


def rope_back(rows: int, heads: int) -> tuple[int, ...]:
    """From interleaved rows to Hugging Face's: per head (d/2, 2) -> (2, d/2)."""
    half = _halved(rows, heads)
    return tuple(
        head * 2 * half + 2 * j + k for head in range(heads) for k in (0, 1) for j in range(half)
    )


def group_order(heads: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """From rows [Q; K; V] to one query group after another, [q, ..., q, k, v] (Megatron)."""
    _require_groups(heads, kv_heads)
    per, keys, values = heads // kv_heads, heads, heads + kv_heads
    order: list[int] = []
    for group in range(kv_heads):
        queries = range(group * per, (group + 1) * per)
        for head in (*queries, keys + group, values + group):
            order += range(head * head_dim, (head + 1) * head_dim)
    return tuple(order)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The order that undoes another."""
    back = [0] * len(order)
    for place, row in enumerate(order):
        back[row] = place
    return tuple(back)


def _rope(rows: int, facts: Facts) -> tuple[int, ...]:
    size = _said(facts.head_dim, "head_dim")
    if rows % size:
        raise error("shape_mismatch", f"{rows} rows are no heads of {size}")
    return rope_order(rows, rows // size)


def _groups(rows: int, facts: Facts) -> tuple[int, ...]:
    heads, kv_heads, size = _attention(facts)
    if rows != (heads + 2 * kv_heads) * size:
        raise error("shape_mismatch", _not_gqa(rows, heads, kv_heads, size))
    return group_order(heads, kv_heads, size)


Order = Callable[[int, Facts], tuple[int, ...]]
# By the names in `Rule.order`: rows of one part, or of the parts joined, on the way to the whole.
ORDERS: dict[str, Order] = {
    "rope": _rope,
    "groups": _groups,
    "ungroup": lambda rows, facts: inverse(_groups(rows, facts)),
}
OF_JOINED = frozenset({"groups", "ungroup"})  # of the rows of all parts; the others of each part's


def order_of(
    rule: Rule, sizes: Sequence[int], facts: Facts, columns: int = 0
) -> tuple[int, ...] | None:
    """Row i of the whole is row order[i] of the parts one after another; None: as they come."""
    if not rule.order:
        return None
    if rule.order in OF_JOINED:
        return ORDERS[rule.order](sum(sizes), facts)
    order: list[int] = []
    for size in sizes:
        start = len(order)
        if rule.order in orders.ORDERS:
            part: Sequence[int] = orders.ORDERS[rule.order](size, columns=columns)
        else:
            part = ORDERS[rule.order](size, facts)
        order += (start + row for row in part)
    return tuple(order)


# ---------------------------------------------------------------------------------------------
# Sizes: how many rows of a whole with `rows` rows and `columns` columns each of n parts has.


def _gqa(rows: int, parts: int, facts: Facts) -> tuple[int, ...]:
    heads, kv_heads, size = _attention(facts)
    sizes = (heads * size, kv_heads * size, kv_heads * size)[-parts:]
    if len(sizes) != parts or sum(sizes) != rows:
        raise error("shape_mismatch", _not_gqa(rows, heads, kv_heads, size))
    return sizes


def sizes_of(rule: Rule, rows: int, columns: int, facts: Facts) -> tuple[int, ...]:
    """The rows of each part of a rule, where the whole has `rows` rows and `columns` columns."""
    if len(rule.parts) == 1:
        return (rows,)
    if rule.sizes == "gqa":
        return _gqa(rows, len(rule.parts), facts)
    return tuple(orders.SIZES[rule.sizes](rows, columns, len(rule.parts)))


# ---------------------------------------------------------------------------------------------

# Hugging Face's names first, then GPT-2's, litgpt's, NeMo's and torchtune's for the same number.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    "kv_heads": (
        "num_key_value_heads",
        "num_query_groups",
        "n_query_groups",
        "num_kv_heads",
        "n_head_kv",
        "multi_query_group_num",
    ),
    "head_dim": ("head_dim", "kv_channels", "head_size", "attention_head_dim"),
    "hidden": ("hidden_size", "n_embd", "d_model", "embed_dim", "dim"),
    "intermediate": (
        "intermediate_size",
        "ffn_hidden_size",
        "n_inner",
        "intermediate_dim",
        "ffn_dim",
        "d_ff",
    ),
    "layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"),
    "experts": (
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
        "num_moe_experts",
        "n_expert",
        "moe_num_experts",
    ),
}
_GGUF = {
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden": "embedding_length",
    "intermediate": "feed_forward_length",
    "layers": "block_count",
    "experts": "expert_count",
}
_NESTED = (
    "base_config",  # where readers keep the base's own config beside an adapter's
    "text_config",
    "llm_config",
    "language_config",
    "thinker_config",
    "decoder",
    "model",
)


def facts_from(config: Mapping[str, Any]) -> Facts:
    """The facts of a config: config.json of Hugging Face (nested ones too), key-values of GGUF
    under "gguf", litgpt's model_config.yaml, NeMo's, or the arguments of a torchtune builder.
    """
    gguf = config.get("gguf")
    if isinstance(gguf, Mapping):
        arch = _text(gguf.get("general.architecture"))
        return _complete({k: _count(gguf.get(f"{arch}.{name}")) for k, name in _GGUF.items()}, arch)
    kind, at = _text(config.get("model_type")), config
    for _ in range(4):
        if any(_count(at.get(k)) for k in _SPELLINGS["heads"]):
            break
        inner = next((at[k] for k in _NESTED if isinstance(at.get(k), Mapping)), None)
        if inner is None:
            break
        at = inner
        kind = kind or _text(at.get("model_type"))
    found = {
        fact: next((n for k in names if (n := _count(at.get(k))) is not None), None)
        for fact, names in _SPELLINGS.items()
    }
    if at.get("multi_query") is True and at.get("new_decoder_architecture") is not True:
        found["kv_heads"] = 1  # Falcon 7B and StarCoder say it so
    return _complete(found, kind)


def config_of(facts: Facts) -> dict[str, Any]:
    """Facts as the fields of a Hugging Face config that say them; the unknown ones are left out."""
    said = {names[0]: getattr(facts, fact) for fact, names in _SPELLINGS.items()}
    said["model_type"] = facts.model_type
    return {name: value for name, value in said.items() if value is not None}


def _complete(found: dict[str, int | None], kind: str | None) -> Facts:
    heads, hidden = found["heads"], found["hidden"]
    if found["kv_heads"] is None:
        found["kv_heads"] = heads
    if found["head_dim"] is None and heads and hidden and hidden % heads == 0:
        found["head_dim"] = hidden // heads
    return Facts(**found, model_type=kind)


def _count(value: object) -> int | None:
    """A positive whole number; None for all else, such as one number per layer that differ."""
    if isinstance(value, list | tuple) and value and len(value) <= 4096:
        value = value[0] if all(v == value[0] for v in value) else None
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 < value < 1 << 32 else None  # type: ignore[operator,return-value]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _said(value: int | None, what: str) -> int:
    if value is None:
        raise error(
            "needs_base",
            f"{shown(what)} of the base must be known to order or divide the rows of attention "
            "weights, and nothing here says it",
        )
    return value


def _attention(facts: Facts) -> tuple[int, int, int]:
    heads, kv_heads = _said(facts.heads, "heads"), _said(facts.kv_heads, "kv_heads")
    _require_groups(heads, kv_heads)
    return heads, kv_heads, _said(facts.head_dim, "head_dim")


def _require_groups(heads: int, kv_heads: int) -> None:
    if kv_heads < 1 or heads % kv_heads:
        raise error("shape_mismatch", f"{heads} query heads cannot share {kv_heads} key heads")


def _halved(rows: int, heads: int) -> int:
    if heads < 1 or rows % (2 * heads):
        raise error("shape_mismatch", f"{rows} rows are not {heads} heads of an even size")
    return rows // heads // 2


def _not_gqa(rows: int, heads: int, kv_heads: int, size: int) -> str:
    return (
        f"{rows} rows do not divide into {heads} query, {kv_heads} key and {kv_heads} value heads "
        f"of {size}"
    )
