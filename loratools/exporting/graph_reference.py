"""A graph's weights found, and confirmed, by the content of a base that it was exported from."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratools.adapter import FLOATS, Leaf
from loratools.containers.onnx_tensors import Tensor
from loratools.errors import error, shown
from loratools.exporting.requantised import rounds
from loratools.narrowing import narrow
from loratools.stored import torch_dtype
from loratools.weights.base import Base
from loratools.weights.graph_names import Found, Stored
from loratools.weights.graphs import rebuilt
from loratools.weights.quantised import Quantised

if TYPE_CHECKING:
    import torch

Key = tuple[str, tuple[int, ...], bytes]  # dtype, shape, hash
HOW = "its content"


def confirmed(base: Base, reference: Base) -> Base:
    """The graph with its parameters under the reference's names, each one's content the same.

    W0 and its transpose are looked for; where both are there, where several tensors hold it and
    names do not decide, the parameter is ambiguous. Weights that are codes are found by names, and
    confirmed where their numbers are the reference's to within a step of the code. Raises usage
    where the base is no graph, and other_base where no weight of the reference is in it.
    """
    graph = base.graph
    if graph is None:
        raise error("usage", f"--reference: {shown(base.name)} is no graph; leave it out")
    if reference.graph is not None:
        raise error("usage", f"--reference {shown(reference.name)}: name the model, not a graph")
    named = _named(graph.found, reference)
    shapes = {s for leaf in reference.tensors.values() for s in (leaf.shape, leaf.shape[::-1])}
    here: dict[Key, list[str]] = defaultdict(list)
    for name, tensor in graph.graph.tensors.items():
        leaf = tensor.leaf
        if leaf is not None and leaf.dtype in FLOATS and leaf.shape in shapes and leaf.numel > 1:
            here[leaf.dtype, leaf.shape, _digest(leaf.tensor())].append(name)
    found = _own(graph.found)
    found.ambiguous.update(_still_doubtful(graph.found, reference))
    claimed = {stored.tensor.name for stored in named.values()}
    hits = 0
    tie = reference.tied()
    for name, leaf in reference.tensors.items():
        if leaf.dtype not in FLOATS or leaf.numel < 2:
            continue
        for parameter in (name, *((tie[0],) if tie and name == tie[1] else ())):
            hint = named.get(parameter)
            hits += _settled(found, parameter, leaf, hint, here, graph.graph.tensors, claimed)
    if not hits:
        raise error(
            "other_base",
            f"{shown(base.name)} was exported from other weights: none of the "
            f"{len(reference.tensors)} tensors of {shown(reference.name)} is in it",
        )
    for name, stored in list(found.stored.items()):
        taken = any(stored is hint for hint in named.values())
        if stored.how != HOW and taken:  # found under the reference's name, or not confirmed
            del found.stored[name]
    owners: dict[str, int] = defaultdict(int)
    for stored in found.stored.values():
        owners[stored.tensor.name] += 1
    for name, stored in found.stored.items():
        count = found.uses.get(stored.tensor.name, 0)
        alone = owners[stored.tensor.name] == 1 and len(stored.uses) in (0, count)
        found.stored[name] = replace(stored, alone=alone)
    config = base.config or reference.config
    return rebuilt(replace(base, config=config), found)


def _own(found: Found) -> Found:
    """The same, with maps of its own; what only names made doubtful may be decided by content."""
    return replace(found, stored=dict(found.stored), ambiguous={}, others={}, by_content=set())


def _still_doubtful(found: Found, reference: Base) -> dict[str, str]:
    """What names left open and content does too: several weights of the model are equal."""
    doubtful = {}
    for name, why in found.ambiguous.items():
        leaf = reference.tensors.get(name)
        if leaf is None:
            continue
        mine = _digest(leaf.tensor())
        if any(
            other is not leaf and other.shape == leaf.shape and _digest(other.tensor()) == mine
            for other in reference.tensors.values()
        ):
            doubtful[name] = why
    return doubtful


def _named(found: Found, reference: Base) -> dict[str, Stored]:
    """The graph's parameters by the reference's names, which may have a front more or less."""
    tie = reference.tied()
    wanted = [*reference.tensors, *(tie[:1] if tie else ())]
    if not set(wanted) & found.stored.keys():
        ends: dict[str, list[str]] = defaultdict(list)
        for name in found.stored:
            for i, c in enumerate(name):
                if c == ".":
                    ends[name[i + 1 :]].append(name)
        longer = {n: ends[n][0] for n in wanted if len(ends[n]) == 1}
        shorter = {
            n: rest for n in wanted for rest in [n.partition(".")[2]] if rest in found.stored
        }
        best = max((longer, shorter), key=len)
        return {n: found.stored[there] for n, there in best.items()}
    return {n: found.stored[n] for n in wanted if n in found.stored}


def _settled(
    found: Found,
    parameter: str,
    leaf: Leaf,
    hint: Stored | None,
    here: Mapping[Key, list[str]],
    tensors: Mapping[str, Tensor],
    claimed: Set[str],
) -> int:
    """Place one parameter of the reference; how many tensors hold its content."""
    if hint is not None and isinstance(codes := found.quantised.get(hint.tensor.name), Quantised):
        if rounds(replace(codes, turned=hint.turned), leaf.tensor()):
            found.stored[parameter] = replace(hint, how=HOW)
            return 1
        found.stored.pop(parameter, None)
        found.others[parameter] = (
            f"the codes of {shown(hint.tensor.name)} are those of other weights than the "
            "reference's"
        )
        return 0
    hits = dict.fromkeys(_hits(leaf, here))
    if hint is None:  # equal numbers of a tensor that names give to another: zeros, ones
        hits = {hit: None for hit in hits if hit[0] not in claimed}
    if hint is not None and not any(name == hint.tensor.name for name, _ in hits):
        found.stored.pop(parameter, None)
        if hits:
            other = shown(next(iter(hits))[0])
            found.ambiguous[parameter] = (
                f"names say {shown(hint.tensor.name)}, its content is that of {other}"
            )
        else:
            found.others[parameter] = (
                f"{shown(hint.tensor.name)} was exported from other weights than the reference's"
            )
        return len(hits)
    if hint is not None:
        hits = {hit: None for hit in hits if hit[0] == hint.tensor.name}
    if not hits:
        return 0
    names = {name for name, _ in hits}
    if len(hits) > 1:
        found.stored.pop(parameter, None)
        listing = " and ".join(shown(n) for n in sorted(names))
        both = "as it is and transposed" if len(names) == 1 else "each hold its content"
        found.ambiguous[parameter] = f"{listing} {both}, and nothing tells which is meant"
        return len(hits)
    name, turned = next(iter(hits))
    if hint is None:
        found.by_content.add(parameter)
    uses = hint.uses if hint is not None else ()
    in_out = hint.in_out if hint is not None and hint.turned == turned else None
    found.stored[parameter] = Stored(tensors[name], turned, in_out, uses, False, HOW)
    return 1


def _hits(leaf: Leaf, here: Mapping[Key, list[str]]) -> Iterator[tuple[str, bool]]:
    """Tensors that hold a parameter's numbers, as they are or transposed."""
    shapes = {(dtype, shape) for dtype, shape, _ in here}
    dtypes = sorted({d for d, s in shapes if s in (leaf.shape, leaf.shape[::-1])})
    if not dtypes:
        return
    whole = leaf.tensor()
    for dtype in dtypes:
        there = whole
        if dtype != leaf.dtype:
            there = narrow(whole.double(), torch_dtype(dtype))
        for turned in (False, True) if len(leaf.shape) == 2 else (False,):
            seen = there.T if turned else there
            if (dtype, tuple(seen.shape)) in shapes:
                for name in here.get((dtype, tuple(seen.shape), _digest(seen)), ()):
                    yield name, turned


def _digest(tensor: torch.Tensor) -> bytes:
    import torch

    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(memoryview(flat), digest_size=16).digest()
