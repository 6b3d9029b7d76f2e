"""Tiny models of the architectures that export is proven on, saved as their libraries save them."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from tests.oracle.models import DISTILBERT, GPT2, LLAMA, T5, TEXT, VIT, WHISPER

transformers.logging.disable_progress_bar()

GEMMA3 = {
    **LLAMA, "head_dim": 8, "sliding_window": 8, "num_hidden_layers": 4, "pad_token_id": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 8,
    "tie_word_embeddings": True,
}  # fmt: skip
MIXTRAL = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
MARIAN = {
    "vocab_size": 48, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 36, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 0, "init_std": 0.3,
}  # fmt: skip
LABELS = {"num_labels": 3}

# Name -> (class, config).
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gemma3": ("Gemma3ForCausalLM", GEMMA3),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 6}),
    "phi3": ("Phi3ForCausalLM", LLAMA | {"pad_token_id": 0}),
    "mixtral": ("MixtralForCausalLM", MIXTRAL),
    "bert": ("BertForMaskedLM", TEXT),
    "bert-bare": ("BertModel", TEXT),
    "distilbert": ("DistilBertForSequenceClassification", DISTILBERT | LABELS),
    "roberta": ("RobertaForSequenceClassification", TEXT | LABELS),
    "bert-tokens": ("BertForTokenClassification", TEXT | LABELS),
    "bert-answers": ("BertForQuestionAnswering", TEXT),
    "t5": ("T5ForConditionalGeneration", T5),
    "marian": ("MarianMTModel", MARIAN),
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
    "vit": ("ViTForImageClassification", VIT | LABELS),
}


def made(name: str) -> torch.nn.Module:
    """A model with weights whose sizes matter, float32, in eval mode."""
    torch.manual_seed(11)
    saved, config = MODELS[name]
    by = getattr(transformers, saved)
    model = by(by.config_class(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def unet() -> torch.nn.Module:
    """A U-Net of diffusers with two resolutions."""
    import diffusers

    torch.manual_seed(11)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def save(
    name: str, folder: Path, change: Callable[[torch.nn.Module], object] | None = None
) -> Path:
    """One of MODELS, or the U-Net, in a folder; `change` comes before it is saved."""
    model = unet() if name == "unet" else made(name)
    if change is not None:
        change(model)
    model.save_pretrained(folder)
    return folder
