"""PEFT's `target_parameters`: the pairs of parameters that stack experts, and where they are kept.

lora_A is (experts * rank, ...), expert by expert; lora_B is (..., rank * experts), its columns
rank by rank with the expert running fastest (peft:tuners/lora/layer.py, ParamWrapper).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from loratools.adapter import FLOATS, Adapter, Experts, Leaf, LowRank
from loratools.errors import RefusedError, error, shown
from loratools.formats.peft_config import scaling_of
from loratools.formats.peft_keys import BASE, PREFIX, part_of
from loratools.formats.reading import Reading, multiplies
from loratools.names.experts import CONTAINERS, ORDER, ROLES
from loratools.names.patterns import peft_targets
from loratools.views import part, reshaped, turned

DOWN, UP = "lora_A", "lora_B"
FIELD = "target_parameters"
SINCE = "0.19.1"  # of PEFT: the first whose lora_A is on the module's input
Over = Literal["in", "out", "first", ""]
# What `--assume experts=` takes: the side of the experts that lora_A is on; "megatron": A on the
# input, and lora_B's columns expert by expert, as Megatron-Bridge packs them, which nothing in a
# file shows (mb:models/conversion/peft_bridge.py, by reading).
SAID = ("in", "out", "megatron")


def taken(
    tensors: Mapping[str, Leaf], config: Mapping[str, Any], reading: Reading
) -> dict[str, Leaf]:
    """Take in the pairs of targeted parameters; the other tensors are returned."""
    targets = config.get(FIELD)
    if not targets:
        return dict(tensors)
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise error("malformed", f"{FIELD} is {shown(targets)}, expected a list of texts")
    rest = dict(tensors)
    modules: dict[str, dict[int, dict[str, Leaf]]] = {}
    candidates: dict[str, list[str]] = {}
    for key in tensors:
        found = part_of(key)
        if found.part not in (DOWN, UP):
            continue
        module = found.module
        if module not in candidates:
            candidates[module] = _parameters(module, targets, config)
        if candidates[module] and candidates[module] != ["weight"]:
            slots = modules.setdefault(module, {}).setdefault(_depth(key, found.part), {})
            if found.part not in slots:
                slots[found.part] = rest.pop(key)
    stacks: dict[str, Experts] = {}
    for module, wrapped in modules.items():
        named = _by_parameter(module, wrapped, candidates[module], reading)
        for parameter, slots in named.items():
            _pair(f"{module}.{parameter}", slots, config, reading, stacks)
    _settle(stacks, _over(config, reading), reading)
    reading.deltas |= stacks
    return rest


def _parameters(module: str, targets: list[str], config: Mapping[str, Any]) -> list[str]:
    """Names of a module's own parameters that the config targets."""
    found = []
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        if not owner and module.rpartition(".")[2] not in CONTAINERS and _is_linear(module, config):
            continue  # a parameter's bare name fits every module
        if not owner or f".{module}".endswith(f".{owner}"):
            found.append(parameter)
    return list(dict.fromkeys(found))


def _is_linear(module: str, config: Mapping[str, Any]) -> bool:
    """Whether a module is targeted itself: PEFT does not take both."""
    modules = config.get("target_modules")
    try:
        return isinstance(modules, str | list) and bool(peft_targets(modules, module))
    except RefusedError:
        return True


def _depth(key: str, part: str) -> int:
    """How many wrappers a pair lies within: the last parameter of a module is the outermost."""
    pieces = key.split(".")
    at = len(pieces) - 1 - pieces[::-1].index(part)
    depth = 0
    while at > depth and pieces[at - depth - 1] == BASE:
        depth += 1
    return depth


def _rank(parameter: str) -> tuple[int, str]:
    """The place of a parameter in the order in which classes register theirs."""
    stem = parameter.removesuffix("_bias")
    return (ORDER.index(stem) if stem in ORDER else len(ORDER), parameter)


def _by_parameter(
    module: str, wrapped: Mapping[int, dict[str, Leaf]], names: list[str], reading: Reading
) -> dict[str, dict[str, Leaf]]:
    """Each wrapper's pair by its parameter, which no key names: the first is wrapped first."""
    strange = [n for n in names if n.removesuffix("_bias") not in ORDER]
    if len(wrapped) != len(names) or (strange and len(names) > 1):
        listed = ", ".join(shown(n) for n in names)
        reading.problem(
            "config_conflict",
            f"{shown(module)} has {len(wrapped)} pairs, {FIELD} names {listed}: which is which "
            "cannot be told",
            module,
        )
        return {}
    inner_first = sorted(names, key=_rank)
    return dict(zip(inner_first, (wrapped[d] for d in sorted(wrapped, reverse=True)), strict=True))


def _pair(
    key: str,
    slots: Mapping[str, Leaf],
    config: Mapping[str, Any],
    reading: Reading,
    stacks: dict[str, Experts],
) -> None:
    """One parameter's pair: a stack where it holds several times the rank, else a plain pair."""
    a, b = slots.get(DOWN), slots.get(UP)
    if a is None or b is None:
        here, gone = (UP, DOWN) if a is None else (DOWN, UP)
        reading.problem("missing", f"{shown(key)} has {here} without {gone}", key)
        return
    for leaf in (a, b):
        if leaf.dtype not in FLOATS:
            raise error("dtype_unusable", f"{shown(leaf.name)} is {leaf.dtype}, expected floats")
    said = scaling_of(config, key)
    rank = said.rank or 0
    if len(a.shape) != 2 or len(b.shape) != 2 or not multiplies(a, b):
        message = f"{shown(key)}: {DOWN} is {a.shape}, {UP} is {b.shape}"
        reading.problem("shape_factors", message, key)
        return
    if rank < 1 or a.shape[0] % rank:
        message = f"{shown(key)}: {DOWN} has {a.shape[0]} rows, no multiple of r={said.rank}"
        reading.problem("config_conflict", message, key)
        return
    scaling = said.of(rank)
    scaling = 1.0 if scaling is None else scaling  # alpha_missing is among the problems
    count = a.shape[0] // rank
    if count == 1:
        reading.deltas[key] = LowRank(a, b, scaling, said.alpha)
        return
    stacks[key] = Experts(
        reshaped(a, count, rank, a.shape[1]),
        turned(reshaped(b, b.shape[0], count, rank), (1, 0, 2))
        if reading.assume.get("experts") == "megatron"
        else turned(reshaped(b, b.shape[0], rank, count), (2, 0, 1)),
        scaling,
        said.alpha,
    )


