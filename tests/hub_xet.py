"""What the client's own Xet code has put into a folder that takes the place of its servers.

`casUrl: local://FOLDER` is a simulation inside hf_xet 1.8.0 that nobody documents. Layout of a
shard's file section, as seen in what it writes: after 48 bytes, for each file a header of 48 (hash,
flags, number of segments), the segments and as many verification entries if flagged, 48 bytes each,
then 48 with the sha256 if flagged; a hash of ones ends it.
"""

from __future__ import annotations

import struct
from pathlib import Path

from tests.hub_repos import Blob

ENTRY = 48
VERIFIED, WITH_SHA = 0x8000_0000, 0x4000_0000


def blobs(folder: Path) -> dict[str, Blob]:
    """The files that are stored, by their sha256; their bytes stay where they are."""
    found: dict[str, Blob] = {}
    for shard in sorted(folder.rglob("shards/*.mdb")):
        found |= {blob.sha256: blob for blob in _files(shard.read_bytes())}
    return found


def _files(shard: bytes) -> list[Blob]:
    at, found = ENTRY, []
    while shard[at : at + 32] != b"\xff" * 32:
        flags, segments = struct.unpack_from("<II", shard, at + 32)
        xet = _hex(shard, at)
        at += ENTRY
        size = sum(struct.unpack_from("<I", shard, at + n * ENTRY + 36)[0] for n in range(segments))
        at += ENTRY * segments * (2 if flags & VERIFIED else 1)
        if flags & WITH_SHA:
            found.append(Blob(b"", lfs=True, claimed=size, xet=xet, named=_hex(shard, at)))
            at += ENTRY
    return found


def _hex(shard: bytes, at: int) -> str:
    """A hash: four numbers of 64 bits, each with its last byte first."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", shard, at))
