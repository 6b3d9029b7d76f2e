"""Tiny real models, adapters as a training leaves them, and PEFT's own folds of these."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

transformers.logging.disable_progress_bar()

UPDATE = 0.03  # norm of an update over its weight's
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = SIZES | {"tie_word_embeddings": False, "attention_bias": True}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
GPT2 |= {"initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertModel", SIZES),
}
# What adapters are trained on, where it is another class than the base's.
TRAINED = {"bert": "BertForSequenceClassification"}


class Net(nn.Module):
    """Layers that transformers' models have not, each with an update of its own in PEFT."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2)
        self.line = nn.Conv1d(32, 24, 3)
        self.image = nn.Conv2d(8, 16, (3, 2))
        self.words = nn.Embedding(40, 32)
        self.norm = nn.BatchNorm1d(24)  # which counts in an integer


def save_base(
    name: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Path:
    torch.manual_seed(seed)
    if name == "net":
        folder.mkdir()
        save_file(Net().to(dtype).state_dict(), folder / "model.safetensors", {"format": "pt"})
        return folder
    kind, sizes = BASES[name]
    made = getattr(transformers, kind)
    model = made(made.config_class(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    return folder


def load(
    name: str, folder: Path, dtype: torch.dtype | None = None, words: int | None = None
) -> nn.Module:
    """The model that adapters are trained on, with `words` rows of embedding."""
    torch.manual_seed(2)
    if name == "net":
        tensors = load_file(folder / "model.safetensors")
        net = Net().to(dtype or tensors["words.weight"].dtype)
        net.load_state_dict(tensors)
        return net.eval()
    kind = TRAINED.get(name, BASES[name][0])
    extra = {"num_labels": 3} if name in TRAINED else {}
    made = getattr(transformers, kind)
    model = made.from_pretrained(folder, dtype=dtype or "auto", **extra).eval()
    if words is not None:
        model.resize_token_embeddings(words)
    return model


def train(
    name: str,
    base: Path,
    folder: Path,
    *,
    seed: int = 3,
    update: float = UPDATE,
    stored: torch.dtype | None = None,
    words: int | None = None,
    **options: Any,
) -> Path:
    """An adapter saved by PEFT, every number of it as far from zero as after a training."""
    model = load(name, base, torch.float32, words)
    torch.manual_seed(seed)
    options.setdefault("r", 8)
    options.setdefault("lora_alpha", 12)
    if name == "gpt2":
        options.setdefault("fan_in_fan_out", True)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_magnitude_vector" in key:
                parameter *= 1 + 0.05 * torch.randn_like(parameter)
            elif "lora_" in key:
                parameter.copy_(torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        for key, buffer in wrapped.named_buffers():
            if "modules_to_save.default.num_batches_tracked" in key:
                buffer += 5
        for layer in wrapped.modules():
            if isinstance(layer, LoraLayer):
                embedding = "default" in layer.lora_embedding_B
                up = (
                    layer.lora_embedding_B["default"]
                    if embedding
                    else layer.lora_B["default"].weight
                )
                inner, delta = layer.get_base_layer(), layer.get_delta_weight("default")
                weight = getattr(inner, "in_proj_weight", getattr(inner, "weight", None))
                up *= update * weight.norm() / delta.norm()
                if layer.lora_bias.get("default"):
                    layer.lora_B["default"].bias *= 0.01
    if stored is not None:
        wrapped.to(stored)
    wrapped.save_pretrained(folder)
    return folder


def fold(
    name: str,
    base: Path,
    adapters: Sequence[Path],
    out: Path,
    *,
    safe: bool = False,
    dtype: torch.dtype | None = None,
    cast: bool = True,
    together: bool = False,
    words: int | None = None,
    **saving: Any,
) -> Path:
    """PEFT's own fold: each adapter into the last one's result, or (`together`) all in one call."""
    model = load(name, base, dtype, words)
    if together:
        wrapped = peft.PeftModel.from_pretrained(
            model, adapters[0], adapter_name="a0", autocast_adapter_dtype=cast
        )
        for number, adapter in enumerate(adapters[1:], 1):
            wrapped.load_adapter(adapter, f"a{number}", autocast_adapter_dtype=cast)
        wrapped.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
        model = wrapped.merge_and_unload(safe_merge=safe)
    else:
        for adapter in adapters:
            wrapped = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=cast)
            model = wrapped.merge_and_unload(safe_merge=safe)
    if name == "net":
        out.mkdir()
        save_file(model.state_dict(), out / "model.safetensors", {"format": "pt"})
    else:
        model.save_pretrained(out, **saving)
    return out
