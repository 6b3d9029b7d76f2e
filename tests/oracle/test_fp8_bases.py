"""Bases of 8-bit floats, plain and with ComfyUI's scales: values beside torch's own."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratools
from loratools.bind import bind
from loratools.commands.verify import verify
from loratools.errors import MalformedError, RefusedError
from loratools.weights.base import headers
from tests.commands.adapter_files import Pair
from tests.commands.image_files import FLUX, fused, kohya
from tests.test_parts import SD1, dense, pairs

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
OUT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLAIN = "unet.mid_block.attentions.0.norm.weight"


def values(module, seed=5):
    draw = torch.Generator().manual_seed(seed + len(module))
    return torch.randn(SD1[module], generator=draw, dtype=torch.float64)


def plain(folder, kind):
    """8-bit floats that are their values."""
    tensors = {f"{m}.weight": (values(m) / 4).to(kind) for m in SD1}
    tensors[PLAIN] = torch.ones(4)
    save_file(tensors, folder / "base.safetensors")
    return folder / "base.safetensors", {n: t.double() for n, t in tensors.items()}


def scaled(folder, kind, scheme, room=2.0):
    """As ComfyUI's tools write it: the largest number (with some room) at the end of the range."""
    tensors, meant, layers = {PLAIN: torch.ones(4)}, {PLAIN: torch.ones(4).double()}, {}
    for module in SD1:
        wanted = values(module)
        scale = (room * wanted.abs().max() / torch.finfo(kind).max).float()
        stored = (wanted / scale.double()).to(kind)
        tensors[f"{module}.weight"] = stored
        meant[f"{module}.weight"] = stored.double() * scale.double()
        said = {"format": f"float8_{'e4m3fn' if kind == torch.float8_e4m3fn else 'e5m2'}"}
        if scheme == "old":
            tensors[f"{module}.scale_weight"] = scale.reshape(1)
            tensors[f"{module}.scale_input"] = torch.ones(1)
        else:
            tensors[f"{module}.weight_scale"] = scale
        if scheme == "tensors":
            raw = json.dumps(said).encode()
            tensors[f"{module}.comfy_quant"] = torch.tensor(list(raw), dtype=torch.uint8)
        layers[module] = said
    metadata = {"kept": "yes"}
    if scheme == "old":
        tensors["scaled_fp8"] = torch.empty(2, dtype=kind)
    if scheme == "metadata":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1", "layers": layers})
    save_file(tensors, folder / "base.safetensors", metadata)
    return folder / "base.safetensors", meant


def adapter(folder):
    found = pairs(1)
    found.pop("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k")  # stays untouched
    return kohya(folder / "a", found), {f"{m}.weight": dense(p) for m, p in found.items()}


def wanted(name, meant, updates, weight=0.05):
    before = meant[name]
    update = updates.get(name)
    return before if update is None else before + weight * update.reshape(before.shape)


def _bytes(tensor):
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def fold(path, over, folder, **options):
    out = folder / "out.safetensors"
    result = loratools.merge([path], over, weights=[0.05], out=out, **options)
    return out, result


@pytest.mark.parametrize("kind", FP8)
def test_plain_fp8_is_its_values(tmp_path, kind):
    path, updates = adapter(tmp_path)
    over, meant = plain(tmp_path, FP8[kind])
    out, result = fold(path, over, tmp_path)
    for name, tensor in load_file(out).items():
        assert tensor.dtype == (torch.float32 if name == PLAIN else FP8[kind])
        due = wanted(name, meant, updates).to(tensor.dtype)
        assert torch.equal(tensor.double(), due.double()), name
    assert result.groups[0]["update_kept"] is not None
    assert verify(out, base=over, adapters=[path]).proved == "replay"


