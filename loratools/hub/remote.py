"""Files on the Hub as bundles: pinned to a commit, headers by ranges, fetched when asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from loratools.adapter import Origin, Source
from loratools.containers.bundle import Bundle
from loratools.containers.local import LocalFile
from loratools.containers.strict_json import loads
from loratools.errors import LoratoolsError, NetworkError, error, shown
from loratools.hub import access
from loratools.hub.address import Address
from loratools.hub.paths import clash, is_portable
from loratools.hub.patience import patiently
from loratools.hub.ranges import RemoteFile
from loratools.weights.disk import free_bytes

LISTING = 100_000_000  # bytes of a list of files
MOST = 100_000  # files of one repository; a list of more is no repository of a model
LONGEST = 4096  # characters of a path
DEEPEST = 50  # folders in one another
CHECKED = 1_000_000_000  # bytes of a fetched file up to which its sha256 is computed
BYTES = "huggingface_hub.snapshot_download"  # the library's bar of bytes that lie on the disk
SPARE = 50_000_000  # bytes that stay free on the cache's disk
TREES = 32  # listings that are kept, a commit's never changes


Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a commit."""

    size: int
    sha256: str | None = None  # of large files, which the Hub knows by it


@dataclass(frozen=True, slots=True)
class Tree:
    """All files of a repository at one commit, and where the library's cache keeps them."""

    repo: str
    commit: str
    entries: Mapping[str, Entry]
    cache: Path  # the commit's folder there, which need not exist
    opened: dict[str, RemoteFile] = field(default_factory=dict)
    inner: dict[str, tuple[list[str], set[str]]] = field(init=False)  # folder → files, folders

    def __post_init__(self) -> None:
        inner: dict[str, tuple[list[str], set[str]]] = {"": ([], set())}
        for path in sorted(self.entries):
            folder, _, name = path.rpartition("/")
            new, above = list[str](), folder
            while above not in inner:
                inner[above] = ([], set())
                new.append(above)
                above = above.rpartition("/")[0]
            for each in new:
                parent, _, last = each.rpartition("/")
                inner[parent][1].add(last)
            inner[folder][0].append(name)
        if len(inner) > MOST:
            raise error("hostile", f"{shown(self.repo)} lists more than {MOST:,} folders")
        object.__setattr__(self, "inner", inner)

    def cached(self, path: str) -> Path | None:
        """The file in the cache, where it lies there whole."""
        place = self.cache / path
        try:
            return place if place.stat().st_size == self.entries[path].size else None
        except OSError:
            return None

    def open(self, path: str) -> Source:
        """A file: from the cache, else by ranges."""
        place = self.cached(path)
        if place is not None:
            return LocalFile(place)
        entry = self.entries[path]
        made = RemoteFile(self.repo, self.commit, path, entry.size, entry.sha256)
        return self.opened.setdefault(path, made)

    def bundle(self, name: str, inside: str, *, here: bool = False) -> Bundle:
        """The folder or file `inside`; `here`: with the cache's folder as its path.

        Raises NotFoundError where the commit has none of that name.
        """
        origin = Origin(self.repo, self.commit, inside)
        folder, chosen = inside, None
        if inside in self.entries:
            folder, _, chosen = inside.rpartition("/")
        if folder not in self.inner:
            at = f"{shown(self.repo)} at {self.commit[:12]}"
            files, folders = self.inner[""]
            listed = ", ".join(shown(n) for n in sorted({*files, *folders})[:8])
            raise error("not_found", f"{at} has no {shown(inside)}; it has {listed or 'no files'}")
        names, inner = self.inner[folder]
        front = f"{folder}/" if folder else ""
        bundle = Bundle(
            name,
            tuple(names),
            lambda file: self.open(front + file),
            chosen,
            self.cache / folder if here else None,
            tuple(sorted(n for n in inner if n[:1] != ".")),
            origin=origin,
            addressed=True,
            outer=(lambda: self.bundle(name, folder.rpartition("/")[0])) if folder else None,
        )
        return replace(
            bundle,
            inner=lambda inner: self.bundle(bundle.typed(inner), front + inner, here=here),
        )

    def below(self, folder: str) -> list[str]:
        """Every file in a folder and its sub-folders."""
        front = f"{folder}/" if folder else ""
        return sorted(p for p in self.entries if p.startswith(front))


