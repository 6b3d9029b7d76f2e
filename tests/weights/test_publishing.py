"""An output is there whole or as it was before; a fold goes on after what it had finished."""

import errno
import json
import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import OutputError, StorageError
from loratools.weights import disk
from loratools.weights.publishing import Output
from tests.weights.outputs import NEW, OLD, PLAN, fill, make, put, refused, seen, within


def failing(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


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

    with pytest.raises(OutputError, match="meanwhile") as caught:
        make(tmp_path / "out", block, plan=PLAN)
    assert caught.value.code == "output_exists"
    assert seen(tmp_path / "out") == {"theirs": "x"}
    (tmp_path / "out" / "theirs").unlink()
    with untouched(tmp_path / "out.partial", tmp_path / "out", list(NEW)):
        make(tmp_path / "out", plan=PLAN)  # the work was not lost
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
    access, replace, moves = os.access, os.replace, []

    def record(a: Path, b: Path) -> None:
        moves.append(b.name)
        replace(a, b)

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
    monkeypatch.setattr(os, "replace", record)
    inode = out.stat().st_ino
    assert make(Path() if why == "here" else out, block, force=force).weaker
    assert moves == ["adapter_config.json", "unet", "loratools.json"]  # the receipt last
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


# Going on


def interrupt(out: Path, after: int, **options: Any) -> None:
    """A run with a plan that ends after so many finished files, in the middle of the next."""

    def block(output: Output) -> None:
        for name in list(NEW)[:after]:
            put(output.folder, {name: NEW[name]})
            output.finish(name, f"digest of {NEW[name]}")
        put(output.folder, {"unet/half/of": "this"})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(out, block, plan=PLAN, **options)


@contextmanager
def untouched(folder: Path, then: Path, names: list[str]) -> Iterator[None]:
    """The files are the very same ones afterwards, in the other folder."""
    before = [(folder / name).stat() for name in names]
    yield
    after = [(then / name).stat() for name in names]
    assert [(s.st_ino, s.st_mtime_ns) for s in after] == [(s.st_ino, s.st_mtime_ns) for s in before]


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("force", [False, True])
def test_the_same_plan_goes_on_after_the_last_finished_file(
    tmp_path: Path, after: int, force: bool
) -> None:
    out, partial, done = tmp_path / "out", tmp_path / "out.partial", list(NEW)[:after]
    if force:
        put(out, OLD)
    interrupt(out, after, force=force)
    assert seen(out) == (OLD if force else None)
    assert sorted(os.listdir(tmp_path)) == (["out"] if force else []) + ["out.partial"]
    assert sorted(seen(partial) or {}) == sorted([".progress.json", *done])

    def block(output: Output) -> None:
        assert output.finished == {name: f"digest of {NEW[name]}" for name in done}
        fill(output)

    with untouched(partial, out, done):
        make(out, block, plan=PLAN, force=force)
    assert seen(tmp_path) == within("out", NEW)


def test_finished_files_need_no_more_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(tmp_path / "out", 3)
    size = sum(map(len, NEW.values()))
    monkeypatch.setattr(disk, "free_bytes", lambda _: (1 << 20) + 10)
    refused(tmp_path / "out", StorageError, "disk_full", plan=PLAN, needed=size + 11)
    make(tmp_path / "out", plan=PLAN, needed=size + 10)


def test_a_second_failure_keeps_what_the_first_had_finished(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", 2)

    def block(output: Output) -> None:
        raise ValueError(list(output.finished))

    for _ in range(2):
        with pytest.raises(ValueError, match=r"\['adapter_config.json', 'loratools.json'\]"):
            make(tmp_path / "out", block, plan=PLAN)
    make(tmp_path / "out", plan=PLAN)
    assert seen(tmp_path) == within("out", NEW)


@pytest.mark.parametrize("plan", ["other", None])
def test_another_plan_is_refused_until_restarted(tmp_path: Path, plan: str | None) -> None:
    interrupt(tmp_path / "out", 2)
    before = seen(tmp_path)
    said = refused(tmp_path / "out", OutputError, "other_plan", plan=plan)
    assert PLAN in said
    assert "--restart" in said
    assert seen(tmp_path) == before
    make(tmp_path / "out", plan=plan, restart=True)
    assert seen(tmp_path) == within("out", NEW)


def test_restart_discards_the_same_plan_too(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", 2)

    def block(output: Output) -> None:
        assert output.finished == {}
        assert os.listdir(output.folder) == []
        fill(output)

    make(tmp_path / "out", block, plan=PLAN, restart=True)
    assert seen(tmp_path) == within("out", NEW)


@pytest.mark.parametrize("damage", ["longer", "lost", "link", "digest", "all"])
def test_finished_files_that_changed_are_made_again(tmp_path: Path, damage: str) -> None:
    interrupt(tmp_path / "out", 2)
    first, second = (tmp_path / "out.partial" / name for name in list(NEW)[:2])
    match damage:
        case "longer":
            first.write_text("newer")
        case "lost":
            first.unlink()
        case "link":
            first.unlink()
            first.symlink_to("new")  # as long as the file was
        case "all":
            first.unlink()
            second.unlink()

    def check(path: Path, digest: str) -> bool:
        assert digest == "digest of new"
        return damage != "digest" or path != first

    def block(output: Output) -> None:
        assert list(output.finished) == ([] if damage == "all" else [second.name])
        assert not os.path.lexists(first)
        fill(output)

    make(tmp_path / "out", block, plan=PLAN, check=check)
    assert seen(tmp_path) == within("out", NEW)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"plan": "9f3a"}',
        b'{"plan": null, "finished": {}}',
        b'{"plan": "9f3a", "finished": 3}',
        b'{"plan": "9f3a", "finished": ["abc"]}',
        b"[" * 100_000,
        b"\xff",
    ],
    ids=range(9),
)
def test_a_record_that_cannot_be_read_is_no_plan_of_ours(tmp_path: Path, text: bytes) -> None:
    put(tmp_path / "out.partial", {"w": "x"})
    (tmp_path / "out.partial" / ".progress.json").write_bytes(text)
    refused(tmp_path / "out", OutputError, "other_plan", plan=PLAN)
    refused(tmp_path / "out", OutputError, "other_plan")
    assert (tmp_path / "out.partial" / "w").exists()


def test_a_record_names_no_file_outside(tmp_path: Path) -> None:
    put(tmp_path, {"outside": "new", "out.partial/w": "x"})
    names = ["../outside", str(tmp_path / "outside"), "w", "absent"]
    record = {"plan": PLAN, "finished": {n: [3, "d"] for n in names} | {"v": None}}
    put(tmp_path / "out.partial", {".progress.json": json.dumps(record)})
    make(tmp_path / "out", plan=PLAN)
    assert seen(tmp_path) == within("out", NEW) | {"outside": "new"}
