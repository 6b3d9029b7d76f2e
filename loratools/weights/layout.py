"""Where every byte of an output model goes, planned from headers: shards, headers, runs to copy."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from loratools.adapter import DTYPE_BITS, FLOATS, Leaf, Source
from loratools.containers import safetensors
from loratools.containers.strict_json import loads
from loratools.errors import error, shown
from loratools.weights.base import INDEX_LIMIT, Base, Shard
from loratools.weights.scaled import described, unread, unscaled

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of an output shard: its place, and the base tensor that it comes from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    base: Leaf | None

    @property
    def nbytes(self) -> int:
        n = 1
        for extent in self.shape:
            n *= extent
        return (n * DTYPE_BITS[self.dtype] + 7) // 8


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One file to write: its header and its tensors in file order.

    The file holds the pieces' names without `prefix`, which is that of a pipeline's component.
    With `whole` it is a copy of that file, and the pieces say what is in it.
    """

    name: str
    header: bytes
    size: int
    pieces: tuple[Piece, ...]
    prefix: str = ""
    whole: Source | None = None


def plan_shards(
    base: Base,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    new: Mapping[str, Leaf | None] | None = None,
    dtype: str | None = None,
    dtypes: Mapping[str, str] | None = None,
    rename: Callable[[str], str] = lambda name: name,
) -> tuple[OutputShard, ...]:
    """The output's files in the base's own layout: same shards, same order, same metadata.

    The header stays as it is, byte by byte, where nothing in it changes.
    `shapes` are the output shapes of weights that change; `new` are weights the base does not
    store (with the leaf they start from, if any), which go to the end of the last shard. `dtype`
    is given to every floating tensor, and scales of fp8 weights go; None keeps each tensor's own,
    and new ones take the base's commonest, but for `dtypes` (counts and masks of a head). A torch
    file of a pipeline's component that nothing changes is copied whole. Raises `duplicate`.
    """
    added = dict(new or {})
    changed = {shard.prefix for shard in base.shards if dtype or shapes.keys() & shard.leaves}
    common = common_dtype(base)
    shards = []
    for number, shard in enumerate(base.shards):
        if shard.prefix and shard.prefix not in changed and not shard.digest:
            shards.append(_copied(base, shard))
            continue
        rows: list[safetensors.Described] = []
        origin: dict[str, Leaf | None] = {}
        gone = unscaled(shard.leaves) if dtype else set[str]()
        odd = unread(shard.leaves) if dtype else None
        if odd is not None:
            message = f"{shown(odd)}: numbers and their scale, of which {dtype} cannot be made"
            raise error("quantised_base", f"{message}; without --dtype they stay as they are")
        for name, leaf in shard.leaves.items():
            if name in gone:
                continue
            kept = dtype if dtype and leaf.dtype in FLOATS else leaf.dtype
            rows.append((rename(name), kept, shapes.get(name, leaf.shape)))
            origin[rename(name)] = leaf
        here = added if number == len(base.shards) - 1 else {}
        for name, leaf_or_none in here.items():
            kept = dtype or (leaf_or_none.dtype if leaf_or_none else common)
            rows.append((name, (dtypes or {}).get(name, kept), shapes[name]))
            origin[name] = leaf_or_none
        header = _header(base, shard) if _same(rows, origin) else None
        if header is not None:
            offsets = {name: leaf.offset for name, leaf in shard.leaves.items()}
        else:
            if dtype or here or not all(r[2] == o.shape for r in rows if (o := origin[r[0]])):
                rows = safetensors.aligned(rows)
            stored = [(name.removeprefix(shard.prefix), d, r) for name, d, r in rows]
            metadata = _metadata(base, shard)
            if dtype:
                metadata = described(metadata, shard.leaves)
            header, offsets = safetensors.plan_layout(stored, metadata)
            offsets = {shard.prefix + name: at for name, at in offsets.items()}
        pieces = tuple(Piece(n, d, r, offsets[n], origin[n]) for n, d, r in rows)
        size = max((p.offset + p.nbytes for p in pieces), default=len(header))
        shards.append(OutputShard(output_name(shard.name), header, size, pieces, shard.prefix))
    for name, count in Counter(s.name for s in shards).items():
        if count > 1:
            raise error("duplicate", f"{count} shards of the base would become {shown(name)}")
    return tuple(shards)


