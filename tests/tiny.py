"""A tiny adapter and its base, built as bytes: eight features, two layers, q_proj and v_proj."""

import json
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIZE = 8
MODULES = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]


def numbers(count: int, seed: int, scale: float) -> bytes:
    draw = random.Random(seed)
    return struct.pack(f"<{count}f", *(draw.gauss(0, scale) for _ in range(count)))


def safetensors(tensors: Mapping[str, tuple[list[int], bytes]]) -> bytes:
    """A file of F32 tensors: name → (shape, bytes)."""
    header: dict[str, Any] = {}
    at = 0
    for name, (shape, raw) in tensors.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(raw for _, raw in tensors.values())


def write_adapter(
    folder: Path, seed: int = 1, rank: int = 4, modules: Sequence[str] = MODULES, **config: Any
) -> Path:
    """A PEFT adapter of these modules; its update is a few percent of the base."""
    folder.mkdir(parents=True)
    tensors = {}
    for i, module in enumerate(modules):
        stem = f"base_model.model.{module}"
        a, b = numbers(rank * SIZE, seed + 10 * i, 1.0), numbers(SIZE * rank, seed + 7 * i, 0.02)
        tensors[f"{stem}.lora_A.weight"] = ([rank, SIZE], a)
        tensors[f"{stem}.lora_B.weight"] = ([SIZE, rank], b)
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    table = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"],
        **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(table))
    return folder


def write_base(folder: Path, shards: int = 1) -> Path:
    """A base of all modules and an embedding, in one file or in several."""
    folder.mkdir()
    tensors = {f"{m}.weight": ([SIZE, SIZE], numbers(64, i, 1.0)) for i, m in enumerate(MODULES)}
    tensors["model.embed_tokens.weight"] = ([5, SIZE], numbers(5 * SIZE, 99, 1.0))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(tensors))
    else:
        where = {n: f"model-{i % shards + 1:05d}.safetensors" for i, n in enumerate(tensors)}
        for file in sorted(set(where.values())):
            part = {n: tensors[n] for n in tensors if where[n] == file}
            (folder / file).write_bytes(safetensors(part))
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
