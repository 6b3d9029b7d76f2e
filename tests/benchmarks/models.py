"""Synthetic models of real shapes for the figures, written straight to disk."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from loratools.containers.safetensors import plan_layout
from loratools.weights import disk
from tests.sparse_files import sparse

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
SIZE = {"BF16": 2, "F16": 2, "F32": 4}


def bits(count: int, dtype: str, deviation: float, seed: int) -> bytes:
    """Random numbers of about the deviation, quick to make: one block, repeated from odd places."""
    import numpy as np

    block = np.random.default_rng(seed).standard_normal(min(count, 1 << 22), dtype=np.float32)
    block *= deviation
    match dtype:
        case "BF16":
            data = (block.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        case "F16":
            data = block.astype(np.float16).tobytes()
        case _:
            data = block.tobytes()
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


FLUX = {
    "img_attn_qkv": (9216, 3072), "img_attn_proj": (3072, 3072), "img_mlp_0": (12288, 3072),
    "img_mlp_2": (3072, 12288), "img_mod_lin": (18432, 3072), "txt_attn_qkv": (9216, 3072),
    "txt_attn_proj": (3072, 3072), "txt_mlp_0": (12288, 3072), "txt_mlp_2": (3072, 12288),
    "txt_mod_lin": (18432, 3072),
}  # fmt: skip
FLUX_DIFFUSERS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()


def flux_lora(path: Path, tensors: int, *, kohya: bool, rank: int = 16, seed: int = 0) -> Path:
    """A LoRA of Flux with its header alone, in kohya's names (with alphas) or in diffusers'."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, tuple[int, ...]] = {}
    block = 0
    while len(shapes) < tensors:
        for name, (out, inner) in FLUX.items() if kohya else ():
            stem = f"lora_unet_double_blocks_{block}_{name}"
            shapes |= {f"{stem}.alpha": (), f"{stem}.lora_down.weight": (rank, inner)}
            shapes[f"{stem}.lora_up.weight"] = (out, rank)
        for name in () if kohya else FLUX_DIFFUSERS:
            stem = f"transformer.transformer_blocks.{block}.attn.{name}"
            shapes |= {f"{stem}.lora_A.weight": (rank, 3072), f"{stem}.lora_B.weight": (3072, rank)}
        block += 1
    each = 3 if kohya else 2
    sparse(path, dict(list(shapes.items())[: tensors // each * each]), rank / 2, "BF16")
    with open(path, "r+b") as file:  # so that no file is suspected of being another's copy
        file.seek(-4096, 2)
        file.write(random.Random(seed).randbytes(4096))
    return path


def many_loras(folder: Path, count: int = 300, tensors: int = 800) -> Path:
    """A folder of LoRAs, every other one in kohya's names."""
    for i in range(count):
        name = folder / f"lora-{i:03}.safetensors"
        flux_lora(name, tensors, kohya=i % 2 == 1, rank=4 + 4 * (i % 8), seed=i)
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


# ------------------------------------------------------------------------------- image models


def sdxl_shapes() -> dict[str, tuple[int, ...]]:
    """The weights of SDXL's U-Net and text encoders by address, from models without numbers."""
    import diffusers
    import torch
    import transformers

    first = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072)
    second = transformers.CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        projection_dim=1280, hidden_act="gelu",
    )  # fmt: skip
    with torch.device("meta"):
        parts = {
            "unet": diffusers.UNet2DConditionModel(
                block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
                attention_head_dim=(5, 10, 20), use_linear_projection=True,
                transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time",
                addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            ),
            "text_encoder": transformers.CLIPTextModel(first),
            "text_encoder_2": transformers.CLIPTextModelWithProjection(second),
        }  # fmt: skip
    found = {}
    for component, part in parts.items():
        for name, tensor in part.state_dict().items():
            is_flat = component != "unet" and name.startswith(("encoder.", "embed", "final_"))
            found[f"{component}.{'text_model.' * is_flat}{name}"] = tuple(tensor.shape)
    return found


def sdxl(file: Path) -> Path:
    """A single file of SDXL's shapes in float16, 6.5 GB, in SGM's and OpenCLIP's names."""
    if file.exists():
        return file
    from loratools.adapter import Adapter, Kind, Leaf, Replace
    from loratools.names import clip
    from loratools.names.rules import Names
    from loratools.translating import regrouped, translate

    deltas: dict[str, Kind] = {
        name: Replace(Leaf(name, "F16", shape)) for name, shape in sdxl_shapes().items()
    }
    moved = translate(Adapter(deltas, "bench", "diffusers"), "original").adapter
    second = Names(clip.openclip("text_encoder_2", "text_encoder_2."))
    fronts = {
        "diffusion_model": "model.diffusion_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    }
    rows = []
    for name, delta in regrouped(moved, second, shapes={}).deltas.items():
        assert isinstance(delta, Replace)
        component, _, rest = name.partition(".")
        rows.append((fronts[component] + rest, "F16", delta.value.shape))
    # The autoencoder, which no adapter touches, as one tensor of its size.
    rows.append(("first_stage_model.weight", "F16", (83_653_863,)))
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    write(fresh, rows, 0.02)
    fresh.rename(file)
    return file


def sdxl_lora(file: Path, *, rank: int = 32) -> Path:
    """A kohya LoRA of all attention and feed-forward layers of SDXL and both its encoders."""
    if file.exists():
        return file
    from loratools.adapter import Adapter, Kind, Leaf, LowRank
    from loratools.names.mangling import mangled
    from loratools.translating import translate

    ends = ("_proj.weight", "proj.weight", "to_q.weight", "to_k.weight", "to_v.weight",
            "to_out.0.weight", "ff.net.2.weight", "fc1.weight", "fc2.weight")  # fmt: skip
    deltas: dict[str, Kind] = {}
    for name, shape in sdxl_shapes().items():
        if name.endswith(ends) and len(shape) == 2 and "embedding" not in name:
            pair = Leaf("a", "F16", (rank, shape[1])), Leaf("b", "F16", (shape[0], rank))
            deltas[name] = LowRank(*pair, 1.0, None)
    deltas = dict(translate(Adapter(deltas, "bench", "diffusers"), "original").adapter.deltas)
    rows: list[tuple[str, str, tuple[int, ...]]] = []
    for name, delta in deltas.items():
        assert isinstance(delta, LowRank)
        stem = mangled(name.removesuffix(".weight"), "sdxl")
        rows += [(f"{stem}.lora_down.weight", "F16", delta.a.shape)]
        rows += [(f"{stem}.lora_up.weight", "F16", delta.b.shape)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, rows, 0.02)
    return file
