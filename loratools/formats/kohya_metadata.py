"""kohya's metadata: what it claims, where the tensors contradict it, and a true set to write."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

from loratools.adapter import Adapter, Kind, Leaf, LowRank, Renormed
from loratools.containers import hashes, strict_json
from loratools.errors import LoratoolsError, shown
from loratools.formats.kohya_keys import LYCORIS_PARTS, OFT, part_of
from loratools.kinds.ranks import rank_of, scaling_of

CLAIMS = (
    "ss_sd_model_name", "ss_base_model_version", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "modelspec.architecture", "modelspec.trigger_phrase",
)  # fmt: skip

_OF_THE_BASE = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")

# What speaks of the file itself, and is made anew with each.
OF_THE_FILE = (
    "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "sshs_model_hash",
    "sshs_legacy_hash", "ss_base_model_version", "modelspec.sai_model_spec",
    "modelspec.architecture", "modelspec.implementation", "modelspec.hash_sha256",
    "modelspec.merged_from", "lora_adapter_metadata", "format",
)  # fmt: skip

# Generations: how their versions and architectures begin, in kohya's words and in others'.
_SAID = {
    "sd1": ("sd_v1", "sd_1", "sd1", "stable-diffusion-v1"),
    "sd2": ("sd_v2", "sd_2", "sd2", "stable-diffusion-v2"),
    "sdxl": ("sdxl", "sd_xl", "stable-diffusion-xl"),
    "sd3": ("sd3", "sd_3", "stable-diffusion-3"),
    "flux": ("flux1", "flux-1", "flux.1", "flux_1"),
}
_U_NETS = ("sd1", "sd2", "sdxl")

# What is written where keys and shapes alone show the generation: version, architecture,
# implementation (kohya-ss/sd-scripts:library/sai_model_spec.py). SD2 has two versions that look
# alike.
_WRITTEN = {
    "sd1": ("sd_v1", "stable-diffusion-v1/lora", "diffusers"),
    "sdxl": (
        "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora",
        "https://github.com/Stability-AI/generative-models",
    ),
    "flux": ("flux1", "flux-1/lora", "https://github.com/black-forest-labs/flux"),
}  # fmt: skip

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def claims(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata says of the base and the network, for Adapter.config."""
    said: dict[str, Any] = {key: metadata[key] for key in CLAIMS if _says(metadata.get(key))}
    base = metadata.get("ss_sd_model_name", "")
    if _HUB_ID.fullmatch(base) and not base.lower().endswith(_WEIGHTS):
        said["base_model_name_or_path"] = base
    return said


def split_said(metadata: Mapping[str, str]) -> bool:
    """Whether the training arguments name split_qkv."""
    raw = metadata.get("ss_network_args", "")
    try:
        args = strict_json.loads(raw.encode(), "ss_network_args") if raw else None
    except (LoratoolsError, UnicodeEncodeError):
        return False
    return isinstance(args, dict) and str(args.get("split_qkv")).lower() == "true"


def contradictions(
    metadata: Mapping[str, str], deltas: Mapping[str, Kind]
) -> list[tuple[str, str]]:
    """Where the metadata and the tensors say different things: a code and what differs."""
    found = []
    ranks = {pair.rank for pair in map(_pair, deltas.values()) if pair is not None}
    said = metadata.get("ss_network_dim", "")
    if ranks and said.isdecimal() and len(said) < 10:
        dim = int(said)  # split_qkv stores three or four ranks in one
        if not any(rank == dim or (dim and rank in (3 * dim, 4 * dim)) for rank in ranks):
            listed = ", ".join(str(r) for r in sorted(ranks)[:5])
            text = f"the metadata says rank {dim}, the tensors have {listed}; the tensors count"
            found.append(("config_conflict", text))
    for key in ("ss_base_model_version", "modelspec.architecture"):
        text = metadata.get(key, "")
        if not _is_true(text, deltas):
            seen = generation(deltas) or "another architecture"
            text = f"{key} says {shown(text)}, the names of the tensors say {seen}; they count"
            found.append(("config_conflict", text))
    if hashes.same(metadata.get("sshs_model_hash", ""), hashes.EMPTY):
        text = "the stored sshs_model_hash is the hash of nothing: it was made of an empty file"
        found.append(("config_conflict", text))
    return found


