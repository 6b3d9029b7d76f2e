"""Which files of a folder belong to what is published, and what sort of thing it is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from loratools import receipt as receipts
from loratools.containers import safetensors
from loratools.containers.local import LocalFile
from loratools.containers.looks import what_weights
from loratools.containers.strict_json import loads
from loratools.errors import LoratoolsError, Problem, error, shown
from loratools.hub import pickles
from loratools.hub.paths import clash, is_portable
from loratools.hub.wholeness import listed, unpublishable

Kind = Literal["adapter", "model", "pipeline", "onnx"]
README = "README.md"
MOST, DEPTH = 20_000, 6  # files and levels of folders that are looked at
SMALL = 50_000_000

# By the last part of a path. Configs, tokenizers and templates of transformers, diffusers,
# sentence-transformers, mistral-common, onnxruntime-genai; nothing that a training leaves behind.
BELONGS = (
    "*.safetensors", "*.safetensors.index*.json", "*.safetensors.*.index.json", "*.gguf",
    "*.onnx", "*.onnx_data", "*.onnx_data_[0-9]*", "*.onnx.data", "*.onnx_adapter", "*.ort",
    "config.json", "*_config.json", "config_*.json", "model_index.json", "tokenizer.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "*.tiktoken", "tekken.json", "*.jinja", "chat_template.json", "modules.json",
    "bpe.codes", "*.spm",
    "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "README.md", "model.sig",
    "loratools.json", "*.loratools.json", "loratools.yaml", "loratools-*.yaml",
)  # fmt: skip
ALSO = {"mlx": ("*.npz",)}  # of one format only
# What a fold takes over from its base without knowing it, where the receipt lists it.
TAKEN_OVER = (".py", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ".spm", ".bpe")
NEVER = (".git", ".gitattributes", ".gitignore", "__pycache__", ".cache", ".locks")
# Other files of training, by how they begin: not worth a word each.
TRAINING = ("optimizer", "scheduler", "rng_state", "scaler", "training_args", "random_states")
WHOLE_WEIGHTS = re.compile(
    r"(?:model|pytorch_model|diffusion_pytorch_model)(?:-\d{5}-of-\d{5})?\.safetensors"
)
PICKLED = "a pickle, which can run any code where it is loaded"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_CHECKPOINT = re.compile(r"\d{7}_adapters\.safetensors")  # of mlx-lm


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files taken by path, what is left, and what is wrong with either."""

    kind: Kind | None
    taken: tuple[str, ...]
    sources: Mapping[str, LocalFile]  # of those taken that can be read
    skipped: tuple[tuple[str, str], ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()


def single(path: Path, format: str | None) -> Chosen:
    """One file and the receipt beside it."""
    names = [path.name]
    beside = path.with_name(f"{path.name}.{receipts.NAME}")
    if beside.is_file():
        names.append(beside.name)
    problems: list[Problem] = []
    sources = _opened(path.parent, names, problems)
    kind = _kind_of_file(path, format, sources)
    if kind is None:
        message = f"{shown(path.name)} is neither safetensors, GGUF nor ONNX"
        problems.append(unpublishable(message, path.name))
    if format == "peft":
        message = f"{shown(path.name)} cannot be loaded without its adapter_config.json"
        remedy = f"publish the folder: {shown(path.parent)}"
        problems.append(Problem("unpublishable", message, target=path.name, remedy=remedy))
    return Chosen(kind, tuple(sorted(names)), sources, (), tuple(problems))


def chosen(
    root: Path, include: Sequence[str], exclude: Sequence[str], format: str | None
) -> Chosen:
    """The files of a folder that belong to what it holds."""
    problems: list[Problem] = []
    skipped: list[tuple[str, str]] = []
    names = list(_walk(root, skipped, include, problems))
    for pattern in include:
        if not any(_matches(n, pattern) for n in names):
            raise error("usage", f"--include {shown(pattern)} matches no file of {shown(root)}")
    out = {n for n in names if any(_matches(n, p) for p in exclude)}
    skipped += [(n, "--exclude") for n in names if n in out]
    names = [n for n in names if n not in out]
    belongs = (*BELONGS, *ALSO.get(format or "", ()))
    index = _small_json(root / "model_index.json") if "model_index.json" in names else {}
    kind = _kind(root, names, format)
    inner = _folders(kind, names, index, root)
    over = _taken_over(root)
    taken: list[str] = []
    for name in names:
        why = _why_not(root, name, include, belongs, inner, over)
        if why is None:
            taken.append(name)
        else:
            skipped.append((name, why))
    sources = _opened(root, taken, problems)
    problems += _mixed(kind, taken, skipped, index, format)
    problems += _odd_names(taken)
    notes = [f"{shown(n)} is code that loading may run" for n in taken if n.endswith(".py")]
    order = tuple(sorted(skipped))
    return Chosen(kind, tuple(sorted(taken)), sources, order, tuple(problems), tuple(notes))


def _walk(
    root: Path, skipped: list[tuple[str, str]], include: Sequence[str], problems: list[Problem]
) -> Iterator[str]:
    """Paths of all files; folders that hold nothing to publish, and links to folders, skipped."""
    count = 0
    waiting = [(root, "", 0)]
    while waiting:
        folder, front, depth = waiting.pop()
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            name = front + entry.name
            count += 1
            if count > MOST:
                message = f"{shown(root)} holds more than {MOST} files"
                problems.append(unpublishable(f"{message}; publish the folder of one model"))
                return
            if entry.name in NEVER:
                continue  # git's and the library's own: nobody asks for them
            hidden = entry.name.startswith(".") and entry.name != ".eval_results"
            if entry.is_symlink() and entry.is_dir():
                inside = _is_within(Path(entry.path), root)
                if not inside and any(p.startswith(f"{entry.name}/") for p in include):
                    problems.append(_outward(name, entry.path))
                skipped.append((f"{name}/", "a link to a folder"))
            elif entry.is_dir():
                if hidden and not any(p.startswith(name) for p in include):
                    skipped.append((f"{name}/", "hidden"))
                elif depth == DEPTH:
                    skipped.append((f"{name}/", f"more than {DEPTH} folders deep"))
                else:
                    waiting.append((Path(entry.path), f"{name}/", depth + 1))
            else:
                yield name


def _opened(root: Path, names: Sequence[str], problems: list[Problem]) -> dict[str, LocalFile]:
    """The files that can be read and lie in the folder."""
    found: dict[str, LocalFile] = {}
    for name in names:
        path = root / name
        if path.is_symlink() and not _is_within(path, root):
            problems.append(_outward(name, path))
            continue
        try:
            found[name] = LocalFile(path)
        except LoratoolsError as cause:
            code = "unpublishable" if cause.code == "not_weights" else cause.code
            problems.append(Problem(code, cause.message, target=name))
    return found


def _outward(name: str, path: str | Path) -> Problem:
    target = os.readlink(path)
    message = f"{shown(name)} -> {shown(target)}: a link out of the folder"
    return Problem("links", message, target=name)


def _is_within(path: Path, root: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(root.resolve())
    except (OSError, RuntimeError):
        return False  # a link to nothing, or in a circle


def _matches(name: str, pattern: str) -> bool:
    """As the shell has it: a star never stands for a leading dot."""
    last, wanted = PurePosixPath(name).name, PurePosixPath(pattern).name
    if last.startswith(".") and not wanted.startswith("."):
        return False
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern.rstrip("/") + "/*")


def _why_not(
    root: Path,
    name: str,
    include: Sequence[str],
    belongs: Sequence[str],
    inner: set[str],
    over: set[str],
) -> str | None:
    """Why a file is left here; None for one that is published."""
    if any(_matches(name, p) for p in include):
        return None
    path = PurePosixPath(name)
    folder = "" if path.parent == PurePosixPath() else path.parent.as_posix()
    if path.name.startswith("."):
        return "hidden"
    if folder == "report" and path.suffix == ".png":
        return None
    if folder == ".eval_results" and path.suffix in (".yaml", ".yml"):
        return None
    if name in over:
        return None
    if path.name.startswith(TRAINING) or _CHECKPOINT.fullmatch(path.name):
        return "left over from training"
    if folder not in inner:
        return f"in a folder that is no part of it; --include '{shown(name)}'"
    if any(fnmatchcase(path.name, p) for p in belongs):
        return None if folder == "" or path.name != README else "only the folder's own card is sent"
    if path.suffix.lower() in PICKLES and _is_pickled(root / name):
        return PICKLED
    return f"no file of a model; --include '{shown(name)}'"


def _is_pickled(path: Path) -> bool:
    try:
        return pickles.pickled(LocalFile(path)) is not None
    except LoratoolsError:
        return False


def _taken_over(root: Path) -> set[str]:
    """The companions that the receipt lists: what was made here, by name."""
    try:
        found = receipts.read(root)
    except LoratoolsError:
        return set()
    outputs = found.get("outputs") if found else None
    if not isinstance(outputs, Mapping):
        return set()
    return {n for n in outputs if PurePosixPath(n).suffix.lower() in TAKEN_OVER}


# ------------------------------------------------------------------------------- what it is


def _kind(root: Path, names: Sequence[str], format: str | None) -> Kind | None:
    """What a folder holds, by the names of its files; by tensors where only they tell."""
    top = {n for n in names if "/" not in n}
    ends = {PurePosixPath(n).suffix.lower() for n in names}
    onnx = [n for n in names if n.endswith((".onnx", ".ort"))]
    if "model_index.json" in top:
        return "onnx" if onnx and ".safetensors" not in ends else "pipeline"
    if "adapter_config.json" in top or format is not None:
        return "adapter"
    weights = [n for n in top if n.endswith((".safetensors", ".gguf"))]
    near = [n for n in onnx if n.count("/") == 0 or n.startswith("onnx/")]
    if near and not weights:
        return "onnx"
    if "config.json" in top and (weights or any(n.endswith(PICKLES) for n in top)):
        return "model"
    for name in sorted(weights):
        try:
            return _kind_of_file(root / name, None, {name: LocalFile(root / name)})
        except LoratoolsError:
            continue
    return "adapter" if any(n.endswith(".onnx_adapter") for n in top) else None


def _kind_of_file(path: Path, format: str | None, sources: Mapping[str, LocalFile]) -> Kind | None:
    suffix = path.suffix.lower()
    if format is not None or suffix == ".onnx_adapter":
        return "adapter"
    if suffix in (".onnx", ".ort"):
        return "onnx"
    if suffix == ".safetensors" and path.name in sources:
        try:
            leaves = safetensors.read_header(sources[path.name]).leaves
        except LoratoolsError:
            return "model"  # what is wrong with it is told
        said = what_weights({n: leaf.shape for n, leaf in leaves.items()})
        return "adapter" if "of an adapter" in said else "model"
    return "model" if suffix == ".gguf" else None


def _folders(
    kind: Kind | None, names: Sequence[str], index: Mapping[str, Any], root: Path
) -> set[str]:
    """The folders whose files belong to it; the empty name is the folder itself."""
    found = {"", "additional_chat_templates"}
    if kind in ("pipeline", "onnx"):
        found |= {k for k in index if not k.startswith("_") and "/" not in k}
    if kind in ("model", "onnx"):
        found |= {"onnx"}
        modules = _small_json(root / "modules.json", list) if "modules.json" in names else []
        found |= {str(m["path"]).strip("/") for m in modules if isinstance(m, dict) and "path" in m}
    if kind == "onnx":
        ends = (".onnx", ".onnx_adapter")
        found |= {PurePosixPath(n).parent.as_posix() for n in names if n.endswith(ends)} - {"."}
    return found


def _small_json(path: Path, sort: type[Any] = dict) -> Any:
    """A small JSON file's object (or list); an empty one where it is none."""
    try:
        source = LocalFile(path)
        table = loads(source.read(0, min(source.size, SMALL)), str(path), limit=SMALL)
    except LoratoolsError:
        return sort()
    return table if isinstance(table, sort) else sort()


def _components_of_pickles(
    weights: Sequence[str], skipped: Sequence[tuple[str, str]]
) -> Iterator[Problem]:
    """Components of a pipeline all of whose weights are pickles, which are not sent."""
    there = {PurePosixPath(name).parent for name in weights}
    for name, why in skipped:
        folder = PurePosixPath(name).parent
        if why == PICKLED and folder not in there and folder != PurePosixPath():
            there.add(folder)
            message = f"{shown(name)}: the only weights of {shown(str(folder))}, and {PICKLED}"
            remedy = "merge --dtype makes safetensors of every component"
            yield Problem("pickled", message, target=name, remedy=remedy)


def _mixed(
    kind: Kind | None,
    taken: Sequence[str],
    skipped: Sequence[tuple[str, str]],
    index: Mapping[str, Any],
    format: str | None,
) -> Iterator[Problem]:
    """What contradicts itself, and weights that are absent."""
    top = {n for n in taken if "/" not in n}
    whole = sorted(n for n in top if WHOLE_WEIGHTS.fullmatch(n))
    if "adapter_config.json" in top and whole:
        message = (
            f"adapter_config.json and {whole[0]} in one folder: programs take it for an adapter "
            "or for a model, as it happens; publish one of them, or --exclude the other"
        )
        yield unpublishable(message, "adapter_config.json")
    if kind == "pipeline":
        for name, entry in index.items():
            named = isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
            there = any(n.startswith(f"{name}/") for n in taken)
            if named and not there and not name.startswith("_"):
                message = f"model_index.json names {shown(name)}, and no such folder is there"
                yield unpublishable(message, name)
    weights = (".safetensors", ".gguf", ".onnx", ".onnx_adapter", ".npz", ".ort")
    pickled = list(_components_of_pickles([n for n in taken if n.endswith(weights)], skipped))
    if kind == "pipeline" and pickled:
        yield from pickled
    elif not any(n.endswith(weights) for n in taken):
        dangerous = [n for n, why in skipped if why == PICKLED]
        if dangerous:
            message = f"{listed(dangerous)}: the only weights, and {PICKLED}"
            remedy = "make safetensors of them: loratools convert"
            yield Problem("pickled", message, target=dangerous[0], remedy=remedy)
        elif kind is None:
            yield unpublishable("no weights of an adapter or a model are among the files")
        else:
            yield unpublishable(f"the weights of this {kind} are not among the files")
    elif format == "peft" and "adapter_config.json" not in top:
        yield unpublishable("adapter_config.json is missing: peft cannot load the weights alone")
    elif kind == "model" and "config.json" not in top and whole:
        yield unpublishable("config.json is missing: transformers cannot load the weights")


def _odd_names(taken: Sequence[str]) -> Iterator[Problem]:
    """Names that the Hub refuses, or that no other system can hold."""
    for name in taken:
        if not name.isprintable() or "\\" in name:
            yield unpublishable(f"{shown(name)}: the Hub takes no such name", name)
        elif not is_portable(name):
            yield unpublishable(f"{shown(name)}: Windows has no such name", name, "warning")
    if found := clash(taken):
        one, other = found
        message = f"{shown(one)} and {shown(other)} are one name where case does not count"
        yield unpublishable(message, other)
