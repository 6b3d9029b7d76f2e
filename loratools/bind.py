"""Fitting adapters to a base on shapes alone: a plan, or every problem at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loratools import kinds
from loratools.adapter import (
    DTYPE_BITS,
    FLOATS,
    Adapter,
    Experts,
    Kind,
    Leaf,
    LowRank,
    Place,
    Relative,
    Renormed,
    Replace,
)
from loratools.errors import Problem, shown
from loratools.experts import ambiguous, is_transposed
from loratools.findings import (
    about_base,
    about_components,
    absent_from_graph,
    base_names,
    unmatched,
)
from loratools.fitting import fitted
from loratools.names.checkpoints import DENOISERS, Addresses, Checkpoint
from loratools.names.gguf import differing
from loratools.names.prefixes import Prefix, find_prefix
from loratools.plan import Plan, Target, Term, Ties, module_shape, stored_shape
from loratools.sizing import may_be_absent, one_weight, settled
from loratools.views import padded
from loratools.vocabulary import is_head, last, one_vocabulary, output_shape, settle_ties
from loratools.weights.base import CONV1D_LAYERS, EMBEDDINGS, HEADS, Base
from loratools.weights.scaled import is_companion

# The layers that take an image's channels, in diffusers' names and in the models' own.
INPUTS = frozenset(
    f"{module}.weight"
    for module in "x_embedder img_in conv_in input_blocks.0.0 patch_embedding".split()
)

Weight = float | Callable[..., float]  # of all targets, or of one by its names


@dataclass(slots=True)
class _Binding:
    """One adapter being fitted."""

    number: int
    adapter: Adapter
    base: Base
    weight: Weight
    ties: Ties | None
    addresses: Addresses | None = None  # where the base is an image model's
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
    weights: Sequence[Weight] | None = None,
    chosen: Callable[..., bool] = lambda *_: True,
    ties: Ties | None = None,
) -> Plan:
    """Fit adapters to a base; every problem of every adapter is in the plan's `problems`.

    `chosen` tells by target name (then by the other names it has in an image model) which deltas
    take part, a weight that is a function what they weigh (0: left out); `ties` says what to do
    where embedding and head are one stored tensor. Reads no
    weight and needs no torch.
    """
    factors: Sequence[Weight] = weights if weights is not None else [1.0] * len(adapters)
    problems: list[Problem] = [*base.problems, *about_base(base)]
    merged: dict[str, list[Term]] = {}
    bound: list[_Binding] = []
    names = [name for name in base.tensors if not is_companion(name)]
    where = Checkpoint(names, bool(base.components), _called(base))
    for number, (adapter, weight) in enumerate(zip(adapters, factors, strict=True)):
        fit = fitted(adapter, base.tensors, base.config, where)
        one = _Binding(number, fit.adapter, base, weight, ties, fit.addresses)
        problems += fit.adapter.problems
        _fit(one, chosen)
        problems += one.problems
        bound.append(one)
        for name, terms in one.terms.items():
            merged.setdefault(name, []).extend(terms)
    targets, untied = _targets(base, merged, ties, problems)
    problems += about_components(base, targets)
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


def _called(base: Base) -> str:
    """The component that a base's folder is called after."""
    return base.bundle.path.name if base.bundle.path is not None else ""


# ------------------------------------------------------------------------------- one adapter


def _fit(one: _Binding, chosen: Callable[[str], bool]) -> None:
    adapter, base = one.adapter, one.base
    keys = _weight_names(adapter, base)
    tie = base.tied()
    there = set(base.tensors) | ({tie[0]} if tie else set())
    free = (_may_be_new, may_be_absent)
    needed = [name for key, name in keys.items() if not any(f(key, adapter) for f in free)]
    one.prefix = find_prefix(needed or list(keys.values()), there)
    one.adapter = adapter = _sized(one, keys)
    lost: dict[str, str] = {}
    for key, name in keys.items():
        target = one.prefix(name)
        names = (target, *(one.addresses.known_as(target) if one.addresses else ()))
        weight = _weight(one, names) if chosen(*names) else 0.0
        if not weight:
            one.left_out += 1
        elif target in there:
            _place(one, key, target, weight)
        elif one.addresses is None and base.graph is None and _may_be_new(key, adapter):
            _new_head(one, key, name, weight)
        elif may_be_absent(key, adapter):
            one.left_out += 1
        else:
            lost[key] = target
    known = one.addresses.roots if one.addresses else ()
    wanted = len(keys) - one.left_out
    found: Iterable[Problem] = ()
    if lost and base.graph is not None:
        found = absent_from_graph(lost, base, wanted)
    elif lost:
        found = unmatched(lost, there, wanted, known)
    said = [*found, *base_names(adapter, base)]
    one.problems += (replace(p, adapter=adapter.name) for p in said)
    if one.adapter.format == "gguf" and (other := differing(one.adapter.config, one.base.config)):
        one.problem("other_base", other)


