"""Pairs as litgpt holds them: one rank and alpha for all, all layers, q, k, v in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter import Leaf, LowRank
from loratools.containers import plain_yaml, torch_saving
from loratools.errors import error, shown
from loratools.formats.evening import Even, evened
from loratools.names.heads import Facts, config_of, facts_from, group_order, inverse
from loratools.views import joined, reordered

if TYPE_CHECKING:
    import torch

FUSED, LEGACY = ".attn.qkv", ".attn.attn"
FRONT = "transformer.h."
SLOTS = ("lora_query", "lora_key", "lora_value")
NEOX = frozenset({"gpt_neox", "falcon", "phi"})  # two linear layers in an MLP, not three
Size = tuple[int, int]  # (in, out)


def write(
    pairs: Mapping[str, LowRank], said: Mapping[str, Any], weights: Path, config: Path
) -> dict[str, str]:
    """Write the pairs, and the hyperparameters that litgpt needs to merge them."""
    facts = facts_from(said)
    plain = {m: p for m, p in pairs.items() if not m.endswith((FUSED, LEGACY))}
    split: dict[str, LowRank] = {}
    slots: tuple[bool, ...] = (False,) * 3
    shapes: dict[str, tuple[int, tuple[int, int, int]]] = {}
    for module, pair in pairs.items():
        if module in plain:
            continue
        name = module.removesuffix(LEGACY) + FUSED if module.endswith(LEGACY) else module
        if name in shapes:
            raise error("duplicate", f"{shown(module)} and {shown(name)} are one module of litgpt")
        sizes = _sizes(module, pair, facts)
        parts = _parts(module, _modern(module, pair, facts), sizes, sure=facts.heads is not None)
        slots = tuple(had or p is not None for had, p in zip(slots, parts, strict=True))
        shapes[name] = pair.a.shape[1], sizes
        split |= {f"{name}/{i}": p for i, p in enumerate(parts) if p is not None}
    if shapes and not any(slots):
        slots = (True,) * 3
    if any(size[0] != columns for columns, size in shapes.values()):
        slots = (True,) * 3 if shapes else slots  # litgpt misplaces some of them otherwise
    even = evened({**plain, **split})
    tensors: dict[str, Leaf] = {}
    layers = _layers(pairs, facts)
    for name, (a, b) in (
        _plain(even, plain, facts, layers) | _fused(even, shapes, slots, layers)
    ).items():
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = a, b
    digest = torch_saving.write(weights, tensors, within="model")
    base = said.get("base_model_name_or_path")
    folder = f"checkpoints/{base}" if isinstance(base, str) and base else "checkpoints"
    stored = said.get("checkpoint_dir")
    values: dict[str, Any] = {
        "checkpoint_dir": stored if isinstance(stored, str) and stored else folder,
        "precision": None,
        "lora_r": even.rank,
        "lora_alpha": int(even.alpha) if even.alpha.is_integer() else even.alpha,
        "lora_dropout": 0.0,
        **dict(zip(SLOTS, slots, strict=True)),
        "lora_projection": any(m.endswith(".attn.proj") for m in plain),
        "lora_mlp": any(".mlp." in m for m in plain),
        "lora_head": "lm_head" in plain,
    }
    known = config_of(facts)
    if known:
        values["base_config"] = known  # litgpt takes what begins with lora_ and ignores the rest
    config.write_text(plain_yaml.dump(values), encoding="utf-8")
    return {weights.name: digest}


def _sizes(module: str, pair: LowRank, facts: Facts) -> tuple[int, int, int]:
    """The rows of q, k, v: by the base's counts, else with as many rows of q as columns."""
    rows, columns = pair.b.shape[0], pair.a.shape[1]
    if facts.heads and facts.kv_heads and facts.head_dim:
        query, other = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    else:
        query, other = columns, (rows - columns) // 2
    if other < 1 or query + 2 * other != rows:
        raise error(
            "needs_base",
            f"{shown(module)} has {rows} rows, and how many of them are query, key and value is "
            "not known without the base's config",
        )
    return query, other, other


def _modern(module: str, pair: LowRank, facts: Facts) -> LowRank:
    """A pair of the older module, whose rows lie group by group, with its rows as [q; k; v]."""
    if not module.endswith(LEGACY):
        return pair
    if not (facts.heads and facts.kv_heads and facts.head_dim):
        raise error("needs_base", f"{shown(module)}: its heads are not known without the base")
    order = inverse(group_order(facts.heads, facts.kv_heads, facts.head_dim))
    return LowRank(pair.a, reordered(pair.b, order), pair.scaling, pair.alpha)


