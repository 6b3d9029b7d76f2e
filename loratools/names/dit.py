"""Diffusion transformers: diffusers' names beside those of each one's own repository."""

from __future__ import annotations

from functools import cache

from loratools.names.rules import Rule, table

_HERE, _THERE = "transformer.", "diffusion_model."


def rules_of(around: str, **blocks: tuple[str, str]) -> tuple[Rule, ...]:
    """Rules of what stands alone, and of blocks: diffusers' name = (the original's, the rules)."""
    rules = list(table(around, first=_HERE, second=_THERE))
    for here, (there, inside) in blocks.items():
        first, second = f"{_HERE}{here}.{{n}}.", f"{_THERE}{there}.{{n}}."
        rules += table(inside, first=first, second=second)
    return tuple(rules)


_SD3 = """
pos_embed.pos_embed pos_embed
pos_embed.proj x_embedder.proj
time_text_embed.timestep_embedder.linear_1 t_embedder.mlp.0
time_text_embed.timestep_embedder.linear_2 t_embedder.mlp.2
time_text_embed.text_embedder.linear_1 y_embedder.mlp.0
time_text_embed.text_embedder.linear_2 y_embedder.mlp.2
context_embedder
proj_out final_layer.linear
norm_out.linear final_layer.adaLN_modulation.1 order=halves
"""
# The context of the last block ends in a norm of scale and shift, which diffusers swaps; the
# others have six vectors in one order (diffusers:loaders/single_file_utils.py).
_SD3_BLOCK = """
attn.to_[q,k,v] x_block.attn.qkv
attn.norm_q x_block.attn.ln_q
attn.norm_k x_block.attn.ln_k
attn.to_out.0 x_block.attn.proj
attn.add_[q,k,v]_proj context_block.attn.qkv
attn.norm_added_q context_block.attn.ln_q
attn.norm_added_k context_block.attn.ln_k
attn.to_add_out context_block.attn.proj
attn2.to_[q,k,v] x_block.attn2.qkv
attn2.norm_q x_block.attn2.ln_q
attn2.norm_k x_block.attn2.ln_k
attn2.to_out.0 x_block.attn2.proj
norm1.linear x_block.adaLN_modulation.1
norm1_context.linear context_block.adaLN_modulation.1 order=final
ff.net.0.proj x_block.mlp.fc1
ff.net.2 x_block.mlp.fc2
ff_context.net.0.proj context_block.mlp.fc1
ff_context.net.2 context_block.mlp.fc2
"""


@cache
def sd3() -> tuple[Rule, ...]:
    """Stable Diffusion 3 and 3.5."""
    return rules_of(_SD3, transformer_blocks=("joint_blocks", _SD3_BLOCK))


_WAN = """
patch_embedding
vace_patch_embedding
condition_embedder.time_embedder.linear_1 time_embedding.0
condition_embedder.time_embedder.linear_2 time_embedding.2
condition_embedder.time_proj time_projection.1
condition_embedder.text_embedder.linear_1 text_embedding.0
condition_embedder.text_embedder.linear_2 text_embedding.2
condition_embedder.image_embedder.norm1 img_emb.proj.0
condition_embedder.image_embedder.ff.net.0.proj img_emb.proj.1
condition_embedder.image_embedder.ff.net.2 img_emb.proj.3
condition_embedder.image_embedder.norm2 img_emb.proj.4
proj_out head.head
scale_shift_table head.modulation
"""
_WAN_BLOCK = """
attn1.to_q self_attn.q
attn1.to_k self_attn.k
attn1.to_v self_attn.v
attn1.to_out.0 self_attn.o
attn1.norm_q self_attn.norm_q
attn1.norm_k self_attn.norm_k
attn2.to_q cross_attn.q
attn2.to_k cross_attn.k
attn2.to_v cross_attn.v
attn2.to_out.0 cross_attn.o
attn2.norm_q cross_attn.norm_q
attn2.norm_k cross_attn.norm_k
attn2.add_k_proj cross_attn.k_img
attn2.add_v_proj cross_attn.v_img
attn2.norm_added_k cross_attn.norm_k_img
norm2 norm3
ffn.net.0.proj ffn.0
ffn.net.2 ffn.2
scale_shift_table modulation
"""
_VACE = """
proj_in before_proj
proj_out after_proj
"""


