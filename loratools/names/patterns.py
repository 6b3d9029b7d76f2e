"""PEFT's patterns of module names, matched as `re` would in time linear in pattern times name."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar, assert_never

from loratools.errors import error, shown

LIMIT = 10_000  # states of one pattern, after {m,n} is written out
DEPTH = 100  # groups within groups

T = TypeVar("T")
Test = Callable[[str], bool]  # of one character

_BOUNDS = re.compile(r"\{([0-9]*)(?:(,)([0-9]*))?\}")


# What a pattern says. No node is empty except `_EMPTY` itself, so that writing out a repeat
# makes a state with every step and `LIMIT` bounds the work too.


@dataclass(frozen=True, slots=True)
class _Char:
    test: Test


@dataclass(frozen=True, slots=True)
class _At:
    where: str  # one of ^ $ b


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    options: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    part: _Node
    least: int
    most: int | None


_Node = _Char | _At | _Sequence | _Choice | _Repeat
_EMPTY = _Sequence(())


def _is_word(c: str) -> bool:
    return c.isalnum() or c == "_"


_CLASSES: dict[str, Test] = {
    "w": _is_word,
    "d": str.isdecimal,
    "s": str.isspace,
    "W": lambda c: not _is_word(c),
    "D": lambda c: not c.isdecimal(),
    "S": lambda c: not c.isspace(),
}


class _Parser:
    """Reads the text of one pattern from left to right, as CPython's `re._parser` does."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.atoms = 0
        self.depth = 0

    def refuse(self, what: str) -> NoReturn:
        raise error(
            "unknown_config",
            f'pattern "{shown(self.text)}": {what} at character {self.at} is not understood; '
            "replace it by the module names",
        )

    def take(self, token: str) -> bool:
        found = self.text.startswith(token, self.at)
        self.at += len(token) * found
        return found

    def next(self) -> str:
        if self.at == len(self.text):
            self.refuse("the end")
        self.at += 1
        return self.text[self.at - 1]

    def whole(self) -> _Node:
        node = self.choice()
        if self.at < len(self.text):
            self.refuse("an unmatched )")
        return node

    def choice(self) -> _Node:
        options = [self.sequence()]
        while self.take("|"):
            options.append(self.sequence())
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def sequence(self) -> _Node:
        parts: list[_Node] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            part = self.repeated(self.atom())
            if part != _EMPTY:
                parts.append(part)
        return parts[0] if len(parts) == 1 else _Sequence(tuple(parts))

    def atom(self) -> _Node:
        self.atoms += 1
        if self.atoms > LIMIT:
            self.refuse(f"a pattern of more than {LIMIT} parts")
        if self.bounds() is not None:
            self.refuse("a repeat of nothing")
        match c := self.next():
            case "(":
                return self.group()
            case "[":
                return _Char(self.members())
            case "\\" if self.take("b"):
                return self.place("b")
            case "\\":
                meant = self.escape()
                return _Char(meant.__eq__ if isinstance(meant, str) else meant)
            case "^" | "$":
                return self.place(c)
            case ".":
                return _Char("\n".__ne__)
            case _:
                return _Char(c.__eq__)

    def place(self, where: str) -> _Node:
        if self.bounds() is not None:
            self.refuse("a repeat of a place")
        return _At(where)

    def group(self) -> _Node:
        if self.take("?P<"):
            end = self.text.find(">", self.at)
            if not self.text[self.at : end].isidentifier():
                self.refuse("the name of a group")
            self.at = end + 1
        elif not self.take("?:") and self.take("?"):
            self.refuse("(? (lookaround, flags or the like)")
        self.depth += 1
        if self.depth > DEPTH:
            self.refuse("so deep a group")
        node = self.choice()
        self.depth -= 1
        if not self.take(")"):
            self.refuse("a group that is not closed")
        return node

    def escape(self) -> str | Test:
        """What a backslash and the next character mean: a character or a class."""
        c = self.next()
        if c in _CLASSES:
            return _CLASSES[c]
        if c.isascii() and c.isalnum():
            self.refuse(f"\\{c}")
        return c

    def members(self) -> Test:
        """The rest of [...]: what stands for a character, not what stands for a class, may
        begin and end a range; a ] in the first place and a - in the last are themselves."""
        negated = self.take("^")
        singles: set[str] = set()
        ranges: list[tuple[str, str]] = []
        classes: list[Test] = []
        first = True
        while first or not self.take("]"):
            first = False
            low = self.member()
            if self.text.startswith("-", self.at) and not self.text.startswith("-]", self.at):
                self.at += 1
                high = self.member()
                if not (isinstance(low, str) and isinstance(high, str) and low <= high):
                    self.refuse("a range of characters")
                ranges.append((low, high))
            elif isinstance(low, str):
                singles.add(low)
            else:
                classes.append(low)

        def holds(c: str) -> bool:
            found = c in singles or any(low <= c <= high for low, high in ranges)
            return (found or any(test(c) for test in classes)) != negated

        return holds

    def member(self) -> str | Test:
        c = self.next()
        return self.escape() if c == "\\" else c

    def repeated(self, part: _Node) -> _Node:
        bounds = self.bounds()
        if bounds is None:
            return part
        self.take("?")  # lazy or greedy: whether a whole name matches is the same
        if self.bounds() is not None:
            self.refuse("a repeat of a repeat")
        return _EMPTY if part == _EMPTY or bounds[1] == 0 else _Repeat(part, *bounds)

    def bounds(self) -> tuple[int, int | None] | None:
        """The repeat that stands here, read; a { that opens none is an ordinary character."""
        for token, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(token):
                return bounds
        found = _BOUNDS.match(self.text, self.at)
        if found is None or found[0] == "{}":
            return None
        self.at = found.end()
        low, comma, high = found.groups("")
        if max(len(low), len(high)) > len(str(LIMIT)):
            self.refuse("so large a repeat")
        least = int(low or 0)
        most = least if not comma else int(high) if high else None
        if most is not None and most < least:
            self.refuse("a repeat whose bounds are reversed")
        return least, most


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression as a nondeterministic automaton (Thompson, CACM 11(6), 1968).

    State `i` passes one character that `tests[i]` accepts, or none where `tests[i]` is a place
    ("" is anywhere), on to each of `onward[i]`; state 0 is the end.
    """

    text: str
    start: int = field(repr=False)
    tests: tuple[Test | str, ...] = field(repr=False)
    onward: tuple[tuple[int, ...], ...] = field(repr=False)

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches, as `re.fullmatch` says."""
        return any(end == len(text) for end in self._ends(text))

    def match(self, text: str) -> bool:
        """Whether the text begins with a match, as `re.match` says."""
        return any(True for _ in self._ends(text))

    def _ends(self, text: str) -> Iterator[int]:
        states = {self.start}
        for at in range(len(text) + 1):
            self._reach(states, text, at)
            if 0 in states:
                yield at
            if not states or at == len(text):
                return
            passed = set()
            for state in states:
                test = self.tests[state]
                if not isinstance(test, str) and test(text[at]):
                    passed.add(self.onward[state][0])
            states = passed

    def _reach(self, states: set[int], text: str, at: int) -> None:
        """Adds to these states all that can be reached from them without a character."""
        new = list(states)
        while new:
            state = new.pop()
            test = self.tests[state]
            if isinstance(test, str) and _is_at(test, text, at):
                further = [target for target in self.onward[state] if target not in states]
                states.update(further)
                new += further


