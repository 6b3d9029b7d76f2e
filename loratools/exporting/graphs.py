"""The graphs that a task takes: which module is traced, on what inputs, and how all is named."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loratools.errors import error, shown

Sizes = Mapping[str, int]
Shape = tuple[int | str, ...]  # a number, or the name of a dimension
Make = Callable[[Sizes, torch.Generator], Tensor]
SAMPLE = {"batch": 2, "sequence": 7}  # 0 and 1 would be taken for constants
OTHERS = ({"batch": 3, "sequence": 11}, {"batch": 1, "sequence": 5})  # never traced
ROUNDS = 6  # what a module of one's own does may depend on its inputs' values
DATA_OUT = ("past_key_values", "hidden_states", "attentions", "loss", "cross_attentions")


@dataclass(frozen=True, slots=True)
class Input:
    """One input: its name, the shape in numbers and named dimensions, and how samples are made.

    `optional`: a model may do without it, and then it is no input of the graph.
    """

    name: str
    shape: Shape
    make: Make
    optional: bool = False


class Flat(nn.Module):
    """A module whose inputs and outputs are tensors in a fixed order, as a graph has them."""

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        call: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]],
    ) -> None:
        super().__init__()
        self.m = module
        self.names = tuple(names)
        self.call = call
        self.eval()  # exporters put back the mode that they found

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Outputs by name where inputs come by name, else in order."""
        given = dict(zip(self.names, args, strict=True)) if args else {}
        given |= {name: kwargs[plain(name)] for name in self.names if plain(name) in kwargs}
        found = self.call(self.m, given)
        return found if kwargs else tuple(found.values())


def plain(name: str) -> str:
    """A name that Python takes for an argument."""
    return name.replace(".", "_")


