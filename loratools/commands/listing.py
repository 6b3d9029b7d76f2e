"""The adapters in a folder: its own, its files, its sub-folders, and which of them are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from loratools import formats
from loratools.adapter import Source
from loratools.commands.places import at
from loratools.containers.bundle import Bundle
from loratools.containers.hashes import civitai
from loratools.errors import LoratoolsError, error, shown
from loratools.formats.looking import TRAINING, WEIGHTS

DEPTH = 4  # levels of sub-folders
MOST = 20_000  # files and folders that one answer lists
_WHOLE = ("model_index.json", "genai_config.json")  # a pipeline of diffusers, a base in ONNX
_TAIL = 4096  # bytes at the end that make two files suspect of being the same


def bundles_at(source: str | Path) -> list[Bundle]:
    """What stands at a source, one bundle for each adapter or file of weights.

    A file, or a folder that is one adapter or one base, is itself; any other folder is what its
    files and sub-folders hold. Raises not_found, and what a format's `detect` raises.
    """
    bundle = at(source)
    if bundle.chosen is not None or _is_one(bundle):
        return [bundle]
    found: list[Bundle] = []
    for inner in _inside(bundle, DEPTH, set()):
        if len(found) == MOST:
            raise error(
                "usage",
                f"{shown(bundle.name)} holds more than {MOST} files; name folders within it",
            )
        found.append(inner)
    alone = len(found) == 1 and found[0].chosen is not None
    if not found or (alone and formats.detected(bundle) is not None):
        return [bundle]
    return found


def _is_one(bundle: Bundle) -> bool:
    """Whether a folder is one thing: an adapter of several files, or a base."""
    if bundle.chosen is not None or any(name in bundle for name in _WHOLE):
        return True
    form = formats.detected(bundle)
    if form is not None and (
        "adapter_config.json" in bundle or getattr(form, "SUFFIX", "") is None
    ):
        return True
    return form is None and "config.json" in bundle and bool(_weights(bundle))


def _inside(bundle: Bundle, depth: int, seen: set[tuple[int, int]]) -> Iterator[Bundle]:
    if bundle.path is not None:
        found = bundle.path.stat()
        if (found.st_dev, found.st_ino) in seen:  # a link in a circle
            return
        seen.add((found.st_dev, found.st_ino))
    yield from map(bundle.choose, _weights(bundle))
    if depth == 0:
        return
    # Shorter names first: checkpoint-500 before checkpoint-1000.
    for name in sorted(bundle.folders, key=lambda n: (len(n), n)):
        inner = _opened(bundle, name)
        try:
            one = _is_one(inner)
        except LoratoolsError:
            one = True  # a broken adapter is one row, which says what is wrong
        if one:
            yield inner
        else:
            yield from _inside(inner, depth - 1, seen)


def _opened(within: Bundle, name: str) -> Bundle:
    """A sub-folder by the name that the user would type; one that cannot be read is one row."""
    try:
        return within.inner(name)
    except OSError:
        return Bundle(within.typed(name), (name,), within.open, name, within.path)


def _weights(bundle: Bundle) -> list[str]:
    named = [n for n in bundle.names if n.lower().endswith(WEIGHTS) and not n.startswith(".")]
    return [n for n in named if not n.lower().startswith(TRAINING)]


# ------------------------------------------------------------------------------- the same twice


def duplicates(sources: Sequence[Source | None]) -> list[int | None]:
    """For each file the place of the first one before it that holds the same tensors.

    One file named twice, or equal bytes after a safetensors header (other files: equal bytes);
    only files of one size with one ending are read whole.
    """
    groups: dict[tuple[int, bytes], list[int]] = {}
    for i, source in enumerate(sources):
        if source is not None:
            groups.setdefault(_suspect(source), []).append(i)
    first: list[int | None] = [None] * len(sources)
    for group in groups.values():
        if len(group) > 1:
            seen: dict[str, int] = {}
            for i in group:
                source = sources[i]
                assert source is not None
                at = seen.setdefault(_tensors(source), i)
                first[i] = None if at == i else at
    return first


def _suspect(source: Source) -> tuple[int, bytes]:
    """What costs little to know and is the same for two files of the same tensors."""
    start = 0
    if source.name.lower().endswith(".safetensors") and source.size > 8:
        start = 8 + min(int.from_bytes(source.read(0, 8), "little"), source.size - 8)
    length = source.size - start
    tail = min(_TAIL, length)
    return length, hashlib.sha256(source.read(source.size - tail, tail)).digest()


def _tensors(source: Source) -> str:
    found = civitai(source)
    return found.tensors or found.sha256
