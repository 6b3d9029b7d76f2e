"""The test Hub's discussions and pull requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.hub_pages import Here, on
from tests.hub_repos import LONG_AGO, Pull, Refusal, Repo

if TYPE_CHECKING:
    from tests.hub_server import HubServer


def about_pull(hub: HubServer, repo: Repo, pull: Pull) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if pull.changes:
        more = {"filesWithConflicts": [], "diff": "", "changes": {"base": pull.base}}
        if pull.merged:
            more["changes"]["mergeCommitId"] = pull.merged
    return more | {
        "num": pull.num,
        "title": pull.title,
        "author": {"name": pull.author},
        "createdAt": LONG_AGO,
        "status": pull.status,
        "isPullRequest": pull.changes,
        "repo": {"name": repo.id, "type": "model"},
        "events": [event(n, pull.author, raw) for n, raw in enumerate(pull.comments)],
    }


def event(n: int, author: str, raw: str) -> dict[str, Any]:
    return {
        "id": f"event-{n}",
        "type": "comment",
        "createdAt": LONG_AGO,
        "author": {"name": author},
        "data": {"edited": False, "hidden": False, "latest": {"raw": raw}},
    }


@on("GET", "/api/models/ID/discussions")
def discussions(here: Here, id: str) -> Any:
    repo = here.repo(id)
    found = [about_pull(here.hub, repo, pull) for pull in repo.pulls.values()]
    return {"discussions": found, "count": len(found), "start": 0}


@on("POST", "/api/models/ID/discussions")
def open_discussion(here: Here, id: str) -> Any:
    repo, said, who = here.repo(id), here.asked.json, here.known()
    if who.role != "write":
        raise Refusal(403, "You need a write token to open a discussion")
    pull = repo.open_pull(said["title"], who.name)
    pull.comments.append(said.get("description", ""))
    if not said.get("pullRequest"):
        pull.changes, pull.status = False, "open"
        del repo.refs[pull.ref]
    return {"num": pull.num}


@on("GET", "/api/models/ID/discussions/{num}")
def discussion(here: Here, id: str, num: str) -> Any:
    repo = here.repo(id)
    if int(num) not in repo.pulls:
        raise Refusal(404, f"no discussion {num}")
    return about_pull(here.hub, repo, repo.pulls[int(num)])


@on("POST", "/api/models/ID/discussions/{num}/{what}")
def change_discussion(here: Here, id: str, num: str, what: str) -> Any:
    repo, said = here.repo(id), here.asked.json
    pull = repo.pulls[int(num)]
    if what == "comment":
        pull.comments.append(said["comment"])
        return {"newMessage": event(len(pull.comments), here.known().name, said["comment"])}
    here.writable(id, pull=pull if what == "status" else None)
    if what == "status":
        pull.status = said["status"]
        said = {"id": "x", "type": "status-change", "createdAt": LONG_AGO, "data": said}
        return {"newStatus": said}
    if what != "merge" or pull.status in ("merged", "closed"):
        raise Refusal(400, f"pull request {num} is {pull.status}")
    changed = repo.at(pull.ref).files
    base = repo.at(pull.base).files
    gone = [path for path in base if path not in changed]
    title = f"{pull.title} (#{num})"
    pull.merged = repo.commit(pull.base, changed, title, gone=gone, author=here.known().name).oid
    pull.status = "merged"
    return {}
