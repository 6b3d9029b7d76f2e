"""HunyuanVideo and HunyuanImage: diffusers' names beside Tencent's."""

from __future__ import annotations

from functools import cache

from loratools.names.dit import rules_of
from loratools.names.rules import Rule, table

_TOKENS = """
x_embedder.proj img_in.proj
proj_out final_layer.linear
norm_out.linear final_layer.adaLN_modulation.1 order=halves
context_embedder.proj_in txt_in.input_embedder
context_embedder.time_text_embed.timestep_embedder.linear_1 txt_in.t_embedder.mlp.0
context_embedder.time_text_embed.timestep_embedder.linear_2 txt_in.t_embedder.mlp.2
context_embedder.time_text_embed.text_embedder.linear_1 txt_in.c_embedder.linear_1
context_embedder.time_text_embed.text_embedder.linear_2 txt_in.c_embedder.linear_2
"""
_REFINER = """
norm1
norm2
attn.to_[q,k,v] self_attn_qkv
attn.to_out.0 self_attn_proj
ff.net.0.proj mlp.fc1
ff.net.2 mlp.fc2
norm_out.linear adaLN_modulation.1
"""
_HUNYUAN_VIDEO = """
time_text_embed.timestep_embedder.linear_1 time_in.mlp.0
time_text_embed.timestep_embedder.linear_2 time_in.mlp.2
time_text_embed.guidance_embedder.linear_1 guidance_in.mlp.0
time_text_embed.guidance_embedder.linear_2 guidance_in.mlp.2
time_text_embed.text_embedder.linear_1 vector_in.in_layer
time_text_embed.text_embedder.linear_2 vector_in.out_layer
"""
_HUNYUAN_IMAGE = """
time_guidance_embed.timestep_embedder.linear_1 time_in.mlp.0
time_guidance_embed.timestep_embedder.linear_2 time_in.mlp.2
time_guidance_embed.timestep_embedder_r.linear_1 time_r_in.mlp.0
time_guidance_embed.timestep_embedder_r.linear_2 time_r_in.mlp.2
time_guidance_embed.guidance_embedder.linear_1 guidance_in.mlp.0
time_guidance_embed.guidance_embedder.linear_2 guidance_in.mlp.2
context_embedder_2.norm byt5_in.layernorm
context_embedder_2.linear_1 byt5_in.fc1
context_embedder_2.linear_2 byt5_in.fc2
context_embedder_2.linear_3 byt5_in.fc3
"""
_DOUBLE = """
attn.to_[q,k,v] img_attn_qkv
attn.norm_q img_attn_q_norm
attn.norm_k img_attn_k_norm
attn.to_out.0 img_attn_proj
attn.add_[q,k,v]_proj txt_attn_qkv
attn.norm_added_q txt_attn_q_norm
attn.norm_added_k txt_attn_k_norm
attn.to_add_out txt_attn_proj
norm1.linear img_mod.linear
norm1_context.linear txt_mod.linear
ff.net.0.proj img_mlp.fc1
ff.net.2 img_mlp.fc2
ff_context.net.0.proj txt_mlp.fc1
ff_context.net.2 txt_mlp.fc2
"""
_SINGLE = """
[attn.to_q,attn.to_k,attn.to_v,proj_mlp] linear1 sizes=square
attn.norm_q q_norm
attn.norm_k k_norm
proj_out linear2
norm.linear modulation.linear
"""
# HunyuanImage's own files hold apart what its trainers fuse.
_APART = (
    ("attn.to_[q,k,v] img_attn_qkv", "img_attn_"),
    ("attn.add_[q,k,v]_proj txt_attn_qkv", "txt_attn_"),
    ("[attn.to_q,attn.to_k,attn.to_v,proj_mlp] linear1 sizes=square", "linear1_"),
)


def _hunyuan(around: str, double: str = _DOUBLE, single: str = _SINGLE) -> tuple[Rule, ...]:
    first = "transformer.context_embedder.token_refiner.refiner_blocks.{n}."
    second = "diffusion_model.txt_in.individual_token_refiner.blocks.{n}."
    return (
        *rules_of(
            _TOKENS + around,
            transformer_blocks=("double_blocks", double),
            single_transformer_blocks=("single_blocks", single),
        ),
        *table(_REFINER, first=first, second=second),
    )


@cache
def video() -> tuple[Rule, ...]:
    """HunyuanVideo."""
    return _hunyuan(_HUNYUAN_VIDEO)


@cache
def image() -> tuple[Rule, ...]:
    """HunyuanImage 2.1 as trainers name it, q, k and v in one."""
    return _hunyuan(_HUNYUAN_IMAGE)


@cache
def image_apart() -> tuple[Rule, ...]:
    """HunyuanImage 2.1 as its own files name it, q, k and v apart."""
    double, single = _DOUBLE, _SINGLE.replace("linear2", "linear2.fc")
    for line, stem in _APART:
        rule = table(line)[0]
        ends = ("q", "k", "v", "mlp")[: len(rule.parts)]
        apart = "\n".join(f"{p} {stem}{e}" for p, e in zip(rule.parts, ends, strict=True))
        double, single = double.replace(line, apart), single.replace(line, apart)
    return _hunyuan(_HUNYUAN_IMAGE, double, single)
