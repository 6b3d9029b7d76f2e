"""`convert`: each adapter to an adapter of its own, in another format or at another rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from time import perf_counter
from typing import Any

from loratools import formats, receipt
from loratools.adapter import Adapter, Dense, Kind, Leaf, LowRank, Made, Replace, leaves
from loratools.commands import runtimes, sources
from loratools.commands.check import fit, load_all
from loratools.commands.inspect import as_json
from loratools.commands.judging import Choice, judge
from loratools.commands.lowering import said_of
from loratools.commands.merge import checked_method, dtype_name, merge_adapters, save_merged
from loratools.commands.upon_base import needs_base, plain_upon
from loratools.commands.writing import (
    Ready,
    format_named,
    ready_for,
    shared_format,
    writes_file,
)
from loratools.errors import Problem, error, shown
from loratools.rewriting import lowered


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What became of one adapter, and everything that its output lacks."""

    makes: str
    source: str
    output: Path
    lost: tuple[str, ...]
    targets: int
    truncation_error: float | None
    difference: float | None  # sqrt(Σ‖ΔW − ΔW'‖² / Σ‖ΔW‖²), ΔW' as written; None where not measured
    seconds: float
    nbytes: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    foldable: bool = True  # no runtime adapter

    @property
    def lossless(self) -> bool:
        """Whether the output says, number for number, what the source says."""
        return not self.lost

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints; its keys never change."""
        return {
            "makes": self.makes,
            "source": self.source,
            "output": str(self.output),
            "lossless": self.lossless,
            "lost": list(self.lost),
            "targets": self.targets,
            "truncation_error": self.truncation_error,
            "difference": self.difference,
            "seconds": round(self.seconds, 3),
            "bytes": self.nbytes,
            "problems": [as_json(p) for p in self.problems],
            "notes": list(self.notes),
        }


def convert(
    adapters: str | Path | Sequence[str | Path],
    *,
    to: str | None = None,
    out: str | Path,
    base: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    allow: Sequence[str] = (),
    fail_on: Sequence[str] = (),
    assume: Sequence[str] = (),
    force: bool = False,
    hash: str = "auto",
) -> list[ConvertResult]:
    """Write one adapter as `out`, or each of several into the folder `out` under its own name.

    `to` is the format, else what the inputs share, or peft; "bottleneck" is AdapterHub's with
    Compacters expanded. Without `rank`, `energy` and `dtype`
    every factor keeps its bytes where the format can hold them. `base` tells what names and rows
    depend on (heads, architecture); to peft, it makes any method that folds a plain LoRA, exactly
    or cut to `rank`, and its weights are read for that. Every problem of every adapter is raised
    before anything is written; each output appears whole or not at all.
    """
    plain = to == "bottleneck"  # AdapterHub's, a Compacter expanded
    to = format_named("adapterhub" if plain else to) if to else None
    _, rank = checked_method("linear", rank, energy)
    kind = dtype_name(dtype)
    paths = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    if not paths:
        raise error("usage", "convert needs an adapter")
    loaded = load_all(paths, assume)
    if plain:
        loaded = [runtimes.expanded(a) for a in loaded]
    if runtimes.is_runtime(loaded):
        runtimes.refuse_choice(rank, energy, only, skip)
    to = to or shared_format(loaded, out if len(loaded) == 1 else None)
    outputs = outputs_for(paths, Path(out), formats.WRITERS[to].SUFFIX or "")
    for output in outputs:
        writes_file(output, to)
    _, problems = fit(loaded, None, weights=None, only=only, skip=skip, ties=None)
    choice = Choice(tuple(only), tuple(skip))
    cut = rank is not None or energy is not None
    from loratools.commands.numbers import adapter_numbers

    # What the files of one without deltas lack is to be said first.
    if any(not a.deltas and a.runtime is None for a in loaded):
        judge(problems, allow, fail_on).require()
    over = None if base is None else sources.base(base, loaded)
    read = loaded
    if over is not None and to == "peft" and not runtimes.is_runtime(loaded):
        made = [plain_upon(a, over, cut=cut, chosen=choice) for a in loaded]
        loaded = [a for a, _ in made]
        problems += [p for _, found in made for p in found]
    problems += [p for a in loaded for p in needs_base(a, choice, cut=cut)]
    aligned = [ready_for(_chosen(a, choice, cut), to, over) for a in loaded]
    problems += [p for one in aligned for p in one.problems if not (cut and one.will_be_cut(p))]
    judged = judge([*problems, *adapter_numbers(loaded)], allow, fail_on)
    judged.require()
    recipe = {
        "to": to,
        "method": "linear",
        "rank": rank,
        "energy": energy,
        "dtype": kind,
        "only": list(only),
        "skip": list(skip),
        "allow": list(allow),
    }
    results = []
    for adapter, one, path, output in zip(read, aligned, paths, outputs, strict=True):
        began = perf_counter()
        found = [p for p in judged.problems if p.adapter in (None, adapter.name)]
        waived = [p for p in judged.waived if p.adapter in (None, adapter.name)]
        summed = merge_adapters([one.adapter], [1.0], rank=rank, energy=energy, dtype=kind)
        saved = save_merged(
            summed,
            to,
            {"adapters": [receipt.adapter_entry(adapter, 1.0)], **recipe},
            found,
            waived,
            out=output,
            inputs=sources.places(paths),
            force=force,
            hash=hash,
            count=1,
            verb="convert",
        )
        difference = difference_of(one.adapter, summed.adapter) if rank or energy or kind else None
        lost = _lost(adapter, len([k for k in adapter.deltas if choice(k)]), waived, difference)
        results.append(
            ConvertResult(
                makes=saved.makes,
                source=str(path),
                output=output,
                lost=tuple(lost),
                targets=saved.targets,
                truncation_error=saved.truncation_error,
                difference=difference,
                seconds=perf_counter() - began,
                nbytes=saved.nbytes,
                problems=tuple(found),
                notes=(*one.notes, *_made_plain(adapter, one), *_left_beside(adapter)),
                foldable=adapter.runtime is None,
            )
        )
    return results


def _made_plain(adapter: Adapter, one: Ready) -> list[str]:
    """What was made a plain LoRA upon the base, before it was made ready for its format."""
    return [note for note in said_of(adapter, one.adapter) if note not in one.notes]


def _chosen(adapter: Adapter, choice: Choice, cut: bool) -> Adapter:
    """The adapter's deltas that --only and --skip leave, by its own names.

    What is to be cut to another rank is no longer what its file holds (`original`).
    """
    if adapter.runtime is not None:
        return adapter
    if cut:
        adapter = replace(adapter, original={})
    deltas = {key: delta for key, delta in adapter.deltas.items() if choice(key)}
    if not deltas:
        raise error("no_effect", "no target is left to convert")
    return (
        adapter
        if len(deltas) == len(adapter.deltas)
        else replace(adapter, deltas=deltas, original={})
    )


def outputs_for(paths: Sequence[str | Path], out: Path, suffix: str = "") -> list[Path]:
    """Where each adapter goes: `out` for one, `out/NAME` (and the format's suffix) for several.

    UsageError where two sources have one name.
    """
    if len(paths) == 1:
        return [out]
    named: dict[str, str | Path] = {}
    for path in paths:
        name = sources.called(path)
        if name in named:
            raise error(
                "usage",
                f"{shown(named[name])} and {shown(path)} would both become {shown(out / name)}; "
                "convert them one by one",
            )
        named[name] = path
    return [out / f"{name}{suffix}" for name in named]


def difference_of(old: Adapter, new: Adapter) -> float | None:
    """sqrt(Σ‖ΔW − ΔW'‖² / Σ‖ΔW‖²) over the targets that both have; None where all are zero."""
    pairs = [(old.deltas[k], d) for k, d in new.deltas.items() if k in old.deltas]
    total = sum(_norm_squared(a) for a, _ in pairs)
    return (sum(_distance_squared(a, b) for a, b in pairs) / total) ** 0.5 if total else None


def _norm_squared(delta: Kind) -> float:
    from loratools.algebra import widen
    from loratools.truncating import singular_values

    if isinstance(delta, Made):
        delta = lowered(delta)
    if isinstance(delta, LowRank):
        return float(singular_values(delta).square().sum())
    if isinstance(delta, Dense):
        return delta.scaling**2 * float(widen(delta.diff).square().sum())
    if isinstance(delta, Replace) and delta.then is not None:  # upon a copy of the base's weight
        return _norm_squared(delta.then)
    return sum(float(widen(leaf).square().sum()) for leaf in leaves(delta))


def _distance_squared(old: Kind, new: Kind) -> float:
    from loratools.adapter import Additive
    from loratools.algebra import add, scaled, widen

    if old is new:
        return 0.0
    if isinstance(old, Replace) and isinstance(new, Replace) and old.then and new.then:
        values = _distance_squared(replace(old, then=None), replace(new, then=None))
        return values + _distance_squared(old.then, new.then)
    if isinstance(old, Additive) and isinstance(new, Additive):
        same = type(old) is type(new) and old.scaling == new.scaling
        if same and all(_equal(a, b) for a, b in zip_longest(leaves(old), leaves(new))):
            return 0.0
        return _norm_squared(add([old, scaled(new, -1.0)]))
    pairs = [(widen(a), widen(b)) for a, b in zip(leaves(old), leaves(new), strict=True)]
    return sum(float((a - b).square().sum()) for a, b in pairs)


def _equal(one: Leaf | None, other: Leaf | None) -> bool:
    from loratools.algebra import widen

    return one is not None and other is not None and widen(one).equal(widen(other))


def _lost(
    old: Adapter, chosen: int, waived: Sequence[Problem], difference: float | None
) -> list[str]:
    lost = [f"{p.code}: {p.message}" for p in waived]
    left = len(old.deltas) - chosen
    if left:
        lost.append(f"{left} of {len(old.deltas)} targets were left out")
    if difference:
        lost.append(f"the update differs by {100 * difference:.3g} % of its norm")
    return lost


def _left_beside(adapter: Adapter) -> tuple[str, ...]:
    """Files that lie beside the adapter and are no part of it: cards, tokenizers, states."""
    chosen = adapter.origin.inside.rpartition("/")[2] if adapter.origin else ""
    if adapter.folder is None or Path(adapter.name).is_file() or chosen in adapter.files:
        return ()
    here = sorted(p.name for p in adapter.folder.iterdir() if p.is_file())
    names = [n for n in here if n not in adapter.files and n != receipt.NAME]
    return (f"not copied: {', '.join(shown(n) for n in names)}",) if names else ()
