"""Runtime adapters: what a prompt, a prefix or a Compacter comes to, and their averages; lazily."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratools.adapter import FLOATS, TORCH_NAMES, Leaf, Runtime
from loratools.errors import Problem, error, shown
from loratools.views import later, renamed, widest

if TYPE_CHECKING:
    import torch

PREFIX, PROMPT = "prefix tuning", "prompt tuning"
BOTTLENECK, COMPACTER = "bottleneck", "Compacter"
UNION = "union"
# Whose tensors an average has a meaning for; of the others the parts depend on each other.
AVERAGED = frozenset({PREFIX, PROMPT, "P-tuning", BOTTLENECK})
# Whose virtual tokens may stand one after another.
JOINED = frozenset({PREFIX, PROMPT, "P-tuning"})
# What `export` puts into a graph (exporting/with_runtime.py).
IN_GRAPHS = frozenset({PREFIX, "cartridge", PROMPT, "P-tuning", "CPT", BOTTLENECK, COMPACTER})
_LAYER = re.compile(r"^(?:[^.\d][^.]{0,200}\.){0,12}\d{1,6}(?=\.|$)")


WHY = {
    BOTTLENECK: "a layer of its own, with a non-linearity, stands in the hidden states' way",
    COMPACTER: "a layer of its own, with a non-linearity, stands in the hidden states' way",
    PREFIX: "keys and values of virtual tokens are put before those of every layer",
    PROMPT: "virtual tokens are put before the input's embeddings",
    "P-tuning": "virtual tokens are put before the input's embeddings",
    "CPT": "virtual tokens are put before the input's embeddings",
    "multitask prompt tuning": "virtual tokens, others for each task, are put before the input",
    "cartridge": "keys and values of virtual tokens are put before those of every layer",
    "LLaMA-adapter": "its attention to a prompt is added behind a gate",
    "ReFT": "hidden states at some positions only are moved",
    "gated LoRA": "its gate is computed from the input",
    "AdapterFusion": "attention weighs other adapters for every token",
    UNION: "its parts act where the model runs",
    "X-LoRA": "a router weighs its adapters for every token",
    "Poly": "a router mixes its modules for every task (--assume task=0 takes one of them)",
    "Lily": "a router mixes its experts for every token",
}
REMEDY = (
    "run it with the library that wrote it (`loratools check --base` tells whether it fits a base)"
)
REMEDY_IN_GRAPHS = (
    "a graph can carry it, a weight cannot: `loratools export BASE --adapter ADAPTER -o OUT`; or "
    f"{REMEDY}"
)


def refusal(method: str, words: str, name: str) -> Problem:
    """Why a fold is refused, and what to do instead."""
    why = WHY.get(method, "it acts where the model runs")
    message = f"{words} acts where the model runs and is no change of a weight: {why}"
    remedy = REMEDY_IN_GRAPHS if method in IN_GRAPHS else REMEDY
    return Problem("not_foldable", message, "error", name, None, remedy)


def layer_of(module: str) -> str | None:
    """The path of the layer that a module lies in: `bert.encoder.layer.0`."""
    found = _LAYER.match(module)
    return found[0] if found else None


def described(runtime: Runtime) -> dict[str, Any]:
    """The method in its own terms, as `inspect` prints it."""
    parameters = sum(leaf.numel for leaf in distinct(runtime.tensors))
    return {"method": runtime.method, **runtime.numbers, "parameters": parameters}


def distinct(tensors: Mapping[str, Leaf]) -> list[Leaf]:
    """The tensors without those that adapters writes once for each layer that shares them."""
    found: dict[str, Leaf] = {}
    for key, leaf in tensors.items():
        found.setdefault(key.rpartition(".prefix_tunings.")[2], leaf)
    return list(found.values())


def torn(tensors: Mapping[str, Leaf]) -> str | None:
    """The first key whose numbers are not those of the tensor that it is a copy of."""
    first: dict[str, Leaf] = {}
    for key, leaf in tensors.items():
        one = first.setdefault(key.rpartition(".prefix_tunings.")[2], leaf)
        same = (one.source, one.offset, one.shape, one.dtype) == (
            leaf.source, leaf.offset, leaf.shape, leaf.dtype
        )  # fmt: skip
        if one is not leaf and not (same and one.source is not None) and one.read() != leaf.read():
            return key
    return None


# ------------------------------------------------------------------------------- what it comes to


def projected(
    rows: Leaf, down: Leaf, down_bias: Leaf, up: Leaf, up_bias: Leaf, activation: str
) -> Leaf:
    """A prefix (tokens, width) out of its embeddings and the two layers behind them.

    up · f(down · rows) + biases, in float64, rounded once (arXiv 2101.00190;
    adapter-hub/adapters:methods/prefix_tuning.py).
    """
    dtype = widest([leaf.dtype for leaf in (rows, down, down_bias, up, up_bias)])

    def make() -> torch.Tensor:
        import torch

        wide = [x.tensor().to(torch.float64) for x in (rows, down, down_bias, up, up_bias)]
        inner = ACTIVATIONS[activation](torch.addmm(wide[2], wide[0], wide[1].T))
        return torch.addmm(wide[4], inner, wide[3].T).to(getattr(torch, TORCH_NAMES[dtype]))

    return later(rows.name, dtype, (rows.shape[0], up.shape[0]), make)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.gelu(x)


# By the names in adapters' configs, for which it asks transformers (activations.py).
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": lambda x: x.tanh(),
    "relu": lambda x: x.relu(),
    "gelu": _gelu,
    "swish": lambda x: x * x.sigmoid(),
    "silu": lambda x: x * x.sigmoid(),
    "sigmoid": lambda x: x.sigmoid(),
    "linear": lambda x: x,
}


def hypercomplex(rule: Sequence[Leaf], w: Sequence[Leaf]) -> Leaf:
    """The weight (out, in) of a Compacter's layer: the transpose of Σ rule_i ⊗ w_i.

    Rules (n, n, n) and w (n, in/n, out/n), each whole or as its two factors (arXiv 2106.04647;
    adapter-hub/adapters:methods/modeling.py). In float64, rounded once.
    """
    dtype = widest([leaf.dtype for leaf in (*rule, *w)])
    count = rule[0].shape[0]
    shape = (w[-1].shape[2] * count, w[0].shape[1] * count)

    def make() -> torch.Tensor:
        import torch

        left, right = (_product([x.tensor().to(torch.float64) for x in some]) for some in (rule, w))
        whole = sum(torch.kron(left[i], right[i]) for i in range(count))
        assert isinstance(whole, torch.Tensor)
        return whole.T.contiguous().to(getattr(torch, TORCH_NAMES[dtype]))

    return later(w[0].name, dtype, shape, make)


def turned(virtual: Leaf, heads: int, size: int, theta: float, positions: int) -> Leaf:
    """A prefix (tokens, layers · 2 · heads · size) with its keys turned by some positions.

    Keys are turned as rotary embeddings turn them, halves of a head together, all tokens by the
    same angle (arXiv 2104.09864; transformers:models/llama/modeling_llama.py); values stay. In
    float64, rounded once.
    """

    def make() -> torch.Tensor:
        import torch

        rows = virtual.tensor()
        wide = rows.to(torch.float64).reshape(len(rows), -1, 2, heads, size)
        steps = torch.arange(0, size, 2, dtype=torch.float64) / size
        angle = (positions * theta**-steps).repeat(2)
        keys = wide[:, :, 0]
        first, second = keys[..., : size // 2], keys[..., size // 2 :]
        other = torch.cat([-second, first], -1)
        keys = keys * angle.cos() + other * angle.sin()
        return torch.stack([keys, wide[:, :, 1]], 2).reshape(rows.shape).to(rows.dtype)

    return later(virtual.name, virtual.dtype, virtual.shape, make)


def zeros(*shape: int) -> Leaf:
    """A tensor of zeros in float32."""

    def make() -> torch.Tensor:
        import torch

        return torch.zeros(shape)

    return later("", "F32", shape, make)


def _product(some: Sequence[torch.Tensor]) -> torch.Tensor:
    return some[0] if len(some) == 1 else some[0] @ some[1]


# ------------------------------------------------------------------------------- merging


def averaged(runtimes: Sequence[Runtime], weights: Sequence[float]) -> Runtime:
    """The weighted sum of every tensor with its namesakes, as adapters' average_adapter does.

    FitError `shape_mismatch` where they are not of one shape. Of bottlenecks it is a heuristic.
    """
    first = runtimes[0]
    for other in runtimes[1:]:
        if other.tensors.keys() != first.tensors.keys():
            odd = min(other.tensors.keys() ^ first.tensors.keys())
            raise error("shape_mismatch", f"{shown(odd)} is in one of the adapters and not in all")
        for key, leaf in first.tensors.items():
            if other.tensors[key].shape != leaf.shape:
                message = (
                    f"{shown(key)}: {leaf.shape} in one, {other.tensors[key].shape} in another"
                )
                raise error("shape_mismatch", f"{message}; an average needs equal shapes")
    tensors = {key: weighted([r.tensors[key] for r in runtimes], weights) for key in first.tensors}
    virtual = None
    if first.virtual is not None and all(r.virtual is not None for r in runtimes):
        virtual = next((t for t in tensors.values() if t.shape == first.virtual.shape), None)
    return replace(first, tensors=tensors, virtual=virtual, plain={})


def weighted(leaves: Sequence[Leaf], weights: Sequence[float]) -> Leaf:
    """Σ weight · leaf, in float64, kept in float32; whole numbers must be the same everywhere."""
    first = leaves[0]
    if first.dtype not in FLOATS:
        if any(leaf.read() != first.read() for leaf in leaves):
            raise error("dtype_unusable", f"{shown(first.name)} is {first.dtype}, and they differ")
        return first
    dtype = "F64" if any(leaf.dtype == "F64" for leaf in leaves) else "F32"

    def make() -> torch.Tensor:
        import torch

        wide = [w * x.tensor().to(torch.float64) for w, x in zip(weights, leaves, strict=True)]
        return torch.stack(wide).sum(0).to(getattr(torch, TORCH_NAMES[dtype]))

    return later(first.name, dtype, first.shape, make)


def named(tensors: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Tensors whose leaves have the names under which they are written."""
    return {key: renamed(leaf, key) for key, leaf in tensors.items()}
