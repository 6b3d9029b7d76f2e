"""What stands at a source: a named set of files, local now, with the same shape for remote ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from loratools.adapter import Origin as Origin
from loratools.adapter import Source
from loratools.containers.local import LocalFile
from loratools.errors import error, shown

# A snapshot in the cache that huggingface_hub keeps; what lies there has a commit of the Hub.
_CACHED = re.compile(
    r"models--(?P<org>[\w.-]{1,96}?)--(?P<name>[\w.-]{1,96})/snapshots/(?P<commit>[0-9a-f]{40})"
    r"(?:/(?P<inside>.+))?$",
    re.ASCII,
)


def _no_folder(name: str) -> Bundle:
    raise error("not_found", f"no folder named {shown(name)}")


@dataclass(frozen=True, slots=True)
class Bundle:
    """Files by name, as they lie in one folder; `chosen` is set when one file was named."""

    name: str  # the source as typed
    names: tuple[str, ...]
    open: Callable[[str], Source]
    chosen: str | None = None
    path: Path | None = None  # the local folder, where there is one
    folders: tuple[str, ...] = ()  # direct sub-folders, hidden ones left out
    inner: Callable[[str], Bundle] = _no_folder  # the sub-folder of a name
    origin: Origin | None = None  # where on the Hub this stands, if it does
    addressed: bool = False  # `name` is an address of the Hub, and no path
    outer: Callable[[], Bundle] | None = None  # on the Hub: the folder around this one

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str, limit: int) -> bytes:
        """A small file whole; refused beyond `limit` bytes before anything is read."""
        source = self.open(name)
        if source.size > limit:
            raise error("malformed", f"{source.name} has {source.size} bytes, {limit} at most")
        return source.read(0, source.size)

    def typed(self, name: str) -> str:
        """What lies in this folder under a name, as the user would type it."""
        if not self.addressed:
            return str(Path(self.name) / name)
        return f"{self.name}{'/' if self.origin and self.origin.inside else ':'}{name}"

    def choose(self, name: str) -> Bundle:
        """One of the files in this folder, with its neighbours."""
        return replace(self, name=self.typed(name), chosen=name, origin=within(self.origin, name))


def within(origin: Origin | None, name: str) -> Origin | None:
    """The origin of a file or a sub-folder."""
    if origin is None:
        return None
    return replace(origin, inside=f"{origin.inside}/{name}" if origin.inside else name)


def local(path: str | Path) -> Bundle:
    """The bundle at a local path: a folder's top level, or one file with its neighbours."""
    typed, path = str(path), Path(path)
    if not path.exists():
        raise error("not_found", f"no file or folder named {shown(typed)}")
    folder = path if path.is_dir() else path.parent
    found = [(p.name, p.is_dir()) for p in folder.iterdir()]
    chosen = None if path.is_dir() else path.name
    return Bundle(
        typed,
        tuple(sorted(name for name, is_folder in found if not is_folder)),
        lambda name: LocalFile(folder / name),
        chosen,
        folder,
        tuple(sorted(name for name, is_folder in found if is_folder and name[:1] != ".")),
        lambda name: replace(local(folder / name), name=str(Path(typed) / name)),
        _cached(path),
    )


def _cached(path: Path) -> Origin | None:
    """The origin of what lies in the Hub's own cache, which its path tells."""
    if "models--" not in (text := path.absolute().as_posix()):
        return None
    found = _CACHED.search(text)
    if found is None:
        return None
    return Origin(f"{found['org']}/{found['name']}", found["commit"], found["inside"] or "")


def folders(path: Path) -> Iterator[Path]:
    """The direct sub-folders of a folder, in order; none of a file."""
    if path.is_dir():
        yield from sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
