"""Every call that is not portable, each with a plain fallback, and the system's errors in words."""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loratools.errors import LoratoolsError, error, shown

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

PORTABLE = bool(os.environ.get("LORATOOLS_PORTABLE"))  # only the plain fallbacks

_PIECE = 1 << 30  # macOS refuses a read or write of 2 GiB
_BUFFER = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_UNSUPPORTED = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOLCK}
)
_SEEKING = threading.Lock()  # a file has one position, and the fallbacks move it


def failure(problem: OSError, path: str | Path | int, wanted: int = 0) -> LoratoolsError:
    """The StorageError for a failed system call on a path or an open file, ready to raise.

    `disk_full` for a full disk, quota or size limit, with the bytes `wanted` and free; else
    `storage`.
    """
    message = f"{shown(_name(path))}: {problem.strerror or problem}"
    if problem.errno not in _FULL:
        return error("storage", message)
    if wanted:
        message += f"; {wanted:,} bytes to write"
    with suppress(OSError):
        message += f", {shutil.disk_usage(path).free:,} bytes free"
    return error("disk_full", f"{message}; free space or choose another output")


@contextmanager
def reported(path: str | Path | int, wanted: int = 0) -> Iterator[None]:
    """Turns an OSError into the StorageError that names the path."""
    try:
        yield
    except OSError as problem:
        raise failure(problem, path, wanted) from problem


def _name(path: str | Path | int) -> str:
    if not isinstance(path, int):
        return str(path)
    try:
        return os.readlink(f"/proc/self/fd/{path}")
    except OSError:
        return f"open file {path}"


@functools.cache
def _libc(name: str) -> Callable[..., int] | None:
    """A function of Linux's C library that Python does not offer; None where there is none."""
    if sys.platform != "linux":
        return None
    import ctypes

    found: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return found


# Bytes ---------------------------------------------------------------------------------------


def read_into(fd: int, buffer: memoryview, offset: int) -> None:
    """Fills the buffer with the bytes at `offset`; StorageError where the file ends before."""
    view = memoryview(buffer).cast("B")
    done = 0
    with reported(fd):
        while done < len(view):
            got = _read(fd, view[done : done + _PIECE], offset + done)
            if not got:
                raise error(
                    "storage",
                    f"{shown(_name(fd))}: ends at byte {offset + done}, {len(view) - done:,} bytes"
                    " short of what was to be read; was it cut meanwhile?",
                )
            done += got


def write_from(fd: int, buffer: memoryview, offset: int) -> None:
    """Writes the whole buffer at `offset`; StorageError where the system does not take it."""
    view = memoryview(buffer).cast("B")
    done = 0
    while done < len(view):
        with reported(fd, len(view) - done):
            done += _write(fd, view[done : done + _PIECE], offset + done)


def _read(fd: int, view: memoryview, offset: int) -> int:
    if not PORTABLE and hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        piece = os.read(fd, min(len(view), _BUFFER))
    view[: len(piece)] = piece
    return len(piece)


def _write(fd: int, view: memoryview, offset: int) -> int:
    if not PORTABLE and hasattr(os, "pwrite"):
        return os.pwrite(fd, view, offset)
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, view)


def open_direct(path: Path) -> int:
    """A descriptor that writes aligned memory past the page cache; -1 where there is none."""
    if PORTABLE or not hasattr(os, "O_DIRECT"):
        return -1
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return -1


def write_direct(direct: int, plain: int, buffer: memoryview, offset: int) -> None:
    """`write_from` past the page cache; `plain`, the same file, takes what `direct` does not."""
    try:
        done = os.pwrite(direct, buffer, offset)
    except OSError:
        done = 0  # whatever the reason: the plain write does it, or names what fails
    if done < len(buffer):
        write_from(plain, buffer[done:], offset + done)


def copy_range(src_fd: int, dst_fd: int, src_offset: int, dst_offset: int, length: int) -> None:
    """Copies `length` bytes between files, inside the kernel (or by reflink) where it can.

    StorageError where the source ends early or the target takes no more.
    """
    done = 0
    if not PORTABLE and hasattr(os, "copy_file_range"):
        while done < length:
            try:
                got = os.copy_file_range(
                    src_fd, dst_fd, length - done, src_offset + done, dst_offset + done
                )
            except OSError:
                break  # whatever the reason: the plain loop does it, or names the file that fails
            if not got:
                break  # some file systems answer 0 before the end
            done += got
    buffer = memoryview(bytearray(min(_BUFFER, length - done)))
    while done < length:
        piece = buffer[: length - done]
        read_into(src_fd, piece, src_offset + done)
        write_from(dst_fd, piece, dst_offset + done)
        done += len(piece)


