"""Whether a set of files is whole: every shard of an index, every file that an ONNX graph names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from loratools.adapter import Source
from loratools.containers import gguf, onnx_graph, safetensors
from loratools.containers.looks import not_the_file
from loratools.containers.strict_json import loads
from loratools.errors import LoratoolsError, Problem, error, shown
from loratools.weights.pipeline import is_index

INDEX_LIMIT = 50_000_000
SHARD = re.compile(
    r"(?P<stem>.{1,200})-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.safetensors|\.gguf)"
)
WARNED, REFUSED = 50_000_000_000, 200_000_000_000  # bytes of a file (Hub: storage limits)
_MOST = 1000  # shards
_NAMED = 3  # names that a message lists

Files = Mapping[str, Source]


def faults(files: Files) -> Iterator[Problem]:
    """All that is missing from, or wrong with, files of weights by their paths in one folder."""
    for name, source in files.items():
        yield from _file(name, source, files)
    folders: dict[str, dict[str, Source]] = {}
    for name, source in files.items():
        path = PurePosixPath(name)
        folders.setdefault(path.parent.as_posix(), {})[path.name] = source
    for folder, here in sorted(folders.items()):
        yield from _shards(here, "" if folder == "." else f"{folder}/")


def unpublishable(message: str, target: str | None = None, severity: Any = "error") -> Problem:
    """What is incomplete, mixed up or too large."""
    return Problem("unpublishable", message, severity, target=target)


def listed(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    first = ", ".join(shown(n) for n in names[:_NAMED])
    return first + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _file(name: str, source: Source, files: Files) -> Iterator[Problem]:
    if source.size > WARNED:
        tb = source.size / 1e9
        severity = "error" if source.size > REFUSED else "warning"
        said = "the Hub takes 200 GB at most" if severity == "error" else "many clients stop at 50"
        message = f"{shown(name)} has {tb:.0f} GB, {said}; save it in shards"
        yield unpublishable(message, name, severity)
    head = source.read(0, min(source.size, 1024))
    instead = not_the_file(head)
    if instead:
        yield unpublishable(f"{shown(name)} {instead}", name)
        return
    check = _CHECKS.get(PurePosixPath(name).suffix.lower())
    if check is None:
        return
    try:
        check(name, source, files)
    except LoratoolsError as cause:
        code = "unpublishable" if cause.code == "not_found" else cause.code
        yield Problem(code, cause.message, target=name)


def _graph(name: str, source: Source, files: Files) -> None:
    folder = PurePosixPath(name).parent

    def beside(location: str) -> Source:
        wanted = (folder / location).as_posix()
        if wanted not in files:
            raise error(
                "unpublishable",
                f"{shown(name)} keeps weights in {shown(location)}, which is not among the files",
            )
        return files[wanted]

    onnx_graph.read_source(source, beside)


_CHECKS: dict[str, Callable[[str, Source, Files], object]] = {
    ".safetensors": lambda _, source, __: safetensors.read_header(source),
    ".gguf": lambda _, source, __: gguf.read_header(source),
    ".onnx": _graph,
}


def _shards(here: Files, front: str) -> Iterator[Problem]:
    """What is wrong with the shards of one folder."""
    in_index: set[str] = set()
    for index in (n for n in here if is_index(n)):
        try:
            mapping = _weight_map(here[index], front + index)
        except LoratoolsError as cause:
            yield Problem(cause.code, cause.message, target=front + index)
            continue
        shards = sorted(set(mapping.values()))
        in_index.update(shards)
        yield from _against(mapping, shards, here, front, index)
        whole = re.sub(r"\.index(\.[\w-]{1,32})?\.json$", "", index)
        if whole in here and whole not in shards:
            message = (
                f"{front}{shown(whole)} and {shown(index)} stand side by side: programs read the "
                "first and never the shards"
            )
            yield unpublishable(message, front + whole)
    stray: dict[tuple[str, str, str], set[int]] = {}
    for name in here:
        hit = SHARD.fullmatch(name)
        if hit and name not in in_index:
            key = hit["stem"], hit["count"], hit["end"]
            stray.setdefault(key, set()).add(int(hit["number"]))
    for (stem, count, end), numbers in stray.items():
        which = f"{front}{shown(stem)}-...-of-{count}{end}"
        first = f"{front}{stem}-{min(numbers):05d}-of-{count}{end}"
        lost = sorted(set(range(1, min(int(count), _MOST) + 1)) - numbers)
        if end == ".gguf" or int(count) == 1:  # which need no index
            if not lost:
                continue
            message = f"{which}: number {lost[0]} is missing"
        elif in_index:
            message = f"{which}: {len(numbers)} such files, and no index names them"
        else:
            message = f"{which}: shards without their index ({shown(stem)}.safetensors.index.json)"
        yield unpublishable(message, first)


def _against(
    mapping: Mapping[str, str], shards: list[str], here: Files, front: str, index: str
) -> Iterator[Problem]:
    """An index against the shards that it names."""
    holds: dict[str, str] = {}
    due: dict[str, list[str]] = {}  # shard → its tensors
    for tensor, shard in mapping.items():
        due.setdefault(shard, []).append(tensor)
    for shard in shards:
        if "/" in shard or "\\" in shard or shard in ("", ".", "..") or "\0" in shard:
            message = f"{front}{shown(index)} names a shard outside the folder: {shown(shard)}"
            yield Problem("hostile", message, target=front + index)
        elif shard not in here:
            message = f"{front}{shown(shard)}: {shown(index)} names it, and it is not there"
            yield unpublishable(message, front + shard)
        elif shard.endswith(".safetensors"):
            try:
                header = safetensors.read_header(here[shard])
            except LoratoolsError:
                continue  # told of the file itself
            holds.update(dict.fromkeys(header.leaves, shard))
            lost = [t for t in due[shard] if t not in header.leaves]
            if lost:
                message = f"{front}{shown(shard)} lacks {listed(lost)}, which {index} puts there"
                yield unpublishable(message, front + shard)
    extra = [t for t in holds if t not in mapping]
    if extra:
        message = (
            f"{listed(extra)}: in {front}{shown(holds[extra[0]])} and not in {shown(index)}; "
            "shards of two runs are mixed"
        )
        yield unpublishable(message, front + index)


def _weight_map(source: Source, what: str) -> dict[str, str]:
    raw = source.read(0, min(source.size, INDEX_LIMIT + 1))
    table = loads(raw, what, limit=INDEX_LIMIT)
    mapping = table.get("weight_map") if isinstance(table, dict) else None
    texts = isinstance(mapping, dict) and all(isinstance(v, str) for v in mapping.values())
    if not isinstance(mapping, dict) or not mapping or not texts:
        raise error("malformed", f"{shown(what)} has no weight_map of names")
    return mapping
