"""Pipelines of diffusers: components, variants and shards in folders, read and written again."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools.commands.check import check
from loratools.commands.merge import merge
from loratools.commands.verify import verify
from loratools.errors import LoratoolsError
from loratools.weights.base import headers
from loratools.weights.layout import index_files, plan_shards
from loratools.weights.pipeline import weights_in
from tests.small_models import tensor

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
K = Q.replace("to_q", "to_k")
TEXT = "text_model.encoder.layers.0.self_attn.q_proj.weight"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSES = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.0",
    "_name_or_path": "../elsewhere", "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"], "vae": ["diffusers", "AutoencoderKL"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None], "requires_safety_checker": False,
}  # fmt: skip
CONFIG = {"_class_name": "UNet2DConditionModel"}


def pipeline(folder: Path, **more: object) -> Path:
    """A pipeline's folder with a part of Stable Diffusion's weights."""
    (folder / "scheduler").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({**CLASSES, **more}))
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    for component in ("unet", "text_encoder", "vae", "tokenizer"):
        (folder / component).mkdir()
    save_file({Q: tensor(1, 6, 6), K: tensor(2, 6, 6)}, folder / "unet" / WEIGHTS, {"made": "so"})
    (folder / "unet" / "config.json").write_text(json.dumps(CONFIG))
    save_file({TEXT: tensor(3, 4, 4)}, folder / "text_encoder" / "model.safetensors")
    said = {"model_type": "clip_text_model", "torch_dtype": "float32"}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(said))
    # A header with spaces, as only an odd writer makes it: untouched, it is copied as it is.
    header = b'{"x" : {"dtype":"F32", "shape":[2], "data_offsets":[0,8]}}   '
    raw = len(header).to_bytes(8, "little") + header + b"\1\2\3\4\5\6\7\0"
    (folder / "vae" / WEIGHTS).write_bytes(raw)
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    return folder


def lora(path: Path, *modules: str) -> Path:
    made = {}
    for i, module in enumerate(modules or (f"unet.{Q}", f"text_encoder.{TEXT}")):
        stem, size = module.removesuffix(".weight"), 6 if module.startswith("unet") else 4
        made[f"{stem}.lora_A.weight"] = tensor(10 + i, 2, size) * 0.3
        made[f"{stem}.lora_B.weight"] = tensor(20 + i, size, 2) * 0.3
    save_file(made, path)
    return path


def shards(folder: Path, component: str, index: str, names: tuple[str, str]) -> None:
    """A component's weights in two files."""
    place = folder / component
    file = next(place.glob("*.safetensors"))
    tensors = load_file(file)
    file.unlink()
    where = {}
    for (key, value), name in zip(tensors.items(), names, strict=True):
        save_file({key: value}, place / name)
        where[key] = name
    size = sum(v.nbytes for v in tensors.values())
    (place / index).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))


def refused(source: Path) -> LoratoolsError:
    with pytest.raises(LoratoolsError) as caught:
        headers(source)
    assert caught.value.message.isprintable()
    return caught.value


# ------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("named", ["", "model_index.json"])
def test_every_component_is_read_under_its_name(named, tmp_path):
    found = headers(pipeline(tmp_path / "p") / named)
    assert set(found.tensors) == {f"unet.{Q}", f"unet.{K}", f"text_encoder.{TEXT}", "vae.x"}
    assert all(leaf.name == name for name, leaf in found.tensors.items())
    assert [s.name for s in found.shards] == [
        f"unet/{WEIGHTS}", "text_encoder/model.safetensors", f"vae/{WEIGHTS}",
    ]  # fmt: skip
    assert found.components["unet"] == CONFIG
    assert found.config == {}
    assert found.problems == ()
    assert found.is_image
    assert found.tied() is None


def test_one_component_is_a_base_of_its_own(tmp_path):
    found = headers(pipeline(tmp_path / "p") / "unet")
    assert set(found.tensors) == {Q, K}
    assert (found.config, dict(found.components)) == (CONFIG, {})


VARIANTS = ["model.fp16.safetensors", "model.bf16.safetensors"]


