"""The fold over files: the same bytes whatever the threads, shards and interruptions are."""

import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from loratools.adapter import Dense, Leaf, Renormed, Replace
from loratools.cli import main
from loratools.errors import LoratoolsError, StorageError
from loratools.folding import torch_dtype
from loratools.streaming import is_whole, stream
from loratools.weights.base import headers
from loratools.weights.layout import index_json
from loratools.weights.publishing import publish
from tests.bases import shard as headed
from tests.examples_of_deltas import folded, leaf, lengths, pair
from tests.floats import FORMATS, exact
from tests.small_models import (
    INDEX,
    container,
    contents,
    file_of,
    index_of,
    model,
    planned,
    shards_of,
    stream_into,
    tensor,
    tensors_in,
)
from tests.tiny import write_adapter, write_base

ROOT = Path(__file__).parents[1]
BF16 = torch.bfloat16
UNTIED = {"tie_word_embeddings": False}


def everything() -> dict[str, torch.Tensor]:
    """Weights of every sort, touched or not."""
    return {
        "embed_tokens.weight": tensor(1, 11, 4, dtype=BF16),
        "layers.0.q.weight": tensor(2, 6, 4, dtype=BF16),
        "layers.0.q.bias": tensor(3, 6),
        "layers.0.mask": torch.tensor([True, False, True]),
        "layers.0.count": torch.tensor(2**53 + 1),
        "layers.0.k.weight": tensor(4, 6, 4, dtype=torch.float16),
        "layers.1.q.weight": tensor(5, 700, 300, dtype=BF16),
        "layers.1.empty": torch.empty(0, 4),
        "layers.1.narrow": torch.empty(4, 0),
        "layers.1.k.weight": tensor(6, 6, 4, dtype=torch.float8_e4m3fn),
        "layers.1.scale": tensor(7),
        "layers.1.bytes": torch.arange(5, dtype=torch.uint8),
        "norm.weight": tensor(8, 4, dtype=torch.float64),
        "head.weight": tensor(9, 3, 4),
    }


DELTAS = {
    "embed_tokens.weight": Replace(leaf(11, 13, 4)),
    "layers.0.q.weight": pair(12, (6, 4)),
    "layers.0.q.bias": Dense(leaf(13, 6), 0.5),
    "layers.1.q.weight": Renormed(pair(14, (700, 300), rank=8), lengths(15, 700)),
    "layers.1.k.weight": pair(16, (6, 4), scaling=0.5),
}


