"""An adapter's names made those of a base: which vocabulary a base has, and the way there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from loratools.adapter import Adapter, Leaf
from loratools.experts import arranged
from loratools.names import clip
from loratools.names.checkpoints import COMPONENTS, Addresses, Checkpoint, addresses_of, known
from loratools.names.heads import Facts, facts_from
from loratools.names.rules import Names, asked
from loratools.translating import IMAGE, LANGUAGE, Shapes, regrouped, translate


@dataclass(frozen=True, slots=True)
class Fitted:
    """An adapter under a base's own names; with the addresses that led there, if it has some."""

    adapter: Adapter
    addresses: Addresses | None = None


def addresses(names: Iterable[str]) -> dict[str, str]:
    """An image base's weights: address (component, module, parameter) → name of the weight.

    Empty where no known image architecture explains the names.
    """
    found = addresses_of(names)
    return {} if found is None else dict(found.here)


def fitted(
    adapter: Adapter,
    tensors: Mapping[str, Leaf],
    config: Mapping[str, Any],
    where: Checkpoint | None = None,
) -> Fitted:
    """The adapter with the base's own names of weights, as far as tables know the way.

    What they do not explain keeps its name, and binding then says that it is not there.
    """
    if adapter.vocabulary in LANGUAGE:
        facts = merged(facts_from(config), facts_from(adapter.config))
        shapes = {name: leaf.shape for name, leaf in tensors.items()}
        moved = translate(adapter, "hf", facts=facts, shapes=shapes).adapter
        return Fitted(arranged(moved, tensors, config))
    if adapter.vocabulary == "hf" and any(key in tensors for key in adapter.deltas):
        return Fitted(arranged(adapter, tensors, config))
    if adapter.vocabulary not in IMAGE and not makes_images(adapter):
        return Fitted(arranged(adapter, tensors, config))
    here = (where or Checkpoint(tensors)).addresses
    if here is None:
        return Fitted(adapter)
    shapes = {address: tensors[name].shape for address, name in here.here.items()}
    there = "original" if here.is_original else "diffusers"
    moved = translate(adapter, there, shapes=shapes).adapter
    if here.fused is not None:
        moved = _rejoined(moved, here, here.fused, shapes)
    return Fitted(_under(moved, here), here)


def makes_images(adapter: Adapter) -> bool:
    """Whether a PEFT adapter's modules are those of an image architecture's component."""
    stems = {key.rpartition(".")[0] for key in adapter.deltas}
    return any(
        known(f"{front}.{stem}.weight" for stem in stems) == len(stems) for front in COMPONENTS
    )


def _rejoined(adapter: Adapter, here: Addresses, names: Names, shapes: Shapes) -> Adapter:
    """What has found no weight of its own, put together as the base has it: OpenCLIP's q, k, v in
    one, and models of which some files have them apart.
    """
    lost = {key for key in adapter.deltas if here.name(key) is None}
    if not lost:
        return adapter
    rest = replace(
        adapter,
        deltas={key: delta for key, delta in adapter.deltas.items() if key in lost},
        transposed=adapter.transposed & lost,
    )
    rest = translate(rest, "diffusers", shapes=shapes).adapter
    rest = regrouped(_with_text_model(rest, names), names, shapes=shapes)
    kept = {key: delta for key, delta in adapter.deltas.items() if key not in lost}
    both = kept.keys() & rest.deltas.keys()
    if both:  # two spellings of one weight: leave them apart, so that both are spoken of
        return adapter
    return replace(
        rest,
        deltas={**kept, **rest.deltas},
        vocabulary=adapter.vocabulary,
        transposed=(adapter.transposed - lost) | rest.transposed,
    )


def _with_text_model(adapter: Adapter, names: Names) -> Adapter:
    """A CLIP's modules under `text_model.`, where the rules have them there."""
    new = {}
    for key in adapter.deltas:
        component, _, rest = key.partition(".")
        full = f"{component}.{clip.MODEL}{rest}"
        flat = asked(names.of_part, key) is None and asked(names.of_part, full) is not None
        new[key] = full if flat else key
    return _renamed(adapter, new)


def _under(adapter: Adapter, here: Addresses) -> Adapter:
    """Addresses replaced by the names of the base's weights."""
    names = {key: here.name(key) or key for key in adapter.deltas}
    return _renamed(adapter, names)


def _renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    clashes = [n for n, count in Counter(names.values()).items() if count > 1]
    if clashes:  # two spellings of one weight: leave them apart, so that both are spoken of
        names = {key: key if new in clashes else new for key, new in names.items()}
    return replace(
        adapter,
        deltas={names[key]: delta for key, delta in adapter.deltas.items()},
        transposed=frozenset(names[key] for key in adapter.transposed if key in names),
    )


def merged(first: Facts, second: Facts) -> Facts:
    """Facts of one source, completed by another's."""
    said = {f.name: getattr(first, f.name) for f in fields(Facts)}
    more = {n: getattr(second, n) for n, value in said.items() if value is None}
    return replace(first, **more)
