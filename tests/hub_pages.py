"""The pages of the test Hub: what each request of the real client gets as its answer.

Sources: huggingface_hub 2.4.0 (hf_api.py, _commit_api.py, lfs.py, file_download.py), read for what
it sends and what it reads from the answers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote

from tests.hub_repos import LONG_AGO, Account, Blob, Commit, Pull, Refusal, Repo, mistakes

if TYPE_CHECKING:
    from tests.hub_server import HubServer

BAD_TOKEN = "Invalid credentials in Authorization header"


@dataclass
class Asked:
    """One request, and how many bytes its answer's body had."""

    method: str
    path: str
    query: dict[str, list[str]]
    url: str  # path and query, as sent
    headers: dict[str, str]
    body: bytes
    is_hub: bool
    sent: int = 0

    @property
    def size(self) -> int:
        return len(self.body)

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Answer:
    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    span: tuple[int, int] | None = None
    cut: bool = False


Page = Callable[..., Any]
HUB: list[tuple[str, re.Pattern[str], Page]] = []
CDN: list[tuple[str, re.Pattern[str], Page]] = []
NAME = r"(?P<id>[\w.-]+(?:/[\w.-]+)?)"


def on(methods: str, path: str, table: list[tuple[str, re.Pattern[str], Page]] = HUB) -> Any:
    """Puts a page at a path; ID stands for a repository, other parts in braces for one segment."""
    shape = path.replace("ID", NAME)
    shape = re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", shape)
    shape = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", shape)

    def put(made: Page) -> Page:
        table.append((methods, re.compile(shape), made))
        return made

    return put


def page(hub: HubServer, asked: Asked) -> Answer:
    """The answer to a request; whoever asks is known before anything else."""
    here = Here(hub, asked)
    for methods, shape, made in HUB if asked.is_hub else CDN:
        found = shape.fullmatch(asked.path)
        if found and re.fullmatch(methods, asked.method):
            given = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
            answer = made(here, **given)
            return answer if isinstance(answer, Answer) else Answer(answer)
    raise Refusal(404, f"Sorry, we can't find the page {asked.path}")


@dataclass
class Here:
    """One request at the Hub, and who asks."""

    hub: HubServer
    asked: Asked

    def __post_init__(self) -> None:
        token = self.asked.token
        if not self.asked.is_hub:
            if token:
                raise Refusal(400, "Only one auth mechanism allowed: the link is signed already")
        elif token and token not in self.hub.tokens:
            raise Refusal(401, BAD_TOKEN)

    @property
    def who(self) -> Account | None:
        return self.hub.tokens[self.asked.token] if self.asked.token else None

    def known(self) -> Account:
        if self.who is None:
            raise Refusal(401, "Invalid username or password.")
        return self.who

    def repo(self, id: str) -> Repo:
        """The repository, if whoever asks may know of it."""
        repo = self.hub.repos.get(id)
        if repo is None or (repo.private and not (self.who and self.who.owns(id))):
            raise Refusal(404 if self.who else 401, "Repository not found", "RepoNotFound")
        return repo

    def readable(self, id: str) -> Repo:
        """The repository, if whoever asks may read its files."""
        repo, who = self.repo(id), self.who
        if repo.gated and not (who and (who.owns(id) or who.name in repo.accepted)):
            words = f"Access to model {id} is restricted and you are not in the authorized list."
            raise Refusal(403 if who else 401, words, "GatedRepo")
        return repo

    def writable(self, id: str, *, pull: Pull | None = None) -> Repo:
        """The repository, if whoever asks may write to it (or to this pull request of theirs)."""
        who, repo = self.known(), self.repo(id)
        mine = who.owns(id) or (pull is not None and pull.author == who.name)
        if not mine or who.role != "write":
            raise Refusal(403, f"You don't have the rights to write to {id} with this token")
        return repo

    def for_commit(self, id: str, revision: str) -> Repo:
        """The repository, if a commit to this revision, or a pull request, is allowed."""
        repo = self.repo(id)
        if self.asked.flag("create_pr"):
            if self.known().role != "write":
                raise Refusal(403, "You need a write token to open a pull request")
            return repo
        pull = next((p for p in repo.pulls.values() if p.ref == revision), None)
        return self.writable(id, pull=pull)


