"""Runtime adapters in the commands: fitted to a base, moved between containers, merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter, Dense, Leaf, Runtime
from loratools.errors import Problem, error, shown
from loratools.names.heads import Facts, facts_from
from loratools.runtime import (
    AVERAGED,
    BOTTLENECK,
    COMPACTER,
    JOINED,
    PREFIX,
    averaged,
    layer_of,
    torn,
    weighted,
)
from loratools.views import joined, reshaped
from loratools.weights.base import embedding_name

if TYPE_CHECKING:
    from loratools.weights.base import Base

HEURISTIC = (
    "an average of {what} is a heuristic (as adapters' average_adapter is): what they compute is "
    "not averaged by it"
)
# What adapters leaves out of account when it asks whether two configs are one.
_FREE = ("dropout", "init_weights", "init_weights_seed", "prefix_length", "prompt_length", "flat",
         "bottleneck_size", "prompt_init", "prompt_init_text", "random_uniform_scale")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fitting:
    """How a runtime adapter fits a base: problems, and how many of its layers are there."""

    problems: tuple[Problem, ...]
    matched: int
    total: int


def is_runtime(adapters: Sequence[Adapter]) -> bool:
    """Whether any of them is a runtime adapter."""
    return any(a.runtime is not None for a in adapters)


# ------------------------------------------------------------------------------- against a base


def against(adapter: Adapter, base: Base) -> Fitting:
    """What of a base does not suit a runtime adapter, from headers and config alone."""
    assert adapter.runtime is not None
    needs, facts = adapter.runtime.needs, facts_from(base.config)
    named = adapter.config.get("base_model_name_or_path")
    hint = f'; its config names "{shown(named)}"' if isinstance(named, str) and named else ""
    found: list[Problem] = []

    def problem(code: str, message: str, target: str | None = None) -> None:
        found.append(Problem(code, message, "error", adapter.name, target))

    what = shown(adapter.runtime.method)
    name = embedding_name(base.tensors)
    rows, width = base.tensors[name].shape[:2] if name is not None else (None, None)
    hidden = facts.hidden or width
    if needs.hidden is not None and hidden is not None and needs.hidden != hidden:
        message = f"{what}: made for hidden states of {needs.hidden}, the base's are {hidden}"
        problem("shape_mismatch", message + hint)
    width = width or hidden
    if needs.embedding is not None and width is not None and needs.embedding != width:
        message = f"{what}: its virtual tokens are {needs.embedding} wide, the base's {width}"
        problem("shape_mismatch", message + hint)
    if needs.tokens is not None and rows is not None and needs.tokens >= rows:
        message = f"{what}: it names token {needs.tokens}, the base's vocabulary has {rows}"
        problem("shape_mismatch", message + hint)
    if needs.layers and facts.layers and not needs.modules and needs.layers != facts.layers:
        message = f"{what}: made for {needs.layers} layers, the base has {facts.layers}"
        problem("shape_mismatch", message + hint)
    elif needs.prefix is not None:
        _prefix(adapter.runtime, facts, problem, hint)
    lost = _absent(needs.modules, base)
    if lost:
        message = (
            f"{len(needs.modules) - len(lost)} of {len(needs.modules)} layers matched; the base "
            f"has no {shown(lost[0])}"
        )
        problem("unmatched", message + hint, lost[0])
    total = len(needs.modules) or 1
    matched = total - len(lost) if needs.modules else int(not found)
    return Fitting(tuple(found), matched, total)


def unfolded(problems: Sequence[Problem], adapters: Sequence[Adapter]) -> list[Problem]:
    """The problems, with the refusals to fold runtime adapters as warnings."""
    names = {a.name for a in adapters if a.runtime is not None}
    return [
        replace(p, severity="warning") if p.code == "not_foldable" and p.adapter in names else p
        for p in problems
    ]


def _prefix(runtime: Runtime, facts: Facts, problem: Any, hint: str) -> None:
    """Keys and values of every layer, as wide as the base's own, which grouped queries narrow."""
    layers = runtime.needs.layers or facts.layers
    if not (layers and facts.kv_heads and facts.head_dim) or runtime.needs.prefix is None:
        return
    width = facts.kv_heads * facts.head_dim
    if runtime.needs.prefix == 2 * layers * width:
        return
    message = (
        f"{shown(runtime.method)}: a token's keys and values are {runtime.needs.prefix} numbers, "
        f"the base has 2 x {layers} layers x {width} (key heads: {facts.kv_heads} "
        f"x {facts.head_dim})"
    )
    if facts.heads and runtime.needs.prefix == 2 * layers * facts.heads * facts.head_dim:
        message += f"; it is as wide as all {facts.heads} heads"
    problem("shape_mismatch", message + hint)


def _absent(modules: Sequence[str], base: Base) -> list[str]:
    """The layers that the base has under no such name, whatever stands before."""
    there = {layer for name in base.tensors if (layer := layer_of(name)) is not None}
    if any(name.startswith("blk.") for name in there):  # other names for all: count them
        return [m for m in modules if f"blk.{m.rpartition('.')[2]}" not in there]
    ends = {_tail(layer) for layer in there}
    return [m for m in modules if _tail(m) not in ends]


