"""A fold that fails, is stopped, or has little room: nothing half done, and it goes on."""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.cli import main
from loratools.errors import LoratoolsError, StorageError
from loratools.streaming import stream
from loratools.untouched import is_whole
from loratools.weights.publishing import publish
from tests.bases import shard as headed
from tests.examples_of_deltas import pair
from tests.refusing import refused
from tests.small_models import (
    DELTAS,
    UNTIED,
    base_in,
    contents,
    everything,
    model,
    planned,
    shards_of,
    split,
    stream_into,
    tensor,
)
from tests.tiny import write_adapter, write_base

ROOT = Path(__file__).parents[1]


class Stop(BaseException):
    """What a test interrupts a run with."""


def streaming(base: Path, out: Path, progress: Callable[[int, int], None], **options: Any) -> None:
    plan = planned(base, DELTAS)
    with publish(out, plan=options.pop("named", None)) as output:
        stream(shards_of(plan), plan.targets, output, progress=progress, **options)


def whole_in(base: Path, dtype: str | None = None) -> Callable[[Path, str], bool]:
    shards = shards_of(planned(base, DELTAS), dtype)
    return lambda path, record: is_whole(path, record, shards)


def test_progress_only_grows_and_ends_at_the_whole(tmp_path):
    seen: list[tuple[int, int]] = []
    streaming(base_in(tmp_path / "base"), tmp_path / "out",
              lambda done, total: seen.append((done, total)), threads=1)  # fmt: skip
    whole = sum(len(b) for b in contents(tmp_path / "out").values())
    assert {total for _, total in seen} == {whole}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == whole


@pytest.mark.parametrize("named", [None, "plan"])
def test_an_error_in_one_shard_stops_the_run(tmp_path, named):
    tensors = everything()
    tensors["layers.1.q.weight"][699, 299] = torch.nan
    base = model(tmp_path / "base", *split(tensors, 7), config=UNTIED)
    plan = planned(base, DELTAS)
    for threads in (1, 3):
        message = refused(
            "nonfinite", stream_into, tmp_path / "out", plan, threads=threads, named=named
        )
        assert message.startswith("layers.1.q.weight: the base has 1 NaN")
        assert not (tmp_path / "out").exists()
        left = {p.name for p in tmp_path.iterdir()} - {"base"}
        if named is None:
            assert left == set()
        for path in tmp_path.glob("*partial*/*.safetensors"):
            shard = next(s for s in shards_of(plan) if s.name == path.name)
            assert path.read_bytes()[: len(shard.header)] == shard.header
            assert "layers.1.q.weight" not in {p.name for p in shard.pieces}


def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(tmp_path):
    base = base_in(tmp_path / "base", 7)
    whole: list[int] = []
    streaming(base, tmp_path / "wanted", lambda done, _: whole.append(done), threads=1)
    wanted = contents(tmp_path / "wanted")
    went_on = set()
    for step in range(1, len(whole) + 1):
        out, calls = tmp_path / f"out {step}", [0]

        def stop(_done: int, _total: int, step: int = step, calls: list[int] = calls) -> None:
            calls[0] += 1
            if calls[0] == step:
                raise Stop

        with pytest.raises(Stop):
            streaming(base, out, stop, threads=1 + step % 3, named="plan")
        assert not out.exists()
        with publish(out, plan="plan", check=whole_in(base)) as output:
            finished = set(output.finished)
            plan = planned(base, DELTAS)
            streamed = stream(shards_of(plan), plan.targets, output)
            assert set(streamed.continued) == finished
            went_on.add(len(finished))
        assert contents(out) == wanted
        assert streamed.tallies.keys() == DELTAS.keys()
    assert len(went_on) > 3, "runs were stopped before and after several shards"


