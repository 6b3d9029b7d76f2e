"""Text encoders: the names of transformers' classes, and OpenCLIP's as diffusers converts them."""

import pytest
import torch
import transformers as hf
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_open_clip_checkpoint,
    convert_sd3_t5_checkpoint_to_diffusers,
)

from loratools.names import clip
from loratools.names.rules import Names, filled
from tests.names.both_ways import merged, modules, on_meta, one_to_one

TEXT = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 7,
    "projection_dim": 8,
}
DECODER = {k: v for k, v in TEXT.items() if k != "projection_dim"}
T5 = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_heads": 2, "num_layers": 3, "vocab_size": 10}
CLASSES = {
    "clip": (clip.CLIP, lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**TEXT))),
    "t5": (clip.T5, lambda: hf.T5EncoderModel(hf.T5Config(**T5))),
    "t5 gated": (
        clip.T5,
        lambda: hf.T5EncoderModel(hf.T5Config(**T5, feed_forward_proj="gated-gelu")),
    ),
    "gemma2": (clip.DECODER, lambda: hf.Gemma2Model(hf.Gemma2Config(**DECODER))),
    "qwen3": (clip.DECODER, lambda: hf.Qwen3Model(hf.Qwen3Config(**DECODER))),
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_module_of_the_real_class_is_listed(name):
    listed, make = CLASSES[name]
    real = set(modules(on_meta(make)))
    numbers = [str(n) for n in range(3)]
    known = {filled(each, {"n": n}) for each in listed for n in numbers}
    assert real <= known


def test_a_clip_with_and_without_text_model():
    """transformers itself has dropped the name: the class without a projection lacks it."""
    full = modules(on_meta(CLASSES["clip"][1]))
    bare = modules(on_meta(lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT))))
    rules = clip.flat("text_encoder")
    one_to_one(rules)
    names = Names(rules)
    with_name = {f"text_encoder.{each}" for each in full if each != "text_projection"}
    assert {names.of_part(each).whole for each in with_name} == {f"text_encoder.{b}" for b in bare}
    assert {names.of_whole(f"text_encoder.{b}").parts[0] for b in bare} == with_name


@pytest.mark.parametrize("prefix", ["conditioner.embedders.1.model.", "cond_stage_model.model."])
def test_open_clip_as_diffusers_converts_it(prefix):
    torch.manual_seed(0)
    model = hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**TEXT))
    state = model.state_dict()
    rules = clip.openclip("text_encoder_2", prefix)
    one_to_one(rules)
    original, _ = merged(rules, state, dict.fromkeys(modules_of(state), 8), "text_encoder_2")
    turned = f"{prefix}text_projection"
    original[turned] = original[turned].T.contiguous()
    assert f"{prefix}transformer.resblocks.2.attn.in_proj_bias" in original
    made = convert_open_clip_checkpoint(model, original, prefix=prefix)
    if prefix.startswith("cond_stage"):  # a projection that SD2 does not use: left out there
        del state["text_projection.weight"]
    assert made.keys() == state.keys()
    assert all(torch.equal(made[key], value) for key, value in state.items())


def modules_of(state):
    return [key.rpartition(".")[0] for key in state]


def test_single_files_hold_text_encoders_under_a_prefix():
    state = on_meta(CLASSES["clip"][1]).state_dict()
    prefix = "conditioner.embedders.0.transformer."
    rules = clip.stored(clip.CLIP, "text_encoder", prefix)
    original, _ = merged(rules, state, dict.fromkeys(modules_of(state), 8), "text_encoder")
    made = convert_ldm_clip_checkpoint(original, remove_prefix=prefix)
    assert made.keys() == state.keys()
    state = on_meta(CLASSES["t5 gated"][1]).state_dict()
    rules = clip.stored(clip.T5, "text_encoder_3", "text_encoders.t5xxl.transformer.")
    state.pop("encoder.embed_tokens.weight", None)  # the same tensor as `shared`
    original, _ = merged(rules, state, dict.fromkeys(modules_of(state), 8), "text_encoder_3")
    made = convert_sd3_t5_checkpoint_to_diffusers(original)
    assert made.keys() >= state.keys()
