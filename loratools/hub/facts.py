"""What a card tells beyond the files: what it was made from, how, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from loratools import receipt as receipts
from loratools.errors import LoratoolsError
from loratools.receipt import Receipt
from loratools.weights.base import is_hub_id


@dataclass(frozen=True, slots=True)
class Parent:
    """One thing that the artefact was made from; `card` is the metadata of its own card."""

    name: str  # the last part of its path, where it has no id
    role: Literal["base", "adapter"]
    id: str | None = None
    revision: str | None = None
    weight: float | str | None = None
    format: str | None = None
    card: Mapping[str, Any] | None = None  # None: nobody has read it

    @property
    def license(self) -> str | None:
        return self._text("license")

    @property
    def terms(self) -> tuple[str | None, str | None, str | None]:
        """The license with the name and the link that one of the Hub's "other" needs."""
        return self.license, self._text("license_name"), self._text("license_link")

    def _text(self, key: str) -> str | None:
        value = (self.card or {}).get(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        return value.strip() if isinstance(value, str) and value.strip() else None


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts of an adapter, a folded model or a graph, as `inspect`, receipt and config say."""

    parents: tuple[Parent, ...] = ()
    format: str | None = None
    vocabulary: str | None = None
    kinds: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[int, int] = field(default_factory=dict)
    targets: int = 0
    parameters: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    task: str | None = None
    is_unet: bool = False
    trigger_words: tuple[str, ...] = ()
    makes: str | None = None  # the receipt's own line
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    truncation_error: float | None = None
    update_kept: float | None = None  # the mean over targets
    least_kept: float | None = None
    inputs: tuple[str, ...] = ()  # of an ONNX graph
    bits: int | None = None  # of its quantised weights

    @property
    def unread(self) -> tuple[str, ...]:
        """The ids of parents whose cards have not been read."""
        return tuple(dict.fromkeys(p.id for p in self.parents if p.id and p.card is None))

    def with_cards(self, cards: Mapping[str, Mapping[str, Any]]) -> Facts:
        """The same facts with metadata of parents' cards, by id."""
        read = (
            replace(p, card=cards[p.id]) if p.card is None and p.id and p.id in cards else p
            for p in self.parents
        )
        return replace(self, parents=tuple(read))

    def with_bases(self, ids: tuple[str, ...]) -> Facts:
        """The same facts with the base that the user names."""
        if not ids:
            return self
        first = next((p for p in self.parents if p.role == "base"), None)
        if first is not None and first.id == ids[0]:
            return self
        base = Parent(ids[0].rpartition("/")[2], "base", ids[0])
        others = tuple(p for p in self.parents if p is not first)
        return replace(self, parents=(base, *others))


def parents_of(receipt: Receipt | None) -> tuple[Parent, ...]:
    """What a receipt names as inputs, the base first.

    One that has no id of its own and was itself made from others stands for these.
    """
    if receipt is None:
        return ()
    try:
        entries = receipts.made_from(receipt)
    except LoratoolsError:
        return ()  # too many to be told
    found: dict[tuple[str, object], Parent] = {}

    def follow(into: str | None, depth: int) -> None:
        for entry in entries:
            if entry.get("into") != into:
                continue
            parent, mark = _parent(entry), entry.get("fingerprint")
            older = [e for e in entries if e.get("into") == mark and mark is not None]
            if parent.id is None and older and depth < 8:
                follow(str(mark), depth + 1)
            else:
                found.setdefault((parent.role, parent.id or mark), parent)

    follow(None, 0)
    return tuple(sorted(found.values(), key=lambda p: p.role != "base"))


def _parent(entry: Mapping[str, Any]) -> Parent:
    id, source = entry.get("id"), str(entry.get("source", ""))
    revision, weight, format = (entry.get(k) for k in ("revision", "weight", "format"))
    return Parent(
        name=source.replace("\\", "/").rstrip("/").rpartition("/")[2],
        role="adapter" if entry.get("role") == "adapter" else "base",
        id=id if is_hub_id(id) else None,
        revision=revision if isinstance(revision, str) else None,
        weight=weight if isinstance(weight, int | float | str) else None,
        format=format if isinstance(format, str) else None,
    )
