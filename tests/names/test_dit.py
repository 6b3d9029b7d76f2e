"""Diffusion transformers: diffusers' own converters, run on what we call each weight."""

import pytest
import torch
from diffusers import (
    AnimaTextConditioner,
    CosmosTransformer3DModel,
    HunyuanImageTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import lora_conversion_utils as lora
from diffusers.loaders import single_file_utils as convert

from loratools.errors import FitError
from loratools.names import dit, hunyuan
from loratools.names.orders import ORDERS, SIZES
from loratools.names.rules import Names, asked
from tests.names.both_ways import (
    agree,
    merged,
    modules,
    numbered,
    on_meta,
    one_to_one,
)

MODELS = {
    "sd3": (
        dit.sd3,
        lambda: SD3Transformer2DModel(
            num_layers=3, dual_attention_layers=(0, 1), qk_norm="rms_norm"
        ),
        convert.convert_sd3_transformer_checkpoint_to_diffusers,
    ),
    "wan": (
        dit.wan,
        lambda: WanTransformer3DModel(num_layers=2),
        convert.convert_wan_transformer_to_diffusers,
    ),
    "wan from images": (
        dit.wan,
        lambda: WanTransformer3DModel(num_layers=2, image_dim=1280, added_kv_proj_dim=5120),
        convert.convert_wan_transformer_to_diffusers,
    ),
    "vace": (
        dit.wan,
        lambda: WanVACETransformer3DModel(num_layers=2, vace_layers=[0, 1]),
        convert.convert_wan_transformer_to_diffusers,
    ),
    "z-image": (
        dit.z_image,
        lambda: ZImageTransformer2DModel(n_layers=2, n_refiner_layers=2),
        convert.convert_z_image_transformer_checkpoint_to_diffusers,
    ),
    "lumina2": (
        dit.lumina2,
        lambda: Lumina2Transformer2DModel(num_layers=2, num_refiner_layers=2),
        convert.convert_lumina2_to_diffusers,
    ),
    "hunyuan-video": (
        hunyuan.video,
        lambda: HunyuanVideoTransformer3DModel(
            num_layers=2, num_single_layers=2, num_refiner_layers=2
        ),
        convert.convert_hunyuan_video_transformer_to_diffusers,
    ),
    "cosmos": (
        dit.cosmos,
        lambda: CosmosTransformer3DModel(num_layers=2, extra_pos_embed_type=None),
        lambda state: convert.convert_cosmos_transformer_checkpoint_to_diffusers(
            {f"net.{key}": value for key, value in state.items()}
        ),
    ),
}
ALL = {
    **{name: rules for name, (rules, _, _) in MODELS.items()},
    "hunyuan-image": hunyuan.image,
    "hunyuan-image apart": hunyuan.image_apart,
    "z-image apart": dit.z_image_apart,
    "qwen-image": dit.qwen_image,
    "anima": dit.anima,
    "krea2": dit.krea2,
}


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_converter_makes_its_names_of_ours(name):
    rules, make, converter = MODELS[name]
    agree(rules(), on_meta(make), converter)


@pytest.mark.parametrize("name", ALL)
def test_no_name_stands_twice(name):
    one_to_one(ALL[name]())


def test_krea2_as_diffusers_converts_it():
    model = on_meta(lambda: Krea2Transformer2DModel(num_layers=2))
    flat = {key for key in model.state_dict() if "blocks" in key and "scale_shift" in key}
    state, columns = numbered(model)
    for key in flat:  # six vectors, one after another in the original
        state[key] = torch.arange(state[key].numel()).reshape(6, -1)
    original, _ = merged(dit.krea2(), state, columns, "transformer")
    given = {key.removeprefix("diffusion_model."): value for key, value in original.items()}
    made = convert.convert_krea2_transformer_checkpoint_to_diffusers(given)
    assert made.keys() == state.keys()
    assert all(torch.equal(made[key], value) for key, value in state.items())
    assert len(flat) == 2


def test_qwen_image_has_one_set_of_names():
    model = on_meta(lambda: QwenImageTransformer2DModel(num_layers=2))
    state, columns = numbered(model)
    original, _ = merged(dit.qwen_image(), state, columns, "transformer")
    assert original.keys() == {f"diffusion_model.{key}" for key in state}


@pytest.mark.parametrize("rules", [hunyuan.image, hunyuan.image_apart])
def test_every_module_of_hunyuan_image_has_a_name(rules):
    model = on_meta(
        lambda: HunyuanImageTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=2,
            guidance_embeds=True,
            use_meanflow=True,
            text_embed_2_dim=64,
        )
    )
    state, columns = numbered(model)
    original, _ = merged(rules(), state, columns, "transformer")
    apart = rules is hunyuan.image_apart
    assert ("diffusion_model.double_blocks.1.img_attn_k.weight" in original) == apart
    assert ("diffusion_model.single_blocks.1.linear1.weight" in original) != apart
    assert len({len(value) for value in original.values()}) > 3


def keys(rules, model, component):
    """What LoRA files in the original names call the linear layers of a model."""
    known, names = Names(rules()), {}
    for module in modules(model):
        if type(model.get_submodule(module)) is torch.nn.Linear:
            found, _ = asked(known.of_part, f"{component}.{module}")
            names.setdefault(found.whole, []).append(f"{component}.{module}")
    return names


def loaded(converter, names):
    state = {f"{name}.lora_A.weight": torch.zeros(1, 1) for name in names}
    return {key.removesuffix(".lora_A.weight") for key in converter(state)}


def test_anima_loras_go_where_diffusers_loads_them():
    transformer = on_meta(lambda: CosmosTransformer3DModel(num_layers=2))
    conditioner = on_meta(lambda: AnimaTextConditioner(num_layers=2))
    state, columns = numbered(conditioner)
    merged(dit.anima(), state, columns, "text_conditioner")
    for model, component in ((transformer, "transformer"), (conditioner, "text_conditioner")):
        names = keys(dit.anima, model, component)
        wanted = {part for parts in names.values() for part in parts}
        assert loaded(lora._convert_non_diffusers_anima_lora_to_diffusers, names) == wanted


def test_krea2_loras_go_where_diffusers_loads_them():
    names = keys(dit.krea2, on_meta(lambda: Krea2Transformer2DModel(num_layers=2)), "transformer")
    wanted = {part for parts in names.values() for part in parts}
    assert loaded(lora._convert_non_diffusers_krea2_lora_to_diffusers, names) == wanted


def test_rows_that_fit_no_rule_are_refused():
    assert SIZES["queries"](3840, 2304, 3) == [2304, 768, 768]
    for size, rows in (("queries", 2304), ("queries", 2305), ("square", 10), ("equal", 10)):
        with pytest.raises(FitError, match=f"{rows} rows"):
            SIZES[size](rows, 2304, 3)
    assert ORDERS["final"](4, columns=2) == [2, 3, 0, 1]
    assert ORDERS["final"](12, columns=2) == list(range(12))
