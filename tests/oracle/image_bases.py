"""Tiny pipelines of diffusers, the single files of the same weights, and adapters for both."""

import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from diffusers.loaders import single_file_utils as converters
from safetensors.torch import load_file, save_file

from loratools.adapter import Adapter, Replace
from loratools.algebra import held
from loratools.names import clip
from loratools.names.rules import Names
from loratools.translating import regrouped, translate

State = dict[str, torch.Tensor]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by module: A, B

NAMES = ("sd1", "sd2", "sdxl", "sd3", "flux")
UNET: dict[str, Any] = {
    "sample_size": 8, "norm_num_groups": 2, "layers_per_block": 2, "attention_head_dim": 2,
    "block_out_channels": (4, 8, 8, 8), "cross_attention_dim": 12,
}  # fmt: skip
SDXL: dict[str, Any] = {
    **UNET, "block_out_channels": (4, 8, 8), "cross_attention_dim": 28,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True, "addition_embed_type": "text_time",
    "transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
}  # fmt: skip
SD3: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 20,
    "caption_projection_dim": 16, "pooled_projection_dim": 28, "pos_embed_max_size": 8,
    "qk_norm": "rms_norm", "dual_attention_layers": (0,),
}  # fmt: skip
FLUX: dict[str, Any] = {
    "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 20, "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 6, 6), "guidance_embeds": True,
}  # fmt: skip


def _clip(hidden: int, *, projection: int = 0) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=10, projection_dim=projection or 12,
    )  # fmt: skip
    if projection:
        return transformers.CLIPTextModelWithProjection(config)
    return transformers.CLIPTextModel(config)


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=20, d_model=20, d_kv=4, d_ff=24, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


def _vae(**more: Any) -> Any:
    return diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, **more)


def pipeline(name: str, **denoiser: Any) -> Any:
    """A pipeline of the family with the same weights each time, without its tokenizers."""
    torch.manual_seed(3)
    none = {"tokenizer": None, "vae": _vae()}
    match name:
        case "sd1" | "sd2":
            more = {"use_linear_projection": True} if name == "sd2" else {}
            return diffusers.StableDiffusionPipeline(
                **none, unet=diffusers.UNet2DConditionModel(**{**UNET, **more, **denoiser}),
                text_encoder=_clip(12), scheduler=diffusers.DDIMScheduler(), safety_checker=None,
                feature_extractor=None, requires_safety_checker=False,
            )  # fmt: skip
        case "sdxl":
            return diffusers.StableDiffusionXLPipeline(
                **none, unet=diffusers.UNet2DConditionModel(**{**SDXL, **denoiser}),
                text_encoder=_clip(12), text_encoder_2=_clip(16, projection=16),
                tokenizer_2=None, scheduler=diffusers.DDIMScheduler(),
            )  # fmt: skip
        case "sd3":
            return diffusers.StableDiffusion3Pipeline(
                **none, transformer=diffusers.SD3Transformer2DModel(**{**SD3, **denoiser}),
                text_encoder=_clip(12, projection=12), text_encoder_2=_clip(16, projection=16),
                text_encoder_3=_t5(), tokenizer_2=None, tokenizer_3=None,
                scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            )  # fmt: skip
        case _:
            return diffusers.FluxPipeline(
                **none, transformer=diffusers.FluxTransformer2DModel(**{**FLUX, **denoiser}),
                text_encoder=_clip(12), text_encoder_2=_t5(), tokenizer_2=None,
                scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            )  # fmt: skip


def denoiser_of(name: str) -> str:
    return "transformer" if name in ("sd3", "flux") else "unet"


def states(pipe: Any) -> dict[str, State]:
    """The weights of every component, by its name; those that are tied once."""
    found = {}
    for component, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            state = {k: v.detach().contiguous() for k, v in module.state_dict().items()}
            state.pop("encoder.embed_tokens.weight", None)
            found[component] = state
    return found


# ------------------------------------------------------------------------------- single files

