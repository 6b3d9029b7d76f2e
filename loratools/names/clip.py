"""Text encoders: Hugging Face's names with and without `text_model.`, OpenCLIP's, T5's."""

from __future__ import annotations

from functools import cache

from loratools.names.rules import Rule, table

# Modules as transformers names them; a text encoder has these names in both vocabularies.
CLIP = tuple(
    """text_model.embeddings.token_embedding
    text_model.embeddings.position_embedding
    text_model.encoder.layers.{n}.self_attn.q_proj
    text_model.encoder.layers.{n}.self_attn.k_proj
    text_model.encoder.layers.{n}.self_attn.v_proj
    text_model.encoder.layers.{n}.self_attn.out_proj
    text_model.encoder.layers.{n}.mlp.fc1
    text_model.encoder.layers.{n}.mlp.fc2
    text_model.encoder.layers.{n}.layer_norm1
    text_model.encoder.layers.{n}.layer_norm2
    text_model.final_layer_norm
    text_projection""".split()
)
T5 = tuple(
    """shared
    encoder.embed_tokens
    encoder.block.{n}.layer.0.SelfAttention.q
    encoder.block.{n}.layer.0.SelfAttention.k
    encoder.block.{n}.layer.0.SelfAttention.v
    encoder.block.{n}.layer.0.SelfAttention.o
    encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias
    encoder.block.{n}.layer.0.layer_norm
    encoder.block.{n}.layer.1.DenseReluDense.wi
    encoder.block.{n}.layer.1.DenseReluDense.wi_0
    encoder.block.{n}.layer.1.DenseReluDense.wi_1
    encoder.block.{n}.layer.1.DenseReluDense.wo
    encoder.block.{n}.layer.1.layer_norm
    encoder.final_layer_norm""".split()
)
# A language model without its head: Gemma 2 in Lumina, Qwen 3 in Anima.
DECODER = tuple(
    """embed_tokens
    layers.{n}.self_attn.q_proj
    layers.{n}.self_attn.k_proj
    layers.{n}.self_attn.v_proj
    layers.{n}.self_attn.o_proj
    layers.{n}.self_attn.q_norm
    layers.{n}.self_attn.k_norm
    layers.{n}.mlp.gate_proj
    layers.{n}.mlp.up_proj
    layers.{n}.mlp.down_proj
    layers.{n}.input_layernorm
    layers.{n}.post_attention_layernorm
    layers.{n}.pre_feedforward_layernorm
    layers.{n}.post_feedforward_layernorm
    norm""".split()
)
MODEL = "text_model."

_OPENCLIP = """
text_model.embeddings.token_embedding token_embedding
text_model.embeddings.position_embedding.weight positional_embedding
text_model.final_layer_norm ln_final
text_projection.weight text_projection order=turned
"""
_RESBLOCK = """
self_attn.[q,k,v]_proj.weight attn.in_proj_weight
self_attn.[q,k,v]_proj.bias attn.in_proj_bias
self_attn.out_proj attn.out_proj
layer_norm1 ln_1
layer_norm2 ln_2
mlp.fc1 mlp.c_fc
mlp.fc2 mlp.c_proj
"""


@cache
def flat(component: str) -> tuple[Rule, ...]:
    """A CLIP whose modules stand under `text_model.`, and the same without that name.

    transformers took it out of CLIPTextModel in version 5.6, and out of what it saves.
    """
    return tuple(
        Rule((f"{component}.{name}",), f"{component}.{name.removeprefix(MODEL)}")
        for name in CLIP
        if name.startswith(MODEL)
    )


@cache
def openclip(component: str, prefix: str = "conditioner.embedders.1.model.") -> tuple[Rule, ...]:
    """A CLIP of diffusers beside OpenCLIP's in a single file, which has q, k and v in one.

    The prefix is SDXL's; SD2's is `cond_stage_model.model.`. The order "turned" is that of
    `text_projection`, which OpenCLIP stores (in, out).
    """
    layers = f"{component}.text_model.encoder.layers.{{n}}."
    return (
        *table(_OPENCLIP, first=f"{component}.", second=prefix),
        *table(_RESBLOCK, first=layers, second=f"{prefix}transformer.resblocks.{{n}}."),
    )


@cache
def stored(names: tuple[str, ...], component: str, prefix: str) -> tuple[Rule, ...]:
    """A text encoder beside the same in a single file, where its names stand under a prefix.

    CLIP-L's prefixes: `cond_stage_model.transformer.` (SD1), `conditioner.embedders.0.transformer.`
    (SDXL); SD3's `text_encoders.clip_l.transformer.`, `.clip_g.`, `.t5xxl.`.
    """
    return tuple(Rule((f"{component}.{name}",), prefix + name) for name in names)
