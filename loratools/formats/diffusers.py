"""diffusers' adapters: pytorch_lora_weights.safetensors in its three eras, and its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools import views
from loratools.adapter import FLOATS, TORCH_NAMES, Adapter, Dense, Leaf, LowRank, Renormed, Replace
from loratools.containers import safetensors
from loratools.containers.bundle import Bundle
from loratools.errors import Problem, error, shown
from loratools.formats.diffusers_settings import METADATA, Settings, expressed, settings_of
from loratools.formats.image_keys import (
    OTHER,
    WEIGHTS,
    Part,
    clip_module,
    grouped,
    is_kohya,
    keys_of,
    part_of,
    said_copies,
    say_rest,
    take,
    weights_of,
    without_twins,
)
from loratools.formats.reading import Reading, unwrapped
from loratools.formats.residual import is_residual, rebase
from loratools.names.patterns import peft_targets

if TYPE_CHECKING:
    import torch

SUFFIX = ".safetensors"
VOCABULARY = "diffusers"

COMPONENTS = (
    "unet transformer transformer_2 transformer_ref prior text_encoder text_encoder_2 "
    "text_encoder_3 connectors text_conditioner controlnet"
).split()
# Files without components: what their first piece says. Others' names begin otherwise.
UNET = ("down_blocks", "mid_block", "up_blocks")
TRANSFORMER = ("transformer_blocks", "single_transformer_blocks")
# Pieces that follow `transformer.` in language models' names.
LANGUAGE = frozenset(
    "h layer wte wpe word_embeddings word_embeddings_layernorm ln_f norm_f encoder embedding "
    "output_layer rotary_pos_emb embd_layer".split()
)
LANGUAGE_WITHIN = frozenset(
    "norm_attn_norm Wqkv qkv_proj up_proj down_proj router proj_1 proj_2".split()
)
# Blocks in the names of a model's own repository, which HunyuanVideo's files put there.
NATIVE = ("double_blocks", "single_blocks")
# What a control LoRA sets, and diffusers' Flux loader reads as values in full.
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
# The processor era's names within a text encoder's attention.
TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def detect(bundle: Bundle) -> bool:
    """Whether a file is diffusers' own: by its components, its old module names, its metadata."""
    if weights_of(bundle) is None:
        return False
    leaves, metadata = keys_of(bundle)
    if METADATA in metadata:
        return any(_is_factor(key) for key in leaves)
    native = any(key.startswith("diffusion_model.") for key in leaves)
    # Beside ComfyUI's names, text encoders alone make no file of diffusers.
    ours = (key for key in leaves if not native or key.startswith(("unet.", "transformer.")))
    return any(_is_ours(key) for key in ours)


def _is_factor(key: str) -> bool:
    part = part_of(key)
    return part is not None and (part.part[0] in "AB" or part.part.startswith(OTHER))


def _is_ours(key: str) -> bool:
    if not _is_factor(key):
        return False
    part = part_of(key)
    assert part is not None
    first, *pieces = part.module.split(".")
    match first:
        case "transformer" if pieces:
            return pieces[0] not in LANGUAGE and not LANGUAGE_WITHIN & set(pieces)
        case "connectors" | "text_conditioner" | "controlnet":
            return False  # too common a word by itself
        case "blocks":
            return any(p in ("attn1", "attn2") for p in pieces)
        case _:
            return first in COMPONENTS or first in UNET or first in TRANSFORMER


# ------------------------------------------------------------------------------- reading


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """An adapter from its headers; contradictions become `problems`, malformed files raise."""
    file = weights_of(bundle)
    leaves, metadata = keys_of(bundle)
    if file is None or not leaves:
        raise error("unknown_type", f"{shown(bundle.name)} holds no tensors of diffusers'")
    reading = Reading(bundle.name, assume)
    say_rest(reading, bundle, file)
    settings = settings_of(metadata, reading)
    bare = _bare_component(leaves)
    found = grouped(reading, leaves.values(), lambda part: _module(part, bare))
    _mend(found.modules)
    native = _native(found.modules)
    for module, parts in found.modules.items():
        component, _, inner = module.partition(".")
        said = settings.get(component) or settings.get("")
        name = f"diffusion_model.{inner}" if native and component == "transformer" else module
        settle = None if said is None else said.settler(reading, module, inner)
        take(reading, name, parts, settle=settle)
        if said is not None:
            _tuning(reading, module, parts, said)
    _rest(reading, found.rest, found.modules, bare, settings)
    said_copies(reading, found)
    for component, said in settings.items():
        within = [m.partition(".")[2] for m in found.modules if not component or m.startswith(
            f"{component}.")]  # fmt: skip
        said.judge(reading, within)
        if is_residual(said.fields):
            front = "diffusion_model" if native and component == "transformer" else component
            rebase(said.fields, reading, (), f"{front}." if front else "")
    problems = reading.settle()
    config: dict[str, Any] = {}
    for component, said in settings.items():
        front = f"{component}." if component else ""
        config |= {front + field: value for field, value in said.fields.items()}
        if isinstance(base := said.fields.get("base_model_name_or_path"), str):
            config.setdefault("base_model_name_or_path", base)
    return Adapter(
        deltas=reading.deltas,
        format="diffusers",
        vocabulary="original" if native else "diffusers",
        config=config,
        metadata=metadata,
        name=bundle.name,
        folder=bundle.path,
        files=(file,),
        problems=problems,
        assumed=dict(assume),
    )