@cache
def wan() -> tuple[Rule, ...]:
    """Wan 2.1 and 2.2, text and image to video, VACE."""
    vace = _WAN_BLOCK + _VACE
    return rules_of(_WAN, blocks=("blocks", _WAN_BLOCK), vace_blocks=("vace_blocks", vace))


_QWEN = """
img_in
txt_in
txt_norm
time_text_embed.timestep_embedder.linear_1
time_text_embed.timestep_embedder.linear_2
norm_out.linear
proj_out
"""
_QWEN_BLOCK = """
attn.to_q
attn.to_k
attn.to_v
attn.to_out.0
attn.norm_q
attn.norm_k
attn.add_q_proj
attn.add_k_proj
attn.add_v_proj
attn.to_add_out
attn.norm_added_q
attn.norm_added_k
img_mod.1
txt_mod.1
img_mlp.net.0.proj
img_mlp.net.2
txt_mlp.net.0.proj
txt_mlp.net.2
"""


@cache
def qwen_image() -> tuple[Rule, ...]:
    """Qwen-Image and its edit models, whose own names diffusers took over."""
    return rules_of(_QWEN, transformer_blocks=("transformer_blocks", _QWEN_BLOCK))


_Z_IMAGE = """
all_x_embedder.2-1 x_embedder
all_final_layer.2-1.linear final_layer.linear
all_final_layer.2-1.adaLN_modulation.1 final_layer.adaLN_modulation.1
t_embedder.mlp.0
t_embedder.mlp.2
cap_embedder.0
cap_embedder.1
x_pad_token
cap_pad_token
"""
_Z_REFINER = """
attention.to_[q,k,v] attention.qkv
attention.to_out.0 attention.out
attention.norm_q attention.q_norm
attention.norm_k attention.k_norm
feed_forward.w1
feed_forward.w2
feed_forward.w3
attention_norm1
attention_norm2
ffn_norm1
ffn_norm2
"""
_Z_BLOCK = _Z_REFINER + "adaLN_modulation.0"


@cache
def z_image() -> tuple[Rule, ...]:
    """Z-Image as its single files and ComfyUI name it, q, k and v in one."""
    return rules_of(
        _Z_IMAGE,
        layers=("layers", _Z_BLOCK),
        noise_refiner=("noise_refiner", _Z_BLOCK),
        context_refiner=("context_refiner", _Z_REFINER),
    )


@cache
def z_image_apart() -> tuple[Rule, ...]:
    """Z-Image as its own repository and most trainers name it: as diffusers does."""
    parts = (part for rule in z_image() for part in rule.parts)
    return tuple(Rule((part,), _THERE + part.removeprefix(_HERE)) for part in parts)


_LUMINA2 = """
x_embedder
time_caption_embed.timestep_embedder.linear_1 t_embedder.mlp.0
time_caption_embed.timestep_embedder.linear_2 t_embedder.mlp.2
time_caption_embed.caption_embedder.0 cap_embedder.0
time_caption_embed.caption_embedder.1 cap_embedder.1
norm_out.linear_1 final_layer.adaLN_modulation.1
norm_out.linear_2 final_layer.linear
"""
_LUMINA2_ANY = """
attn.to_[q,k,v] attention.qkv sizes=queries
attn.to_out.0 attention.out
attn.norm_q attention.q_norm
attn.norm_k attention.k_norm
feed_forward.linear_1 feed_forward.w1
feed_forward.linear_2 feed_forward.w2
feed_forward.linear_3 feed_forward.w3
norm2 attention_norm2
ffn_norm1
ffn_norm2
"""
_LUMINA2_BLOCK = f"""{_LUMINA2_ANY}
norm1.norm attention_norm1
norm1.linear adaLN_modulation.1
"""
_LUMINA2_CONTEXT = _LUMINA2_ANY + "norm1 attention_norm1"


