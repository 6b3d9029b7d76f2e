"""The half of `verify` that goes by a receipt: files, digests, and the recipe carried out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from loratools import formats, receipt
from loratools.adapter import Adapter, Leaf
from loratools.commands.check import fit
from loratools.commands.companions import changed_config
from loratools.commands.folded import output_shards
from loratools.commands.merge import DTYPES, merge_adapters
from loratools.commands.sources import READ_TOO, cached, here
from loratools.commands.sources import adapter as adapter_at
from loratools.commands.sources import base as base_at
from loratools.commands.verify import Progress, VerifyResult
from loratools.commands.weighing import Weight, weight
from loratools.containers.bundle import folders
from loratools.containers.local import LocalFile
from loratools.errors import LoratoolsError, error, shown
from loratools.folding import Cut
from loratools.proving.differences import Mismatch
from loratools.proving.own import Replayed, replay_fold, replay_merge
from loratools.receipt import Receipt
from loratools.weights.base import Base, headers
from loratools.weights.pipeline import INDEX

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Proof:
    """One receipt while it is checked."""

    receipt: Receipt
    model: Path
    mismatches: list[Mismatch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hashed: set[str] = field(default_factory=set)  # files whose whole-file sha256 agrees

    def part(self, *keys: str, kind: type = dict) -> Any:
        """An entry of the receipt of the expected kind; MalformedError for another."""
        value = self.receipt.get(*keys)
        if not isinstance(value, kind):
            name = ".".join(keys)
            raise error("malformed", f"{shown(self.receipt.path)}: {name} is no {kind.__name__}")
        return value


def by_receipt(
    found: Receipt,
    model: Path,
    base: str | Path | None,
    adapters: Sequence[str | Path],
    inputs: Sequence[str | Path],
    *,
    progress: Progress | None = None,
) -> VerifyResult:
    """Prove an output by its receipt: hashes always, the replay where the inputs are found."""
    proof = Proof(found, model)
    _files(proof)
    if "export" in proof.part("recipe"):
        return _exported(proof)
    sources = Sources(proof, base, adapters, inputs)
    is_fold = "base" in proof.part("recipe")
    try:
        checked = _digests(proof) if is_fold else _parts(formats.read(model))
        replayed = (_fold if is_fold else _merge)(proof, sources, progress)
    except LoratoolsError as cause:
        if not proof.mismatches:
            raise
        checked, replayed = 0, None  # the files are known to be wrong, and cannot even be read
        proof.notes.append(cause.message)
    if replayed is not None:
        proof.mismatches += replayed.mismatches
        checked = replayed.checked
    return VerifyResult(
        ok=not proof.mismatches,
        proved="hashes" if replayed is None else "replay",
        checked=checked,
        mismatches=tuple(proof.mismatches),
        notes=tuple(proof.notes),
    )


def _exported(proof: Proof) -> VerifyResult:
    """An ONNX export: its files; the graphs were compared with torch when they were made."""
    outputs = proof.part("outputs")
    bare = [n for n in outputs if n not in proof.hashed and "sha256" not in outputs[n]]
    if bare:
        proof.notes.append(
            f"{shown(bare[0])}: by its size alone; export with --hash full says more"
        )
    return VerifyResult(
        ok=not proof.mismatches,
        proved="hashes",
        checked=len(outputs),
        mismatches=tuple(proof.mismatches),
        notes=tuple(proof.notes),
        unit="files",
    )


# ------------------------------------------------------------------------------- hashes


def _files(proof: Proof) -> None:
    """Every listed file with its size and hash; nothing beside them that a reader would take."""
    folder, outputs = proof.receipt.folder, proof.part("outputs")
    for name, entry in outputs.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or "\\" in name or "\0" in name:
            raise error("hostile", f"{shown(proof.receipt.path)} names a file {shown(name)}")
        path = folder / name
        if not path.is_file():
            proof.mismatches.append(Mismatch("missing", None, name))
            continue
        file, known = LocalFile(path), entry if isinstance(entry, Mapping) else {}
        if known.get("size") != file.size:
            what = f"has {file.size} bytes, the receipt says {shown(known.get('size'))}"
            proof.mismatches.append(Mismatch(what, None, name))
        elif "sha256" in known and known["sha256"] != file.fingerprint():
            proof.mismatches.append(Mismatch("has another sha256", None, name))
        elif "sha256" in known:
            proof.hashed.add(name)
    if proof.model.is_dir():
        inner = folders(folder) if INDEX in outputs else ()  # the components of a pipeline
        for path in sorted(path for each in (folder, *inner) for path in each.iterdir()):
            name = path.relative_to(folder).as_posix()
            is_read = path.suffix.lower() in READ_TOO and path.name != receipt.NAME
            if is_read and name not in outputs and path.is_file():
                proof.mismatches.append(Mismatch("not in the receipt", None, name))


def _digests(proof: Proof) -> int:
    """Touched tensors against the receipt's digests, in files without a hash that agrees."""
    written = headers(proof.model)
    targets = proof.part("targets")
    known: dict[str, tuple[Leaf, str]] = {
        name: (leaf, shard.name) for shard in written.shards for name, leaf in shard.leaves.items()
    }
    checked = sum(file in proof.hashed for _, file in known.values())
    for name, entry in targets.items():
        due = entry.get("sha256") if isinstance(entry, Mapping) else None
        if name not in known:
            proof.mismatches.append(Mismatch("missing", name))
            continue
        leaf, file = known[name]
        if file in proof.hashed or not due:
            continue
        checked += 1
        if receipt.digest(leaf) != due:
            proof.mismatches.append(Mismatch("has another sha256", name, file))
    return checked


