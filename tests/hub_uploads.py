"""How files come to the test Hub: which way each goes, their bytes, and the commit."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
from typing import TYPE_CHECKING, Any

from tests import hub_xet
from tests.hub_pages import CDN, Answer, Here, on
from tests.hub_repos import Blob, Refusal, mistakes

if TYPE_CHECKING:
    from tests.hub_server import HubServer


@on("POST", "/api/models/ID/preupload/{rev}")
def preupload(here: Here, id: str, rev: str) -> Any:
    repo, said = here.for_commit(id, rev), here.asked.json
    there = repo.at(rev).files
    ignored = [line for line in said.get("gitIgnore", "").splitlines() if line]

    def way(wanted: dict[str, Any]) -> dict[str, Any]:
        path, sample = wanted["path"], base64.b64decode(wanted["sample"])
        large = repo.is_large(path, wanted["size"], sample, rev)
        known = {"oid": there[path].etag} if path in there else {}
        return known | {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
        }

    return {"files": [way(wanted) for wanted in said["files"]]}


@on("POST", "/ID\\.git/info/lfs/objects/batch")
def batch(here: Here, id: str) -> Any:
    hub, said = here.hub, here.asked.json
    here.repo(id)
    here.known()
    in_parts = bool(hub.chunk) and "multipart" in said["transfers"]

    def actions(oid: str, size: int) -> dict[str, Any]:
        if oid in hub.stored:
            return {}
        upload: dict[str, Any] = {"href": f"{hub.cdn}/put/{oid}?signature=of-the-hub"}
        if hub.chunk and in_parts:
            parts = range(1, -(-size // hub.chunk) + 1)
            upload = {
                "href": f"{hub.cdn}/complete/{oid}?signature=of-the-hub",
                "header": {"chunk_size": str(hub.chunk)}
                | {str(n): f"{hub.cdn}/part/{oid}/{n}?signature=of-the-hub" for n in parts},
            }
        return {"upload": upload, "verify": {"href": f"{hub.url}/{id}.git/info/lfs/verify"}}

    return {
        "transfer": "multipart" if in_parts else "basic",
        "objects": [
            {"oid": wanted["oid"], "size": wanted["size"]}
            | ({"actions": found} if (found := actions(wanted["oid"], wanted["size"])) else {})
            for wanted in said["objects"]
        ],
    }


def keep(here: Here, oid: str, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refusal(400, "BadDigest: the bytes are not those that were announced")
    here.hub.stored[oid] = content


@on("PUT", "/put/{oid}", CDN)
def put(here: Here, oid: str) -> Any:
    keep(here, oid, here.asked.body)
    return b""


@on("PUT", "/part/{oid}/{n}", CDN)
def put_part(here: Here, oid: str, n: str) -> Any:
    here.hub.parts.setdefault(oid, {})[int(n)] = here.asked.body
    return Answer(headers={"ETag": hashlib.md5(here.asked.body).hexdigest()})


@on("POST", "/complete/{oid}", CDN)
def complete(here: Here, oid: str) -> Any:
    parts, said = here.hub.parts.pop(oid), here.asked.json
    for part in said["parts"]:
        if part["etag"] != hashlib.md5(parts[part["partNumber"]]).hexdigest():
            raise Refusal(400, "InvalidPart")
    keep(here, said["oid"], b"".join(parts[n] for n in sorted(parts)))
    return {}


@on("POST", "/ID\\.git/info/lfs/verify")
def verify(here: Here, id: str) -> Any:
    here.known()
    held, said = here.hub.stored.get(here.asked.json["oid"]), here.asked.json
    if held is None or len(held) != said["size"]:
        raise Refusal(404, "the object is not stored, or has another size")
    return {}


@on("GET", "/api/models/ID/xet-{kind}-token/{rev}")
def xet_token(here: Here, id: str, kind: str, rev: str) -> Any:
    here.for_commit(id, rev) if kind == "write" else here.readable(id)
    if here.hub.xet is None:
        raise Refusal(404, "Xet is off here")
    url = f"local://{here.hub.xet}"
    return Answer(
        {"casUrl": url, "accessToken": "xet", "exp": 4102444800},
        headers={
            "X-Xet-Cas-Url": url,
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": "4102444800",
        },
    )


@on("POST", "/api/models/ID/commit/{rev}")
def commit(here: Here, id: str, rev: str) -> Any:
    repo, hub, asked = here.for_commit(id, rev), here.hub, here.asked
    lines = [json.loads(line) for line in asked.body.splitlines() if line.strip()]
    header, files, gone = lines[0]["value"], {}, []
    head = repo.at(rev)
    if header.get("parentCommit") not in (None, head.oid):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    for line in lines[1:]:
        said = line["value"]
        match line["key"]:
            case "file":
                files[said["path"]] = Blob(base64.b64decode(said["content"]))
            case "lfsFile":
                files[said["path"]] = large_file(hub, said["oid"], said.get("size"))
            case "deletedFile" | "deletedFolder":
                gone.append(said["path"].rstrip("/"))
            case other:
                raise Refusal(400, f"unknown operation {other}")
    if "README.md" in files and (wrong := mistakes(files["README.md"].content.decode())):
        raise Refusal(400, f"Invalid metadata in README.md: {wrong[0]}")
    author, pull = here.known().name, None
    if asked.flag("create_pr"):
        pull = repo.open_pull(header["summary"], author, rev)
        pull.status, rev = "open", pull.ref
    made = repo.commit(
        rev, files, header["summary"], header.get("description", ""), gone=gone, author=author
    )
    answer = {
        "success": True,
        "commitOid": made.oid,
        "commitUrl": f"{hub.url}/{id}/commit/{made.oid}",
    }
    return answer | ({"pullRequestUrl": f"{hub.url}/{id}/discussions/{pull.num}"} if pull else {})


def large_file(hub: HubServer, oid: str, size: int | None) -> Blob:
    held = hub.stored.get(oid)
    if held is None and hub.xet and (blob := hub_xet.blobs(hub.xet).get(oid)):
        return blob
    if held is None or (size is not None and len(held) != size):
        raise Refusal(400, f"LFS object {oid} is not stored, or has another size")
    return Blob(held, lfs=True)
