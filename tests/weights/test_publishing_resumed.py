"""The next run of a plan goes on after what an interrupted one has finished, and no other does."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import OutputError, StorageError
from loratools.weights import disk
from loratools.weights.publishing import Output
from tests.weights.outputs import NEW, OLD, PLAN, fill, make, path_of, put, refused, seen, within


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


@pytest.mark.parametrize("first", ["inside", "beside"])
def test_goes_on_from_another_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    monkeypatch.chdir(out if first == "inside" else tmp_path)
    interrupt(out, 2)
    monkeypatch.chdir(tmp_path if first == "inside" else out)

    def block(output: Output) -> None:
        assert list(output.finished) == list(NEW)[:2]
        fill(output)

    assert make(out, block, plan=PLAN).weaker
    assert out.stat().st_ino == inode  # a shell that stands in it sees the files
    assert seen(tmp_path) == within("out", NEW)


def test_a_finished_file_is_recorded_when_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(fd: int) -> None:
        calls.append(Path(path_of(fd)).name)
        fsync(fd)

    def record_replace(a: Path, b: Path) -> None:
        calls.append(f"{a.name} -> {b.name}")
        replace(a, b)

    def block(output: Output) -> None:
        put(output.folder, {"unet/w": "x"})
        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(os, "replace", record_replace)
        output.finish("unet/w", "d")
        monkeypatch.undo()

    make(tmp_path / "out", block, plan=PLAN)
    fresh = ".progress.json.new"
    assert calls == ["w", "unet", fresh, f"{fresh} -> .progress.json", "out.partial"]


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
