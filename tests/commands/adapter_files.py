"""Adapters of a tiny Llama as each program lays them out, written without loratools."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

HIDDEN, WIDE, HEADS, SIZE, LAYERS, VOCABULARY = 16, 24, 4, 4, 2, 20
BASE = "org/tiny"


@dataclass(frozen=True)
class Pair:
    """ΔW = alpha/rank · B·A of one module."""

    a: torch.Tensor
    b: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def update(self) -> np.ndarray:
        a, b = self.a.double().numpy(), self.b.double().numpy()
        return self.scaling * np.tensordot(b.reshape(b.shape[:2]), a, 1)

    @property
    def bound(self) -> np.ndarray:
        """How far ΔW may be off, number by number, when both factors were rounded to float32."""
        a, b = self.a.double().abs().numpy(), self.b.double().abs().numpy()
        return abs(self.scaling) * np.tensordot(b.reshape(b.shape[:2]), a, 1) * 2.0**-22


Pairs = Mapping[str, Pair]


@dataclass(frozen=True)
class Llama:
    """A base's counts; `kv` key heads for four query heads."""

    kv: int = 2
    config: dict[str, object] = field(init=False)

    def __post_init__(self) -> None:
        said = {
            "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDE,
            "num_attention_heads": HEADS, "num_key_value_heads": self.kv, "head_dim": SIZE,
            "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
        }  # fmt: skip
        object.__setattr__(self, "config", said)

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a module."""
        return {
            "q_proj": (HEADS * SIZE, HIDDEN), "k_proj": (self.kv * SIZE, HIDDEN),
            "v_proj": (self.kv * SIZE, HIDDEN), "o_proj": (HIDDEN, HEADS * SIZE),
            "gate_proj": (WIDE, HIDDEN), "up_proj": (WIDE, HIDDEN), "down_proj": (HIDDEN, WIDE),
            "lm_head": (VOCABULARY, HIDDEN),
        }[module.rpartition(".")[2]]  # fmt: skip

    def heads(self, module: str) -> int | None:
        """How many heads' rows a module has that are rotated; None for all other modules."""
        return {"q_proj": HEADS, "k_proj": self.kv}.get(module.rpartition(".")[2])

    def write(self, folder: Path) -> Path:
        """The base itself: a config, and weights of which only the shapes matter."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        modules = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in LINEAR]
        tensors = {f"{m}.weight": torch.ones(self.shape(m)) for m in [*modules, "lm_head"]}
        tensors["model.embed_tokens.weight"] = torch.ones(VOCABULARY, HIDDEN)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder


LINEAR = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
GGUF = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
TORCHTUNE = {
    "self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj", "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w3", "mlp.down_proj": "mlp.w2",
}  # fmt: skip
LITGPT = {
    "self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
}  # fmt: skip


def _split(module: str) -> tuple[str, str]:
    """The number of a layer and the name within it."""
    number, _, inner = module.removeprefix("model.layers.").partition(".")
    return number, inner


def _rotated(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Rows of Hugging Face's two halves of each head, taken in turns as Meta has them."""
    if heads is None:
        return rows.contiguous()
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).transpose(1, 2).reshape(rows.shape).contiguous()


def _common(pairs: Pairs) -> tuple[int, float]:
    """The one rank and alpha of formats that have no other."""
    ((rank, alpha),) = {(p.rank, p.alpha) for p in pairs.values()}
    return rank, alpha


# ------------------------------------------------------------------------------- writers


