"""Fitting adapters to a base on shapes alone: a plan, or every problem at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loratools.adapter import (
    DTYPE_BITS,
    FLOATS,
    Adapter,
    Kind,
    Leaf,
    LowRank,
    Place,
    Renormed,
    Replace,
)
from loratools.errors import Problem, shown
from loratools.fitting import fitted
from loratools.names.prefixes import Prefix, find_prefix, nearest
from loratools.plan import Plan, Target, Term, Ties, module_shape, stored_shape
from loratools.vocabulary import is_head, last, one_vocabulary, output_shape, settle_ties
from loratools.weights.base import CONV1D_LAYERS, EMBEDDINGS, HEADS, Base, is_hub_id


@dataclass(slots=True)
class _Binding:
    """One adapter being fitted."""

    number: int
    adapter: Adapter
    base: Base
    weight: float
    ties: Ties | None
    prefix: Prefix = field(default_factory=Prefix)
    problems: list[Problem] = field(default_factory=list)
    terms: dict[str, list[Term]] = field(default_factory=dict)
    left_out: int = 0

    def problem(self, code: str, message: str, target: str | None = None, **more: str) -> None:
        severity = more.pop("severity", "error")
        self.problems.append(
            Problem(code, message, severity, self.adapter.name, target, more.get("remedy"))  # type: ignore[arg-type]
        )


def bind(
    adapters: Sequence[Adapter],
    base: Base,
    *,
    weights: Sequence[float] | None = None,
    chosen: Callable[[str], bool] = lambda _: True,
    ties: Ties | None = None,
) -> Plan:
    """Fit adapters to a base; every problem of every adapter is in the plan's `problems`.

    `chosen` tells by target name which deltas take part; `ties` says what to do where embedding
    and head are one stored tensor. Reads no weight and needs no torch.
    """
    factors = list(weights) if weights is not None else [1.0] * len(adapters)
    problems: list[Problem] = [*base.problems, *_about_base(base)]
    merged: dict[str, list[Term]] = {}
    bound: list[_Binding] = []
    for number, (adapter, weight) in enumerate(zip(adapters, factors, strict=True)):
        fit = fitted(adapter, base.tensors, base.config)
        one = _Binding(number, fit, base, weight, ties)
        problems += fit.problems
        _fit(one, chosen)
        problems += one.problems
        bound.append(one)
        for name, terms in one.terms.items():
            merged.setdefault(name, []).extend(terms)
    targets, untied = _targets(base, merged, ties, problems)
    if not targets and not any(p.severity == "error" for p in problems):
        problems.append(Problem("no_effect", "no target is left to change"))
    return Plan(
        base=base,
        adapters=tuple(adapters),
        targets=targets,
        problems=tuple(problems),
        matched=tuple(sum(len(t) for t in b.terms.values()) for b in bound),
        total=tuple(len(b.adapter.deltas) - b.left_out for b in bound),
        prefixes=tuple(b.prefix for b in bound),
        untied=untied,
    )


def _about_base(base: Base) -> Iterator[Problem]:
    if base.quantised:
        yield Problem("quantised_base", f"{shown(base.name)} is quantised ({base.quantised})")


# ------------------------------------------------------------------------------- one adapter


def _fit(one: _Binding, chosen: Callable[[str], bool]) -> None:
    adapter, base = one.adapter, one.base
    keys = _weight_names(adapter, base)
    tie = base.tied()
    there = set(base.tensors) | ({tie[0]} if tie else set())
    needed = [name for key, name in keys.items() if not _may_be_new(key, adapter)]
    one.prefix = find_prefix(needed or list(keys.values()), there)
    lost: dict[str, str] = {}
    for key, name in keys.items():
        target = one.prefix(name)
        if not chosen(target):
            one.left_out += 1
        elif target in there:
            _place(one, key, target)
        elif _may_be_new(key, adapter):
            _new_head(one, key, name)
        else:
            lost[key] = target
    if lost:
        _unmatched(one, lost, there, len(keys) - one.left_out)
    _base_names(one)


def _weight_names(adapter: Adapter, base: Base) -> dict[str, str]:
    """Adapter keys to weight names: the same, but where one module keeps its weight elsewhere."""
    found = {}
    for key, delta in adapter.deltas.items():
        module, _, parameter = key.rpartition(".")
        fused = f"{module}.in_proj_{parameter}"
        attention = isinstance(delta, LowRank | Renormed) and key not in base.tensors
        found[key] = fused if attention and fused in base.tensors else key
    return found


def _may_be_new(key: str, adapter: Adapter) -> bool:
    """Whether a delta may bring a weight that the base lacks: a task head, never a layer."""
    delta = adapter.deltas[key]
    whole = isinstance(delta, Replace) and delta.rows is None and delta.then is None
    return whole and not any(piece.isdigit() for piece in key.split(".")[:-2])


def _place(one: _Binding, key: str, target: str) -> None:
    """Put one delta where it belongs, if its shape allows."""
    delta = one.adapter.deltas[key]
    leaf = one.base.tensors.get(target)
    if leaf is None:  # a tied head, stored as the embedding
        tie = one.base.tied()
        leaf = one.base.tensors[tie[1]] if tie else None
    assert leaf is not None
    whole = isinstance(delta, Replace) and delta.rows is None
    given = delta.value.dtype if isinstance(delta, Replace) else "F32"
    if given not in FLOATS and given != leaf.dtype:
        message = f"{shown(target)}: {given} would replace {leaf.dtype}"
        one.problem("dtype_unusable", message, target)
        return
    # A module saved in full may keep a counter (BatchNorm's), which no quantisation stored.
    if leaf.dtype not in FLOATS and not (whole and given == leaf.dtype):
        one.problem("quantised_base", f"{shown(target)} is stored as {leaf.dtype}", target)
        return
    scales = (f"{target}_scale", f"{target}_scale_inv", target[: -len("weight")] + "scale_weight")
    scale = next((s for s in scales if s in one.base.tensors), None)
    if scale is not None and DTYPE_BITS[leaf.dtype] == 8:
        message = f"{shown(target)} is {leaf.dtype} with {shown(scale)}: numbers and their scale"
        one.problem("quantised_base", message, target)
        return
    transposed = _is_transposed(one, key, target, leaf)
    if not _shape_fits(one, target, delta, leaf, transposed):
        return
    place = Place(target, transposed)
    one.terms.setdefault(target, []).append(Term(one.number, key, delta, place, one.weight))


def _is_transposed(one: _Binding, key: str, target: str, leaf: Leaf) -> bool:
    """Whether the base stores this weight (in, out): the architecture decides, not the shape."""
    delta, config = one.adapter.deltas[key], one.adapter.config
    if key in one.adapter.transposed:
        return True
    shape = module_shape(delta)
    if shape is None or len(shape) != 2 or len(leaf.shape) != 2:
        return False
    says = config.get("fan_in_fan_out") is True
    if one.base.config.get("model_type"):
        is_conv1d = one.base.is_conv1d and last(target) in CONV1D_LAYERS
        if is_conv1d != says and shape[0] == shape[1] and "fan_in_fan_out" in config:
            stored = "(in, out)" if is_conv1d else "(out, in)"
            one.problem(
                "orientation",
                f"{shown(target)} is stored {stored} in {one.base.config['model_type']}; the "
                f"config says fan_in_fan_out={str(says).lower()}; the architecture is followed",
                target,
                severity="warning",
            )
        return is_conv1d
    if shape[0] == shape[1]:
        return says
    return leaf.shape == (shape[1], shape[0])


def _shape_fits(one: _Binding, target: str, delta: Kind, leaf: Leaf, transposed: bool) -> bool:
    shape, stored = stored_shape(delta, transposed), leaf.shape
    named = one.adapter.config.get("base_model_name_or_path")
    hint = f'; its config names "{shown(named)}"' if isinstance(named, str) and named else ""
    if isinstance(delta, Replace):
        is_vocabulary = last(target) in {*EMBEDDINGS, *HEADS} or is_head(target)
        free = delta.rows is not None or is_vocabulary  # in its number of rows
        if shape == stored or (free and shape and stored and shape[1:] == stored[1:]):
            return _then_fits(one, target, delta, leaf, transposed)
    elif _without_ones(shape) == _without_ones(stored) and not (transposed and len(shape) > 2):
        return True
    if len(shape) == len(stored) > 2 and (shape[0], *shape[2:]) == (stored[0], *stored[2:]):
        grouped, rest = divmod(shape[1], stored[1]) if stored[1] else (0, 0)
        if grouped > 1 and not rest:
            hint = (
                f"; the base's convolution has {grouped} groups: an update that mixes all input "
                "channels has no place in its weight"
            )
    one.problem(
        "shape_mismatch",
        f"{shown(target)}: adapter is {shape}, base is {stored}{hint}",
        target,
    )
    return False


def _then_fits(one: _Binding, target: str, delta: Replace, leaf: Leaf, transposed: bool) -> bool:
    """Whether what is applied upon replaced numbers has their shape."""
    upon = leaf if delta.rows is not None else delta.value
    return delta.then is None or _shape_fits(one, target, delta.then, upon, transposed)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution and a linear layer hold the same matrix."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def _new_head(one: _Binding, key: str, name: str) -> None:
    """A full tensor under a name that the base lacks: a new head."""
    term = Term(one.number, key, one.adapter.deltas[key], Place(name), one.weight)
    one.terms.setdefault(name, []).append(term)


def _unmatched(one: _Binding, lost: Mapping[str, str], there: set[str], total: int) -> None:
    matched = total - len(lost)
    roots = Counter(key.split(".")[0] for key in lost)
    absent = {r for r in roots if not any(t.startswith(f"{r}.") for t in there)}
    if len(lost) < total:
        for root in sorted(absent):
            if roots[root] > 1:
                one.problem(
                    "component_absent",
                    f"{shown(root)}: {roots[root]} deltas, and the base has nothing of that name",
                    f"{root}.*",
                    remedy=f'--skip "{shown(root)}.*" leaves the component out',
                )
        lost = {k: t for k, t in lost.items() if roots[k.split(".")[0]] == 1 or
                k.split(".")[0] not in absent}  # fmt: skip
    if not lost:
        return
    close = nearest(list(lost), there)
    if close:
        change, count = close
        step = f"; nearest: {change} (matches {count} of {len(lost)})"
    else:
        step = f"; the base's names begin like {shown(next(iter(sorted(there)), 'nothing'))}"
    first = next(iter(lost.values()))
    one.problem(
        "unmatched",
        f"{matched} of {total} deltas matched; the base has no {shown(first)}"
        f"{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}{step}",
        first,
    )


def _base_names(one: _Binding) -> None:
    """A difference of names is a hint, and only where both are Hub ids."""
    said, base = one.adapter.config.get("base_model_name_or_path"), one.base.id
    if not (isinstance(said, str) and base and is_hub_id(said)):
        return
    if _plain_name(said) != _plain_name(base):
        one.problem(
            "other_base",
            f"its config names {shown(said)}, the base is {shown(base)}",
            severity="warning",
        )


def _plain_name(hub_id: str) -> str:
    """A Hub id without owner, case and the suffixes of quantised copies."""
    pieces = hub_id.rpartition("/")[2].lower().split("-")
    marks = ("bnb", "4bit", "8bit", "gptq", "awq", "int4", "int8", "fp8", "gguf", "hf", "unsloth")
    return "-".join(p for p in pieces if p not in marks)


# ------------------------------------------------------------------------------- all together


def _targets(
    base: Base, merged: Mapping[str, list[Term]], ties: Ties | None, problems: list[Problem]
) -> tuple[dict[str, Target], bool]:
    merged = dict(merged)
    untied = settle_ties(base, merged, ties, problems)
    tie = base.tied()
    targets = {}
    for name, terms in merged.items():
        leaf = base.tensors.get(name)
        if leaf is None and untied and tie and name == tie[0]:
            leaf = base.tensors[tie[1]]
        shape = output_shape(name, leaf, terms, problems)
        targets[name] = Target(name, shape, leaf, tuple(terms))
    if untied and tie and tie[0] not in targets and tie[0] not in base.tensors:
        leaf = base.tensors[tie[1]]
        targets[tie[0]] = Target(tie[0], leaf.shape, leaf, ())
    one_vocabulary(targets, base, problems)
    return targets, untied
