"""Adapters that act where a model runs, as modules: prompts, prefixes, bottlenecks around a model.

What each computes is what PEFT's (peft_model.py) and AdapterHub's (methods/*.py) own classes do;
positions of virtual tokens are taken out of what comes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loratools.adapter import Adapter, Leaf, Replace
from loratools.containers import safetensors
from loratools.errors import error, shown
from loratools.exporting import bottlenecks

if TYPE_CHECKING:
    import numpy as np

PREFIXES = ("prefix tuning", "cartridge")
PROMPTS = ("prompt tuning", "P-tuning", "CPT")
BOTTLENECKS = ("bottleneck", "Compacter")
# Their caches are laid out otherwise (huggingface/peft: utils/constants.py).
OWN_CACHES = ("bloom", "gpt_bigcode")
# Outputs with one entry for each position.
BY_POSITION = ("last_hidden_state", "start_logits", "end_logits")


def with_runtime(module: nn.Module, adapter: Adapter) -> nn.Module:
    """A module around `module` that runs with the adapter: takes input_ids and attention_mask.

    Returns a dict of tensors, positions of virtual tokens left out. Heads that come with the
    adapter and bottlenecks are put into `module` itself. Raises not_exportable for methods that
    have no such module.
    """
    runtime = adapter.runtime
    if runtime is None:
        message = "changes weights alone: fold it, and export the model"
        raise error("not_exportable", f"{shown(adapter.name)} {message}")
    _refuse_pairs(module, adapter)
    method = runtime.method
    if method in BOTTLENECKS:
        bottlenecks.insert(module, adapter)
        made: nn.Module = Plain(module)
    elif method in PREFIXES:
        made = Prefixed(module, adapter)
    elif method in PROMPTS and adapter.format == "adapterhub":
        made = PromptedWithin(module, adapter)
    elif method in PROMPTS:
        made = Prompted(module, _virtual(adapter))
    else:
        message = f"{shown(adapter.name)}: {shown(method)} cannot be exported inside a graph"
        raise error("not_exportable", f"{message}; prompts, prefixes and bottlenecks can")
    _put_heads(module, adapter)
    return made.eval()


def _refuse_pairs(module: nn.Module, adapter: Adapter) -> None:
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        message = "virtual tokens of encoder and decoder have no place in a graph"
        raise error("not_exportable", f"{shown(adapter.name)}: {message}")


def _virtual(adapter: Adapter) -> Tensor:
    """Virtual tokens (n, width) as they come out of their encoder, run once."""
    runtime = adapter.runtime
    leaf: Leaf | None = runtime.virtual if runtime is not None else None
    if leaf is None:
        message = "what its virtual tokens come to cannot be told (gates, or several places)"
        raise error("not_exportable", f"{shown(adapter.name)}: {message}")
    return leaf.tensor().float()


def _put_heads(module: nn.Module, adapter: Adapter) -> None:
    """Copy the adapter's own heads into the module."""
    known: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
    places = [p.data_ptr() for p in known.values()]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key, delta in adapter.deltas.items():
        if not isinstance(delta, Replace) or delta.rows is not None or delta.then is not None:
            message = f"{shown(key)} is no whole weight: fold it before"
            raise error("not_exportable", f"{shown(adapter.name)}: {message}")
        parameter = known.get(key)
        if parameter is None:
            message = f"{shown(adapter.name)} brings {shown(key)}, which the model does not have"
            raise error("unmatched", message)
        if tuple(parameter.shape) != delta.value.shape:
            shapes = f"is {delta.value.shape}, the model's is {tuple(parameter.shape)}"
            raise error("shape_mismatch", f"{shown(key)} {shapes}")
        found[key] = parameter, delta.value.tensor()
        if places.count(parameter.data_ptr()) > 1 and not torch.equal(parameter, found[key][1]):
            message = "differs from the embedding that it shares its numbers with"
            raise error("tied", f"{shown(adapter.name)}: {shown(key)} {message}")
    with torch.no_grad():
        for parameter, value in found.values():
            parameter.copy_(value)


# ------------------------------------------------------------------------------- modules


