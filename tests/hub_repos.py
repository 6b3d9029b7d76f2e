"""What the test Hub holds: blobs, commits, refs, pull requests, accounts and who may do what."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

LONG_AGO = "2026-01-01T00:00:00.000Z"
COMMIT = re.compile(r"[0-9a-f]{40}")
# As a fresh repository has it: these go to the large file storage whatever their size.
LARGE = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.gz *.h5 *.joblib *.model *.msgpack *.npy *.npz *.onnx "
    "*.parquet *.pb *.pickle *.pkl *.pt *.pth *.safetensors *.tar *.tflite *.wasm *.xz *.zip *.zst"
).split()
ATTRIBUTES = "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in LARGE).encode()
TEN_MB = 10_000_000


class Refusal(Exception):
    """An answer that says no: status, the words, and the code that the client looks for."""

    def __init__(self, status: int, words: str, code: str | None = None, **headers: str) -> None:
        super().__init__(words)
        self.status, self.words = status, words
        self.headers = {"X-Error-Message": words, **headers}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class Blob:
    """The bytes of one file; `claimed` makes it longer than it is, with zeros that nobody holds.

    xet, named: its hash there and its sha256, where the bytes are in Xet storage and not here.
    """

    content: bytes
    lfs: bool = False
    claimed: int | None = None
    xet: str | None = None
    named: str | None = None

    @property
    def size(self) -> int:
        return len(self.content) if self.claimed is None else self.claimed

    @cached_property
    def sha256(self) -> str:
        if self.named:
            return self.named
        extra = b"" if self.claimed is None else str(self.claimed).encode()
        return hashlib.sha256(self.content + extra).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {self.size}\n"
        ).encode()

    @cached_property
    def oid(self) -> str:
        """What git calls it: of a large file, its pointer."""
        held = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def read(self, start: int, end: int) -> bytes:
        real = self.content[start:end]
        return real + bytes(min(end, self.size) - start - len(real))


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    files: Mapping[str, Blob]
    title: str
    message: str = ""
    author: str = "me"


@dataclass
class Pull:
    """A discussion; with changes a pull request."""

    num: int
    title: str
    author: str
    base: str = "refs/heads/main"
    status: str = "draft"
    changes: bool = True
    merged: str | None = None
    comments: list[str] = field(default_factory=list)

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass(frozen=True)
class Account:
    """Whose token it is, what the token may do, and the organisations of its owner."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def owns(self, repo: str) -> bool:
        return repo.partition("/")[0] in (self.name, *self.orgs)


@dataclass
class Repo:
    """One repository of models, from its first commit on."""

    id: str
    private: bool = False
    gated: str | bool = False
    accepted: set[str] = field(default_factory=set)  # who may read a gated one
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": Blob(ATTRIBUTES)}, "initial commit")

    def full(self, revision: str) -> str:
        """The name of a ref as git writes it; RevisionNotFound where there is none."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return name
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def at(self, revision: str = "main") -> Commit:
        """The commit that a branch, tag, ref or commit id names."""
        if COMMIT.fullmatch(revision) and revision in self.commits:
            return self.commits[revision]
        return self.commits[self.refs[self.full(revision)]]

    @property
    def head(self) -> Commit:
        return self.at("main")

    @property
    def files(self) -> Mapping[str, Blob]:
        """The files of main."""
        return self.head.files

    def commit(
        self,
        revision: str,
        files: Mapping[str, Blob],
        title: str,
        message: str = "",
        *,
        gone: Iterable[str] = (),
        author: str = "me",
    ) -> Commit:
        """Adds and removes files on top of a branch or a pull request's ref."""
        ref = self.full(revision) if self.refs else f"refs/heads/{revision}"
        if ref.startswith("refs/tags/"):
            raise Refusal(400, f"{revision} is a tag: nothing is committed to it")
        parent = self.refs.get(ref)
        kept = dict(self.commits[parent].files) if parent else {}
        for path in gone:
            kept = {k: v for k, v in kept.items() if k != path and not k.startswith(path + "/")}
        tree = {**kept, **files}
        said = [self.id, len(self.commits), parent, title, [(k, tree[k].oid) for k in sorted(tree)]]
        oid = hashlib.sha1(json.dumps(said).encode()).hexdigest()
        self.commits[oid] = made = Commit(
            oid, parent, dict(sorted(tree.items())), title, message, author
        )
        self.refs[ref] = oid
        return made

    def open_pull(self, title: str, author: str, base: str = "main") -> Pull:
        pull = Pull(len(self.pulls) + 1, title, author, self.full(base))
        self.pulls[pull.num] = pull
        self.refs[pull.ref] = self.at(base).oid
        return pull

    def history(self, revision: str = "main") -> Iterator[Commit]:
        """From the newest to the first."""
        step: Commit | None = self.at(revision)
        while step:
            yield step
            step = self.commits[step.parent] if step.parent else None

    def is_large(self, path: str, size: int, sample: bytes, revision: str = "main") -> bool:
        """Whether a file is kept beside git: its name, its size or its first bytes say so."""
        held = self.at(revision).files.get(".gitattributes", Blob(b"")).content.decode()
        patterns = [line.split()[0] for line in held.splitlines() if "filter=lfs" in line]
        named = any(fnmatch.fnmatch(path.rpartition("/")[2], p) for p in patterns)
        return named or size > TEN_MB or b"\0" in sample

    @property
    def card(self) -> dict[str, object]:
        """The front matter of the card."""
        text = self.files.get("README.md", Blob(b"")).content.decode(errors="replace")
        return front_matter(text)


def front_matter(text: str) -> dict[str, object]:
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, re.DOTALL)
    said = yaml.safe_load(found[1]) if found else None
    return said if isinstance(said, dict) else {}


def mistakes(card: str) -> list[str]:
    """What the Hub refuses in a card's front matter; of all its rules those that people meet."""
    try:
        said = front_matter(card)
    except yaml.YAMLError as fault:
        return [f"YAML: {str(fault).splitlines()[0]}"]
    found = []
    for key in ("base_model", "datasets"):
        ids = said.get(key) or []
        for name in ids if isinstance(ids, list) else [ids]:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
                found.append(
                    f'"{key}" with value "{name}" is not valid. Use a model id from the Hub'
                )
    if "license" in said and not re.fullmatch(r"[a-z0-9.+-]+", str(said["license"])):
        found.append('"license" must be one of the known identifiers')
    if said.get("license") == "other" and not said.get("license_name"):
        found.append('"license_name" is required when license is other')
    return found


def blob_of(content: bytes | str | Path | Blob, large: bool | None, repo: Repo, path: str) -> Blob:
    """A file as a test seeds it: bytes, text, a local file, or a blob that is ready."""
    if isinstance(content, Blob):
        return content
    if isinstance(content, Path):
        content = content.read_bytes()
    if isinstance(content, str):
        content = content.encode()
    lfs = repo.is_large(path, len(content), content[:512]) if large is None else large
    return Blob(content, lfs=lfs and bool(content))
