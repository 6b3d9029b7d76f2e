"""Components of a pipeline that no adapter touches are the same files, whatever wrote them."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools import streaming
from loratools.commands.merge import merge
from loratools.commands.verify import verify
from loratools.weights.base import headers
from tests.weights.test_pipeline import TEXT, WEIGHTS, Q, files, lora, pipeline, progress, shards

INDEX = "diffusion_pytorch_model.bin.index.json"
U_NET = f"unet.{Q}"


def with_torch_text(folder: Path, **how: bool) -> Path:
    """Its text encoder in a torch file, with more in it than tensors."""
    base = pipeline(folder)
    place = base / "text_encoder"
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    torch.save({**tensors, "epoch": 3}, place / "pytorch_model.bin", **how)
    return base


def with_torch_vae(folder: Path) -> Path:
    """Its VAE in two torch files, and their index, which says more than it must."""
    base = pipeline(folder)
    (base / "vae" / WEIGHTS).unlink()
    where = {}
    for number, key in enumerate(("x", "y")):
        name = f"diffusion_pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({key: torch.rand(700_000)}, base / "vae" / name)
        where[key] = name
    table = {"metadata": {"total_size": 5_600_000, "by": "me"}, "weight_map": where}
    (base / "vae" / INDEX).write_text(json.dumps(table))
    return base


def untouched(base: Path, out: Path, folder: str) -> None:
    there = {n: b for n, b in files(base).items() if n.startswith(folder)}
    assert there
    assert {n: b for n, b in files(out).items() if n.startswith(folder)} == there


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_is_copied_and_that_is_said(zipped, tmp_path):
    base = with_torch_text(tmp_path / "p", _use_new_zipfile_serialization=zipped)
    adapter, out = lora(tmp_path / "l.safetensors", U_NET), tmp_path / "out"
    result = merge([adapter], base, out=out)
    untouched(base, out, "text_encoder/")
    untouched(base, out, "vae/")
    [note] = [n for n in result.notes if "pytorch_model.bin" in n]
    assert note == (
        "text_encoder/pytorch_model.bin: copied as is, touched by no adapter; push takes no "
        "pickles, and --dtype makes safetensors of every component"
    )
    proof = verify(out, base=base, adapters=[adapter], require="replay")
    assert (proof.ok, proof.proved) == (True, "replay")
    raw = bytearray((out / "text_encoder" / "pytorch_model.bin").read_bytes())
    at = raw.index(bytes(torch.tensor(load(base)).numpy().tobytes()))
    raw[at] ^= 1
    (out / "text_encoder" / "pytorch_model.bin").write_bytes(raw)
    assert {m.file for m in verify(out).mismatches} == {"text_encoder/pytorch_model.bin"}


def load(base: Path) -> list[list[float]]:
    found: list[list[float]] = headers(base).tensors[f"text_encoder.{TEXT}"].tensor().tolist()
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_dtype_makes_safetensors_of_every_component(dtype, tmp_path):
    base, out = with_torch_text(tmp_path / "p"), tmp_path / "out"
    result = merge([lora(tmp_path / "l.safetensors", U_NET)], base, out=out, dtype=dtype)
    assert not any("push" in note for note in result.notes)
    assert "text_encoder/model.safetensors" in files(out)
    assert "text_encoder/pytorch_model.bin" not in files(out)


def test_a_touched_torch_file_becomes_safetensors(tmp_path):
    base, out = with_torch_text(tmp_path / "p"), tmp_path / "out"
    merge([lora(tmp_path / "l.safetensors")], base, out=out)
    assert {n for n in files(out) if n.startswith("text_encoder/")} == {
        "text_encoder/config.json", "text_encoder/model.safetensors",
    }  # fmt: skip
    untouched(base, out, "vae/")


@pytest.mark.parametrize("said", [None, 144, 1])
def test_an_index_is_kept_while_what_it_says_is_true(said, tmp_path):
    base, out = pipeline(tmp_path / "p"), tmp_path / "out"
    shards(base, "unet", f"{WEIGHTS}.index.json", ("a.safetensors", "b.safetensors"))
    path = base / "unet" / f"{WEIGHTS}.index.json"
    table = json.loads(path.read_text())
    size = table["metadata"]["total_size"]
    metadata = {} if said is None else {"total_size": size if said == 144 else said}
    path.write_text(json.dumps({"weight_map": table["weight_map"], "metadata": metadata}))
    merge([lora(tmp_path / "l.safetensors")], base, out=out)
    written = (out / "unet" / path.name).read_bytes()
    assert (written == path.read_bytes()) is (said != 1)
    assert said is None or json.loads(written)["metadata"] == {"total_size": size}


def test_torch_shards_and_their_index_are_copied(tmp_path):
    base, out = with_torch_vae(tmp_path / "p"), tmp_path / "out"
    adapter = lora(tmp_path / "l.safetensors")
    merge([adapter], base, out=out)
    untouched(base, out, "vae/")
    assert verify(out, base=base, adapters=[adapter], require="replay").ok


@pytest.mark.parametrize("changed", [False, True])
def test_an_interrupted_fold_takes_a_copied_file_over_if_it_is_whole(
    changed, tmp_path, monkeypatch
):
    base, out = with_torch_vae(tmp_path / "p"), tmp_path / "out"
    name = "vae/diffusion_pytorch_model-00002-of-00002.bin"
    part, native = tmp_path / "out.partial", streaming._fold

    def failing(run, one, piece, scale):
        while name not in json.dumps(progress(out)):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "_fold", failing)
    adapter = lora(tmp_path / "l.safetensors", U_NET)
    with pytest.raises(KeyboardInterrupt):
        merge([adapter], base, out=out, threads=3)
    monkeypatch.setattr(streaming, "_fold", native)
    if changed:
        raw = bytearray((part / name).read_bytes())
        raw[-2000] ^= 1
        (part / name).write_bytes(raw)
    result = merge([adapter], base, out=out)
    assert (name in result.continued) is not changed
    untouched(base, out, "vae/")