class Around(nn.Module):
    """What the modules here share: the model within, and its config."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.m = module

    @property
    def config(self) -> Any:
        return self.m.config


class Plain(Around):
    """A model whose layers have the adapter in them."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return _tensors(self.m(input_ids=input_ids, attention_mask=attention_mask), 0, 0)


class Prompted(Around):
    """Virtual tokens before the embeddings of the input (PEFT: prompt tuning, P-tuning, CPT)."""

    def __init__(self, module: nn.Module, prompt: Tensor) -> None:
        super().__init__(module)
        self.prompt = nn.Parameter(prompt, requires_grad=False)  # (tokens, width)
        self.tokens = len(prompt)  # a number, whoever traces this

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        embeddings = self.m.get_input_embeddings()(input_ids)  # type: ignore[operator]
        prompt = self.prompt.to(embeddings.dtype).expand(input_ids.shape[0], -1, -1)
        found = self.m(
            inputs_embeds=torch.cat([prompt, embeddings], 1),
            attention_mask=_longer(attention_mask, self.tokens),
        )
        return _tensors(found, 0, self.tokens)


class PromptedWithin(Around):
    """Virtual tokens behind the embeddings, their positions and norm (AdapterHub)."""

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        super().__init__(module)
        self.prompt = nn.Parameter(_virtual(adapter), requires_grad=False)
        self.tokens = len(self.prompt)
        inner = adapter.config.get("config")
        said: Mapping[str, Any] = inner if isinstance(inner, Mapping) else {}
        self.first = 1 if said.get("combine") == "prefix_after_bos" else 0
        there = getattr(getattr(module, "base_model", module), "embeddings", None)
        if not isinstance(there, nn.Module) or not hasattr(there, "LayerNorm"):
            message = f"adapters has no prompts for a {shown(type(module).__name__)}"
            raise error("not_exportable", f"{shown(adapter.name)}: {message}")
        there.register_forward_hook(self._joined)

    def _joined(self, _: nn.Module, __: Any, found: Tensor) -> Tensor:
        prompt = self.prompt.to(found.dtype).expand(found.shape[0], -1, -1)
        return torch.cat([found[:, : self.first], prompt, found[:, self.first :]], 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        mask = _longer(attention_mask, self.tokens)
        found = self.m(input_ids=input_ids, attention_mask=mask)
        return _tensors(found, self.first, self.tokens)


class Prefixed(Around):
    """Keys and values of virtual tokens before those of every layer."""

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        super().__init__(module)
        past = prefix_past(adapter, module.config)
        self.states = nn.ParameterList(
            nn.Parameter(torch.from_numpy(a), requires_grad=False) for a in past.arrays.values()
        )
        self.counted = past.counted
        self.kind = str(getattr(module.config, "model_type", ""))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        from transformers import DynamicCache

        # Gemma's sliding layers keep a part of their past only.
        cache = DynamicCache(config=self.config) if "gemma" in self.kind else DynamicCache()
        states: list[Tensor] = [s.expand(input_ids.shape[0], -1, -1, -1) for s in self.states]
        for layer in range(len(states) // 2):
            cache.update(states[2 * layer], states[2 * layer + 1], layer)
        more: dict[str, Tensor] = {}
        if not self.counted:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            more["position_ids"] = places.unsqueeze(0).expand(input_ids.shape[0], -1)
        mask = _longer(attention_mask, self.states[0].shape[2])
        found = self.m(input_ids=input_ids, attention_mask=mask, past_key_values=cache, **more)
        return _tensors(found, 0, 0)


def _longer(mask: Tensor, by: int) -> Tensor:
    return torch.cat([mask.new_ones(mask.shape[0], by), mask], 1)


def _tensors(found: Any, first: int, by: int) -> dict[str, Tensor]:
    """The outputs that are tensors, without the positions first:first+by."""
    made: dict[str, Tensor] = {}
    items: Iterable[tuple[str, Any]] = found.items()
    for name, value in items:
        if not isinstance(value, Tensor):
            continue
        if by and (name in BY_POSITION or (name == "logits" and value.dim() == 3)):
            after = value[:, first + by :]
            value = torch.cat([value[:, :first], after], 1) if first else after
        made[name] = value
    return made


# ------------------------------------------------------------------------------- as a past


@dataclass(frozen=True, slots=True)
class Past:
    """Keys and values of virtual tokens by the names of a graph's inputs: (1, heads, tokens, size).

    `counted`: the input's positions go on behind them (PEFT), else they begin at 0 (AdapterHub).
    """

    arrays: Mapping[str, np.ndarray]
    counted: bool = True

    @property
    def tokens(self) -> int:
        return int(next(iter(self.arrays.values())).shape[2])


def prefix_past(adapter: Adapter, config: Any) -> Past:
    """A prefix as the past of an unmodified graph, for a config of transformers (or its dict)."""
    runtime = adapter.runtime
    if runtime is None or runtime.method not in PREFIXES:
        method = "no runtime adapter" if runtime is None else shown(runtime.method)
        raise error("not_exportable", f"{shown(adapter.name)} is {method}, and no prefix")
    said = config if isinstance(config, Mapping) else config.to_dict()
    inner = said.get("text_config")
    said = inner if isinstance(inner, Mapping) else said
    if said.get("model_type") in OWN_CACHES:
        message = f"{shown(said['model_type'])} lays its keys out in a way of its own"
        raise error("not_exportable", f"{shown(adapter.name)}: {message}")
    rows = _virtual(adapter)
    layers = said.get("num_hidden_layers") or said.get("n_layer")
    heads = said.get("num_attention_heads") or said.get("n_head")
    hidden = said.get("hidden_size") or said.get("n_embd")
    if not layers or not heads or not hidden:
        raise error("missing", "the config does not say layers, heads and hidden size")
    keys = said.get("num_key_value_heads") or heads
    size = said.get("head_dim") or hidden // heads
    if rows.shape[1] != 2 * layers * keys * size:
        message = (
            f"{shown(adapter.name)}: a token has {rows.shape[1]} numbers, the model's layers "
            f"{layers} x 2 x {keys} x {size}"
        )
        raise error("shape_mismatch", message)
    states = rows.view(1, len(rows), 2 * layers, keys, size).permute(2, 0, 3, 1, 4)
    arrays = {
        f"past_key_values.{n // 2}.{('key', 'value')[n % 2]}": states[n].contiguous().numpy()
        for n in range(2 * layers)
    }
    return Past(arrays, adapter.format != "adapterhub")


def prompt_past(module: nn.Module, adapter: Adapter) -> Past:
    """A prompt as the past of an unmodified graph: a causal model is run on it once.

    What comes later does not change the keys and values of what stands before.
    """
    runtime = adapter.runtime
    if runtime is None or runtime.method not in PROMPTS or adapter.format == "adapterhub":
        raise error("not_exportable", f"{shown(adapter.name)} is no prompt of PEFT")
    with torch.no_grad():
        kind = next(module.parameters()).dtype
        prompt = _virtual(adapter).to(kind).unsqueeze(0)
        found = module(inputs_embeds=prompt, use_cache=True).past_key_values
    if found is None:
        message = f"a {shown(type(module).__name__)} keeps no keys and values"
        raise error("not_exportable", f"{shown(adapter.name)}: {message}")
    arrays = {}
    for n, layer in enumerate(found.layers):
        for word, state in (("key", layer.keys), ("value", layer.values)):
            arrays[f"past_key_values.{n}.{word}"] = state.float().numpy()
    return Past(arrays)


def write_past(past: Past, out: Path) -> str:
    """Write a past as safetensors, for use beside the unmodified graph; its sha256."""
    leaves = {name: Leaf.of(name, torch.from_numpy(a)) for name, a in past.arrays.items()}
    metadata = {"format": "pt", "positions": "behind" if past.counted else "from 0"}
    return safetensors.write(out, leaves, metadata)


def read_past(path: Path) -> Past:
    """What `write_past` wrote."""
    from loratools.containers.local import LocalFile

    header = safetensors.read_header(LocalFile(path))
    odd = [name for name, leaf in header.leaves.items() if len(leaf.shape) != 4]
    if odd or not header.leaves:
        said = f"{shown(odd[0])} has no four dimensions" if odd else "it is empty"
        raise error("malformed", f"{shown(path)} is no past of keys and values: {said}")
    arrays = {name: leaf.tensor().numpy() for name, leaf in header.leaves.items()}
    return Past(arrays, header.metadata.get("positions") != "from 0")
