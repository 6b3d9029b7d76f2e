"""An adapter made ready for a format and published with its receipt, whichever command asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools import formats, receipt, views
from loratools.adapter import Adapter, Experts, Kind, Leaf, LowRank, Made, Renormed, leaves
from loratools.commands.inspect import as_json, human, pair
from loratools.commands.lowering import lowered_for, reasons, said_of
from loratools.containers.bundle import local
from loratools.errors import Problem, error, shown
from loratools.experts import apart, arranged
from loratools.fitting import addresses, makes_images, merged
from loratools.formats import gguf_writing
from loratools.names import gguf
from loratools.names.heads import Facts, config_of, facts_from
from loratools.rewriting import additive
from loratools.runtime import distinct
from loratools.translating import IMAGE, translate
from loratools.views import all_zero, later
from loratools.weights.scaled import is_companion

if TYPE_CHECKING:
    from loratools.weights.base import Base

# What a config says of the base and stays true in any format, and what single writers need of it.
KEPT = ("base_model_name_or_path",)
NEEDED = {
    "peft": ("revision",),
    "gguf": ("base_config", "gguf_architecture"),
    "torchtune": ("base_config",),
    "litgpt": ("base_config",),
    "onnx_adapter": ("onnx_names",),
}
# Formats that know models of language alone.
LANGUAGE_ONLY = frozenset({"gguf", "mlx", "torchtune", "litgpt", "adapterhub"})

# Metadata that speaks of a file in its own format, and of the bytes of its tensors.
OF_ITS_FORMAT = ("format", "lora_adapter_metadata")
ONNX_VERSIONS = ("adapter_version", "model_version")
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


@dataclass(frozen=True, slots=True)
class Ready:
    """An adapter as a format can hold it, what that costs, and what was done to it in words."""

    adapter: Adapter
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    def will_be_cut(self, problem: Problem) -> bool:
        """Whether what a format cannot hold is an update that a rank will make factors of."""
        delta = self.adapter.deltas.get(problem.target or "")
        return problem.code == "loss" and isinstance(delta, Made) and len(delta.shape) > 1


def format_named(to: str) -> str:
    """A writable format's own name; UsageError with the list of them."""
    name = formats.ALIASES.get(to, to)
    if name not in formats.WRITERS:
        what = "can be read, not written" if name in formats.NAMES else "is no format"
        known = ", ".join(formats.WRITERS)
        raise error("usage", f"--to {shown(to)} {what}; this version writes {known}")
    return name


def shared_format(adapters: Sequence[Adapter], out: str | Path | None = None) -> str:
    """The format that all adapters share, where it can be written; else peft.

    Where `out` is named as a file and they share none, the first of theirs that is such a file.
    """
    names = [formats.ALIASES.get(a.format, a.format) for a in adapters]
    if len(set(names)) == 1 and names[0] in formats.WRITERS:
        return names[0]
    suffix = Path(out).suffix.lower() if out is not None else ""
    fitting = (n for n in names if n in formats.WRITERS and suffix == formats.WRITERS[n].SUFFIX)
    return next(fitting, "peft")


def ready_for(adapter: Adapter, to: str, base: Base | None = None) -> Ready:
    """The adapter in the names and with the config that a format needs.

    What has no name there, and what the format cannot hold, is a problem each (`loss`), and is
    left out where that is allowed.
    """
    if adapter.runtime is not None:
        from loratools.commands.twins import ready

        return ready(adapter, to, base)
    form = formats.WRITERS[to]
    if formats.ALIASES.get(adapter.format, adapter.format) == to:
        return Ready(adapter, tuple(form.lost(adapter)))
    if to in LANGUAGE_ONLY and (adapter.vocabulary in IMAGE or makes_images(adapter)):
        raise error(
            "loss",
            f"{shown(adapter.name)} is of a model that makes images, and {to} holds adapters of "
            "language models only; peft, kohya and diffusers hold it",
        )
    known, shapes = facts_from(adapter.config), dict[str, tuple[int, ...]]()
    said = dict(adapter.config)
    if base is not None:
        known = merged(facts_from(base.config), known)
        said |= {"base_config": dict(base.config)}
        if base.id and not said.get("base_model_name_or_path"):
            said["base_model_name_or_path"] = base.id
        shapes = _shapes(base, form.VOCABULARY)
    elif config_of(known):
        said["base_config"] = config_of(known)
    arch = gguf.architecture_of(known.model_type)
    if arch is not None:
        said.setdefault("gguf_architecture", arch)
    config = {k: said[k] for k in (*KEPT, *NEEDED.get(to, ())) if said.get(k) is not None}
    found = translate(
        _stacked_for(adapter, to, known),
        form.VOCABULARY,
        facts=known,
        shapes=shapes,
        alike=views.same,
    )
    found.adapter = _as_the_base_has_them(found.adapter, to, base)
    lost = [
        Problem("loss", f"{shown(key)}: {to} has no name for it", "error", adapter.name, key)
        for key in found.unknown
    ]
    deltas = {k: d for k, d in found.adapter.deltas.items() if k not in set(found.unknown)}
    own = found.adapter.problems[len(adapter.problems) :]
    deltas, empty = _without_fillers(deltas)
    deltas = _as_wide_as(adapter, deltas)
    if adapter.vocabulary != form.VOCABULARY:
        deltas = {k: _trimmed(d) for k, d in deltas.items()}
    new = replace(
        found.adapter,
        deltas=deltas,
        transposed=found.adapter.transposed & deltas.keys(),
        config=config,
        metadata=_carried(adapter),
        format=to,
        problems=adapter.problems,
        original={},
    )
    plain = lowered_for(new, form.lost, shapes)
    new = replace(plain, deltas=_as_wide_as(adapter, dict(plain.deltas)))
    unsaid = reasons(new, form.lost(new))
    return Ready(new, (*own, *lost, *unsaid), (*_notes(adapter, new), *empty))


