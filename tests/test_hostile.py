"""No hostile or silently wrong input comes through: every row of tests.hostile_rows, by commands.

Each ends with its status, in words that are safe to print; nothing runs, hangs, or is written.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loratools.cli import main
from tests.hostile_files import FILES
from tests.hostile_rows import ROWS, Row
from tests.tiny import write_adapter, write_base

HANGS = 60  # seconds: an honest run takes some hundredths


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working folder: an adapter and its base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_adapter(tmp_path / "a")
    write_base(tmp_path / "base")
    return tmp_path


@contextmanager
def not_hanging() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """All that lies there: kind, size, time, and what links point to."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        seen = path.lstat()
        link = path.readlink() if path.is_symlink() else None
        found[str(path.relative_to(folder))] = (seen.st_mode, seen.st_size, seen.st_mtime_ns, link)
    return found


def is_safe(text: str) -> bool:
    return text.replace("\n", "").isprintable()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_it_is_stopped_and_said(row: Row, here, capsys):
    row.make(here)
    before = snapshot(here)
    calls = [
        (("inspect", "a"), row.inspect),
        (("check", "a", "-b", row.base, "--data"), row.status if row.check is None else row.check),
        (("merge", "a", "-b", row.base, "-o", "out", *row.more), row.status),
    ]
    for arguments, status in calls:
        capsys.readouterr()
        with not_hanging():
            ended = main(list(arguments))
        out, err = capsys.readouterr()
        assert ended == status, (arguments, out, err)
        assert is_safe(out), out
        assert is_safe(err), err
        assert "Traceback" not in err
        assert len(out) + len(err) < 10_000
        if status:
            assert snapshot(here) == before
    assert row.says in (err if row.status else out)
    assert not (here / "canary").exists()


def test_every_number_has_a_row_or_a_place():
    elsewhere = {5, 18, 28, 42, 43, 46, 47, 50, 51}
    rows = {row.number for row in (*ROWS, *FILES)}
    assert elsewhere | rows == set(range(1, 70))
    assert not elsewhere & rows