def _weight(one: _Binding, names: Sequence[str]) -> float:
    return one.weight(*names) if callable(one.weight) else one.weight


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


def _sized(one: _Binding, keys: Mapping[str, str]) -> Adapter:
    """The adapter with what depends on the sizes of its weights settled."""

    def find(key: str) -> tuple[Leaf, bool] | None:
        target = one.prefix(keys.get(key, key))
        leaf = one.base.tensors.get(target)
        if leaf is None:
            return None
        return leaf, key in keys and _is_transposed(one, key, target, leaf)

    return settled(one.adapter, find)


def _place(one: _Binding, key: str, target: str, weight: float) -> None:
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
    if scale is not None and DTYPE_BITS[leaf.dtype] == 8 and leaf.scale is None:
        message = f"{shown(target)} is {leaf.dtype} with {shown(scale)}: numbers and their scale"
        one.problem("quantised_base", message, target)
        return
    doubt = one.base.graph.found.ambiguous.get(target) if one.base.graph else None
    if doubt is not None:
        one.problem("graph_changed", f"{shown(target)}: {doubt}", target)
        return
    transposed = _is_transposed(one, key, target, leaf)
    delta = _widened(one, target, delta, leaf)
    if not _shape_fits(one, target, delta, leaf, transposed):
        return
    place = Place(target, transposed)
    one.terms.setdefault(target, []).append(Term(one.number, key, delta, place, weight))


def _is_transposed(one: _Binding, key: str, target: str, leaf: Leaf) -> bool:
    """Whether the base stores this weight (in, out): the architecture decides, not the shape."""
    delta, config = one.adapter.deltas[key], one.adapter.config
    if isinstance(delta, Experts):
        return _is_stack_transposed(one, delta, target, leaf)
    if key in one.adapter.transposed or one.addresses is not None:
        return key in one.adapter.transposed
    shape = module_shape(delta)
    if shape is None and isinstance(delta, Relative):
        return _turned_unseen(one, delta, target, leaf)
    if shape is None or len(shape) != 2 or len(leaf.shape) != 2:
        return False
    seen = None if one.base.graph is None else one.base.graph.in_out.get(target)
    if seen is not None:  # a graph shows how its products take their weights
        return seen
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


def _turned_unseen(one: _Binding, delta: Relative, target: str, leaf: Leaf) -> bool:
    """Whether a weight is stored (in, out), where the delta knows no more than one of its sides."""
    if len(leaf.shape) != 2:
        return False
    if one.base.graph is not None and target in one.base.graph.in_out:
        return one.base.graph.in_out[target]
    if one.base.config.get("model_type"):
        return one.base.is_conv1d and last(target) in CONV1D_LAYERS
    fits, turned = (kinds.fits(delta, s) is None for s in (leaf.shape, leaf.shape[::-1]))
    return one.adapter.config.get("fan_in_fan_out") is True if fits == turned else turned


def _is_stack_transposed(one: _Binding, delta: Experts, target: str, leaf: Leaf) -> bool:
    """Whether the base stores a stack of experts (experts, in, out) of this delta."""
    votes = []
    for key, other in one.adapter.deltas.items():
        stored = one.base.tensors.get(one.prefix(key))
        if isinstance(other, Experts) and stored is not None and len(set(other.shape[1:])) == 2:
            votes.append(stored.shape == (other.shape[0], *other.shape[:0:-1]))
    assumed = "experts" in one.adapter.assumed
    config = one.base.config
    found = is_transposed(delta, leaf.shape, votes=votes, config=config, assumed=assumed)
    if found is None:
        problem = ambiguous(one.adapter.name, target, delta)
        if problem not in one.problems:
            one.problems.append(problem)
    return bool(found)


