"""Experts' updates made those of a base that keeps its experts otherwise: stacked, or one by one.

Transformers 5 holds all experts of a layer in one weight, and gate and up in one; checkpoints and
older versions have a weight for each; MLX and llama.cpp have stacks of gate and of up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loratools.adapter import Adapter, Experts, Kind, Leaf, LowRank
from loratools.errors import Problem, shown
from loratools.kinds import experts as kind
from loratools.names.experts import (
    CONTAINERS,
    IN_OUT,
    IN_TURN,
    expert_of,
    layer_of,
    otherwise,
    stack_name,
)
from loratools.names.heads import Facts

HALVES = ("gate", "up")
Slots = dict[tuple[str, int | None], str]  # (role, expert): name


def arranged(adapter: Adapter, tensors: Mapping[str, Leaf], config: Mapping[str, Any]) -> Adapter:
    """The adapter with experts' deltas as the base has its experts; nothing is read.

    What has no counterpart keeps its name, and binding then says that it is not there.
    """
    if all(key in tensors for key in adapter.deltas) and not _stacks(adapter):
        return adapter
    there = _layers(tensors)
    if not there:
        return adapter
    job = _Job(adapter, tensors, config, there)
    mine: dict[str, dict[tuple[str, int | None], tuple[str, Kind]]] = {}
    fronts: dict[str, str] = {}
    for key, delta in adapter.deltas.items():
        found = expert_of(key)
        if found is None or found.layer not in there or not isinstance(delta, LowRank | Experts):
            job.keep(key, delta)
            continue
        slot = (found.role, found.number)
        held = mine.setdefault(found.layer, {})
        if slot in held or fronts.setdefault(found.layer, found.front) != found.front:
            job.keep(key, delta)
            continue
        held[slot] = (key, delta)
    for layer, held in mine.items():
        job.layer(fronts[layer], there[layer], held)
    return replace(
        adapter,
        deltas=job.deltas,
        transposed=frozenset(job.transposed),
        problems=(*adapter.problems, *job.problems),
    )


def _stacks(adapter: Adapter) -> bool:
    return any(isinstance(delta, Experts) for delta in adapter.deltas.values())


@dataclass(slots=True)
class _There:
    """One layer of the base: its names within, and those of its experts."""

    front: str
    slots: Slots = field(default_factory=dict)

    def count(self, tensors: Mapping[str, Leaf]) -> int:
        """How many experts the layer has."""
        stack = next((n for (_, e), n in self.slots.items() if e is None), None)
        if stack is not None:
            return tensors[stack].shape[0] if tensors[stack].shape else 0
        return 1 + max(e for _, e in self.slots if e is not None)


def _layers(names: Iterable[str]) -> dict[str, _There]:
    """The base's layers of experts; a layer number that two towers share is left out."""
    found: dict[str, _There] = {}
    twice: set[str] = set()
    for name in names:
        if not any(f".{c}." in name for c in CONTAINERS):
            continue
        expert = expert_of(name)
        if expert is None:
            continue
        layer = found.setdefault(expert.layer, _There(expert.front))
        if layer.front != expert.front:
            twice.add(expert.layer)
        layer.slots[expert.role, expert.number] = name
    return {layer: there for layer, there in found.items() if layer not in twice}


