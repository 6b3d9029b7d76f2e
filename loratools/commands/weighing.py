"""Weights of adapters: one number for all of an adapter, or numbers for its parts and blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools import receipt
from loratools.adapter import Adapter, Kind
from loratools.commands.judging import matches
from loratools.errors import error, shown
from loratools.names import blocks

LBW = "lbw"  # the part that is a list of block weights
REST = "*"
ENTRIES = 1000  # parts of one adapter, at most: more is no sentence of a person


@dataclass(slots=True)
class Parts:
    """The weights of one adapter's parts, and which targets they were asked for."""

    weights: Mapping[str, float]  # by group word or glob; the first that names a target counts
    numbers: tuple[float, ...] = ()  # of blocks, as in `names/blocks.py`
    _blocks: Mapping[str, float] = field(init=False)
    _order: list[str] = field(init=False)
    _used: set[str] = field(default_factory=set)
    _unnamed: list[str] = field(default_factory=list)
    _unlisted: dict[str, str] = field(default_factory=dict)  # block → one of its targets

    def __post_init__(self) -> None:
        self._blocks = blocks.weighted(self.numbers) if self.numbers else {}
        # A word for all text encoders gives way to one of them, and all to the rest's.
        self._order = sorted(self.weights, key=lambda part: (part == REST, part == "text_encoder"))

    def __call__(self, *names: str) -> float:
        """The weight of the target that has these names; 0 where its block is left out."""
        part = next((p for p in self._order if any(matches(p, n) for n in names)), None)
        if part is None and self.weights:
            self._unnamed.append(names[0])
            return 1.0
        weight = 1.0
        if part is not None:
            self._used.add(part)
            weight = self.weights[part]
        found = blocks.block(names, self._blocks) if self._blocks else None
        if found is not None and found in self._blocks:
            self._used.add(LBW)
            weight *= self._blocks[found]
        elif found is not None:
            self._unlisted.setdefault(found, names[0])
        return weight

    def __str__(self) -> str:
        """The parts as they are typed, which `weight` reads again; their order counts."""
        said = [f"{part}={_short(weight)}" for part, weight in self.weights.items()]
        if self.numbers:
            said.append(f"{LBW}={','.join(map(_short, self.numbers))}")
        return ";".join(said)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The blocks of weight 0, by name."""
        return tuple(name for name, weight in self._blocks.items() if weight == 0)

    def require_used(self, adapter: str) -> None:
        """UsageError for a part that names no target of the adapter, and for unnamed targets."""
        wanted = [*(p for p in self.weights if p != REST), *([LBW] if self.numbers else [])]
        unused = next((part for part in wanted if part not in self._used), None)
        if self._unnamed:
            more = len(self._unnamed) - 1
            them = shown(self._unnamed[0]) + (f" and {more} more targets" if more else "")
            message = (
                f"weights {shown(str(self))}: no part names {them} of {shown(adapter)}; "
                f'"{REST}=1" is the weight of the rest, --skip leaves it out'
            )
            raise error("usage", message)
        for block, target in self._unlisted.items():
            longer = ", ".join(str(n) for n, names in blocks.LISTS.items() if block in names)
            other = f"; lists of {longer} have one" if longer else ""
            raise error(
                "usage",
                f"{LBW} of {len(self.numbers)} numbers has none for {block}, to which "
                f"{shown(target)} belongs: kohya would keep it, A1111 leave it out{other}",
            )
        if unused is not None:
            what = "names no block" if unused == LBW else "names no target"
            many = len(self.numbers) if unused == LBW else 0
            what += f" with these {many} numbers" if many else ""
            raise error(
                "usage",
                f"weights {shown(str(self))}: {shown(unused)} {what} of {shown(adapter)} that no "
                "other part has",
            )


Weight = float | Parts
Given = float | str | Mapping[str, Any]  # a weight as a caller may say it


def weight(given: Given | Parts) -> Weight:
    """One adapter's weight from a number, `unet=0.8;text_encoder=0.4` or the same as a mapping.

    UsageError for zero, NaN, infinity, and what is no weight; zeros are numbers of blocks only.
    """
    if isinstance(given, Parts):
        return Parts(given.weights, given.numbers)
    if isinstance(given, str) and "=" in given:
        given = _table(given)
    if not isinstance(given, Mapping):
        return _number(given, given)
    table = dict(given)
    said = shown(str(given) if len(str(given)) < 200 else f"{str(given)[:200]}...")
    if not table or len(table) > ENTRIES or not all(isinstance(k, str) and k for k in table):
        raise error("usage", f"weights {said}: expected parts such as unet=0.8;text_encoder=0.4")
    numbers = table.pop(LBW, ())
    listed = numbers.split(",") if isinstance(numbers, str) else numbers
    if not isinstance(listed, list | tuple):
        raise error("usage", f"weights {said}: {LBW} is a list of numbers")
    blockwise = tuple(_number(n, given, zero=True) for n in listed)
    if LBW in given and len(blockwise) not in blocks.LISTS:
        known = ", ".join(map(str, blocks.LISTS))
        message = f"{LBW} has {len(blockwise)} numbers; lists of block weights have {known}"
        raise error("usage", message)
    if blockwise and not any(blockwise):
        raise error("usage", f"{LBW} has zeros only: nothing of the adapter would be left")
    return Parts({part: _number(w, part) for part, w in table.items()}, blockwise)


def _table(text: str) -> dict[str, str]:
    table: dict[str, str] = {}
    for piece in filter(None, (p.strip() for p in text.split(";"))):
        part, sign, number = (each.strip() for each in piece.partition("="))
        if not sign or not part:
            message = f"weights {shown(text)}: expected PART=NUMBER between semicolons"
            raise error("usage", f"{message}, not {shown(piece)}")
        if part in table:
            raise error("usage", f"weights {shown(text)}: {shown(part)} stands there twice")
        table[part] = number
    return table


def _short(number: float) -> str:
    return repr(number).removesuffix(".0")


def _number(value: object, where: object, *, zero: bool = False) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, str | float | int):
            raise ValueError
        found = float(value)
    except (ValueError, OverflowError):
        what = "a finite number" if zero else "any finite number but 0"
        raise error("usage", f"weight {shown(str(value)[:200])}: expected {what}") from None
    if (found == 0 and not zero) or found - found != 0:
        of = f" of {shown(where)}" if isinstance(where, str) and where != value else ""
        leaves = "; --skip leaves a part out" if of else ""
        message = f"weight {found:g}{of}: expected any finite number but 0{leaves}"
        raise error("usage", message)
    return found


def weights_for(
    adapters: Sequence[str],
    weights: Sequence[Given | Parts] | Mapping[str, Any] | str | None,
    *,
    required: bool,
) -> tuple[list[str], list[Weight]]:
    """Paths and weights: from `PATH:0.7`, a list, or "mean"; one adapter alone counts once.

    A weight is a number or parts (`weight`). UsageError where several adapters come without,
    where counts differ, or for 0, NaN, infinity.
    """
    paths, inline = [], []
    for text in adapters:
        path, number = _inline(text)
        paths.append(path)
        inline.append(number)
    if isinstance(weights, Mapping) or (isinstance(weights, str) and "=" in weights):
        weights = [weights]
    found: list[Given | Parts]
    if any(w is not None for w in inline):
        if weights is not None:
            raise error("usage", "weights stand behind a path and in --weights: give them once")
        if any(w is None for w in inline):
            lacking = paths[[w is None for w in inline].index(True)]
            raise error("usage", f"{shown(lacking)} has no weight, others have one")
        found = [w for w in inline if w is not None]
    elif weights == "mean":
        found = [1 / len(paths)] * len(paths)
    elif weights is None or isinstance(weights, str):
        if len(paths) > 1 and required:
            n = len(paths)
            ones, mean = ",".join(["1"] * n), ",".join([f"{1 / n:.3g}"] * n)
            raise error(
                "usage",
                f"{n} adapters need weights: -w {ones} adds them up, -w mean ({mean}) averages",
            )
        found = [1.0] * len(paths)
    else:
        found = list(weights)
    if len(found) != len(paths):
        raise error("usage", f"{len(found)} weights for {len(paths)} adapters")
    return paths, [weight(w) for w in found]


def _inline(text: str) -> tuple[str, float | None]:
    if Path(text).exists():  # an existing path wins
        return text, None
    match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", text, re.DOTALL)
    return (match[1], float(match[2])) if match else (text, None)


def inputs(adapters: Sequence[Adapter], weights: Sequence[Weight]) -> list[dict[str, Any]]:
    """What a receipt says of adapters with their weights; blocks left out are named."""
    return [
        receipt.adapter_entry(a, str(w), w.left_out)
        if isinstance(w, Parts)
        else receipt.adapter_entry(a, w)
        for a, w in zip(adapters, weights, strict=True)
    ]


def sums(
    adapters: Sequence[Adapter], weights: Sequence[Weight], keys: Sequence[str]
) -> dict[str, list[tuple[float, Kind]]]:
    """Weighted terms by target, without those of blocks that are left out.

    UsageError for a part that names nothing, and what no part names.
    """
    found: dict[str, list[tuple[float, Kind]]] = {}
    for key in keys:
        for adapter, each in zip(adapters, weights, strict=True):
            if key not in adapter.deltas:
                continue
            number = each(key) if isinstance(each, Parts) else each
            if number:
                found.setdefault(key, []).append((number, adapter.deltas[key]))
    require_used(weights, [a.name for a in adapters])
    return found


def plain(weights: Sequence[Weight], what: str) -> list[float]:
    """Weights that are numbers; UsageError where one is of parts, which `what` does not have."""
    for each in weights:
        if isinstance(each, Parts):
            raise error("usage", f"weights {shown(str(each))}: {what} have no parts")
    return [w for w in weights if not isinstance(w, Parts)]


def require_used(weights: Sequence[Weight], adapters: Sequence[str]) -> None:
    """UsageError where a part named nothing, after all targets were asked for."""
    for each, name in zip(weights, adapters, strict=True):
        if isinstance(each, Parts):
            each.require_used(name)


def said(weights: Sequence[Weight]) -> tuple[list[float | str], tuple[str, ...]]:
    """Weights as a result has them, and notes of the blocks that they leave out."""
    parts = [w for w in weights if isinstance(w, Parts)]
    notes = [f"blocks left out: {', '.join(p.left_out)}" for p in parts if p.left_out]
    return [str(w) if isinstance(w, Parts) else w for w in weights], tuple(notes)