def bundle(address: Address, name: str | None = None) -> Bundle:
    """What stands at an address, pinned to a commit; only headers will be read, as they are needed.

    Offline it is what the cache holds of it. Raises NotFoundError, AccessError, NetworkError.
    """
    return _tree(address).bundle(name or str(address), address.inside)


def fetched(
    address: Address,
    patterns: Sequence[str] | None = None,
    name: str | None = None,
    *,
    progress: Progress | None = None,
) -> Bundle:
    """What stands at an address, with the files that any pattern names in the library's cache.

    Patterns are globs of paths below the address's folder; None is all of them. A file that the
    address itself names is always among them. `progress` is told bytes done and in all.
    Raises what `bundle` raises, and StorageError `disk_full` before anything is fetched.
    """
    tree, inside = _tree(address), address.inside
    found = tree.bundle(name or str(address), inside, here=True)
    folder = inside if found.chosen is None else inside.rpartition("/")[0]
    skip = len(folder) + 1 if folder else 0
    wanted = [
        path
        for path in tree.below(folder)
        if path == inside
        or patterns is None
        or any(fnmatchcase(path[skip:], pattern) for pattern in patterns)
    ]
    missing = [path for path in wanted if tree.cached(path) is None]
    if missing:
        _require_portable(tree.repo, wanted)
        _fetch(tree, missing, progress)
    return found


def cached(origin: Origin) -> Bundle | None:
    """What the cache holds of a commit, without any contact; None where it holds nothing."""
    tree = _cached_tree(origin.repo, origin.commit)
    if tree is None or not any(
        p == origin.inside or p.startswith(f"{origin.inside}/" if origin.inside else "")
        for p in tree.entries
    ):
        return None
    return tree.bundle(str(origin), origin.inside, here=True)


# ------------------------------------------------------------------------------- listing


def _tree(address: Address) -> Tree:
    api = access.api()
    revision = address.revision or ""
    with access.translated(f"reading {shown(address)}", repo=address.repo, revision=revision):
        found = patiently(
            lambda: api.resolve_revision(address.repo, revision=address.revision or None)
        )
        commit = found.resolved
    kept = _kept_listing(address.repo, commit)
    if kept is not None:
        return kept
    if access.offline():
        tree = _cached_tree(address.repo, commit)
        if tree is None:
            what = f"offline mode is on, and the cache holds nothing of {shown(address)}"
            raise error("offline", f"{what} (commit {commit[:12]})")
        return tree
    try:
        return _listed(address.repo, commit, str(api.endpoint), _snapshot(address.repo, commit))
    except NetworkError as cause:
        if _snapshot(address.repo, commit).is_dir():
            hint = "; the cache holds files of this commit: HF_HUB_OFFLINE=1 reads them"
            raise error(cause.code, cause.message + hint) from cause
        raise


@lru_cache(TREES)
def _listed(repo: str, commit: str, endpoint: str, cache: Path) -> Tree:
    """A commit's files as the Hub lists them; `endpoint` and `cache` keep two Hubs apart."""
    from huggingface_hub import RepoFile

    entries: dict[str, Entry] = {}
    with access.translated(f"listing the files of {shown(repo)}", repo=repo):
        for found in access.api().list_repo_tree(repo, recursive=True, revision=commit):
            if not isinstance(found, RepoFile):
                continue
            _require_plain(repo, found.path)
            entries[found.path] = Entry(found.size, found.lfs.sha256 if found.lfs else None)
            if len(entries) > MOST:
                raise error("hostile", f"{shown(repo)} lists more than {MOST:,} files")
    return Tree(repo, commit, entries, cache)


def _require_plain(repo: str, path: str) -> None:
    """MalformedError `hostile` for a name that is no path within a folder."""
    parts = PurePosixPath(path).parts
    plain = 0 < len(path) <= LONGEST and "/".join(parts) == path and not path.startswith("/")
    if not plain or ".." in parts or any(c in path for c in "\\\0") or len(parts) > DEEPEST:
        raise error("hostile", f"{shown(repo)} lists a file {shown(path)}")


