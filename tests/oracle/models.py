"""Tiny models of many architectures, saved for real, and adapters as a training leaves them."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

transformers.logging.disable_progress_bar()

UPDATE = 0.05  # norm of an update over its weight's: trained adapters have a few percent
VOCABULARY = 48

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 36,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": False}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "begin_suppress_tokens": None,
    "init_std": 0.3,
}
DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 36,
    "initializer_range": 0.3,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.3,
}


class Net(nn.Module):
    """Every layer that PEFT's LoRA knows, in one network without a transformers config."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 8)
        self.line = nn.Conv1d(8, 6, 3, padding=1)
        self.image = nn.Conv2d(1, 4, (3, 2), stride=2)
        self.point = nn.Conv2d(4, 5, 1)
        self.volume = nn.Conv3d(1, 4, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.square = nn.Linear(8, 8)
        self.plain = nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(20, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)  # (batch, length, 8)
        x = self.square(x + self.attention(x, x, x)[0]).tanh()
        line = self.line(x.transpose(1, 2)).mean(-1)
        image = self.point(self.image(x[:, None]).tanh()).mean((-1, -2))
        volume = self.volume(x.reshape(len(x), 1, 2, -1, 8)).mean((-1, -2, -3))
        return self.head(torch.cat([line, image, volume[:, :3], self.plain(x).mean(1)], 1))


@dataclass(frozen=True)
class Model:
    """How one base is made and saved, and the class that adapters on it are trained with."""

    saved: str
    config: Mapping[str, Any]
    trained: str = ""  # where it is another class: a task head is new then
    labels: int = 0


MODELS = {
    "llama": Model("LlamaForCausalLM", LLAMA),
    "llama-tied": Model("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "llama-biases": Model("LlamaForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-bare": Model("LlamaModel", LLAMA),
    "llama-classes": Model(
        "LlamaForCausalLM", LLAMA | {"pad_token_id": 0}, "LlamaForSequenceClassification", 4
    ),
    "qwen3": Model("Qwen3ForCausalLM", LLAMA | {"head_dim": 8}),
    "gpt2": Model("GPT2LMHeadModel", GPT2),
    "bert": Model("BertModel", TEXT, "BertForSequenceClassification", 3),
    "bert-mlm": Model("BertForMaskedLM", TEXT, "BertForSequenceClassification", 3),
    "bert-tokens": Model("BertModel", TEXT, "BertForTokenClassification", 5),
    "bert-answers": Model("BertModel", TEXT, "BertForQuestionAnswering", 2),
    "distilbert": Model("DistilBertModel", DISTILBERT, "DistilBertForSequenceClassification", 3),
    "roberta": Model("RobertaModel", TEXT, "RobertaForSequenceClassification", 3),
    "roberta-mlm": Model("RobertaForMaskedLM", TEXT, "RobertaForSequenceClassification", 3),
    "t5": Model("T5ForConditionalGeneration", T5),
    "vit": Model("ViTForImageClassification", VIT | {"num_labels": 3}),
    "vit-bare": Model("ViTModel", VIT, "ViTForImageClassification", 3),
    "whisper": Model("WhisperForConditionalGeneration", WHISPER),
    "net": Model("", {}),
}


def save_base(name: str, folder: Path) -> Path:
    """Make one of MODELS with weights of sizes that matter, and save it as its library does."""
    model = MODELS[name]
    torch.manual_seed(11)
    if not model.saved:
        made: nn.Module = Net()
    else:
        made_by = getattr(transformers, model.saved)
        made = made_by(made_by.config_class(**model.config))
    with torch.no_grad():
        for parameter in made.parameters():  # no zeros and ones that would hide a mistake
            parameter += 0.1 * torch.randn_like(parameter)
    if model.saved:
        made.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file(made.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


def load(name: str, folder: Path, **options: Any) -> nn.Module:
    """The module that adapters on this base are trained with, in float32, in eval mode."""
    model = MODELS[name]
    if not model.saved:
        net = Net()
        net.load_state_dict(load_file(folder / "model.safetensors"))
        return net.eval()
    options = {"dtype": torch.float32} | options
    if model.trained:
        options = {"num_labels": model.labels} | options
    torch.manual_seed(12)  # of what the checkpoint lacks
    made = getattr(transformers, model.trained or model.saved).from_pretrained(folder, **options)
    return made.eval()


def load_folded(name: str, folder: Path) -> nn.Module:
    """The module that a folded folder gives; no tensor may be missing, or new and unexpected."""
    model = MODELS[name]
    if not model.saved:
        return load(name, folder)
    made_by = getattr(transformers, model.trained or model.saved)
    made, report = made_by.from_pretrained(folder, output_loading_info=True)
    assert made.config.architectures == [made_by.__name__]
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    if not model.trained:  # the head of the task that the base was trained on stays in the file
        assert not report["unexpected_keys"]
    return made.eval()


def same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Both hold the same tensors, bit for bit."""
    assert sorted(found) == sorted(expected)
    unlike = [k for k, t in expected.items() if not torch.equal(found[k], t)]
    assert unlike == []


def nearest(found: Tensor, exact: Tensor) -> None:
    """Every number is the one of its dtype that lies nearest to the exact one (float64)."""
    error = (found.double() - exact).abs()
    for way in (torch.inf, -torch.inf):
        other = torch.nextafter(found, torch.full_like(found, way)).double()
        assert bool((error <= (other - exact).abs()).all())


def outputs(name: str, model: nn.Module) -> Tensor:
    """The logits of a fixed batch, in the model's own dtype."""
    draw = torch.Generator().manual_seed(13)
    tokens = torch.randint(3, 12, (2, 8), generator=draw)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        if name == "net":
            return model(tokens)
        if name.startswith("vit"):
            return model(torch.rand(2, 3, 8, 8, generator=draw, dtype=dtype)).logits
        if name == "whisper":
            features = torch.rand(2, 8, 16, generator=draw, dtype=dtype)
            return model(input_features=features, decoder_input_ids=tokens).logits
        if name == "t5":
            return model(input_ids=tokens, decoder_input_ids=tokens.flip(1)).logits
        found = model(input_ids=tokens)
        return found.last_hidden_state if "last_hidden_state" in found else found[0]


# ------------------------------------------------------------------------------- adapters


def grown(model: nn.Module) -> None:
    """Five tokens more."""
    model.resize_token_embeddings(VOCABULARY + 5)


def nothing(model: nn.Module) -> None:
    """A base as it is."""


def trained(
    name: str,
    folder: Path,
    config: peft.PeftConfig,
    *,
    seed: int = 0,
    change: Callable[[nn.Module], Any] = nothing,
) -> peft.PeftModel:
    """A PEFT model whose adapter has numbers as after a training: nothing is zero or one."""
    model = load(name, folder)
    change(model)
    torch.manual_seed(100 + seed)
    wrapped = peft.get_peft_model(model, config)
    train(wrapped)
    return wrapped.eval()


def train(model: nn.Module) -> None:
    """Give every trainable parameter a value of its own, in proportion to what it changes."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_magnitude_vector" in key:
                parameter *= 1 + UPDATE * torch.randn_like(parameter)
            elif "lora_" in key:
                parameter.copy_(torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                for adapter in layer.r:
                    _shrink(layer, adapter)


def _shrink(layer: LoraLayer, adapter: str) -> None:
    """Scale B so that the update has the size UPDATE beside the weight."""
    base = layer.get_base_layer()
    weight = base.in_proj_weight if isinstance(base, nn.MultiheadAttention) else base.weight
    if adapter in layer.lora_embedding_B:
        up = layer.lora_embedding_B[adapter]
    else:
        up = layer.lora_B[adapter].weight
        if layer.lora_bias.get(adapter):
            layer.lora_B[adapter].bias *= UPDATE
    up *= UPDATE * weight.norm() / layer.get_delta_weight(adapter).norm()


def served(
    name: str, base: Path, adapter: Path, change: Callable[[nn.Module], Any] = nothing
) -> nn.Module:
    """PEFT's model with an adapter on a base; nothing that the adapter should have is missing."""
    model = load(name, base)
    change(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        return peft.PeftModel.from_pretrained(model, adapter).eval()


def merged(
    name: str,
    base: Path,
    adapter: Path,
    change: Callable[[nn.Module], Any] = nothing,
    *,
    wide: bool = False,
) -> dict[str, Tensor]:
    """PEFT's own merge in float64, rounded once unless `wide`: the merged module's tensors."""
    module = load(name, base, **({} if name == "net" else {"dtype": torch.float64}))
    module.double()
    change(module)
    found = peft.PeftModel.from_pretrained(module, adapter).merge_and_unload().state_dict()
    return (
        found if wide else {k: v.float() if v.is_floating_point() else v for k, v in found.items()}
    )


def updates(name: str, base: Path, adapter: Path) -> dict[str, Tensor]:
    """PEFT's own ΔW (and Δb) of every layer, in float64, by the name of the weight."""
    module = load(name, base).double()
    model = peft.PeftModel.from_pretrained(module, adapter).base_model.model
    found: dict[str, Tensor] = {}
    for key, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            path = key.replace(".base_layer", "")
            times = 2 if ".base_layer." in f"{key}." else 1  # nn.MultiheadAttention's out_proj
            found[f"{path}.weight"] = times * layer.get_delta_weight("default").detach()
            if layer.lora_bias.get("default"):
                bias = layer.lora_B["default"].bias.detach()
                found[f"{path}.bias"] = layer.scaling["default"] * bias
    return found


def weighted_sum(parts: list[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Σ w·ΔW; a part that lacks a weight counts as zero there."""
    total: dict[str, Tensor] = {}
    for weight, part in parts:
        for key, delta in part.items():
            total[key] = total.get(key, 0) + weight * delta
    return total


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The norm of the difference over the norm, all weights together."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[k] - e).square().sum()) for k, e in expected.items())
    return (apart / sum(float(e.square().sum()) for e in expected.values())) ** 0.5
