"""Two vocabularies' names for the same weights: rules as plain tuples, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

_NUMBER = re.compile(r"\{(\w)\}")


@dataclass(frozen=True, slots=True)
class Rule:
    """Modules `parts` of one vocabulary: their rows one after another are `whole` of another.

    `{n}`, `{m}`, `{k}` in names stand for a number, the same on both sides. `order` names how the
    rows of each part are rearranged on the way to `whole`, `sizes` how many rows each part has.
    Where the parameter has another name too (a norm's `weight` and `scale`), the names end with it.
    """

    parts: tuple[str, ...]
    whole: str
    order: str = ""
    sizes: str = "equal"


@dataclass(frozen=True, slots=True)
class Found:
    """Where a name stands: the rule, its numbers filled in, and which of the parts it is."""

    parts: tuple[str, ...]
    whole: str
    part: int
    rule: Rule


class Names:
    """Rules made ready to be asked from both sides."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        self._parts = _Templates((p, (r, i)) for r in self.rules for i, p in enumerate(r.parts))
        self._wholes = _Templates((r.whole, (r, 0)) for r in self.rules)

    def of_part(self, name: str) -> Found | None:
        """The rule in which a name is one of the parts."""
        return self._found(self._parts, name)

    def of_whole(self, name: str) -> Found | None:
        """The rule in which a name is the whole."""
        return self._found(self._wholes, name)

    @staticmethod
    def _found(templates: _Templates, name: str) -> Found | None:
        hit = templates.match(name)
        if hit is None:
            return None
        (rule, part), numbers = hit
        parts = tuple(filled(p, numbers) for p in rule.parts)
        return Found(parts, filled(rule.whole, numbers), part, rule)


class _Templates:
    """Templates by the name with every number blurred, so that one lookup finds the few."""

    def __init__(self, entries: Iterable[tuple[str, tuple[Rule, int]]]) -> None:
        self._exact: dict[str, tuple[Rule, int]] = {}
        self._blurred: dict[str, list[tuple[str, tuple[Rule, int]]]] = {}
        for template, entry in entries:
            if "{" in template:
                key = _blur(_NUMBER.sub("0", template))
                self._blurred.setdefault(key, []).append((template, entry))
            else:
                self._exact.setdefault(template, entry)

    def match(self, name: str) -> tuple[tuple[Rule, int], dict[str, str]] | None:
        if name in self._exact:
            return self._exact[name], {}
        for template, entry in self._blurred.get(_blur(name), ()):
            found = pattern(template).fullmatch(name)
            if found:
                return entry, {k[1:]: v for k, v in found.groupdict().items()}
        return None


def _blur(name: str) -> str:
    return ".".join("#" if piece.isdigit() else piece for piece in name.split("."))


def asked(find: Callable[[str], Found | None], key: str) -> tuple[Found, str] | None:
    """The rule for a whole key, or else for its module, and what the rule leaves to be added."""
    found = find(key)
    if found is not None:
        return found, ""
    module, dot, parameter = key.rpartition(".")
    found = find(module)
    return None if found is None else (found, dot + parameter)


@lru_cache(maxsize=4096)
def pattern(template: str, separator: str = ".") -> re.Pattern[str]:
    """A template as an expression without repetition; with "_" as separator, for mangled names."""
    text, seen = "", set[str]()
    for i, piece in enumerate(_NUMBER.split(template.replace(".", separator))):
        if i % 2 == 0:
            text += re.escape(piece)
        elif piece in seen:
            text += f"(?P=_{piece})"
        else:
            seen.add(piece)
            text += rf"(?P<_{piece}>[0-9]{{1,5}})"
    return re.compile(text)


def filled(template: str, numbers: dict[str, str]) -> str:
    """A template with its numbers put in."""
    return _NUMBER.sub(lambda found: numbers[found[1]], template)


def renames(pairs: Sequence[str], *, first: str = "", second: str = "") -> Iterator[Rule]:
    """Rules of one part each from lines "old new", with a prefix put before either side."""
    for line in pairs:
        old, new = line.split()
        yield Rule((first + old,), second + new)


def table(text: str, *, first: str = "", second: str = "") -> tuple[Rule, ...]:
    """Rules from lines "part whole order=... sizes=...", with a prefix put before either side.

    `to_[q,k,v]` stands for three parts; a name that stands alone is the same on both sides.
    """
    rules = []
    for words in map(str.split, filter(str.strip, text.splitlines())):
        names = [word for word in words if "=" not in word]
        said = dict(word.split("=") for word in words if "=" in word)
        head, _, rest = names[0].partition("[")
        middle, _, tail = rest.partition("]")
        parts = tuple(f"{first}{head}{each}{tail}" for each in middle.split(","))
        rules.append(
            Rule(parts, second + names[-1], said.get("order", ""), said.get("sizes", "equal"))
        )
    return tuple(rules)