# Where a single file has each component: the prefix, and whether its names are OpenCLIP's.
PLACES: dict[str, dict[str, tuple[str, bool]]] = {
    "sd1": {"text_encoder": ("cond_stage_model.transformer.", False)},
    "sd2": {"text_encoder": ("cond_stage_model.model.", True)},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.", False),
        "text_encoder_2": ("conditioner.embedders.1.model.", True),
    },
    "sd3": {
        "text_encoder": ("text_encoders.clip_l.transformer.", False),
        "text_encoder_2": ("text_encoders.clip_g.transformer.", False),
        "text_encoder_3": ("text_encoders.t5xxl.transformer.", False),
    },
    "flux": {
        "text_encoder": ("text_encoders.clip_l.transformer.", False),
        "text_encoder_2": ("text_encoders.t5xxl.transformer.", False),
    },
}


def single(name: str, found: Mapping[str, State], *, front: str = "model.") -> State:
    """The same weights as a single file has them: the inverse of our own maps of names."""
    made: State = {}
    for component, state in found.items():
        full = {f"{component}.{_full(component, key)}": value for key, value in state.items()}
        if component == denoiser_of(name):
            moved = _moved(full, "original")
            made |= {front + key: value for key, value in moved.items()}
        elif component in PLACES[name]:
            prefix, is_open = PLACES[name][component]
            if is_open:
                names = Names(clip.openclip(component, f"{component}."))
                full = _values(regrouped(_replacing(full), names, shapes={}))
            made |= {prefix + key.partition(".")[2]: value for key, value in full.items()}
        else:
            made |= {f"first_stage_model.{key}": value for key, value in state.items()}
    return made


def _full(component: str, key: str) -> str:
    is_clip = component.startswith("text_encoder") and key.startswith(
        ("encoder.layers", "embeddings", "final_layer_norm")
    )
    return f"text_model.{key}" if is_clip else key


def _replacing(state: State) -> Adapter:
    deltas = {key: Replace(held(value, key)) for key, value in state.items()}
    return Adapter(deltas, "test", "diffusers")


def _values(adapter: Adapter) -> State:
    found = {}
    for key, delta in adapter.deltas.items():
        assert isinstance(delta, Replace)
        found[key] = delta.value.tensor().contiguous()
    return found


def _moved(state: State, to: str) -> State:
    moved = translate(_replacing(state), to)
    assert moved.adapter.problems == ()
    return _values(moved.adapter)


def _resized(function: Any, dimension: int) -> Any:
    """diffusers' converter for a Flux of another width, which it holds as a constant."""
    code = function.__code__
    consts = tuple(dimension if value == 3072 else value for value in code.co_consts)
    assert consts != code.co_consts
    return types.FunctionType(code.replace(co_consts=consts), function.__globals__)


def apart(name: str, file: Mapping[str, torch.Tensor], pipe: Any) -> dict[str, State]:
    """A single file's weights as diffusers' own converters take them apart."""
    front = "model.diffusion_model."
    denoiser = {k: v for k, v in file.items() if k.startswith(front)}
    match name:
        case "sd3":
            part = converters.convert_sd3_transformer_checkpoint_to_diffusers(denoiser)
        case "flux":
            function = converters.convert_flux_transformer_checkpoint_to_diffusers
            part = _resized(function, 32)(denoiser)
        case _:
            part = converters.convert_ldm_unet_checkpoint(denoiser, dict(pipe.unet.config))
    found: dict[str, State] = {denoiser_of(name): part}
    for component, (prefix, is_open) in PLACES[name].items():
        encoder = {k: v for k, v in file.items() if k.startswith(prefix)}
        if is_open:
            text = getattr(pipe, component)
            found[component] = converters.convert_open_clip_checkpoint(text, encoder, prefix)
        else:
            found[component] = converters.convert_ldm_clip_checkpoint(encoder, prefix)
    return found


# ------------------------------------------------------------------------------- adapters

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MORE = {
    "sd1": [*ATTENTION, "proj_in", "proj_out", "conv1", "ff.net.0.proj", "time_emb_proj"],
    "sd2": [*ATTENTION, "proj_in", "conv_shortcut", "ff.net.2"],
    "sdxl": [*ATTENTION, "proj_in", "ff.net.2", "conv2", "linear_1", "0.conv"],
    "sd3": [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_out",
            "ff.net.0.proj", "ff_context.net.2", "norm1.linear", "norm_out.linear"],
    "flux": [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp",
             "proj_out", "norm1.linear", "norm.linear", "ff.net.0.proj", "ff_context.net.2",
             "x_embedder", "context_embedder", "norm_out.linear"],
}  # fmt: skip
ENCODERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
RANK, ALPHA = 2, 3.0