def _tail(layer: str) -> tuple[str, ...]:
    """`layer.0`, and which half of a model of two: what all classes of a model call it alike."""
    pieces = layer.split(".")
    half = [p for p in pieces[:-2] if p in ("encoder", "decoder")]
    return (*half[:1], *pieces[-2:])


# ------------------------------------------------------------------------------- merging


def merged(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    method: str = "linear",
    dtype: str | None = None,
) -> Adapter:
    """Several runtime adapters as one: averaged, or (`cat`) their virtual tokens in a row."""
    if len(adapters) == 1 and weights[0] == 1:
        return adapters[0] if dtype is None else _rounded(adapters[0], dtype)
    adapters = [_comparable(a) for a in adapters]
    runtimes = [a.runtime for a in adapters if a.runtime is not None]
    methods = {r.method for r in runtimes} | {"LoRA" for a in adapters if a.runtime is None}
    if len(methods) > 1:
        listed = " and ".join(sorted(shown(m) for m in methods))
        raise error("no_match", f"{listed} cannot be merged with each other; merge those of one")
    first, found = adapters[0], runtimes[0]
    _same_settings(adapters)
    if method == "cat":
        virtual = _in_a_row(adapters, weights)
    elif method != "linear":
        message = f"--method {shown(method)} is for updates of weights; {found.method} takes linear"
        raise error("usage", f"{message} (average), or cat for virtual tokens")
    elif found.method not in AVERAGED:
        message = f"{shown(found.method)}: an average of its tensors means nothing"
        raise error("not_foldable", f"{message}, since its parts are made for each other")
    elif all(r.virtual is not None for r in runtimes):
        rows = [r.virtual for r in runtimes if r.virtual is not None]
        if len({r.shape for r in rows}) > 1:
            listed = ", ".join(str(r.shape) for r in rows)
            message = f"virtual tokens of {listed}: an average needs equal shapes"
            raise error("shape_mismatch", f"{message}; --method cat puts them in a row")
        virtual = weighted(rows, weights)
    else:
        virtual = None
    if virtual is None:
        made = replace(first, runtime=averaged(runtimes, weights), metadata={})
    else:
        made = with_virtual(replace(first, metadata={}), virtual)
    made = replace(made, name="merged", folder=None, files=(), problems=())
    return _rounded(_with_heads(made, adapters), dtype or "F32")


def refuse_choice(
    rank: int | None, energy: float | None, only: Sequence[str] = (), skip: Sequence[str] = ()
) -> None:
    """UsageError where options of updates of weights are given."""
    if rank is not None or energy is not None or only or skip:
        message = "--rank, --energy, --only and --skip are for updates of weights"
        raise error("usage", f"{message}; these adapters act where the model runs")


def notes(adapters: Sequence[Adapter], method: str) -> list[str]:
    """What a merge of runtime adapters should not leave unsaid."""
    found = [a.runtime for a in adapters if a.runtime is not None]
    if not found or len(adapters) < 2 or method == "cat":
        return []
    plain = found[0].method in (BOTTLENECK, COMPACTER)
    said = [HEURISTIC.format(what="bottlenecks" if plain else "virtual tokens")]
    if any(r.method == COMPACTER for r in found):
        said.append("Compacters are averaged as the plain bottlenecks that they are")
    return said


def _comparable(adapter: Adapter) -> Adapter:
    """A Compacter as the bottleneck that it is; others as they are."""
    compact = adapter.runtime is not None and adapter.runtime.method == COMPACTER
    return expanded(adapter) if compact else adapter


def expanded(adapter: Adapter) -> Adapter:
    """A Compacter as a plain bottleneck, exactly (arXiv 2106.04647); a bottleneck stays."""
    runtime = adapter.runtime
    if runtime is None or runtime.method not in (BOTTLENECK, COMPACTER):
        what = shown(runtime.method) if runtime is not None else "an update of weights"
        raise error("usage", f"{shown(adapter.name)} is {what}: no bottleneck is the same")
    if runtime.method == BOTTLENECK:
        return adapter
    if not runtime.plain:
        raise error("missing", f"{shown(adapter.name)}: its bottlenecks cannot be put together")
    numbers = {k: v for k, v in runtime.numbers.items() if k != "phm_dim"}
    plain = replace(runtime, method=BOTTLENECK, tensors=runtime.plain, numbers=numbers, plain={})
    config = _inner(adapter, phm_layer=False)
    return replace(adapter, runtime=plain, config=config, original={})


