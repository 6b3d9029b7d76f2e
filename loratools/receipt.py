"""The receipt (loratools.json): what an output was made from, how, and its hashes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools._version import VERSION
from loratools.adapter import Adapter, Leaf, Origin, Source, leaves
from loratools.containers.bundle import Bundle, local
from loratools.containers.local import LocalFile
from loratools.containers.strict_json import loads
from loratools.errors import LoratoolsError, Problem, error, shown
from loratools.weights.base import Base

NAME = "loratools.json"
LIMIT = 100_000_000  # bytes of a receipt: one line of 200 bytes for each tensor of a large model
HASHES = {"full": True, "auto": None, "none": False}  # whole files; None: by their size
FULL_HASH = 1_000_000_000  # outputs up to this size get a whole-file sha256 by default
# What is passed on of an input's inputs.
ANCESTOR = (
    "role", "source", "id", "revision", "inside", "format", "weight", "fingerprint", "into",
)  # fmt: skip
ANCESTORS = 1000
SAMPLES = 16  # places of a shard that a base's fingerprint looks at
SAMPLE = 4096


def fingerprint(adapter: Adapter) -> str:
    """sha256 over an adapter's config and its weights file (its leaves, in memory)."""
    found = hashlib.sha256(json.dumps(adapter.config, sort_keys=True).encode())
    for delta_key in sorted(adapter.deltas):
        for leaf in leaves(adapter.deltas[delta_key]):
            whole = getattr(leaf.source, "fingerprint", None)  # of a file, here or on the Hub
            if whole is not None:
                found.update(whole().encode())
                return found.hexdigest()
            found.update(f"{delta_key} {leaf.dtype} {leaf.shape}".encode())
            found.update(leaf.read())
    return found.hexdigest()


def digest(leaf: Leaf, step: int = 8 << 20) -> str:
    """The sha256 of a stored tensor's bytes."""
    found = hashlib.sha256()
    assert leaf.source is not None
    for at in range(0, leaf.nbytes, step):
        found.update(leaf.source.read(leaf.offset + at, min(step, leaf.nbytes - at)))
    return found.hexdigest()


def base_fingerprint(base: Base) -> str:
    """sha256 over the shards' headers and sizes, and over samples of their bytes.

    It tells two bases of one shape apart without reading them whole; `verify` compares the rest.
    """
    found = hashlib.sha256()
    for shard in base.shards:
        source = base.bundle.open(shard.name)
        found.update(f"{shard.name} {source.size} {shard.digest}".encode())
        last = max(0, source.size - SAMPLE)
        for i in range(SAMPLES):
            at = last * i // (SAMPLES - 1)
            found.update(source.read(at, min(SAMPLE, source.size - at)))
    return found.hexdigest()


def named(source: str | Path) -> str:
    """A source as a receipt names it: as typed, but absolute paths by their last component."""
    path = Path(source)
    return path.name if path.is_absolute() else str(source)


def adapter_entry(
    adapter: Adapter, weight: float | str, left_out: Sequence[str] = ()
) -> dict[str, Any]:
    """One adapter as an input, with its weight or those of its parts, and blocks left out."""
    entry: dict[str, Any] = {
        "source": str(adapter.origin or named(adapter.name)),
        **on_hub(adapter.origin),
        "format": adapter.format,
        "weight": weight,
        "fingerprint": fingerprint(adapter),
    }
    if left_out:
        entry["left_out"] = list(left_out)
    if adapter.assumed:
        entry["assumed"] = dict(adapter.assumed)
    if adapter.folder is not None and adapter.files:
        folder = local(adapter.folder)
        beside = [replace(folder, chosen=adapter.files[0]), folder]
        entry |= _descent(beside, adapter.files[:1], entry["fingerprint"])
    return entry


def base_entry(base: Base) -> dict[str, Any]:
    """The base as an input."""
    origin = base.bundle.origin
    entry = {
        "source": str(origin or named(base.name)),
        "id": base.id,
        **on_hub(origin),
        "fingerprint": base_fingerprint(base),
        "shards": {
            s.name: {"size": base.bundle.open(s.name).size, "header": s.digest} for s in base.shards
        },
    }
    beside = [base.bundle, replace(base.bundle, chosen=None)]
    return entry | _descent(beside, [s.name for s in base.shards], str(entry["fingerprint"]))


def _descent(bundles: Sequence[Bundle], files: Sequence[str], fingerprint: str) -> dict[str, Any]:
    """What an input's own receipt says it was made from, and they from theirs: one flat list.

    It is asked only where its outputs are the files at hand; else the entry says why not.
    """
    try:
        for bundle in bundles:
            made = of(bundle)
            outputs = made.get("outputs") if made is not None else None
            if made is None or not isinstance(outputs, Mapping) or files[0] not in outputs:
                continue
            if not all(_is_output(bundle.open(file), outputs.get(file)) for file in files):
                return {"receipt": "of other bytes, not followed"}
            found = made_from(made, fingerprint)
            return {"ancestors": found} if found else {}
    except LoratoolsError as cause:
        return {"receipt": f"not followed: {cause.message}"}
    return {}


