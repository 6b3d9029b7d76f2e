"""`merge`: several adapters into one, or adapters folded into a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from loratools import formats
from loratools.adapter import FLOATS, Adapter, Kind, Leaf, Original
from loratools.commands import runtimes, sources, weighing
from loratools.commands.check import fit, load_all, referred, ties_from
from loratools.commands.inspect import as_json
from loratools.commands.judging import judge, known
from loratools.commands.parents import child_of, common_config
from loratools.commands.weighing import Given, Weight, weights_for
from loratools.commands.writing import (
    format_named,
    publish_adapter,
    ready_for,
    shared_format,
)
from loratools.errors import Problem, error, shown

DTYPES = {
    "fp32": "F32", "float32": "F32", "f32": "F32", "fp16": "F16", "float16": "F16", "f16": "F16",
    "half": "F16", "bf16": "BF16", "bfloat16": "BF16", "fp64": "F64", "float64": "F64",
}  # fmt: skip

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class MergeResult:
    """What a merge or fold made, or (`dry_run`) would make."""

    makes: str
    output: Path | None
    targets: int
    total: int
    method: str
    weights: list[float | str]  # a number each, or parts as they are typed
    truncation_error: float | None
    update_kept: float | None
    seconds: float
    nbytes: int
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    groups: list[dict[str, Any]] = field(default_factory=list)
    continued: tuple[str, ...] = ()
    dry_run: bool = False
    weaker: bool = False
    device: str = "cpu"
    adapter: Adapter | None = None

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints; its keys never change."""
        return {
            "makes": self.makes,
            "output": None if self.output is None else str(self.output),
            "targets": self.targets,
            "total": self.total,
            "method": self.method,
            "weights": self.weights,
            "truncation_error": self.truncation_error,
            "update_kept": self.update_kept,
            "seconds": round(self.seconds, 3),
            "bytes": self.nbytes,
            "problems": [as_json(p) for p in self.problems],
            "notes": list(self.notes),
            "groups": self.groups,
            "continued": list(self.continued),
            "dry_run": self.dry_run,
            "device": self.device,
        }