def _require_portable(repo: str, paths: Sequence[str]) -> None:
    """MalformedError `hostile` for names among those to be written that some system cannot hold."""
    for path in paths:
        if not is_portable(path):
            words = f"{shown(repo)} lists a file {shown(path)}, which Windows cannot hold"
            raise error("hostile", words)
    if found := clash(paths):
        words = f"{shown(repo)} lists {shown(found[0])} and {shown(found[1])}"
        raise error("hostile", f"{words}, which are one file where case does not count")


def _snapshot(repo: str, commit: str) -> Path:
    """Where the library's cache keeps a commit (its documented layout)."""
    from huggingface_hub import constants

    folder = "models--" + repo.replace("/", "--")
    return Path(constants.HF_HUB_CACHE).expanduser().absolute() / folder / "snapshots" / commit


def _kept_listing(repo: str, commit: str) -> Tree | None:
    """A commit's files as the library's cache lists them once it has fetched any of them.

    The file is huggingface_hub:_tree_cache.py's; another version of it is asked for anew.
    """
    cache = _snapshot(repo, commit)
    file = cache.parent.parent / "trees" / f"{commit}.json"
    try:
        table = loads(file.read_bytes(), str(file), limit=LISTING)
        if not isinstance(table, dict) or table.get("format_version") != 1:
            return None
        entries = {
            str(path): Entry(int(said["size"]), said.get("lfs_sha256"))
            for path, said in table["files"].items()
        }
        for path in entries:
            _require_plain(repo, path)
    except (OSError, LoratoolsError, ValueError, KeyError, TypeError, AttributeError):
        return None  # none, or damaged: the Hub still has it
    return Tree(repo, commit, entries, cache)


def _cached_tree(repo: str, commit: str) -> Tree | None:
    cache = _snapshot(repo, commit)
    entries: dict[str, Entry] = {}
    for place, _, names in os.walk(cache):
        for name in names:
            path = Path(place, name)
            if path.is_file():  # no link whose file is gone
                entries[path.relative_to(cache).as_posix()] = Entry(path.stat().st_size)
    return Tree(repo, commit, entries, cache) if entries else None


# ------------------------------------------------------------------------------- fetching


def _fetch(tree: Tree, paths: Sequence[str], progress: Progress | None) -> None:
    """Bring files into the cache by the library, whole and as the Hub lists them."""
    if access.offline():
        what = f"{shown(tree.repo)} at {tree.commit[:12]}: {shown(paths[0])}"
        raise error("offline", f"{what} is not in the cache, and offline mode is on")
    api, exact = access.api(), [escape(path) for path in paths]
    disk = next(place for place in tree.cache.parents if place.exists())
    with access.translated(f"fetching {shown(tree.repo)}", repo=tree.repo):
        free, needed = free_bytes(disk), sum(tree.entries[path].size for path in paths)
        if needed + SPARE > free:  # some of it may be there already, from another commit
            plans = api.snapshot_download(
                tree.repo, revision=tree.commit, allow_patterns=exact, dry_run=True,
                tqdm_class=_bars(None, 0),
            )  # fmt: skip
            needed = sum(int(plan.file_size or 0) for plan in plans if plan.will_download)
        if needed and needed + SPARE > free:
            raise error(
                "disk_full",
                f"{shown(tree.repo)}: {needed + SPARE:,} bytes needed, {free:,} free in "
                f"{shown(disk)}; free space, or set HF_HOME to another disk",
            )
        api.snapshot_download(
            tree.repo, revision=tree.commit, allow_patterns=exact,
            tqdm_class=_bars(progress, sum(tree.entries[path].size for path in paths)),
        )  # fmt: skip
    for path in paths:
        place, due = tree.cached(path), tree.entries[path]
        whole = place is not None
        if place is not None and due.sha256 is not None and due.size <= CHECKED:
            whole = LocalFile(place).fingerprint() == due.sha256
        if not whole:
            kept = tree.cache / path
            raise error(
                "storage",
                f"{shown(tree.repo)}: {shown(path)} did not arrive as the Hub lists it; delete "
                f"{shown(kept.resolve())} and run again",
            )


def _bars(progress: Progress | None, total: int) -> type[Any]:
    """The library's bars without any print: one of them tells `progress` instead."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Told(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.told = 0 if options.get("name") == BYTES else None
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if self.told is not None and progress is not None:
                self.told = min(total, self.told + int(n or 0))
                progress(self.told, total)
            return None

    return Told