def _copied(base: Base, shard: Shard) -> OutputShard:
    component, _, file = shard.name.partition("/")
    source = base.bundle.inner(component).open(file)
    pieces = tuple(Piece(n, x.dtype, x.shape, x.offset, x) for n, x in shard.leaves.items())
    return OutputShard(shard.name, b"", source.size, pieces, shard.prefix, source)


def _metadata(base: Base, shard: Shard) -> dict[str, str]:
    """A shard's own metadata; transformers reads no file that does not say its format."""
    return dict(shard.metadata) if base.is_image else {"format": "pt", **shard.metadata}


def _same(rows: Iterable[safetensors.Described], origin: Mapping[str, Leaf | None]) -> bool:
    """Whether all tensors stay what they are, under their own names."""
    return all(
        (leaf := origin[name]) is not None
        and (leaf.name, leaf.dtype, leaf.shape) == (name, dtype, shape)
        for name, dtype, shape in rows
    )


def _header(base: Base, shard: Shard) -> bytes | None:
    """The bytes before a shard's data as they stand, if they can stand so in the output."""
    first = min(shard.leaves.values(), key=lambda leaf: leaf.offset, default=None)
    if first is None or first.source is None or not shard.digest:
        return None
    if _metadata(base, shard) != shard.metadata:
        return None
    return first.source.read(0, first.offset)


def common_dtype(base: Base) -> str:
    """The floating dtype that most of the base's bytes have."""
    sizes: dict[str, int] = {}
    for leaf in base.tensors.values():
        if leaf.dtype in FLOATS:
            sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + leaf.nbytes
    return max(sizes, key=lambda d: sizes[d], default="F32")


def output_name(name: str) -> str:
    """The file name of an output shard: torch shards become safetensors of the same number."""
    if name.endswith(".safetensors"):
        return name
    stem = re.sub(r"\.(bin|pt|pth|ckpt)$", "", name)
    front, slash, last = stem.rpartition("/")
    if last.startswith("pytorch_model"):
        last = last.removeprefix("pytorch_")
    return f"{front}{slash}{last}.safetensors"


def index_files(base: Base, shards: Iterable[OutputShard]) -> dict[str, bytes]:
    """The index of every folder whose weights need one, by its path in the output."""
    folders: dict[str, list[OutputShard]] = {}
    for shard in shards:
        folders.setdefault(str(PurePosixPath(shard.name).parent), []).append(shard)
    found = {}
    for folder, here in folders.items():
        own = base.indexes.get(folder)
        if own is None and len(here) == 1:
            continue
        name, made = own or INDEX, index_json(here)
        if own is not None and (kept := _kept_index(base, folder, here, made)) is not None:
            made = kept
        else:
            name = re.sub(r"^pytorch_(?=model\.bin)", "", name).replace(".bin.", ".safetensors.")
        found[name if folder == "." else f"{folder}/{name}"] = made
    return found


def _kept_index(
    base: Base, folder: str, shards: Sequence[OutputShard], made: bytes
) -> bytes | None:
    """A component's index as it stands, if the output's tensors are still where it says."""
    own = base.indexes[folder]
    kept = base.bundle.inner(folder).read(own, INDEX_LIMIT)
    if all(shard.whole is not None for shard in shards):
        return kept
    said, true = loads(kept, own, limit=INDEX_LIMIT), json.loads(made)
    total = said.get("metadata")
    total = total.get("total_size") if isinstance(total, dict) else None
    same = said["weight_map"] == true["weight_map"]
    return kept if same and total in (None, true["metadata"]["total_size"]) else None


def index_json(shards: Iterable[OutputShard]) -> bytes:
    """model.safetensors.index.json for the shards of one folder."""
    where = {
        p.name.removeprefix(s.prefix): PurePosixPath(s.name).name for s in shards for p in s.pieces
    }
    total = sum(p.nbytes for s in shards for p in s.pieces)
    table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(table, indent=2) + "\n").encode()


def runs(
    pieces: Iterable[Piece], untouched: Callable[[Piece], bool]
) -> list[tuple[Leaf, int, int]]:
    """Untouched tensors as (first leaf, output offset, length), neighbours joined into one copy."""
    found: list[tuple[Leaf, int, int]] = []
    for piece in pieces:
        if not untouched(piece) or piece.base is None or not piece.nbytes:
            continue
        leaf = piece.base
        if found:
            first, offset, length = found[-1]
            follows = first.offset + length == leaf.offset and offset + length == piece.offset
            if follows and first.source is leaf.source:
                found[-1] = (first, offset, length + piece.nbytes)
                continue
        found.append((leaf, piece.offset, piece.nbytes))
    return found
