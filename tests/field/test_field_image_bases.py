"""Real lists of names: adapters of image models bind to their bases' lists completely."""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from loratools import formats
from loratools.adapter import Adapter, Dense, Kind, LowRank, Replace
from loratools.bind import bind
from loratools.containers.safetensors import plan_layout
from loratools.names.architectures import BY_NAME, modules
from loratools.names.checkpoints import addresses_of
from loratools.names.mangling import mangled
from loratools.names.orders import SIZES
from loratools.names.rules import asked
from loratools.plan import Plan
from loratools.translating import translate
from loratools.weights.base import Base
from tests.bases import base, unread

Shapes = Mapping[str, list[int]]

# Keys of single files that no adapter changes: what a sampler needs, and CLIP's counters.
BUFFERS = (
    "position_ids", "logit_scale", "alphas_cumprod", "alphas_cumprod_prev", "betas",
    "log_one_minus_alphas_cumprod", "posterior_log_variance_clipped", "posterior_mean_coef1",
    "posterior_mean_coef2", "posterior_variance", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "model_ema.decay", "model_ema.num_updates",
)  # fmt: skip


def keymap(folder: Path, name: str):
    return json.loads((folder / "keymaps" / f"{name}.json").read_text())


def require_all(plan: Plan) -> None:
    """Every delta has found its weight, and nothing is wrong."""
    assert [p for p in plan.problems if p.severity != "note"] == []
    assert plan.matched == tuple(len(a.deltas) for a in plan.adapters) or sum(plan.matched) > 0


def pair(shape: Iterable[int]) -> LowRank:
    out, into, *kernel = shape
    up = unread("up", out, 2, *(1 for _ in kernel))
    return LowRank(unread("down", 2, into, *kernel), up, 1.0, 2.0)


# ------------------------------------------------------------------------------- Stable Diffusion

ENCODERS = {
    "sd1": {"te_": "text_encoder."},
    "sd2": {"te_": "text_encoder."},
    "refiner": {"te1_": "text_encoder_2."},
    "sdxl": {"te0_": "text_encoder.", "te1_": "text_encoder_2."},
    "ssd": {"te0_": "text_encoder.", "te1_": "text_encoder_2."},
    "vega": {"te0_": "text_encoder.", "te1_": "text_encoder_2."},
}
ARCHITECTURE = {"sd1": "sd1", "sd2": "sd2", "refiner": "sdxl-refiner"}


def address(name: str, key: str) -> str | None:
    """ai-toolkit's name of diffusers' weight as an address; None for the VAE's."""
    for front, to in {**ENCODERS[name], "unet_": "unet."}.items():
        if key.startswith(front):
            return to + key.removeprefix(front)
    assert key.startswith("vae_")
    return None


def stable(folder: Path, name: str) -> tuple[Base, dict[str, str]]:
    """A base of one of ai-toolkit's lists (all matrices 8 x 8), and its addresses by weight."""
    maps = keymap(folder, f"aitoolkit__stable_diffusion_{name}")
    pairs = {key: address(name, here) for key, here in maps["ldm_diffusers_keymap"].items()}
    shapes: dict[str, list[int]] = {key: _square(key) for key in pairs}
    for key, how in maps["ldm_diffusers_operator_map"].items():
        shapes[key] = [24, 8] if key.endswith("weight") else [24]
        pairs |= {f"{key}#{i}": address(name, part) for i, part in enumerate(how["cat"])}
    others = folder / "keymaps" / f"aitoolkit__stable_diffusion_{name}_unmatched.json"
    if others.exists():
        left = json.loads(others.read_text())["ldm"]
        shapes |= {key: [8, 8] if "text_projection" in key else [2] for key in left}
    there = base(shapes)
    return there, {key: at for key, at in pairs.items() if at is not None}


def _square(key: str) -> list[int]:
    is_vector = key.endswith(("bias", "norm.weight", "norm1.weight")) or ".ln_" in key
    return [8] if is_vector else [8, 8]


@pytest.mark.parametrize("name", ENCODERS)
def test_every_weight_of_stable_diffusion_is_reached_from_diffusers(name, field_data):
    there, pairs = stable(field_data, name)
    deltas: dict[str, Kind] = {
        at: Dense(unread("diff", *(_square(key) if "#" not in key else [8, 8][: _rank(at)])))
        for key, at in pairs.items()
    }
    assert len(deltas) == len(pairs)
    plan = bind([Adapter(deltas, "diffusers", "diffusers")], there)
    require_all(plan)
    assert plan.targets.keys() == {key.partition("#")[0] for key in pairs}
    rest = [key for key in there.tensors if key not in plan.targets]
    ours = [key for key in rest if not key.startswith("first_stage_model.")]
    if name == "sd2":  # diffusers' has no 24th layer, whose output SD2 does not use
        ours = [key for key in ours if ".resblocks.23." not in key]
    assert [key for key in ours if not key.endswith((*BUFFERS, "text_projection"))] == []


