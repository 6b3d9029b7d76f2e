"""How an output appears: built in a partial folder, moved into place whole, or not at all."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import LoratoolsError, error, shown
from loratools.weights import disk
from loratools.weights.placing import (
    PROGRESS,
    Places,
    chosen,
    entries,
    is_empty,
    is_folder,
    refuse_existing,
    refuse_full,
    resolved,
    same,
)

_log = logging.getLogger(__name__)
_steps = itertools.count(1)


def _step() -> None:
    """Where a test lets the process die: between every two operations that last."""
    if os.environ.get("LORATOOLS_CRASH_AT") == str(next(_steps)):
        if hasattr(signal, "SIGKILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(137)


@dataclass(slots=True)
class Output:
    """What the caller of `publish` fills.

    `folder` takes the files; `finished` has those that need no writing again (posix path within
    the folder → digest); `weaker` says, at the end, that one rename was not possible.
    """

    folder: Path
    finished: dict[str, str]
    weaker: bool = False
    plan: str | None = None

    def finish(self, name: str, digest: str) -> None:
        """File `name` is complete: synced and recorded, so that a later run goes on after it.

        StorageError where that fails. For one thread at a time.
        """
        path = self.folder / name
        disk.sync_path(path)
        disk.sync_folder(path.parent)
        _step()
        self.finished[name] = digest
        if self.plan is not None:
            self.record()

    def record(self) -> None:
        """Writes down what is finished, in one step."""
        with disk.reported(self.folder):
            finished = {
                name: [_size(self.folder / name), digest] for name, digest in self.finished.items()
            }
            fresh = self.folder / f"{PROGRESS}.new"
            fresh.write_text(json.dumps({"plan": self.plan, "finished": finished}))
            disk.sync_path(fresh)
            _step()
            os.replace(fresh, self.folder / PROGRESS)
        disk.sync_folder(self.folder)
        _step()


@contextmanager
def publish(
    out: Path,
    *,
    as_file: bool = False,
    inputs: Sequence[Path] = (),
    force: bool = False,
    needed: int = 0,
    plan: str | None = None,
    restart: bool = False,
    check: Callable[[Path, str], bool] | None = None,
) -> Iterator[Output]:
    """The block fills `Output.folder`; afterwards `out` is there whole, or is as it was before.

    A folder appears by one rename. A single file (`as_file`; the block writes `out.name`, and
    `out.name + ".loratools.json"` where it has a receipt) is moved into place, the receipt last.
    `needed` is the bytes to be written in all. With a `plan`, files that the block has finished
    outlast its failure, and the next run of that plan has them in `Output.finished` if their
    sizes, and `check(path, digest)`, say that they are whole.

    Raises UsageError `same_path`, OutputError `output_exists`, `locked` or `other_plan`,
    StorageError `disk_full` or `storage`; before the block runs, but for failures of the disk.
    """
    with ExitStack() as stack:
        with disk.reported(out):
            out = resolved(Path(out), as_file=as_file, inputs=inputs)
            ways = [
                Places(out, as_file, inside) for inside in ((False,) if as_file else (False, True))
            ]
            stack.enter_context(_parents(out.parent))
            orphans = stack.enter_context(disk.lock(ways[0].lock))
            _step()
            for way in ways:
                _settle(way, orphans=orphans)
            replacing = refuse_existing(ways[0], force=force)
            places = chosen(ways[0])
            output = Output(places.partial, {}, plan=plan)
            _go_on(output, restart=restart, check=check)
            refuse_full(places, needed - sum(_size(output.folder / n) for n in output.finished))
            output.folder.mkdir(exist_ok=bool(output.finished))
            made = output.folder.stat()
        try:
            _step()
            yield output
            with disk.reported(out):
                output.weaker = _appear(places, replacing=replacing)
        except BaseException:
            with suppress(OSError, LoratoolsError):  # the first failure is the one to tell
                # After an exchange the old output has this name.
                if (
                    plan is not None
                    and output.finished
                    and os.path.samestat(output.folder.stat(), made)
                ):
                    _trim(output.folder, output.finished)
                    output.record()
            with suppress(OSError, LoratoolsError):
                for way in ways:
                    _settle(way, orphans=True)
            raise


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """The folder exists within the block; what had to be made goes again when it fails."""
    made: list[Path] = []
    try:
        for path in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
            with disk.reported(path):
                path.mkdir()
            made.append(path)
            disk.sync_folder(path.parent)
        yield
    except BaseException:
        for path in reversed(made):
            with suppress(OSError):  # not empty: it holds what the next run goes on with
                path.rmdir()
        raise


# What an earlier run left ---------------------------------------------------------------------


def _settle(places: Places, *, orphans: bool) -> None:
    """Brings what an interrupted run left to the old or the new output, whole.

    A partial folder without a record goes if it is known to be a run's (`orphans`) or empty.
    """
    out, aside, partial = places.out, places.aside, places.partial
    recorded = os.path.lexists(partial / PROGRESS)
    if is_folder(partial) and not recorded and (orphans or is_empty(partial)):
        _remove(partial)
        _step()
    if is_folder(places.ready):
        _move_in(places)
        _log.warning("%s: moved in the rest of what an interrupted run had made", shown(out))
    elif is_folder(aside):
        if places.as_file or places.inside:
            for name in entries(aside):
                os.replace(aside / name, places.into / name)
                _step()
            aside.rmdir()
        elif is_empty(out):
            _rename(aside, out)
        else:
            _remove_old(places)
        _step()
        _log.warning("%s: put right after an interrupted run", shown(out))


def _go_on(output: Output, *, restart: bool, check: Callable[[Path, str], bool] | None) -> None:
    """Takes over what an interrupted run of the same plan has finished; removes all else of it."""
    folder = output.folder
    if not os.path.lexists(folder):
        return
    if not is_folder(folder) or not (folder / PROGRESS).is_file():
        raise error(
            "output_exists",
            f"{shown(folder)} is in the way and not known to be left by an interrupted run;"
            " rename or remove it",
        )
    if restart:
        _remove(folder)
        return
    try:
        record = json.loads((folder / PROGRESS).read_bytes())
        plan, recorded = str(record["plan"]), dict(record["finished"])
    except (ValueError, TypeError, KeyError, RecursionError):
        plan, recorded = "its record cannot be read", {}
    if plan != output.plan:
        raise error(
            "other_plan",
            f"{shown(folder)} holds what a run with another plan has finished ({shown(plan)});"
            " repeat that command to go on with it, or --restart discards it",
        )
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        match recorded.get(name):
            case [int(size), str(digest)] if size == _size(path) and not path.is_symlink():
                if check is None or check(path, digest):
                    output.finished[name] = digest
    for name in sorted(recorded.keys() - output.finished.keys()):
        _log.warning("%s is not as it was finished, and is made again", shown(folder / name))
    if output.finished:
        _trim(folder, output.finished)
    else:
        _remove(folder)


# The move into place --------------------------------------------------------------------------


def _appear(places: Places, *, replacing: bool) -> bool:
    """Makes the folder's content the output, to last; whether one rename was not possible."""
    out, partial = places.out, places.partial
    refuse_existing(places, force=replacing)  # by now another program may have put something there
    _sync_tree(partial)
    _step()
    (partial / PROGRESS).unlink(missing_ok=True)
    disk.sync_folder(partial)
    _step()
    if places.as_file:
        names = entries(partial)
        if not {out.name} <= set(names) <= {out.name, places.receipt}:
            raise ValueError(f"{names} written for the single file {out.name}")
        # The old file is replaced in one step; its receipt may not stand beside the new one.
        _move_one_by_one(places, [n for n in places.old() if n == places.receipt])
        return False
    if not places.inside and not same(out, Path()):
        try:
            _rename_whole(places, replacing=replacing)
        except OSError as problem:
            if problem.errno not in (errno.EBUSY, errno.EXDEV) or not is_folder(out):
                raise
        else:
            return False
    inside = Places(out, as_file=False, inside=True)
    if not places.inside:
        _carry(partial, inside.partial)
        _step()
    _move_one_by_one(inside, inside.old())
    return True