@on("GET", "/api/whoami-v2")
def whoami(here: Here) -> Any:
    who = here.known()
    return {
        "type": "user",
        "name": who.name,
        "orgs": [{"name": name} for name in who.orgs],
        "auth": {"type": "access_token", "accessToken": {"role": who.role}},
    }


@on("GET", "/api/agent-harnesses")
def harnesses(here: Here) -> Any:
    return {"standardEnvVars": [], "harnesses": {}}


@on("POST", "/api/validate-yaml")
def validate_yaml(here: Here) -> Any:
    found = [{"message": words} for words in mistakes(here.asked.json["content"])]
    return Answer({"errors": found, "warnings": []}, 400 if found else 200)


@on("POST", "/api/repos/create")
def create_repo(here: Here) -> Any:
    said, who = here.asked.json, here.known()
    id = f"{said.get('organization') or who.name}/{said['name']}"
    url = f"{here.hub.url}/{id}"
    if not who.owns(id) or who.role != "write":
        raise Refusal(403, f"You don't have the rights to create a model under {id.split('/')[0]}")
    if id in here.hub.repos:
        return Answer({"error": "You already created this model repo", "url": url}, 409)
    private = said.get("visibility") == "private" or said.get("private") is True
    here.hub.repos[id] = Repo(id, private=private)
    return {"url": url, "name": id, "id": id}


@on("DELETE", "/api/repos/delete")
def delete_repo(here: Here) -> Any:
    said, who = here.asked.json, here.known()
    id = f"{said.get('organization') or who.name}/{said['name']}"
    here.writable(id)
    del here.hub.repos[id]
    return {}


@on("GET", "/api/models/ID/auth-check")
def may_read(here: Here, id: str) -> Any:
    here.readable(id)
    return {}


@on("GET", "/api/models/ID/auth-check/write")
def may_write(here: Here, id: str) -> Any:
    here.writable(id)
    return {}


@on("GET", "/api/models/ID(?:/revision/{rev})?")
def about(here: Here, id: str, rev: str = "main") -> Any:
    repo, asked = here.repo(id), here.asked
    commit, card = repo.at(rev), repo.card
    bases = card.get("base_model") or []
    said = {
        "id": id,
        "modelId": id,
        "author": id.partition("/")[0],
        "sha": commit.oid,
        "lastModified": LONG_AGO,
        "createdAt": LONG_AGO,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [
            *card.get("tags", ()),
            *(f"base_model:{base}" for base in (bases if isinstance(bases, list) else [bases])),
        ],
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "cardData": card,
        "siblings": [sibling(path, blob, asked) for path, blob in commit.files.items()],
    }
    wanted = asked.query.get("expand") or asked.query.get("expand[]")
    return {k: v for k, v in said.items() if k == "id" or k in wanted} if wanted else said


def sibling(path: str, blob: Blob, asked: Asked) -> dict[str, Any]:
    if not asked.flag("blobs"):
        return {"rfilename": path}
    more = {"rfilename": path, "size": blob.size, "blobId": blob.oid}
    large = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return more | ({"lfs": large} if blob.lfs else {})


@on("GET", "/api/models/ID/refs")
def refs(here: Here, id: str) -> Any:
    repo = here.repo(id)

    def under(start: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(start), "ref": ref, "targetCommit": oid}
            for ref, oid in repo.refs.items()
            if ref.startswith(start)
        ]

    said = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
    return said | ({"pullRequests": under("refs/pr/")} if here.asked.flag("include_prs") else {})


