"""Flux and its kin: diffusers' names beside those of Black Forest Labs."""

from __future__ import annotations

from functools import cache

from loratools.names.rules import Rule, table

_HERE, _THERE = "transformer.", "diffusion_model."

_ENDS = """
x_embedder img_in
context_embedder txt_in
proj_out final_layer.linear
"""
# diffusers reads scale before shift, the original shift before scale.
_LAST = "norm_out.linear final_layer.adaLN_modulation.1 order=halves"
_FLUX = """
time_text_embed.timestep_embedder.linear_1 time_in.in_layer
time_text_embed.timestep_embedder.linear_2 time_in.out_layer
time_text_embed.text_embedder.linear_1 vector_in.in_layer
time_text_embed.text_embedder.linear_2 vector_in.out_layer
time_text_embed.guidance_embedder.linear_1 guidance_in.in_layer
time_text_embed.guidance_embedder.linear_2 guidance_in.out_layer
"""
_ATTENTION = """
attn.to_[q,k,v] img_attn.qkv
attn.add_[q,k,v]_proj txt_attn.qkv
attn.to_out.0 img_attn.proj
attn.to_add_out txt_attn.proj
attn.norm_q.weight img_attn.norm.query_norm.scale
attn.norm_k.weight img_attn.norm.key_norm.scale
attn.norm_added_q.weight txt_attn.norm.query_norm.scale
attn.norm_added_k.weight txt_attn.norm.key_norm.scale
"""
_FEED = """
ff.net.0.proj img_mlp.0
ff.net.2 img_mlp.2
ff_context.net.0.proj txt_mlp.0
ff_context.net.2 txt_mlp.2
"""
_MODULATION = """
norm1.linear img_mod.lin
norm1_context.linear txt_mod.lin
"""
_SINGLE_NORMS = """
attn.norm_q.weight norm.query_norm.scale
attn.norm_k.weight norm.key_norm.scale
"""
_SINGLE = """
[attn.to_q,attn.to_k,attn.to_v,proj_mlp] linear1 sizes=square
proj_out linear2
"""
_SINGLE_MODULATION = "norm.linear modulation.lin"
_GUIDANCE = """
distilled_guidance_layer.in_proj
distilled_guidance_layer.out_proj
distilled_guidance_layer.layers.{n}.linear_1 distilled_guidance_layer.layers.{n}.in_layer
distilled_guidance_layer.layers.{n}.linear_2 distilled_guidance_layer.layers.{n}.out_layer
distilled_guidance_layer.norms.{n}.weight distilled_guidance_layer.norms.{n}.scale
"""
_FLUX2 = """
time_guidance_embed.timestep_embedder.linear_1 time_in.in_layer
time_guidance_embed.timestep_embedder.linear_2 time_in.out_layer
time_guidance_embed.guidance_embedder.linear_1 guidance_in.in_layer
time_guidance_embed.guidance_embedder.linear_2 guidance_in.out_layer
double_stream_modulation_img.linear double_stream_modulation_img.lin
double_stream_modulation_txt.linear double_stream_modulation_txt.lin
single_stream_modulation.linear single_stream_modulation.lin
"""
_FEED2 = """
ff.linear_in img_mlp.0
ff.linear_out img_mlp.2
ff_context.linear_in txt_mlp.0
ff_context.linear_out txt_mlp.2
"""
_SINGLE2 = """
attn.to_qkv_mlp_proj linear1
attn.to_out linear2
"""


def _rules(around: str, double: str, single: str) -> tuple[Rule, ...]:
    first, second = f"{_HERE}transformer_blocks.{{n}}.", f"{_THERE}double_blocks.{{n}}."
    alone, lone = f"{_HERE}single_transformer_blocks.{{n}}.", f"{_THERE}single_blocks.{{n}}."
    return (
        *table(around, first=_HERE, second=_THERE),
        *table(double, first=first, second=second),
        *table(single, first=alone, second=lone),
    )


@cache
def flux() -> tuple[Rule, ...]:
    """Flux 1 of any size: dev, schnell, Kontext, Fill, the distilled ones."""
    double = _ATTENTION + _FEED + _MODULATION
    return _rules(_ENDS + _FLUX + _LAST, double, _SINGLE + _SINGLE_NORMS + _SINGLE_MODULATION)


@cache
def chroma() -> tuple[Rule, ...]:
    """Chroma: Flux without modulation layers, guided by a network of its own."""
    return _rules(_ENDS + _GUIDANCE, _ATTENTION + _FEED, _SINGLE + _SINGLE_NORMS)


@cache
def flux2() -> tuple[Rule, ...]:
    """Flux 2, whose single blocks are fused in diffusers too."""
    return _rules(_ENDS + _FLUX2 + _LAST, _ATTENTION + _FEED2, _SINGLE2 + _SINGLE_NORMS)
