"""PEFT's key grammar: which module, and which part of it, a key of an adapter's file names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from loratools.adapter import Leaf
from loratools.errors import error, shown
from loratools.formats.reading import unwrapped

PREFIX = "base_model.model."
PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
TOKENS = "trainable_tokens_delta"
# Where PEFT keeps a module that it wrapped; nn.MultiheadAttention's out_proj stands within one.
BASE = "base_layer"
# What PEFT's wrappers hold for themselves: the trained values, which mostly stand there under their
# plain name too (a resized embedding, bias="all"), and the values from before the training.
ORIGINALS = ("original_module", "trainable_tokens_original")
VALUE, SPARE, COPY = "value", "spare", "copy"


@dataclass(slots=True)
class Module:
    """The leaves found for one module, before they are put together."""

    leaves: dict[str, Leaf] = field(default_factory=dict)
    owner: str | None = None  # the nn.MultiheadAttention whose out_proj this is


@dataclass(slots=True)
class Found:
    """A file's tensors by what they are; `copies` are those that say nothing new."""

    modules: dict[str, Module] = field(default_factory=dict)
    plain: dict[str, Leaf] = field(default_factory=dict)
    copies: list[Leaf] = field(default_factory=list)
    adapters: set[str] = field(default_factory=set)  # names left in keys


@dataclass(frozen=True, slots=True)
class Part:
    """What one key names; a `part` of VALUE, SPARE or COPY speaks of a parameter in full."""

    module: str  # for a parameter in full, its name
    part: str
    adapter: str = ""
    owner: str | None = None


def is_lora(keys: Iterable[str]) -> bool:
    """Whether any of these keys is one of an adapter of PEFT's."""
    return any(part_of(key).part in (*PARTS, TOKENS) for key in keys)


def group(
    tensors: Mapping[str, Leaf], parts: Collection[str] = (), shared: Collection[str] = ()
) -> Found:
    """The tensors of a file by module and part; MalformedError where a parameter stands twice.

    `parts` and `shared` are the names of a method other than LoRA; shared tensors are those of
    the module "".
    """
    found, spare = Found(), dict[str, Leaf]()
    for key, leaf in tensors.items():
        part = part_of(key, parts, shared)
        found.adapters |= {part.adapter} if part.adapter else set()
        if part.part == COPY:
            found.copies.append(leaf)
            continue
        slots, slot = {VALUE: found.plain, SPARE: spare}.get(part.part), part.module
        if slots is None:
            module = found.modules.setdefault(part.module, Module())
            module.owner = part.owner
            slots, slot = module.leaves, part.part
        if slot in slots and not part.adapter:
            raise error(
                "duplicate", f"{shown(key)} and {shown(slots[slot].name)} are the same parameter"
            )
        slots[slot] = leaf
    found.copies += [leaf for name, leaf in spare.items() if name in found.plain]
    found.plain = spare | found.plain
    return found


def part_of(key: str, parts: Collection[str] = (), shared: Collection[str] = ()) -> Part:
    """A key in the grammar of specs/formats/peft.md; with `parts`, in that of their method."""
    pieces = unwrapped(key).split(".")
    if pieces[:2] == ["base_model", "model"]:
        pieces = pieces[2:]
    if parts:
        found = _part_among(pieces, parts, shared)
        if found is not None:
            return found
    for i in range(len(pieces) - 1, -1, -1):
        piece, before, tail = pieces[i], pieces[:i], pieces[i + 1 :]
        if piece in PARTS and len(tail) <= 2 and not parts:
            leaf = tail.pop() if tail and tail[-1] in ("weight", "bias") else "weight"
            bias = ".bias" if leaf == "bias" else ""
            return Part(_bare(before), piece + bias, ".".join(tail), _owner(before))
        if piece == TOKENS and len(tail) <= 1:
            return Part(_bare(before), TOKENS, ".".join(tail))
        if piece == "modules_to_save" and tail:
            adapter = tail.pop(0) if len(tail) > 1 else ""
            return Part(_bare([*before, *tail]), SPARE, adapter)
        if piece in ORIGINALS:
            return Part(_bare([*before, *tail]), COPY)
    return Part(_bare(pieces), VALUE)


def _part_among(pieces: list[str], parts: Collection[str], shared: Collection[str]) -> Part | None:
    """The part of a module, or of all modules, that the pieces of a key name.

    The name of an adapter, where it was left in, follows the first piece of the part. In the names
    of parts `*` is any number, in those of shared tensors any word.
    """
    inner = pieces[1:] if pieces[:1] == ["base_model"] else pieces
    if inner and inner[0] in shared and len(inner) <= 2:
        return Part("", inner[0], ".".join(inner[1:]))
    if f"{inner[0] if inner else ''}.*" in shared and 2 <= len(inner) <= 3:
        which, adapter_name = [*inner[1:], ""][:2]  # a role's, or a group's that has a number
        if adapter_name.isdecimal() and not which.isdecimal():
            which, adapter_name = adapter_name, which
        return Part("", f"{inner[0]}.{which}", adapter_name)
    for i in range(len(pieces) - 1, -1, -1):
        for tail, adapter in ((pieces[i:], ""), ([pieces[i], *pieces[i + 2 :]], pieces[i + 1 :])):
            numbered = ".".join("*" if p.isdecimal() else p for p in tail)
            named = ".".join(tail) in parts or numbered in parts
            if named and len(pieces) - i - len(tail) == len(adapter[:1]):
                return Part(_bare(pieces[:i]), ".".join(tail), "".join(adapter[:1]))
    return None


def _bare(pieces: list[str]) -> str:
    return ".".join(p for p in pieces if p not in (BASE, "token_adapter"))


def _owner(pieces: list[str]) -> str | None:
    inside = BASE in pieces[:-1]
    return _bare(pieces[: pieces.index(BASE)]) if inside else None


def saved_stem(module: str, owner: str | None) -> str:
    """The beginning of a module's keys as PEFT saves them."""
    if owner is None:
        return PREFIX + module
    return f"{PREFIX}{owner}.{BASE}{module.removeprefix(owner)}"