def merge(
    adapters: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    out: str | Path | None = None,
    to: str | None = None,
    weights: Sequence[Given] | Mapping[str, Any] | str | None = None,
    method: str = "linear",
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    tied: bool = False,
    untie: bool = False,
    allow: Sequence[str] = (),
    fail_on: Sequence[str] = (),
    min_kept: float | None = None,
    assume: Sequence[str] = (),
    tokenizer: str | None = None,
    force: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    threads: int | None = None,
    hash: str = "auto",
    recipe: str | Path | None = None,
    reference: str | Path | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge adapters into one at `out`, or with `base` fold them into it.

    `to` is the merged adapter's format: by default the one that all inputs share, else peft.
    With `recipe`, a receipt, its output is made again: all that says how comes from there, and
    `adapters` and `base` only say where its inputs may lie. `reference` is the model that a base
    which is a graph was exported from: its weights are found and confirmed by their content.

    `weights` are used as given; None means 1 for a single adapter and is refused for several;
    "mean" is 1/n each; one may be of parts: "unet=0.8;text_encoder=0.4", or a mapping. `rank` (a
    ceiling) or `energy` (share of squared singular values) truncate the merged update optimally.
    Raises the errors of `loratools.errors`; nothing is written before every check has passed, and
    `out` appears whole or not at all.
    """
    began = perf_counter()
    if out is None and not dry_run:
        raise error("usage", "merge needs an output (-o OUT)")
    if recipe is not None:
        if weights is not None or rank or energy or dtype or only or skip or allow:
            raise error("usage", "--recipe says how: leave weights, rank, dtype and choice out")
        from loratools.commands.again import recipe_arguments

        said = recipe_arguments(recipe, adapters, base)
        return merge(
            **said, out=out, force=force, restart=restart, dry_run=dry_run, device=device,
            threads=threads, hash=hash, progress=progress,
        )  # fmt: skip
    if not adapters:
        raise error("usage", "merge needs adapters; see `loratools merge --help`")
    asked = method
    method, rank = checked_method(method, rank, energy)
    to = format_named(to) if to else None
    paths, factors = weights_for([str(a) for a in adapters], weights, required=True)
    if base is None and len(paths) == 1 and weights is None and rank is None and energy is None:
        place = out or "OUT"
        raise error(
            "usage",
            f"one adapter alone changes nothing; did you mean\n"
            f"  loratools merge {paths[0]} --base BASE -o {place}     (fold it into a model)\n"
            f"  loratools convert {paths[0]} --rank N -o {place}      (reduce its rank)",
        )
    kind = dtype_name(dtype)
    loaded = load_all(paths, assume)
    over = None if base is None else sources.base(base, loaded)
    if reference is not None:
        over, confirmed_by = referred(over, reference)
    ties = ties_from(tied, untie)
    fitted = partial(fit, loaded, weights=factors, only=only, skip=skip, ties=ties)
    plan, problems = fitted(over)
    if over is not None and sources.is_remote(over.bundle) and not dry_run:
        judge(problems, known(allow, problems), fail_on).require()  # before anything is fetched
        plan, problems = fitted(sources.here(over, progress))
    made_from: dict[str, Any] = {
        "adapters": weighing.inputs(loaded, factors),
        "method": method,
        "rank": rank,
        "energy": energy,
        "dtype": kind,
        "only": list(only),
        "skip": list(skip),
        "ties": ties,
        "allow": list(allow),
        "tokenizer": tokenizer,
    }
    if reference is not None:
        made_from["reference"] = confirmed_by
    from loratools.commands.numbers import adapter_numbers

    if runtimes.is_runtime(loaded):
        made_from["method"] = method = asked
        if plan is not None and not plan.targets:
            judge(problems, (), fail_on).require()  # nothing would change: no --allow helps
    problems += adapter_numbers(loaded)
    if plan is not None and to is not None:
        raise error("usage", f"--to {shown(to)}: with --base the output is a model; leave --to out")
    if plan is not None:
        from loratools.commands.folded import fold

        result = fold(
            plan, problems, made_from, out=None if out is None else Path(out), allow=allow,
            fail_on=fail_on, min_kept=min_kept, force=force, restart=restart, dry_run=dry_run,
            device=device, threads=threads, hash=hash, progress=progress,
        )  # fmt: skip
    else:
        # What the files of one without deltas lack is to be said first.
        if any(not a.deltas and a.runtime is None for a in loaded):
            judge(problems, allow, fail_on).require()
        made_from["to"] = to = to or shared_format(loaded, out)
        aligned = [ready_for(a, to) for a in loaded]
        problems += [p for one in aligned for p in one.problems]
        judged = judge(problems, allow, fail_on)
        judged.require()
        merged = merge_adapters(
            [one.adapter for one in aligned], factors, rank=rank, energy=energy,
            method=method, dtype=kind, only=only, skip=skip,
        )  # fmt: skip
        if merged.adapter.runtime is None:  # a sum may be of a kind that none of its terms was
            heard = {p.target for one in aligned for p in one.problems}
            unsaid = [p for p in formats.WRITERS[to].lost(merged.adapter) if p.target not in heard]
            judge(unsaid, allow, fail_on).require()
        merged = replace(merged, adapter=child_of(merged.adapter, loaded, to, out))
        result = save_merged(
            merged,
            to,
            made_from,
            judged.problems,
            judged.waived,
            out=Path(out) if out is not None and not dry_run else None,
            inputs=sources.places(paths),
            force=force,
            hash=hash,
            count=len(loaded),
        )
        words = [note for one in aligned for note in one.notes] + runtimes.notes(loaded, asked)
        result.notes = tuple(dict.fromkeys(words))
        result.dry_run = dry_run
    result.weights, notes = weighing.said(factors)
    result.notes += notes
    result.seconds = perf_counter() - began
    return result


def checked_method(method: str, rank: int | None, energy: float | None) -> tuple[str, int | None]:
    """The method's own name; `cat` and `svd` are linear without and with a rank."""
    from loratools.merging import METHODS

    if rank is not None and rank < 1:
        raise error("usage", f"--rank {rank}: expected 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise error("usage", f"--energy {energy:g}: expected a share above 0, at most 1")
    if method == "cat":
        if rank is not None or energy is not None:
            raise error("usage", "--method cat keeps all ranks; with --rank the method is svd")
        return "linear", None
    if method == "svd":
        if rank is None and energy is None:
            raise error("usage", "--method svd needs --rank N or --energy E")
        return "linear", rank
    if method not in METHODS:
        known = ", ".join([*METHODS, "cat", "svd"])
        raise error("usage", f"--method {shown(method)}: known methods are {known}")
    return method, rank


def dtype_name(dtype: str | None) -> str | None:
    """The safetensors name of `--dtype`'s spellings (torch's too)."""
    if dtype is None:
        return None
    name = DTYPES.get(dtype.removeprefix("torch.").lower())
    if name is None:
        raise error("usage", f"--dtype {shown(dtype)}: expected fp32, fp16 or bf16")
    return name


# ------------------------------------------------------------------------------- in memory


@dataclass(frozen=True, slots=True)
class Summed:
    """A merged adapter, and the squared norms that its truncation error is made of."""

    adapter: Adapter
    residual: float
    total: float
    by_target: dict[str, float]

    @property
    def truncation_error(self) -> float | None:
        """sqrt(Σ‖residual‖² / Σ‖ΔW‖²); None where nothing was truncated."""
        return (self.residual / self.total) ** 0.5 if self.total else None


def merge_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    *,
    method: str = "linear",
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Summed:
    """The weighted merge of adapters in memory; one that lacks a target counts as zero there.

    Factors are float32 unless `dtype` says otherwise; one adapter of weight 1 keeps its own.
    Raises FitError `needs_base` where the sum depends on W0.
    """
    from loratools.commands.judging import Choice
    from loratools.desk import one_thread
    from loratools.merging import METHODS

    if runtimes.is_runtime(adapters):
        runtimes.refuse_choice(rank, energy, only, skip)
        one = runtimes.merged(
            adapters,
            weighing.plain(weights, "virtual tokens and prefixes"),
            method=method,
            dtype=dtype,
        )
        return Summed(one, 0.0, 0.0, {})
    choice = Choice(tuple(only), tuple(skip))
    keys = list(dict.fromkeys(k for a in adapters for k in a.deltas if choice(k)))
    sums = weighing.sums(adapters, weights, keys)
    if not sums:
        raise error("no_effect", "no target is left to merge")
    deltas: dict[str, Kind] = {}
    residual = total = 0.0
    errors: dict[str, float] = {}
    with one_thread():
        for key, terms in sums.items():
            summed = METHODS[method](terms, rank=rank, energy=energy)
            alone = len(terms) == 1 and terms[0][0] == 1 and rank is None and energy is None
            deltas[key] = summed.delta if alone and not dtype else rounded(
                summed.delta, dtype or "F32"
            )  # fmt: skip
            residual, total = residual + summed.residual, total + summed.total
            if summed.total:
                errors[key] = (summed.residual / summed.total) ** 0.5
    first = adapters[0]
    config = first.config if len(adapters) == 1 else common_config(adapters)
    same = len(adapters) == 1 and weights[0] == 1 and rank is None and energy is None
    same = same and len(deltas) == len(first.deltas)
    stored = {k: _as_dtype(v, dtype) for k, v in first.original.items()} if same else {}
    original = Original(stored, deltas) if stored else {}
    merged = replace(
        first,
        deltas=deltas,
        original=original,
        config=config,
        metadata=first.metadata if len(adapters) == 1 else {},
        name=first.name if len(adapters) == 1 else "merged",
        folder=None,
        origin=None,
        files=(),
        transposed=frozenset().union(*(a.transposed for a in adapters)),
        problems=(),
    )
    return Summed(merged, residual, total, errors)


def rounded(delta: Kind, dtype: str) -> Kind:
    """A delta with its tensors in a storage dtype, rounded once; `overflow` if one does not fit."""
    from loratools.algebra import map_leaves

    return map_leaves(delta, lambda leaf: _as_dtype(leaf, dtype))


def _as_dtype(leaf: Leaf, dtype: str | None) -> Leaf:
    """A tensor of floats rounded to a storage dtype; others, and without a dtype, as they are."""
    if dtype is None or leaf.dtype not in FLOATS:
        return leaf
    from loratools.algebra import held, widen
    from loratools.folding import torch_dtype
    from loratools.narrowing import narrow, not_finite

    wide = widen(leaf)
    out = narrow(wide, torch_dtype(dtype))
    if not_finite(out) > not_finite(wide):
        raise error("overflow", f"{shown(leaf.name)} does not fit {dtype}; try --dtype fp32")
    return held(out, leaf.name)


def save_merged(
    summed: Summed,
    to: str,
    recipe: dict[str, Any],
    problems: Sequence[Problem],
    waived: Sequence[Problem],
    *,
    out: Path | None,
    inputs: Sequence[Path],
    force: bool,
    hash: str,
    count: int,
    verb: str = "merge",
) -> MergeResult:
    """Publish a merged adapter with its receipt, and say what was made."""
    adapter = summed.adapter
    published = publish_adapter(
        adapter,
        to,
        recipe,
        out=out,
        inputs=inputs,
        force=force,
        hash=hash,
        verb=verb,
        count=count,
        waived=waived,
        truncation={
            "error": summed.truncation_error,
            "by_target": {k: float(f"{v:.6g}") for k, v in summed.by_target.items()},
        },
    )
    return MergeResult(
        makes=published.makes,
        output=out,
        targets=len(adapter.deltas),
        total=len(adapter.deltas),
        method=recipe.get("method", "linear"),
        weights=[],
        truncation_error=summed.truncation_error,
        update_kept=None,
        seconds=0.0,
        nbytes=published.nbytes,
        problems=tuple(problems),
        adapter=adapter,
    )