@pytest.mark.parametrize("dtype", [None, "F32"])
def test_a_finished_shard_in_which_one_byte_turned_is_made_again(tmp_path, dtype):
    base = base_in(tmp_path / "base", 2)
    records: dict[str, str] = {}
    plan = planned(base, DELTAS)
    with publish(tmp_path / "out", plan="plan") as output:
        stream(shards_of(plan, dtype), plan.targets, output)
        records.update(output.finished)
    is_good = whole_in(base, dtype)
    for name, record in records.items():
        path = tmp_path / "out" / name
        assert is_good(path, record)
        good = path.read_bytes()
        shard = next(s for s in shards_of(plan, dtype) if s.name == name)
        spots = [5, len(shard.header) - 1, *(p.offset for p in shard.pieces if p.nbytes)]
        for at in [*spots, *(at - 1 for at in spots[3:]), shard.size - 1]:
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            assert not is_good(path, record), at
        for data in (good[:-1], good + b"x", b""):
            path.write_bytes(data)
            assert not is_good(path, record)
    assert not is_good(tmp_path / "base" / "other.safetensors", "{}")


@pytest.mark.parametrize("change", ["touch", "cut", "grown", "replaced", "gone"])
def test_a_base_that_changes_meanwhile_is_noticed(tmp_path, change):
    base = base_in(tmp_path / "base")
    shard = sorted(base.glob("*.safetensors"))[1]

    def meddle(done: int, total: int) -> None:
        if done < total:
            return
        data = shard.read_bytes()
        if change == "touch":
            os.utime(shard, ns=(1, 1))
        elif change == "cut":
            shard.write_bytes(data[:-1])
        elif change == "grown":
            shard.write_bytes(data + b"x")
        elif change == "replaced":
            shard.rename(tmp_path / "aside")
            shard.write_bytes(data)
            os.utime(shard, ns=((tmp_path / "aside").stat().st_mtime_ns,) * 2)
        else:
            shard.unlink()

    with pytest.raises(LoratoolsError) as caught:
        streaming(base, tmp_path / "out", meddle, threads=1)
    assert caught.value.code == ("not_found" if change == "gone" else "input_changed")
    assert shard.name in caught.value.message
    assert not list(tmp_path.glob("out*"))


def test_a_base_cut_before_it_is_read_is_an_error_of_storage(tmp_path):
    base = base_in(tmp_path / "base")
    plan = planned(base, DELTAS)
    for path in base.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(StorageError):
        stream_into(tmp_path / "out", plan)
    assert not list(tmp_path.glob("out*"))


# ------------------------------------------------------------------------------- small machines