@pytest.mark.parametrize("dtype", OUT)
@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("scheme", ["plain", "old", "metadata", "tensors"])
def test_fp8_is_written_as_values_of_another_dtype(tmp_path, scheme, kind, dtype):
    path, updates = adapter(tmp_path)
    make = plain if scheme == "plain" else scaled
    over, meant = make(tmp_path, FP8[kind], *([] if scheme == "plain" else [scheme]))
    out, _ = fold(path, over, tmp_path, dtype=dtype)
    found = load_file(out)
    assert found.keys() == meant.keys()  # no scale, no mark is left
    for name, tensor in found.items():
        due = wanted(name, meant, updates)
        assert tensor.dtype == OUT[dtype]
        torch.testing.assert_close(
            tensor.double(), due, rtol=torch.finfo(OUT[dtype]).eps, atol=2**-24
        )
        if name not in updates:  # float64 to 16 bits in torch goes by way of float32, exact here
            assert torch.equal(tensor, due.float().to(OUT[dtype]))
    if scheme != "plain":
        with safe_open(out, "pt") as file:
            assert file.metadata() == {"format": "pt", "kept": "yes"}
    proof = verify(out, base=over, adapters=[path])
    assert (proof.ok, proof.proved) == (True, "replay"), proof.mismatches


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("scheme", ["old", "metadata", "tensors"])
def test_scaled_fp8_stays_in_its_scheme(tmp_path, scheme, kind):
    path, updates = adapter(tmp_path)
    over, meant = scaled(tmp_path, FP8[kind], scheme)
    out, result = fold(path, over, tmp_path)
    before, after = load_file(over), load_file(out)
    assert list(after) == list(before)
    for name, tensor in after.items():
        if name not in updates:
            assert _bytes(tensor) == _bytes(before[name]), name
            continue
        module = name.removesuffix(".weight")
        scale = after[f"{module}.{'scale_weight' if scheme == 'old' else 'weight_scale'}"].double()
        due = (wanted(name, meant, updates) / scale).float().to(FP8[kind])
        assert torch.equal(tensor.double(), due.double()), name
    assert all(0 < group["update_kept"] < 2 for group in result.groups)
    proof = verify(out, base=over, adapters=[path])
    assert (proof.ok, proof.proved) == (True, "replay"), proof.mismatches


def test_update_kept_is_measured_on_values(tmp_path):
    path, updates = adapter(tmp_path)
    over, meant = scaled(tmp_path, torch.float8_e4m3fn, "old")
    out, result = fold(path, over, tmp_path)
    after, top, below = load_file(out), 0.0, 0.0
    for name, update in updates.items():
        scale = after[name.replace(".weight", ".scale_weight")].double()
        change = after[name].double() * scale - meant[name]
        top += 0.05 * float((change.flatten(1) * update).sum())
        below += 0.05**2 * float((update * update).sum())
    assert result.update_kept == pytest.approx(top / below, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("scheme", ["old", "metadata"])
def test_what_no_longer_fits_its_scale_gets_another(tmp_path, scheme, kind, dtype):
    """The largest number comes to the end of the range, as the quantiser of ComfyUI chooses."""
    path, updates = adapter(tmp_path)
    over, _ = scaled(tmp_path, FP8[kind], scheme, room=1.0)
    key = "scale_weight" if scheme == "old" else "weight_scale"
    with safe_open(over, "pt") as file:
        metadata = file.metadata()
    before = {n: t.to(dtype) if n.endswith(key) else t for n, t in load_file(over).items()}
    save_file(before, over, metadata)
    meant = {
        n: t.double() * before[n.replace(".weight", f".{key}")].double()
        for n, t in before.items()
        if n in updates or n.endswith("to_k.weight")
    }
    out = tmp_path / "out.safetensors"
    result = loratools.merge([path], over, weights=[0.3], out=out)
    after, grown, limit = load_file(out), 0, torch.finfo(FP8[kind]).max
    for name in updates:
        scale, old = (each[name.replace(".weight", f".{key}")] for each in (after, before))
        due = wanted(name, meant, updates, 0.3)
        if float(scale) != float(old):
            grown += 1
            assert scale.dtype == dtype
            least = float(due.abs().max()) / limit
            assert least <= float(scale) <= least * (1 + 2 * torch.finfo(dtype).eps)
        stored = (due / scale.double()).float().to(FP8[kind])
        assert torch.equal(after[name].double(), stored.double()), name
    assert grown
    assert result.update_kept == pytest.approx(1, abs=0.1)
    proof = verify(out, base=over, adapters=[path])
    assert (proof.ok, proof.proved) == (True, "replay"), proof.mismatches
    with safe_open(over, "pt") as source:
        plan = bind([loratools.load(path)], headers(over), weights=[0.3])
        made = dict(loratools.fold_tensors(source, plan))
    assert {n: _bytes(t) for n, t in made.items()} == {n: _bytes(t) for n, t in after.items()}


@pytest.mark.parametrize("weight", [0.05, 0.3])
def test_a_scaled_fold_without_its_receipt_is_explained(tmp_path, weight):
    path, _ = adapter(tmp_path)
    over, _ = scaled(tmp_path, torch.float8_e4m3fn, "old", room=1.0)
    out = tmp_path / "out.safetensors"
    loratools.merge([path], over, weights=[weight], out=out)
    (tmp_path / "out.safetensors.loratools.json").unlink()
    proof = verify(out, base=over, adapters=[path], weights=[weight])
    assert proof.ok, proof.mismatches
    tensors = load_file(out)
    name = next(n for n in tensors if n.endswith("to_q.weight"))
    tensors[name] = -tensors[name].float()
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, out)
    assert not verify(out, base=over, adapters=[path], weights=[weight]).ok


