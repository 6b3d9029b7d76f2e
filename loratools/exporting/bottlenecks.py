"""AdapterHub's bottlenecks as modules of our own, put where its library puts them.

Formulas and places: adapter-hub/adapters:methods/modeling.py (Adapter, ParallelAdapter,
NICECouplingBlock), methods/bottleneck.py, models/*/modeling_*.py; arXiv 1902.00751 and 2005.00052.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from loratools.adapter import Adapter, Leaf
from loratools.errors import error, shown

_PLACE = re.compile(
    r"((?:[^.]+\.)+?)(?:adapters|attention_text_(?:task|lang)_adapters|"
    r"layer_text_(?:task|lang)_adapters)\.[^.]+\."
    r"((?:adapter_down|adapter_up|adapter_norm_before|adapter_norm_after|gate)\..+|scaling)"
)
_COUPLING = re.compile(r"((?:[^.]+\.)*?)invertible_adapters\.[^.]+\.([FG]\.[02]\.(?:weight|bias))")
ATTENTIONS, FEEDS = ("self_attn", "attn", "attention"), ("mlp", "ffn", "feed_forward")
BEFORE = ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")
AFTER = ("sa_layer_norm",), ("output_layer_norm",)  # DistilBERT: the norm follows the sum
# Of which a norm's input is the stream, and each block's result is added to it by itself: others
# (Gemma, GPT-J, Phi) have these names for something else.
NORMED_BEFORE = (
    "GPT2Block LlamaDecoderLayer MistralDecoderLayer Qwen2DecoderLayer Qwen3DecoderLayer"
)
NORMED_AFTER = "TransformerBlock"
KNOWN = "layers as those of BERT, RoBERTa, DistilBERT, GPT-2, Llama and Mistral"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a config says about how a bottleneck is wired; defaults are the library's."""

    non_linearity: str = "relu"
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    is_parallel: bool = False
    scaling: float | str = 1.0
    use_gating: bool = False

    @staticmethod
    def of(config: Mapping[str, Any]) -> Settings:
        """The settings in a config, also in one that lies within another."""
        inner = config.get("config")
        said = inner if isinstance(inner, Mapping) else config
        if "non_linearity" not in said:
            message = "the adapter's config does not say how its bottlenecks are wired"
            raise error("missing", f"{message} (non_linearity, original_ln_before, ...)")
        names = Settings.__dataclass_fields__
        return Settings(**{name: said[name] for name in names if said.get(name) is not None})


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """A non-linearity by the name that transformers has for it; `leakyrelu` is adapters' own."""
    if name.lower() == "leakyrelu":
        return nn.functional.leaky_relu
    from transformers.activations import ACT2FN

    if name.lower() not in ACT2FN:
        raise error("unknown_config", f"non_linearity {shown(name)} is not known to transformers")
    found: Callable[[Tensor], Tensor] = ACT2FN[name.lower()]
    return found


