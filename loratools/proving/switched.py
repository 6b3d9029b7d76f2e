"""Whether a switchable graph with a pack active computes what the folded torch module does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loratools.adapter import TORCH_NAMES, Adapter, Leaf
from loratools.bind import bind
from loratools.containers.bundle import Bundle
from loratools.errors import error, refusal
from loratools.folding import fold_tensor
from loratools.proving.parity import Parity, compare
from loratools.weights.base import Base, Shard

if TYPE_CHECKING:
    from loratools.exporting.graphs import Graph

_KNOWN = frozenset(TORCH_NAMES.values())


def packs_equal(
    graph: Graph, path: Path, module: nn.Module, packs: Mapping[Path, Adapter], *, atol: float
) -> Parity:
    """Compare each pack with its adapter folded into the module, at sizes never traced."""
    from loratools.exporting.runtime import session

    found = Parity()
    opened = session(path)
    for pack, adapter in packs.items():
        with folded(module, adapter):
            for seed, sizes in enumerate(graph.others):
                feeds = graph.feeds(sizes, seed + 31)
                given = {n: t.numpy() for n, t in feeds.items() if n in opened.inputs}
                got = opened.run(given, adapter=pack)
                tensors = {n: torch.from_numpy(a.copy()) for n, a in got.items()}
                case = f"{pack.stem} active, sample {seed + 1}"
                compare(found, graph, case, feeds, graph.run(feeds), tensors, atol)
    return found


@contextmanager
def folded(module: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Within the block the module's weights are those of the fold."""
    parameters: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
    leaves = {
        name: Leaf.of(name, tensor.detach())
        for name, tensor in parameters.items()
        if str(tensor.dtype)[6:] in _KNOWN
    }
    config: Any = getattr(module, "config", None)
    facts = dict(config.to_dict()) if hasattr(config, "to_dict") else {}
    bundle = Bundle("model in memory", (), _no_file)
    base = Base(bundle, (Shard("memory", leaves, {}, ""),), leaves, facts)
    plan = bind([adapter], base, ties="tied")
    if refused := refusal(plan.problems):
        raise refused
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for name, target in plan.targets.items():
            tensor = parameters[name]
            if target.terms and not any(tensor is seen for seen, _ in before):
                before.append((tensor, tensor.data))
                tensor.data = fold_tensor(target, tensor.detach(), dtype=tensor.dtype)[0]
        yield
    finally:
        for tensor, value in before:
            tensor.data = value


def _no_file(name: str) -> Any:
    raise error("not_found", f"a model in memory has no file {name}")
