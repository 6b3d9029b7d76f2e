"""PEFT's tensors and config for an adapter: what is written, and what PEFT has no place for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratools.adapter import Adapter, Dense, Kind, Leaf, LowRank, Renormed, Replace
from loratools.errors import error, shown
from loratools.formats.peft_config import config_for, saves_itself, twice
from loratools.formats.peft_keys import BASE, TOKENS, saved_stem


def disassemble(adapter: Adapter) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """PEFT's tensors by key, and its config.

    RefusedError `loss` for what PEFT has no place for: full differences, column-wise DoRA.
    """
    source = adapter.config if adapter.format == "peft" else {}
    pairs = {k.rpartition(".")[0]: p for k, d in adapter.deltas.items() if (p := _low_rank(d))}
    owners = {m: o for m in pairs if (o := m.rpartition(".")[0]) in pairs}
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
            tensors[f"{stem}.lora_magnitude_vector"] = rest.magnitude
            rest = rest.delta
        match rest:
            case LowRank(a=a, b=b):
                if key in adapter.transposed:
                    down, up = "lora_embedding_A", "lora_embedding_B"
                else:
                    down, up = "lora_A.weight", "lora_B.weight"
                tensors[f"{stem}.{down}"], tensors[f"{stem}.{up}"] = a, b
            case Dense() if parameter == "bias" and module in pairs:
                said["lora_bias"] = True
                tensors[f"{stem}.lora_B.bias"] = _bias(rest, pairs[module].scaling)
            case None:
                pass
            case _:
                what = type(rest).__name__
                raise error("loss", f"PEFT has no place for this {what} ({shown(key)})")
    named = {name: replace(leaf, name=name) for name, leaf in tensors.items()}
    outer = {m: p for m, p in pairs.items() if m not in owners}
    _require_alike(pairs, owners, 2 if twice(source) else 1)
    return named, config_for(outer, source, saved=tuple(saved), rows=rows, said=said)


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


def _bias(delta: Dense, scaling: float) -> Leaf:
    """The bias of B, which PEFT multiplies by the scaling of its pair."""
    if delta.scaling == scaling:
        return delta.diff
    tensor = delta.diff.tensor()
    return Leaf.of("", (tensor.double() * (delta.scaling / scaling)).to(tensor.dtype))


def _require_alike(pairs: Mapping[str, LowRank], owners: Mapping[str, str], times: int) -> None:
    """An nn.MultiheadAttention and its out_proj have one rank and one alpha in PEFT."""
    for module, owner in owners.items():
        inner, outer = pairs[module], pairs[owner]
        if inner.rank != outer.rank or inner.scaling != times * outer.scaling:
            raise error(
                "loss",
                f"PEFT has one rank and alpha for {shown(owner)} and its out_proj; here they are "
                f"{inner.rank} and {outer.rank}, {inner.scaling:g} and {outer.scaling:g}",
            )