def _shape_fits(one: _Binding, target: str, delta: Kind, leaf: Leaf, transposed: bool) -> bool:
    if isinstance(delta, Relative):
        why = kinds.fits(delta, leaf.shape[::-1] if transposed else leaf.shape)
        if why is not None:
            one.problem("shape_mismatch", f"{shown(target)}: {why}", target)
        return why is None
    shape, stored = stored_shape(delta, transposed), leaf.shape
    named = one.adapter.config.get("base_model_name_or_path")
    hint = f'; its config names "{shown(named)}"' if isinstance(named, str) and named else ""
    if isinstance(delta, Replace):
        is_vocabulary = last(target) in {*EMBEDDINGS, *HEADS} or is_head(target)
        is_vocabulary = is_vocabulary and one.addresses is None
        free = delta.rows is not None or is_vocabulary  # in its number of rows
        if shape == stored or (free and shape and stored and shape[1:] == stored[1:]):
            return _then_fits(one, target, delta, leaf, transposed)
    elif isinstance(delta, Experts):
        if shape == stored:
            return True
    elif one_weight(shape, stored) and not (transposed and len(shape) > 2):
        return True
    if len(shape) == len(stored) > 2 and (shape[0], *shape[2:]) == (stored[0], *stored[2:]):
        grouped, rest = divmod(shape[1], stored[1]) if stored[1] else (0, 0)
        if grouped > 1 and not rest:
            hint = (
                f"; the base's convolution has {grouped} groups: an update that mixes all input "
                "channels has no place in its weight"
            )
    if len(shape) == len(stored) and _is_input(one, target) and shape[:1] == stored[:1]:
        more = shape[1] - stored[1]
        hint = (
            f"; a control or inpainting adapter, which reads {more} more channels than this base "
            f"has: fold it into the base that it was made for, whose layer takes {shape[1]}"
        )
    one.problem(
        "shape_mismatch",
        f"{shown(target)}: adapter is {shape}, base is {stored}{hint}",
        target,
    )
    return False


def _is_input(one: _Binding, target: str) -> bool:
    """Whether a weight is the first layer of what makes the image, as wide as its channels."""
    address = one.addresses.names.get(target, "") if one.addresses else ""
    root, _, rest = address.partition(".")
    return root in DENOISERS and rest in INPUTS


def _widened(one: _Binding, target: str, delta: Kind, leaf: Leaf) -> Kind:
    """A delta of the first layer with zeros for the channels that only the base has.

    Control and inpainting models have the image's own channels first (diffusers does the same,
    diffusers:loaders/lora_pipeline.py, and ComfyUI).
    """
    shape, stored = module_shape(delta), leaf.shape
    if not isinstance(delta, LowRank) or shape is None or len(shape) != len(stored):
        return delta
    if (shape[0], *shape[2:]) != (stored[0], *stored[2:]) or not _is_input(one, target):
        return delta
    more = stored[1] - shape[1]
    if more <= 0:
        return delta
    one.problem(
        "shape_mismatch",
        f"{shown(target)}: the adapter knows {shape[1]} of the base's {stored[1]} channels; the "
        "others are left as they are",
        target,
        severity="note",
    )
    return replace(delta, a=padded(delta.a, 0, more, 1))


def _then_fits(one: _Binding, target: str, delta: Replace, leaf: Leaf, transposed: bool) -> bool:
    """Whether what is applied upon replaced numbers has their shape."""
    upon = leaf if delta.rows is not None else delta.value
    return delta.then is None or _shape_fits(one, target, delta.then, upon, transposed)


def _new_head(one: _Binding, key: str, name: str, weight: float) -> None:
    """A full tensor under a name that the base lacks: a new head."""
    term = Term(one.number, key, one.adapter.deltas[key], Place(name), weight)
    one.terms.setdefault(name, []).append(term)


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