def _stacked_for(adapter: Adapter, to: str, facts: Facts) -> Adapter:
    """Experts in the stacks that MLX and GGUF have; other vocabularies are of stacks already."""
    in_stacks = to in ("mlx", "gguf") and adapter.vocabulary == "hf"
    return apart(adapter, to, facts) if in_stacks else adapter


def _as_the_base_has_them(adapter: Adapter, to: str, base: Base | None) -> Adapter:
    """Experts of a format that has them in stacks of its own as those of the base, for PEFT."""
    keys = [key for key, delta in adapter.deltas.items() if isinstance(delta, Experts)]
    if to != "peft" or not keys:
        return adapter
    if base is not None:
        return arranged(adapter, base.tensors, base.config)
    message = f"{shown(keys[0])}: how its experts are called and lie depends on the base (--base)"
    problem = Problem("needs_base", message, "error", adapter.name, keys[0])
    return replace(adapter, problems=(*adapter.problems, problem))


def _carried(adapter: Adapter) -> dict[str, str]:
    """What a file's metadata, and GGUF's key-values, say that is true in another format too."""
    unsaid = {k for k in ONNX_VERSIONS if adapter.metadata.get(k) == "0"}
    values = adapter.config.get("gguf") if adapter.format == "gguf" else None
    found = {k: v for k, v in values.items() if isinstance(v, str)} if values else {}
    said = {k: v for k, v in found.items() if gguf_writing.DESCRIBES.fullmatch(k)}
    said |= adapter.metadata
    return {k: v for k, v in said.items() if k not in (*OF_ITS_FORMAT, *unsaid)}


def _without_fillers(deltas: Mapping[str, Kind]) -> tuple[dict[str, Kind], tuple[str, ...]]:
    """The deltas without pairs of zeros, which formats have for layers that were left alone.

    Only those go that no training leaves: both factors zero, or no row of B in a part of a fused
    weight. A pair that was not trained yet (A random, B zero) stays.
    """
    empty = {key for key, delta in deltas.items() if _is_filler(delta)}
    if not empty or len(empty) == len(deltas):
        return dict(deltas), ()
    first = shown(min(empty))
    note = f"{len(empty)} pairs of zeros left out, which change nothing, {first} first"
    return {k: d for k, d in deltas.items() if k not in empty}, (note,)


def _as_wide_as(adapter: Adapter, deltas: dict[str, Kind]) -> dict[str, Kind]:
    """What a rewrite computed in float64 as float32, unless the adapter itself has float64."""
    from loratools.algebra import map_leaves

    stored = (leaf for delta in adapter.deltas.values() for leaf in leaves(delta))
    if any(leaf.dtype == "F64" and leaf.made is None for leaf in stored):
        return deltas

    def narrowed(leaf: Leaf) -> Leaf:
        if leaf.dtype != "F64" or leaf.made is None:
            return leaf
        return later(leaf.name, "F32", leaf.shape, lambda: leaf.tensor().float())

    return {key: map_leaves(delta, narrowed) for key, delta in deltas.items()}


def _is_filler(delta: Kind) -> bool:
    if not isinstance(delta, LowRank):
        return False
    cut = delta.b.source is None
    return all_zero(delta.b) and (cut or all_zero(delta.a))


def _shapes(base: Base, vocabulary: str) -> dict[str, tuple[int, ...]]:
    if vocabulary not in IMAGE:
        return {name: leaf.shape for name, leaf in base.tensors.items()}
    return {
        a: base.tensors[n].shape
        for a, n in addresses(n for n in base.tensors if not is_companion(n)).items()
    }


def _trimmed(delta: Kind) -> Kind:
    """A pair without the ranks that change nothing: a part cut out of a fused, block-wise weight
    has columns of zeros in B where the other parts have theirs.
    """
    match delta:
        case Renormed(delta=LowRank() as inner):
            return replace(delta, delta=additive(_trimmed(inner)))
        case LowRank(a=a, b=b) if delta.rank > 1 and b.source is None:
            import torch

            up = b.tensor()
            used = up.reshape(b.shape[0], -1).ne(0).any(0)
            if bool(used.all()):
                return delta
            keep = (
                used.nonzero().view(-1) if bool(used.any()) else torch.zeros(1, dtype=torch.int64)
            )
            down = a.tensor().index_select(0, keep)
            shorter = Leaf.of(a.name, down), Leaf.of(b.name, up.index_select(1, keep))
            alpha = None if delta.alpha is None else delta.scaling * len(keep)
            return LowRank(*shorter, delta.scaling, alpha)
        case _:
            return delta


