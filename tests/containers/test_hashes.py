"""Hashes of files against the procedure of kohya's trainer, with the safetensors library."""

import hashlib

import pytest
import torch
from lycoris.utils import precalculate_safetensors_hashes
from safetensors.torch import save, save_file

from loratools.adapter import Leaf
from loratools.containers import hashes, safetensors
from loratools.containers.bundle import local

MIB = 0x100000


def source(path):
    bundle = local(path)
    return bundle.open(bundle.chosen)


def tensors(size):
    torch.manual_seed(size)
    return {
        "b.up": torch.randn(3, size),
        "a.down": torch.randn(size, 2).half(),
        "c.scale": torch.tensor(0.5, dtype=torch.bfloat16),
        "a.alpha": torch.tensor(4.0),
    }


@pytest.mark.parametrize("size", [1, 1000, 300_000])
@pytest.mark.parametrize("chunk", [None, 4096 + 7])
def test_hashes_of_a_file(size, chunk, tmp_path, monkeypatch):
    if chunk:
        monkeypatch.setattr(hashes, "CHUNK", chunk)
    save_file(tensors(size), tmp_path / "x.safetensors", {"ss_network_dim": "4"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    found = hashes.civitai(source(tmp_path / "x.safetensors"))
    assert found.sha256 == hashlib.sha256(raw).hexdigest()
    assert found.autov1 == hashlib.sha256(raw[MIB : MIB + 65536]).hexdigest()[:8].upper()
    assert found.autov2 == found.sha256[:10].upper()
    assert found.tensors == hashlib.sha256(data).hexdigest()
    assert found.autov3 == found.tensors[:12].upper()


@pytest.mark.parametrize("raw", [b"", b"12345678", b"PK\x03\x04" + bytes(100), b"\xff" * 20])
def test_files_of_other_sorts_have_no_hash_of_tensors(raw, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(raw)
    found = hashes.civitai(source(tmp_path / "x.ckpt"))
    assert found.tensors is None is found.autov3
    assert found.sha256 == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("size", [1, 1000, 300_000])
def test_hashes_for_metadata_are_those_of_the_trainer(size, tmp_path):
    """train_util.precalculate_safetensors_hashes: saved with the ss_ entries alone, then hashed."""
    metadata = {"ss_network_dim": "4", "ss_tag": "ä\u2028", "modelspec.title": "t", "other": "x"}
    theirs = tensors(size)
    raw = save(theirs, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(raw[:8], "little")
    ours = hashes.as_the_library({k: Leaf.of(k, t) for k, t in theirs.items()})
    model, legacy = hashes.kohya(ours, metadata)
    assert model == hashlib.sha256(raw[start:]).hexdigest()
    assert legacy == hashlib.sha256(raw[MIB : MIB + 65536]).hexdigest()[:8]
    lycoris = precalculate_safetensors_hashes({k: theirs[k] for k in ours})
    assert hashes.same(lycoris, model)
    assert hashes.same(model[:12].upper(), model)


def test_our_order_is_the_library_s(tmp_path):
    names = (
        "bool uint8 int8 float8_e5m2 float8_e4m3fn int16 uint16 float16 bfloat16 int32 uint32 "
        "float32 complex64 float64 int64 uint64"
    )
    theirs = {f"{n}{i}": torch.zeros(2, dtype=getattr(torch, n)) for i in (2, 1)
              for n in names.split()}  # fmt: skip
    save_file(theirs, tmp_path / "x.safetensors")
    there = list(safetensors.read_header(source(tmp_path / "x.safetensors")).leaves)
    assert list(hashes.as_the_library({k: Leaf.of(k, t) for k, t in theirs.items()})) == there


@pytest.mark.parametrize(
    ("stored", "same"),
    [("", False), ("0x", False), ("e3b0c44", False), ("e3b0c442", True), ("0xE3B0C44298FC", True),
     (hashes.EMPTY, True), ("f" * 64, False), (hashes.EMPTY + "0", False)],
)  # fmt: skip
def test_stored_hashes_may_be_cut_and_marked(stored, same):
    assert hashes.same(stored, hashes.EMPTY) is same
