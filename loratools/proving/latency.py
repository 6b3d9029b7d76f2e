"""How long graphs take beside each other, in one run: minima, their spread, ratios.

Sessions are opened one at a time and in turn: six that live together take each other's threads,
and medians of a busy machine are up to ten times the minimum (LoRA, arXiv 2106.09685, Table 1,
asks the same of adapters on a GPU).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.errors import error, shown
from loratools.exporting.runtime import session


@dataclass(frozen=True, slots=True)
class Timed:
    """A graph to be timed, with the pack that is active, if one is."""

    path: Path
    adapter: Path | None = None
    bind: bool = False  # inputs and outputs bound, as on a GPU


@dataclass(frozen=True, slots=True)
class Latency:
    """One graph's seconds for one call: the least of all rounds, and the least of each round."""

    name: str
    seconds: float
    rounds: tuple[float, ...]
    ratio: float  # to the first of the table

    @property
    def spread(self) -> float:
        """By how much the median of the rounds' minima lies above the least of them."""
        return statistics.median(self.rounds) / self.seconds - 1

    def as_json(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "spread": self.spread, "ratio": self.ratio}


Feeds = Mapping[str, Any]


def measure(
    graphs: Mapping[str, Path | Timed],
    feeds: Feeds | Mapping[str, Feeds],
    rounds: int = 5,
    *,
    calls: int = 20,
    providers: Sequence[str] | None = None,
    threads: int | None = 1,
) -> tuple[Latency, ...]:
    """Time graphs in turn, `rounds` times over, `calls` each; ratios are to the first.

    `feeds` are one for all graphs or by name. The order turns from round to round, so that none is
    always the first on a machine that warms up.
    """
    if not graphs or rounds < 1 or calls < 1:
        raise error("usage", "measure needs a graph, a round and a call")
    some = {n: g if isinstance(g, Timed) else Timed(Path(g)) for n, g in graphs.items()}
    given = {name: _feeds(feeds, name, graphs) for name in graphs}
    found: dict[str, list[float]] = {name: [] for name in some}
    names = list(some)
    for number in range(rounds):
        at = number % len(names)
        for name in [*names[at:], *names[:at]]:
            found[name].append(_least(some[name], given[name], calls, providers, threads))
    first = min(found[names[0]])
    return tuple(
        Latency(name, min(times), tuple(times), min(times) / first) for name, times in found.items()
    )


def _feeds(feeds: Mapping[str, Any], name: str, graphs: Mapping[str, object]) -> Feeds:
    nested = [value for value in feeds.values() if isinstance(value, Mapping)]
    if not nested:
        return feeds
    if len(nested) < len(feeds) or name not in feeds:
        raise error("usage", f"feeds are by graph, and {shown(name)} has none")
    return feeds[name]  # type: ignore[no-any-return]


def _least(
    one: Timed, feeds: Feeds, calls: int, providers: Sequence[str] | None, threads: int | None
) -> float:
    """The least seconds of some calls on a session that is opened for them and closed again."""
    opened = session(one.path, providers=providers, threads=threads)
    known = {name: value for name, value in feeds.items() if name in opened.inputs}
    work: Callable[[], object]
    if one.bind:
        work = lambda: opened.bound(known, adapter=one.adapter)  # noqa: E731
    else:
        work = lambda: opened.run(known, adapter=one.adapter)  # noqa: E731
    for _ in range(2):  # its memory is laid out by the first
        work()
    least = float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
    return least


def table(found: Sequence[Latency]) -> list[str]:
    """Lines to print: name, milliseconds, spread, ratio."""
    width = max(len(row.name) for row in found)
    return [
        f"{row.name:<{width}}  {row.seconds * 1e3:9.3f} ms  +{row.spread:.0%}  x{row.ratio:.2f}"
        for row in found
    ]