def _tuning(reading: Reading, module: str, parts: Mapping[str, Leaf], said: Settings) -> None:
    """What the metadata says of DoRA against the magnitudes that are there."""
    use, has = said.fields.get("use_dora"), "magnitude" in parts or "dora_scale" in parts
    if use is True and not has:
        message = f"{shown(module)} has no magnitude, the metadata says use_dora"
        reading.problem("missing", message, module)
    elif use is False and has:
        message = f"{shown(module)} has a DoRA magnitude, the metadata says use_dora=false"
        reading.problem("config_conflict", message, module)


def _bare_component(leaves: Mapping[str, Leaf]) -> str:
    """The component that keys without one belong to."""
    for key in leaves:
        part = part_of(key)
        if part is not None and part.module.split(".")[0] in (*UNET, "time_embedding", "conv_in"):
            return "unet"
    return "transformer"


def _module(part: Part, bare: str) -> str | None:
    """The address of a part: its component in front, the processor era's names made today's."""
    if is_kohya(part):
        return clip_module(part)
    pieces = part.module.split(".")
    first = pieces[0]
    if first == "diffusion_model":
        return None
    if first not in COMPONENTS:
        pieces.insert(0, "text_encoder" if first == "text_model" else bare)
    old = "processor" in pieces or (pieces[-1] in TEXT and pieces[-2:-1] == ["self_attn"])
    pieces = [p for p in pieces if p != "processor"]
    if old and pieces[0].startswith("text_encoder"):
        pieces[-1] = TEXT.get(pieces[-1], pieces[-1])
    elif old and pieces[-1] == "to_out":
        pieces.append("0")
    return ".".join(pieces) if len(pieces) > 1 else None


def _mend(modules: dict[str, dict[str, Leaf]]) -> None:
    """Magnitudes that stand at `to_out` belong to `to_out.0` (the processor era)."""
    for module in [m for m in modules if m.endswith(".to_out")]:
        inner = modules.get(f"{module}.0")
        if inner is not None and set(modules[module]) == {"magnitude"}:
            inner.setdefault("magnitude", modules.pop(module)["magnitude"])


def _native(modules: Mapping[str, Any]) -> bool:
    inner = [m.split(".") for m in modules if m.startswith("transformer.")]
    return any(p[1] in NATIVE for p in inner) and not any(p[1] in TRANSFORMER for p in inner)


def _rest(
    reading: Reading,
    rest: dict[str, Leaf],
    modules: Mapping[str, Mapping[str, Leaf]],
    bare: str,
    settings: Mapping[str, Settings],
) -> None:
    """Tensors outside the grammar: copies in kohya's names, values in full, the unexplained."""
    for key, leaf in without_twins(reading, rest, modules).items():
        pieces = unwrapped(key).replace(".base_layer.", ".").split(".")
        component = pieces.pop(0) if pieces[0] in COMPONENTS else bare
        name = ".".join(pieces)
        if leaf.dtype in FLOATS and name.isprintable() and _saved(component, name, settings):
            reading.deltas[f"{component}.{name}"] = Replace(leaf)
        else:
            reading.unexplained([key])


def _saved(component: str, name: str, settings: Mapping[str, Settings]) -> bool:
    """Whether a tensor is a value in full: a control LoRA's norm, or what the metadata names."""
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias") or not module:
        return False
    if component == "transformer" and module.rpartition(".")[2] in NORMS:
        return True
    said = settings.get(component) or settings.get("")
    if said is None:
        return False
    saved = said.fields.get("modules_to_save") or []
    named = [s for s in saved if isinstance(s, str)] if isinstance(saved, list) else []
    biases = said.fields.get("bias") in ("all", "lora_only")
    return peft_targets(named, module) or (leaf == "bias" and biases)


# ------------------------------------------------------------------------------- writing


def lost(adapter: Adapter) -> list[Problem]:
    """What diffusers has no place for, each by name; nothing where the file says it all."""
    tuned = _tuned(adapter)
    return [
        Problem("loss", f"diffusers has no place for {shown(key)}: {why}", "error", adapter.name,
                key)
        for key in adapter.deltas if (why := _why_lost(adapter, key, tuned))
    ]  # fmt: skip


def _tuned(adapter: Adapter) -> set[str]:
    """The components with DoRA."""
    return {
        key.partition(".")[0]
        for key, delta in adapter.deltas.items()
        if isinstance(delta, Renormed) and delta.axis == "out"
    }


