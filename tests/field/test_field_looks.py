"""What every real file is: one table of verdicts, for adapters and for what is none."""

import json
from pathlib import Path

import pytest

from loratools import inspect
from loratools.containers.looks import what_weights
from loratools.formats import NAMES

# Folder → file within it ("" for the folder itself) → format, or what it looks like instead.
# A format that is not registered yet is a layout that loratools does not know.
VERDICTS: dict[str, dict[str, str]] = {
    "candle-pickle-oddities": {
        "fortran_tensor_3d.pth": "weights of an unknown sort",
        "test_with_key.pt": "weights of an unknown sort",
    },
    "cloneofsimo-disney-sd15": {"": "=cloneofsimo"},
    "gpt2-smart-review": {"": "=peft"},
    "gptneo-movies": {"": "=peft"},
    "invoke-test-embedding": {"": "a textual-inversion embedding"},
    "loralib-roberta-base-mnli": {"": "=loralib"},
    "mlx-qwen25-05b": {"": "=mlx"},
    "optimum-tiny-onnx": {"": "an ONNX graph (model.onnx, DistilBert"},
    "ort-genai-tiny-gpt2-onnx": {"": "a base model (ONNX, for onnxruntime-genai)"},
    "ort-two-params-onnx-adapter": {"": "=onnx_adapter"},
    "pkg-facenet-mtcnn": {
        "pnet.pt": "a convolutional network", "rnet.pt": "a convolutional network",
    },
    "pkg-lpips-lin": {"": "weights of an unknown sort (lin0.model.1.weight [1, 64, 1, 1]"},
    "pkg-minilm-l6-v2-header": {"": "a config.json, BertModel without any weights"},
    "pkg-silero-vad": {
        "silero_vad_16k.safetensors": "a convolutional network",
        "silero_vad_16k_op15.onnx": "an ONNX graph (made by pytorch)",
    },
    "safetensors-sample": {"": "weights of an unknown sort (B [6], H [6]"},
    "sam-lora-rank2-6-8": {
        "lora_rank2.safetensors": "weights of an unknown sort (w_a_000 [2, 768]",
        "lora_rank6.safetensors": "weights of an unknown sort (w_a_000 [6, 768]",
    },
    "sd15-catundchat-attnproc": {"": "=diffusers"},
    "stories260k-hf": {"": "a base model (config.json and weights, LlamaForCausalLM)"},
    "stories260k-llama2c": {
        "stories260K.bin": "a base model (llama2.c)", "tok512.bin": "a file of some other sort",
    },
    "torchtune-tiny-fair": {"": "a base model (weights of a language model"},
}  # fmt: skip

KEYS = {
    "base__all-MiniLM-L6-v2": "a base model",
    "base__silero_vad_16k": "a convolutional network",
    "base__stories260k-hf": "a base model",
    "diffsynth__krea2_dit": "a diffusion transformer",
    "diffsynth__sdxl": "a diffusion U-Net",
    "diffsynth__sdxl_text_encoder": "a text encoder",
    "diffsynth__sdxl_text_encoder_2": "a text encoder",
    "diffsynth__sdxl_vae": "a VAE",
    "diffsynth__flux_vae": "a VAE",
    "diffsynth__wan_video_dit": "a diffusion transformer",
    "invoke__anima_comfyui_keys": "a diffusion transformer",
    "invoke__flux2_transformer_bfl_keys": "a diffusion transformer",
    "invoke__flux2_vae_bfl_keys": "a VAE",
    "invoke__instantx_flux_controlnet_state_dict__instantx_sd_shapes": "a ControlNet",
    "invoke__qwen_vl_encoder_comfyui_keys": "a base model",
    "invoke__xlabs_flux_ip_adapter_state_dict__xlabs_flux_ip_adapter_sd_shapes": "an IP-Adapter",
    "invoke__z_image_transformer_comfyui_keys": "a diffusion transformer",
}


@pytest.mark.parametrize("folder", VERDICTS)
def test_every_folder_is_what_it_is(folder, field_data: Path):
    for name, verdict in VERDICTS[folder].items():
        place = field_data / "adapters_and_models" / folder / name
        [found] = [f for f in inspect(place) if name or "_adapters" not in f.source]
        if verdict.startswith("=") and verdict[1:] in NAMES:
            assert (found.format, found.looks_like) == (verdict[1:], None)
        elif verdict.startswith("="):
            assert found.format is None
        else:
            assert found.format is None
            assert found.looks_like.startswith(verdict)


def test_no_folder_is_left_out(field_data: Path):
    there = {p.name for p in (field_data / "adapters_and_models").iterdir() if p.is_dir()}
    assert there == set(VERDICTS)


def test_the_whole_collection_is_one_table_without_an_error(field_data: Path):
    found = inspect(field_data / "adapters_and_models")
    assert [f.error for f in found if f.error] == []
    assert [f.source for f in found if f.duplicate_of] == []


@pytest.mark.parametrize("name", KEYS)
def test_published_key_lists(name, field_data: Path):
    table = json.loads((field_data / "keymaps" / f"{name}.json").read_text())
    assert what_weights(dict.fromkeys(table, (2, 2))).startswith(KEYS[name])


@pytest.mark.parametrize("model", ["refiner", "sd1", "sd2", "sdxl", "ssd", "vega"])
def test_single_file_checkpoints(model, field_data: Path):
    file = field_data / "keymaps" / f"aitoolkit__stable_diffusion_{model}.json"
    table = json.loads(file.read_text())["ldm_diffusers_keymap"]
    found = what_weights(dict.fromkeys(table, (2, 2)))
    assert found == "a base model (a single-file image checkpoint), not an adapter"
