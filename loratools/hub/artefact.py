"""What would be published, told offline: its files, its kind, and everything that is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from loratools import receipt as receipts
from loratools.containers import safetensors
from loratools.containers.local import LocalFile
from loratools.containers.strict_json import loads
from loratools.errors import LoratoolsError, Problem, error, shown
from loratools.hub import contents, pickles, wholeness
from loratools.hub.choosing import MOST, README, Chosen, Kind, chosen, single
from loratools.hub.facts import parents_of
from loratools.receipt import Receipt
from loratools.weights.base import is_hub_id

Progress = Callable[[int, int], None]
CONFIG_LIMIT = 5_000_000  # bytes of a config
README_LIMIT = 4_000_000
SECRETS = 10  # of one file that are told
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".onnx_data", ".data", ".onnx_adapter", ".ort", ".npz")
# Ids from before names had owners: there are no new ones (huggingface.co redirects each).
OWNERS = {
    "openai-community": "gpt2 gpt2-medium gpt2-large gpt2-xl openai-gpt",
    "google-bert": "bert-base-uncased bert-base-cased bert-large-uncased bert-large-cased "
    "bert-base-multilingual-cased bert-base-multilingual-uncased bert-base-chinese",
    "FacebookAI": "roberta-base roberta-large xlm-roberta-base xlm-roberta-large",
    "distilbert": "distilbert-base-uncased distilbert-base-cased distilroberta-base distilgpt2 "
    "distilbert-base-multilingual-cased",
    "google-t5": "t5-small t5-base t5-large t5-3b t5-11b",
    "albert": "albert-base-v1 albert-base-v2 albert-large-v2 albert-xlarge-v2 albert-xxlarge-v2",
}
_OWNED = {name: f"{owner}/{name}" for owner, names in OWNERS.items() for name in names.split()}


@dataclass(frozen=True, slots=True)
class File:
    """A file to publish: its path in the repository, and where it lies.

    `replaced` is sent instead of the file's content where that names paths of this machine.
    """

    name: str
    path: Path
    size: int  # of what is sent
    replaced: bytes | None = None

    def sha256(self) -> str:
        """Of what is sent; a file is read once however often it is asked for."""
        if self.replaced is not None:
            return hashlib.sha256(self.replaced).hexdigest()
        return _fingerprint(LocalFile(self.path))

    @property
    def is_weights(self) -> bool:
        return PurePosixPath(self.name).suffix.lower() in WEIGHTS or ".onnx_data_" in self.name


@dataclass(frozen=True, slots=True)
class Artefact:
    """A folder or a file as it would be published; nothing of it was sent, nobody was asked."""

    path: Path
    kind: Kind | None  # None: nothing that is known, and a problem says so
    files: tuple[File, ...]  # by name
    skipped: tuple[tuple[str, str], ...]  # what stays here, and why
    problems: tuple[Problem, ...]  # all of them at once
    base_ids: tuple[str, ...]  # the Hub ids of what it was made from, the base first
    base_path: str | None = None  # what names the base and is a path
    config: Mapping[str, Any] = field(default_factory=dict)
    receipt: Receipt | None = None
    format: str | None = None  # of an adapter
    readme: str | None = None  # the card that stands beside the files
    pictures: tuple[str, ...] = ()  # those of the report, among the files
    notes: tuple[str, ...] = ()
    inside: str = ""

    @property
    def weights(self) -> tuple[File, ...]:
        return tuple(f for f in self.files if f.is_weights)

    def local_name(self, name: str) -> str:
        """A path in the repository as it is within the folder."""
        return name.removeprefix(f"{self.inside}/") if self.inside else name

    def local(self, file: File) -> str:
        """A file's path within the folder."""
        return self.local_name(file.name)

    def has(self, name: str) -> bool:
        """Whether a file, by its path within the folder, is published."""
        return any(self.local(f) == name for f in self.files)


@lru_cache(maxsize=MOST)
def _fingerprint(file: LocalFile) -> str:
    return file.fingerprint()


def _hashed(files: Sequence[File], progress: Progress | None) -> None:
    """Hash all files, which card, receipt, signature and comparison then know."""
    total, done = sum(f.size for f in files), 0
    for file in files:
        file.sha256()
        done += file.size
        if progress is not None:
            progress(done, total)