# ------------------------------------------------------------------------------- inputs


class Sources:
    """The inputs of a receipt, looked for by name and accepted only by fingerprint."""

    def __init__(
        self,
        proof: Proof,
        base: str | Path | None,
        adapters: Sequence[str | Path],
        inputs: Sequence[str | Path],
    ) -> None:
        self.proof = proof
        self.given_base = None if base is None else here(base_at(base))
        self.given = list(adapters)
        self.folders = [*(Path(i) for i in inputs), proof.receipt.folder.parent, Path()]
        self.used: set[str | Path] = set()

    def base(self) -> Base | None:
        """The base; StorageError `input_changed` where another one was given."""
        entry = self.proof.part("recipe", "base")
        due = entry.get("fingerprint")
        if self.given_base is not None:
            if receipt.base_fingerprint(self.given_base) != due:
                raise error(
                    "input_changed",
                    f"{shown(self.given_base.name)} is not the base that the receipt names "
                    "(another fingerprint)",
                )
            return self._referred(self.given_base)
        found = self._base(entry, "base")
        return None if found is None else self._referred(found)

    def reference(self) -> Base | None:
        """The model that confirmed the weights of a graph; None where none did, or it is gone."""
        entry = self.proof.receipt.get("recipe", "reference")
        return self._base(entry, "reference") if isinstance(entry, Mapping) else None

    def _referred(self, base: Base) -> Base | None:
        if base.graph is None or not self.proof.receipt.get("recipe", "reference"):
            return base
        from loratools.exporting.graph_reference import confirmed

        model = self.reference()
        return None if model is None else confirmed(base, model)

    def _base(self, entry: Mapping[str, Any], what: str) -> Base | None:
        for place in [*self.candidates(entry), cached(entry)]:
            try:
                if place is None:
                    continue
                found = headers(place)
                if receipt.base_fingerprint(found) == entry.get("fingerprint"):
                    return found
            except LoratoolsError:
                continue  # something else of the same name
        self.absent(entry, what)
        return None

    def adapters(self) -> list[Adapter] | None:
        """The adapters in the recipe's order; None where one is not found."""
        entries = self.proof.part("recipe", "adapters", kind=list)
        found = []
        for entry in entries:
            if not isinstance(entry, Mapping):
                raise error("malformed", f"{shown(self.proof.receipt.path)}: adapters")
            found.append(self.adapter(entry))
        unused = [p for p in self.given if p not in self.used]
        if unused:
            raise error(
                "input_changed",
                f"{shown(unused[0])} is none of the adapters that the receipt names "
                "(another fingerprint)",
            )
        whole = [a for a in found if a is not None]
        return whole if len(whole) == len(found) else None

    def adapter(self, entry: Mapping[str, Any]) -> Adapter | None:
        assumed = entry.get("assumed")
        assume = {str(k): str(v) for k, v in assumed.items()} if isinstance(assumed, dict) else {}
        for given in self.given:
            found = adapter_at(given, assume)
            if receipt.fingerprint(found) == entry.get("fingerprint"):
                self.used.add(given)
                return found
        for place in [*self.candidates(entry), cached(entry)]:
            try:
                if place is not None:
                    found = formats.read(place, assume=assume)
                    if receipt.fingerprint(found) == entry.get("fingerprint"):
                        return found
            except LoratoolsError:
                continue  # something else of the same name
        self.absent(entry, "adapter")
        return None

    def candidates(self, entry: Mapping[str, Any]) -> Iterator[Path]:
        """Where an input may lie: as typed, or by its last name, in each of the folders."""
        source = Path(str(entry.get("source", "")))
        for folder in self.folders:
            for name in dict.fromkeys((source, Path(source.name))):
                if not name.is_absolute() and (folder / name).exists():
                    yield folder / name
            if folder.exists() and folder not in (self.proof.receipt.folder.parent, Path()):
                yield folder

    def absent(self, entry: Mapping[str, Any], what: str) -> None:
        source = shown(entry.get("source"))
        self.proof.notes.append(f"the {what} {source} was not found; name it to replay the fold")


# ------------------------------------------------------------------------------- replay