def generation(deltas: Mapping[str, Kind]) -> str | None:
    """The generation of base that keys and shapes show beyond doubt, as in _SAID."""
    family = _family(deltas)
    if family == "sd3":
        return "sd3"
    for key, delta in deltas.items():
        pair = _pair(delta)
        if pair is None:
            continue
        width = pair.a.shape[1]
        if family == "unet" and key.endswith(("_attn2_to_k.weight", "_attn2_to_v.weight")):
            # Cross-attention is as wide as what it attends to: the text encoders' output.
            return {768: "sd1", 1024: "sd2", 2048: "sdxl"}.get(width)
        # HunyuanVideo and Chroma have double blocks too, and no `mod_lin` in them.
        if family == "flux" and key.endswith(("_mod_lin.weight", "_modulation_lin.weight")):
            return "flux" if width == 3072 else None
    return None


def fresh(
    adapter: Adapter, deltas: Mapping[str, Kind], tensors: Mapping[str, Leaf]
) -> dict[str, str]:
    """The metadata of a file with these tensors: what is true of it, and of how it was trained.

    `ss_network_*`, the base, hashes and `modelspec.*` are made anew; what else the adapter's own
    file said (training, trigger words) is kept, for it is still true; a merge has none of it.
    """
    # A merge keeps in its config what all its parents say of their base.
    agreed = {k: str(v) for k, v in adapter.config.items() if k in _OF_THE_BASE}
    old = agreed | dict(adapter.metadata)
    made = {k: v for k, v in old.items() if k not in OF_THE_FILE}
    made["format"] = "pt"
    base = adapter.config.get("base_model_name_or_path")
    if (
        not _says(made.get("ss_sd_model_name"))
        and isinstance(base, str)
        and _HUB_ID.fullmatch(base)
    ):
        made["ss_sd_model_name"] = base
    said = old.get("ss_network_module", "")
    made["ss_network_module"] = _network(deltas, tensors, said)
    ranked = [(rank, d) for d in deltas.values() if (rank := rank_of(d)) is not None]
    if ranked:
        made["ss_network_dim"] = _one({str(rank) for rank, _ in ranked})
        made["ss_network_alpha"] = _one({f"{scaling_of(d) * rank:.8g}" for rank, d in ranked})
    elif made["ss_network_module"] == said:  # nothing here has a rank: nothing else can tell
        made |= {k: old[k] for k in ("ss_network_dim", "ss_network_alpha") if k in old}
    own = ("ss_network_module", "ss_network_dim")
    if "ss_network_args" in old and all(made.get(k) == old.get(k) for k in own):
        made["ss_network_args"] = old["ss_network_args"]
    elif made["ss_network_module"] == "lycoris.kohya" and (algo := _algo(tensors)):
        made["ss_network_args"] = json.dumps({"algo": algo})
    _base(made, old, deltas)
    made.setdefault("modelspec.title", _title(adapter.name) or "adapter")
    parents = adapter.config.get("merged_from")
    if isinstance(parents, (list, tuple)) and parents:
        made["modelspec.merged_from"] = ", ".join(_title(str(p)) for p in parents)
    elif "modelspec.merged_from" in old:
        made["modelspec.merged_from"] = old["modelspec.merged_from"]
    model, legacy = hashes.kohya(tensors, made)
    return made | {
        "sshs_model_hash": model,
        "sshs_legacy_hash": legacy,
        "modelspec.hash_sha256": f"0x{model}",
    }


def _title(name: str) -> str:
    """A file's name without its folder, which is nobody else's business, and without suffix."""
    last = PureWindowsPath(name).name
    return last[: last.rfind(".")] if last.lower().endswith(_WEIGHTS) else last


