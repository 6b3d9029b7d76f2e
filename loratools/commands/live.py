"""Weights in memory: a plan over them, and a fold into a live module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratools.adapter import TORCH_NAMES, Adapter, Leaf
from loratools.bind import bind
from loratools.commands.judging import judge
from loratools.commands.weighing import Given, require_used, weight
from loratools.containers.bundle import Bundle
from loratools.errors import error
from loratools.plan import Plan, Ties
from loratools.weights.base import Base, Shard

if TYPE_CHECKING:
    import torch


def plan_for(
    adapters: Sequence[Adapter],
    tensors: Mapping[str, torch.Tensor],
    *,
    weights: Sequence[Given] | None = None,
    config: Mapping[str, Any] | None = None,
    ties: Ties | None = None,
    allow: Sequence[str] = (),
) -> Plan:
    """A plan over weights in memory; raises every problem that `allow` does not let through."""
    leaves = {name: Leaf.of(name, tensor) for name, tensor in tensors.items()}
    bundle = Bundle("model in memory", (), _no_file)
    base = Base(bundle, (Shard("memory", leaves, {}, ""),), leaves, dict(config or {}))
    each = [weight(w) for w in ([1.0] * len(adapters) if weights is None else weights)]
    plan = bind(adapters, base, weights=each, ties=ties)
    require_used(each, [a.name for a in adapters])
    judge(plan.problems, allow).require()
    return plan


def _no_file(name: str) -> Any:
    raise error("not_found", f"a model in memory has no file {name}")


def fold_into(
    module: torch.nn.Module,
    adapters: Sequence[Adapter],
    *,
    weights: Sequence[Given] | None = None,
    allow: Sequence[str] = (),
) -> dict[str, float | None]:
    """Fold adapters into a live module's parameters, in place; `update_kept` by target.

    Tensors shared between parameters (tied embeddings) change for all of them, as PEFT does.
    Raises before anything changes; heads and vocabularies that the module lacks are refused.
    """
    import torch

    from loratools.folding import fold_tensor

    parameters = dict(module.state_dict(keep_vars=True))
    config = getattr(module, "config", None)
    facts = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    tensors = {n: p.detach() for n, p in parameters.items() if str(p.dtype)[6:] in _KNOWN}
    plan = plan_for(adapters, tensors, weights=weights, config=facts, ties="tied", allow=allow)
    unfit = [n for n in plan.targets if n in plan.new or n in plan.resized]
    if unfit:
        raise error("shape_mismatch", f"{unfit[0]}: the live module has no weight of that shape")
    kept: dict[str, float | None] = {}
    done: set[int] = set()
    with torch.no_grad():
        for name, target in plan.targets.items():
            tensor = parameters[name]
            if tensor.data_ptr() in done:
                continue
            done.add(tensor.data_ptr())
            folded, tally = fold_tensor(target, tensor, dtype=tensor.dtype)
            tensor.copy_(folded)
            kept[name] = tally.update_kept
    return kept


_KNOWN = frozenset(TORCH_NAMES.values())