def _fold(proof: Proof, sources: Sources, progress: Progress | None) -> Replayed | None:
    base, adapters = sources.base(), sources.adapters()
    if base is None or adapters is None:
        return None
    recipe = _recipe(proof)
    plan, _ = fit(
        adapters,
        base,
        weights=_weights(proof),
        only=recipe["only"] or (),
        skip=recipe["skip"] or (),
        ties=recipe["ties"],
    )
    assert plan is not None
    device, same = _arithmetic(proof)
    rank, energy = recipe["rank"], recipe["energy"]
    written = headers(proof.model)
    replayed = replay_fold(
        plan,
        output_shards(plan, recipe["dtype"]),
        written,
        cut=None if rank is None and energy is None else Cut(rank, energy),
        device=device,
        tolerance=0 if same else 1,
        progress=progress,
    )
    if replayed.near:
        proof.notes.append(f"{replayed.near} elements differ by 1 ulp, as another arithmetic may")
    if proof.model.is_dir() and base.config and (base.graph is None or written.config):
        due = changed_config(plan, recipe["dtype"])
        for key in due.keys() | written.config.keys():
            if due.get(key) != written.config.get(key):
                what = f"{shown(key)} is {shown(written.config.get(key))}"
                what += f", expected {shown(due.get(key))}"
                replayed.mismatches.append(Mismatch(what, None, "config.json"))
    return replayed


def _merge(proof: Proof, sources: Sources, progress: Progress | None) -> Replayed | None:
    adapters, recipe = sources.adapters(), _recipe(proof)
    if adapters is None:
        return None
    if recipe["to"] not in (None, "peft"):
        proof.notes.append(f"what was converted to {shown(recipe['to'])} is not replayed")
        return None
    runtime = [a for a in adapters if a.runtime is not None]
    if any(a.format != "peft" for a in runtime):
        proof.notes.append("what was converted from another container is not replayed")
        return None
    if recipe["method"] == "cat" and not runtime:
        message = f"{shown(proof.receipt.path)}: method is cat, for updates of weights"
        raise error("malformed", message)
    _, same = _arithmetic(proof)
    merged = merge_adapters(
        adapters,
        _weights(proof),
        method=recipe["method"] or "linear",
        rank=recipe["rank"],
        energy=recipe["energy"],
        dtype=recipe["dtype"],
        only=recipe["only"] or (),
        skip=recipe["skip"] or (),
    )
    written = formats.read(proof.model)
    return replay_merge(
        merged.adapter, written, file=next(iter(written.files), None), same_class=same
    )


def _parts(adapter: Adapter) -> int:
    """How many deltas an adapter has, or of a runtime adapter tensors."""
    return len(adapter.deltas) + (len(adapter.runtime.tensors) if adapter.runtime else 0)


def _recipe(proof: Proof) -> dict[str, Any]:
    """The options that a replay needs, None where absent; MalformedError for other values."""
    from loratools.merging import METHODS

    fits: dict[str, Callable[[Any], bool]] = {
        "rank": lambda v: isinstance(v, int) and v > 0,
        "energy": lambda v: isinstance(v, float | int) and 0 < v <= 1,
        "dtype": lambda v: v in list(DTYPES.values()),
        "ties": lambda v: v in ("tied", "untied"),
        "method": lambda v: v in [*METHODS, "cat"],
        "only": _are_texts,
        "skip": _are_texts,
        "to": lambda v: isinstance(v, str),
    }
    recipe = proof.part("recipe")
    for key, good in fits.items():
        value = recipe.get(key)
        if value is not None and not good(value):
            what = f"{key} is {shown(value)}, which this version cannot replay"
            raise error("malformed", f"{shown(proof.receipt.path)}: {what}")
    return {key: recipe.get(key) for key in fits}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _weights(proof: Proof) -> list[Weight]:
    weights = [e.get("weight") for e in proof.part("recipe", "adapters", kind=list)]
    parts = [w for w in weights if isinstance(w, str) and "=" in w]
    numbers = [w for w in weights if isinstance(w, int | float) and not isinstance(w, bool)]
    if len(parts) + len(numbers) < len(weights):
        raise error("malformed", f"{shown(proof.receipt.path)}: a weight is no number")
    try:
        return [weight(w) for w in weights]
    except LoratoolsError as cause:
        message = f"{shown(proof.receipt.path)}: {cause.message}"
        raise error("malformed", message) from None


def _arithmetic(proof: Proof) -> tuple[torch.device, bool]:
    """Where to compute, and whether the arithmetic is that of the receipt."""
    import torch

    said = proof.part("arithmetic")
    name = str(said.get("device"))
    on_gpu = name.startswith("cuda") and torch.cuda.is_available()
    same = receipt.arithmetic(name if on_gpu else "cpu") == said
    if not same:
        proof.notes.append("made with another arithmetic: elements may differ by 1 ulp")
    return torch.device("cuda" if on_gpu else "cpu"), same