def artefact(
    path: str | Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    inside: str = "",
    format: str | None = None,
    base_models: Sequence[str] = (),
    progress: Progress | None = None,
) -> Artefact:
    """What would be published of a folder or a file, with all that is wrong at once; offline.

    Files are chosen by a list of what belongs to a model, not by leaving out what looks bad;
    `include` and `exclude` are globs on paths within the folder, `inside` is the folder of the
    repository. `format` is an adapter's, as `inspect` says; `base_models` what the user named;
    `progress` is told the bytes that are hashed, and all of them.
    Raises NotFoundError, and UsageError for `inside` and for an `include` that matches nothing.
    """
    root = Path(path)
    if not root.exists():
        raise error("not_found", f"no file or folder named {shown(path)}")
    inside = _inside(inside)
    alone = not root.is_dir()
    found = single(root, format) if alone else chosen(root, include, exclude, format)
    receipt, problems = _receipt(root, found.problems)
    problems += _content(found)
    sources = {n: s for n in found.taken if (s := found.sources.get(n)) is not None}
    problems += wholeness.faults(sources)
    config = {} if alone else _config(found, problems)
    base_ids, base_path = _bases(config, receipt)
    base = next(iter(base_models), None) or next(iter(base_ids), None)
    sent, notes = _scrubbed(found, base)
    files = [
        _file(name, source, inside, sent.get(name))
        for name, source in sorted(sources.items())
        if name != README
    ]
    if not any(p.severity == "error" for p in problems):
        _hashed(files, progress)
    if receipt is not None:
        files = _with_receipt(files, receipt, inside, problems, notes)
    readme = None if alone else _readme(found, problems)
    return Artefact(
        path=root,
        kind=found.kind,
        files=tuple(files),
        skipped=found.skipped,
        problems=tuple(dict.fromkeys(problems)),
        base_ids=base_ids,
        base_path=base_path,
        config=config,
        receipt=receipt,
        format=format if found.kind == "adapter" else None,
        readme=readme,
        pictures=tuple(f.name for f in files if f.name.endswith(".png")),
        notes=(*found.notes, *notes),
        inside=inside,
    )


def _inside(folder: str) -> str:
    """The folder of the repository, without a slash at either end."""
    parts = [p for p in folder.strip("/").split("/") if p != "."]
    wrong = any(p in ("", "..", ".git") or not p.isprintable() or "\\" in p for p in parts)
    if folder.strip("/") and (wrong or folder.startswith("/")):
        raise error(
            "usage", f"--path-in-repo {shown(folder)}: expected a folder, such as onnx/fp16"
        )
    return "/".join(parts) if folder.strip("/") else ""


def _file(name: str, source: LocalFile, inside: str, sent: bytes | None) -> File:
    size = source.size if sent is None else len(sent)
    return File(f"{inside}/{name}" if inside else name, source.path, size, sent)


# ------------------------------------------------------------------------------- content


def _content(found: Chosen) -> list[Problem]:
    """Pickles and secrets among the files that were taken."""
    problems: list[Problem] = []
    own = contents.own_tokens()
    for name in found.taken:
        source = found.sources.get(name)
        if source is None:
            continue  # a link or no file, as another problem says
        try:
            what = pickles.pickled(source)
            if what:
                message = f"{shown(name)} is {what}; loading it can run any code"
                problems.append(Problem("pickled", message, target=name))
                continue
            secrets = told(name, contents.secrets(source, own))
            if not secrets and contents.keeps_secrets(PurePosixPath(name).name):
                message = f"{shown(name)} is a file that keeps passwords, by its name"
                secrets = [Problem("secret", message, target=name)]
            problems += secrets
        except LoratoolsError as cause:
            problems.append(Problem(cause.code, cause.message, target=name))
    return problems


def told(name: str, secrets: Sequence[contents.Secret]) -> list[Problem]:
    """The first secrets of a file as problems, and how many more lines have one."""
    words = [f"{shown(name)}, {secret}" for secret in secrets[:SECRETS]]
    if len(secrets) > SECRETS:
        words.append(f"{shown(name)}, {len(secrets) - SECRETS} more lines")
    return [Problem("secret", each, target=name) for each in words]


def _scrubbed(found: Chosen, base: str | None) -> tuple[dict[str, bytes], list[str]]:
    """The configs that are sent in other words, and a note for each."""
    sent: dict[str, bytes] = {}
    notes: list[str] = []
    for name in found.taken:
        source = found.sources.get(name)
        if source is not None and name.endswith(".safetensors"):
            notes += _paths_within(name, source)
        is_config = contents.CONFIGS.fullmatch(PurePosixPath(name).name) is not None
        if source is None or not is_config or source.size > CONFIG_LIMIT:
            continue
        clean = contents.scrubbed(source.read(0, source.size), base)
        if clean is not None:
            sent[name] = clean.text
            keys = ", ".join(shown(k) for k in clean.keys)
            notes.append(
                f"{shown(name)}: {keys} named a path of this machine and is sent without it; "
                "the file here stays as it is"
            )
    return sent, notes


def _paths_within(name: str, source: LocalFile) -> list[str]:
    """Paths of this machine in the metadata of weights, whose bytes are sent as they are."""
    try:
        metadata = safetensors.read_header(source).metadata
    except LoratoolsError:
        return []  # it is among the problems
    keys = [shown(k) for k, v in metadata.items() if contents.is_home_path(v)]
    few = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    said = f"{shown(name)}: its metadata name paths of this machine ({few}), and go with it"
    return [said] if keys else []


