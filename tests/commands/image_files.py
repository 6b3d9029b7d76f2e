"""Adapters of tiny image models as each program lays them out, written here without loratools."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.commands.adapter_files import Pair, Pairs

UNET = "unet.down_blocks.0"
BLOCK = f"{UNET}.attentions.0.transformer_blocks.0"
CLIP = "text_encoder.text_model.encoder.layers"
DOUBLE, SINGLE = "transformer.transformer_blocks.18", "transformer.single_transformer_blocks.37"
# Shapes of weights by diffusers' names: linear layers, convolutions of 1 x 1 and of 3 x 3.
SD1 = {
    f"{BLOCK}.attn1.to_q": (8, 8), f"{BLOCK}.attn1.to_out.0": (8, 8),
    f"{BLOCK}.attn2.to_k": (8, 768),
    f"{BLOCK}.attn2.to_v": (8, 768), f"{BLOCK}.ff.net.0.proj": (64, 8),
    f"{UNET}.attentions.0.proj_in": (8, 8, 1, 1), f"{UNET}.resnets.0.conv1": (8, 8, 3, 3),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k": (12, 12),
    f"{CLIP}.0.self_attn.q_proj": (10, 10), f"{CLIP}.1.mlp.fc1": (40, 10),
}  # fmt: skip
FLUX = {
    f"{DOUBLE}.attn.to_q": (8, 8), f"{DOUBLE}.attn.to_k": (8, 8), f"{DOUBLE}.attn.to_v": (8, 8),
    f"{DOUBLE}.attn.add_q_proj": (8, 8), f"{DOUBLE}.attn.add_k_proj": (8, 8),
    f"{DOUBLE}.attn.add_v_proj": (8, 8), f"{DOUBLE}.attn.to_out.0": (8, 8),
    f"{DOUBLE}.ff.net.0.proj": (32, 8), f"{DOUBLE}.norm1.linear": (48, 8),
    f"{SINGLE}.attn.to_q": (8, 8), f"{SINGLE}.attn.to_k": (8, 8), f"{SINGLE}.attn.to_v": (8, 8),
    f"{SINGLE}.proj_mlp": (32, 8), f"{SINGLE}.proj_out": (8, 40), f"{SINGLE}.norm.linear": (24, 8),
    "transformer.norm_out.linear": (16, 8),
}  # fmt: skip
# Flux' own modules, with the parts whose rows they hold one after another.
OWN = {
    "double_blocks.18.img_attn.qkv": [f"{DOUBLE}.attn.to_{x}" for x in "qkv"],
    "double_blocks.18.txt_attn.qkv": [f"{DOUBLE}.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.18.img_attn.proj": [f"{DOUBLE}.attn.to_out.0"],
    "double_blocks.18.img_mlp.0": [f"{DOUBLE}.ff.net.0.proj"],
    "double_blocks.18.img_mod.lin": [f"{DOUBLE}.norm1.linear"],
    "single_blocks.37.linear1": [
        *(f"{SINGLE}.attn.to_{x}" for x in "qkv"), f"{SINGLE}.proj_mlp"
    ],
    "single_blocks.37.linear2": [f"{SINGLE}.proj_out"],
    "single_blocks.37.modulation.lin": [f"{SINGLE}.norm.linear"],
    "final_layer.adaLN_modulation.1": ["transformer.norm_out.linear"],
}  # fmt: skip
XLABS = {
    "double_blocks.18.processor.qkv_lora1": [f"{DOUBLE}.attn.to_{x}" for x in "qkv"],
    "double_blocks.18.processor.qkv_lora2": [f"{DOUBLE}.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.18.processor.proj_lora1": [f"{DOUBLE}.attn.to_out.0"],
    "single_blocks.37.processor.qkv_lora": [f"{SINGLE}.attn.to_{x}" for x in "qkv"],
    "single_blocks.37.processor.proj_lora": [f"{SINGLE}.proj_out"],
}


def _save(path: Path, tensors: Mapping[str, torch.Tensor], said: Mapping[str, str]) -> Path:
    path = path.with_suffix(".safetensors")
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, path, dict(said))
    return path


def fused(pairs: Pairs, table: Mapping[str, list[str]] = OWN) -> dict[str, Pair]:
    """Flux' own modules from parts that share A; all parts of one are there, or none of them."""
    found = {}
    for whole, parts in table.items():
        if parts[0] in pairs:
            b = torch.cat([pairs[p].b for p in parts])
            if whole.startswith("final_layer"):  # there the shift stands before the scale
                b = b.roll(len(b) // 2, 0)
            found[whole] = Pair(pairs[parts[0]].a, b, pairs[parts[0]].alpha)
    return found


def peft(path: Path, pairs: Pairs) -> Path:
    """Of one component."""
    path.mkdir(parents=True)
    inner = {m.partition(".")[2]: p for m, p in pairs.items()}
    tensors = {}
    for module, pair in inner.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = pair.a
        tensors[f"base_model.model.{module}.lora_B.weight"] = pair.b
    save_file({k: t.contiguous().clone() for k, t in tensors.items()},
              path / "adapter_model.safetensors", {"format": "pt", "author": "Ada"})  # fmt: skip
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": sorted(inner),
        "rank_pattern": {"^" + m.replace(".", r"\."): p.rank for m, p in inner.items()},
        "alpha_pattern": {"^" + m.replace(".", r"\."): p.alpha for m, p in inner.items()},
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def mangled(module: str) -> str:
    """kohya's name of a module of Stable Diffusion 1."""
    component, _, inner = module.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + inner.replace(".", "_")


def kohya(path: Path, pairs: Pairs) -> Path:
    named = {mangled(m): p for m, p in pairs.items() if not m.startswith("transformer.")}
    own = {"lora_unet_" + m.replace(".", "_"): p for m, p in fused(pairs).items()}
    tensors = {}
    for module, pair in {**named, **own}.items():
        tensors[f"{module}.lora_down.weight"] = pair.a
        tensors[f"{module}.lora_up.weight"] = pair.b
        single = float(torch.tensor(pair.alpha)) == pair.alpha
        kind = torch.float32 if single else torch.float64
        tensors[f"{module}.alpha"] = torch.tensor(pair.alpha, dtype=kind)
    said = {
        "ss_sd_model_name": "org/tiny", "ss_learning_rate": "0.0001",
        "ss_training_comment": "by Ada", "modelspec.trigger_phrase": "tiny",
    }  # fmt: skip
    return _save(path, tensors, said)


def diffusers(path: Path, pairs: Pairs) -> Path:
    table: dict[str, object] = {}
    for component in {m.partition(".")[0] for m in pairs}:
        mine = {m.partition(".")[2]: p for m, p in pairs.items() if m.startswith(f"{component}.")}
        said = {
            "r": 8, "lora_alpha": 8, "peft_type": "LORA", "target_modules": sorted(mine),
            "rank_pattern": {"^" + m: p.rank for m, p in mine.items()},
            "alpha_pattern": {"^" + m: p.alpha for m, p in mine.items()},
        }  # fmt: skip
        table |= {f"{component}.{field}": value for field, value in said.items()}
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{module}.lora_A.weight"] = pair.a
        tensors[f"{module}.lora_B.weight"] = pair.b
    said = {"format": "pt", "author": "Ada", "lora_adapter_metadata": json.dumps(table)}
    return _save(path, tensors, said)


def xlabs(path: Path, pairs: Pairs) -> Path:
    tensors = {}
    for module, pair in fused(pairs, XLABS).items():
        tensors[f"{module}.down.weight"], tensors[f"{module}.up.weight"] = pair.a, pair.b
    return _save(path, tensors, {"author": "Ada"})


def bfl(path: Path, pairs: Pairs) -> Path:
    tensors = {}
    for module, pair in fused(pairs).items():
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = pair.a, pair.b
    return _save(path, tensors, {"author": "Ada"})


def comfy(path: Path, pairs: Pairs) -> Path:
    tensors = {}
    for module, pair in fused(pairs).items():
        stem = f"diffusion_model.{module}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = pair.a, pair.b
        tensors[f"{stem}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float64)
    return _save(path, tensors, {"author": "Ada"})


def numbered() -> dict[str, tuple[int, ...]]:
    """The attention of a U-Net of Stable Diffusion 1, in the order in which torch walks it."""
    shapes = {}
    fronts = [(f"down_blocks.{i}", 2, width) for i, width in enumerate((4, 8, 16))]
    fronts += [(f"up_blocks.{i + 1}", 3, width) for i, width in enumerate((16, 8, 4))]
    for front, count, width in [*fronts, ("mid_block", 1, 16)]:
        for i in range(count):
            for attention, text in (("attn1", width), ("attn2", 768)):
                stem = f"unet.{front}.attentions.{i}.transformer_blocks.0.{attention}"
                for name in ("to_q", "to_k", "to_v", "to_out.0"):
                    shapes[f"{stem}.{name}"] = (width, text if name in ("to_k", "to_v") else width)
    return shapes


def cloneofsimo(path: Path, pairs: Pairs) -> Path:
    """Pairs by number alone."""
    tensors = {}
    for i, module in enumerate(numbered()):
        pair = pairs[module]
        tensors[f"unet:{i}:down"], tensors[f"unet:{i}:up"] = pair.a, pair.b
    return _save(path, tensors, {"author": "Ada"})


Writer = Callable[[Path, Pairs], Path]
WRITERS: dict[str, Writer] = {
    "peft": peft, "kohya": kohya, "diffusers": diffusers, "xlabs": xlabs, "bfl": bfl,
    "comfy": comfy, "cloneofsimo": cloneofsimo,
}  # fmt: skip