def split(tensors: Mapping[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    names = list(tensors)
    return [{n: tensors[n] for n in names[i::count]} for i in range(count)]


def base_in(folder: Path, shards: int = 3) -> Path:
    return model(folder, *split(everything(), shards), config=UNTIED)


def refused(code: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(LoratoolsError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code
    assert "\n" not in caught.value.message
    return caught.value.message


# ------------------------------------------------------------------------------- results


def test_bytes_depend_on_neither_threads_nor_shards(tmp_path):
    seen = {}
    for count in (1, 3, 14):
        base = base_in(tmp_path / f"base{count}", count)
        files = set()
        for threads in (1, 2, 8):
            out = tmp_path / f"{count}-{threads}"
            streamed = stream_into(out, planned(base, DELTAS), threads=threads)
            files.add(hashlib.sha256(repr(contents(out)).encode()).hexdigest())
            assert streamed.nbytes == sum(len(b) for b in contents(out).values())
            seen[count, threads] = tensors_in(out), streamed.tallies
        assert len(files) == 1
    first = seen[1, 1]
    assert all(found == first for found in seen.values())


def test_untouched_tensors_keep_their_bytes_and_touched_ones_are_folded(tmp_path):
    base = base_in(tmp_path / "base")
    streamed = stream_into(tmp_path / "out", planned(base, DELTAS))
    before, after = tensors_in(base), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before.keys() - DELTAS.keys():
        assert after[name] == before[name], name
    assert streamed.tallies.keys() == DELTAS.keys()
    for name, delta in DELTAS.items():
        dtype, shape, raw = after[name]
        assert dtype == before[name][0]
        assert shape == (13, 4) if name.startswith("embed") else before[name][1]
        assert streamed.tallies[name].digest == hashlib.sha256(raw).hexdigest()
        if name.startswith("embed"):
            assert raw == delta.value.tensor().to(BF16).view(torch.uint8).numpy().tobytes()
            continue
        original = everything()[name]
        found = exact(torch.frombuffer(bytearray(raw), dtype=original.dtype).reshape(shape))
        wanted = folded(delta, exact(original))
        step = 2.0 ** -FORMATS[original.dtype].mantissa
        least = float(FORMATS[original.dtype].value(1))
        assert np.all(np.abs(found - wanted) <= np.abs(wanted) * step / 2 * 1.01 + least)


def test_the_output_is_what_other_libraries_read(tmp_path):
    base = base_in(tmp_path / "base")
    plan = planned(base, DELTAS)
    stream_into(tmp_path / "out", plan)
    (tmp_path / "out" / INDEX).write_bytes(index_json(shards_of(plan)))
    where = json.loads((tmp_path / "out" / INDEX).read_text())
    ours = tensors_in(tmp_path / "out")
    assert where["metadata"]["total_size"] == sum(len(raw) for *_, raw in ours.values())
    assert where["weight_map"].keys() == ours.keys()
    assert list(where["weight_map"]) == sorted(where["weight_map"])
    for name, shard in where["weight_map"].items():
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            found = file.get_tensor(name)
        assert tuple(found.shape) == ours[name][1]
    again = headers(tmp_path / "out")
    assert again.tensors.keys() == ours.keys()
    assert not again.problems


def test_header_metadata_is_kept(tmp_path):
    (tmp_path / "base").mkdir()
    said = {"format": "np", "author": 'ä " \n', "empty": ""}
    path = tmp_path / "base" / "model.safetensors"
    path.write_bytes(file_of({"q.weight": tensor(1, 6, 4)}, **said))
    stream_into(tmp_path / "out", planned(tmp_path / "base", {"q.weight": pair(2, (6, 4))}))
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == said
    path.write_bytes(file_of({"q.weight": tensor(1, 6, 4)}))
    stream_into(tmp_path / "out2", planned(tmp_path / "base", {"q.weight": pair(2, (6, 4))}))
    with safe_open(tmp_path / "out2" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_dtypes_that_torch_cannot_compute_with_are_copied(tmp_path):
    rows = [
        ("odd.f4", "F4", [3, 4], bytes(range(6))),
        ("odd.e8m0", "F8_E8M0", [4], b"\x7f\x80\x81\xff"),
        ("q.weight", "F32", [2, 2], tensor(1, 2, 2).numpy().tobytes()),
        ("odd.complex", "C64", [1], b"12345678"),
        ("odd.u64", "U64", [1], b"\xff" * 8),
    ]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(container(rows))
    for dtype in (None, "BF16"):
        out = tmp_path / f"out {dtype}"
        stream_into(out, planned(tmp_path / "base", {"q.weight": pair(2, (2, 2))}), dtype=dtype)
        found = tensors_in(out)
        for name, kind, shape, raw in rows:
            if name != "q.weight":
                assert found[name] == (kind, tuple(shape), raw)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_another_dtype_rounds_every_floating_tensor_once(tmp_path, dtype):
    tensors = everything()
    tensors["layers.0.k.weight"] = 1 + torch.arange(24).reshape(6, 4).double() / 2**9 + 2.0**-45
    base = model(tmp_path / "base", *split(tensors, 3), config=UNTIED)
    results = []
    for threads in (1, 4):
        stream_into(tmp_path / f"{threads}", planned(base, DELTAS), dtype=dtype, threads=threads)
        results.append(contents(tmp_path / f"{threads}"))
    assert results[0] == results[1]
    form = FORMATS[torch_dtype(dtype)]
    after = tensors_in(tmp_path / "1")
    for name, original in tensors.items():
        kept, _, raw = after[name]
        if not original.is_floating_point():
            assert raw == original.reshape(-1).view(torch.uint8).numpy().tobytes()
            continue
        assert kept == dtype
        if name not in DELTAS:
            found = np.frombuffer(raw, f"<u{form.bits // 8}").tolist()
            values = exact(original).reshape(-1).tolist()
            assert found == [form.nearest(Fraction(v), negative=v < 0) for v in values]


def test_what_becomes_infinite_in_the_output_is_refused_beside_what_was(tmp_path):
    big = torch.tensor([[1.0, 2.0], [70000.0, torch.inf]])
    for values, code in ((big, "overflow"), (big.clamp(max=60000.0), None)):
        base = model(tmp_path / f"{code}", {"q.weight": tensor(1, 2, 2), "norm": values})
        plan = planned(base, {"q.weight": pair(2, (2, 2))})
        if code:
            message = refused(code, stream_into, tmp_path / "out", plan, dtype="F16")
            assert "norm" in message
            assert not (tmp_path / "out").exists()
            assert not list(tmp_path.glob("out*"))
        else:
            stream_into(tmp_path / "fits", plan, dtype="F16")
    kept = torch.tensor([[torch.inf, torch.nan], [1.0, -0.0]])
    base = model(tmp_path / "infinite", {"q.weight": tensor(1, 2, 2), "norm": kept})
    plan = planned(base, {"q.weight": pair(2, (2, 2))})
    stream_into(tmp_path / "kept", plan, dtype="F16")
    found = np.frombuffer(tensors_in(tmp_path / "kept")["norm"][2], np.float16)
    assert np.isinf(found[0])
    assert np.isnan(found[1])
    assert np.signbit(found[3])


def test_eight_bit_weights_are_folded_and_their_overflow_seen(tmp_path):
    f8 = torch.float8_e4m3fn
    base = model(tmp_path / "base", {"q.weight": torch.full((2, 2), 400.0).to(f8)})
    stream_into(
        tmp_path / "out", planned(base, {"q.weight": Dense(Leaf.of("d", torch.ones(2, 2)))})
    )
    plan = planned(base, {"q.weight": Dense(Leaf.of("d", torch.full((2, 2), 100.0)))})
    refused("overflow", stream_into, tmp_path / "too large", plan)


# ------------------------------------------------------------------------------- torch files


def torch_base(folder: Path, *, shards: int) -> Path:
    model(folder, {}, config=UNTIED)
    (folder / "model.safetensors").unlink()
    tensors = everything()
    del tensors["layers.1.k.weight"]
    tensors["layers.0.q.weight"] = tensors["layers.0.q.weight"].T.contiguous().T  # by columns
    tensors["layers.0.k.weight"] = torch.cat([tensors["layers.0.k.weight"]] * 2, 1)[:, ::2]
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    parts = {f"pytorch_model-{i:05}-of-{shards:05}.bin": p
             for i, p in enumerate(split(tensors, shards), 1)}  # fmt: skip
    for name, part in parts.items():
        torch.save(part, folder / name)
    (folder / "pytorch_model.bin.index.json").write_bytes(
        index_of({n: list(p) for n, p in parts.items()})
    )
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [None, "F32"])
def test_torch_files_become_safetensors_of_the_same_tensors(tmp_path, shards, dtype):
    base = torch_base(tmp_path / "torch", shards=shards)
    tensors = {}
    for path in sorted(base.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    plain = model(
        tmp_path / "plain", {n: t.contiguous() for n, t in tensors.items()}, config=UNTIED
    )
    deltas = {n: d for n, d in DELTAS.items() if n in tensors}
    stream_into(tmp_path / "out", planned(base, deltas), dtype=dtype)
    stream_into(tmp_path / "wanted", planned(plain, deltas), dtype=dtype)
    assert tensors_in(tmp_path / "out") == tensors_in(tmp_path / "wanted")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["model.safetensors"] if shards == 1 else [
        f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]  # fmt: skip


# ------------------------------------------------------------------------------- failures


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
