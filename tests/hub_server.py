"""A Hub on loopback for the real client: two origins, a log of all requests, faults on demand."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests import hub_downloads, hub_pulls, hub_uploads
from tests.hub_pages import Answer, Asked, page
from tests.hub_repos import Account, Blob, Commit, Refusal, Repo, blob_of

PAGES = (hub_downloads, hub_pulls, hub_uploads)  # each adds its pages when it is imported
# Long enough to be told from any other text in an output.
WRITE = "hf_writeWRITEwriteWRITEwriteWRITEwrite"
READ = "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"
OTHER = "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"


@dataclass
class Fault:
    """What goes wrong the next `times` times that method and path (with its query) match.

    status: a number; "drop": the connection ends before anything is done; "drop-after-apply":
    after all is done, without an answer; "cut": in the middle of the answer; None: only `slow`.
    """

    method: str
    path: str
    times: int = 1
    status: int | str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    words: str = "a fault of the test"
    slow: float = 0.0

    def matches(self, asked: Asked) -> bool:
        return bool(
            self.times > 0
            and re.fullmatch(self.method, asked.method)
            and re.search(self.path, asked.url)
        )


class HubServer:
    """The Hub: `url` is its endpoint, `cdn` the second origin where signed links lead.

    redirect: large files are answered by a link to the second origin, as the real Hub does.
    chunk: uploads beyond this many bytes come in parts. entries: of a page of a tree.
    xet: a folder that takes the place of the Xet storage.
    """

    def __init__(self, *, redirect: bool = False, chunk: int | None = None) -> None:
        self.redirect, self.chunk, self.entries = redirect, chunk, 1000
        self.xet: Path | None = None
        self.tokens = {
            WRITE: Account("me", "write", ("team",)),
            READ: Account("me", "read", ("team",)),
            OTHER: Account("other", "write"),
        }
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # the large file storage, by sha256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.log: list[Asked] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._origins = [_Origin(self, is_hub=True), _Origin(self, is_hub=False)]
        self.url, self.cdn = (origin.url for origin in self._origins)

    def __enter__(self) -> HubServer:
        for origin in self._origins:
            origin.start()
        return self

    def __exit__(self, *_: object) -> None:
        for origin in self._origins:
            origin.stop()

    def put(
        self,
        repo: str,
        files: Mapping[str, bytes | str | Path | Blob] | Path,
        *,
        revision: str = "main",
        private: bool | None = None,
        gated: str | bool | None = None,
        message: str = "seeded",
        gone: tuple[str, ...] = (),
        large: bool | None = None,
    ) -> Commit:
        """One commit with these files (or all of a folder's), in a repository made if needed."""
        if isinstance(files, Path):
            files = {
                p.relative_to(files).as_posix(): p for p in sorted(files.rglob("*")) if p.is_file()
            }
        with self.lock:
            there = self.repos.setdefault(repo, Repo(repo))
            if private is not None:
                there.private = private
            if gated is not None:
                there.gated = gated
            if revision not in ("main",) and f"refs/heads/{revision}" not in there.refs:
                there.refs[f"refs/heads/{revision}"] = there.head.oid
            blobs = {path: blob_of(held, large, there, path) for path, held in files.items()}
            self.stored |= {b.sha256: b.content for b in blobs.values() if b.lfs}
            return there.commit(revision, blobs, message, gone=gone)

    def fault(self, method: str, path: str, status: int | str | None = None, **more: Any) -> Fault:
        """Adds a fault: `hub.fault("POST", "/commit/", 503, times=2)`."""
        made = Fault(method, path, status=status, **more)
        self.faults.append(made)
        return made

    def asked(self, method: str = ".*", path: str = "") -> list[Asked]:
        """The requests so far whose method and path match."""
        with self.lock:
            return [
                a for a in self.log if re.fullmatch(method, a.method) and re.search(path, a.url)
            ]

    @property
    def received(self) -> bytes:
        """All that was ever sent here, one request after another: to look for what must not be."""
        return b"\n".join(a.body for a in self.asked())

    @property
    def sent(self) -> int:
        """The bytes of all answers' bodies so far."""
        return sum(a.sent for a in self.asked())

    def answer(self, asked: Asked) -> Answer | None:
        """The answer to one request; None: hang up."""
        with self.lock:
            self.log.append(asked)
            fault = next((f for f in self.faults if f.matches(asked)), None)
            if fault:
                fault.times -= 1
        if fault and fault.slow:
            time.sleep(fault.slow)
        if fault and fault.status == "drop":
            return None
        try:
            if fault and isinstance(fault.status, int):
                raise Refusal(fault.status, fault.words, **fault.headers)
            with self.lock:
                answer = page(self, asked)
        except Refusal as no:
            answer = Answer({"error": no.words}, no.status, no.headers)
        if fault and fault.status == "drop-after-apply":
            return None
        answer.cut = bool(fault and fault.status == "cut")
        return answer


class _Origin(ThreadingHTTPServer):
    """One of the two origins: a port of its own, a thread for each connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: HubServer, *, is_hub: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.hub, self.is_hub = hub, is_hub
        self.url = f"http://127.0.0.1:{self.server_port}"

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that went away is no news."""


class _Connection(BaseHTTPRequestHandler):
    """Reads requests, writes answers; what they mean is decided in hub_pages."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Origin

    def _serve(self) -> None:
        split = urlsplit(self.path)
        asked = Asked(
            method=self.command,
            path=split.path,
            query=parse_qs(split.query, keep_blank_values=True),
            url=self.path,
            headers={k.lower(): v for k, v in self.headers.items()},
            body=self._body(),
            is_hub=self.server.is_hub,
        )
        answer = self.server.hub.answer(asked)
        if answer is None:
            self.close_connection = True
            return
        self._send(asked, answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            found = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, asked: Asked, answer: Answer) -> None:
        held = answer.body
        blob = held if isinstance(held, Blob) else None
        if blob is None and not isinstance(held, bytes):
            answer.headers.setdefault("Content-Type", "application/json; charset=utf-8")
            held = json.dumps(held).encode()
        first, last = answer.span or (0, blob.size if blob else len(held))
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(last - first))
        self.end_headers()
        if asked.method == "HEAD":
            self.wfile.flush()
            return
        if answer.cut:
            last = first + (last - first) // 2
            self.close_connection = True
        asked.sent = last - first
        while first < last:
            end = min(last, first + 2**20)
            self.wfile.write(blob.read(first, end) if blob else held[first:end])
            first = end
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """The log is a list."""
