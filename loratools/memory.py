"""The library in memory: load, save, merge and fold adapters without any output folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loratools import formats
from loratools.adapter import Adapter, Leaf
from loratools.commands import merge as merging
from loratools.commands import sources
from loratools.commands.check import FOLD_ONLY
from loratools.commands.live import fold_into as fold_into
from loratools.commands.live import plan_for as plan_for
from loratools.commands.weighing import Given, weights_for
from loratools.errors import refusal
from loratools.formats import peft
from loratools.formats.peft_writing import disassemble
from loratools.plan import Plan
from loratools.weights.layout import common_dtype

if TYPE_CHECKING:
    import torch


def load(source: str | Path, *, assume: Mapping[str, str] | None = None) -> Adapter:
    """The adapter at a source; its factors stay on disk until they are used.

    Raises what its own files contradict (FitError, RefusedError), MalformedError, NotFoundError.
    """
    return _sound(sources.adapter(source, assume))


def _sound(adapter: Adapter) -> Adapter:
    refused = refusal(p for p in adapter.problems if p.code not in FOLD_ONLY)
    if refused:
        raise refused
    return adapter


def save(adapter: Adapter, path: str | Path, to: str = "peft", *, force: bool = False) -> Path:
    """Write an adapter in the format `to`; factors and dtypes stay where it can hold them.

    Raises RefusedError `loss` for what it cannot hold, by name.
    """
    from loratools.commands.writing import format_named, ready_for, writes_file
    from loratools.weights.publishing import publish

    name, out = format_named(to), Path(path)
    ready = ready_for(adapter, name)
    refused = refusal(ready.problems)
    if refused:
        raise refused
    as_file = writes_file(out, name)
    inputs = [adapter.folder] if adapter.folder else []
    with publish(out, as_file=as_file, inputs=inputs, force=force) as output:
        formats.WRITERS[name].write(
            ready.adapter, output.folder / out.name if as_file else output.folder
        )
    return out


def from_state_dict(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], *, name: str = "state dict"
) -> Adapter:
    """An adapter from PEFT's state dict (keys as PEFT saves them) and its config as a dict."""
    leaves = {key: Leaf.of(key, tensor.detach()) for key, tensor in tensors.items()}
    return _sound(peft.assemble(leaves, dict(config), name=name))


def to_state_dict(adapter: Adapter) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """PEFT's state dict and config for an adapter."""
    if adapter.runtime is not None:
        from loratools.commands.writing import ready_for

        made = ready_for(adapter, "peft").adapter
        found = {**made.original, **(made.runtime.tensors if made.runtime is not None else {})}
        return {key: leaf.tensor() for key, leaf in found.items()}, dict(made.config)
    leaves, config = disassemble(adapter)
    return {key: leaf.tensor() for key, leaf in leaves.items()}, config


def from_model(peft_model: Any, adapter_name: str = "default") -> Adapter:
    """The adapter inside a live `peft.PeftModel`, as PEFT itself would save it."""
    from peft import get_peft_model_state_dict  # type: ignore[import-not-found,unused-ignore]

    config = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in peft_model.peft_config[adapter_name].to_dict().items()
    }
    tensors = get_peft_model_state_dict(peft_model, adapter_name=adapter_name)
    return from_state_dict(tensors, config, name=f"model's adapter {adapter_name}")


def merge_adapters(
    adapters: Sequence[Adapter],
    *,
    weights: Sequence[Given] | Mapping[str, Any] | str | None = None,
    method: str = "linear",
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
) -> Adapter:
    """One adapter whose update is the weighted sum of all; cheap to call in a sweep.

    Exact without `rank` and `energy` (ranks add up), else the optimal truncation. Raises FitError
    `needs_base` for kinds whose sum depends on W0.
    """
    _, factors = weights_for([a.name for a in adapters], weights, required=True)
    method, rank = merging.checked_method(method, rank, energy)
    kind = merging.dtype_name(dtype)
    summed = merging.merge_adapters(
        adapters, factors, method=method, rank=rank, energy=energy, dtype=kind
    )
    return summed.adapter


# ------------------------------------------------------------------------------- folding


class Tensors(Protocol):
    """Anything with `keys()` and `get_tensor()`, such as `safetensors.safe_open`."""

    def keys(self) -> Any: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


def fold_tensors(source: Tensors, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) for every tensor of the folded model, one at a time.

    Untouched tensors come as the source gives them; touched ones keep their dtype, and 8-bit
    floats their scale, as long as it holds what they become.
    """
    from loratools.folding import fold_tensor, torch_dtype

    def folded(name: str) -> dict[str, torch.Tensor]:
        target, tensor = plan.targets.get(name), source.get_tensor(name)
        if target is None or not target.terms:
            return {name: tensor}
        made, tally = fold_tensor(target, tensor, dtype=tensor.dtype)
        if target.base is None or target.base.scale is None:
            return {name: made}
        scale = target.base.scale
        unit = source.get_tensor(scale.name)
        return {name: made, scale.name: unit if tally.scale is None else unit * 0 + tally.scale}

    touched = {n: t.base for n, t in plan.targets.items() if t.terms and t.base is not None}
    scaled = {leaf.scale.name: n for n, leaf in touched.items() if leaf.scale is not None}
    early: dict[str, torch.Tensor] = {}  # a weight and its scale come of one sum
    for name in source.keys():  # noqa: SIM118 - safe_open is no mapping
        if name not in early:
            early |= folded(scaled.get(name, name))
        yield name, early.pop(name)
    for name in plan.new:
        target = plan.targets[name]
        start = target.base.tensor() if target.base else None
        kind = target.base.dtype if target.base else common_dtype(plan.base)
        dtype = torch_dtype(plan.counts.get(name, kind))
        yield name, fold_tensor(target, start, dtype=dtype)[0]