def _same_settings(adapters: Sequence[Adapter]) -> None:
    first, *others = [_settings(a) for a in adapters]
    for settings, adapter in zip(others, adapters[1:], strict=True):
        odd = sorted(k for k in first.keys() | settings.keys() if first.get(k) != settings.get(k))
        if odd:
            message = (
                f"{shown(adapters[0].name)} and {shown(adapter.name)} differ in {shown(odd[0])}: "
                f"{shown(first.get(odd[0]))}, {shown(settings.get(odd[0]))}"
            )
            raise error("no_match", message)


def _settings(adapter: Adapter) -> dict[str, Any]:
    """What makes two adapters of one method compute alike from the same tensors."""
    if adapter.format == "peft":
        names = ("peft_type", "num_layers", "num_transformer_submodules", "num_attention_heads")
        return {k: adapter.config.get(k) for k in names}
    inner = adapter.config.get("config")
    said = inner if isinstance(inner, Mapping) else {}
    return {k: v for k, v in said.items() if k not in _FREE}


def _in_a_row(adapters: Sequence[Adapter], weights: Sequence[float]) -> Leaf:
    rows: list[Leaf] = []
    for adapter in adapters:
        runtime = adapter.runtime
        assert runtime is not None
        if runtime.method not in JOINED or runtime.virtual is None:
            message = f"{shown(runtime.method)} has no virtual tokens that can stand in a row"
            raise error("usage", f"--method cat: {message}")
        if "submodules" in runtime.numbers:
            message = "it has other virtual tokens for encoder and decoder"
            raise error("usage", f"--method cat: {shown(adapter.name)}: {message}")
        rows.append(runtime.virtual)
    if any(w != 1 for w in weights):
        raise error("usage", "--method cat keeps all virtual tokens as they are: weights must be 1")
    widths = {leaf.shape[1] for leaf in rows}
    if len(widths) > 1:
        listed = ", ".join(str(w) for w in sorted(widths))
        raise error("shape_mismatch", f"virtual tokens of several widths: {listed}")
    return joined(rows)


def with_virtual(adapter: Adapter, virtual: Leaf) -> Adapter:
    """The adapter in its own container with other virtual tokens; a prefix becomes flat."""
    runtime, count = adapter.runtime, virtual.shape[0]
    assert runtime is not None
    config: Mapping[str, Any]
    if adapter.format == "peft":
        tensors = {"prompt_embeddings": virtual}
        config = {**adapter.config, "num_virtual_tokens": count}
        if "prefix_projection" in config:
            config = {**config, "prefix_projection": False}
    elif runtime.method == PREFIX:
        ends = ("wte.weight", "control_trans")
        stems = {k.removesuffix(e) for k in runtime.tensors for e in ends if k.endswith(e)}
        flat = reshaped(virtual, virtual.numel)
        tensors = {f"{stem}control_trans": flat for stem in sorted(stems)}
        config = _inner(adapter, flat=True, prefix_length=count)
    else:
        tensors = dict.fromkeys(runtime.tensors, virtual)
        config = _inner(adapter, prompt_length=count)
    numbers = {**runtime.numbers, "virtual_tokens": count}
    if "flat" in numbers:
        numbers["flat"] = True
    changed = replace(runtime, tensors=tensors, virtual=virtual, numbers=numbers)
    return replace(adapter, runtime=changed, config=config)


def _inner(adapter: Adapter, **fields: Any) -> dict[str, Any]:
    """The config of AdapterHub with other settings of the method."""
    inner = adapter.config.get("config")
    said = inner if isinstance(inner, Mapping) else {}
    return {**adapter.config, "config": {**said, **fields}}


def _with_heads(made: Adapter, adapters: Sequence[Adapter]) -> Adapter:
    """Heads that all have alike; others are refused, for an average of heads is none."""
    from loratools.adapter import leaves

    for other in adapters[1:]:
        for key in made.deltas.keys() | other.deltas.keys():
            pair = [[x.read() for x in leaves(a.deltas[key])] for a in (made, other)
                    if key in a.deltas]  # fmt: skip
            if len(pair) < 2 or pair[0] != pair[1]:
                message = f"{shown(key)}: the adapters have other heads; merge them without"
                raise error("head_conflict", message)
    return made


def _rounded(adapter: Adapter, dtype: str) -> Adapter:
    from loratools.commands.merge import rounded

    runtime = adapter.runtime
    assert runtime is not None

    def narrowed(leaf: Leaf) -> Leaf:
        made = rounded(Dense(leaf), dtype)
        assert isinstance(made, Dense)
        return made.diff

    once: dict[int, Leaf] = {}
    for leaf in runtime.tensors.values():
        if id(leaf) not in once:
            once[id(leaf)] = narrowed(leaf)
    tensors = {key: once[id(leaf)] for key, leaf in runtime.tensors.items()}
    return replace(adapter, runtime=replace(runtime, tensors=tensors))


def whole(adapter: Adapter) -> None:
    """FitError `config_conflict` where copies of one prefix within a file differ."""
    if adapter.runtime is not None and (key := torn(adapter.runtime.tensors)) is not None:
        message = f"{shown(key)} is a copy of the prefix that all layers share, and differs from it"
        raise error("config_conflict", message)