@cache
def trained(name: str, modules: tuple[str, ...] = ()) -> dict[str, Pairs]:
    """Factors of an adapter of every component, as PEFT makes them; CLIP with `text_model.`."""
    pipe, found = pipeline(name), {}
    draw = torch.Generator().manual_seed(7)
    for component, part in pipe.components.items():
        if component == denoiser_of(name):
            wanted = list(modules) or MORE[name]
        elif component.startswith("text_encoder") and not modules:
            is_t5 = isinstance(part, transformers.T5EncoderModel)
            if is_t5:
                continue  # diffusers loads no adapter into a T5
            wanted = ENCODERS
        else:
            continue
        part.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=wanted))
        state = peft.get_peft_model_state_dict(part, adapter_name="default")
        pairs: Pairs = {}
        for key in state:
            if key.endswith(".lora_A.weight"):
                module = key.removesuffix(".lora_A.weight")
                shapes = [state[f"{module}.lora_{half}.weight"].shape for half in "AB"]
                a, b = (torch.randn(shape, generator=draw) * 0.08 for shape in shapes)
                pairs[_full(component, module)] = (a, b)
        found[component] = pairs
    return found


def plain(found: Mapping[str, Pairs]) -> State:
    """As diffusers and ai-toolkit write it without metadata: the scaling is 1."""
    made: State = {}
    for component, pairs in found.items():
        for module, (a, b) in pairs.items():
            made[f"{component}.{module}.lora_A.weight"] = a
            made[f"{component}.{module}.lora_B.weight"] = b * (ALPHA / RANK)
    return made


def save_as_diffusers(name: str, found: Mapping[str, Pairs], folder: Path) -> Path:
    """As a pipeline of diffusers saves it, with its metadata."""
    layers, about = {}, {}
    for component, pairs in found.items():
        halves = [
            (m, half, t) for m, pair in pairs.items() for half, t in zip("AB", pair, strict=True)
        ]
        layers[f"{component}_lora_layers"] = {f"{m}.lora_{h}.weight": t for m, h, t in halves}
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=sorted(pairs))
        about[f"{component}_lora_adapter_metadata"] = config.to_dict()
    kind = type(pipeline(name))
    kind.save_lora_weights(folder, **layers, **about)
    return folder / "pytorch_lora_weights.safetensors"


def in_old_diffusers(found: Mapping[str, Pairs]) -> State:
    """As diffusers 0.17 to 0.21 wrote it, which had no alpha."""
    made: State = {}
    for component, pairs in found.items():
        is_text = component.startswith("text")
        here = "lora_linear_layer" if is_text else "lora"
        for module, (a, b) in pairs.items():
            made[f"{component}.{module}.{here}.down.weight"] = a
            made[f"{component}.{module}.{here}.up.weight"] = b * (ALPHA / RANK)
    return made


def in_kohya(name: str, found: Mapping[str, Pairs], prefixes: Mapping[str, str]) -> State:
    """kohya's names of diffusers' modules: sd-scripts for SD1, OneTrainer for the others."""
    return {
        key: value
        for component, pairs in found.items()
        for key, value in mangled(pairs, prefixes[component]).items()
    }