def _why_lost(adapter: Adapter, key: str, tuned: set[str]) -> str:
    delta = adapter.deltas[key]
    module, _, leaf = key.rpartition(".")
    component = module.partition(".")[0]
    if component not in COMPONENTS:
        return "its name begins with no component of a pipeline"
    match delta:
        case LowRank() | Renormed(delta=LowRank()) if key in adapter.transposed:
            return "an embedding's update"
        case LowRank() if leaf == "weight":
            return "" if component not in tuned else f"all of {component} is DoRA or nothing is"
        case Renormed(axis="in"):
            return "its magnitudes are by column, diffusers' DoRA is by row"
        case Renormed(delta=LowRank()) if leaf == "weight":
            return ""
        case Dense() if leaf == "bias" and (pair := _pair(adapter, module)) is not None:
            return "" if pair.scaling else "a bias of a pair whose scaling is 0"
        case Replace(rows=None, then=None) if component == "transformer" and leaf == "weight":
            norm = module.rpartition(".")[2] in NORMS
            return "" if norm else "a value in full"
        case _:
            return f"a {type(delta).__name__} on it"


def _pair(adapter: Adapter, module: str) -> LowRank | None:
    found = adapter.deltas.get(f"{module}.weight")
    found = found.delta if isinstance(found, Renormed) else found
    return found if isinstance(found, LowRank) else None


def write(adapter: Adapter, out: Path) -> dict[str, str]:
    """Write the adapter as one file (in a folder, under diffusers' name); sha256 by file name.

    Scalings stand in the metadata where LoraConfig can say them exactly, else they go into B.
    """
    file = out / f"{WEIGHTS}.safetensors" if out.is_dir() else out
    tuned = _tuned(adapter)
    kept = {k: d for k, d in adapter.deltas.items() if not _why_lost(adapter, k, tuned)}
    source = adapter.config if adapter.format == "diffusers" else {}
    tensors: dict[str, Leaf] = {}
    table: dict[str, Any] = {}
    for component in dict.fromkeys(k.partition(".")[0] for k in kept):
        mine = {k: d for k, d in kept.items() if k.startswith(f"{component}.")}
        pairs = {
            k[len(component) + 1 :].rpartition(".")[0]: p
            for k in mine
            if k.endswith(".weight") and (p := _pair(adapter, k.rpartition(".")[0])) is not None
        }
        said, scaled = expressed(component, pairs, source)
        biased = any(isinstance(d, Dense) for d in mine.values())
        if said:
            said["use_dora"] = any(isinstance(d, Renormed) for d in mine.values())
            said["lora_bias"] = biased
            if isinstance(base := adapter.config.get("base_model_name_or_path"), str) and base:
                said["base_model_name_or_path"] = base
            table |= {f"{component}.{field}": value for field, value in said.items()}
        for key, delta in mine.items():
            stem = key.rpartition(".")[0]
            if isinstance(delta, Replace):
                tensors[key] = delta.value
            if isinstance(delta, Renormed):
                tensors[f"{stem}.lora_magnitude_vector"] = _magnitude(delta)
            if isinstance(delta, LowRank | Renormed):
                pair = scaled[stem[len(component) + 1 :]]
                tensors[f"{stem}.lora_A.weight"] = pair.a
                tensors[f"{stem}.lora_B.weight"] = pair.b
                if biased:  # one flag for all of a component: those without get zeros
                    tensors[f"{stem}.lora_B.bias"] = _bias(adapter, stem, pair)
    metadata = {k: v for k, v in adapter.metadata.items() if k != METADATA}
    if table:
        metadata[METADATA] = json.dumps(table, indent=2, sort_keys=True)
    named = {name: views.renamed(leaf, name) for name, leaf in tensors.items()}
    digest = safetensors.write(file, named, {**metadata, "format": "pt"})
    return {file.name: digest}


def _bias(adapter: Adapter, module: str, pair: LowRank) -> Leaf:
    """The bias of B, which PEFT multiplies by its pair's scaling; zeros where there is none."""
    found = adapter.deltas.get(f"{module}.bias")
    if isinstance(found, Dense):
        return views.scaled(found.diff, found.scaling / pair.scaling)

    def zeros() -> torch.Tensor:
        import torch

        return torch.zeros(pair.b.shape[0], dtype=getattr(torch, TORCH_NAMES[pair.b.dtype]))

    return views.later("", pair.b.dtype, pair.b.shape[:1], zeros)


def _magnitude(delta: Renormed) -> Leaf:
    """DoRA's magnitudes in PEFT's shape: (out,), of a convolution (1, out, 1, ...)."""
    pair, leaf = delta.delta, delta.magnitude
    kernel = pair.a.shape[2:] if isinstance(pair, LowRank) else ()
    wanted = (1, leaf.numel, *[1] * len(kernel)) if kernel else (leaf.numel,)
    return leaf if leaf.shape == wanted else views.reshaped(leaf, *wanted)