def _parts(module: str, pair: LowRank, sizes: Sequence[int], *, sure: bool) -> list[LowRank | None]:
    """The pairs of q, k and v in a fused one: their rows of B, and the rows of A that they use."""
    b = pair.b.tensor()
    b = b.reshape(b.shape[0], -1)
    ends = accumulate(sizes)
    used = [b[end - n : end].ne(0).any(0) for n, end in zip(sizes, ends, strict=True)]
    if not sure and sum(mask.long() for mask in used).gt(1).any():  # type: ignore[union-attr]
        # Three pairs made one share no columns, so the sizes that were guessed are not these.
        raise error(
            "needs_base",
            f"{shown(module)}: how many of its {sum(sizes)} rows are query, key and value is not "
            "known without the base's config",
        )
    native = _native(used, pair.rank)
    found: list[LowRank | None] = []
    start = 0
    for slot, size in enumerate(sizes):
        columns = native[slot] if native is not None else used[slot].nonzero().reshape(-1).tolist()
        rows = b[start : start + size]
        start += size
        if columns:
            a = pair.a.tensor()[columns].contiguous()
            block = Leaf.of(pair.b.name, rows[:, columns].contiguous())
            found.append(LowRank(Leaf.of(pair.a.name, a), block, pair.scaling))
        else:
            found.append(None)
    return found


def _native(used: Sequence[torch.Tensor], rank: int) -> list[list[int]] | None:
    """The columns of each slot where they already lie in groups of one rank; None otherwise."""
    patterns = [(1, 1, 1), (1, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    for slots in patterns:
        count = sum(slots)
        if rank % count:
            continue
        columns, block = [], 0
        for on in slots:
            start = block * rank // count
            columns.append(list(range(start, start + rank // count)) if on else [])
            block += on
        inside = [
            {*mask.nonzero().reshape(-1).tolist()} <= {*mine}
            for mask, mine in zip(used, columns, strict=True)
        ]
        if all(inside):
            return columns
    return None


def _fused(
    even: Even,
    shapes: Mapping[str, tuple[int, tuple[int, int, int]]],
    slots: Sequence[bool],
    layers: range,
) -> dict[str, tuple[Leaf, Leaf]]:
    """A stacked and B one under another, of the q, k, v that are adapted in every layer."""
    found = {}
    wanted = dict(shapes)
    if shapes:
        shape = next(iter(shapes.values()))
        wanted |= {n: shape for i in layers if (n := f"{FRONT}{i}{FUSED}") not in shapes}
    for name, (columns, sizes) in wanted.items():
        pairs = [
            even.factors.get(f"{name}/{i}") or even.zeros(name, columns, size, _dtype(even))
            for i, size in enumerate(sizes)
            if slots[i]
        ]
        found[name] = joined([a for a, _ in pairs]), joined([b for _, b in pairs])
    return found


def _plain(
    even: Even, plain: Mapping[str, LowRank], facts: Facts, layers: range
) -> dict[str, tuple[Leaf, Leaf]]:
    """The other pairs, with zeros for the modules that litgpt adapts along with them."""
    found = {m: even.factors[m] for m in plain}
    shapes: dict[str, Size] = {}
    for module in plain:
        if module.startswith(FRONT):
            pair = plain[module]
            shapes.setdefault(_inner(module), (pair.a.shape[1], pair.b.shape[0]))
    for inner, (into, out) in _whole_mlp(shapes, facts).items():
        for name in (f"{FRONT}{i}.{inner}" for i in layers):
            if name not in found:
                found[name] = even.zeros(name, into, out, _dtype(even))
    return found


def _whole_mlp(shapes: Mapping[str, Size], facts: Facts) -> dict[str, Size]:
    """The modules of a layer with those that lora_mlp adapts too, and their sizes."""
    whole = dict(shapes)
    for inner, (into, out) in shapes.items():
        front, _, leaf = inner.rpartition(".")
        if not front.startswith("mlp") or leaf == "gate":
            continue
        narrow, wide = (out, into) if leaf == "proj" else (into, out)
        two = f"{front}.fc" in shapes or (facts.model_type in NEOX)
        for name in ("fc", "proj") if two else ("fc_1", "fc_2", "proj"):
            size = (wide, narrow) if name == "proj" else (narrow, wide)
            whole.setdefault(f"{front}.{name}", size)
    return whole


def _inner(module: str) -> str:
    """What follows the layer's number."""
    return module.removeprefix(FRONT).partition(".")[2]


def _layers(modules: Mapping[str, Any], facts: Facts) -> range:
    """The numbers of all layers: as many as the base says, or up to the last that is adapted."""
    numbers = [m.removeprefix(FRONT).partition(".")[0] for m in modules if m.startswith(FRONT)]
    last = max((int(n) for n in numbers if n.isdigit()), default=-1)
    return range(min(max(facts.layers or 0, last + 1), 4096))


def _dtype(even: Even) -> str:
    return next((a.dtype for a, _ in even.factors.values()), "F32")