def _rank(at: str) -> int:
    return 1 if at.endswith("bias") else 2


@pytest.mark.parametrize("name", ENCODERS)
def test_every_matrix_of_stable_diffusion_is_reached_from_kohya(name, field_data):
    there, pairs = stable(field_data, name)
    known = ARCHITECTURE.get(name, "sdxl")
    modules_ = {at.removesuffix(".weight") for at in pairs.values() if at.endswith(".weight")}
    skip = ("norm", "ln_", "embedding", "logit_scale")
    matrices = {m for m in modules_ if not any(s in m for s in skip)} | {
        m for m in modules_ if "time_embedding" in m or "add_embedding" in m
    }
    unet = Adapter({f"{m}.weight": pair([8, 8]) for m in matrices}, "kohya", "diffusers")
    original = translate(unet, "original" if BY_NAME[known].kohya == "original" else "diffusers")
    deltas = {
        f"{mangled(key.removesuffix('.weight'), known)}.weight": delta
        for key, delta in original.adapter.deltas.items()
    }
    sizes = {m for m in matrices if there.tensors.keys()}
    assert len(deltas) == len(sizes)
    plan = bind([Adapter(deltas, "kohya", "kohya")], there)
    errors = [p for p in plan.problems if p.severity == "error"]
    assert errors == [], errors[:3]
    assert sum(plan.matched) == len(deltas) - _fused(plan)


def _fused(plan: Plan) -> int:
    """How many deltas became one with two others."""
    return 2 * sum(name.endswith("in_proj_weight") for name in plan.targets)


@pytest.mark.parametrize("file", ["alpha_keys", "base_names"])
def test_the_keys_of_a_real_kohya_lora_find_all_weights(file, field_data):
    there, _ = stable(field_data, "sd1")
    names = keymap(field_data, f"lorainspector__inspector__file__tests__{file}")
    stems = {name.removesuffix(".alpha") for name in names}
    plan = bind([Adapter({f"{s}.weight": pair([8, 8]) for s in stems}, "kohya", "kohya")], there)
    require_all(plan)
    assert plan.matched == (len(stems),) == (264,)


# ------------------------------------------------------------------------------- transformers


def shapes_of(kind: str, **config: object) -> dict[str, list[int]]:
    """The weights of a model of diffusers in its full size, of which no number exists."""
    import diffusers
    import torch

    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def in_both(shapes: Shapes) -> dict[str, Base]:
    """A pipeline's transformer, and the single file of the same weights, as headers."""
    deltas: dict[str, Kind] = {
        f"transformer.{key}": Replace(unread(key, *shape)) for key, shape in shapes.items()
    }
    moved = translate(Adapter(deltas, "test", "diffusers"), "original").adapter
    assert moved.problems == ()
    original = {
        f"model.{key}": list(delta.value.shape)
        for key, delta in moved.deltas.items()
        if isinstance(delta, Replace)
    }
    found = {"diffusers": base(shapes), "single": base(original)}
    bare = {key.removeprefix("model.diffusion_model."): s for key, s in original.items()}
    return {**found, "bare": base(bare)}


def file_of(path: Path, tensors: Shapes) -> Path:
    """An adapter's file of these shapes, its alphas 1 and all else a hole in the disk."""
    rows = [(key, "F32", tuple(shape)) for key, shape in tensors.items()]
    header, offsets = plan_layout(rows, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(offsets[key] + 4 * math.prod(shape) for key, _, shape in rows))
        for key in (key for key in tensors if key.endswith(".alpha")):
            file.seek(offsets[key])
            file.write(struct.pack("<f", 1))
    return path


@pytest.fixture(scope="module")
def flux() -> dict[str, Base]:
    one = shapes_of(
        "FluxTransformer2DModel", guidance_embeds=True, num_layers=1, num_single_layers=1
    )
    whole = {}
    for key, shape in one.items():  # one block is as the others, and 57 take 20 seconds
        count = 38 if key.startswith("single_") else 19 if "_blocks.0." in key else 1
        whole |= {key.replace("_blocks.0.", f"_blocks.{i}."): shape for i in range(count)}
    return in_both(whole)


@pytest.mark.parametrize("layout", ["diffusers", "single", "bare"])
@pytest.mark.parametrize(
    "name",
    [
        "invoke__flux_lora_kohya_format",
        "invoke__flux_lora_diffusers_format",
        "invoke__flux_lora_diffusers_base_model_format",
        "invoke__flux_lora_xlabs_format",
    ],
)
def test_real_loras_of_flux_find_all_weights(name, layout, flux, field_data, tmp_path):
    adapter = formats.read(file_of(tmp_path / "lora.safetensors", keymap(field_data, name)))
    plan = bind([adapter], flux[layout])
    errors = [p for p in plan.problems if p.severity == "error"]
    assert errors == [], errors[:3]
    assert plan.matched == plan.total
    assert sum(plan.matched) > 10