def _rename_whole(places: Places, *, replacing: bool) -> None:
    out, partial, aside = places.out, places.partial, places.aside
    if out.is_dir():
        shutil.copymode(out, partial)
    swapped = replacing and disk.exchange(partial, out)
    if not swapped:
        if replacing:
            os.rename(out, aside)
            _step()
        _rename(partial, out)
    _step()
    try:
        disk.sync_folder(out.parent)
    except LoratoolsError:
        # What is not known to last is not published; `_settle` brings back what is aside.
        if not (swapped and disk.exchange(partial, out)):
            os.rename(out, partial)
        raise
    _step()
    if swapped:
        _remove(partial)
        _step()
    elif replacing:
        _remove_old(places)


def _rename(folder: Path, onto: Path) -> None:
    """Renames a folder onto a path where there is nothing or an empty folder."""
    if disk.PORTABLE or os.name == "nt":  # which renames onto nothing that exists
        with suppress(OSError):
            os.rmdir(onto)
            _step()
    os.rename(folder, onto)


def _move_one_by_one(places: Places, old: Sequence[str]) -> None:
    places.aside.mkdir()
    _step()
    for name in old:
        os.rename(places.into / name, places.aside / name)
        _step()
    disk.sync_folder(places.into)
    os.rename(places.partial, places.ready)  # from here on a later run moves the rest
    _step()
    _move_in(places)


