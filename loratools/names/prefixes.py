"""Prefixes that trainers and wrappers add to names or leave out, and finding the right one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

# Longer ones first where one begins with another.
PREFIXES = tuple(
    """model.language_model. language_model.model. language_model. model. transformer. bert.
    roberta. distilbert. deberta. electra. albert. camembert. xlm_roberta. esm. mpnet. vit. deit.
    dinov2. swin. clip. vision_model. text_model. encoder. decoder. gpt_neox. backbone. base_model.
    base_model.model. unet. module. 0.auto_model. auto_model.""".split()
)


@dataclass(frozen=True, slots=True)
class Prefix:
    """A rewriting of names: take `removed` away at the front, then put `added` there."""

    removed: str = ""
    added: str = ""

    def __call__(self, name: str) -> str:
        return self.added + name.removeprefix(self.removed)

    def __str__(self) -> str:
        if self.added and self.removed:
            return f'replace prefix "{self.removed}" by "{self.added}"'
        return f'add prefix "{self.added}"' if self.added else f'remove prefix "{self.removed}"'


def find_prefixes(names: Collection[str], there: Collection[str]) -> list[Prefix]:
    """Every single known prefix whose adding or removing makes all names stand in `there`."""
    found = []
    for change in _changes(names):
        if all(change(n) in there for n in names):
            found.append(change)
    return found


def nearest(names: Collection[str], there: Collection[str]) -> tuple[Prefix, int] | None:
    """The prefix that makes most names match, and how many; None where none does."""
    counts = [(sum(change(n) in there for n in names), change) for change in _changes(names)]
    best = max(counts, key=lambda pair: pair[0], default=(0, Prefix()))
    return (best[1], best[0]) if best[0] else None


def _changes(names: Collection[str]) -> Iterable[Prefix]:
    for prefix in PREFIXES:
        yield Prefix(added=prefix)
        if all(n.startswith(prefix) for n in names):
            yield Prefix(removed=prefix)