@on("GET", "/api/models/ID/commits/{rev}")
def commits(here: Here, id: str, rev: str) -> Any:
    return [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": LONG_AGO,
        }
        for commit in here.repo(id).history(rev)
    ]


def entry(path: str, commit: Commit, expand: bool = False) -> dict[str, Any]:
    """A file or a folder, as trees list it."""
    blob = commit.files.get(path)
    if blob is None:
        oid = hashlib.sha1(f"{commit.oid}/{path}".encode()).hexdigest()
        said: dict[str, Any] = {"type": "directory", "path": path, "oid": oid, "size": 0}
    else:
        said = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        if blob.lfs:
            said["lfs"] = {
                "oid": blob.sha256,
                "size": blob.size,
                "pointerSize": len(blob.pointer),
            }
        if blob.xet:
            said["xetHash"] = blob.xet
    if expand:
        said["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": LONG_AGO}
    return said


def folders_of(files: Mapping[str, Blob]) -> set[str]:
    return {
        "/".join(parts[:n]) for f in files for parts in [f.split("/")] for n in range(1, len(parts))
    }


def missing(path: str, commit: Commit) -> Refusal:
    words = f"{path} does not exist"
    return Refusal(404, words, "EntryNotFound", **{"X-Repo-Commit": commit.oid})


@on("GET", "/api/models/ID/tree/{rev}(?:/{inside*})?")
def tree(here: Here, id: str, rev: str, inside: str = "") -> Any:
    asked, commit = here.asked, here.repo(id).at(rev)
    start = f"{inside}/" if inside else ""
    paths = sorted(p for p in {*commit.files, *folders_of(commit.files)} if p.startswith(start))
    if inside and not paths:
        raise missing(inside, commit)
    if not asked.flag("recursive"):
        paths = [p for p in paths if "/" not in p[len(start) :]]
    first = int(asked.query.get("cursor", ["0"])[0])
    last = first + here.hub.entries
    answer = Answer([entry(p, commit, asked.flag("expand")) for p in paths[first:last]])
    if last < len(paths):
        query = "&".join(
            f"{k}={quote(v)}" for k, vs in asked.query.items() if k != "cursor" for v in vs
        )
        link = f"{here.hub.url}{asked.path}?{query}&cursor={last}"
        answer.headers["Link"] = f'<{link}>; rel="next"'
    return answer


@on("POST", "/api/models/ID/paths-info/{rev}")
def paths_info(here: Here, id: str, rev: str) -> Any:
    commit = here.repo(id).at(rev)
    form = parse_qs(here.asked.body.decode())
    there = {*commit.files, *folders_of(commit.files)}
    expand = form.get("expand", [""])[0].lower() == "true"
    return [entry(path, commit, expand) for path in form.get("paths", []) if path in there]


@on("POST", "/api/models/ID/branch/{name}")
def create_branch(here: Here, id: str, name: str) -> Any:
    repo = here.writable(id)
    if f"refs/heads/{name}" in repo.refs:
        raise Refusal(409, f"Reference already exists: {name}")
    repo.refs[f"refs/heads/{name}"] = repo.at(here.asked.json.get("startingPoint", "main")).oid
    return {}


@on("POST", "/api/models/ID/tag/{rev}")
def create_tag(here: Here, id: str, rev: str) -> Any:
    repo, ref = here.writable(id), f"refs/tags/{here.asked.json['tag']}"
    if ref in repo.refs:
        raise Refusal(409, f"Tag reference exists already: {here.asked.json['tag']}")
    repo.refs[ref] = repo.at(rev).oid
    return {}


@on("DELETE", "/api/models/ID/{kind}/{name}")
def delete_ref(here: Here, id: str, kind: str, name: str) -> Any:
    repo, ref = here.writable(id), {"branch": "refs/heads/", "tag": "refs/tags/"}[kind] + name
    if repo.refs.pop(ref, None) is None:
        raise Refusal(404, f"no {kind} {name}", "RevisionNotFound")
    return {}
