"""Both spellings of names, as transformers itself has them in memory and writes them to disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as hf
from safetensors import safe_open

from loratools.names.prefixes import Prefix, find_prefix
from loratools.names.spellings import FAMILIES, Spelling, spellings

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGE = SIZES | {"image_size": 8, "patch_size": 4}
TEXT = SIZES | {"vocab_size": 40, "num_key_value_heads": 2}
DINO = {k: v for k, v in IMAGE.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
DETR = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}
RESNET = {
    "embedding_size": 4,
    "hidden_sizes": [4, 4, 4, 4],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}
SEGFORMER = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "decoder_hidden_size": 8}
QWEN = {
    "text_config": TEXT | {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 0]}},
    "vision_config": {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "patch_size": 4,
    },
}
MODELS: dict[str, tuple[str, Callable[[], hf.PreTrainedModel]]] = {
    "vit": ("vit", lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE))),
    "deit": ("vit", lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**IMAGE))),
    "beit": ("vit", lambda: hf.BeitForImageClassification(hf.BeitConfig(**IMAGE))),
    "dinov2": ("dinov2", lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINO))),
    "swin": ("swin", lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN))),
    "segformer": (
        "segformer",
        lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**SEGFORMER)),
    ),
    "detr": (
        "detr",
        lambda: hf.DetrForObjectDetection(
            hf.DetrConfig(**DETR, backbone_config=hf.ResNetConfig(**RESNET))
        ),
    ),
    "gpt_neox": ("gpt_neox", lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES))),
    "llava": (
        "llava",
        lambda: hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                vision_config=hf.CLIPVisionConfig(**IMAGE), text_config=hf.LlamaConfig(**TEXT)
            )
        ),
    ),
    "qwen2_vl": (
        "qwen2_vl",
        lambda: hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(**QWEN)),
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def names(request, tmp_path_factory):
    """A family, the names of a model in memory, and those in the file that it is saved to."""
    family, make = MODELS[request.param]
    model, folder = make(), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return family, set(model.state_dict()), set(file.keys())


def test_a_family_is_spelt_as_transformers_saves_and_loads_it(names):
    family, memory, disk = names
    assert memory != disk
    assert {Spelling(family)(n) for n in memory} == disk
    assert {Spelling(family, back=True)(n) for n in disk} == memory


def test_the_spelling_is_found_by_the_names_alone(names):
    _, memory, disk = names
    changed = sorted(memory - disk)
    assert {find_prefix(changed, disk)(n) for n in changed} <= disk
    wrapped = {f"module.{n}" for n in disk}
    assert {find_prefix(changed, wrapped)(n) for n in changed} <= wrapped
    assert not find_prefix([*changed, "nowhere.weight"], disk)


def test_names_without_a_family_stay_as_they_are():
    plain = ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
    assert find_prefix(plain, set(plain)) == Prefix()
    for spelling in spellings():
        if spelling.family not in ("vit", "qwen2_vl"):
            assert [spelling(n) for n in plain] == plain
    assert {s.family for s in spellings()} == set(FAMILIES)
