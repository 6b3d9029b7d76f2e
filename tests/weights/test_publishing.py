"""An output appears whole, or is as it was before, whatever the disk and the caller do."""

import errno
import os
import resource
import shutil
import signal
import stat
from pathlib import Path

import pytest

from loratools.errors import OutputError, StorageError
from loratools.weights import disk
from loratools.weights.publishing import Output
from tests.weights.outputs import NEW, OLD, PLAN, fill, make, path_of, put, seen, within


def failing(code: int) -> OSError:
    return OSError(code, os.strerror(code))


# Success


def test_a_new_folder(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"

    def block(output: Output) -> None:
        assert output.folder == tmp_path / "a" / "b" / "out.partial"
        assert output.finished == {}
        fill(output)
        assert seen(out) is None

    assert not make(out, block).weaker
    assert seen(tmp_path) == within("a/b/out", NEW)


@pytest.mark.parametrize("portable", [False, True])
def test_an_empty_folder_is_filled_and_keeps_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portable: bool
) -> None:
    monkeypatch.setattr(disk, "PORTABLE", portable)
    (tmp_path / "out").mkdir(mode=0o750)
    make(tmp_path / "out")
    assert seen(tmp_path) == within("out", NEW)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


@pytest.mark.parametrize("portable", [False, True])
def test_force_replaces_a_folder_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portable: bool
) -> None:
    monkeypatch.setattr(disk, "PORTABLE", portable)
    out = put(tmp_path / "out", OLD)

    def block(output: Output) -> None:
        fill(output)
        assert seen(out) == OLD

    assert not make(out, block, force=True).weaker
    assert seen(tmp_path) == within("out", NEW)


@pytest.mark.parametrize("receipt", [False, True])
def test_a_single_file_and_its_receipt(tmp_path: Path, receipt: bool) -> None:
    first = {"x.bin": "first", "x.bin.loratools.json": "of first"}
    second = {"x.bin": "second"} | ({"x.bin.loratools.json": "of second"} if receipt else {})
    for force, files in ((False, first), (True, second)):
        made = make(
            tmp_path / "x.bin", lambda o, f=files: put(o.folder, f), as_file=True, force=force
        )
        assert seen(tmp_path) == files  # and no receipt of a file that is gone
        assert not made.weaker


@pytest.mark.parametrize("files", [{}, {"x.bin": "", "y": ""}, {"x.bin.loratools.json": ""}])
def test_a_single_file_must_be_the_one_announced(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"written for the single file x\.bin"):
        make(tmp_path / "x.bin", lambda o: put(o.folder, files), as_file=True)
    assert os.listdir(tmp_path) == []


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make(tmp_path / "a" / "out")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    files = dict.fromkeys(("w.safetensors", "adapter_config.json", "loratools.json"), 0o640)
    assert modes == {"a": 0o750, "out": 0o750, "unet": 0o750, **files}


@pytest.mark.parametrize("old", [None, "exchange", "aside"])
def test_everything_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str | None
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    calls: list[tuple[str, str]] = []
    fsync, pwrite, rename, exchange = os.fsync, os.pwrite, os.rename, disk.exchange

    def record_fsync(fd: int) -> None:
        calls.append(("fsync", path_of(fd)))
        fsync(fd)

    def record_pwrite(fd: int, view: memoryview, offset: int) -> int:
        calls.append(("write", path_of(fd)))
        return pwrite(fd, view, offset)

    def record_rename(a: Path, b: Path) -> None:
        calls.append(("rename", str(b)))
        rename(a, b)

    def record_exchange(a: Path, b: Path) -> bool:
        if old != "exchange":
            return False
        calls.append(("rename", str(b)))
        return exchange(a, b)

    def block(output: Output) -> None:
        for name in ("a", "b/c"):
            put(output.folder, {name: ""})
            with (output.folder / name).open("r+b") as file:
                disk.write_from(file.fileno(), memoryview(b"bytes"), 0)

    if old:
        put(out, OLD)
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "pwrite", record_pwrite)
    monkeypatch.setattr(disk, "exchange", record_exchange)
    make(out, block, force=bool(old))
    moved = calls.index(("rename", str(out)))
    for name in ("a", "b/c"):
        written = calls.index(("write", str(partial / name)))
        synced = calls.index(("fsync", str(partial / name)))
        listed = calls.index(("fsync", str((partial / name).parent)))
        assert written < synced < listed < moved
    assert ("fsync", str(tmp_path)) in calls[moved:]
    assert ("fsync", str(tmp_path)) not in calls[:moved]
    assert seen(tmp_path) == within("out", {"a": "bytes", "b/c": "bytes"})


