"""What is said of a base before anything is fitted to it, and of names that it does not have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

from loratools.adapter import Adapter
from loratools.errors import Problem, shown
from loratools.names.prefixes import nearest
from loratools.weights.base import Base, is_hub_id

# Above this many, names that begin so are a second copy of the weights, and no counters.
AVERAGES = 100


def about_base(base: Base) -> Iterator[Problem]:
    """What is wrong with a base whatever is folded into it."""
    if base.quantised:
        yield Problem("quantised_base", f"{shown(base.name)} is quantised ({base.quantised})")
    running = base.graph.found.running if base.graph is not None else None
    if running is not None:
        yield Problem(
            "graph_changed",
            f"{shown(base.name)} computes with codes ({running}): what it computes depends on the "
            "old weights' scales",
            remedy="fold into the float32 graph, and quantise that: loratools export FOLDED "
            "--quantize int8 --quantize-method dynamic",
        )
    averages = sum(name.startswith("model_ema.") for name in base.tensors)
    if averages > AVERAGES:
        message = (
            f"{averages} weights of {shown(base.name)} are averages (model_ema.*): no adapter "
            "changes them, and a program that takes them instead sees no change"
        )
        yield Problem("no_effect", message, "warning")


def about_components(base: Base, targets: Iterable[str]) -> Iterator[Problem]:
    """What is wrong with those components of a pipeline that would be changed."""
    touched = {name.partition(".")[0] for name in targets} if base.components else set()
    for component in sorted(touched & base.components.keys()):
        said = base.components[component].get("quantization_config")
        if isinstance(said, Mapping):
            method = shown(said.get("quant_method", "an unnamed method"))
            message = f"{component} of {shown(base.name)} is quantised ({method})"
            yield Problem("quantised_base", message, target=f"{component}.*")


def unmatched(
    lost: Mapping[str, str], there: Collection[str], total: int, components: Collection[str]
) -> Iterator[Problem]:
    """Deltas (key → target) that found no weight among `there`, of `total` that were looked for.

    A whole component that the base lacks is one problem; `components` are those it has under
    other names.
    """
    matched = total - len(lost)
    roots = Counter(key.split(".")[0] for key in lost)
    absent = {
        root
        for root in roots
        if root not in components and not any(name.startswith(f"{root}.") for name in there)
    }
    if len(lost) < total:
        for root in sorted(absent):
            if roots[root] > 1:
                yield Problem(
                    "component_absent",
                    f"{shown(root)}: {roots[root]} deltas, and the base has nothing of that name",
                    target=f"{root}.*",
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
    yield Problem(
        "unmatched",
        f"{matched} of {total} deltas matched; the base has no {shown(first)}"
        f"{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}{step}",
        target=first,
    )


def absent_from_graph(lost: Mapping[str, str], base: Base, total: int) -> Iterator[Problem]:
    """Deltas (key → target) without a tensor in a graph: pruned ones, and those it was fused over.

    Pruned are modules that no node comes from, neither they nor what is around them: their
    outputs are not among the graph's.
    """
    assert base.graph is not None
    found = base.graph.found
    modules = found.paths | {name.rpartition(".")[0] for name in base.tensors}
    around = {m[:i] for m in modules for i, c in enumerate(m) if c == "."} | modules
    told = bool(found.paths) or found.listed
    whole = told and not found.fused and not found.gone
    others = [t for t in lost.values() if t in found.others]
    if others:
        first = others[0]
        message = (
            f"{len(others)} of {total} target weights are not the reference's (first: "
            f"{shown(first)}): {found.others[first]}"
        )
        remedy = "name the model that this graph was exported from as --reference"
        yield Problem("other_base", message, target=first, remedy=remedy)
    pruned: list[str] = []
    changed: list[str] = []
    for target in lost.values():
        if target in found.others:
            continue
        module = target.rpartition(".")[0]
        above = module.rpartition(".")[0]
        here = module in around or (above != "" and above in around)
        absent = whole and not here and target not in found.ambiguous
        (pruned if absent else changed).append(target)
    if changed:
        first, name = changed[0], shown(base.name)
        doubt = found.ambiguous.get(first)
        message = (
            f"{len(changed)} of {total} target weights were not found in {name} (first: "
            f"{shown(first)}{f'; {doubt}' if doubt else ''}); the graph looks fused or quantised, "
            "or is of another model"
        )
        remedy = "export the base without fusing and fold into that, or name its --reference"
        yield Problem("graph_changed", message, target=first, remedy=remedy)
    for target in pruned:
        message = f"{shown(target)} is not in {shown(base.name)}: no node comes from its module"
        remedy = f'--allow "unmatched:{shown(target)}" leaves it out: the graph never computes it'
        yield Problem("unmatched", message, target=target, remedy=remedy)


def base_names(adapter: Adapter, base: Base) -> Iterator[Problem]:
    """A difference of names is a hint, and only where both are Hub ids."""
    said, own = adapter.config.get("base_model_name_or_path"), base.id
    if not (isinstance(said, str) and own and is_hub_id(said)):
        return
    if _plain_name(said) != _plain_name(own):
        message = f"its config names {shown(said)}, the base is {shown(own)}"
        yield Problem("other_base", message, "warning")


def _plain_name(hub_id: str) -> str:
    """A Hub id without owner, case and the suffixes of quantised copies."""
    pieces = hub_id.rpartition("/")[2].lower().split("-")
    marks = ("bnb", "4bit", "8bit", "gptq", "awq", "int4", "int8", "fp8", "gguf", "hf", "unsloth")
    return "-".join(p for p in pieces if p not in marks)