@pytest.mark.parametrize(
    ("names", "read", "aside"),
    [
        ([WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"], WEIGHTS, ["fp16"]),
        (["diffusion_pytorch_model.x.safetensors"], "diffusion_pytorch_model.x.safetensors", []),
        (["model.fp16.safetensors", "config.json"], "model.fp16.safetensors", []),
        (["model.safetensors", *VARIANTS], "model.safetensors", ["bf16", "fp16"]),
        (["pytorch_model.bin", "model.fp16.safetensors"], "pytorch_model.bin", ["fp16"]),
        (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"],
         "model.safetensors.index.fp16.json", []),
        (["diffusion_pytorch_model.safetensors.fp16.index.json"],
         "diffusion_pytorch_model.safetensors.fp16.index.json", []),
        (["diffusion_pytorch_model.non_ema.safetensors", WEIGHTS], WEIGHTS, ["non_ema"]),
        (["diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.bin"],
         "diffusion_pytorch_model.safetensors.index.json", []),
        (["other.safetensors"], None, []),
        (["model.fp16.gguf", "model.a b.safetensors"], None, []),
    ],
)  # fmt: skip
def test_which_file_of_a_folder_is_read(names, read, aside):
    assert weights_in(names, "folder") == (read, aside)


def test_several_variants_without_a_plain_one_are_refused_by_name():
    with pytest.raises(LoratoolsError, match="bf16, fp16") as caught:
        weights_in(VARIANTS, "folder")
    assert caught.value.code == "not_found"


def test_a_variant_beside_the_plain_file_is_said(tmp_path):
    folder = pipeline(tmp_path / "p")
    save_file(
        {Q: tensor(1, 6, 6).half()}, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    )
    [note] = headers(folder).problems
    assert note.severity == "note"
    assert note.message.startswith("unet: diffusion_pytorch_model.safetensors is read")
    assert "fp16" in note.message


def test_a_component_that_is_not_there_is_a_warning(tmp_path):
    folder = pipeline(tmp_path / "p", text_encoder_2=["transformers", "CLIPTextModel"])
    [problem] = headers(folder).problems
    assert (problem.code, problem.severity) == ("base_incomplete", "warning")
    assert "text_encoder_2" in problem.message


# ------------------------------------------------------------------------------- hostile ones


@pytest.mark.parametrize(
    "name", ["../other", "..", ".", "", "/etc", "a/b", "C:\\x", "x\0y", "..\\x"]
)
def test_no_component_leads_out_of_the_folder(name, tmp_path):
    other = pipeline(tmp_path / "other")
    assert refused(pipeline(tmp_path / "p", **{name: ["diffusers", "X"]})).code == "hostile"
    assert other.exists()


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", '{"unet": ["a", "b"], "unet": ["a", "b"]}', "[" * 9999]
)
def test_an_index_that_is_no_plain_object_is_refused(text, tmp_path):
    folder = pipeline(tmp_path / "p")
    (folder / "model_index.json").write_text(text)
    assert refused(folder).exit == 3


def test_an_index_of_a_component_names_files_of_its_folder_only(tmp_path):
    folder = pipeline(tmp_path / "p")
    shards(folder, "unet", f"{WEIGHTS}.index.json", ("a.safetensors", "b.safetensors"))
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(index.read_text().replace("a.safetensors", "../vae/" + WEIGHTS))
    assert refused(folder).code == "hostile"


def test_only_existing_folders_of_the_index_are_read(tmp_path):
    folder = pipeline(tmp_path / "p")
    save_file({"y": tensor(1, 3)}, folder / "single.safetensors")
    extra = folder / "checkpoint-500"
    extra.mkdir()
    save_file({"y": tensor(1, 3)}, extra / "model.safetensors")
    assert {s.name.split("/")[0] for s in headers(folder).shards} == {"unet", "text_encoder", "vae"}


def test_a_pipeline_without_weights_says_so(tmp_path):
    folder = pipeline(tmp_path / "p")
    for file in folder.glob("*/*.safetensors"):
        file.unlink()
    assert refused(folder).code == "not_found"


# ------------------------------------------------------------------------------- what is written


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_what_no_adapter_touches_is_copied_as_bytes(tmp_path):
    base, out = pipeline(tmp_path / "p"), tmp_path / "out"
    result = merge([lora(tmp_path / "l.safetensors")], base, out=out)
    before, after = files(base), files(out)
    changed = {n for n in before if before[n] != after[n]}
    assert changed == {f"unet/{WEIGHTS}", "text_encoder/model.safetensors"}
    assert after.keys() - before.keys() == {"loratools.json"}
    assert (result.targets, result.total) == (2, 2)
    unet = load_file(out / "unet" / WEIGHTS)
    assert torch.equal(unet[K], tensor(2, 6, 6))
    factors = load_file(tmp_path / "l.safetensors")
    a, b = (factors[f"unet.{Q.removesuffix('.weight')}.lora_{half}.weight"] for half in "AB")
    torch.testing.assert_close(unet[Q], tensor(1, 6, 6) + b @ a)
    with safe_open(out / "unet" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"made": "so"}
        assert list(file.keys()) == list(load_file(base / "unet" / WEIGHTS))


def test_other_weights_and_stray_folders_are_left_out_and_said(tmp_path):
    base, out = pipeline(tmp_path / "p"), tmp_path / "out"
    save_file({"y": tensor(1, 3)}, base / "single.safetensors")
    (base / "unet" / "flax_model.msgpack").write_bytes(b"x")
    (base / "README.md").write_text("of the base")
    result = merge([lora(tmp_path / "l.safetensors")], base, out=out)
    assert not {"single.safetensors", "unet/flax_model.msgpack", "README.md"} & files(out).keys()
    assert any("single.safetensors and 1 more" in note for note in result.notes)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_of_a_component_stay_shards(variant, tmp_path):
    index = f"{WEIGHTS}.index{variant}.json"
    names = (f"u{variant}-00001-of-00002.safetensors", f"u{variant}-00002-of-00002.safetensors")
    base, out = pipeline(tmp_path / "p"), tmp_path / "out"
    shards(base, "unet", index, names)
    merge([lora(tmp_path / "l.safetensors")], base, out=out)
    assert files(out).keys() == files(base).keys() | {"loratools.json"}
    assert json.loads((out / "unet" / index).read_text()) == json.loads(
        (base / "unet" / index).read_text()
    )
    found = headers(out)
    assert found.indexes == {"unet": index}
    assert found.tensors.keys() == headers(base).tensors.keys()


def test_torch_shards_become_safetensors_with_their_index(tmp_path):
    base, out = pipeline(tmp_path / "p"), tmp_path / "out"
    place = base / "unet"
    tensors = load_file(place / WEIGHTS)
    (place / WEIGHTS).unlink()
    where = {}
    for i, (key, value) in enumerate(tensors.items()):
        torch.save({key: value}, place / f"diffusion_pytorch_model-0000{i + 1}-of-00002.bin")
        where[key] = f"diffusion_pytorch_model-0000{i + 1}-of-00002.bin"
    table = {"metadata": {}, "weight_map": where}
    (place / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps(table))
    merge([lora(tmp_path / "l.safetensors")], base, out=out)
    assert {n for n in files(out) if n.startswith("unet/")} == {
        "unet/config.json", f"unet/{WEIGHTS}.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    }  # fmt: skip
    assert headers(out).tensors.keys() == headers(base).tensors.keys()


def test_another_dtype_reaches_every_component_and_its_config(tmp_path):
    base, out = pipeline(tmp_path / "p"), tmp_path / "out"
    merge([lora(tmp_path / "l.safetensors")], base, out=out, dtype="bf16")
    assert {leaf.dtype for leaf in headers(out).tensors.values()} == {"BF16"}
    config = json.loads((out / "text_encoder" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert (out / "unet" / "config.json").read_bytes() == (
        base / "unet" / "config.json"
    ).read_bytes()


def test_a_pipeline_is_no_single_file(tmp_path):
    with pytest.raises(LoratoolsError, match="name a folder") as caught:
        merge(
            [lora(tmp_path / "l.safetensors")],
            pipeline(tmp_path / "p"),
            out=tmp_path / "o.safetensors",
        )
    assert caught.value.code == "usage"
    assert not (tmp_path / "o.safetensors").exists()


def test_the_index_of_every_folder_speaks_of_that_folder(tmp_path):
    base = headers(pipeline(tmp_path / "p"))
    assert index_files(base, plan_shards(base, {})) == {}


def test_a_quantised_component_counts_where_it_is_touched(tmp_path):
    folder = pipeline(tmp_path / "p")
    said = {"model_type": "clip_text_model", "quantization_config": {"quant_method": "quanto"}}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(said))
    assert check([lora(tmp_path / "u.safetensors", f"unet.{Q}")], folder).ok
    found = check([lora(tmp_path / "both.safetensors")], folder)
    assert [p.code for p in found.problems if p.severity == "error"] == ["quantised_base"]


# ------------------------------------------------------------------------------- proved, continued


def test_a_written_pipeline_proves_itself(tmp_path):
    base, out = pipeline(tmp_path / "p"), tmp_path / "out"
    adapter = lora(tmp_path / "l.safetensors")
    merge([adapter], base, out=out)
    proof = verify(out, base=base, adapters=[adapter], require="replay")
    assert (proof.ok, proof.proved) == (True, "replay")
    again = tmp_path / "again"
    merge([], out=again, recipe=out / "loratools.json")
    assert {n: b for n, b in files(again).items() if n != "loratools.json"} == {
        n: b for n, b in files(out).items() if n != "loratools.json"
    }


@pytest.mark.parametrize("file", [f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "unet/config.json"])
def test_a_changed_file_is_found(file, tmp_path):
    base, out = pipeline(tmp_path / "p"), tmp_path / "out"
    merge([lora(tmp_path / "l.safetensors")], base, out=out)
    raw = bytearray((out / file).read_bytes())
    raw[-3] ^= 1
    (out / file).write_bytes(raw)
    proof = verify(out)
    assert not proof.ok
    assert {m.file for m in proof.mismatches} == {file}


def test_a_file_that_a_reader_would_take_up_beside_is_found(tmp_path):
    base, out = pipeline(tmp_path / "p"), tmp_path / "out"
    merge([lora(tmp_path / "l.safetensors")], base, out=out)
    (out / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    proof = verify(out)
    assert [m.file for m in proof.mismatches] == ["unet/diffusion_pytorch_model.bin"]


def test_a_fold_by_another_tool_is_proved_without_a_receipt(tmp_path):
    base, out = pipeline(tmp_path / "p"), tmp_path / "out"
    adapter = lora(tmp_path / "l.safetensors")
    merge([adapter], base, out=out)
    (out / "loratools.json").unlink()
    proof = verify(out, base=base, adapters=[adapter])
    assert proof.ok, proof.mismatches


def test_an_interrupted_fold_goes_on_with_whole_components(tmp_path, monkeypatch):
    from loratools import streaming

    base, out = pipeline(tmp_path / "p"), tmp_path / "out"
    adapter = lora(tmp_path / "l.safetensors")
    kept, stream = [], streaming._fold

    def failing(run, one, piece, scale):
        if one.shard.name.startswith("text_encoder") and not kept:
            while f"unet/{WEIGHTS}" not in json.dumps(progress(out)):
                os.sched_yield() if hasattr(os, "sched_yield") else None
            kept.append(piece.name)
            raise KeyboardInterrupt
        stream(run, one, piece, scale)

    monkeypatch.setattr(streaming, "_fold", failing)
    with pytest.raises(KeyboardInterrupt):
        merge([adapter], base, out=out, threads=2)
    assert not out.exists()
    before = (tmp_path / "out.partial" / "unet" / WEIGHTS).stat()
    result = merge([adapter], base, out=out)
    assert f"unet/{WEIGHTS}" in result.continued
    assert (out / "unet" / WEIGHTS).stat().st_ino == before.st_ino
    assert verify(out, base=base, adapters=[adapter], require="replay").ok


def progress(out: Path) -> object:
    path = out.with_name("out.partial") / ".progress.json"
    return json.loads(path.read_text()) if path.exists() else {}
