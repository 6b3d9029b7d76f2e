"""Language models' modules: Hugging Face's names beside the tensor names of llama.cpp's GGUF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratools.errors import shown
from loratools.names.rules import Rule, renames

_LAYER, _BLOCK = "model.layers.{n}.", "blk.{n}."
# How a model with a tower beside it calls its language part, in memory and in older checkpoints.
_FRONTS = ("model.language_model.", "language_model.model.")

_TIED = ("model.embed_tokens token_embd", "model.norm output_norm")  # no head in GGUF
_TOP = (*_TIED, "lm_head output")
_VALUES = ("self_attn.v_proj attn_v", "self_attn.o_proj attn_output")
_PLAIN = ("self_attn.q_proj attn_q", "self_attn.k_proj attn_k", *_VALUES)
_GATED = ("mlp.gate_proj ffn_gate", "mlp.up_proj ffn_up", "mlp.down_proj ffn_down")
_NORMS = ("input_layernorm attn_norm", "post_attention_layernorm ffn_norm")
_QK_NORMS = ("self_attn.q_norm attn_q_norm", "self_attn.k_norm attn_k_norm")
_FOUR_NORMS = (
    "input_layernorm attn_norm",
    "post_attention_layernorm post_attention_norm",
    "pre_feedforward_layernorm ffn_norm",
    "post_feedforward_layernorm post_ffw_norm",
)
# llama.cpp rotates neighbouring rows where Hugging Face rotates halves; for these architectures
# the converter reorders the rows, of weights and of biases (llama.cpp:conversion/llama.py).
_ROTATED = (
    Rule((_LAYER + "self_attn.q_proj",), _BLOCK + "attn_q", order="rope"),
    Rule((_LAYER + "self_attn.k_proj",), _BLOCK + "attn_k", order="rope"),
)


def _decoder(*lines: str, top: Sequence[str] = _TOP) -> tuple[Rule, ...]:
    return (*renames(lines, first=_LAYER, second=_BLOCK), *renames(top))


# Stacks of experts, under the names of checkpoints less the number.
_MIXTRAL = (
    "block_sparse_moe.experts.w1 ffn_gate_exps",
    "block_sparse_moe.experts.w3 ffn_up_exps",
    "block_sparse_moe.experts.w2 ffn_down_exps",
)
_EXPERTS = (
    "mlp.experts.gate_proj ffn_gate_exps",
    "mlp.experts.up_proj ffn_up_exps",
    "mlp.experts.down_proj ffn_down_exps",
)

_LLAMAS = (  # Mixtral's router too: GGUF calls both llama
    *_ROTATED,
    *_decoder(*_VALUES, *_GATED, *_NORMS, "block_sparse_moe.gate ffn_gate_inp"),
)
LLAMA = (*_LLAMAS, *renames(_MIXTRAL, first=_LAYER, second=_BLOCK))
QWEN2 = _decoder(*_PLAIN, *_GATED, *_NORMS)
QWEN3 = (*QWEN2, *renames(_QK_NORMS, first=_LAYER, second=_BLOCK))
QWEN2_MOE = _decoder(
    *_PLAIN,
    *_NORMS,
    "mlp.gate ffn_gate_inp",
    "mlp.shared_expert_gate ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj ffn_gate_shexp",
    "mlp.shared_expert.up_proj ffn_up_shexp",
    "mlp.shared_expert.down_proj ffn_down_shexp",
    *_EXPERTS,
)
QWEN3_MOE = _decoder(*_PLAIN, *_QK_NORMS, *_NORMS, "mlp.gate ffn_gate_inp", *_EXPERTS)
GEMMA = _decoder(*_PLAIN, *_GATED, *_NORMS, top=_TIED)
GEMMA2 = _decoder(*_PLAIN, *_GATED, *_FOUR_NORMS, top=_TIED)
GEMMA3 = _decoder(*_PLAIN, *_QK_NORMS, *_GATED, *_FOUR_NORMS)
OLMO2 = _decoder(
    *_PLAIN,
    *_QK_NORMS,
    *_GATED,
    "post_attention_layernorm post_attention_norm",
    "post_feedforward_layernorm post_ffw_norm",
)
OLMO = (  # its norms have no weights
    *_ROTATED,
    *_decoder(*_VALUES, *_GATED, top=("model.embed_tokens token_embd", "lm_head output")),
)
PHI3 = _decoder(
    "self_attn.qkv_proj attn_qkv",
    "self_attn.o_proj attn_output",
    "mlp.gate_up_proj ffn_up",  # gate and up stay one, and the one is called up
    "mlp.down_proj ffn_down",
    *_NORMS,
)
PHI2 = _decoder(
    "self_attn.q_proj attn_q",
    "self_attn.k_proj attn_k",
    "self_attn.v_proj attn_v",
    "self_attn.dense attn_output",
    "mlp.fc1 ffn_up",
    "mlp.fc2 ffn_down",
    "input_layernorm attn_norm",
    top=(
        "model.embed_tokens token_embd",
        "model.final_layernorm output_norm",
        "lm_head output",
    ),
)
STARCODER2 = _decoder(*_PLAIN, "mlp.c_fc ffn_up", "mlp.c_proj ffn_down", *_NORMS)
COHERE = _decoder(*_PLAIN, *_QK_NORMS, *_GATED, "input_layernorm attn_norm", top=_TIED)
COHERE2 = _decoder(*_PLAIN, *_GATED, "input_layernorm attn_norm", top=_TIED)
SEED_OSS = _decoder(
    *_PLAIN,
    *_GATED,
    "input_layernorm attn_norm",
    "post_attention_layernorm post_attention_norm",
)
GPT2 = (  # Conv1D in memory, (out, in) in the file: the factors are the module's in both
    *renames(
        (
            "attn.c_attn attn_qkv",
            "attn.c_proj attn_output",
            "mlp.c_fc ffn_up",
            "mlp.c_proj ffn_down",
            "ln_1 attn_norm",
            "ln_2 ffn_norm",
        ),
        first="transformer.h.{n}.",
        second=_BLOCK,
    ),
    *renames(
        (
            "transformer.wte token_embd",
            "transformer.wpe position_embd",
            "transformer.ln_f output_norm",
            "lm_head output",
        ),
    ),
)

# Experts stand one by one in a checkpoint and as one stack in GGUF: number {m} is row {m} of its
# first axis, which is more than a name can say.
EXPERTS: dict[str, tuple[tuple[str, str], ...]] = {
    kind: tuple((f"{_LAYER}{front}.{{m}}.{old}", f"{_BLOCK}{new}") for old, new in parts)
    for kind, front, parts in (
        (
            "mixtral",
            "block_sparse_moe.experts",
            (("w1", "ffn_gate_exps"), ("w2", "ffn_down_exps"), ("w3", "ffn_up_exps")),
        ),
        *(
            (
                kind,
                "mlp.experts",
                (
                    ("gate_proj", "ffn_gate_exps"),
                    ("down_proj", "ffn_down_exps"),
                    ("up_proj", "ffn_up_exps"),
                ),
            )
            for kind in ("qwen2_moe", "qwen3_moe")
        ),
    )
}

# Of `model_type` in config.json: the architecture in GGUF, and the rules.
_TYPES: dict[str, tuple[str, tuple[Rule, ...]]] = {
    "llama": ("llama", LLAMA),
    "mistral": ("llama", LLAMA),
    "mixtral": ("llama", LLAMA),
    "granite": ("granite", _LLAMAS),
    "smollm3": ("smollm3", _LLAMAS),
    "qwen2": ("qwen2", QWEN2),
    "qwen2_moe": ("qwen2moe", QWEN2_MOE),
    "qwen3": ("qwen3", QWEN3),
    "qwen3_moe": ("qwen3moe", QWEN3_MOE),
    "qwen2_vl": ("qwen2vl", QWEN2),
    "qwen2_5_vl": ("qwen2vl", QWEN2),
    "qwen3_vl": ("qwen3vl", QWEN3),
    "qwen3_vl_moe": ("qwen3vlmoe", QWEN3_MOE),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", GEMMA2),
    "gemma3_text": ("gemma3", GEMMA3),
    "gemma3": ("gemma3", GEMMA3),
    "olmo": ("olmo", OLMO),
    "olmo2": ("olmo2", OLMO2),
    "olmo3": ("olmo2", OLMO2),
    "phi3": ("phi3", PHI3),
    "phi": ("phi2", PHI2),
    "starcoder2": ("starcoder2", STARCODER2),
    "cohere": ("command-r", COHERE),
    "cohere2": ("cohere2", COHERE2),
    "stablelm": ("stablelm", QWEN2),
    "seed_oss": ("seed_oss", SEED_OSS),
    "gpt2": ("gpt2", GPT2),
}


def architecture_of(model_type: str | None) -> str | None:
    """What GGUF calls the architecture of a `model_type`; None where no rules are known for it."""
    return _TYPES[model_type][0] if model_type in _TYPES else None


def differing(adapter: Mapping[str, Any], base: Mapping[str, Any]) -> str | None:
    """The words where a GGUF adapter's config and a base's name two architectures.

    The same tensor names stand for rows in another order there; llama.cpp refuses it too.
    """
    said, kind = adapter["gguf"].get("general.architecture"), base.get("model_type")
    wanted = architecture_of(kind) if isinstance(kind, str) else None
    if said is None or wanted in (None, said):
        return None
    return f"it is for the architecture {shown(said)}, the base is {wanted} ({shown(kind)})"


def rules_for(name: str | None) -> tuple[Rule, ...] | None:
    """The rules for a `model_type` of Hugging Face, or for an architecture of GGUF.

    A whole has one part, the plain language model's; the same within a model that has a tower
    beside it come after, and lead to the same whole.
    """
    if name in _TYPES:
        return _with_fronts(_TYPES[name][1])
    found = next((rules for arch, rules in _TYPES.values() if arch == name), None)
    return None if found is None else _with_fronts(found)


def _with_fronts(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    more = [
        Rule((front + rule.parts[0].removeprefix("model."),), rule.whole, rule.order)
        for front in _FRONTS
        for rule in rules
        if rule.parts[0].startswith("model.")
    ]
    return (*rules, *more)