@dataclass(slots=True)
class Graph:
    """One graph to be made: its file, the module, the inputs; outputs come from a first call.

    `fixed` are the sizes that the user fixed; `sample` those that tracing uses.
    """

    file: str
    module: Flat
    inputs: tuple[Input, ...]
    sample: dict[str, int]
    fixed: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, Shape] = field(default_factory=dict)
    compared: Callable[[Mapping[str, Tensor], str, Tensor], Tensor] | None = None
    others: tuple[dict[str, int], ...] = OTHERS  # sizes never traced, for the proof
    rounds: int = 1  # cases of the proof at each of them

    def feeds(self, sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
        """Inputs at these sizes; the same for the same seed. The user's fixed sizes win."""
        draw = torch.Generator().manual_seed(1234 + seed)
        wanted = {**self.sample, **sizes, **self.fixed}
        if "total_sequence" in wanted or "past_sequence" in wanted:
            wanted["total_sequence"] = wanted.get("past_sequence", 0) + wanted["sequence"]
        return {i.name: i.make(wanted, draw) for i in self.inputs}

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What torch gives for the inputs."""
        with torch.no_grad():
            found: dict[str, Tensor] = self.module(**{plain(k): v for k, v in feeds.items()})
        return found

    def dims(self, name: str) -> Shape:
        """The shape of an input or output, the user's fixed sizes as numbers."""
        shape = next((i.shape for i in self.inputs if i.name == name), None)
        shape = self.outputs[name] if shape is None else shape
        return tuple(self.fixed.get(d, d) if isinstance(d, str) else d for d in shape)

    def learn_outputs(self) -> None:
        """Find names and dimensions of the outputs: what moves with which named size.

        Three calls, at sizes that differ from each other, tell them apart.
        """
        named = [d for i in self.inputs for d in i.shape if isinstance(d, str)]
        free = [d for d in dict.fromkeys(named) if d not in self.fixed and d != "total_sequence"]
        runs = []
        for sizes in ({}, *({d: self.sample[d] + 1} for d in free)):
            runs.append((sizes, self.run(self.feeds(sizes))))
        first = runs[0][1]
        past, sizes_ = "past_sequence" in free, {**self.sample, **self.fixed}
        moves = {d: run for (sizes, run) in runs[1:] for d in sizes}
        for name, tensor in first.items():
            shape: list[int | str] = []
            for at, size in enumerate(tensor.shape):
                by = [d for d, run in moves.items() if run[name].shape[at] != size]
                whole = self.sample.get("past_sequence", 0) + sizes_["sequence"] if past else -1
                if "past_sequence" in by and size == whole:
                    shape.append("total_sequence")
                else:
                    shape.append(by[0] if by else int(size))
            self.outputs[name] = tuple(shape)


# ------------------------------------------------------------------------------- samples


def ids(vocabulary: int, low: int = 3) -> Make:
    """Token ids without the special ones at the front, as far as the vocabulary goes."""
    low = low if vocabulary > 2 * low else 0

    def make(sizes: Sizes, draw: torch.Generator) -> Tensor:
        return torch.randint(low, vocabulary, _at(sizes, "batch", "sequence"), generator=draw)

    return make


def mask(*, left: bool, along: str = "sequence") -> Make:
    """A mask whose first row is padded: tracing on ones alone loses the input altogether."""

    def make(sizes: Sizes, draw: torch.Generator) -> Tensor:
        found = torch.ones(_at(sizes, "batch", along), dtype=torch.int64)
        gap = min(2, found.shape[1] - 1)
        if gap > 0:
            found[0, slice(gap) if left else slice(-gap, None)] = 0
        return found

    return make


def positions(sizes: Sizes, draw: torch.Generator) -> Tensor:
    """Each token's place after the padding."""
    made = mask(left=True, along="total_sequence")({**sizes}, draw)
    return (made.cumsum(-1) - 1).clip(0)[:, -sizes["sequence"] :]


def floats(*shape: int | str, scale: float = 1.0) -> Make:
    """Normal numbers of a shape."""

    def make(sizes: Sizes, draw: torch.Generator) -> Tensor:
        return torch.randn(_at(sizes, *shape), generator=draw) * scale

    return make


def zeros(*shape: int | str) -> Make:
    """Whole zeros of a shape."""
    return lambda sizes, draw: torch.zeros(_at(sizes, *shape), dtype=torch.int64)


def _at(sizes: Sizes, *shape: int | str) -> tuple[int, ...]:
    return tuple(sizes[d] if isinstance(d, str) else d for d in shape)


def like(tensor: Tensor, shape: Shape) -> Make:
    """Values drawn from a sample's own, so that ids stay ids."""

    def make(sizes: Sizes, draw: torch.Generator) -> Tensor:
        wanted = _at(sizes, *shape)
        flat = tensor.reshape(-1)
        if wanted == tuple(tensor.shape) or not flat.numel():
            return tensor.clone()
        count = int(torch.tensor(wanted).prod()) if wanted else 1
        return flat[torch.randint(len(flat), (count,), generator=draw)].reshape(wanted)

    return make


# ------------------------------------------------------------------------------- plain modules


def takes(module: nn.Module) -> set[str]:
    """The names of what a module's forward takes."""
    return set(inspect.signature(module.forward).parameters)


def of_module(
    module: nn.Module,
    inputs: Mapping[str, Tensor] | Sequence[Tensor],
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    fixed: Mapping[str, int] | None = None,
) -> Graph:
    """Any module with sample inputs; without `dynamic` the first dimension of each is `batch`.

    UsageError where an input is no tensor, or a named dimension has two sizes.
    """
    given = _named(module, inputs)
    if dynamic is None:
        count = next((t.shape[0] for t in given.values() if t.dim()), 1)
        dynamic = {n: {0: "batch"} for n, t in given.items() if t.dim() and t.shape[0] == count}
    unknown = dynamic.keys() - given.keys()
    if unknown:
        raise error("usage", f"dynamic names {shown(min(unknown))}, which is no input")
    sample: dict[str, int] = {}
    made = []
    for name, tensor in given.items():
        moving = {at % tensor.dim(): d for at, d in dynamic.get(name, {}).items()}
        shape: Shape = tuple(moving.get(at, int(n)) for at, n in enumerate(tensor.shape))
        for at, d in moving.items():
            if sample.setdefault(d, int(tensor.shape[at])) != tensor.shape[at]:
                raise error(
                    "usage",
                    f"dimension {shown(d)} is {sample[d]} and {tensor.shape[at]} (of {name})",
                )
        made.append(Input(name, shape, like(tensor, shape)))
    if unknown := (fixed or {}).keys() - sample.keys():
        raise error(
            "usage", f"--shape {shown(min(unknown))}: the dimensions are {', '.join(sample)}"
        )
    # One row would be taken for a constant by torch's exporter.
    sample = {d: max(n, 2) for d, n in sample.items()}
    keyed = isinstance(inputs, Mapping)

    def call(inner: nn.Module, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors_of(inner(**feeds) if keyed else inner(*feeds.values()))

    others = tuple({d: n + step for d, n in sample.items()} for step in (1, 3))
    return Graph(
        "model.onnx", Flat(module, list(given), call), tuple(made), sample,
        dict(fixed or {}), others=others, rounds=ROUNDS,
    )  # fmt: skip


def _named(module: nn.Module, inputs: Mapping[str, Tensor] | Sequence[Tensor]) -> dict[str, Tensor]:
    if not isinstance(inputs, Mapping):
        names = list(inspect.signature(module.forward).parameters)
        names += [f"input_{i}" for i in range(len(names), len(inputs))]
        inputs = dict(zip(names[: len(inputs)], inputs, strict=True))
    odd = [n for n, t in inputs.items() if not isinstance(t, Tensor)]
    if odd or not inputs:
        said = f"input {shown(odd[0])} is no tensor" if odd else "a module needs sample inputs"
        raise error("usage", f"{said}; give inputs={{name: tensor}}")
    return dict(inputs)


def tensors_of(found: Any, kept: Sequence[str] = ()) -> dict[str, Tensor]:
    """What a module returns, as tensors by name; of a record only those to keep, if any."""
    if isinstance(found, Tensor):
        return {"output": found}
    if isinstance(found, Mapping):
        some = {str(k): v for k, v in found.items() if isinstance(v, Tensor) and k not in DATA_OUT}
        return {k: v for k, v in some.items() if k in kept} or some
    if isinstance(found, list | tuple):
        return {f"output_{i}": t for i, t in enumerate(found) if isinstance(t, Tensor)}
    raise error("not_exportable", f"the module returns {shown(type(found).__name__)}, no tensors")
