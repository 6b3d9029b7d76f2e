"""SIGKILL between every two steps of publishing, a second run beside the first, locks left over."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import OutputError
from tests.weights.outputs import NEW, OLD, PLAN, make, put, refused, seen, within

RUNNER = """
import json, os, sys
from pathlib import Path
from loratools.weights import disk
from loratools.weights.publishing import publish

os.fsync = lambda fd: None  # a killed process loses nothing that it wrote, and syncing is slow

def answer(text):
    print(json.dumps(text), flush=True)

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()  # to start an interpreter each time would take most of the test's time
    if child:
        if os.waitpid(child, 0)[1]:
            answer("killed")
        continue
    os.environ["LORATOOLS_CRASH_AT"] = str(job["crash_at"])
    os.chdir(job["cwd"])
    disk.PORTABLE = job["portable"]
    try:
        with publish(Path(job["out"]), **job["options"]) as output:
            for name, text in job["files"].items():
                if name not in output.finished:
                    (output.folder / name).parent.mkdir(exist_ok=True)
                    (output.folder / name).write_text(text)
                    output.finish(name, "digest")
        answer("done")
    except BaseException as problem:
        answer(getattr(problem, "code", repr(problem)))
    os._exit(0)
"""

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Publishes in a process of its own, killed at a step: "done", "killed" or a problem's code."""
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as runner:
        assert runner.stdin is not None
        assert runner.stdout is not None
        requests, answers = runner.stdin, runner.stdout

        def ask(out: Path, files: dict[str, str], how: dict[str, Any], crash_at: int = 0) -> str:
            job = {"out": str(out), "files": files, "crash_at": crash_at, **how}
            requests.write(json.dumps(job) + "\n")
            requests.flush()
            return str(json.loads(answers.readline()))

        yield ask
        requests.close()


def crashes(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A step to be killed at, and a fresh folder for it."""
    for step in range(1, 100):
        (tmp_path / str(step)).mkdir()
        yield step, tmp_path / str(step)
    pytest.fail("never came to its end")


@pytest.mark.parametrize(("portable", "plan"), [(False, PLAN), (True, None)])
@pytest.mark.parametrize("before", ["nothing", "empty", "old"])
def test_a_folder_is_old_or_new_and_the_next_run_puts_all_right(
    tmp_path: Path, run: Run, portable: bool, plan: str | None, before: str
) -> None:
    for step, room in crashes(tmp_path):
        out = room / "out"
        if before == "old":
            put(out, OLD)
        elif before == "empty":
            out.mkdir()
        options = {"plan": plan, "force": before == "old"}
        how = {"portable": portable, "cwd": str(room), "options": options}
        if run(out, NEW, how, step) == "done":
            assert step > 9
            break
        found = seen(out)
        if before == "old" and portable:
            # Without an exchange there is a moment without either, and the next run knows.
            assert found in (OLD, NEW) or (found is None and seen(room / "out.old-partial") == OLD)
        elif before == "empty" and portable:
            assert found in (None, {}, NEW)
        else:
            assert found in ({"nothing": None, "empty": {}, "old": OLD}[before], NEW)
        again = run(out, NEW, how)
        if before != "old" and found == NEW:
            assert again == "output_exists"
        else:
            assert again == "done"
        assert seen(room) == within("out", NEW), step
    assert seen(room) == within("out", NEW)


def test_a_two_step_replacement_is_undone_when_the_next_run_makes_nothing(
    tmp_path: Path, run: Run
) -> None:
    undone = 0
    for step, room in crashes(tmp_path):
        out = put(room / "out", OLD)
        options: dict[str, Any] = {"force": True}
        how = {"portable": True, "cwd": str(room), "options": options}
        if run(out, NEW, how, step) == "done":
            break
        undone += seen(out) is None
        options["force"] = False
        assert run(out, NEW, how) == "output_exists"
        assert seen(room) in (within("out", OLD), within("out", NEW))
    assert undone


@pytest.mark.parametrize("before", ["nothing", "old"])
def test_a_file_is_old_or_new_and_has_its_own_receipt_or_none(
    tmp_path: Path, run: Run, before: str
) -> None:
    new = {"x.bin": "new", "x.bin.loratools.json": "new"}
    for step, room in crashes(tmp_path):
        out = room / "x.bin"
        if before == "old":
            put(room, dict.fromkeys(new, "old"))
        options = {"force": before == "old", "as_file": True}
        how = {"portable": False, "cwd": str(room), "options": options}
        if run(out, new, how, step) == "done":
            assert step > 9
            break
        found = seen(room) or {}
        assert found.get("x.bin") in (("old" if before == "old" else None), "new")
        assert found.get("x.bin.loratools.json") in (None, found.get("x.bin"))
        # Without --force, once the next run has moved in what was ready, it makes no other.
        assert run(out, new, how) in ("done", "output_exists")[: 1 + (before != "old")]
        assert seen(room) == new, step
    assert seen(room) == new


@pytest.mark.parametrize(("before", "plan"), [("empty", PLAN), ("old", None)])
def test_a_folder_filled_file_by_file_has_a_receipt_only_when_whole(
    tmp_path: Path, run: Run, before: str, plan: str | None
) -> None:
    for step, room in crashes(tmp_path):
        out = put(room / "out", OLD if before == "old" else {})
        out.mkdir(exist_ok=True)
        options = {"plan": plan, "force": before == "old"}
        how = {"portable": False, "cwd": str(out), "options": options}  # a shell stands there
        if run(out, NEW, how, step) == "done":
            assert step > 9
            break
        found = {n: t for n, t in (seen(out) or {}).items() if not n.startswith(".")}
        assert found in (OLD, NEW) or "loratools.json" not in found
        assert run(out, NEW, how) in ("done", "output_exists")
        assert seen(room) == within("out", NEW), step
    assert seen(room) == within("out", NEW)


def test_a_killed_fold_goes_on_where_it_was(tmp_path: Path, run: Run) -> None:
    continued = set()
    for step, room in crashes(tmp_path):
        how = {"portable": False, "cwd": str(room), "options": {"plan": PLAN}}
        if run(room / "out", NEW, how, step) == "done":
            break
        partial = room / "out.partial"
        if (partial / ".progress.json").exists():
            done = json.loads((partial / ".progress.json").read_text())["finished"]
            inodes = {name: (partial / name).stat().st_ino for name in done}
            assert run(room / "out", NEW, how) == "done"
            assert {name: (room / "out" / name).stat().st_ino for name in done} == inodes
            continued.add(tuple(done))
    names = tuple(NEW)
    assert continued == {names[:1], names[:2], names}


HOLD = """
import sys
from pathlib import Path
from loratools.weights.publishing import publish
with publish(Path(sys.argv[1])) as output:
    (output.folder / "w").write_text("theirs")
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        said = refused(out, OutputError, "locked", force=True)
        assert f"process {other.pid} on host {socket.gethostname()}" in said
        assert seen(tmp_path / "out.partial") == {"w": "theirs"}
        other.kill()
    make(out)  # its lock died with it
    assert seen(tmp_path) == within("out", NEW)