def _base(made: dict[str, str], old: Mapping[str, str], deltas: Mapping[str, Kind]) -> None:
    """Version and architecture: as they were where the tensors agree, else what these show."""
    shown_by = _WRITTEN.get(generation(deltas) or "", ("", "", ""))
    keys = ("ss_base_model_version", "modelspec.architecture", "modelspec.implementation")
    true = _is_true(old.get("modelspec.architecture", ""), deltas)
    for key, text in zip(keys, shown_by, strict=True):
        kept = old.get(key, "")
        kept = kept if _is_true(kept, deltas) and (true or not key.startswith("model")) else ""
        if _says(kept) or text:
            made[key] = kept if _says(kept) else text
    if "modelspec.architecture" in made:
        made["modelspec.sai_model_spec"] = "1.0.1"


def _network(deltas: Mapping[str, Kind], tensors: Mapping[str, Leaf], old: str) -> str:
    found = [part for part in map(part_of, tensors) if part is not None]
    if any(key.startswith(OFT) for key in tensors):
        return old if old.startswith("networks.oft") else "networks.oft"
    parts, others = {part.part for part in found}, any(part.method for part in found)
    if parts & LYCORIS_PARTS or others or any(key.startswith("lycoris_") for key in tensors):
        return "lycoris.kohya"
    usual = {"flux": "networks.lora_flux", "sd3": "networks.lora_sd3", "unet": "networks.lora"}
    kept = old if old.startswith("networks.lora") else "networks.lora"
    return usual.get(_family(deltas), kept)


_ALGORITHMS = {
    "LoHa": "loha", "LoKr": "lokr", "GLoRA": "glora", "(IA)3": "ia3", "OFT": "diag-oft",
    "T-LoRA": "tlora", "": "lora",
}  # fmt: skip


def _algo(tensors: Mapping[str, Leaf]) -> str | None:
    """LyCORIS's name of the one method that these tensors are of."""
    found = {
        _ALGORITHMS.get(part.method, "")
        for part in map(part_of, tensors)
        if part is not None and (part.method or part.part in ("down", "up"))
    }
    if any(k.endswith(".oft_blocks") and len(leaf.shape) == 4 for k, leaf in tensors.items()):
        found = {"boft" if name == "diag-oft" else name for name in found}
    return next(iter(found)) if len(found) == 1 else None


def _family(deltas: Mapping[str, Kind]) -> str:
    """Whose names these are: "unet", "flux" (double and single blocks), "sd3", "other", or ""."""
    found = ""
    for key in deltas:
        name = key.removeprefix("lora_unet_").removeprefix("lora_prior_unet_")
        if name.startswith(_BLOCKS):
            return "unet"
        if name.startswith(("double_blocks_", "single_blocks_")):
            return "flux"
        if name.startswith("joint_blocks_"):
            return "sd3"
        if name != key or key.startswith("lora_transformer_"):
            found = "other"
    return found


_BLOCKS = (
    "down_blocks_", "mid_block_", "up_blocks_", "input_blocks_", "middle_block_", "output_blocks_",
)  # fmt: skip


def _is_true(text: str, deltas: Mapping[str, Kind]) -> bool:
    """Whether a version or an architecture can be that of these tensors; unknown ones can."""
    lower = text.lower()
    said = next((g for g, starts in _SAID.items() if lower.startswith(starts)), None)
    family, seen = _family(deltas), generation(deltas)
    if said is None or not family:
        return True
    if said in _U_NETS:
        return family == "unet" and seen in (said, None)
    return family in (said, "other")


def _pair(delta: Kind) -> LowRank | None:
    inner = delta.delta if isinstance(delta, Renormed) else delta
    return inner if isinstance(inner, LowRank) else None


def _one(values: set[str]) -> str:
    """The one value, or the word that kohya's own merge writes where there are several."""
    return next(iter(values)) if len(values) == 1 else "Dynamic"


def _says(text: str | None) -> bool:
    return text is not None and text not in ("", "None")
