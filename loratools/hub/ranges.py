"""One file on the Hub as a source of bytes, read by HTTP ranges, with a few blocks kept."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING

from loratools._version import VERSION
from loratools.errors import NetworkError, error, shown
from loratools.hub import access

if TYPE_CHECKING:
    import httpx2

BLOCK = 1 << 16  # bytes: the header of most files of weights, and little where it is shorter
KEPT = 64  # blocks of one file
LARGE = 4 << 20  # bytes of one read beyond which nothing is kept
SKIPPED = 1 << 20  # bytes that are read for nothing where a server gives no ranges
ATTEMPTS = 4  # where a connection ends early; the library repeats what never began
TIMEOUT = 30.0  # seconds without a byte
# Seconds after a failure, which came after many tries, in which no other is made: several readers
# ask for the same header, each to see whether the file is one of theirs.
RESPITE = 60.0


@dataclass(eq=False, slots=True)
class RemoteFile:
    """A file of one commit, of which only what is asked for is read; a `loratools.adapter.Source`.

    Its size is known from the commit's list of files. Threads may share it.
    """

    repo: str
    commit: str
    path: str
    size: int
    sha256: str | None = None
    _failed: tuple[float, NetworkError] | None = field(default=None, repr=False)
    _blocks: dict[int, bytes] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def name(self) -> str:
        return f"{self.repo}@{self.commit[:12]}:{self.path}"

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; StorageError, NetworkError, NotFoundError."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise error(
                "storage",
                f"{shown(self.name)}: {length} bytes were asked for at {offset}, "
                f"the file has {self.size}",
            )
        if not length:
            return b""
        if self._failed is not None and monotonic() < self._failed[0] + RESPITE:
            raise self._failed[1]
        try:
            return self._read(offset, length)
        except NetworkError as cause:
            self._failed = monotonic(), cause
            raise

    def _read(self, offset: int, length: int) -> bytes:
        if length > LARGE:
            return self._range(offset, offset + length)
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        with self._lock:
            there = {n: self._blocks[n] for n in range(first, last + 1) if n in self._blocks}
            missing = [n for n in range(first, last + 1) if n not in there]
            if missing:  # in one request, whatever lies between
                start, stop = missing[0] * BLOCK, min((missing[-1] + 1) * BLOCK, self.size)
                found = self._range(start, stop)
                for at in range(start, stop, BLOCK):
                    there[at // BLOCK] = found[at - start : at - start + BLOCK]
            self._blocks.update(there)
            while len(self._blocks) > KEPT:
                del self._blocks[next(iter(self._blocks))]
        start = offset - first * BLOCK
        return b"".join(there[n] for n in range(first, last + 1))[start : start + length]

    def fingerprint(self) -> str:
        """The sha256 of the whole content: the Hub's own for large files, else by reading it."""
        if self.sha256 is not None:
            return self.sha256
        digest = hashlib.sha256()
        for offset in range(0, self.size, LARGE):
            digest.update(self.read(offset, min(LARGE, self.size - offset)))
        return digest.hexdigest()

    def _range(self, start: int, stop: int) -> bytes:
        import httpx2
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        api = access.api()
        url = hf_hub_url(self.repo, self.path, revision=self.commit, endpoint=api.endpoint)
        headers = build_hf_headers(
            token=api.token, library_name="loratools", library_version=VERSION
        )
        # Compressed, the bytes would lie elsewhere.
        headers["Accept-Encoding"] = "identity"
        found = bytearray()
        with access.translated(f"reading {shown(self.name)}", repo=self.repo):
            for _ in range(ATTEMPTS):
                headers["Range"] = f"bytes={start + len(found)}-{stop - 1}"
                with http_stream_backoff("GET", url, headers=headers, timeout=TIMEOUT) as response:
                    hf_raise_for_status(response)
                    skip = self._skipped(response, start + len(found))
                    # What is raised in here would make the library ask once more by itself.
                    with suppress(httpx2.TransportError):
                        for piece in response.iter_bytes():
                            found += piece[skip:]
                            skip = max(0, skip - len(piece))
                            if len(found) >= stop - start:
                                return bytes(found[: stop - start])
        raise error(
            "network",
            f"{shown(self.name)}: the answer ended after {len(found):,} of {stop - start:,} bytes, "
            f"{ATTEMPTS} times; run the same command again",
        )

    def _skipped(self, response: httpx2.Response, start: int) -> int:
        """How many bytes of an answer come before `start`; NetworkError where it is no answer."""
        if response.status_code == 206:
            said = response.headers.get("Content-Range", "")
            place = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", said)
            if place and int(place[1]) == start and place[2] in ("*", str(self.size)):
                return 0
            raise error("network", f"{shown(self.name)}: the server answers with {shown(said)}")
        if start <= SKIPPED:
            return start
        raise error(
            "network", f"{shown(self.name)}: the server gives no ranges; fetch the file whole"
        )