def _readme(found: Chosen, problems: list[Problem]) -> str | None:
    source = found.sources.get(README)
    if README not in found.taken or source is None:
        return None
    if source.size > README_LIMIT:
        message = f"{README} has {source.size} bytes; a card has {README_LIMIT} at most"
        problems.append(Problem("card", message, target=README))
        return None
    try:
        # With its own line ends, which a card that is kept keeps.
        return source.read(0, source.size).decode("utf-8")
    except UnicodeDecodeError:
        problems.append(Problem("card", f"{README} is not UTF-8", target=README))
        return None


# ------------------------------------------------------------------------------- configs, bases


def _config(found: Chosen, problems: list[Problem]) -> Mapping[str, Any]:
    """The config that says what it is; a broken one is a problem."""
    first: Mapping[str, Any] = {}
    for name in ("adapter_config.json", "config.json", "model_index.json"):
        source = found.sources.get(name)
        if name not in found.taken or source is None:
            continue
        try:
            table = loads(
                source.read(0, min(source.size, CONFIG_LIMIT + 1)), name, limit=CONFIG_LIMIT
            )
        except LoratoolsError as cause:
            problems.append(Problem(cause.code, cause.message, target=name))
            continue
        if not isinstance(table, dict):
            problems.append(Problem("malformed", f"{name} holds no object", target=name))
        elif not first:
            first = table
    return first


def hub_id(said: object) -> str | None:
    """The Hub id that a name is, with its owner; None for a path, or what may be one."""
    if not isinstance(said, str):
        return None
    found = said if is_hub_id(said) else _OWNED.get(said)
    return None if found is None or Path(said).exists() else found


def _bases(
    config: Mapping[str, Any], receipt: Receipt | None
) -> tuple[tuple[str, ...], str | None]:
    """The Hub ids that config and receipt name, and the path that stands where an id should."""
    said = config.get("base_model_name_or_path") or config.get("model")  # mlx-lm's key
    names = [said] if isinstance(said, str) and said else []
    names += [p.id for p in parents_of(receipt) if p.role == "base" and p.id]
    ids = [i for n in names if (i := hub_id(n)) is not None]
    path = next((n for n in names if hub_id(n) is None), None)
    return tuple(dict.fromkeys(ids)), None if ids else path


# ------------------------------------------------------------------------------- receipt


def _receipt(root: Path, problems: Iterable[Problem]) -> tuple[Receipt | None, list[Problem]]:
    found = list(problems)
    try:
        return receipts.read(root), found
    except LoratoolsError as cause:
        found.append(Problem(cause.code, cause.message, target=receipts.NAME))
        return None, found


def _with_receipt(
    files: list[File],
    receipt: Receipt,
    inside: str,
    problems: list[Problem],
    notes: list[str],
) -> list[File]:
    """The files with a receipt that speaks of them as they are sent, with a hash for each.

    What changed here since the receipt was written is a problem: it would be published as what
    it no longer is.
    """
    name = f"{inside}/{receipt.path.name}" if inside else receipt.path.name
    said = receipt.get("outputs")
    if not isinstance(said, Mapping) or not any(f.name == name for f in files):
        return files
    there = {f.name.removeprefix(f"{inside}/") if inside else f.name: f for f in files}
    outputs: dict[str, Any] = {}
    for output, entry in said.items():
        file = there.get(output)
        if not isinstance(entry, Mapping) or file is None:
            if output.endswith(WEIGHTS):
                message = f"{shown(output)}: the receipt names it, and it is not among the files"
                problems.append(wholeness.unpublishable(message, output))
            continue
        own = File(file.name, file.path, LocalFile(file.path).size)
        known = entry.get("sha256")
        if own.size != entry.get("size") or (known is not None and own.sha256() != known):
            message = f"{shown(output)} is not the one that {shown(receipt.path.name)} lists"
            severity: Literal["error", "warning"] = "error" if file.is_weights else "warning"
            problems.append(
                Problem(
                    "proof_failed", message, severity, target=output,
                    remedy="make it again, or leave the receipt out: "
                    f"--exclude {receipt.path.name}",
                )
            )  # fmt: skip
            outputs[output] = dict(entry)
            continue
        outputs[output] = {**entry, "size": file.size, "sha256": file.sha256()}
    if outputs == dict(said):
        return files
    text = json.dumps({**receipt.table, "outputs": outputs}, indent=1, ensure_ascii=False) + "\n"
    sent = text.encode("utf-8", "replace")
    notes.append(f"{shown(receipt.path.name)}: its hashes are those of the files as they are sent")
    return [File(f.name, f.path, len(sent), sent) if f.name == name else f for f in files]
