"""Tiny transformers models as folders and as graphs of torch's exporters, with PEFT's adapters."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

IDS = torch.tensor([[5, 9, 3, 30, 12], [0, 0, 7, 8, 4]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
SIZES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
DECODER = {**ENCODER, "num_key_value_heads": 2}
# name -> class, config, how it is loaded, what PEFT is told to train
SORTS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**DECODER, tie_word_embeddings=False),
              AutoModelForCausalLM, {"target_modules": "all-linear"}),
    "tied": (LlamaForCausalLM, LlamaConfig(**DECODER, tie_word_embeddings=True),
             AutoModelForCausalLM, {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4,
             n_positions=64), AutoModelForCausalLM,
             {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "bert": (BertModel, BertConfig(**ENCODER), AutoModel,
             {"target_modules": ["query", "key", "value", "intermediate.dense"], "bias": "all"}),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**ENCODER, num_labels=3),
                AutoModelForSequenceClassification,
                {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
}  # fmt: skip


class Plain(torch.nn.Module):
    """A model whose forward takes and gives tensors alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.m = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        more = {"use_cache": False} if "Llama" in type(self.m).__name__ else {}
        if "GPT2" in type(self.m).__name__:
            more = {"use_cache": False}
        return self.m(input_ids=input_ids, attention_mask=attention_mask, **more)[0]


def model(sort: str, *, seed: int = 0, biases: bool = False) -> Any:
    """A model with random weights; `biases` gives biases and norms numbers of their own."""
    made, config, _, _ = SORTS[sort]
    torch.manual_seed(seed)
    found = made(config).eval()
    if biases:
        for name, parameter in found.named_parameters():
            if parameter.dim() == 1:
                parameter.data += torch.randn_like(parameter) * 0.1
            assert name
    return found


def folder(path: Path, sort: str, **more: Any) -> Path:
    model(sort, **more).save_pretrained(path)
    return path


def loaded(path: Path, sort: str) -> Any:
    return SORTS[sort][2].from_pretrained(path, dtype="auto").eval()


def export(source: Any, path: Path, exporter: str, **more: Any) -> Path:
    """A graph of a model by torch's legacy or dynamo exporter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["out"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "legacy":
            axes = {n: {0: "batch", 1: "sequence"} for n in names["input_names"]}
            torch.onnx.export(
                Plain(source).eval(), (IDS, MASK), path, dynamo=False, opset_version=18,
                dynamic_axes=axes, **names, **more,
            )  # fmt: skip
        else:
            dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
            torch.onnx.export(
                Plain(source).eval(), (IDS, MASK), path, dynamo=True, verbose=False,
                dynamic_shapes=(dims, dims), **names, **more,
            )  # fmt: skip
    return path


def adapter(path: Path, base: Path, sort: str, *, seed: int = 1, **more: Any) -> Path:
    """PEFT's own adapter of a base, with updates that are not zero."""
    settings = {"r": 4, "lora_alpha": 8, **SORTS[sort][3], **more}
    if "task_type" not in settings and "modules_to_save" in settings:
        settings["task_type"] = None
    trained = get_peft_model(loaded(base, sort), LoraConfig(**settings))
    torch.manual_seed(seed)
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad and "lora_A" not in name and "embedding_A" not in name:
            parameter.data = parameter.data + torch.randn_like(parameter) * 0.01
        if "embedding_A" in name:
            parameter.data = torch.randn_like(parameter) * 0.01
    trained.save_pretrained(path)
    return path


@cache
def numbers(path: Path, ids: bool = True) -> Any:
    """What onnxruntime makes of the sample inputs."""
    import onnxruntime

    assert ids
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {"input_ids": IDS.numpy(), "attention_mask": MASK.numpy()}
    return session.run(None, {i.name: feed[i.name] for i in session.get_inputs()})[0]
