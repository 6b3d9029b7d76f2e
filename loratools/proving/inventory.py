"""A written model beside the plan of its fold: which tensors must stand there, each compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from loratools.adapter import FLOATS, Leaf, Replace
from loratools.names.prefixes import PREFIXES, Prefix
from loratools.plan import Plan, Target
from loratools.proving.differences import (
    CHANGED,
    UNKNOWN,
    Mismatch,
    Progress,
    compare_leaves,
    each,
)
from loratools.proving.foreign import Signal, explain, is_explained, judge_target
from loratools.proving.rules import Rule
from loratools.weights.base import EMBEDDINGS, Base, embedding_name

# What a tool may write or leave out, because its library computes it and never trains it.
BUFFERS = ("inv_freq", "masked_bias", "position_ids", "token_type_ids", "num_batches_tracked")
# Names of before transformers 1.0 that its loading still renames.
OLD_NAMES = ((".gamma", ".weight"), (".beta", ".bias"))


@dataclass(frozen=True, slots=True)
class Expected:
    """One tensor that the fold must have written."""

    name: str
    shape: tuple[int, ...]
    target: Target | None  # None: no adapter touches it
    base: Leaf | None


@dataclass(slots=True)
class Inventory:
    """What is expected, by the name it has in the written model, and what is not as expected."""

    found: list[tuple[Expected, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    prefix: Prefix = field(default_factory=Prefix)


@dataclass(slots=True)
class Compared:
    """The outcome for all tensors of a model."""

    checked: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    rules: Counter[Rule] = field(default_factory=Counter)  # by touched tensor
    signal: Signal = field(default_factory=Signal)
    converted: int = 0  # untouched tensors in another dtype


def take_inventory(plan: Plan, written: Base) -> Inventory:
    """Find every expected tensor in a written model: by name, or under one known prefix.

    Shards and order do not matter; a tied head may be stored or left out.
    """
    inventory, there = Inventory(), written.tensors
    expected = _expected(plan)
    names = [n for n in expected if n not in there]
    inventory.prefix = _best_prefix(names, there)
    taken: set[str] = set()
    scales = _scales(plan, inventory.prefix, there)
    for name, one in expected.items():
        place = _place(name, inventory.prefix, there, taken)
        if place is not None:
            taken.add(place)
            if place not in scales:
                inventory.found.append((one, place))
        elif not _may_lack(one, plan, written):
            inventory.missing.append(name)
    for name in there:
        if name in taken or _is_buffer(name, there[name]):
            continue
        same = _tied_copy(name, plan, written, inventory)
        if same is None:
            inventory.extra.append(name)
        else:
            inventory.found.append((same, name))
    return inventory


def _expected(plan: Plan) -> dict[str, Expected]:
    found = {}
    for name in dict.fromkeys([*plan.base.tensors, *plan.targets]):
        target, leaf = plan.targets.get(name), plan.base.tensors.get(name)
        if target is not None:
            leaf = target.base
        shape = target.shape if target is not None else leaf.shape if leaf is not None else ()
        touched = target if target is not None and target.terms else None
        found[name] = Expected(name, shape, touched, leaf)
    return found


def _scales(plan: Plan, prefix: Prefix, there: Mapping[str, Leaf]) -> set[str]:
    """The scales of touched 8-bit floats, which are judged by the values that they give."""
    touched = (leaf for n, t in plan.targets.items() if t.terms and (leaf := there.get(prefix(n))))
    return {leaf.scale.name for leaf in touched if leaf.scale is not None}


def _best_prefix(names: Collection[str], there: Collection[str]) -> Prefix:
    """The known prefix whose adding or removing finds most names; not all need have it."""
    changes = [c for p in PREFIXES for c in (Prefix(added=p), Prefix(removed=p))]
    counted = Counter({c: sum(c(n) in there for n in names) for c in changes})
    best, count = counted.most_common(1)[0]
    return best if count else Prefix()


def _place(name: str, prefix: Prefix, there: Collection[str], taken: set[str]) -> str | None:
    spelled = [name, *(name.removesuffix(o) + n for o, n in OLD_NAMES if name.endswith(o))]
    options = [n for s in spelled for n in (s, prefix(s))]
    return next((n for n in options if n in there and n not in taken), None)


def _is_buffer(name: str, leaf: Leaf) -> bool:
    # GPT-2's causal mask was stored as "attn.bias", with four dimensions.
    mask = name.endswith((".attn.bias", ".attention.bias")) and len(leaf.shape) == 4
    return mask or name.endswith(BUFFERS)


def _may_lack(one: Expected, plan: Plan, written: Base) -> bool:
    if one.target is None and one.base is not None and _is_buffer(one.name, one.base):
        return True
    tie = plan.base.tied()
    return tie is not None and one.name == tie[0] and not plan.untied and written.tied() is not None


def _tied_copy(name: str, plan: Plan, written: Base, inventory: Inventory) -> Expected | None:
    """A tensor that the base stores as its embedding only, and that was written out once more."""
    tie, embedding = plan.base.tied(), embedding_name(plan.base.tensors)
    again = name.rpartition(".")[0].rpartition(".")[2] in EMBEDDINGS
    is_head = tie is not None and name in (tie[0], inventory.prefix(tie[0]))
    if embedding is None or plan.untied or not (is_head or again):
        return None
    for one, place in inventory.found:
        if one.name == embedding:
            return Expected(name, one.shape, None, written.tensors[place])
    return None


# ------------------------------------------------------------------------------- comparing


@dataclass(frozen=True, slots=True)
class _Verdict:
    """One tensor, compared."""

    mismatch: Mismatch | None = None
    signal: Signal | None = None
    rule: Rule | None = None


def compare_all(
    inventory: Inventory, written: Base, *, progress: Progress | None = None
) -> Compared:
    """Judge every touched tensor by the rounding rules, and compare every other byte by byte."""
    files = {name: shard.name for shard in written.shards for name in shard.leaves}
    compared = Compared()
    for name in inventory.missing:
        compared.mismatches.append(Mismatch("missing", name))
    for name in inventory.extra:
        compared.mismatches.append(Mismatch(UNKNOWN, name, files[name]))

    def work(pair: tuple[Expected, str]) -> _Verdict:
        one, place = pair
        return _compare(one, written.tensors[place], files[place])

    sizes = [written.tensors[place].nbytes for _, place in inventory.found]
    verdicts = each(work, inventory.found, sizes=sizes, progress=progress)
    for (one, place), verdict in zip(inventory.found, verdicts, strict=True):
        compared.checked += 1
        if verdict.mismatch is not None:
            compared.mismatches.append(verdict.mismatch)
        if verdict.signal is not None:
            compared.signal.add(verdict.signal)
        if one.target is None and one.base is not None:
            compared.converted += one.base.dtype != written.tensors[place].dtype
    compared.rules = _rules(inventory, written, verdicts)
    return compared


def _compare(one: Expected, leaf: Leaf, file: str) -> _Verdict:
    before = leaf if one.base is None else one.base
    if leaf.shape != one.shape:
        return _Verdict(Mismatch(f"is {leaf.shape}, expected {one.shape}", one.name, file))
    if leaf.dtype != before.dtype and not {leaf.dtype, before.dtype} <= FLOATS:
        return _Verdict(Mismatch(f"is {leaf.dtype}, expected {before.dtype}", one.name, file))
    if one.target is None:
        return _Verdict(compare_leaves(before, leaf).mismatch(CHANGED, one.name, leaf, file))
    judged = judge_target(one.target, leaf)
    mismatch = explain(one.target, leaf, judged, file)
    multiplies = any(not isinstance(t.delta, Replace) for t in one.target.terms)
    rule = judged.rule if multiplies and mismatch is None else None
    return _Verdict(mismatch, judged.signal, rule)


def _rules(inventory: Inventory, written: Base, verdicts: Sequence[_Verdict]) -> Counter[Rule]:
    """The rules of a fold, as few as explain all; a small tensor may agree with several."""
    counted = Counter(v.rule for v in verdicts if v.rule is not None)
    settled: Counter[Rule] = Counter()
    for (one, place), verdict in zip(inventory.found, verdicts, strict=True):
        if verdict.rule is None or one.target is None:
            continue
        rule = verdict.rule
        for other, _ in counted.most_common():
            if other == rule or is_explained(one.target, written.tensors[place], other):
                rule = other
                break
        settled[rule] += 1
    return settled


def said(rules: Mapping[Rule, int]) -> str | None:
    """The rules that matched, in words; None where none was needed."""
    if len(rules) <= 1:
        return next(map(str, rules), None)
    return "; ".join(f"{rule} ({count})" for rule, count in Counter(rules).most_common())


def wrong_size(signal: Signal) -> Mismatch | None:
    """The whole update, where it has another size than the adapters say."""
    if not signal.is_off or signal.scaling is None:
        return None
    return Mismatch(
        f"all touched tensors together hold {signal.scaling:.5f} ± {signal.error:.1g} times the "
        "update; is alpha, or a weight, another?"
    )