# ------------------------------------------------------------------------------- the original lists


def spelt(there: Base, known: str, spelling: str) -> tuple[Adapter, set[str]]:
    """An adapter of every matrix of a base in its original names, and the names of these."""
    found = addresses_of(there.tensors)
    assert found is not None
    table, deltas, touched = modules(known), dict[str, Kind](), set[str]()
    for at, name in found.here.items():
        shape = there.tensors[name].shape
        if not name.endswith(".weight") or len(shape) != 2:
            continue
        touched.add(name)
        hit = asked(table.of_whole, at)
        assert hit is not None, name
        rule, parameter = hit
        count = len(rule.parts)
        sizes = SIZES[rule.rule.sizes](shape[0], shape[1], count) if count > 1 else [shape[0]]
        for part, rows in zip(rule.parts, sizes, strict=True):
            deltas[part + parameter] = pair([rows, shape[1]])
    adapter = Adapter(deltas, "test", "diffusers")
    if spelling == "kohya":
        own = BY_NAME[known].kohya
        moved = translate(
            adapter, own, shapes={k: tuple(v.shape) for k, v in there.tensors.items()}
        )
        stems = {
            mangled(k.removesuffix(".weight"), known): d for k, d in moved.adapter.deltas.items()
        }
        adapter = Adapter({f"{k}.weight": d for k, d in stems.items()}, "kohya", "kohya")
    elif spelling == "apart":
        front = {k.replace("transformer.", "diffusion_model.", 1): d for k, d in deltas.items()}
        adapter = Adapter(front, "comfy", "original")
    return adapter, touched


ORIGINAL = [
    ("invoke__z_image_transformer_comfyui_keys", "z-image"),
    ("invoke__anima_comfyui_keys", "anima"),
    ("invoke__flux2_transformer_bfl_keys", "flux2"),
]
SPELLINGS = [(f, k, s) for f, k in ORIGINAL for s in ("diffusers", "kohya")]
SPELLINGS += [("invoke__z_image_transformer_comfyui_keys", "z-image", "apart")]


@pytest.mark.parametrize("front", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("file", "known", "spelling"), SPELLINGS)
def test_every_matrix_of_a_comfyui_file_is_reached(file, known, spelling, front, field_data):
    listed = keymap(field_data, file)
    there = base(
        {front + key.removeprefix("net." if front else ""): s for key, s in listed.items()}
    )
    adapter, touched = spelt(there, known, spelling)
    plan = bind([adapter], there)
    errors = [p for p in plan.problems if p.severity == "error"]
    assert errors == [], errors[:3]
    assert plan.targets.keys() == touched
    assert len(touched) > 8


