"""An adapter's names made those of a base: which vocabulary a base has, and the way there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from loratools.adapter import Adapter, Leaf
from loratools.names.architectures import BY_NAME, ORIGINAL, modules
from loratools.names.heads import Facts, facts_from
from loratools.names.mangling import architecture
from loratools.translating import IMAGE, LANGUAGE, translate

COMPONENTS = (
    "transformer", "unet", "prior", "text_encoder", "text_encoder_2", "text_encoder_3", "vae",
)  # fmt: skip
_WHOLE = f"model.{ORIGINAL}."  # where a single-file checkpoint keeps what makes the image
CLIP = "text_model."


def addresses(names: Iterable[str]) -> dict[str, str]:
    """An image base's weights: address (component, module, parameter) → name of the weight.

    Empty where no known image architecture explains the names.
    """
    listed = list(names)
    found: dict[str, str] = {}
    bare: list[str] = []
    for name in listed:
        if name.startswith(_WHOLE):
            found[name.removeprefix("model.")] = name
        elif name.partition(".")[0] in (*COMPONENTS, ORIGINAL):
            found[name] = name
        else:
            bare.append(name)
    if found or not bare:
        return found if _known(found) else {}
    counts = {
        front: _known(f"{front}.{name}" for name in bare) for front in (ORIGINAL, *COMPONENTS)
    }
    front = max(counts, key=lambda each: counts[each])
    if counts[front] * 2 < len(bare):  # a stray equal name is no architecture
        return {}
    return {f"{front}.{name}": name for name in bare}


def _known(names: Iterable[str]) -> int:
    """How many of these the architecture has that explains most of them."""
    listed = list(names)
    stems = list(dict.fromkeys(name.rpartition(".")[0] for name in listed))
    found = architecture(stems)
    if found is None:
        return 0
    table = modules(BY_NAME[found].name)
    return sum(
        any(ask(each) is not None for each in (name, name.rpartition(".")[0])
            for ask in (table.of_part, table.of_whole))
        for name in listed
    )  # fmt: skip


def fitted(adapter: Adapter, tensors: Mapping[str, Leaf], config: Mapping[str, Any]) -> Adapter:
    """The adapter with the base's own names of weights, as far as tables know the way.

    What they do not explain keeps its name, and binding then says that it is not there.
    """
    if adapter.vocabulary in LANGUAGE:
        facts = merged(facts_from(config), facts_from(adapter.config))
        shapes = {name: leaf.shape for name, leaf in tensors.items()}
        return translate(adapter, "hf", facts=facts, shapes=shapes).adapter
    if adapter.vocabulary == "hf" and any(key in tensors for key in adapter.deltas):
        return adapter
    here = addresses(tensors)
    if not here or (adapter.vocabulary not in IMAGE and not _is_image(adapter)):
        return adapter
    original = any(address.startswith(f"{ORIGINAL}.") for address in here)
    shapes = {address: tensors[name].shape for address, name in here.items()}
    there = "original" if original else "diffusers"
    moved = translate(adapter, there, shapes=shapes).adapter
    return _under(moved, here)


def _is_image(adapter: Adapter) -> bool:
    """Whether a PEFT adapter's modules are those of an image architecture's component."""
    stems = {key.rpartition(".")[0] for key in adapter.deltas}
    return any(
        _known(f"{front}.{stem}.weight" for stem in stems) == len(stems) for front in COMPONENTS
    )


def _under(adapter: Adapter, here: Mapping[str, str]) -> Adapter:
    """Addresses replaced by the names of the base's weights, CLIP's with or without text_model."""

    def name(key: str) -> str:
        component, _, rest = key.partition(".")
        other = rest.removeprefix(CLIP) if rest.startswith(CLIP) else CLIP + rest
        return here.get(key) or here.get(f"{component}.{other}") or key

    names = {key: name(key) for key in adapter.deltas}
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