@dataclass(slots=True)
class _Job:
    """One adapter being rearranged."""

    adapter: Adapter
    tensors: Mapping[str, Leaf]
    config: Mapping[str, Any]
    there: Mapping[str, _There]
    deltas: dict[str, Kind] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def keep(self, key: str, delta: Kind) -> None:
        """A delta that is no expert's; a router goes by the base's name for the block."""
        name = self.renamed(key)
        if name in self.deltas:
            name = key
        self.deltas[name] = delta
        if key in self.adapter.transposed:
            self.transposed.add(name)

    def renamed(self, key: str) -> str:
        split = layer_of(key)
        if key in self.tensors or split is None or split[1] not in self.there:
            return key
        front, layer, rest = split
        base = self.there[layer].front
        if f"{base}{layer}.{rest}" in self.tensors:
            return key
        for other in otherwise(rest):
            if f"{base}{layer}.{other}" in self.tensors:
                return f"{front}{layer}.{other}"
        return key

    def put(self, front: str, there: _There, name: str, delta: Kind) -> None:
        """A delta under a name of the base, with the adapter's own front."""
        self.deltas[front + name[len(there.front) :]] = delta

    def layer(
        self,
        front: str,
        there: _There,
        mine: Mapping[tuple[str, int | None], tuple[str, Kind]],
    ) -> None:
        """All experts' deltas of one layer under the base's names."""
        left = dict(mine)
        for slot in mine:  # what the base has in the same form needs no more than its name
            if slot in there.slots:
                self.put(front, there, there.slots[slot], left.pop(slot)[1])
        stacks: dict[str, Experts] = {}
        for role in dict.fromkeys(role for role, _ in left):
            stack = self.stack(there, {e: d for (r, e), d in left.items() if r == role})
            if stack is not None:
                stacks[role] = self.settled(there, role, stack)
        wholes = self.regrouped(there, stacks)
        done: set[str] = set()
        for role, delta in wholes.items():
            count = delta.shape[0]
            if (role, None) in there.slots:
                self.put(front, there, there.slots[role, None], delta)
                done.add(role)
                continue
            names = [there.slots[role, e] for e in range(count) if (role, e) in there.slots]
            if len(names) == count == there.count(self.tensors):
                done.add(role)
                for number, name in enumerate(names):
                    self.put(front, there, name, kind.single(delta, number))
        for (role, _), (key, kept) in left.items():
            others = HALVES if role == "gate_up" else ("gate_up",) if role in HALVES else ()
            if role not in stacks or not done & {role, *others}:
                self.deltas[key] = kept

    def stack(self, there: _There, have: Mapping[int | None, tuple[str, Kind]]) -> Experts | None:
        """Deltas of one role as a stack; None where they have no such form."""
        if None in have:
            whole = have[None][1]
            return whole if isinstance(whole, Experts) else None
        count = there.count(self.tensors)
        pairs = {e: d for e, (_, d) in have.items() if isinstance(d, LowRank)}
        shapes = {(p.b.shape[0], *p.a.shape[1:]) for p in pairs.values()}
        if len(shapes) != 1 or len(shapes.pop()) != 2 or max(e or 0 for e in have) >= count:
            return None
        return kind.stacked([pairs.get(e) for e in range(count)])

    def extents(self, there: _There, role: str) -> tuple[int, int] | None:
        """(out, in) of an expert's weight in the base, by its own names for the role."""
        turned = self.config.get("model_type") in IN_OUT

        def of(role: str) -> tuple[int, ...] | None:
            name = next((n for (r, _), n in there.slots.items() if r == role), None)
            if name is None:
                return None
            shape = self.tensors[name].shape
            if len(shape) < 2:
                return None
            return shape[:-3:-1] if turned and len(shape) == 3 else shape[-2:]

        found = of(role)
        if found is None and role == "gate_up":
            half = of("gate") or of("up")
            found = half and (2 * half[0], half[1])
        elif found is None and role in HALVES:
            whole = of("gate_up")
            found = whole and (whole[0] // 2, whole[1])
        return (found[0], found[1]) if found else None

    def settled(self, there: _There, role: str, delta: Experts) -> Experts:
        """The stack with A on its module's input, as far as the base's shapes or the file tell."""
        extents = self.extents(there, role)
        if delta.over == "in" or extents is None:
            return delta
        _, out, inner = delta.shape
        if out != inner:
            turned = (out, inner) != extents
        elif delta.over == "":
            self.problems.append(ambiguous(self.adapter.name, delta.a.name, delta))
            return delta
        else:  # checkpoints with single experts are of models whose stacks are (experts, out, in)
            turned = True
        return replace(kind.transposed(delta) if turned else delta, over="in")

    def regrouped(self, there: _There, stacks: Mapping[str, Experts]) -> dict[str, Experts]:
        """Gate and up put together, or apart, as the base has them."""
        found = dict(stacks)
        in_turn = self.config.get("model_type") in IN_TURN
        roles = {role for role, _ in there.slots}
        whole = found.get("gate_up")
        if whole is not None and "gate_up" not in roles and whole.shape[1] % 2 == 0:
            del found["gate_up"]
            found |= _halved(whole, in_turn=in_turn)
        halves = {i: found[role] for i, role in enumerate(HALVES) if role in found}
        if halves and "gate_up" in roles and not set(HALVES) & roles:
            joined = kind.halves(halves)
            for role in HALVES:
                found.pop(role, None)
            found["gate_up"] = kind.interleaved(joined) if in_turn else joined
        return found


def ambiguous(adapter: str, target: str, delta: Experts) -> Problem:
    """The words about a stack of square weights whose file does not say what A is on."""
    name = shown(target)
    return Problem(
        "orientation",
        f"{name}: its experts' weights are {delta.shape[1]} x {delta.shape[2]}, and which side "
        "lora_A is on differs between versions of PEFT and of transformers; nothing in the "
        "adapter tells: say --assume experts=in (the experts' input) or experts=out",
        "error",
        adapter,
        name,
        "--assume experts=in (PEFT from 0.19.1 with transformers 5) or --assume experts=out",
    )


def is_transposed(
    delta: Experts,
    stored: tuple[int, ...],
    *,
    votes: Iterable[bool],
    config: Mapping[str, Any],
    assumed: bool,
) -> bool | None:
    """Whether a base's stack is (experts, in, out) of this delta; None where nothing tells.

    Shapes tell, else those of the adapter's other stacks (`votes`), since one file has one
    layout, else the file's version of PEFT.
    """
    count, out, inner = delta.shape
    if out != inner:
        return stored == (count, inner, out)
    known = set(votes)
    if len(known) == 1:
        return known.pop()
    in_out = config.get("model_type") in IN_OUT
    if delta.over == "first":
        return True
    if delta.over == "in" and (assumed or not in_out):
        return in_out
    return None


def apart(adapter: Adapter, to: str, facts: Facts) -> Adapter:
    """The adapter with a stack for each of gate, up and down, as MLX and GGUF have them.

    Raises nothing: what needs a base becomes a problem, and keeps its name.
    """
    found: dict[str, dict[tuple[str, int | None], tuple[str, Kind]]] = {}
    fronts: dict[str, str] = {}
    for key, delta in adapter.deltas.items():
        expert = expert_of(key)
        if expert is not None and isinstance(delta, LowRank | Experts):
            found.setdefault(expert.layer, {})[expert.role, expert.number] = (key, delta)
            fronts[expert.layer] = f"{expert.front}{expert.layer}."
    done: dict[str, Kind] = {}
    gone: set[str] = set()
    problems: list[Problem] = []
    for layer, held in found.items():
        keys = [key for key, _ in held.values()]
        why, stacks = _all_apart({slot: delta for slot, (_, delta) in held.items()}, facts)
        names = {role: stack_name(role, to, facts.model_type) for role in stacks}
        if why is None and None in names.values():
            why = f"where {to} keeps experts depends on the model"
        if why is not None:
            message = f"{shown(keys[0])}: {why}; give the base (--base)"
            problems.append(Problem("needs_base", message, "error", adapter.name, keys[0]))
            continue
        gone |= set(keys)
        for role, stack in stacks.items():
            done[f"{fronts[layer]}{names[role]}.weight"] = stack
    kept = {key: delta for key, delta in adapter.deltas.items() if key not in gone}
    return replace(adapter, deltas={**kept, **done}, problems=(*adapter.problems, *problems))


def _all_apart(
    held: Mapping[tuple[str, int | None], Kind], facts: Facts
) -> tuple[str | None, dict[str, Experts]]:
    """The stacks of one layer, gate and up for themselves; or why they cannot be had."""
    stacks: dict[str, Experts] = {}
    for role in dict.fromkeys(role for role, _ in held):
        have = {e: d for (r, e), d in held.items() if r == role}
        whole = have.get(None)
        if isinstance(whole, Experts):
            stacks[role] = whole
            continue
        if facts.experts is None or max(e or 0 for e in have) >= facts.experts:
            return "how many experts a layer has is not known", {}
        pairs = [d if isinstance(d := have.get(e), LowRank) else None for e in range(facts.experts)]
        if len({(p.b.shape[0], *p.a.shape[1:]) for p in pairs if p is not None}) != 1:
            return "its experts' pairs are not of one shape", {}
        stacks[role] = kind.stacked(pairs)
    if any(stack.over != "in" for stack in stacks.values()):
        return "the base tells which side of the experts lora_A is on", {}
    both = stacks.pop("gate_up", None)
    if both is not None:
        if facts.model_type is None:
            return "how gate and up lie in one stack depends on the model", {}
        stacks |= _halved(both, in_turn=facts.model_type in IN_TURN)
    return None, stacks


def _halved(whole: Experts, *, in_turn: bool) -> dict[str, Experts]:
    rows = whole.shape[1]
    cuts = [(i, rows, 2) if in_turn else (i * rows // 2, (i + 1) * rows // 2, 1) for i in range(2)]
    return {role: kind.part(whole, *cut) for role, cut in zip(HALVES, cuts, strict=True)}
