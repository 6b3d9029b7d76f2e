"""Tiny transformers as graphs, by torch's tracing exporter, with flat names for the KV cache."""

import json
from pathlib import Path

import numpy as np
import onnx
import torch
import transformers

SIZES = {"vocab_size": 40, "max_position_embeddings": 64, "hidden_size": 16,
         "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}  # fmt: skip
MODELS = {
    "llama": ("LlamaForCausalLM", {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1}),
    "mistral": ("MistralForCausalLM", {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1}),
    "tied": (
        "LlamaForCausalLM",
        {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "gpt2": ("GPT2LMHeadModel", {**SIZES, "n_inner": 24}),
    "bert": ("BertModel", {**SIZES, "intermediate_size": 24}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 40, "max_position_embeddings": 64, "dim": 16, "n_layers": 2, "n_heads": 2,
         "hidden_dim": 24, "initializer_range": 0.2, "num_labels": 3},
    ),
    "roberta": (
        "RobertaForSequenceClassification",
        {**SIZES, "intermediate_size": 24, "num_labels": 3},
    ),
}  # fmt: skip


def fresh(name: str, seed: int = 7) -> torch.nn.Module:
    """A model with numbers in its biases too."""
    kind, sizes = MODELS[name]
    torch.manual_seed(seed)
    made = getattr(transformers, kind)
    model = made(made.config_class(**sizes))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
    model.config.architectures = [kind]
    return model.eval()


class Flat(torch.nn.Module):
    """A causal model whose cache goes in and out as one tensor each."""

    def __init__(self, model):
        super().__init__()
        self.m = model
        self.layers = model.config.num_hidden_layers

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = transformers.DynamicCache()
        for layer in range(self.layers):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        found = self.m(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        new = found.past_key_values
        return found.logits, *(t for x in new.layers for t in (x.keys, x.values))


def shape_of_past(config):
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(
        config, "head_dim", None
    ) or config.hidden_size // config.num_attention_heads


def trace(module, args, path, inputs, outputs, axes):
    torch.onnx.export(
        module, args, str(path), input_names=inputs, output_names=outputs, dynamic_axes=axes,
        opset_version=18, dynamo=False,
    )  # fmt: skip


def causal(model: torch.nn.Module, path: Path) -> Path:
    """One graph for prefill and decode, its parameters' names beside it as a sidecar has them."""
    config = model.config
    heads, size = shape_of_past(config)
    ids = torch.randint(1, config.vocab_size, (2, 3))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    places = (mask.cumsum(-1) - 1).clip(0)[:, -3:]
    past = [torch.randn(2, heads, 2, size) for _ in range(2 * config.num_hidden_layers)]
    words = [f"{n}.{w}" for n in range(config.num_hidden_layers) for w in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids"]
    inputs += [f"past_key_values.{w}" for w in words]
    outputs = ["logits", *(f"present.{w}" for w in words)]
    axes = {n: {0: "batch", 1: "sequence"} for n in ("input_ids", "position_ids", "logits")}
    axes["attention_mask"] = {0: "batch", 1: "total_sequence"}
    axes |= {n: {0: "batch", 2: "past_sequence"} for n in inputs[3:]}
    axes |= {n: {0: "batch", 2: "total_sequence"} for n in outputs[1:]}
    trace(Flat(model).eval(), (ids, mask, places, *past), path, inputs, outputs, axes)
    return mapped(path, model, "m.")


def encoder(model: torch.nn.Module, path: Path, output: str = "logits") -> Path:
    """A graph with input_ids and attention_mask alone."""

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.m = model

        def forward(self, input_ids, attention_mask):
            return self.m(input_ids=input_ids, attention_mask=attention_mask)[0]

    ids = torch.randint(2, model.config.vocab_size, (2, 5))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    axes = {n: {0: "batch", 1: "sequence"} for n in ("input_ids", "attention_mask")}
    axes[output] = {0: "batch"} if output == "logits" else {0: "batch", 1: "sequence"}
    trace(Plain().eval(), (ids, mask), path, ["input_ids", "attention_mask"], [output], axes)
    return mapped(path, model, "m.")


def mapped(path: Path, model: torch.nn.Module, front: str) -> Path:
    """Writes the sidecar of a graph: each initialiser that equals a parameter, found by its bytes;
    the config beside it.
    """
    graph = onnx.load(path)
    parameters = dict(model.state_dict())  # tied ones by both names
    found: dict[str, list[object]] = {}
    used: set[str] = set()
    for one in graph.graph.initializer:
        name = one.name.removeprefix(front)
        array = onnx.numpy_helper.to_array(one)
        for key in [name] if name in parameters else sorted(parameters, key=used.__contains__):
            value = parameters[key].detach().numpy()
            turned = array.ndim == 2 and value.shape == array.shape[::-1]
            if value.shape == array.shape and np.array_equal(value, array):
                found[one.name] = [key, False]
            elif turned and np.array_equal(value.T, array):
                found[one.name] = [key, True]
            if one.name in found:
                used.add(key)
                break
    entry = graph.metadata_props.add()
    entry.key, entry.value = "loratools.weights", json.dumps(found)
    onnx.save(graph, path)
    (path.parent / "config.json").write_text(model.config.to_json_string(use_diff=False))
    return path


def feeds(model, ids, *, mask=None, past=None):
    """Inputs of a graph of `causal`, with an empty past where none is given."""
    heads, size = shape_of_past(model.config)
    ids = np.asarray(ids)
    before = 0 if past is None else next(iter(past.values())).shape[2]
    mask = np.ones((len(ids), before + ids.shape[1]), np.int64) if mask is None else mask
    places = (mask.cumsum(-1) - 1).clip(0)[:, -ids.shape[1] :]
    found = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    if past is None:
        empty = np.zeros((len(ids), heads, 0, size), np.float32)
        words = [
            f"{n}.{w}" for n in range(model.config.num_hidden_layers) for w in ("key", "value")
        ]
        past = {f"past_key_values.{w}": empty for w in words}
    return found | past
