"""PEFT's tensors and config for an adapter: what is written, and what PEFT has no place for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratools.adapter import (
    Adapter,
    Chained,
    Dense,
    Experts,
    Hadamard,
    Kind,
    Kronecker,
    Leaf,
    LowRank,
    Original,
    Renormed,
    Replace,
    Rotated,
    Scaled,
    Sparse,
    Spectral,
    leaves,
)
from loratools.errors import error, shown
from loratools.formats.peft_config import VARIANTS, config_for, saves_itself, twice
from loratools.formats.peft_experts import disassembled, pairs_of, said_by
from loratools.formats.peft_keys import BASE, PREFIX, TOKENS, saved_stem
from loratools.formats.peft_method_writing import CARRIED, flavour, method_config, written
from loratools.formats.residual import FIELD, REPEATABLE
from loratools.views import later


def beyond(adapter: Adapter) -> dict[str, str]:
    """The keys of an adapter that PEFT has no place for, with what stands there."""
    if as_read(adapter):
        return {}
    kind = flavour(adapter)
    if kind is not None:
        return written(adapter, kind).beyond
    pairs = {k.rpartition(".")[0] for k, d in adapter.deltas.items() if _low_rank(d)}
    found = {}
    for key, delta in adapter.deltas.items():
        module, _, parameter = key.rpartition(".")
        rest: Kind | None = delta
        while isinstance(rest, Replace):
            rest = rest.then
        match rest:
            case Renormed(axis="in"):
                found[key] = "a DoRA whose norm runs over columns"
            case Renormed(delta=Dense()):
                found[key] = "a DoRA over a difference in full"
            case Dense() if parameter != "bias":
                found[key] = "a difference in full"
            case Dense() if module not in pairs:
                found[key] = "a bias of a module without a pair"
            case Renormed(delta=LowRank()):
                pass
            case Renormed(delta=inner):
                found[key] = f"a DoRA over {_called(inner)}"
            case (
                Hadamard() | Kronecker() | Sparse() | Spectral() | Scaled() | Rotated() | Chained()
            ):
                found[key] = _called(rest)
    return found


def disassemble(adapter: Adapter) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """PEFT's tensors by key, and its config; as they were read where nothing was changed.

    RefusedError `loss` for what PEFT has no place for: full differences, column-wise DoRA.
    """
    if as_read(adapter):
        return dict(adapter.original), dict(adapter.config)
    kind = flavour(adapter)
    if kind is not None:
        made = written(adapter, kind)
        own = _as_wide_as(adapter, made.tensors)
        return own, method_config(adapter, kind, made)
    source = plain_source(adapter)
    pairs = {k.rpartition(".")[0]: p for k, d in adapter.deltas.items() if (p := _low_rank(d))}
    # Only nn.MultiheadAttention has a pair of its own and one within it, its out_proj's.
    owners = {m: o for m in pairs if (o := m.rpartition(".")[0]) in pairs}
    pairs |= _alike(pairs, owners, 2 if twice(source) else 1)
    tensors: dict[str, Leaf] = {}
    saved: list[str] = []
    rows: dict[str, list[int]] = {}
    said: dict[str, Any] = {}  # what the config has to say because of the tensors
    only_tokens = source.get("peft_type") == "TRAINABLE_TOKENS" and not pairs
    adapter_part = "" if only_tokens else ".token_adapter"
    for key, delta in adapter.deltas.items():
        module, _, parameter = key.rpartition(".")
        stem = saved_stem(module, owners.get(module))
        rest: Kind | None = delta
        if isinstance(rest, Replace) and rest.rows is None:
            value, rest = rest.value, rest.then
            tokens = adapter_part if isinstance(rest, Replace) else ""
            inside = f"{tokens}.{BASE}" if module in pairs or rest is not None else ""
            tensors[f"{stem}{inside}.{parameter}"] = value
            if parameter == "bias" and module in pairs:
                said.setdefault("bias", "lora_only")
            elif not inside and not (source and saves_itself(source, module, parameter)):
                saved.append(module)
        if isinstance(rest, Replace) and rest.rows is not None:
            tensors[f"{stem}{adapter_part}.{TOKENS}"] = rest.value
            rows[module], rest = list(rest.rows), rest.then
        if isinstance(rest, Renormed) and rest.axis == "out":
            said["use_dora"] = True
            tensors[f"{stem}.lora_magnitude_vector"] = _magnitude(rest)
            rest = rest.delta
        match rest:
            case LowRank():
                if key in adapter.transposed:
                    down, up = "lora_embedding_A", "lora_embedding_B"
                else:
                    down, up = "lora_A.weight", "lora_B.weight"
                pair = pairs[module]
                tensors[f"{stem}.{down}"], tensors[f"{stem}.{up}"] = pair.a, pair.b
            case Dense() if parameter == "bias" and module in pairs:
                said["lora_bias"] = True
                tensors[f"{stem}.lora_B.bias"] = _bias(rest, pairs[module].scaling)
            case Experts() | None:  # experts' stacks: below, all of a module together
                pass
            case _:
                what = type(rest).__name__
                raise error("loss", f"PEFT has no place for this {what} ({shown(key)})")
    outer = {m: p for m, p in pairs.items() if m not in owners}
    if "lora_bias" in said:  # one flag for all: those without get zeros
        for module, pair in outer.items():
            tensors.setdefault(f"{PREFIX}{module}.lora_B.bias", _zeros(pair.b, pair.b.shape[:1]))
    tensors |= disassembled(adapter)
    said |= said_by(adapter, source)
    return _as_wide_as(adapter, tensors), config_for(
        outer, source, saved=tuple(saved), rows=rows, said=said, parameters=pairs_of(adapter)
    )


def _as_wide_as(adapter: Adapter, tensors: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Tensors under their names; what was computed in float64 as float32, unless that is stored."""
    stored = (leaf for delta in adapter.deltas.values() for leaf in leaves(delta))
    wide = any(leaf.dtype == "F64" and leaf.made is None for leaf in stored)
    return {
        name: replace(leaf if wide else _narrow(leaf), name=name) for name, leaf in tensors.items()
    }