def child(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_forty_shards_need_no_forty_descriptors(tmp_path):
    tensors = {f"layers.{i}.q.weight": tensor(i, 6, 4) for i in range(40)}
    base = model(tmp_path / "base", *split(tensors, 40))
    ended = child(
        """
        import resource, sys, torch
        from pathlib import Path
        from tests.examples_of_deltas import pair
        from tests.small_models import planned, stream_into
        names = [f"layers.{i}.q.weight" for i in range(40)]
        plan = planned(Path(sys.argv[1]), {n: pair(i, (6, 4)) for i, n in enumerate(names)})
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        print(len(stream_into(Path(sys.argv[2]), plan, threads=4).tallies))
        """,
        base,
        tmp_path / "out",
    )
    assert ended.stdout == "40\n", ended.stderr
    plan = planned(base, {n: pair(i, (6, 4)) for i, n in enumerate(tensors)})
    stream_into(tmp_path / "wanted", plan)
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


@pytest.mark.parametrize("named", [None, "plan"])
def test_a_full_disk_is_told_with_the_bytes_and_leaves_nothing_half_done(tmp_path, named):
    base = model(tmp_path / "base", {"a.q.weight": tensor(1, 6, 4)},
                 {"b.q.weight": tensor(2, 400, 300)}, {"c.q.weight": tensor(3, 6, 4)})  # fmt: skip
    ended = child(
        """
        import resource, signal, sys, torch
        from pathlib import Path
        from loratools.errors import LoratoolsError
        from tests.examples_of_deltas import pair
        from tests.small_models import planned, stream_into
        plan = planned(Path(sys.argv[1]), {"b.q.weight": pair(1, (400, 300))})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            stream_into(Path(sys.argv[2]), plan, named=sys.argv[3] or None)
        except LoratoolsError as problem:
            print(problem.code, problem.exit, problem.message)
        """,
        base,
        tmp_path / "out",
        named or "",
    )
    assert re.match(r"disk_full 6 .*[\d,]+ bytes to write, [\d,]+ bytes free", ended.stdout), ended
    assert not (tmp_path / "out").exists()
    left = {p.name: p.read_bytes() for p in tmp_path.rglob("*.safetensors") if base != p.parent}
    # With room, the same run ends as if nothing had been.
    plan = planned(base, {"b.q.weight": pair(1, (400, 300))})
    stream_into(tmp_path / "out", plan, named=named)
    stream_into(tmp_path / "wanted", plan)
    wanted = contents(tmp_path / "wanted")
    assert contents(tmp_path / "out") == wanted
    assert left.items() <= wanted.items()
    assert not left or named


def test_memory_does_not_grow_with_the_base(tmp_path):
    names = [f"layers.{i}.q.weight" for i in range(8)]
    empty = headed("model.safetensors", {n: ("BF16", [5000, 5000]) for n in names})
    (tmp_path / "base").mkdir()
    with (tmp_path / "base" / empty.name).open("wb") as file:
        file.write(empty.head)
        file.truncate(empty.size)  # 400 MB, of which the disk holds nothing
    ended = child(
        """
        import resource, sys
        from pathlib import Path
        from tests.examples_of_deltas import pair
        from tests.small_models import planned, stream_into
        names = [f"layers.{i}.q.weight" for i in (1, 5)]
        plan = planned(Path(sys.argv[1]), {n: pair(1, (5000, 5000), rank=16) for n in names})
        stream_into(Path(sys.argv[2]), plan, threads=2)
        # On Linux getrusage begins with what the parent had when it forked.
        status = Path("/proc/self/status")
        said = status.read_text().partition("VmHWM:")[2].split() if status.exists() else []
        print(said[0] if said else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        """,
        tmp_path / "base",
        tmp_path / "out",
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) / 1024 < 350, "MiB, most of them for torch"
    assert (tmp_path / "out" / empty.name).stat().st_size > 400_000_000
    (tmp_path / "out" / empty.name).unlink()


INTERRUPTED = """
    import os, signal, sys, threading
    from loratools import streaming
    from loratools.cli import main
    advance, sent = streaming._Run.advance, threading.Event()
    def interrupted(run, nbytes):
        advance(run, nbytes)
        if run.done * 2 > run.total and not sent.is_set():
            sent.set()
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
            run.stopped.wait()
    streaming._Run.advance = interrupted
    sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def merge(capsys) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["merge", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_command_goes_on_when_it_is_given_again(tmp_path, merge, name, status):
    base, adapter = write_base(tmp_path / "base", shards=4), write_adapter(tmp_path / "adapter")
    given = [adapter, "--base", base, "--threads", 1, "-o"]
    ended = child(INTERRUPTED, name, "merge", *given, tmp_path / "out")
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()
    [partial] = tmp_path.glob("out.*partial")
    finished = {p.name: p.read_bytes() for p in partial.glob("*.safetensors")}
    assert 0 < len(finished) < 4
    # Another plan is refused, and changes nothing.
    refusal, _, said = merge(*given, tmp_path / "out", "--weights", 0.5)
    assert refusal == 7
    assert "other_plan" in said
    assert "--restart" in said
    assert finished == {p.name: p.read_bytes() for p in partial.glob("*.safetensors")}
    if name == "SIGINT":
        done, told, _ = merge(*given, tmp_path / "out", "--json")
        assert set(json.loads(told)["continued"]) == set(finished)
    else:
        given = ["--weights", 0.5, *given]
        done, told, _ = merge(*given, tmp_path / "out", "--restart", "--json")
        assert json.loads(told)["continued"] == []
    assert done == 0
    assert merge(*given, tmp_path / "whole")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out", "whole"]