def _move_in(places: Places) -> None:
    into, ready = places.into, places.ready
    for name in sorted(entries(ready), key=lambda name: (name == places.receipt, name)):
        disk.sync_folder(into)  # the receipt says that all the others are there
        os.replace(ready / name, into / name)
        _step()
    disk.sync_folder(into)
    _step()
    _remove_old(places)
    ready.rmdir()
    _step()


def _remove_old(places: Places) -> None:
    """Removes what is aside, under the name from which nothing is ever brought back."""
    if is_folder(places.aside):
        os.rename(places.aside, places.partial)
        _step()
        _remove(places.partial)
        _step()


# Files ---------------------------------------------------------------------------------------


def _size(path: Path) -> int:
    return path.lstat().st_size


def _files(folder: Path) -> list[Path]:
    """Every file below a folder, in one order everywhere; links to files are files."""
    return sorted(Path(top, name) for top, _, names in os.walk(folder) for name in names)


def _trim(folder: Path, keep: Collection[str]) -> None:
    """Removes every file but those to keep and the record, and the folders left empty."""
    for top, _, names in os.walk(folder, topdown=False):
        for path in (Path(top, name) for name in names):
            if path.relative_to(folder).as_posix() not in (*keep, PROGRESS):
                path.unlink()
        if not os.listdir(top):
            os.rmdir(top)


def _remove(folder: Path) -> None:
    """Removes a folder; one that cannot be removed is named in the log and harms nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        _log.warning("%s could not be removed", shown(folder))


def _sync_tree(folder: Path) -> None:
    for path in _files(folder):
        if not path.is_symlink():
            disk.sync_path(path)
    for top, _, _ in os.walk(folder, topdown=False):
        disk.sync_folder(Path(top))


def _carry(folder: Path, to: Path) -> None:
    """Moves a folder, by copying where it goes to another device."""
    try:
        os.rename(folder, to)
    except OSError as problem:
        if problem.errno != errno.EXDEV:
            raise
        for top, _, names in os.walk(folder):
            (to / Path(top).relative_to(folder)).mkdir()
            for path in (Path(top, name) for name in names):
                with path.open("rb") as src, (to / path.relative_to(folder)).open("xb") as dst:
                    disk.copy_range(src.fileno(), dst.fileno(), 0, 0, path.stat().st_size)
        _sync_tree(to)
        _step()
        _remove(folder)
