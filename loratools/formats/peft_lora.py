"""PEFT's LoRA of one module: the pair with its scaling, DoRA's magnitude, the bias of B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools import views
from loratools.adapter import FLOATS, Dense, Leaf, LowRank, Renormed
from loratools.errors import error, shown
from loratools.formats.peft_config import names, scaling_of, twice, unusual
from loratools.formats.peft_keys import Module
from loratools.formats.reading import Reading, multiplies


def read_pair(
    module: str,
    found: Module,
    config: Mapping[str, Any],
    reading: Reading,
    transposed: set[str],
) -> None:
    """The low-rank delta of one module, with its DoRA magnitude and its bias."""
    problem, deltas = reading.problem, reading.deltas
    leaves = found.leaves
    embedding = "lora_embedding_A" in leaves or "lora_embedding_B" in leaves
    down, up = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    a, b = leaves.get(down), leaves.get(up)
    if a is None and b is None:
        lost = ", ".join(sorted(leaves))
        problem("missing", f"{shown(module)} has {lost} without {down} and {up}", module)
        return
    if a is None or b is None:
        here, lost = (up, down) if a is None else (down, up)
        problem("missing", f"{shown(module)} has {here} without {lost}", module)
        return
    for leaf in leaves.values():
        if leaf.dtype not in FLOATS:
            raise error("dtype_unusable", f"{shown(leaf.name)} is {leaf.dtype}, expected floats")
    if config.get("use_bdlora"):
        a, b = _as_blocks(config["use_bdlora"], module, a, b)
    if not multiplies(a, b):
        problem(
            "shape_factors",
            f"{shown(module)}: A is {a.shape}, B is {b.shape}; expected (rank, in, ...) and "
            "(out, rank, ...) (an empty or flat factor is one part of a sharded save)",
            module,
        )
        return
    rank, said = a.shape[0], scaling_of(config, found.owner or module)
    if said.rank is not None and said.rank != rank:
        message = f"{shown(module)}: config says r={said.rank}, A has {rank} rows"
        problem("config_conflict", message, module)
    elif said.rank is None and config.get("r") is not None:
        message = f"{shown(module)}: config's r is no whole number, A has {rank}"
        problem("config_conflict", message, module)
    scaling = said.of(rank)
    if scaling is None:
        scaling = 1.0  # alpha_missing is among the problems
    elif scaling == 0:
        problem("no_effect", f"{shown(module)}: alpha is 0, so its update is", module, "warning")
    elif unusual(scaling):
        message = f"{shown(module)}: scaling {scaling:g} (alpha {said.alpha:g} / rank {rank})"
        problem("scaling_unusual", message, module, "warning")
    if found.owner is not None and twice(config):
        scaling *= 2
        message = f"{shown(module)}: PEFT trained and merges its update twice (peft#3774), so here"
        problem("scaling_unusual", message, module, "note")
    pair = LowRank(a, b, scaling, said.alpha)
    key = f"{module}.weight"
    magnitude = leaves.get("lora_magnitude_vector")
    if magnitude is not None and not config.get("use_dora"):
        problem(
            "config_conflict",
            f"{shown(module)} has a DoRA magnitude, and the config says use_dora=false",
            module,
        )
    if magnitude is None and config.get("use_dora"):
        problem("missing", f"{shown(module)} has no magnitude, the config says use_dora", module)
    if magnitude is not None and magnitude.numel != b.shape[0]:
        problem(
            "shape_factors",
            f"{shown(module)}: {magnitude.numel} magnitudes for {b.shape[0]} outputs",
            module,
        )
        magnitude = None
    deltas[key] = pair if magnitude is None else Renormed(pair, magnitude)
    if embedding:
        transposed.add(key)
    bias = leaves.get("lora_B.bias")
    if bias is not None:
        deltas[f"{module}.bias"] = Dense(bias, scaling)
    unused = set(leaves) - {down, up, "lora_magnitude_vector", "lora_B.bias"}
    if unused:
        problem("unexplained", f"{shown(module)}: {', '.join(sorted(unused))}", module)


def _as_blocks(said: Any, module: str, a: Leaf, b: Leaf) -> tuple[Leaf, Leaf]:
    """A pair one of whose factors is stored as blocks of a diagonal (peft:tuners/lora/variants.py).

    Which one, parts of the module's last name say; (out, in/n) are n blocks one above another.
    """
    count = said.get("nblocks", 1) if isinstance(said, Mapping) else None
    if not isinstance(said, Mapping) or isinstance(count, bool) or not isinstance(count, int):
        raise error("malformed", f"use_bdlora is {shown(repr(said))}: no object with nblocks")
    last = module.rpartition(".")[2]

    def chosen(side: str) -> bool:
        return any(name in last for name in names(said, f"target_modules_bd_{side}"))

    if count < 1 or len(a.shape) != 2 or len(b.shape) != 2:
        return a, b
    if chosen("a") and a.shape[0] % count == 0:
        return _diagonal(a, count), b
    if chosen("b") and b.shape[0] % count == 0:
        return a, _diagonal(b, count)
    return a, b


def _diagonal(leaf: Leaf, count: int) -> Leaf:
    height = leaf.shape[0] // count
    return views.diagonal([views.part(leaf, i * height, (i + 1) * height) for i in range(count)])