def _notes(old: Adapter, new: Adapter) -> tuple[str, ...]:
    """What the way took: other names, fused weights of a larger rank."""
    said = []
    if old.vocabulary != new.vocabulary:
        said.append(f"names: {old.vocabulary} -> {new.vocabulary}")
    before, after = (
        sorted({p.rank for d in a.deltas.values() if (p := pair(d)) is not None})
        for a in (old, new)
    )
    if before and after and max(after) > max(before):
        said.append(f"fused weights, exact: rank {max(before)} -> {max(after)}")
    return (*said, *said_of(old, new))


# ------------------------------------------------------------------------------- publishing


@dataclass(frozen=True, slots=True)
class Published:
    """What an adapter's output is: said in one line, its bytes."""

    makes: str
    nbytes: int


def publish_adapter(
    adapter: Adapter,
    to: str,
    recipe: Mapping[str, Any],
    *,
    out: Path | None,
    inputs: Sequence[Path],
    force: bool,
    hash: str,
    verb: str,
    count: int,
    waived: Sequence[Problem],
    truncation: Mapping[str, Any] | None = None,
) -> Published:
    """Write an adapter with its receipt, whole or not at all; without `out` only say what it is."""
    from loratools.weights.publishing import publish

    form = formats.WRITERS[to]
    ranks = [d.rank for d in adapter.deltas.values() if isinstance(d, LowRank)]
    nbytes = sum(leaf.nbytes for leaf in _leaves(adapter))
    span = "no low-rank pairs" if adapter.runtime is None else adapter.runtime.method
    if ranks:
        span = f"rank {min(ranks)}" + (f"-{max(ranks)}" if max(ranks) > min(ranks) else "")
    what = "adapter" if count == 1 else "adapters"
    kind = "adapter" if to == "peft" else f"{to} adapter"
    makes = f"{verb}: {count} {what} -> {kind}, {span}, {human(nbytes)}"
    if out is None:
        return Published(makes, nbytes)
    as_file = writes_file(out, to)
    with publish(
        out, as_file=as_file, inputs=inputs, force=force, needed=nbytes + 1_000_000
    ) as output:
        made = replace(adapter, metadata=_still_true(adapter))
        place = output.folder / out.name if as_file else output.folder
        written = form.write(made, place)
        if waived and adapter.deltas and not form.read(local(place), assume={}).deltas:
            raise error("no_effect", f"nothing of {shown(adapter.name)} has a place in {to}")
        receipt.write(
            output.folder,
            makes=makes,
            recipe=recipe,
            device="cpu",
            files=[p.name for p in output.folder.iterdir()],
            hash=hash,
            known=written,
            name=f"{out.name}.{receipt.NAME}" if as_file else receipt.NAME,
            truncation=dict(truncation or {}),
            waived=[as_json(p) for p in waived],
        )
    return Published(makes, nbytes)


def _still_true(adapter: Adapter) -> dict[str, str]:
    """The metadata less hashes of tensors, which lie otherwise now, and ranks that none has."""
    pairs = [p for d in adapter.deltas.values() if (p := pair(d)) is not None]
    has = {
        "ss_network_dim": {str(p.rank) for p in pairs},
        "ss_network_alpha": {f"{p.scaling * p.rank:.8g}" for p in pairs},
    }
    kept = {k: v for k, v in adapter.metadata.items() if k not in HASHES}
    for key, values in has.items():
        try:
            said = f"{float(kept.get(key, '')):.8g}"
        except ValueError:
            continue  # "Dynamic", or nothing
        if said not in values:
            del kept[key]
    return kept


def writes_file(out: Path, to: str) -> bool:
    """Whether an output is one file; UsageError where the format and the suffix disagree."""
    suffix, given = formats.WRITERS[to].SUFFIX, out.suffix.lower()
    if suffix is None:
        from loratools.weights.placing import WEIGHTS

        if given in WEIGHTS:
            article = "an" if to[0] in "aeiou" else "a"
            raise error(
                "usage",
                f"-o {shown(out)}: {article} {to.upper() if to == 'peft' else to} adapter is a "
                "folder; leave the suffix out",
            )
        return False
    if given != suffix:
        raise error("usage", f"-o {shown(out)}: {to} is one file; name it {shown(out)}{suffix}")
    return True


def _leaves(adapter: Adapter) -> list[Leaf]:
    some = [leaf for delta in adapter.deltas.values() for leaf in leaves(delta)]
    return some + (distinct(adapter.runtime.tensors) if adapter.runtime is not None else [])