def fused(pairs: Pairs, modules: list[str], rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair of the stacked modules; those that the adapter lacks change nothing."""
    have = [(i, pairs[m]) for i, m in enumerate(modules) if m in pairs]
    total, rank = sum(rows), sum(a.shape[0] for _, (a, _) in have)
    whole, at = torch.zeros(total, rank), 0
    for i, (_, b) in have:
        start = sum(rows[:i])
        whole[start : start + len(b), at : at + b.shape[1]] = b
        at += b.shape[1]
    return torch.cat([a for _, (a, _) in have]), whole


def in_bfl(pairs: Pairs, *, single_rows: bool = True) -> Pairs:
    """The pairs of a tiny Flux's attention under Black Forest Labs' names."""
    made: Pairs = {}
    for n in range(2):
        here, there = f"transformer_blocks.{n}.attn", f"double_blocks.{n}"
        for side, parts, out in (
            ("img", ["to_q", "to_k", "to_v"], "to_out.0"),
            ("txt", ["add_q_proj", "add_k_proj", "add_v_proj"], "to_add_out"),
        ):
            made[f"{there}.{side}_attn.qkv"] = fused(
                pairs, [f"{here}.{p}" for p in parts], [32] * 3
            )
            made[f"{there}.{side}_attn.proj"] = pairs[f"{here}.{out}"]
        here, there = f"single_transformer_blocks.{n}", f"single_blocks.{n}"
        parts = [f"{here}.attn.{p}" for p in ("to_q", "to_k", "to_v")]
        rows = [32] * 3
        if single_rows:
            parts, rows = [*parts, f"{here}.proj_mlp"], [*rows, 128]
        made[f"{there}.linear1"] = fused(pairs, parts, rows)
        made[f"{there}.linear2"] = pairs[f"{here}.proj_out"]
    return made


def scaled(pairs: Pairs, *, scaling: float) -> Pairs:
    return {module: (a, b * scaling) for module, (a, b) in pairs.items()}


def in_xlabs(pairs: Pairs) -> State:
    """XLabs' processors, whose scaling is 1; single blocks without their MLP."""
    made: State = {}
    for module, (a, b) in in_bfl(pairs, single_rows=False).items():
        block, _, layer = module.rpartition(".")
        side = {"img_attn": "1", "txt_attn": "2"}.get(block.rpartition(".")[2], "")
        place = ".".join(module.split(".")[:2])
        kind = "qkv_lora" if layer in ("qkv", "linear1") else "proj_lora"
        made[f"{place}.processor.{kind}{side}.down.weight"] = a
        made[f"{place}.processor.{kind}{side}.up.weight"] = b * (ALPHA / RANK)
    return made


def original_names(name: str) -> dict[str, str]:
    """The original module of every module of a U-Net, as diffusers' converter pairs them."""
    file = single(name, states(pipeline(name)))
    made = apart(name, file, pipeline(name))[denoiser_of(name)]
    keys = {id(value): key for key, value in file.items()}
    front = "model.diffusion_model."
    return {
        key.removesuffix(".weight"): keys[id(value)].removeprefix(front).removesuffix(".weight")
        for key, value in made.items()
        if key.endswith(".weight")
    }


def mangled(pairs: Pairs, prefix: str) -> State:
    """kohya's keys of these modules, with the alpha that makes the scaling ALPHA / RANK."""
    made: State = {}
    for module, (a, b) in pairs.items():
        key = f"{prefix}_{module.replace('.', '_')}"
        made[f"{key}.lora_down.weight"] = a
        made[f"{key}.lora_up.weight"] = b
        made[f"{key}.alpha"] = torch.tensor(a.shape[0] * ALPHA / RANK)
    return made


def judged(name: str, file: Path) -> dict[str, State]:
    """The weights after diffusers loaded a file and fused it."""
    pipe = pipeline(name)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    fusing = [c for c in pipe._lora_loadable_modules if getattr(pipe, c, None) is not None]
    pipe.fuse_lora(components=fusing)
    pipe.unload_lora_weights()
    return states(pipe)


def write(folder: Path, name: str, tensors: State) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / name)
    return folder / name


def saved(name: str, folder: Path, **options: Any) -> Path:
    """A pipeline's folder, as diffusers saves it."""
    pipeline(name).save_pretrained(folder, **options)
    return folder


def read_back(folder: Path) -> dict[str, State]:
    """The weights of every component of a folder, as they lie there."""
    found: dict[str, State] = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        found.setdefault(file.parent.name, {}).update(load_file(file))
    return found


def same_names(state: State) -> State:
    """A text encoder's weights without `text_model.`, which versions put there or leave out."""
    return {key.removeprefix("text_model."): value for key, value in state.items()}