def _narrow(leaf: Leaf) -> Leaf:
    if leaf.dtype != "F64" or leaf.made is None:
        return leaf
    return later(leaf.name, "F32", leaf.shape, lambda: leaf.tensor().float())


def as_read(adapter: Adapter) -> bool:
    """Whether the deltas are those of the file, whose tensors are then written again."""
    original = adapter.original
    changed = isinstance(original, Original) and not original.are(adapter.deltas)
    return adapter.format == "peft" and bool(original) and not changed


def plain_source(adapter: Adapter) -> Mapping[str, Any]:
    """The config that a LoRA is written from; of another type only what stays true."""
    if adapter.format != "peft":
        return {}
    config = adapter.config
    other = any(field in config for field in ("alpha", "init_r", "feedforward_modules"))
    if config.get("peft_type", "" if other else "LORA") in ("LORA", "TRAINABLE_TOKENS"):
        kept = {k: v for k, v in config.items() if not v or k not in (*VARIANTS, "use_bdlora")}
        # A pair upon the plain base: PEFT would take its start out of the base once more.
        given = adapter.assumed.get("residual") == "given"
        again = config.get(FIELD) in REPEATABLE and not given
        return {**kept, FIELD: True} if again else kept
    return {k: config[k] for k in (*CARRIED, "fan_in_fan_out") if config.get(k) is not None}


def remedy_for(delta: Kind) -> str | None:
    """What can be done about a delta that PEFT has no place for; None where nothing special."""
    match delta:
        case Hadamard() | Kronecker() | Sparse() | Spectral():
            return "--rank N or --energy E makes it a LoRA that is as near as can be"
        case Scaled() | Rotated() | Chained():
            return "with the base (--base), --rank N makes it a LoRA that is as near as can be"
        case Replace(then=then) if then is not None:
            return remedy_for(then)
        case _:
            return None


def _called(delta: Kind) -> str:
    if isinstance(delta, Spectral) and delta.method == "made":
        return "a change of the weight that has no exact factors"
    name = _NAMES.get(type(delta).__name__, "a " + type(delta).__name__)
    method = getattr(delta, "method", None)
    return name if method is None else f"{name} ({method})"


_NAMES = {
    "Hadamard": "a LoHa",
    "Kronecker": "a LoKr",
    "Sparse": "a sparse update",
    "Spectral": "an update by a transform",
    "Scaled": "a scaled weight",
    "Rotated": "a rotated weight",
    "Chained": "an update that contains the weight",
}


def _low_rank(delta: Kind | None) -> LowRank | None:
    match delta:
        case Replace(then=then):
            return _low_rank(then)
        case Renormed(delta=LowRank() as inner):
            return inner
        case LowRank():
            return delta
        case _:
            return None


def _magnitude(delta: Renormed) -> Leaf:
    """DoRA's magnitudes in PEFT's shape: (out,), of a convolution (1, out, 1, ...)."""
    leaf, kernel = (
        delta.magnitude,
        delta.delta.a.shape[2:] if isinstance(delta.delta, LowRank) else (),
    )
    wanted = (1, leaf.numel, *[1] * len(kernel)) if kernel else (leaf.numel,)
    return leaf if leaf.shape == wanted else Leaf.of("", leaf.tensor().reshape(wanted))


def _bias(delta: Dense, scaling: float) -> Leaf:
    """The bias of B, which PEFT multiplies by the scaling of its pair."""
    return delta.diff if delta.scaling == scaling else _times(delta.diff, delta.scaling / scaling)


def _alike(
    pairs: Mapping[str, LowRank], owners: Mapping[str, str], times: int
) -> dict[str, LowRank]:
    """Pairs as nn.MultiheadAttention has them: one rank and one alpha for both projections."""
    changed: dict[str, LowRank] = {}
    for module, owner in owners.items():
        inner, outer = pairs[module], pairs[owner]
        rank = max(inner.rank, outer.rank)
        b = _times(inner.b, inner.scaling / (times * outer.scaling))
        changed[module] = _padded(replace(inner, b=b, scaling=times * outer.scaling), rank)
        changed[owner] = _padded(outer, rank)
    return changed


def _padded(pair: LowRank, rank: int) -> LowRank:
    """The same update with rows and columns of zeros up to a rank."""
    more = rank - pair.rank
    if not more:
        return pair
    import torch

    a, b = pair.a.tensor(), pair.b.tensor()
    a = torch.cat([a, a.new_zeros(more, *a.shape[1:])])
    b = torch.cat([b, b.new_zeros(len(b), more, *b.shape[2:])], 1)
    return replace(pair, a=Leaf.of("", a), b=Leaf.of("", b), alpha=None)


def _times(leaf: Leaf, factor: float) -> Leaf:
    if factor == 1:
        return leaf
    tensor = leaf.tensor()
    return Leaf.of("", (tensor.double() * factor).to(tensor.dtype))


def _zeros(like: Leaf, size: tuple[int, ...]) -> Leaf:
    return Leaf.of("", like.tensor().new_zeros(size))
