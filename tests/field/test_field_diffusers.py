"""Image adapters and key lists that others published: each is known for what it is and read."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loratools import algebra
from loratools.containers.bundle import local
from loratools.formats import bfl, cloneofsimo, comfy, xlabs
from loratools.formats import diffusers as form
from tests.formats.image_bytes import found, read, write

ALL = (form, xlabs, bfl, comfy, cloneofsimo)
# (key list, format, vocabulary, deltas, one of the addresses)
LISTS = [
    ("flux_lora_diffusers_base_model_format", form, "diffusers", 381,
     "transformer.proj_out.weight"),
    ("flux_lora_diffusers_format", form, "diffusers", 494,
     "transformer.single_transformer_blocks.0.norm.linear.weight"),
    ("qwen_image_lora_diffusers_format", form, "diffusers", 3,
     "transformer.transformer_blocks.1.attn.to_k.weight"),
    ("flux_lora_xlabs_format", xlabs, "diffusers", 0,
     "transformer.transformer_blocks.10.attn.add_q_proj.weight"),
    ("anima_lora_peft_format", comfy, "original", 6,
     "diffusion_model.blocks.0.mlp.layer1.weight"),
]  # fmt: skip


def shapes_of(field_data: Path, name: str) -> dict[str, tuple[int, ...]]:
    text = (field_data / "keymaps" / f"invoke__{name}.json").read_text()
    return {key: tuple(shape) for key, shape in json.loads(text).items()}


def small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape a thousandth as large that still multiplies: all sizes above 64 by their ratio."""
    return tuple(n if n <= 64 else 3 * (n // 96) // 16 for n in shape)


@pytest.mark.parametrize("row", LISTS, ids=lambda row: row[0])
def test_published_keys_are_recognised_and_read(row, field_data, tmp_path):
    name, expected, vocabulary, count, address = row
    shapes = {k: small(s) for k, s in shapes_of(field_data, name).items()}
    path = write(tmp_path / "a.safetensors", shapes)
    assert [f for f in ALL if f.detect(local(path))] == [expected]
    adapter = read(expected, path)
    cut = [m for c, m in found(adapter) if c == "missing"]  # lists that were cut off within a pair
    assert len(found(adapter)) == len(cut) <= 1
    assert adapter.vocabulary == vocabulary
    assert address in adapter.deltas
    assert count in (0, len(adapter.deltas))


def test_a_published_lokr_is_read(field_data, tmp_path):
    shapes = shapes_of(field_data, "flux_lokr_bfl_format")
    adapter = read(comfy, write(tmp_path / "a.safetensors", shapes))
    assert not found(adapter)
    assert adapter.kinds == {"Kronecker": 6}


NOT_OURS = ["anima_lora_kohya_format", "flux_lora_kohya_format", "flux2_transformer_bfl_keys",
            "anima_comfyui_keys", "z_image_transformer_comfyui_keys", "flux2_vae_bfl_keys",
            "qwen_vl_encoder_comfyui_keys"]  # fmt: skip


@pytest.mark.parametrize("name", NOT_OURS)
def test_other_published_keys_are_left_to_others(name, field_data, tmp_path):
    shapes = {k: tuple(1 for _ in s) for k, s in shapes_of(field_data, name).items()}
    path = write(tmp_path / "a.safetensors", shapes)
    assert not [f for f in ALL if f.detect(local(path))]


def test_a_published_file_of_the_processor_era(field_data):
    folder = field_data / "adapters_and_models" / "sd15-catundchat-attnproc"
    adapter = read(form, folder)
    assert adapter.problems == ()
    assert len(adapter.deltas) == 128
    assert {(d.rank, d.scaling) for d in adapter.deltas.values()} == {(4, 1.0)}
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    up, down = (tensors[f"{stem}.processor.to_out_lora.{h}.weight"] for h in ("up", "down"))
    made = algebra.materialise(adapter.deltas[f"unet.{stem}.to_out.0.weight"])
    assert (made == up.double() @ down.double()).all()


def test_the_disney_file_of_cloneofsimo(field_data):
    folder = field_data / "adapters_and_models" / "cloneofsimo-disney-sd15"
    file = next(folder.glob("*.safetensors"))
    assert [f for f in ALL if f.detect(local(file))] == [cloneofsimo]
    adapter = read(cloneofsimo, file)
    assert found(adapter) == []
    assert [c for c, _ in found(adapter, "note")] == ["unexplained"]
    assert adapter.config == {"tokens": ["<s1>", "<s2>"]}
    assert len(adapter.deltas) == 192
    shapes = {k: (d.b.shape[0], d.a.shape[1]) for k, d in adapter.deltas.items()}
    block = "transformer_blocks.0"
    assert shapes[f"unet.mid_block.attentions.0.{block}.ff.net.0.proj.weight"] == (10240, 1280)
    assert shapes[f"unet.up_blocks.3.attentions.2.{block}.attn2.to_v.weight"] == (320, 768)
    assert shapes[f"unet.down_blocks.1.attentions.0.{block}.attn1.to_q.weight"] == (640, 640)


def test_others_published_adapters_are_left_to_others(field_data):
    ours = {"cloneofsimo-disney-sd15", "sd15-catundchat-attnproc"}
    for folder in sorted((field_data / "adapters_and_models").iterdir()):
        if folder.is_dir() and folder.name not in ours:
            files = [p for p in folder.iterdir() if p.is_file()]
            for path in (folder, *files):
                assert not [f for f in ALL if f.detect(local(path))], path
