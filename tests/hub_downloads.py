"""How files leave the test Hub: metadata, ranges, links to the second origin."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

from tests.hub_pages import CDN, Answer, Here, missing, on
from tests.hub_repos import Blob, Refusal


@on("GET|HEAD", "/ID/resolve/{rev}/{path*}")
def resolve(here: Here, id: str, rev: str, path: str) -> Any:
    hub = here.hub
    commit = here.readable(id).at(rev)
    blob = commit.files.get(path)
    if blob is None:
        raise missing(path, commit)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
    if blob.lfs:
        headers["X-Linked-Etag"] = f'"{blob.sha256}"'
        headers["X-Linked-Size"] = str(blob.size)
        headers["ETag"] = f'"{blob.sha256}"'
    if blob.xet and hub.xet:
        refresh = f"{hub.url}/api/models/{id}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": blob.xet, "X-Xet-Refresh-Route": refresh}
        headers["Link"] = f'<{refresh}>; rel="xet-auth"'
    if blob.lfs and hub.redirect:
        link = f"{hub.cdn}/blob/{id}/{commit.oid}/{quote(path)}?signature=of-the-hub"
        return Answer(b"", 302, headers | {"Location": link})
    return part(here, blob, headers)


@on("GET|HEAD", "/blob/{ns}/{name}/{oid}/{path*}", CDN)
def signed(here: Here, ns: str, name: str, oid: str, path: str) -> Any:
    blob = here.hub.repos[f"{ns}/{name}"].commits[oid].files[path]
    return part(here, blob, {"ETag": '"of-the-storage"', "Accept-Ranges": "bytes"})


def part(here: Here, blob: Blob, headers: dict[str, str]) -> Answer:
    """The whole file, or the range that was asked for."""
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", here.asked.headers.get("range", ""))
    headers["Content-Type"] = "application/octet-stream"
    if not wanted or here.asked.method == "HEAD":
        return Answer(blob, 200, headers)
    first, last = wanted.groups()
    start = int(first) if first else max(0, blob.size - int(last))
    end = min(blob.size, int(last) + 1) if first and last else blob.size
    if start >= blob.size:
        raise Refusal(416, "beyond the end", **{"Content-Range": f"bytes */{blob.size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size}"
    return Answer(blob, 206, headers, (start, end))
