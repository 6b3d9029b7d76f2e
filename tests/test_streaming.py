"""The fold over files: the same bytes whatever the threads, shards and interruptions are."""

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from loratools.adapter import Dense, Leaf
from loratools.folding import torch_dtype
from loratools.weights.base import headers
from loratools.weights.layout import index_json
from tests.examples_of_deltas import folded, pair
from tests.floats import FORMATS, exact
from tests.refusing import refused
from tests.small_models import (
    BF16,
    DELTAS,
    INDEX,
    UNTIED,
    base_in,
    container,
    contents,
    everything,
    file_of,
    index_of,
    model,
    planned,
    shards_of,
    split,
    stream_into,
    tensor,
    tensors_in,
)

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