@pytest.mark.parametrize("apart", [False, True])
def test_a_z_image_file_with_q_k_and_v_apart_is_a_base_too(apart, field_data):
    """Both ways to store them, and adapters of both."""
    listed = keymap(field_data, "invoke__z_image_transformer_comfyui_keys")
    fused, other = base(listed), dict[str, list[int]]()
    for key, shape in listed.items():
        hit = asked(modules("z-image").of_whole, f"diffusion_model.{key}")
        if hit is None:
            continue
        parts, parameter = hit[0].parts, hit[1]
        for part in parts:
            stem = part.removeprefix("transformer.")
            other[stem + parameter] = [shape[0] // len(parts), *shape[1:]]
    there = base(other) if apart else fused
    for spelling in ("diffusers", "apart", "kohya"):
        adapter, _ = spelt(fused, "z-image", spelling)
        plan = bind([adapter], there)
        errors = [p for p in plan.problems if p.severity == "error"]
        assert errors == [], (spelling, errors[:3])
    whole = {f"diffusion_model.{k}": pair(s) for k, s in listed.items() if k.endswith("qkv.weight")}
    plan = bind([Adapter(whole, "comfy", "original")], there)
    assert [p for p in plan.problems if p.severity == "error"] == []
    assert len(plan.targets) == len(whole) * (3 if apart else 1)


# These samples were made up with square matrices; in the model the text is 1024 wide, and the
# modulation goes through 256.
SQUARE = {
    "peft": {"cross_attn.k_proj", "cross_attn.v_proj"},
    "kohya": {"cross_attn.k_proj", "cross_attn.v_proj", "adaln_modulation_cross_attn.1"},
}


@pytest.mark.parametrize("name", SQUARE)
def test_real_names_of_anima_find_all_weights(name, field_data, tmp_path):
    there = base(keymap(field_data, "invoke__anima_comfyui_keys"))
    tensors = keymap(field_data, f"invoke__anima_lora_{name}_format")
    adapter = formats.read(file_of(tmp_path / "lora.safetensors", tensors))
    plan = bind([adapter], there)
    errors = [p for p in plan.problems if p.severity == "error"]
    assert {p.code for p in errors} == {"shape_mismatch"}
    assert {p.target for p in errors} == {f"net.blocks.0.{m}.weight" for m in SQUARE[name]}
    assert plan.matched[0] == plan.total[0] - len(errors)


# Lists of what no adapter of these formats is made for: VAEs, a vision encoder, other networks.
STRANGERS = [
    "invoke__flux2_vae_bfl_keys",
    "invoke__qwen_vl_encoder_comfyui_keys",
    "invoke__xlabs_flux_ip_adapter_state_dict__xlabs_flux_ip_adapter_sd_shapes",
]


@pytest.mark.parametrize("file", STRANGERS)
def test_lists_of_other_networks_are_no_base_of_adapters(file, field_data):
    assert addresses_of(keymap(field_data, file)) is None


def test_a_controlnet_has_the_blocks_of_its_model(field_data):
    """A Flux adapter of its attention fits the blocks that a ControlNet of Flux copied."""
    file = "invoke__instantx_flux_controlnet_state_dict__instantx_sd_shapes"
    there = base(keymap(field_data, file))
    keys = [k for k in there.tensors if k.endswith("attn.to_q.weight")]
    deltas = {f"transformer.{k}": pair(there.tensors[k].shape) for k in keys}
    plan = bind([Adapter(deltas, "diffusers", "diffusers")], there)
    assert plan.matched == (len(keys),) == (15,)


def test_a_real_lora_of_qwen_image_finds_all_weights(field_data, tmp_path):
    shapes = shapes_of("QwenImageTransformer2DModel", num_layers=2)
    tensors = keymap(field_data, "invoke__qwen_image_lora_diffusers_format")
    adapter = formats.read(file_of(tmp_path / "lora.safetensors", tensors))
    for there in (base(shapes), base({f"model.diffusion_model.{k}": s for k, s in shapes.items()})):
        plan = bind([adapter], there)
        assert [p for p in plan.problems if p.severity == "error"] == []
        assert plan.matched == plan.total


@pytest.mark.parametrize(
    ("file", "known"), [("diffsynth__wan_video_dit", "wan"), ("diffsynth__krea2_dit", "krea2")]
)
def test_lists_of_wan_and_krea2_without_shapes(file, known, field_data):
    pairs = keymap(field_data, file)
    if known == "krea2":  # that list goes the other way, and calls both norms norm_k
        pairs = {v: k for k, v in pairs.items() if "qnorm" not in k}
    matrices = {k: v for k, v in pairs.items() if k.endswith(".weight") and "norm" not in k}
    there = base({v: [8, 8] for v in pairs.values()})
    deltas = {f"transformer.{k}": pair([8, 8]) for k in matrices}
    plan = bind([Adapter(deltas, "diffusers", "diffusers")], there)
    assert [p for p in plan.problems if p.severity == "error"] == []
    assert plan.targets.keys() == set(matrices.values())


def test_the_lists_of_diffsynth_for_sdxl(field_data):
    lists = {
        "": ("unet.", "diffsynth__sdxl"),
        "model.": ("text_encoder.", "diffsynth__sdxl_text_encoder"),
        "model. ": ("text_encoder_2.", "diffsynth__sdxl_text_encoder_2"),
    }
    pairs = {
        to + here.removeprefix(front.strip()): original
        for front, (to, file) in lists.items()
        for here, original in keymap(field_data, file).items()
    }
    there = base({name: [8] if name.endswith("bias") else [8, 8] for name in pairs.values()})
    deltas: dict[str, Kind] = {
        at: Dense(unread("diff", *there.tensors[name].shape)) for at, name in pairs.items()
    }
    plan = bind([Adapter(deltas, "diffusers", "diffusers")], there)
    require_all(plan)
    assert plan.targets.keys() == there.tensors.keys()


@pytest.mark.parametrize("layout", ["diffusers", "single", "bare"])
def test_the_modules_of_a_real_lokr_of_flux(layout, flux, field_data):
    keys = keymap(field_data, "invoke__flux_lokr_bfl_format")
    stems = dict.fromkeys(key.rpartition(".")[0] for key in keys)
    shapes = {name: leaf.shape for name, leaf in flux["bare"].tensors.items()}
    deltas = {f"{s}.weight": pair(shapes[f"{s.partition('.')[2]}.weight"]) for s in stems}
    plan = bind([Adapter(deltas, "kohya", "original")], flux[layout])
    require_all(plan)
    assert len(plan.targets) == len(stems) + (5 if layout == "diffusers" else 0)
