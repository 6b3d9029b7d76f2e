"""A regular local file as a source of bytes, opened anew for every read."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from loratools.errors import LoratoolsError, error, shown

# O_NONBLOCK so that opening a FIFO returns at once; Windows has O_BINARY instead of these.
_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY")
)
_PIECE = 1 << 30  # bytes asked for at once: Linux gives less than 2 GiB, macOS refuses more
_CHUNK = 1 << 22  # bytes held while fingerprinting

Identity = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A regular file as it was when first seen; it implements `loratools.adapter.Source`.

    Links are followed. No descriptor is kept, so that hundreds of adapters fit into 32 of them,
    and nothing is mapped, so that a file cut short is an error and not a SIGBUS.
    Raises not_found, not_weights (a folder, FIFO, socket or device) or storage.
    """

    path: Path
    size: int = field(init=False)
    identity: Identity = field(init=False)  # size, mtime in ns, inode, device

    def __post_init__(self) -> None:
        fd, identity = self._open()
        os.close(fd)
        object.__setattr__(self, "size", identity[0])
        object.__setattr__(self, "identity", identity)

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`.

        Raises input_changed if the file is no longer the one first seen, storage if it cannot be
        read or if no such bytes exist.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise error(
                "storage",
                f"{shown(self.name)}: {length} bytes were asked for at {offset}, "
                f"the file has {self.size}",
            )
        fd, _ = self._open()
        try:
            os.lseek(fd, offset, os.SEEK_SET)
            pieces: list[bytes] = []
            missing = length
            while missing:
                piece = os.read(fd, min(missing, _PIECE))
                if not piece:
                    break
                pieces.append(piece)
                missing -= len(piece)
            # Afterwards, so that a writer who came in between is noticed too.
            self._require_same(_identity(os.fstat(fd)))
        except OSError as cause:
            raise self._unreadable(cause) from cause
        finally:
            os.close(fd)
        if missing:
            raise error(
                "input_changed",
                f"{shown(self.name)}: ends {missing} bytes early; "
                "run again when nothing writes to it",
            )
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Has the system begin to read (offset, length) ranges, where it takes such advice."""
        if not hasattr(os, "posix_fadvise"):
            return
        fd, _ = self._open()
        try:
            for offset, length in ranges:
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass  # it was advice: who reads it finds out why
        finally:
            os.close(fd)

    def fingerprint(self) -> str:
        """The sha256 of the whole content, in hex; raises what `read` raises."""
        digest = hashlib.sha256()
        for offset in range(0, self.size, _CHUNK):
            digest.update(self.read(offset, min(_CHUNK, self.size - offset)))
        return digest.hexdigest()

    def _open(self) -> tuple[int, Identity]:
        try:
            fd = os.open(self.path, _FLAGS)
        except (OSError, ValueError) as cause:  # ValueError: a NUL or a surrogate in the path
            raise self._unreadable(cause) from cause
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise self._not_regular(stat.S_IFMT(found.st_mode))
        return fd, _identity(found)

    def _require_same(self, identity: Identity) -> None:
        if identity != self.identity:
            raise error(
                "input_changed",
                f"{shown(self.name)}: was {_described(self.identity)} when first read, "
                f"now it is {_described(identity)}; run again when nothing writes to it",
            )

    def _not_regular(self, kind: int) -> LoratoolsError:
        word = _WORDS.get(kind, "no regular file")
        return error("not_weights", f"{shown(self.name)} is {word}; name a file that holds weights")

    def _unreadable(self, cause: OSError | ValueError) -> LoratoolsError:
        number = cause.errno if isinstance(cause, OSError) else errno.ENOENT
        if number in _ABSENT:
            return error("not_found", f"{shown(self.name)}: no such file; check the path")
        if number == errno.ENXIO:
            return self._not_regular(stat.S_IFSOCK)
        if number == errno.EACCES and self.path.is_dir():  # Windows opens no folders
            return self._not_regular(stat.S_IFDIR)
        why = cause.strerror if isinstance(cause, OSError) else str(cause)
        return error("storage", f"{shown(self.name)} cannot be read: {why}")


_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}

_WORDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket or a device without driver",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _identity(found: os.stat_result) -> Identity:
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


def _described(identity: Identity) -> str:
    size, mtime, inode, _ = identity
    return f"{size} bytes, changed at {mtime} ns, inode {inode}"