def test_scales_that_no_mark_explains_are_refused(tmp_path):
    path, _ = adapter(tmp_path)
    over, _ = scaled(tmp_path, torch.float8_e4m3fn, "unmarked")
    with pytest.raises(RefusedError, match="numbers and their scale") as raised:
        fold(path, over, tmp_path)
    assert raised.value.code == "quantised_base"


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_malformed(tmp_path, scale):
    path, _ = adapter(tmp_path)
    over, _ = scaled(tmp_path, torch.float8_e4m3fn, "old")
    tensors = {k: torch.full_like(v, scale) if k.endswith("scale_weight") else v
               for k, v in load_file(over).items()}  # fmt: skip
    save_file(tensors, over)
    with pytest.raises(MalformedError, match="no scale of a weight"):
        fold(path, over, tmp_path)


def test_scales_of_rows_are_refused(tmp_path):
    path, _ = adapter(tmp_path)
    over, _ = scaled(tmp_path, torch.float8_e4m3fn, "old")
    tensors = {k: v.repeat(8) if k.endswith("scale_weight") else v
               for k, v in load_file(over).items()}  # fmt: skip
    save_file(tensors, over)
    with pytest.raises(RefusedError, match="numbers and their scale"):
        fold(path, over, tmp_path)


def test_a_bare_flux_model_is_known_among_its_scales(tmp_path):
    """Two of three tensors are scales: none of them is a weight of another model."""
    draw = torch.Generator().manual_seed(3)
    found = {}
    for module, (out, into) in FLUX.items():
        a = torch.randn(2, into, generator=draw)
        found[module] = Pair(a, torch.randn(out, 2, generator=draw), 1.0)
    path, tensors, meant = kohya(tmp_path / "a", found), {"scaled_fp8": torch.empty(0)}, {}
    own = fused(found)
    for module, pair in own.items():
        stored = torch.randn(len(pair.b), pair.a.shape[1], generator=draw).to(torch.float8_e4m3fn)
        tensors |= {f"{module}.weight": stored, f"{module}.scale_weight": torch.tensor([0.5])}
        tensors[f"{module}.scale_input"] = torch.ones(1)
        meant[f"{module}.weight"] = 0.5 * stored.double()
    over = tmp_path / "base.safetensors"
    save_file(tensors, over)
    out, _ = fold(path, over, tmp_path, dtype="fp32")
    updates = {f"{module}.weight": dense(pair) for module, pair in own.items()}
    written = load_file(out)
    assert written.keys() == updates.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, wanted(name, meant, updates).float()), name


def test_tensors_of_a_file_are_folded_in_memory(tmp_path):
    path, _ = adapter(tmp_path)
    over, _ = scaled(tmp_path, torch.float8_e4m3fn, "old")
    out, _ = fold(path, over, tmp_path)
    plan = bind([loratools.load(path)], headers(over), weights=[0.05])
    with safe_open(over, "pt") as source:
        made = dict(loratools.fold_tensors(source, plan))
    assert {n: _bytes(t) for n, t in made.items()} == {
        n: _bytes(t) for n, t in load_file(out).items()
    }


def test_other_scales_hinder_a_dtype_but_not_what_stays_as_it_is(tmp_path):
    """A layer of another scheme that no adapter touches."""
    path, updates = adapter(tmp_path)
    over, _ = scaled(tmp_path, torch.float8_e4m3fn, "old")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
    assert f"{layer}.weight" not in updates
    tensors = load_file(over)
    tensors[f"{layer}.scale_weight"] = torch.ones(12, 1)
    save_file(tensors, over)
    out, _ = fold(path, over, tmp_path)
    assert _bytes(load_file(out)[f"{layer}.weight"]) == _bytes(tensors[f"{layer}.weight"])
    with pytest.raises(RefusedError, match="cannot be made; without --dtype") as raised:
        loratools.merge([path], over, weights=[0.05], dtype="bf16", out=tmp_path / "b.safetensors")
    assert raised.value.code == "quantised_base"
