"""`check`: every problem of fitting adapters to a base, from headers, or from numbers too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.bind import bind
from loratools.commands import runtimes, sources
from loratools.commands.inspect import as_json
from loratools.commands.judging import Choice, assumptions, judge
from loratools.commands.readers import Reader, findings
from loratools.commands.weighing import Weight, require_used
from loratools.errors import LoratoolsError, Problem, error
from loratools.plan import Plan, Ties
from loratools.weights.base import Base

# Problems that only a fold has.
FOLD_ONLY = ("not_foldable", "residual_base")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """All problems together; `ok` when none of them is an error."""

    ok: bool
    matched: int | None  # None without a base
    total: int
    problems: tuple[Problem, ...]
    waived: tuple[Problem, ...]
    plan: Plan | None
    reader: str | None = None  # what `for_` asked about
    line: str | None = None  # to paste: loads the adapters there, or makes them acceptable first

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints; its keys never change."""
        return {
            "ok": self.ok,
            "matched": self.matched,
            "total": self.total,
            "problems": [as_json(p) for p in self.problems],
            "waived": [as_json(p) for p in self.waived],
            "prefixes": [str(p) for p in self.plan.prefixes if p] if self.plan else [],
            "reader": self.reader,
            "line": self.line,
        }


def check(
    adapters: Sequence[str | Path | Adapter],
    base: str | Path | Base | None = None,
    *,
    data: bool = False,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    tied: bool = False,
    untie: bool = False,
    allow: Sequence[str] = (),
    fail_on: Sequence[str] = (),
    assume: Sequence[str] = (),
    for_: str | None = None,
    reference: str | Path | None = None,
) -> CheckResult:
    """Find every problem of fitting `adapters` to `base` at once, without reading a weight.

    With `data` the adapters' numbers are read too (NaN, infinity, untrained factors), and a sample
    of the base's rows (`large_update`). With `for_`, a reader such as "vllm@0.11" (READERS), what
    that program refuses, ignores or misreads is found too, and `line` says how to load them there
    (specs/readers.md). With `reference`, the model that `base`, a graph, was exported from, its
    weights are found and confirmed by their content. Nothing is raised for a problem found: see
    `ok`; malformed files raise MalformedError, missing ones NotFoundError.
    """
    reader = Reader.of(for_) if for_ is not None else None
    loaded = load_all(adapters, assume, whole=data or reader is not None)
    base = sources.base(base, loaded) if isinstance(base, str | Path) else base
    if reference is not None:
        base, _ = referred(base, reference)
    plan, problems = fit(
        loaded, base, weights=None, only=only, skip=skip, ties=ties_from(tied, untie)
    )
    fits = [runtimes.against(a, base) for a in loaded if a.runtime is not None and base is not None]
    if fits:  # that it cannot be folded is no problem of fitting it
        problems = runtimes.unfolded(problems, loaded) + [p for f in fits for p in f.problems]
    if data:
        from loratools.commands.numbers import adapter_numbers, sampled

        problems += adapter_numbers(loaded)
        if plan is not None and not any(p.severity == "error" for p in problems):
            problems += sampled(plan).problems
    heard = findings(reader, loaded, base.config if base else None) if reader else None
    problems += heard.problems if heard else ()
    judged = judge(problems, allow, fail_on)
    over = base.name if base else None
    return CheckResult(
        ok=not any(p.severity == "error" for p in judged.problems),
        matched=sum(plan.matched) + sum(f.matched for f in fits) if plan else None,
        total=(sum(plan.total) if plan else sum(len(a.deltas) for a in loaded))
        + sum(f.total for f in fits),
        problems=judged.problems,
        waived=judged.waived,
        plan=plan,
        reader=str(reader) if reader else None,
        line=heard.line(judged.problems, loaded, over) if heard else None,
    )


def referred(base: Base | None, reference: str | Path) -> tuple[Base, dict[str, Any]]:
    """A graph with its weights found in the model it was exported from, and that as an input."""
    from loratools import receipt
    from loratools.exporting.graph_reference import confirmed

    if base is None:
        raise error("usage", "--reference says what a graph was exported from: name it by --base")
    over = sources.here(base)
    model = sources.here(sources.base(reference))
    return confirmed(over, model), receipt.base_entry(model)


def ties_from(tied: bool, untie: bool) -> Ties | None:
    """`--tied` and `--untie` as one value; both together are a usage error."""
    if tied and untie:
        raise error("usage", "--tied and --untie exclude each other")
    return "tied" if tied else "untied" if untie else None


def load_all(
    adapters: Sequence[str | Path | Adapter], assume: Sequence[str], *, whole: bool = True
) -> list[Adapter]:
    """Adapters from their sources (or as they are, in memory); without `whole` headers suffice."""
    given = assumptions(assume, len(adapters))
    return [
        a if isinstance(a, Adapter) else sources.adapter(a, g, whole=whole)
        for a, g in zip(adapters, given, strict=True)
    ]


def fit(
    adapters: Sequence[Adapter],
    base: str | Path | Base | None,
    *,
    weights: Sequence[Weight] | None,
    only: Sequence[str],
    skip: Sequence[str],
    ties: Ties | None,
) -> tuple[Plan | None, list[Problem]]:
    """The plan over a base with its problems; without a base, the adapters' own problems."""
    choice = Choice(tuple(only), tuple(skip))
    if base is None:
        names = [key for a in adapters for key in a.deltas]
        choice.require_used(names)
        own = [p for a in adapters for p in a.problems if p.code not in FOLD_ONLY]
        return None, own
    over = base if isinstance(base, Base) else sources.base(base, adapters)
    seen: list[str] = []

    def chosen(*names: str) -> bool:
        seen.extend(names)
        return choice(*names)

    plan = bind(adapters, over, weights=weights, chosen=chosen, ties=ties)
    choice.require_used(seen)
    require_used(weights or (), [a.name for a in adapters][: len(weights or ())])
    from loratools.receipt import merged_before

    problems = [*plan.problems, *merged_before(over, adapters)]
    if over.graph is not None and not any(p.severity == "error" for p in problems):
        from loratools.exporting.into_graph import laid_out

        try:
            laid_out(plan, {})
        except LoratoolsError as cause:
            problems.append(Problem(cause.code, cause.message))
    return plan, problems
