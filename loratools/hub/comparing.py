"""What a push would change: the files of a repository beside those that are to be there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from loratools.errors import Problem, error, shown
from loratools.hub.patience import patiently

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from loratools.hub.artefact import File

Action = Literal["new", "changed", "same"]
_SHARD = re.compile(
    r"(?P<stem>.+?)(-\d{5,6}-of-\d{5,6})?(?P<end>\.safetensors|\.gguf)(\.index\.json)?"
)
_PIECE = 1 << 22
MOST = 200_000  # files and folders of a repository
FILES = 250  # of one commit
REGULAR = 100_000_000  # bytes of files that go into the commit itself
LARGE = 10_000_000  # bytes from which a file belongs into the large file storage
WEIGHTS = (".safetensors", ".onnx", ".gguf", ".onnx_data", ".onnx.data", ".ort")


@dataclass(frozen=True, slots=True)
class There:
    """A file of a repository; `sha256` of large ones, `blob` is what git calls it."""

    size: int
    blob: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Remote:
    """A repository at one commit; `head` is None where the revision is yet to be made."""

    repo: str
    revision: str
    exists: bool = False
    private: bool | None = None
    head: str | None = None
    files: Mapping[str, There] = field(default_factory=dict)

    @property
    def visibility(self) -> str | None:
        return None if self.private is None else "private" if self.private else "public"


@dataclass(frozen=True, slots=True)
class Compared:
    """One file of ours, and what a push does with it."""

    file: File
    sha256: str
    action: Action
    large: bool | None = None  # how the Hub keeps it; None: it has not said

    @property
    def name(self) -> str:
        return self.file.name


@dataclass(frozen=True, slots=True)
class Difference:
    """All files of ours against a repository, what only the repository has, and what is wrong."""

    remote: Remote
    files: tuple[Compared, ...]
    kept: tuple[str, ...] = ()  # on the Hub only; nothing is deleted
    problems: tuple[Problem, ...] = ()

    @property
    def sent(self) -> list[Compared]:
        """What is to be sent."""
        return [one for one in self.files if one.action != "same"]

    @property
    def nbytes(self) -> int:
        return sum(one.file.size for one in self.sent)


def look(api: HfApi, repo: str, revision: str = "main") -> Remote:
    """A repository as it is now, pinned to a commit; one that does not exist is no error.

    Raises what the library raises for all else.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        found = patiently(lambda: api.repo_info(repo))
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return Remote(repo, revision)
    private = bool(found.private)
    try:
        head = found.sha
        if revision != "main":
            head = patiently(lambda: api.repo_info(repo, revision=revision)).sha
    except RevisionNotFoundError:
        return Remote(found.id, revision, True, private)
    return Remote(
        found.id, revision, True, private, head, listed(api, found.id, head) if head else {}
    )


def listed(api: HfApi, repo: str, commit: str) -> dict[str, There]:
    """All files of a commit."""
    from huggingface_hub.hf_api import RepoFile

    entries = patiently(
        lambda: list(islice(api.list_repo_tree(repo, revision=commit, recursive=True), MOST + 1))
    )
    if len(entries) > MOST:
        raise error("hostile", f"{shown(repo)} lists more than {MOST:,} files and folders")
    return {
        one.path: There(one.size, one.blob_id, one.lfs.sha256 if one.lfs else None)
        for one in entries
        if isinstance(one, RepoFile)
    }


def difference(
    ours: Sequence[File], remote: Remote, *, hashed: Callable[[File], str] | None = None
) -> Difference:
    """Each file of ours as new, changed or the same; offline, from what is known of both."""
    compared = []
    for file in ours:
        there = remote.files.get(file.name)
        digest = hashed(file) if hashed else file.sha256()
        action: Action = (
            "new" if there is None else "same" if same(file, digest, there) else "changed"
        )
        large = None if there is None else there.sha256 is not None
        compared.append(Compared(file, digest, action, large))
    names = {file.name for file in ours}
    kept = tuple(name for name in remote.files if name not in names)
    found = Difference(remote, tuple(compared), kept)
    problems = (*_stale(names, kept, remote.repo), *_too_much(found.sent))
    return replace(found, problems=problems)


def same(file: File, sha256: str, there: There) -> bool:
    """Whether the Hub holds exactly this file."""
    if there.size != file.size:
        return False
    if there.sha256 is not None:
        return there.sha256 == sha256
    return there.blob == git_blob(file)


def git_blob(file: File) -> str:
    """What git calls a file's content (its SHA-1 behind a header)."""
    found = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    if file.replaced is not None:
        found.update(file.replaced)
        return found.hexdigest()
    with Path(file.path).open("rb") as stream:
        while piece := stream.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def wrong(files: Iterable[Compared], there: Mapping[str, There]) -> list[Problem]:
    """The files that a commit does not hold as they were sent."""
    found = []
    for one in files:
        held = there.get(one.name)
        if held is None:
            found.append(f"{shown(one.name)}: it was sent and is not there")
        elif not same(one.file, one.sha256, held):
            theirs = held.sha256 or held.blob
            found.append(
                f"{shown(one.name)}: the Hub holds {held.size} bytes ({theirs[:12]}), "
                f"{one.file.size} bytes were to be sent ({one.sha256[:12]})"
            )
    remedy = "run the same command again; if it goes on like this, something changes the bytes"
    return [Problem("proof_failed", words, remedy=remedy) for words in found]


def _stale(names: set[str], kept: Iterable[str], repo: str) -> list[Problem]:
    """Shards and indices of another model of the same name: readers would take them up."""
    ours = {key for name in names if (key := _family(name))}
    stale = sorted(name for name in kept if (key := _family(name)) and key in ours)
    if not stale:
        return []
    listed = ", ".join(shown(name) for name in stale[:3]) + (", ..." if len(stale) > 3 else "")
    count = f"{len(stale)} files" if len(stale) > 1 else "a file"
    return [
        Problem(
            "stale_shards",
            f"{repo} has {count} of another model beside which these would lie: {listed}",
            remedy=f"hf repos delete-files {repo} {' '.join(stale[:3])}"
            + (" ..." if len(stale) > 3 else "")
            + ", or publish to another repository",
        )
    ]


def _family(name: str) -> tuple[str, str, str] | None:
    """What the parts of one set of weights have in common: folder, first part of the name, sort."""
    path = PurePosixPath(name)
    found = _SHARD.fullmatch(path.name)
    return (str(path.parent), found["stem"], found["end"]) if found else None


def _too_much(sent: Sequence[Compared]) -> list[Problem]:
    """What one commit cannot hold."""
    found = []
    if len(sent) > FILES:
        found.append(f"{len(sent)} files are to be sent; one commit takes {FILES}")
    regular = sum(
        one.file.size
        for one in sent
        if not (one.large or one.file.size > LARGE or one.name.endswith(WEIGHTS))
    )
    if regular > REGULAR:
        found.append(
            f"{regular / 1e6:.0f} MB of small files are to be sent; one commit takes "
            f"{REGULAR / 1e6:.0f} MB of them"
        )
    remedy = "leave some out with --exclude, or publish in parts with --include"
    return [Problem("unpublishable", words, remedy=remedy) for words in found]