# ------------------------------------------------------------------------------- the layout


def _over(config: Mapping[str, Any], reading: Reading) -> Over:
    """Which side lora_A is on, by `--assume experts=` or the version of PEFT.

    Up to 0.18 always the parameter's first axis; in 0.19.0 the output, by a test the wrong way
    round (peft pull 3165); then the input.
    """
    said = reading.assume.get("experts")
    if said is not None:
        if said not in SAID:
            raise error("usage", f"--assume experts={shown(said)}: expected in, out or megatron")
        return "out" if said == "out" else "in"
    return _side(config.get("peft_version"))


def _side(peft_version: Any) -> Over:
    found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})", str(peft_version))
    if found is None:
        return ""
    version = tuple(int(n) for n in found.groups())
    if version < (0, 19, 0):
        return "first"
    return "out" if version == (0, 19, 0) else "in"


def _settle(stacks: dict[str, Experts], over: Over, reading: Reading) -> None:
    """Put A on the module's input, as far as the file tells.

    Experts' gate and down projections share the hidden size alone: it is the input of the one
    and the output of the other, whatever the version says.
    """
    votes = {v for module in {k.rpartition(".")[0] for k in stacks} for v in _votes(module, stacks)}
    if len(votes) == 1:
        side: Over = "in" if votes.pop() else "out"
        if "experts" in reading.assume and over != side:
            raise error("usage", f"--assume experts={over}, but the shapes say experts={side}")
        over = side
    for key, delta in stacks.items():
        if over == "out":
            a, b = turned(delta.b, (0, 2, 1)), turned(delta.a, (0, 2, 1))
            stacks[key] = replace(delta, a=a, b=b)
        else:
            stacks[key] = replace(delta, over=over)


def _votes(module: str, stacks: Mapping[str, Experts]) -> list[bool]:
    """Whether A is on the input, by each pair of a module whose two sides differ."""
    wide: list[tuple[int, ...]] = []
    down: list[tuple[int, ...]] = []
    for key, delta in stacks.items():
        owner, _, parameter = key.rpartition(".")
        if owner == module and parameter in ROLES:
            (down if ROLES[parameter] == "down" else wide).append(delta.shape[1:])
    if not wide or not down:
        return []
    hidden = set(wide[0]) & set(down[0])
    if len(hidden) != 1:
        return []
    (size,) = hidden
    return [
        *(inner == size for out, inner in wide if out != inner),
        *(out == size for out, inner in down if out != inner),
    ]


# ------------------------------------------------------------------------------- writing


def pairs_of(adapter: Adapter) -> dict[str, LowRank]:
    """Every stack as a pair of an expert's rank and scaling: what the config has to say of it."""
    return {
        key: LowRank(
            reshaped(part(delta.a, 0, 1), *delta.a.shape[1:]),
            reshaped(part(delta.b, 0, 1), *delta.b.shape[1:]),
            delta.scaling,
            delta.alpha,
        )
        for key, delta in adapter.deltas.items()
        if isinstance(delta, Experts)
    }


def said_by(adapter: Adapter, source: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the config that tell PEFT's readers of the stacks, and how they lie."""
    stacks = {k: d for k, d in adapter.deltas.items() if isinstance(d, Experts)}
    if not stacks:
        return {}
    said: dict[str, Any] = {}
    named = source.get(FIELD)
    known = [t for t in named if isinstance(t, str)] if isinstance(named, list) else []
    if not all(any(f".{key}".endswith(f".{t}") for t in known) for key in stacks):
        said[FIELD] = sorted(stacks)
    for delta in stacks.values():
        if delta.over != _side(source.get("peft_version")):
            said["peft_version"] = SINCE if delta.over == "in" else "0.18.1"
    return said


def disassembled(adapter: Adapter) -> dict[str, Leaf]:
    """PEFT's tensors of all stacks: the parameters of a module are nested, the last outermost."""
    tensors: dict[str, Leaf] = {}
    modules: dict[str, list[str]] = {}
    for key, delta in adapter.deltas.items():
        if isinstance(delta, Experts):
            module, _, parameter = key.rpartition(".")
            modules.setdefault(module, []).append(parameter)
    for module, parameters in modules.items():
        for depth, parameter in enumerate(sorted(parameters, key=_rank, reverse=True)):
            delta = adapter.deltas[f"{module}.{parameter}"]
            assert isinstance(delta, Experts)
            stem = PREFIX + module + f".{BASE}" * depth
            count, rank, _ = delta.a.shape
            b = turned(delta.b, (1, 2, 0))
            tensors[f"{stem}.{DOWN}.weight"] = reshaped(delta.a, count * rank, delta.a.shape[2])
            tensors[f"{stem}.{UP}.weight"] = reshaped(b, b.shape[0], rank * count)
    return tensors
