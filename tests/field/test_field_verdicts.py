"""What every real file, folder and key list is: one table of verdicts, no refusal among them."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loratools import inspect
from loratools.containers.looks import what_weights
from tests.sparse_files import sparse

FILES, LISTS = "adapters_and_models", "keymaps"
# What only the user knows is asked for; that is no refusal.
ASKED = {"alpha_missing"}


@dataclass(frozen=True)
class Is:
    """An adapter: its format, kinds, ranks, scalings, and problems as (code, severity) → times."""

    format: str
    kinds: dict[str, int]
    ranks: dict[int, int]
    scalings: dict[float, int]
    problems: dict[tuple[str, str], int] = field(default_factory=dict)
    foldable: bool = True


def pairs(form: str, count: int, rank: int, scaling: float, **problems: str) -> Is:
    """An adapter of LoRA pairs of one rank and one scaling, with problems by code."""
    said = dict.fromkeys(problems.items(), 1)
    return Is(form, {"LowRank": count}, {rank: count}, {scaling: count}, said)


# What no adapter is looks like something: the words that `looks_like` begins with.
BASE = "a base model (weights of a language model or an encoder), not an adapter"
CHECKPOINT = "a base model (a single-file image checkpoint), not an adapter"
CONVOLUTIONS = "a convolutional network, not an adapter"
CLIP = "a text encoder (CLIP; one component of an image model)"
DIT = "a diffusion transformer (one component of an image or video model)"
UNET = "a diffusion U-Net (one component of an image model)"
UNKNOWN = "weights of an unknown sort"
JSON = "JSON text"

DISNEY = pairs("cloneofsimo", 192, 1, 1.0, unexplained="note")
ROBERTA = Is(
    "loralib", {"LowRank": 24, "Replace": 4}, {8: 24}, {1.0: 24}, {("alpha_missing", "error"): 1}
)
QWEN = pairs("mlx", 8, 8, 10.0, config_conflict="note")
QWEN_AND_SNAPSHOT = pairs("mlx", 8, 8, 10.0, config_conflict="note", unexplained="note")
TWO_PARAMS = pairs("onnx_adapter", 1, 1, 1.0, unexplained="note")

# A folder, as a whole; one whose row is None is a table of its files.
FOLDERS: dict[str, Is | str | None] = {
    "candle-pickle-oddities": None,
    "cloneofsimo-disney-sd15": DISNEY,
    "gpt2-smart-review": pairs("peft", 12, 8, 2.0),
    "gptneo-movies": pairs("peft", 24, 8, 2.0),
    "invoke-test-embedding": "a textual-inversion embedding",
    "loralib-roberta-base-mnli": ROBERTA,
    "mlx-qwen25-05b": QWEN_AND_SNAPSHOT,
    "optimum-tiny-onnx": "an ONNX graph (model.onnx, DistilBertForSequenceClassification)",
    "ort-genai-tiny-gpt2-onnx": "a base model (ONNX, for onnxruntime-genai), not an adapter",
    "ort-two-params-onnx-adapter": TWO_PARAMS,
    "pkg-facenet-mtcnn": None,
    "pkg-lpips-lin": f"{UNKNOWN} (lin0.model.1.weight [1, 64, 1, 1]",
    "pkg-minilm-l6-v2-header": "a config.json, BertModel without any weights",
    "pkg-silero-vad": None,
    "safetensors-sample": f"{UNKNOWN} (B [6], H [6]",
    "sam-lora-rank2-6-8": None,
    "sd15-catundchat-attnproc": pairs("diffusers", 128, 4, 1.0),
    "stories260k-hf": "a base model (config.json and weights, LlamaForCausalLM), not an adapter",
    "stories260k-llama2c": None,
    "torchtune-tiny-fair": BASE,
}

# Every file that is no JSON; all that is JSON is that and nothing more.
INSIDE: dict[str, Is | str] = {
    "candle-pickle-oddities/fortran_tensor_3d.pth": f"{UNKNOWN} (tensor_fortran [2, 3, 4])",
    "candle-pickle-oddities/test_with_key.pt": f"{UNKNOWN} (test [2, 4])",
    "cloneofsimo-disney-sd15/lora_disney.safetensors": DISNEY,
    "gpt2-smart-review/adapter_model.safetensors": pairs("peft", 12, 8, 2.0),
    "gptneo-movies/adapter_model.safetensors": pairs("peft", 24, 8, 2.0),
    "invoke-test-embedding/test_embedding.safetensors": "a textual-inversion embedding",
    "loralib-roberta-base-mnli/roberta_base_lora_mnli.bin": ROBERTA,
    "mlx-qwen25-05b/0000100_adapters.safetensors": QWEN,
    "mlx-qwen25-05b/adapters.safetensors": QWEN_AND_SNAPSHOT,
    "optimum-tiny-onnx/model.onnx": "an ONNX graph (made by pytorch), not an adapter",
    "ort-genai-tiny-gpt2-onnx/past.onnx": "an ONNX graph (made by onnxruntime.transformers)",
    "ort-two-params-onnx-adapter/two_params_lora_model.onnx_adapter": TWO_PARAMS,
    "pkg-facenet-mtcnn/pnet.pt": CONVOLUTIONS,
    "pkg-facenet-mtcnn/rnet.pt": CONVOLUTIONS,
    "pkg-lpips-lin/alex.pth": f"{UNKNOWN} (lin0.model.1.weight [1, 64, 1, 1]",
    "pkg-silero-vad/silero_vad_16k.safetensors": CONVOLUTIONS,
    "pkg-silero-vad/silero_vad_16k_op15.onnx": "an ONNX graph (made by pytorch), not an adapter",
    "safetensors-sample/overall.safetensors": f"{UNKNOWN} (B [6], H [6]",
    "sam-lora-rank2-6-8/lora_rank2.safetensors": f"{UNKNOWN} (w_a_000 [2, 768]",
    "sam-lora-rank2-6-8/lora_rank6.safetensors": f"{UNKNOWN} (w_a_000 [6, 768]",
    "sd15-catundchat-attnproc/pytorch_lora_weights.safetensors": pairs("diffusers", 128, 4, 1.0),
    "stories260k-hf/model.safetensors": BASE,
    "stories260k-llama2c/stories260K.bin": "a base model (llama2.c), not an adapter",
    "stories260k-llama2c/tok512.bin": "a file of some other sort",
    "torchtune-tiny-fair/tiny_fair_checkpoint.pt": BASE,
}

# Every list of keys; "NAME:values" are the names on the other side of a table of renames, and
# "NAME:ENTRY" those under an entry of the file.
KEYS: dict[str, Is | str] = {
    **{
        f"aitoolkit__stable_diffusion_{name}:ldm_diffusers_keymap": CHECKPOINT
        for name in ("refiner", "sd1", "sd2", "sdxl", "ssd", "vega")
    },
    "aitoolkit__stable_diffusion_refiner_unmatched:ldm": UNKNOWN,
    "aitoolkit__stable_diffusion_sd2_unmatched:ldm": UNKNOWN,
    "aitoolkit__stable_diffusion_sdxl_unmatched:ldm": UNKNOWN,
    "aitoolkit__stable_diffusion_ssd_unmatched:ldm": UNKNOWN,
    "base__all-MiniLM-L6-v2": BASE,
    "base__silero_vad_16k": CONVOLUTIONS,
    "base__stories260k-hf": BASE,
    "diffsynth__flux_dit": DIT,
    "diffsynth__flux_vae": "a VAE",
    "diffsynth__flux_vae:values": CONVOLUTIONS,  # one half of it, without its front
    "diffsynth__krea2_dit": DIT,
    "diffsynth__sdxl": UNET,
    "diffsynth__sdxl:values": UNET,
    "diffsynth__sdxl_text_encoder": CLIP,
    "diffsynth__sdxl_text_encoder:values": CLIP,
    "diffsynth__sdxl_text_encoder_2": CLIP,
    "diffsynth__sdxl_text_encoder_2:values": CLIP,
    "diffsynth__sdxl_vae": "a VAE",
    "diffsynth__sdxl_vae:values": "a VAE",
    "diffsynth__wan_video_dit": DIT,
    "diffsynth__wan_video_dit:values": DIT,
    "invoke__anima_comfyui_keys": DIT,
    "invoke__anima_lora_kohya_format": pairs("kohya", 11, 8, 0.125),
    "invoke__anima_lora_peft_format": pairs("comfy", 6, 8, 1.0),
    "invoke__flux2_transformer_bfl_keys": DIT,
    "invoke__flux2_vae_bfl_keys": "a VAE",
    "invoke__flux_lokr_bfl_format": Is("comfy", {"Kronecker": 6}, {}, {}, {}, True),
    "invoke__flux_lora_diffusers_base_model_format": pairs("diffusers", 381, 4, 1.0),
    "invoke__flux_lora_diffusers_format": pairs("diffusers", 494, 32, 1.0),
    "invoke__flux_lora_kohya_format": pairs("kohya", 304, 16, 0.0625),
    "invoke__flux_lora_xlabs_format": pairs("xlabs", 24, 16, 1.0),
    "invoke__instantx_flux_controlnet_state_dict__instantx_sd_shapes": "a ControlNet",
    "invoke__qwen_image_lora_diffusers_format": pairs("diffusers", 3, 64, 0.015625),
    "invoke__qwen_vl_encoder_comfyui_keys": BASE,
    "invoke__xlabs_flux_ip_adapter_state_dict__xlabs_flux_ip_adapter_sd_shapes": "an IP-Adapter",
    "invoke__z_image_transformer_comfyui_keys": DIT,
    "lorainspector__inspector__file__tests__alpha_keys": pairs("kohya", 264, 2, 0.5),
}
# No lists of tensors: a config, names that stand in another list, an index of the folder.
OTHERS = {
    "invoke__instantx_flux_controlnet_state_dict__instantx_config",
    "lorainspector__inspector__file__tests__base_names",
    "index",
}
# Kinds that a later version folds: until then their modules are named, and the file is not folded.
TO_COME = {"unknown_type"}


# ------------------------------------------------------------------------------- files and folders


@pytest.mark.parametrize("name", [*FOLDERS, *INSIDE])
def test_every_folder_and_file_is_what_it_is(name, field_data: Path, record_property):
    there = inspect(field_data / FILES / name)
    expected = FOLDERS[name] if name in FOLDERS else INSIDE[name]
    if expected is not None:
        [found] = there
        judge(found, expected, record_property)
        return
    found = {str(Path(f.source).relative_to(field_data / FILES)): f for f in there}
    assert found.keys() == {n for n in INSIDE if n.startswith(f"{name}/")}
    for inside, one in found.items():
        judge(one, INSIDE[inside], lambda *_: None)  # each has its own row


def test_every_file_has_its_row(field_data: Path):
    top = field_data / FILES
    assert {p.name for p in top.iterdir() if p.is_dir()} == set(FOLDERS)
    files = {str(p.relative_to(top)) for p in top.rglob("*") if p.is_file() and p.parent != top}
    texts = {f for f in files if f.endswith(".json")}
    assert files - texts == set(INSIDE)
    assert {inspect(top / f)[0].looks_like for f in texts} == {JSON}


def test_the_whole_collection_is_one_table_without_an_error(field_data: Path):
    found = inspect(field_data / FILES)
    assert [f.error for f in found if f.error] == []
    assert [f.source for f in found if f.duplicate_of] == []


# ------------------------------------------------------------------------------- lists of keys


@pytest.mark.parametrize("name", KEYS)
def test_every_key_list_is_what_it_is(name, field_data: Path, tmp_path, record_property):
    shapes = listed(field_data, name)
    expected = KEYS[name]
    [found] = inspect(sparse(tmp_path / "a.safetensors", shapes))
    judge(found, expected, record_property)
    if isinstance(expected, str):
        assert what_weights({k: tuple(s) for k, s in shapes.items()}) == found.looks_like


def test_every_key_list_has_its_row(field_data: Path):
    there = {p.stem for p in (field_data / LISTS).glob("*.json")}
    assert there == {name.partition(":")[0] for name in KEYS} | OTHERS


def listed(field_data: Path, name: str) -> dict[str, list[int]]:
    """Names and shapes of a list; small ones where it has none."""
    stem, _, part = name.partition(":")
    table = json.loads((field_data / LISTS / f"{stem}.json").read_text())
    if isinstance(table, list):  # of alphas: the factors belong to them
        ends = (".alpha", ".lora_down.weight", ".lora_up.weight")
        table = {key.removesuffix(".alpha") + end: "" for key in table for end in ends}
    elif part == "values":
        table = dict.fromkeys(table.values(), "")
    elif part:
        table = table[part]
    if stem == "diffsynth__flux_dit":  # names within a block stand there without the block
        table = {within_a_block(key): "" for key in table if key.endswith(("weight", "scale"))}
    return {key: shape_of(key, said) for key, said in table.items() if key}


def within_a_block(key: str) -> str:
    if key.startswith(("img_attn", "txt_attn", "img_m", "txt_m")):
        return f"double_blocks.0.{key}"
    single = key.startswith(("linear", "modulation", "norm."))
    return f"single_blocks.0.{key}" if single else key


def shape_of(key: str, said: object) -> list[int]:
    match said:
        case {"shape": list(shape)} | [str(), list(shape)]:
            return shape
        case list(shape):
            return shape
    if key.endswith(".alpha"):
        return []
    ends = {"lora_down.weight": [2, 4], "lora_up.weight": [4, 2], "bias": [4]}
    return next((shape for end, shape in ends.items() if key.endswith(end)), [4, 4])


# ------------------------------------------------------------------------------- the verdict


def judge(found, expected: Is | str, record_property) -> None:
    """That an inspection says what is expected; its refusals are counted for the end of the run."""
    errors = [p.code for p in found.problems if p.severity == "error"]
    record_property("refusals", sum(code not in ASKED | TO_COME for code in errors))
    assert found.error is None
    if isinstance(expected, str):
        assert (found.format, found.kinds, found.problems) == (None, {}, ())
        assert found.looks_like.startswith(expected)
        return
    problems = Counter((p.code, p.severity) for p in found.problems)
    said = Is(found.format, found.kinds, found.ranks, found.scalings, problems, found.foldable)
    assert (said, found.looks_like) == (expected, None)
    assert set(errors) <= ASKED | TO_COME
