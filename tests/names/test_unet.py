"""U-Nets: the names of the real classes, and diffusers' own converter on what we call them."""

import pytest
from diffusers import StableCascadeUNet, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_stable_cascade_unet_single_file_to_diffusers,
)

from loratools.names import unet
from loratools.names.rules import Names
from tests.names.both_ways import agree, merged, numbered, on_meta, one_to_one

CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
SD1 = {"cross_attention_dim": 768}
SD2 = {"cross_attention_dim": 1024, "use_linear_projection": True}
UNCLIP = SD2 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048}
TEXT_TIME = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
SDXL = TEXT_TIME | {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = TEXT_TIME | {
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", *CROSS[:2], "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
UNETS = {
    "sd1": (unet.sd1, SD1),
    "sd2": (unet.sd2, SD2),
    "unclip": (unet.sd2, UNCLIP),
    "sdxl": (unet.sdxl, SDXL),
    "refiner": (unet.refiner, REFINER),
}


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_converter_makes_its_names_of_ours(name):
    rules, config = UNETS[name]
    model = on_meta(lambda: UNet2DConditionModel(**config))

    def convert(checkpoint):
        named = {f"model.diffusion_model.{key}": value for key, value in checkpoint.items()}
        return convert_ldm_unet_checkpoint(named, dict(model.config))

    agree(rules(), model, convert, "unet")
    one_to_one(rules())


def test_no_rule_is_for_a_module_that_no_model_has():
    for name, (rules, config) in UNETS.items():
        if name != "sd2":  # without the class embedding, which unCLIP has
            model = on_meta(lambda config=config: UNet2DConditionModel(**config))
            state, columns = numbered(model)
            used = merged(rules(), state, columns, "unet")[0]
            names = Names(rules())
            asked = {names.of_whole(key.rpartition(".")[0]).rule for key in used}
            unused = {rule.parts[0] for rule in set(rules()) - asked}
            # A shortcut is there where a block has as many channels as it gets, or not.
            assert {part.rpartition(".")[2] for part in unused} <= {"conv_shortcut"}


def test_stable_cascade_as_diffusers_converts_it():
    config = {
        "block_out_channels": (8, 8),
        "conditioning_dim": 8,
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (2, 3),
        "up_num_layers_per_block": (3, 2),
        "down_blocks_repeat_mappers": (1, 1),
        "up_blocks_repeat_mappers": (1, 1),
        "clip_text_in_channels": 8,
        "clip_text_pooled_in_channels": 8,
        "clip_image_in_channels": 8,
        "switch_level": (False,),
    }
    model = on_meta(lambda: StableCascadeUNet(**config))
    convert = convert_stable_cascade_unet_single_file_to_diffusers
    agree(unet.cascade(), model, convert, "prior")
    one_to_one(unet.cascade())
