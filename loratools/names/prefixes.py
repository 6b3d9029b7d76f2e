"""Prefixes that trainers and wrappers add to names or leave out, and finding the right one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from loratools.names.spellings import Spelling, spellings

# Longer ones first where one begins with another.
PREFIXES = tuple(
    """model.language_model. language_model.model. language_model. model. transformer. bert.
    roberta. distilbert. deberta. electra. albert. camembert. xlm_roberta. esm. mpnet. vit. deit.
    dinov2. swin. clip. vision_model. text_model. encoder. decoder. gpt_neox. backbone. base_model.
    base_model.model. unet. module. 0.auto_model. auto_model.""".split()
)


@dataclass(frozen=True, slots=True)
class Prefix:
    """A rewriting of names: another spelling, then `removed` taken away, then `added` put there."""

    removed: str = ""
    added: str = ""
    spelling: Spelling | None = None

    def __call__(self, name: str) -> str:
        spelt = name if self.spelling is None else self.spelling(name)
        return self.added + spelt.removeprefix(self.removed)

    def __bool__(self) -> bool:
        return bool(self.removed or self.added or self.spelling)

    def __str__(self) -> str:
        steps = [] if self.spelling is None else [str(self.spelling)]
        steps += [f'remove prefix "{self.removed}"'] if self.removed else []
        steps += [f'add prefix "{self.added}"'] if self.added else []
        return ", ".join(steps)


def find_prefix(names: Collection[str], there: Collection[str]) -> Prefix:
    """The one known change after which all names stand in `there`; none where they do, or several.

    At most one prefix is added or taken away, and names may be spelt as transformers 4 or 5 does.
    """
    if all(n in there for n in names):
        return Prefix()
    found: dict[tuple[str, ...], Prefix] = {}
    for change in _changes(_some(names)):
        if all(change(n) in there for n in names):
            found.setdefault(tuple(change(n) for n in names), change)
    return next(iter(found.values())) if len(found) == 1 else Prefix()


def nearest(names: Collection[str], there: Collection[str]) -> tuple[Prefix, int] | None:
    """The change that makes most names match, and how many; None where none does."""
    some = _some(names)
    best = max(_changes(some), key=lambda change: sum(change(n) in there for n in some))
    count = sum(best(n) in there for n in names)
    return (best, count) if count else None


def _some(names: Collection[str]) -> list[str]:
    """At most some hundreds of the names, evenly: there are hundreds of changes to try."""
    return list(names)[:: 1 + len(names) // 256]


def _changes(names: Collection[str]) -> Iterator[Prefix]:
    yield from _prefixes(names)
    for spelling in spellings():
        spelt = [spelling(n) for n in names]
        if spelt != list(names):
            yield Prefix(spelling=spelling)
            for prefix in _prefixes(spelt):
                yield replace(prefix, spelling=spelling)


def _prefixes(names: Collection[str]) -> Iterator[Prefix]:
    for prefix in PREFIXES:
        yield Prefix(added=prefix)
        if all(n.startswith(prefix) for n in names):
            yield Prefix(removed=prefix)