def _is_output(file: Source, said: Any) -> bool:
    if not isinstance(said, Mapping) or said.get("size") != file.size:
        return False
    whole, due = getattr(file, "fingerprint", None), said.get("sha256")
    return whole is None or due is None or file.size > FULL_HASH or whole() == due


def made_from(receipt: Receipt, into: str | None = None) -> list[dict[str, Any]]:
    """All that went into an output: its inputs and their ancestors, each once.

    Each has its `role` in the recipe, and in `into` the fingerprint of what was made from it.
    """
    recipe = receipt.get("recipe")
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for key, value in recipe.items() if isinstance(recipe, Mapping) else ():
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, Mapping) or "fingerprint" not in entry:
                continue  # no input
            older = entry.get("ancestors")
            one = {"role": str(key).removesuffix("s"), **entry, "into": into}
            for each in (one, *(older if isinstance(older, list) else ())):
                if isinstance(each, Mapping):
                    kept = {
                        k: each[k] for k in ANCESTOR if isinstance(each.get(k), str | int | float)
                    }
                    mark = tuple(str(kept.get(k)) for k in ("source", "fingerprint", "into"))
                    found.setdefault(mark, kept)
            if len(found) > ANCESTORS:
                raise error("malformed", f"{shown(receipt.path)}: over {ANCESTORS} ancestors")
    return list(found.values())


def on_hub(origin: Origin | None) -> dict[str, str]:
    """The id and the commit of an input that was read from the Hub, and the place within."""
    if origin is None:
        return {}
    place = {"inside": origin.inside} if origin.inside else {}
    return {"id": origin.repo, "revision": origin.commit, **place}


def arithmetic(device: str) -> dict[str, Any]:
    """With what the numbers were made: equal entries promise equal bytes."""
    import torch

    return {
        "sum": "float64",
        "rounding": "nearest even, once",
        "device": device,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def plan_hash(recipe: Mapping[str, Any]) -> str:
    """What an interrupted run must have in common with the one that continues it."""
    text = json.dumps([VERSION, recipe], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write(
    folder: Path,
    *,
    makes: str,
    recipe: Mapping[str, Any],
    device: str,
    files: Iterable[str],
    hash: str,
    known: Mapping[str, str] | None = None,
    name: str = NAME,
    **more: Any,
) -> None:
    """Write the receipt into the output's folder, after all its other files.

    `hash` is a word of `HASHES` (auto: whole-file hashes for outputs under 1 GB); `known` has those
    that were computed while writing.
    """
    listed = sorted(files)
    sizes = {f: (folder / f).stat().st_size for f in listed}
    full = HASHES[hash]
    hashing = sum(sizes.values()) < FULL_HASH if full is None else full
    outputs: dict[str, Any] = {}
    for file in listed:
        outputs[file] = {"size": sizes[file]}
        digest = (known or {}).get(file)
        if digest or hashing:
            outputs[file]["sha256"] = digest or LocalFile(folder / file).fingerprint()
    table = {
        "schema": 1,
        "loratools": VERSION,
        "makes": makes,
        "recipe": recipe,
        "arithmetic": arithmetic(device),
        **more,
        "outputs": outputs,
    }
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    # A path may hold bytes that are no text, and no reader of JSON would take them.
    (folder / name).write_bytes(text.encode("utf-8", "replace"))


@dataclass(frozen=True, slots=True)
class Receipt:
    """A receipt as read: where it lies, and its table."""

    path: Path
    table: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return self.path.parent

    def get(self, *keys: str) -> Any:
        """A nested entry; None where any key is missing."""
        value: Any = self.table
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def read(output: str | Path) -> Receipt | None:
    """The receipt of an output (a folder, or the file beside a file), or None."""
    path = Path(output)
    beside = path / NAME if path.is_dir() else path.with_name(f"{path.name}.{NAME}")
    if path.name == NAME or path.name.endswith(f".{NAME}"):
        beside = path
    return _parsed(LocalFile(beside), beside) if beside.is_file() else None


def of(bundle: Bundle) -> Receipt | None:
    """The receipt of what stands at a source, here or on the Hub, or None."""
    name = NAME if bundle.chosen is None else f"{bundle.chosen}.{NAME}"
    if name not in bundle:
        return None
    return _parsed(bundle.open(name), (bundle.path or Path(bundle.name)) / name)


def _parsed(source: Source, path: Path) -> Receipt:
    if source.size > LIMIT:
        raise error("malformed", f"{shown(path)} has {source.size} bytes, {LIMIT} at most")
    table = loads(source.read(0, source.size), str(path), limit=LIMIT)
    if not isinstance(table, dict) or table.get("schema") != 1:
        raise error("malformed", f"{shown(path)} is no receipt of schema 1")
    return Receipt(path, table)


def merged_before(base: Base, adapters: Sequence[Adapter]) -> list[Problem]:
    """Adapters that the base's own receipt names among those folded into it."""
    receipt = of(base.bundle) or of(replace(base.bundle, chosen=None))
    entries = receipt.get("recipe", "adapters") if receipt else None
    before = {e.get("fingerprint") for e in entries or [] if isinstance(e, Mapping)}
    return [
        Problem("already_merged", f"{shown(a.name)} is already folded into {shown(base.name)}")
        for a in adapters
        if before and fingerprint(a) in before  # which reads all of the adapter
    ]
