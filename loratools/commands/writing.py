"""An adapter made ready for a format and published with its receipt, whichever command asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools import formats, receipt
from loratools.adapter import Adapter, Kind, Leaf, LowRank, Renormed, leaves
from loratools.commands.inspect import as_json, human, pair
from loratools.errors import Problem, error, shown
from loratools.fitting import addresses, merged
from loratools.names import gguf
from loratools.names.heads import facts_from
from loratools.rewriting import additive, same_place
from loratools.translating import IMAGE, translate

if TYPE_CHECKING:
    from loratools.weights.base import Base

# What a config says of the base and stays true in any format.
KEPT = (
    "base_model_name_or_path", "revision", "base_config", "gguf", "gguf_architecture", "onnx_names"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ready:
    """An adapter as a format can hold it, what that costs, and what was done to it in words."""

    adapter: Adapter
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def format_named(to: str) -> str:
    """A writable format's own name; UsageError with the list of them."""
    name = formats.ALIASES.get(to, to)
    if name not in formats.WRITERS:
        what = "can be read, not written" if name in formats.NAMES else "is no format"
        known = ", ".join(formats.WRITERS)
        raise error("usage", f"--to {shown(to)} {what}; this version writes {known}")
    return name


def shared_format(adapters: Sequence[Adapter]) -> str:
    """The format that all adapters share, where it can be written; else peft."""
    names = {formats.ALIASES.get(a.format, a.format) for a in adapters}
    only = names.pop() if len(names) == 1 else "peft"
    return only if only in formats.WRITERS else "peft"


def ready_for(adapter: Adapter, to: str, base: Base | None = None) -> Ready:
    """The adapter in the names and with the config that a format needs.

    What has no name there, and what the format cannot hold, is a problem each (`loss`), and is
    left out where that is allowed.
    """
    form = formats.WRITERS[to]
    if formats.ALIASES.get(adapter.format, adapter.format) == to:
        return Ready(adapter, tuple(form.lost(adapter)))
    known, shapes = facts_from(adapter.config), dict[str, tuple[int, ...]]()
    config = {key: adapter.config[key] for key in KEPT if key in adapter.config}
    if base is not None:
        known = merged(facts_from(base.config), known)
        config |= {"base_config": dict(base.config)}
        config.setdefault("base_model_name_or_path", base.id)
        shapes = _shapes(base, form.VOCABULARY)
    arch = gguf.architecture_of(known.model_type)
    if arch is not None:
        config.setdefault("gguf_architecture", arch)
    found = translate(adapter, form.VOCABULARY, facts=known, shapes=shapes, alike=_same_bytes)
    lost = [
        Problem("loss", f"{shown(key)}: {to} has no name for it", "error", adapter.name, key)
        for key in found.unknown
    ]
    deltas = {k: d for k, d in found.adapter.deltas.items() if k not in set(found.unknown)}
    own = found.adapter.problems[len(adapter.problems) :]
    if adapter.vocabulary != form.VOCABULARY:
        deltas = {k: _trimmed(d) for k, d in deltas.items()}
    new = replace(found.adapter, deltas=deltas, config=config, format=to, problems=adapter.problems)
    return Ready(new, (*own, *lost, *form.lost(new)), _notes(adapter, new))


def _shapes(base: Base, vocabulary: str) -> dict[str, tuple[int, ...]]:
    if vocabulary not in IMAGE:
        return {name: leaf.shape for name, leaf in base.tensors.items()}
    return {a: base.tensors[n].shape for a, n in addresses(base.tensors).items()}


def _same_bytes(one: Leaf, other: Leaf) -> bool:
    """Whether two leaves hold the same numbers, wherever they lie."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return same_place(one, other) or one.read() == other.read()


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
    return tuple(said)


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
    span = "no low-rank pairs"
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
        written = form.write(adapter, output.folder / out.name if as_file else output.folder)
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
    return [leaf for delta in adapter.deltas.values() for leaf in leaves(delta)]
