"""The receipt (loratools.json): what an output was made from, how, and its hashes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools._version import VERSION
from loratools.adapter import Adapter, leaves
from loratools.containers.local import LocalFile
from loratools.containers.strict_json import loads
from loratools.errors import Problem, error, shown
from loratools.weights.base import Base

NAME = "loratools.json"
LIMIT = 100_000_000  # bytes of a receipt: one line of 200 bytes for each tensor of a large model
HASHES = {"full": True, "auto": None, "none": False}  # whole files; None: by their size
FULL_HASH = 1_000_000_000  # outputs up to this size get a whole-file sha256 by default
SAMPLES = 16  # places of a shard that a base's fingerprint looks at
SAMPLE = 4096


def fingerprint(adapter: Adapter) -> str:
    """sha256 over an adapter's config and its weights file (its leaves, in memory)."""
    found = hashlib.sha256(json.dumps(adapter.config, sort_keys=True).encode())
    for delta_key in sorted(adapter.deltas):
        for leaf in leaves(adapter.deltas[delta_key]):
            if isinstance(leaf.source, LocalFile):
                found.update(leaf.source.fingerprint().encode())
                return found.hexdigest()
            found.update(f"{delta_key} {leaf.dtype} {leaf.shape}".encode())
            found.update(leaf.read())
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
        "source": named(adapter.name),
        "format": adapter.format,
        "weight": weight,
        "fingerprint": fingerprint(adapter),
    }
    if left_out:
        entry["left_out"] = list(left_out)
    if adapter.assumed:
        entry["assumed"] = dict(adapter.assumed)
    return entry


def base_entry(base: Base) -> dict[str, Any]:
    """The base as an input."""
    return {
        "source": named(base.name),
        "id": base.id,
        "fingerprint": base_fingerprint(base),
        "shards": {
            s.name: {"size": base.bundle.open(s.name).size, "header": s.digest} for s in base.shards
        },
    }


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
    if not beside.is_file():
        return None
    table = loads(LocalFile(beside).read(0, beside.stat().st_size), str(beside), limit=LIMIT)
    if not isinstance(table, dict) or table.get("schema") != 1:
        raise error("malformed", f"{shown(beside)} is no receipt of schema 1")
    return Receipt(beside, table)


def merged_before(base: Base, adapters: Sequence[Adapter]) -> list[Problem]:
    """Adapters that the base's own receipt names among those folded into it."""
    folder, file = base.bundle.path, base.bundle.chosen
    if folder is None:
        return []
    receipt = (read(folder / file) if file else None) or read(folder)
    entries = receipt.get("recipe", "adapters") if receipt else None
    before = {e.get("fingerprint") for e in entries or [] if isinstance(e, Mapping)}
    return [
        Problem("already_merged", f"{shown(a.name)} is already folded into {shown(base.name)}")
        for a in adapters
        if before and fingerprint(a) in before  # which reads all of the adapter
    ]