class Bottleneck(nn.Module):
    """down (width, hidden), a non-linearity, up (hidden, width), and what stands around them."""

    def __init__(self, leaves: Mapping[str, Leaf], settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        down = [n for n in leaves if n.startswith("adapter_down.") and len(leaves[n].shape) == 2]
        self.down = _linear(leaves, down[0].removesuffix(".weight") if down else "adapter_down.0")
        self.up = _linear(leaves, "adapter_up")
        self.act = activation(settings.non_linearity)
        self.norm_before = _norm(leaves, "adapter_norm_before")
        self.norm_after = _norm(leaves, "adapter_norm_after")
        self.gate = _linear(leaves, "gate") if "gate.weight" in leaves else None
        if isinstance(settings.scaling, str):
            if "scaling" not in leaves:
                raise error("missing", "its config says a trained scaling, which is not there")
            self.scaling: nn.Parameter | float = nn.Parameter(leaves["scaling"].tensor().float())
        else:
            self.scaling = float(settings.scaling)

    def forward(self, hidden: Tensor, stream: Tensor, norm: nn.Module | None) -> Tensor:
        """What stands instead of norm(hidden + stream), or of hidden + stream without a norm."""
        made = self.around(hidden, stream, norm)
        if not self.settings.original_ln_after:
            return made
        found: Tensor = made + stream if norm is None else norm(made + stream)
        return found

    def around(self, hidden: Tensor, stream: Tensor, norm: nn.Module | None) -> Tensor:
        """What comes of a block's result before the stream is added to it (or is not)."""
        said = self.settings
        if said.is_parallel:
            made = self._change(stream)
            made = made if self.norm_after is None else self.norm_after(made)
            made = made + hidden
        else:
            residual = hidden
            if said.original_ln_before:
                hidden = hidden + stream
                if norm is not None:
                    residual = hidden if said.residual_before_ln == "post_add" else residual
                    hidden = norm(hidden)
            residual = residual if said.residual_before_ln else hidden
            made = self._change(hidden)
            if said.adapter_residual_before_ln:
                made = made + residual
            if self.norm_after is not None:
                made = self.norm_after(made)
            if not said.adapter_residual_before_ln:
                made = made + residual
        return made

    def _change(self, hidden: Tensor) -> Tensor:
        inner = hidden if self.norm_before is None else self.norm_before(hidden)
        made: Tensor = self.up(self.act(self.down(inner))) * self.scaling
        if self.gate is not None:
            made = made * torch.sigmoid(self.gate(hidden)).mean(1).unsqueeze(-1)
        return made


class Coupling(nn.Module):
    """An invertible adapter behind the embeddings: y1 = x1 + F(x2), y2 = x2 + G(y1) (NICE)."""

    def __init__(self, leaves: Mapping[str, Leaf], act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = nn.ModuleList([_linear(leaves, "F.0"), _linear(leaves, "F.2")])
        self.g = nn.ModuleList([_linear(leaves, "G.0"), _linear(leaves, "G.2")])
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        half = self.f[1].out_features
        one, two = x[..., :half], x[..., half:]
        one = one + self.f[1](self.act(self.f[0](two)))
        two = two + self.g[1](self.act(self.g[0](one)))
        return torch.cat([one, two], -1)


def _linear(leaves: Mapping[str, Leaf], name: str) -> nn.Linear:
    weight, bias = leaves.get(f"{name}.weight"), leaves.get(f"{name}.bias")
    if weight is None:
        raise error("missing", f"a bottleneck has no {shown(name)}.weight")
    outer, inner = weight.shape
    made = nn.Linear(inner, outer, bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(weight.tensor())
        if bias is not None:
            made.bias.copy_(bias.tensor())
    return made


def _norm(leaves: Mapping[str, Leaf], name: str) -> nn.LayerNorm | None:
    weight, bias = leaves.get(f"{name}.weight"), leaves.get(f"{name}.bias")
    if weight is None or bias is None:
        return None
    made = nn.LayerNorm(weight.shape[0])
    with torch.no_grad():
        made.weight.copy_(weight.tensor())
        made.bias.copy_(bias.tensor())
    return made


# ------------------------------------------------------------------------------- putting them in


def insert(module: nn.Module, adapter: Adapter) -> None:
    """Put an adapter's bottlenecks into a transformers model, in place.

    Raises not_exportable where its layers are none that we know, unmatched for places that it
    lacks, before anything changes.
    """
    runtime = adapter.runtime
    assert runtime is not None
    settings = Settings.of(adapter.config)
    tensors = {**runtime.tensors, **runtime.plain}
    places: dict[str, dict[str, Leaf]] = {}
    coupling: dict[str, Leaf] = {}
    for key, leaf in (runtime.plain or tensors).items():
        if found := _PLACE.fullmatch(key):
            places.setdefault(found[1][:-1], {})[found[2]] = leaf
        elif found := _COUPLING.fullmatch(key):
            coupling[found[2]] = leaf
        else:
            raise error("unexplained", f"{shown(key)} is no part of a bottleneck")
    todo: list[Callable[[], None]] = []
    for place, leaves in places.items():
        todo.append(_put(module, place, Bottleneck(leaves, settings)))
    if coupling:
        todo.append(_put_coupling(module, Coupling(coupling, activation(settings.non_linearity))))
    for put in todo:
        put()


def _put(module: nn.Module, place: str, one: Bottleneck) -> Callable[[], None]:
    parent, _, last = place.rpartition(".")
    if last in ("attention_adapters", "output_adapters"):
        layer = _submodule(module, parent)
        at, kind = last == "output_adapters", type(layer).__name__
        names = BEFORE[at] if kind in NORMED_BEFORE.split() else AFTER[at]
        block, norm = _named(layer, FEEDS if at else ATTENTIONS), _named(layer, names)
        if kind not in (*NORMED_BEFORE.split(), *NORMED_AFTER.split()) or not (block and norm):
            raise _unknown(place, layer)
        if kind not in NORMED_AFTER.split():
            return lambda: _beside(layer, last, one, block, norm)
        if not one.settings.original_ln_after:
            message = f"{shown(place)}: the layer's own norm cannot be left out"
            raise error("not_exportable", message)
        return lambda: _within(layer, last, one, block, norm)
    layer = _submodule(module, place)
    if not isinstance(getattr(layer, "dense", None), nn.Linear) or not hasattr(layer, "LayerNorm"):
        raise _unknown(place, layer)

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        found: Tensor = self.bottleneck(self.dense(hidden_states), input_tensor, self.LayerNorm)
        return found

    def put() -> None:
        layer.bottleneck = one
        layer.forward = MethodType(forward, layer)

    return put


def _beside(
    layer: nn.Module, name: str, one: Bottleneck, block: nn.Module, norm: nn.Module
) -> None:
    """Change what a block gives before the layer adds it to its stream, which enters the norm."""
    layer.add_module(name, one)
    seen: list[Tensor] = []

    def remember(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen[:] = [given[0]]

    def change(_: nn.Module, __: Any, found: Any) -> Any:
        hidden = found[0] if isinstance(found, tuple) else found
        stream = seen.pop()
        made = one.around(hidden, stream, None)
        if not one.settings.original_ln_after:
            made = made - stream  # which the layer adds whatever the config says
        return (made, *found[1:]) if isinstance(found, tuple) else made

    norm.register_forward_pre_hook(remember)
    block.register_forward_hook(change)


def _within(
    layer: nn.Module, name: str, one: Bottleneck, block: nn.Module, norm: nn.Module
) -> None:
    """The same where the stream is what enters the block, and a norm follows the sum."""
    layer.add_module(name, one)

    def change(_: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any], found: Any) -> Any:
        stream = given[0] if given else named["hidden_states"]
        hidden = found[0] if isinstance(found, tuple) else found
        made = one.around(hidden, stream, norm)
        return (made, *found[1:]) if isinstance(found, tuple) else made

    block.register_forward_hook(change, with_kwargs=True)


def _named(layer: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((m for n in names if isinstance(m := getattr(layer, n, None), nn.Module)), None)


def _submodule(module: nn.Module, path: str) -> nn.Module:
    """A module by its path, with or without the name that a class with a head puts before it."""
    known: dict[str, nn.Module] = dict(module.named_modules())
    ends = [name for name in known if name.endswith(f".{path}")]
    for some in (path, path.partition(".")[2], *(ends if len(ends) == 1 else ())):
        if some in known:
            return known[some]
    raise error("unmatched", f"the model has no {shown(path)}")


def _unknown(place: str, layer: nn.Module) -> Exception:
    message = f"{shown(place)}: bottlenecks are put into {KNOWN}, this is a"
    return error("not_exportable", f"{message} {shown(type(layer).__name__)}")


def _put_coupling(module: nn.Module, one: Coupling) -> Callable[[], None]:
    if getattr(module, "get_output_embeddings", lambda: None)() is not None:
        message = "an invertible adapter is undone before a language model's head"
        raise error("not_exportable", f"{message}, which is not part of the export")
    base = getattr(module, "base_model", module)
    there = getattr(base, "embeddings", None)
    there = there if isinstance(there, nn.Module) else getattr(base, "embed_tokens", None)
    there = there if isinstance(there, nn.Module) else getattr(base, "drop", None)
    if not isinstance(there, nn.Module):
        raise _unknown("embeddings", module)

    def put() -> None:
        there.coupling = one
        there.register_forward_hook(lambda _, __, found: one(found))

    return put
