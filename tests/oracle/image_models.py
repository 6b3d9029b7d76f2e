"""Tiny image models and pipelines of diffusers, and their weights with an adapter folded in."""

from functools import cache
from typing import Any

import diffusers
import torch
import transformers

from loratools import algebra
from loratools.adapter import Adapter

BLOCKS: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 12,
}  # fmt: skip
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd1": (diffusers.UNet2DConditionModel, {**BLOCKS, "attention_head_dim": 4}),
    "sdxl": (
        diffusers.UNet2DConditionModel,
        {
            **BLOCKS, "attention_head_dim": (2, 4), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 32, "transformer_layers_per_block": (1, 2),
        },
    ),
    "flux": (
        diffusers.FluxTransformer2DModel,
        {
            "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 6,
            "axes_dims_rope": (4, 6, 6), "guidance_embeds": True,
        },
    ),
}  # fmt: skip
PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "flux": "FluxPipeline",
}


def component_of(name: str) -> str:
    return "transformer" if name == "flux" else "unet"


@cache
def _weights(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    kind, config = MODELS[name]
    return dict(kind(**config).state_dict())


def make(name: str) -> torch.nn.Module:
    """A model of its own with the same weights each time."""
    kind, config = MODELS[name]
    model = kind(**config).eval().requires_grad_(False)
    model.load_state_dict(_weights(name))
    return model


def trained(name: str, config: Any) -> torch.nn.Module:
    """A model with an adapter whose every parameter moved away from where it began."""
    model = make(name)
    model.add_adapter(config)
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "magnitude" in key:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
        elif "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def outputs(name: str, model: torch.nn.Module) -> torch.Tensor:
    """What a model answers to a fixed input."""
    draw = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    if name == "flux":
        return model(
            hidden_states=noise(1, 4, 4), encoder_hidden_states=noise(1, 3, 12),
            pooled_projections=noise(1, 6), timestep=torch.tensor([0.5]),
            img_ids=torch.rand(4, 3, generator=draw), txt_ids=torch.zeros(3, 3),
            guidance=torch.tensor([3.5]),
        ).sample  # fmt: skip
    added = {"text_embeds": noise(1, 8), "time_ids": torch.rand(1, 6, generator=draw)}
    return model(
        noise(1, 4, 8, 8), torch.tensor([10]), noise(1, 5, 12),
        added_cond_kwargs=added if name == "sdxl" else None,
    ).sample  # fmt: skip


def text_encoder() -> Any:
    """A tiny CLIP text encoder with the same weights each time."""
    torch.manual_seed(2)
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=10,
    )  # fmt: skip
    return transformers.CLIPTextModel(config).eval().requires_grad_(False)


def judged(name: str, model: torch.nn.Module, text: Any = None) -> Any:
    """The pipeline of a model, without what loading an adapter does not need."""
    kind = getattr(diffusers, PIPELINES[name])
    if name == "flux":
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
        return kind(scheduler=scheduler, vae=None, text_encoder=text, tokenizer=None,
                    text_encoder_2=None, tokenizer_2=None, transformer=model)  # fmt: skip
    scheduler = diffusers.DDIMScheduler()
    if name == "sdxl":
        return kind(vae=None, text_encoder=text, text_encoder_2=None, tokenizer=None,
                    tokenizer_2=None, unet=model, scheduler=scheduler)  # fmt: skip
    return kind(vae=None, text_encoder=text, tokenizer=None, unet=model, scheduler=scheduler,
                safety_checker=None, feature_extractor=None)  # fmt: skip


def tuned_state(
    state: dict[str, torch.Tensor], adapter: Adapter, component: str
) -> dict[str, torch.Tensor]:
    """Weights with all of an adapter's deltas of a component folded in."""
    folded = dict(state)
    for key, delta in adapter.deltas.items():
        name = key.removeprefix(f"{component}.")
        assert key != name
        update = algebra.materialise(delta, state[name])
        folded[name] = (state[name].double() + update.reshape(state[name].shape)).float()
    return folded
