"""Every ending of the program: exit status, streams, signals, and no traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import write_adapter, write_base

ROOT = Path(__file__).parents[2]
PROGRAM = [
    sys.executable,
    "-c",
    "import sys; from loratools.cli import main; sys.exit(main())",
]
PLAIN = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"} | more


def child(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    more = options.pop("env", {})
    return subprocess.run(
        [*PROGRAM, *arguments], env=environment(**more), text=True, check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip


def test_usage_errors_come_in_our_words(run):
    for arguments in (["mrege"], ["merge", "--bas", "x"], ["--nothing"], ["check", "-w"]):
        ended = run(*arguments)
        assert ended.status == 2
        assert ended.out == ""
        assert ended.err.startswith("error[usage]: ")
        assert "--help`" in ended.err
    assert "Did you mean 'merge'?" in run("mrege").err
    table = run("mrege", "--json").json
    assert table["error"]["code"] == "usage"
    assert table["error"]["exit"] == 2
    assert table["error"]["problems"][0]["code"] == "usage"


def test_a_bug_is_one_line_and_its_traceback_comes_with_debug(here, run, monkeypatch):
    def broken(*_, **__):
        raise KeyError("x\x1b[2J")

    monkeypatch.setattr("loratools.commands.inspect.inspect", broken)
    ended = run("inspect", "a", "--json")
    assert ended.status == 1
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith("error: a bug in loratools, please report it")
    assert "\x1b" not in ended.err
    assert ended.json["error"]["code"] == "bug"
    assert "Traceback (most recent call last)" in run("inspect", "a", "--debug").err


def test_an_error_of_the_system_is_no_bug(here, run, monkeypatch):
    def locked(*_, **__):
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr("loratools.commands.inspect.inspect", locked)
    ended = run("inspect", "a")
    assert ended.status == 6
    assert ended.err.startswith("error[storage]: /secret: Permission denied\n")


def test_ctrl_c_while_typer_is_at_work(here, run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("loratools.commands.merge.merge", interrupted)
    ended = run("merge", "a", "-b", "base", "-o", "out", "--json")
    assert ended.status == 130
    assert "run the same command again" in ended.err
    assert ended.json["error"]["exit"] == 130


def test_the_signals_are_as_before_afterwards(run):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run("explain", "tied")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_reader_that_has_seen_enough(here):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        ended = child("explain", stdout=pipe)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_closed_streams(here):
    for closed in (1, 2):
        ended = subprocess.run(
            ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *PROGRAM, "inspect", "a", "b"],
            env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0
        assert ended.stderr == ""


def test_an_error_that_nobody_can_read_keeps_its_status(here):
    with Path("/dev/null").open() as unwritable:
        assert child("inspect", "nowhere", stderr=unwritable).returncode == 10


def test_a_full_disk_behind_stdout(here):
    with Path("/dev/full").open("w") as full:
        ended = child("explain", "tied", stdout=full)
        refused = child("inspect", "nowhere", "--json", stdout=full)
    assert refused.returncode == 10
    assert refused.stderr.startswith("error[not_found]: ")
    assert len(refused.stderr.splitlines()) == 2
    assert ended.returncode == 6
    assert ended.stderr.startswith("error[storage]: No space left on device")
    assert len(ended.stderr.splitlines()) == 2


def test_a_terminal_of_the_c_locale(here):
    folder = os.fsencode(write_adapter(here / "ünï", base_model_name_or_path="org/mödel"))
    ended = subprocess.run(
        [*PROGRAM, "inspect", folder], env=environment(**PLAIN), capture_output=True, check=False
    )
    assert ended.returncode == 0
    assert ended.stdout.isascii()
    assert b"org/m\\xf6del" in ended.stdout


def test_no_colours_but_on_a_terminal(here):
    assert "\x1b" not in child("inspect", "a").stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fold_goes_on_when_the_same_command_runs_again(here, run, number):
    write_base(here / "large", shards=5)
    words = ["merge", "a", "-b", "large", "-o", "out", "--progress", "none"]
    # The process stops itself after its second finished shard, as if the user had done it then.
    program = f"""
import os, sys
from loratools.weights import publishing
from loratools.cli import main
record, sent = publishing.Output.record, []
def recorded(output):
    record(output)
    if len(output.finished) == 2 and not sent:
        sent.append(1)
        os.kill(os.getpid(), {int(number)})
publishing.Output.record = recorded
sys.exit(main())
"""
    first = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert first.returncode == 128 + number
    assert "a fold goes on after its finished shards" in first.stderr
    assert "Traceback" not in first.stderr
    assert not (here / "out").exists()
    again = run(*words, "--json")
    assert again.status == 0
    assert len(again.json["continued"]) >= 2


def test_a_second_signal_ends_it_at_once(here):
    program = """
import sys, time
import loratools.commands.inspect as place
from loratools.cli import main
def stuck(*_, **__):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("unwinding", flush=True)
        time.sleep(60)
place.inspect = stuck
sys.exit(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, "inspect", "a"], env=environment(), stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    began = time.monotonic()
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "unwinding\n"
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert time.monotonic() - began < 55
    process.stdout.close()
