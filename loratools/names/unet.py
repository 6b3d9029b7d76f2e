"""U-Nets of Stable Diffusion: diffusers' names beside those of LDM and SGM, from the layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

from loratools.names.rules import Rule, table

_RESNET = """
norm1 in_layers.0
conv1 in_layers.2
time_emb_proj emb_layers.1
norm2 out_layers.0
conv2 out_layers.3
conv_shortcut skip_connection
"""
_ENDS = """
norm
proj_in
proj_out
"""
_BLOCK = """
norm1
norm2
norm3
attn1.to_q
attn1.to_k
attn1.to_v
attn1.to_out.0
attn2.to_q
attn2.to_k
attn2.to_v
attn2.to_out.0
ff.net.0.proj
ff.net.2
"""
_AROUND = """
conv_in input_blocks.0.0
time_embedding.linear_1 time_embed.0
time_embedding.linear_2 time_embed.2
conv_norm_out out.0
conv_out out.2
"""
_ADDED = """
linear_1 label_emb.0.0
linear_2 label_emb.0.2
"""


def unet(
    attended: Sequence[bool], *, deep: bool = True, added: str = "", layers: int = 2
) -> Iterator[Rule]:
    """The rules of a U-Net that has attention on these of its levels, counted from the outside.

    `deep`: attentions of more than one transformer block; `added`: diffusers' name of what LDM
    calls label_emb. Cut U-Nets (SSD-1B, Vega) have a part of their parent's modules.
    """
    levels, step = len(attended), layers + 1
    block = f"transformer_blocks.{'{n}' if deep else 0}."

    def resnet(first: str, second: str) -> Iterator[Rule]:
        yield from table(_RESNET, first=f"unet.{first}.", second=f"diffusion_model.{second}.")

    def attention(first: str, second: str) -> Iterator[Rule]:
        first, second = f"unet.{first}.", f"diffusion_model.{second}."
        yield from table(_ENDS, first=first, second=second)
        yield from table(_BLOCK, first=first + block, second=second + block)

    def sampler(first: str, second: str) -> Rule:
        return Rule((f"unet.{first}.0.conv",), f"diffusion_model.{second}")

    yield from table(_AROUND, first="unet.", second="diffusion_model.")
    if added:
        yield from table(_ADDED, first=f"unet.{added}.", second="diffusion_model.")
    for level, has in enumerate(attended):
        for i in range(layers):
            place = f"input_blocks.{level * step + i + 1}"
            yield from resnet(f"down_blocks.{level}.resnets.{i}", f"{place}.0")
            if has:
                yield from attention(f"down_blocks.{level}.attentions.{i}", f"{place}.1")
        if level < levels - 1:
            place = f"input_blocks.{(level + 1) * step}"
            yield sampler(f"down_blocks.{level}.downsamplers", f"{place}.0.op")
    yield from resnet("mid_block.resnets.0", "middle_block.0")
    yield from attention("mid_block.attentions.0", "middle_block.1")
    yield from resnet("mid_block.resnets.1", "middle_block.2")
    for level, has in enumerate(reversed(attended)):
        for i in range(step):
            place = f"output_blocks.{level * step + i}"
            yield from resnet(f"up_blocks.{level}.resnets.{i}", f"{place}.0")
            if has:
                yield from attention(f"up_blocks.{level}.attentions.{i}", f"{place}.1")
        if level < levels - 1:
            place = f"output_blocks.{(level + 1) * step - 1}"
            yield sampler(f"up_blocks.{level}.upsamplers", f"{place}.{2 if has else 1}.conv")


@cache
def sd1() -> tuple[Rule, ...]:
    """Stable Diffusion 1."""
    return tuple(unet((True, True, True, False), deep=False))


@cache
def sd2() -> tuple[Rule, ...]:
    """Stable Diffusion 2, unCLIP's class embedding included."""
    return tuple(unet((True, True, True, False), deep=False, added="class_embedding"))


@cache
def sdxl() -> tuple[Rule, ...]:
    """Stable Diffusion XL, and what was cut from it: SSD-1B, Vega."""
    return tuple(unet((False, True, True), added="add_embedding"))


@cache
def refiner() -> tuple[Rule, ...]:
    """The refiner of Stable Diffusion XL."""
    return tuple(unet((False, True, True, False), added="add_embedding"))


_CASCADE = """
clip_txt_mapper
clip_txt_pooled_mapper
clip_img_mapper
embedding.1
clf.1
down_downscalers.{n}.1
down_downscalers.{n}.1.blocks.{m}
down_repeat_mappers.{n}.{m}
up_upscalers.{n}.1
up_upscalers.{n}.1.blocks.{m}
up_repeat_mappers.{n}.{m}
"""
_CASCADE_BLOCK = """
depthwise
channelwise.0
channelwise.2
channelwise.4
mapper
mapper_sca
mapper_crp
kv_mapper.1
attention.to_[q,k,v].weight attention.attn.in_proj_weight
attention.to_[q,k,v].bias attention.attn.in_proj_bias
attention.to_out.0 attention.attn.out_proj
"""


@cache
def cascade() -> tuple[Rule, ...]:
    """The prior (stage C) of Stable Cascade."""
    rules = list(table(_CASCADE, first="prior.", second="diffusion_model."))
    for side in ("down", "up"):
        place = f"{side}_blocks.{{n}}.{{m}}."
        first, second = f"prior.{place}", f"diffusion_model.{place}"
        rules += table(_CASCADE_BLOCK, first=first, second=second)
    return tuple(rules)