def reserve(fd: int, size: int) -> None:
    """Makes the file `size` bytes long at least, with blocks where the system can promise them.

    `disk_full` where they are not to be had.
    """
    with reported(fd, size):
        if size and not PORTABLE and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError as problem:
                if problem.errno not in _UNSUPPORTED:
                    raise
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)


def free_bytes(path: Path) -> int:
    """Bytes that may still be written on the path's disk; endless where the disk does not say."""
    with reported(path):
        usage = shutil.disk_usage(path)
    return usage.free if usage.total else sys.maxsize


# Lasting -------------------------------------------------------------------------------------


def sync_file(fd: int) -> None:
    """Returns when the file's bytes would survive a power loss."""
    with reported(fd):
        if sys.platform == "darwin" and not PORTABLE:
            try:  # fsync there leaves the bytes in the drive's cache
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
                return
            except OSError as problem:
                if problem.errno not in _UNSUPPORTED:
                    raise
        os.fsync(fd)


def sync_path(path: Path) -> None:
    """`sync_file` for a file that is not open."""
    with reported(path):
        # Windows flushes only what was opened for writing.
        fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            sync_file(fd)
        finally:
            os.close(fd)


def sync_folder(path: Path) -> None:
    """Returns when the folder's entries would survive a power loss; nothing to do on Windows."""
    if os.name == "nt":
        return
    with reported(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError as problem:
            if problem.errno not in _UNSUPPORTED:
                raise
        finally:
            os.close(fd)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Hints that these bytes may go to the disk now, so that the sync at the end is short."""
    call = None if PORTABLE else _libc("sync_file_range")
    if call:
        from ctypes import c_int64

        call(fd, c_int64(offset), c_int64(length), 2)  # SYNC_FILE_RANGE_WRITE


def exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one step; False where that cannot be done, and nothing has moved then."""
    call = None if PORTABLE else _libc("renameat2")
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


# Locking -------------------------------------------------------------------------------------


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Holds a lock file that names this process and host; whether a killed run had left one.

    OutputError `locked` when another process holds it. The system's lock dies with its
    process; where there is none, the file itself is the lock, and one of a dead process of this
    host is taken over.
    """
    with reported(path):
        fd, left = _acquire(path)
    try:
        with reported(path):
            os.lseek(fd, 0, os.SEEK_SET)
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()} {socket.gethostname()}\n".encode())
        yield left
    finally:
        if os.name == "nt":  # which removes no open file
            os.close(fd)
        with suppress(OSError):  # one that stays is taken over by the next run
            path.unlink()
        if os.name != "nt":  # and elsewhere the name goes first: nobody may lock it meanwhile
            os.close(fd)


def _acquire(path: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    left = False
    while True:
        try:
            fd, made = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                fd, made = os.open(path, flags), False
            except FileNotFoundError:
                continue  # its holder has just finished
        text = os.read(fd, 300).decode(errors="replace").strip()
        held = _system_lock(fd)
        if held is None:
            held = made  # no such locks here: who made the file has it
            if not made and _dead(text):
                os.close(fd)
                left |= _take_away(path, text)
                continue
        if not held:
            os.close(fd)
            pid, _, host = text.partition(" ")
            holder = f"process {pid} on host {host}" if host else "another process"
            raise error(
                "locked",
                f"another run is writing this output: {shown(holder)} holds {shown(path)};"
                " wait for it or stop it; remove the file only if no such run exists",
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.lstat(path)):
                return fd, left or bool(text)
        os.close(fd)  # removed by its last holder between our two calls


def _system_lock(fd: int) -> bool | None:
    """Whether the lock was had; None where the system or the file system has no locks."""
    if PORTABLE:
        return None
    try:
        if sys.platform == "win32":
            os.lseek(fd, 1 << 30, os.SEEK_SET)  # past the text, which must stay readable
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        if problem.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _dead(text: str) -> bool:
    """Whether a lock's text names a process of this host that has ended."""
    found = re.fullmatch(r"([1-9]\d{0,8}) (\S+)", text)
    if not found or found[2] != socket.gethostname() or os.name == "nt":
        return False  # on Windows asking by signal 0 would end the process
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _take_away(path: Path, text: str) -> bool:
    """Removes a dead process's lock file; not one that a faster run has made meanwhile."""
    taken = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        os.rename(path, taken)
    except FileNotFoundError:
        return False
    if taken.read_text(errors="replace").strip() != text:
        os.rename(taken, path)
        return False
    taken.unlink()
    return True
