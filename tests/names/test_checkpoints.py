"""What the names of an image base's weights mean, in every layout that such files have."""

import pytest

from loratools.names.checkpoints import Checkpoint, addresses_of

UNET = [
    "input_blocks.0.0.weight",
    "input_blocks.1.1.norm.weight",
    "middle_block.0.in_layers.0.bias",
]
FLUX = ["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_mod.lin.bias",
        "single_blocks.0.linear1.weight", "img_in.weight"]  # fmt: skip
CLIP = "text_model.encoder.layers.0.self_attn.q_proj.weight"
OPEN = "transformer.resblocks.0.attn.in_proj_weight"
T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"


def under(front: str, names: list[str]) -> list[str]:
    return [front + name for name in names]


@pytest.mark.parametrize("front", ["model.diffusion_model.", "diffusion_model.", "net.", ""])
def test_what_makes_the_image(front):
    found = addresses_of(under(front, FLUX))
    assert found is not None
    assert dict(found.here) == {f"diffusion_model.{n}": f"{front}{n}" for n in FLUX}
    assert (found.architecture, found.is_original) == ("flux", True)
    assert found.component(f"{front}img_in.weight") == "transformer"
    assert {"transformer", "unet", "diffusion_model", "prior"} == found.roots


@pytest.mark.parametrize(
    ("prefix", "inside", "component"),
    [
        ("cond_stage_model.transformer.", CLIP, "text_encoder"),
        ("cond_stage_model.transformer.", CLIP.removeprefix("text_model."), "text_encoder"),
        ("cond_stage_model.model.", OPEN, "text_encoder"),
        ("conditioner.embedders.0.transformer.", CLIP, "text_encoder"),
        ("conditioner.embedders.0.model.", OPEN, "text_encoder_2"),
        ("conditioner.embedders.1.model.", OPEN, "text_encoder_2"),
        ("conditioner.embedders.1.model.", CLIP, "text_encoder_2"),
        ("text_encoders.clip_l.transformer.", CLIP, "text_encoder"),
        ("text_encoders.clip_g.transformer.", CLIP, "text_encoder_2"),
    ],
)
def test_where_a_single_file_has_its_text_encoders(prefix, inside, component):
    found = addresses_of([*under("model.diffusion_model.", UNET), prefix + inside, "betas"])
    assert found is not None
    assert found.name(f"{component}.{inside}") == prefix + inside
    assert found.component(prefix + inside) == component
    assert component in found.roots
    whole = found.fused.of_whole(f"{component}.{OPEN}") if found.fused else None
    assert (whole is not None) == (inside == OPEN)
    if inside != OPEN:  # with and without text_model.
        flat = inside.removeprefix("text_model.")
        for spelt in (flat, f"text_model.{flat}"):
            assert found.name(f"{component}.{spelt}") == prefix + inside


@pytest.mark.parametrize(
    ("others", "component"),
    [
        (under("model.diffusion_model.", FLUX), "text_encoder_2"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "text_encoder_3"),
        ([f"text_encoders.clip_g.transformer.{CLIP}"], "text_encoder_3"),
    ],
)
def test_a_t5_is_the_second_encoder_of_flux_and_the_third_of_sd3(others, component):
    name = f"text_encoders.t5xxl.transformer.{T5}"
    found = addresses_of([*others, name])
    assert found is not None
    assert found.name(f"{component}.{T5}") == name


def test_the_names_of_a_pipeline_are_addresses():
    names = ["unet.conv_in.weight", f"text_encoder.{CLIP}", "safety_checker.x", "vae.y"]
    found = addresses_of(names, is_pipeline=True)
    assert found is not None
    assert dict(found.here) == {name: name for name in names}
    assert (found.is_original, found.fused) == (False, None)
    assert found.component("safety_checker.x") == "safety_checker"


@pytest.mark.parametrize(
    "hint", ["text_encoder", "text_encoder_2", "text_encoder_3", "renamed", ""]
)
def test_a_component_that_looks_like_others_is_known_by_its_folder(hint):
    found = Checkpoint([CLIP], hint=hint).addresses
    assert found is not None
    wanted = hint if hint in ("text_encoder", "text_encoder_2") else "text_encoder"
    assert wanted in found.roots


def test_everything_that_a_weight_may_be_called():
    found = addresses_of(under("model.diffusion_model.", UNET))
    assert found is not None
    called = list(found.known_as("model.diffusion_model.input_blocks.0.0.weight"))
    assert called == ["diffusion_model.input_blocks.0.0.weight", "unet.input_blocks.0.0.weight",
                      "unet.conv_in.weight"]  # fmt: skip
    found = addresses_of(under("model.diffusion_model.", FLUX))
    assert found is not None
    # Of a fused weight no part gives it its name: --skip "*to_q*" would leave out k and v too.
    called = list(found.known_as("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"))
    assert not any("to_q" in name for name in called)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"],
        ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"],
        ["x", "y"],
        ["bert.encoder.layer.0.attention.self.query.weight"],
    ],
)
def test_language_models_have_no_addresses(names):
    assert addresses_of(names) is None
