"""What stands at a source: a named set of files, local now, with the same shape for remote ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loratools.adapter import Source
from loratools.containers.local import LocalFile
from loratools.errors import error, shown


@dataclass(frozen=True, slots=True)
class Bundle:
    """Files by name, as they lie in one folder; `chosen` is set when one file was named."""

    name: str  # the source as typed
    names: tuple[str, ...]
    open: Callable[[str], Source]
    chosen: str | None = None
    path: Path | None = None  # the local folder, where there is one

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str, limit: int) -> bytes:
        """A small file whole; refused beyond `limit` bytes before anything is read."""
        source = self.open(name)
        if source.size > limit:
            raise error("malformed", f"{source.name} has {source.size} bytes, {limit} at most")
        return source.read(0, source.size)


def local(path: str | Path) -> Bundle:
    """The bundle at a local path: a folder's top level, or one file with its neighbours."""
    typed, path = str(path), Path(path)
    if not path.exists():
        raise error("not_found", f"no file or folder named {shown(typed)}")
    folder = path if path.is_dir() else path.parent
    names = tuple(sorted(p.name for p in folder.iterdir() if not p.is_dir()))
    chosen = None if path.is_dir() else path.name
    return Bundle(typed, names, lambda name: LocalFile(folder / name), chosen, folder)


def folders(path: Path) -> Iterator[Path]:
    """The direct sub-folders of a folder, in order; none of a file."""
    if path.is_dir():
        yield from sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