def peft(path: Path, pairs: Pairs, base: Llama, *, front: str = "base_model.model.") -> Path:
    path.mkdir(parents=True)
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{front}{module}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{front}{module}.lora_B.weight"] = pair.b.contiguous()
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt", "author": "Ada"})
    first = next(iter(pairs.values()))
    config = {
        "peft_type": "LORA", "r": first.rank, "lora_alpha": first.alpha, "bias": "none",
        "target_modules": sorted({m.rpartition(".")[2] for m in pairs}), "task_type": None,
        "base_model_name_or_path": BASE,
        "rank_pattern": {_exactly(m): p.rank for m, p in pairs.items()},
        "alpha_pattern": {_exactly(m): p.alpha for m, p in pairs.items()},
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def _exactly(module: str) -> str:
    return "^" + module.replace(".", r"\.")


def gguf(path: Path, pairs: Pairs, base: Llama) -> Path:
    from gguf import GGUFWriter

    path = path.with_suffix(".gguf")
    (alpha,) = {p.alpha for p in pairs.values()}
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_string("general.base_model.0.repo_url", f"https://huggingface.co/{BASE}")
    writer.add_string("loratools.metadata.author", "Ada")
    for module, pair in pairs.items():
        number, inner = _split(module)
        name = "output" if module == "lm_head" else f"blk.{number}.{GGUF[inner]}"
        writer.add_tensor(f"{name}.weight.lora_a", pair.a.numpy())
        b = _rotated(pair.b, base.heads(module))
        writer.add_tensor(f"{name}.weight.lora_b", b.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mlx(path: Path, pairs: Pairs, base: Llama) -> Path:
    path.mkdir(parents=True)
    rank, alpha = _common(pairs)
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{module}.lora_a"] = pair.a.t().contiguous()
        tensors[f"{module}.lora_b"] = pair.b.t().contiguous()
    save_file(tensors, path / "adapters.safetensors", {"author": "Ada"})
    keys = sorted({_split(m)[1] or m for m in pairs})
    parameters = {"rank": rank, "scale": alpha / rank, "dropout": 0.0, "keys": keys}
    config = {
        "fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters, "model": BASE
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def torchtune(path: Path, pairs: Pairs, base: Llama) -> Path:
    path.mkdir(parents=True)
    rank, alpha = _common(pairs)
    tensors = {}
    for module, pair in pairs.items():
        number, inner = _split(module)
        name = "output" if module == "lm_head" else f"layers.{number}.{TORCHTUNE[inner]}"
        tensors[f"{name}.lora_a.weight"] = pair.a.contiguous()
        tensors[f"{name}.lora_b.weight"] = _rotated(pair.b, base.heads(module))
    torch.save(tensors, path / "adapter_model.pt")
    names = sorted({m.rpartition(".")[2] for m in pairs})
    config = {"r": rank, "lora_alpha": alpha, "target_modules": names, "peft_type": "LORA"}
    config["base_model_name_or_path"] = BASE
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def litgpt(path: Path, pairs: Pairs, base: Llama) -> Path:
    """q, k and v are all there, or none of them is."""
    path.mkdir(parents=True)
    rank, alpha = _common(pairs)
    tensors = {}
    for module, pair in pairs.items():
        number, inner = _split(module)
        if inner in LITGPT or module == "lm_head":
            name = module if module == "lm_head" else f"transformer.h.{number}.{LITGPT[inner]}"
            tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = pair.a, pair.b
        elif inner == "self_attn.q_proj":
            qkv = [pairs[f"model.layers.{number}.self_attn.{x}_proj"] for x in "qkv"]
            name = f"transformer.h.{number}.attn.qkv"
            tensors[f"{name}.lora_A"] = torch.cat([p.a for p in qkv])
            tensors[f"{name}.lora_B"] = torch.cat([p.b for p in qkv])
    torch.save({"model": {k: t.contiguous() for k, t in tensors.items()}},
               path / "lit_model.pth.lora")  # fmt: skip
    inner = {_split(m)[1] for m in pairs}
    said = {
        "checkpoint_dir": f"checkpoints/{BASE}", "lora_r": rank, "lora_alpha": alpha,
        "lora_query": "self_attn.q_proj" in inner, "lora_key": "self_attn.q_proj" in inner,
        "lora_value": "self_attn.q_proj" in inner, "lora_projection": "self_attn.o_proj" in inner,
        "lora_mlp": any(x.startswith("mlp") for x in inner), "lora_head": "lm_head" in pairs,
    }  # fmt: skip
    (path / "hyperparameters.yaml").write_text(yaml.safe_dump(said))
    (path / "model_config.yaml").write_text(
        yaml.safe_dump(
            {"n_head": HEADS, "n_query_groups": base.kv, "head_size": SIZE, "n_embd": HIDDEN,
             "n_layer": LAYERS, "intermediate_size": WIDE}
        )
    )  # fmt: skip
    return path


def adapterhub(path: Path, pairs: Pairs, base: Llama) -> Path:
    path.mkdir(parents=True)
    rank, alpha = _common(pairs)
    tensors = {}
    for module, pair in pairs.items():
        stem = f"{module}.loras.task"
        tensors[f"{stem}.lora_A"], tensors[f"{stem}.lora_B"] = pair.a.clone(), pair.b.clone()
    torch.save(tensors, path / "pytorch_adapter.bin")
    letters = [x for x in "qkv" if any(m.endswith(f".{x}_proj") for m in pairs)]
    inner = {
        "architecture": "lora", "r": rank, "alpha": alpha, "attn_matrices": letters,
        "selfattn_lora": bool(letters), "intermediate_lora": True, "output_lora": True,
        "composition_mode": "add", "dropout": 0.0, "init_weights": "lora", "leave_out": [],
        "use_gating": False,
    }  # fmt: skip
    config = {
        "config": inner, "name": "task", "version": "adapters.1.3.0", "model_name": BASE,
        "model_class": "LlamaAdapterModel", "model_type": "llama", "hidden_size": HIDDEN,
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def onnx_adapter(path: Path, pairs: Pairs, base: Llama) -> Path:
    from onnxruntime import AdapterFormat, OrtValue

    path = path.with_suffix(".onnx_adapter")
    made = AdapterFormat()
    made.set_adapter_version(3)
    made.set_model_version(5)
    values = {}
    for module, pair in pairs.items():
        a, b = pair.a.t().contiguous(), (pair.b.double() * pair.scaling).float().t().contiguous()
        values[f"{module}.lora_A.weight"] = OrtValue.ortvalue_from_numpy(a.numpy())
        values[f"{module}.lora_B.weight"] = OrtValue.ortvalue_from_numpy(b.numpy())
    made.set_parameters(values)
    made.export_adapter(str(path))
    return path


def loralib(path: Path, pairs: Pairs, base: Llama) -> Path:
    path = path.with_suffix(".pt")
    parts = {f"{m}.lora_{x}": t for m, p in pairs.items() for x, t in (("A", p.a), ("B", p.b))}
    torch.save({k: t.clone() for k, t in parts.items()}, path)
    return path


def raw(path: Path, pairs: Pairs, base: Llama) -> Path:
    """Factors the other way round, (in, rank) and (rank, out), each with its alpha."""
    path = path.with_suffix(".pt")
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{module}.lora_down.weight"] = pair.a.t().contiguous()
        tensors[f"{module}.lora_up.weight"] = pair.b.t().contiguous()
        tensors[f"{module}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float64)
    torch.save(tensors, path)
    return path


def olive(path: Path, pairs: Pairs, base: Llama) -> Path:
    path = path.with_suffix(".npz")
    arrays = {}
    for module, pair in pairs.items():
        stem = f"base_model.model.{module}"
        arrays[f"{stem}.lora_A.weight"] = pair.a.t().contiguous().numpy()
        b = (pair.b.double() * pair.scaling).float()
        arrays[f"{stem}.lora_B.weight"] = b.t().contiguous().numpy()
    np.savez(path, **arrays)
    return path


def nemo(path: Path, pairs: Pairs, base: Llama) -> Path:
    """NeMo 1: q, k, v fused group by group over one A, gate and up over one A."""
    path = path.with_suffix(".nemo")
    rank, alpha = _common(pairs)
    tensors = {}
    for number in range(LAYERS):
        mine = {x: pairs[f"model.layers.{number}.{x}"] for x in LINEAR}
        per = HEADS // base.kv
        q, k, v = (mine[f"self_attn.{x}_proj"].b.reshape(-1, SIZE, rank) for x in "qkv")
        rows = [x for g in range(base.kv)
                for x in (*q[g * per : (g + 1) * per], k[g], v[g])]  # fmt: skip
        fc1 = torch.cat([mine["mlp.gate_proj"].b, mine["mlp.up_proj"].b])
        for adapter, a, b in (
            ("self_attention.adapter_layer.lora_kqv_adapter", mine[LINEAR[0]].a, torch.cat(rows)),
            ("self_attention.adapter_layer.lora_dense_attention_adapter",
             mine["self_attn.o_proj"].a, mine["self_attn.o_proj"].b),
            ("mlp.adapter_layer.lora_hto4h_adapter", mine["mlp.gate_proj"].a, fc1),
            ("mlp.adapter_layer.lora_4htoh_adapter", mine["mlp.down_proj"].a,
             mine["mlp.down_proj"].b),
        ):  # fmt: skip
            stem = f"model.decoder.layers.{number}.{adapter}"
            tensors[f"{stem}.linear_in.weight"] = a.clone()
            tensors[f"{stem}.linear_out.weight"] = b.clone()
    config = {
        "num_layers": LAYERS, "num_attention_heads": HEADS, "num_query_groups": base.kv,
        "hidden_size": HIDDEN, "ffn_hidden_size": WIDE, "kv_channels": SIZE,
        "activation": "fast-swiglu", "restore_from_path": "/models/base",
        "peft": {"peft_scheme": "lora", "lora_tuning": {
            "adapter_dim": rank, "alpha": alpha, "target_modules": ["all"]}},
    }  # fmt: skip
    weights = io.BytesIO()
    torch.save(tensors, weights)
    with tarfile.open(path, "w") as packed:
        for name, content in (
            ("./model_config.yaml", yaml.safe_dump(config).encode()),
            ("./model_weights.ckpt", weights.getvalue()),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
    return path


Writer = Callable[[Path, Pairs, Llama], Path]
WRITERS: dict[str, Writer] = {
    "peft": peft, "gguf": gguf, "mlx": mlx, "torchtune": torchtune, "litgpt": litgpt,
    "adapterhub": adapterhub, "onnx_adapter": onnx_adapter, "loralib": loralib, "nemo": nemo,
    "olive": olive, "raw": raw,
}  # fmt: skip
