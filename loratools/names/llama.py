"""Llama-like language models: Hugging Face's names beside torchtune's, litgpt's and Megatron's."""

from __future__ import annotations

from loratools.names.rules import Rule, renames

_LAYER = "model.layers.{n}."
_ATTENTION = tuple(f"{_LAYER}self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
_GATED = (f"{_LAYER}mlp.gate_proj", f"{_LAYER}mlp.up_proj")

# torchtune rotates neighbouring rows, as Meta does, so the rows of q and k lie otherwise; for
# these it keeps Hugging Face's rows (torchtune:models/{qwen2,phi3}/_convert_weights.py).
UNROTATED = frozenset({"qwen2", "qwen2_5", "qwen3", "phi3", "phi4"})

_TORCHTUNE = (
    *renames(
        (
            "self_attn.v_proj attn.v_proj",
            "self_attn.o_proj attn.output_proj",
            "mlp.gate_proj mlp.w1",
            "mlp.up_proj mlp.w3",
            "mlp.down_proj mlp.w2",
            "input_layernorm sa_norm",
        ),
        first=_LAYER,
        second="layers.{n}.",
    ),
    *renames(
        ("model.embed_tokens tok_embeddings", "model.norm norm", "lm_head output"),
    ),
)
_NORM = Rule((_LAYER + "post_attention_layernorm",), "layers.{n}.mlp_norm")
TORCHTUNE = (  # llama, mistral, gemma: torchtune:models/convert_weights.py
    Rule((_ATTENTION[0],), "layers.{n}.attn.q_proj", order="rope"),
    Rule((_ATTENTION[1],), "layers.{n}.attn.k_proj", order="rope"),
    *_TORCHTUNE,
    _NORM,
)
TORCHTUNE_UNROTATED = (
    Rule((_ATTENTION[0],), "layers.{n}.attn.q_proj"),
    Rule((_ATTENTION[1],), "layers.{n}.attn.k_proj"),
    *_TORCHTUNE,
    _NORM,
)
TORCHTUNE_GEMMA2 = (  # torchtune:models/gemma2/_convert_weights.py
    *TORCHTUNE[:2],
    *_TORCHTUNE,
    *renames(
        (
            "post_attention_layernorm sa_scale",
            "post_feedforward_layernorm mlp_norm",
            "pre_feedforward_layernorm mlp_scale",
        ),
        first=_LAYER,
        second="layers.{n}.",
    ),
)


def torchtune(model_type: str | None) -> tuple[Rule, ...]:
    """The rules of torchtune's names for a base of this type."""
    if model_type == "gemma2":
        return TORCHTUNE_GEMMA2
    return TORCHTUNE_UNROTATED if model_type in UNROTATED else TORCHTUNE


# litgpt fuses q, k, v one after another (litgpt:scripts/convert_hf_checkpoint.py); up to 0.5.0 the
# module was called attn.attn, and its rows lay group by group.
_LEGACY = Rule(_ATTENTION, "transformer.h.{n}.attn.attn", order="groups", sizes="gqa")
_LITGPT = (
    *renames(
        (
            "self_attn.o_proj attn.proj",
            "mlp.gate_proj mlp.fc_1",
            "mlp.up_proj mlp.fc_2",
            "mlp.down_proj mlp.proj",
            "block_sparse_moe.gate mlp.gate",
            "block_sparse_moe.experts.{m}.w1 mlp.experts.{m}.fc_1",
            "block_sparse_moe.experts.{m}.w3 mlp.experts.{m}.fc_2",
            "block_sparse_moe.experts.{m}.w2 mlp.experts.{m}.proj",
            "input_layernorm norm_1",
        ),
        first=_LAYER,
        second="transformer.h.{n}.",
    ),
    *renames(
        (
            "model.embed_tokens transformer.wte",
            "model.norm transformer.ln_f",
            "lm_head lm_head",
        ),
    ),
)
_LITGPT_NORM = Rule((_LAYER + "post_attention_layernorm",), "transformer.h.{n}.norm_2")
_QKV = Rule(_ATTENTION, "transformer.h.{n}.attn.qkv", sizes="gqa")
LITGPT = (_QKV, *_LITGPT, _LITGPT_NORM, _LEGACY)
LITGPT_GEMMA = (  # gemma 2 and 3 have two norms more, and norm_2 is another
    _QKV,
    *_LITGPT,
    _LEGACY,
    *renames(
        (
            "post_attention_layernorm post_attention_norm",
            "pre_feedforward_layernorm norm_2",
            "post_feedforward_layernorm post_mlp_norm",
            "self_attn.q_norm attn.norm_q",
            "self_attn.k_norm attn.norm_k",
        ),
        first=_LAYER,
        second="transformer.h.{n}.",
    ),
)
# One module on both sides: its rows are Hugging Face's group by group, litgpt's [q; k; v].
LITGPT_NEOX = (
    Rule(
        ("gpt_neox.layers.{n}.attention.query_key_value",),
        "transformer.h.{n}.attn.qkv",
        order="ungroup",
    ),
    *renames(
        (
            "attention.dense attn.proj",
            "mlp.dense_h_to_4h mlp.fc",
            "mlp.dense_4h_to_h mlp.proj",
            "input_layernorm norm_1",
            "post_attention_layernorm norm_2",
        ),
        first="gpt_neox.layers.{n}.",
        second="transformer.h.{n}.",
    ),
    *renames(
        (
            "gpt_neox.embed_in transformer.wte",
            "gpt_neox.final_layer_norm transformer.ln_f",
            "embed_out lm_head",
            "lm_head lm_head",  # as transformers 5 calls it in memory
        ),
    ),
)
LITGPT_FALCON = (
    Rule(
        ("transformer.h.{n}.self_attention.query_key_value",),
        "transformer.h.{n}.attn.qkv",
        order="ungroup",
    ),
    *renames(
        (
            "self_attention.dense attn.proj",
            "mlp.dense_h_to_4h mlp.fc",
            "mlp.dense_4h_to_h mlp.proj",
        ),
        first="transformer.h.{n}.",
        second="transformer.h.{n}.",
    ),
    *renames(
        (
            "transformer.word_embeddings transformer.wte",
            "transformer.ln_f transformer.ln_f",
            "lm_head lm_head",
        ),
    ),
)
LITGPT_PHI3 = (  # Phi 3 and 4 fuse q, k, v as litgpt does; gate and up are two modules there
    *renames(("self_attn.qkv_proj attn.qkv",), first=_LAYER, second="transformer.h.{n}."),
    *(rule for rule in _LITGPT if not rule.whole.endswith(("fc_1", "fc_2"))),
    _LITGPT_NORM,
)


def litgpt(model_type: str | None) -> tuple[Rule, ...]:
    """The rules of litgpt's names for a base of this type."""
    match model_type:
        case "gpt_neox":
            return LITGPT_NEOX
        case "falcon":
            return LITGPT_FALCON
        case "gemma2" | "gemma3" | "gemma3_text":
            return LITGPT_GEMMA
        case "phi3":
            return LITGPT_PHI3
        case _:
            return LITGPT


# Megatron fuses q, k, v group by group, and gate with up (NVIDIA-NeMo/Megatron-Bridge:
# src/megatron/bridge/models/conversion/peft_bridge.py).
MEGATRON = (
    Rule(_ATTENTION, "decoder.layers.{n}.self_attention.linear_qkv", order="groups", sizes="gqa"),
    Rule(_GATED, "decoder.layers.{n}.mlp.linear_fc1"),
    *renames(
        (
            "self_attn.o_proj self_attention.linear_proj",
            "mlp.down_proj mlp.linear_fc2",
            "input_layernorm input_layernorm",
            "post_attention_layernorm pre_mlp_layernorm",
        ),
        first=_LAYER,
        second="decoder.layers.{n}.",
    ),
    *renames(
        (
            "model.embed_tokens embedding.word_embeddings",
            "model.norm decoder.final_layernorm",
            "lm_head output_layer",
        ),
    ),
    # Adapted before fusing ("canonical" LoRA), each part has a pair of its own.
    *renames(
        (
            "self_attn.q_proj self_attention.linear_qkv.q",
            "self_attn.k_proj self_attention.linear_qkv.k",
            "self_attn.v_proj self_attention.linear_qkv.v",
            "mlp.gate_proj mlp.linear_fc1.gate",
            "mlp.up_proj mlp.linear_fc1.up",
        ),
        first=_LAYER,
        second="decoder.layers.{n}.",
    ),
)
