"""Synthetic models of real shapes for the figures, written straight to disk."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from loratools.containers.safetensors import plan_layout
from loratools.weights import disk

HIDDEN, INNER, VOCABULARY = 4096, 11008, 32000
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
SIZE = {"BF16": 2, "F32": 4}


def bits(count: int, dtype: str, deviation: float, seed: int) -> bytes:
    """Random numbers of about the deviation, quick to make: one block, repeated from odd places."""
    import numpy as np

    block = np.random.default_rng(seed).standard_normal(min(count, 1 << 22), dtype=np.float32)
    block *= deviation
    raw = block.view(np.uint32)
    data = (raw >> 16).astype(np.uint16).tobytes() if dtype == "BF16" else block.tobytes()
    size = SIZE[dtype]
    need = count * size
    shift = random.Random(seed).randrange(max(1, len(data) // size)) * size
    ring = data[shift:] + data[:shift]
    return (ring * math.ceil(need / len(ring)))[:need]


def write(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], deviation: float) -> None:
    """One safetensors file of random tensors, a tensor at a time."""
    header, offsets = plan_layout(tensors, {"format": "pt"})
    with open(path, "wb") as file:
        file.write(header)
        for number, (name, dtype, shape) in enumerate(tensors):
            file.seek(offsets[name])
            file.write(bits(math.prod(shape), dtype, deviation, number))
        disk.sync_file(file.fileno())


def base(folder: Path, layers: int, *, per_shard: int = 2) -> Path:
    """A Llama-2-7B-shaped base in bfloat16 with fewer layers: 405 MB a layer, sharded."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = []
    for first in range(0, layers, per_shard):
        rows = []
        for layer in range(first, min(first + per_shard, layers)):
            stem = f"model.layers.{layer}"
            rows += [(f"{stem}.{n}.weight", "BF16", s) for n, s in LINEAR.items()]
            rows += [
                (f"{stem}.{n}.weight", "BF16", (HIDDEN,))
                for n in ("input_layernorm", "post_attention_layernorm")
            ]
        groups.append(rows)
    groups[0].insert(0, ("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)))
    groups[-1] += [
        ("model.norm.weight", "BF16", (HIDDEN,)),
        ("lm_head.weight", "BF16", (VOCABULARY, HIDDEN)),
    ]
    where = {}
    for number, rows in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        write(folder / name, rows, 0.02)
        where |= {row[0]: name for row in rows}
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 32,
        "num_hidden_layers": layers,
        "num_key_value_heads": 32,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder: Path, layers: int, *, rank: int = 16, seed: int = 1) -> Path:
    """A PEFT LoRA on all linear layers, float32."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True)
    rows: list[tuple[str, str, tuple[int, ...]]] = []
    for layer in range(layers):
        for name, (out, inner) in LINEAR.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            rows.append((f"{stem}.lora_A.weight", "F32", (rank, inner)))
            rows.append((f"{stem}.lora_B.weight", "F32", (out, rank)))
    write(folder / "adapter_model.safetensors", rows, 0.01 + seed * 1e-4)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(n.rpartition(".")[2] for n in LINEAR),
        "base_model_name_or_path": None,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def many_shards(folder: Path, shards: int = 30, tensors: int = 723) -> Path:
    """A sparse 32-layer base in many shards: headers are real, its data are holes."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    rows: list[tuple[str, str, tuple[int, ...]]] = []
    for layer in range(32):
        stem = f"model.layers.{layer}"
        rows += [(f"{stem}.{n}.weight", "BF16", s) for n, s in LINEAR.items()]
    while len(rows) < tensors:
        rows.append((f"model.layers.{len(rows) % 32}.norm_{len(rows)}.weight", "BF16", (HIDDEN,)))
    where = {}
    for number in range(shards):
        part = rows[number::shards]
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header, offsets = plan_layout(part, {"format": "pt"})
        last = part[-1]
        with open(folder / name, "wb") as file:
            file.write(header)
            file.truncate(offsets[last[0]] + math.prod(last[2]) * 2)
        where |= {row[0]: name for row in part}
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "tie_word_embeddings": False})
    )
    return folder