@cache
def lumina2() -> tuple[Rule, ...]:
    """Lumina Image 2."""
    return rules_of(
        _LUMINA2,
        layers=("layers", _LUMINA2_BLOCK),
        noise_refiner=("noise_refiner", _LUMINA2_BLOCK),
        context_refiner=("context_refiner", _LUMINA2_CONTEXT),
    )


_COSMOS = """
patch_embed.proj x_embedder.proj.1
time_embed.t_embedder.linear_1 t_embedder.1.linear_1
time_embed.t_embedder.linear_2 t_embedder.1.linear_2
time_embed.norm t_embedding_norm
norm_out.linear_1 final_layer.adaln_modulation.1
norm_out.linear_2 final_layer.adaln_modulation.2
proj_out final_layer.linear
"""
_COSMOS_BLOCK = "\n".join(
    [
        f"norm{i}.linear_{k} adaln_modulation_{part}.{k}"
        for i, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for k in (1, 2)
    ]
    + [
        f"attn{i}.{here} {part}.{there}"
        for i, part in enumerate(("self_attn", "cross_attn"), 1)
        for here, there in (
            ("to_q", "q_proj"),
            ("to_k", "k_proj"),
            ("to_v", "v_proj"),
            ("to_out.0", "output_proj"),
            ("norm_q", "q_norm"),
            ("norm_k", "k_norm"),
        )
    ]
    + ["ff.net.0.proj mlp.layer1", "ff.net.2 mlp.layer2"]
)
_CONDITIONER = """
embed
in_proj
out_proj
norm
"""
_CONDITIONER_BLOCK = "\n".join(
    [f"norm_{part}" for part in ("self_attn", "cross_attn", "mlp")]
    + [
        f"{part}.{name}"
        for part in ("self_attn", "cross_attn")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    ]
    + ["mlp.0", "mlp.2"]
)


@cache
def cosmos() -> tuple[Rule, ...]:
    """Cosmos Predict 2."""
    return rules_of(_COSMOS, transformer_blocks=("blocks", _COSMOS_BLOCK))


@cache
def anima() -> tuple[Rule, ...]:
    """Anima: Cosmos Predict 2, and the adapter of its text encoder, a component in diffusers."""
    here, there = "text_conditioner.", f"{_THERE}llm_adapter."
    blocks = table(_CONDITIONER_BLOCK, first=here + "blocks.{n}.", second=there + "blocks.{n}.")
    return (*cosmos(), *table(_CONDITIONER, first=here, second=there), *blocks)


_KREA2 = """
img_in first
time_embed.linear_1 tmlp.0
time_embed.linear_2 tmlp.2
time_mod_proj tproj.1
txt_in.norm.weight txtmlp.0.scale
txt_in.linear_1 txtmlp.1
txt_in.linear_2 txtmlp.3
text_fusion.projector txtfusion.projector
final_layer.linear last.linear
final_layer.norm.weight last.norm.scale
final_layer.scale_shift_table last.modulation.lin
"""
_KREA2_PLAIN = """
attn.to_q attn.wq
attn.to_k attn.wk
attn.to_v attn.wv
attn.to_out.0 attn.wo
attn.to_gate attn.gate
attn.norm_q.weight attn.qknorm.qnorm.scale
attn.norm_k.weight attn.qknorm.knorm.scale
ff.gate mlp.gate
ff.up mlp.up
ff.down mlp.down
norm1.weight prenorm.scale
norm2.weight postnorm.scale
"""


@cache
def krea2() -> tuple[Rule, ...]:
    """Krea 2; a block's `scale_shift_table` (6, d) is flat in the original."""
    fusion = [f"{kind}_blocks" for kind in ("layerwise", "refiner")]
    return rules_of(
        _KREA2,
        transformer_blocks=("blocks", _KREA2_PLAIN + "scale_shift_table mod.lin"),
        **{f"text_fusion.{name}": (f"txtfusion.{name}", _KREA2_PLAIN) for name in fusion},
    )