# Failures


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("plan", [None, PLAN])
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_the_output_as_it_was(
    tmp_path: Path, problem: type[BaseException], plan: str | None, force: bool
) -> None:
    if force:
        put(tmp_path / "out", OLD)
    before = seen(tmp_path)

    def block(output: Output) -> None:
        put(output.folder, NEW)  # nothing is finished, so there is nothing to go on with
        raise problem("stop")

    with pytest.raises(problem, match="stop"):
        make(tmp_path / "out", block, plan=plan, force=force)
    assert seen(tmp_path) == before
    with pytest.raises(problem, match="stop"):
        make(tmp_path / "a" / "b" / "out", block, plan=plan)
    assert seen(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("where", ["out.partial/loratools.json", "out.partial", "."])
def test_what_cannot_be_synced_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool, portable: bool, where: str
) -> None:
    if force:
        put(tmp_path / "out", OLD)
    before = seen(tmp_path)
    fsync = os.fsync

    def refuse(fd: int) -> None:
        if path_of(fd) == str(tmp_path / where):
            raise failing(errno.EIO)
        fsync(fd)

    monkeypatch.setattr(disk, "PORTABLE", portable)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="Input/output error") as caught:
        make(tmp_path / "out", lambda o: put(o.folder, NEW), force=force)
    assert caught.value.exit == 6
    assert seen(tmp_path) == before


@pytest.mark.parametrize("portable", [False, True])
def test_a_stop_after_the_rename_comes_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portable: bool
) -> None:
    out = put(tmp_path / "out", dict.fromkeys(NEW, "old"))
    fsync = os.fsync

    def stop(fd: int) -> None:
        if path_of(fd) == str(tmp_path):
            raise KeyboardInterrupt
        fsync(fd)

    monkeypatch.setattr(disk, "PORTABLE", portable)
    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        make(out, force=True, plan=PLAN)
    assert seen(tmp_path) == within("out", NEW)


def test_a_file_that_outgrows_the_limit_leaves_nothing(tmp_path: Path) -> None:
    put(tmp_path / "out", OLD)

    def block(output: Output) -> None:
        with (output.folder / "w.safetensors").open("wb") as file:
            disk.write_from(file.fileno(), memoryview(bytes(200_000)), 0)

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(StorageError) as caught:
            make(tmp_path / "out", block, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.code == "disk_full"
    assert seen(tmp_path) == within("out", OLD)


def test_a_folder_filled_by_another_program_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def block(output: Output) -> None:
        fill(output)
        put(tmp_path / "out", {"theirs": "x"})

    with pytest.raises(OutputError, match="theirs exists") as caught:
        make(tmp_path / "out", block, plan=PLAN)
    assert caught.value.code == "output_exists"
    assert seen(tmp_path / "out") == {"theirs": "x"}
    (tmp_path / "out" / "theirs").unlink()
    inode = (tmp_path / "out.partial" / "loratools.json").stat().st_ino
    make(tmp_path / "out", plan=PLAN)
    assert (tmp_path / "out" / "loratools.json").stat().st_ino == inode  # nothing was lost
    assert seen(tmp_path) == within("out", NEW)


# Where one rename does not do


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("device", ["same", "other"])
def test_a_mount_point_is_filled_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool, device: str
) -> None:
    out = put(tmp_path / "out", OLD if force else {})
    out.mkdir(exist_ok=True)
    rename = os.rename

    def refuse(a: Path, b: Path) -> None:
        if out in (a, b):
            raise failing(errno.EBUSY)
        if device == "other" and out in b.parents and out not in a.parents:
            raise failing(errno.EXDEV)
        rename(a, b)

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(disk, "exchange", lambda *_: False)
    assert make(out, force=force).weaker
    assert seen(tmp_path) == within("out", NEW)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("why", ["mount", "parent", "here"])
def test_what_is_known_not_to_be_replaceable_is_written_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool, why: str
) -> None:
    out = put(tmp_path / "out", OLD if force else {})
    out.mkdir(exist_ok=True)
    access, replace, fsync, rmtree = os.access, os.replace, os.fsync, shutil.rmtree
    calls: list[str] = []

    def record_replace(a: Path, b: Path) -> None:
        calls.append(f"{b.name} in")
        replace(a, b)

    def record_fsync(fd: int) -> None:
        calls.extend(["sync"] if path_of(fd) == str(out) and calls else [])
        fsync(fd)

    def record_rmtree(path: Path, **options: bool) -> None:
        calls.append("old removed")
        rmtree(path, **options)

    def block(output: Output) -> None:
        assert output.folder == out / ".partial"
        assert (out / ".lock").exists() is (why == "parent")
        put(output.folder, NEW)

    if why == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    elif why == "parent":
        monkeypatch.setattr(
            os, "access", lambda path, mode: path != tmp_path and access(path, mode)
        )
    else:
        monkeypatch.chdir(out)
    monkeypatch.setattr(os, "replace", record_replace)
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(shutil, "rmtree", record_rmtree)
    inode = out.stat().st_ino
    assert make(Path() if why == "here" else out, block, force=force).weaker
    first, *rest = calls
    assert first == "adapter_config.json in"
    receipt = ["sync", "loratools.json in", "sync", "old removed"]
    assert rest == ["sync", "unet in", *receipt]
    assert out.stat().st_ino == inode
    assert seen(tmp_path) == within("out", NEW)


def test_a_failed_move_into_a_mount_point_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = put(tmp_path / "out", OLD)
    rename = os.rename

    def refuse(a: Path, b: Path) -> None:
        if a.name == "gone.safetensors":
            raise failing(errno.EIO)
        rename(a, b)

    monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StorageError, match="Input/output error"):
        make(out, force=True)
    assert seen(tmp_path) == within("out", OLD)