def _is_at(where: str, text: str, at: int) -> bool:
    match where:
        case "^":
            return at == 0
        case "$":  # also before a newline that ends the text
            return at == len(text) or (at == len(text) - 1 and text[at] == "\n")
        case "b":
            before = at > 0 and _is_word(text[at - 1])
            return before != (at < len(text) and _is_word(text[at]))
        case _:
            return True


@functools.lru_cache(maxsize=64)  # few, since a hostile one may take some megabytes
def compile_pattern(text: str) -> Pattern:
    r"""The pattern of a text in the subset of `re` that adapters use.

    Literals, escaped punctuation, `. \w \d \s \W \D \S`, classes, groups (named ones too),
    alternation, `* + ? {m} {m,} {m,n}` and their lazy forms, `^ $ \b`. Raises RefusedError
    (unknown_config) for all else, for what `re` refuses and beyond `LIMIT` states.
    """
    parser = _Parser(text)
    tree = parser.whole()
    tests: list[Test | str] = [""]
    onward: list[tuple[int, ...]] = [()]

    def add(test: Test | str, *targets: int) -> int:
        if len(tests) == LIMIT:
            parser.refuse(f"a pattern of more than {LIMIT} states")
        tests.append(test)
        onward.append(targets)
        return len(tests) - 1

    def build(node: _Node, out: int) -> int:
        match node:
            case _Char(test):
                return add(test, out)
            case _At(where):
                return add(where, out)
            case _Sequence(parts):
                for part in reversed(parts):
                    out = build(part, out)
                return out
            case _Choice(options):
                entry = build(options[-1], out)
                for option in reversed(options[:-1]):
                    entry = add("", build(option, out), entry)
                return entry
            case _Repeat(part, least, most):
                if most is None:
                    loop = add("")
                    onward[loop] = (build(part, loop), out)
                    out = loop
                else:
                    for _ in range(most - least):
                        out = add("", build(part, out), out)
                for _ in range(least):
                    out = build(part, out)
                return out
            case _:
                assert_never(node)

    start = build(tree, 0)
    return Pattern(text, start, tuple(tests), tuple(onward))


