"""The key grammar of kohya's and LyCORIS's files: which module a key names, and what of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from loratools.adapter import Leaf
from loratools.errors import error, shown
from loratools.formats.lycoris_parts import PARTS, REFUSED
from loratools.formats.reading import unwrapped

# Longest first where one begins another. `lora_transformer_`: OneTrainer, over diffusers' names;
# `lora_prior_`: Stable Cascade; `lycoris_`: LyCORIS's own wrapper and SimpleTuner.
PREFIXES = (
    "lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_",
    "lora_prior_unet_", "lora_prior_te_", "lora_transformer_", "lycoris_",
)  # fmt: skip

# A component's dotted name in a file that otherwise is kohya's (formats.md §0.1): its prefix here.
COMPONENTS = {
    "unet": "lora_unet_", "diffusion_model": "lora_unet_", "transformer": "lora_transformer_",
    "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_",
    "prior": "lora_prior_unet_",
}  # fmt: skip

# What stands behind the module, and which part of it that is.
LEAVES = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid",
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_A": "down", "lora_B": "up",
    "lora_up.bias": "up_bias", "lora_B.bias": "up_bias",
    "alpha": "alpha", "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude",
    "diff": "diff", "diff_b": "diff_b", "w_norm": "w_norm", "b_norm": "b_norm",
    "set_weight": "set_weight", "reshape_weight": "reshape_weight",
}  # fmt: skip

REFUSED_METHOD = "refused"
# Leaves of the other methods, by the name of the method; some of them only to be refused.
METHODS = {
    **{leaf: method for method, leaves in PARTS.items() for leaf in leaves},
    **dict.fromkeys(REFUSED, REFUSED_METHOD),
}

# Parts that only LyCORIS (and readers of its files) know; kohya's own trainer never writes them.
LYCORIS_PARTS = frozenset({"mid", "magnitude", "diff", "diff_b", "w_norm", "b_norm"})
OFT = "oft_unet_"  # kohya's own OFT (networks/oft.py), of the modules of lora_unet_
BUNDLED = "bundle_emb."  # textual-inversion embeddings in the same file


@dataclass(frozen=True, slots=True)
class Part:
    """What one key names: the module's address and a value of LEAVES, or a method's own leaf."""

    module: str
    part: str
    method: str = ""


@dataclass(slots=True)
class Module:
    """The leaves of one module, before they are put together; `methods` as in METHODS."""

    parts: dict[str, Leaf] = field(default_factory=dict)
    methods: set[str] = field(default_factory=set)
    kohya: bool = False  # under the prefix of kohya's own OFT


@dataclass(slots=True)
class Found:
    """A file's tensors by module; `other` are keys that the grammar does not have."""

    modules: dict[str, Module] = field(default_factory=dict)
    dotted: set[str] = field(default_factory=set)  # modules that stand there under dotted names
    other: list[str] = field(default_factory=list)
    bundled: list[str] = field(default_factory=list)


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether any of these keys is one of kohya's or LyCORIS's."""
    for key in map(unwrapped, keys):
        part = part_of(key) if key.startswith((*PREFIXES, OFT)) else None
        if part is not None and part.part != "weight":
            return True
    return False


def prefix_of(module: str) -> str:
    """The prefix of a mangled name; empty where it has none."""
    return next((p for p in PREFIXES if module.startswith(p)), "")


def part_of(key: str, *, one_encoder: bool = False) -> Part | None:
    """A key in the grammar of specs/formats/kohya.md and lycoris.md; None where it is none.

    `one_encoder`: the file calls its text encoder `lora_te_`, so dotted names mean that one.
    """
    key = unwrapped(key)
    if key.startswith(OFT):
        key = "lora_unet_" + key.removeprefix(OFT)
    pieces = key.split(".")
    if len(pieces) > 3 and pieces[-1] == "weight" and f"{pieces[-3]}.weight" in LEAVES:
        del pieces[-2]  # the name of an adapter, left in by PEFT
    for length in (2, 1):
        leaf = ".".join(pieces[-length:])
        part, method = LEAVES.get(leaf, leaf), METHODS.get(leaf, "")
        if len(pieces) > length and (method or leaf in LEAVES):
            module = _mangled(pieces[:-length], one_encoder)
            return None if module is None else Part(module, part, method)
    return None


def _mangled(pieces: list[str], one_encoder: bool) -> str | None:
    """A module's address: the mangled name, a double underscore behind the prefix made one."""
    if len(pieces) == 1:
        prefix, path = prefix_of(pieces[0]), pieces[0]
    else:
        prefix, path = COMPONENTS.get(pieces[0], ""), "_".join(pieces[1:])
        if one_encoder and pieces[0] == "text_encoder":
            prefix = "lora_te_"
    path = path.removeprefix(prefix).lstrip("_")
    return prefix + path if prefix and path else None


def group(tensors: Mapping[str, Leaf]) -> Found:
    """The tensors of a file by module and part; MalformedError where one stands twice."""
    found = Found()
    one_encoder = any(key.startswith("lora_te_") for key in tensors)
    for key, leaf in tensors.items():
        if key.startswith(BUNDLED):
            found.bundled.append(key)
            continue
        part = part_of(key, one_encoder=one_encoder)
        if part is None:
            found.other.append(key)
            continue
        module = found.modules.setdefault(part.module, Module())
        if part.part in module.parts:
            twice = shown(module.parts[part.part].name)
            raise error("duplicate", f"{shown(key)} and {twice} are the same part of one module")
        module.parts[part.part] = leaf
        module.kohya |= unwrapped(key).startswith(OFT)
        if part.method:
            module.methods.add(part.method)
        if not unwrapped(key).startswith((*PREFIXES, OFT)):
            found.dotted.add(part.module)
    return found