def peft_value(patterns: Mapping[str, T], module: str, default: T) -> tuple[T, str | None]:
    """A module's value of `rank_pattern` or `alpha_pattern`, and the key that gave it (or None).

    The first key in the mapping's order that matches the end of the path, from a dot on, wins;
    `module` is the path without `base_model.model.` (peft:utils/other.py `get_pattern_key`).
    Raises RefusedError where `compile_pattern` does.
    """
    for key, value in patterns.items():
        if _matches_end(key, module):
            return value, key
    # PEFT looks the path itself up where no key matches.
    return (patterns[module], module) if module in patterns else (default, None)


def _matches_end(key: str, module: str) -> bool:
    plain = _plain(key)
    if plain is None or "\n" in module:
        return compile_pattern(rf"(.*\.)?({key})$").match(module)
    whole, letters = plain
    cut = len(module) - len(letters)
    if cut < 0 or (cut and (whole or module[cut - 1] != ".")):
        return False
    return all(k in (".", c) or (k == DOT and c == ".")
               for k, c in zip(letters, module[cut:], strict=True))  # fmt: skip


DOT = "\0"  # where a pattern has an escaped dot


@functools.lru_cache(maxsize=4096)
def _plain(key: str) -> tuple[bool, str] | None:
    """Whether a key begins with `^`, and its characters; None where it is more of a pattern.

    Plain names are the rule and there may be thousands; their dots stand for any character.
    """
    letters = key.removeprefix("^").replace(r"\.", DOT)
    usual = DOT not in key and all(c in (".", DOT) or _is_word(c) for c in letters)
    return (key.startswith("^"), letters) if usual else None


def peft_targets(target_modules: str | Sequence[str], module: str) -> bool:
    """Whether `target_modules` names a module: a string is a pattern of the whole path, a list
    holds paths or their ends from a dot on (peft:tuners/tuners_utils.py
    `check_target_module_exists`). Raises RefusedError where `compile_pattern` does.
    """
    if isinstance(target_modules, str):
        return compile_pattern(target_modules).fullmatch(module)
    return any(module == name or module.endswith(f".{name}") for name in target_modules)
