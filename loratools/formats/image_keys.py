"""What files of image and video adapters share: keys, and deltas put together from parts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from loratools import views
from loratools.adapter import FLOATS, Dense, Leaf, LowRank, Replace
from loratools.containers.bundle import Bundle
from loratools.errors import LoratoolsError, error, shown
from loratools.formats.lycoris_parts import REFUSED, Said, method_of, take_method
from loratools.formats.reading import Reading, contents, number, twins, unwrapped

if TYPE_CHECKING:
    import torch

WEIGHTS = "pytorch_lora_weights"  # diffusers' own name for a file
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
PEFT = "adapter_config.json"

# The last piece of a key: what stands there for a module.
SINGLE = {
    "alpha": "alpha",
    "magnitude": "magnitude",  # ai-toolkit
    "dora_scale": "dora_scale",
    "diff": "diff",
    "diff_b": "diff_b",
    "diff_m": "diff_m",  # of Wan's parameter `modulation`
    "w_norm": "diff",
    "b_norm": "diff_b",
    "set_weight": "set",
    "reshape_weight": "reshape",
}
FACTORS = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "magnitude"}
HALVES = {"down": "A", "up": "B"}
# Leaves of other methods, by how they begin.
OTHERS = {"lokr_": "LoKr", "hada_": "LoHa", "oft_blocks": "OFT", "rescale": "OFT"}
GLORA = ("a1", "a2", "b1", "b2", "bm")
OTHER = "other "  # how parts of these methods begin
# Parameters that are no module's `weight`; all others are.
BARE = frozenset(
    "scale modulation weight bias gamma scale_shift_table pos_embedding position_embedding "
    "emb_pos cap_pad_token x_pad_token".split()
)
# The fronts of kohya's names, with the component that each means first of all.
KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
}
_CLIP = re.compile(
    r"lora_te([12]?)_text_model_encoder_layers_([0-9]{1,3})_"
    r"(self_attn_(?:q|k|v|out)_proj|mlp_fc[12])"
)


@dataclass(frozen=True, slots=True)
class Part:
    """What one key names: a module, a part of it, and an adapter's name left in the key."""

    module: str
    part: str
    adapter: str = ""


def part_of(key: str) -> Part | None:
    """The part that a key names, in any of the spellings; None where it is none of these."""
    return _known(key) if len(key) < 256 else _part_of(key)


@lru_cache(maxsize=8192)  # several formats ask for every key of a file, and files have the same
def _known(key: str) -> Part | None:
    return _part_of(key)


def _part_of(key: str) -> Part | None:
    pieces = unwrapped(key).split(".")
    if pieces[:2] == ["base_model", "model"] and len(pieces) > 3:
        pieces = pieces[2:]
    last, before = pieces[-1], pieces[:-1]
    if not before:
        return None
    if last in SINGLE:
        return Part(".".join(before), SINGLE[last])
    for i in range(len(pieces) - 1, max(len(pieces) - 4, 0), -1):
        if pieces[i] in FACTORS and len(tail := pieces[i + 1 :]) <= 2:
            leaf = tail.pop() if tail and tail[-1] in ("weight", "bias") else "weight"
            part = FACTORS[pieces[i]] + (".bias" if leaf == "bias" else "")
            return Part(".".join(pieces[:i]), part, ".".join(tail))
    for start, method in OTHERS.items():
        at = -2 if last == "weight" else -1
        if pieces[at].startswith(start):
            return Part(".".join(pieces[:at]), f"other {method} {pieces[at]}")
    if last != "weight" or len(pieces) < 3:
        return None
    *stem, spelling, half = before
    if half in ("lora_down", "lora_up", "lora_mid"):
        return Part(".".join([*stem, spelling]), HALVES.get(half[5:], "mid"))
    if half in GLORA:
        return Part(".".join([*stem, spelling]), f"other GLoRA {half}")
    if half in HALVES and stem:
        if spelling in ("lora", "lora_linear_layer"):
            return Part(".".join(stem), HALVES[half])
        if spelling.endswith("_lora") and spelling != "_lora":
            return Part(".".join([*stem, spelling[:-5]]), HALVES[half])
    return None


# ------------------------------------------------------------------------------- files


def weights_of(bundle: Bundle) -> str | None:
    """The file of a bundle that could be an image adapter: the one named, or the only one."""
    if bundle.chosen is not None:
        named = bundle.chosen
        # One of PEFT's own files beside its config is PEFT's.
        peft = PEFT in bundle and named.startswith("adapter_model.")
        return named if named.endswith(SUFFIXES) and not peft else None
    for suffix in (".safetensors", ".bin"):
        if WEIGHTS + suffix in bundle:
            return WEIGHTS + suffix
    if PEFT in bundle or "config.json" in bundle or "model_index.json" in bundle:
        return None
    files = [n for n in bundle.names if n.endswith(".safetensors")]
    return files[0] if len(files) == 1 else None


def keys_of(bundle: Bundle) -> tuple[dict[str, Leaf], dict[str, str]]:
    """Leaves and metadata of the file that `weights_of` finds; none where it is no state dict."""
    name = weights_of(bundle)
    if name is None:
        return {}, {}
    try:
        return contents(bundle, name)[:2]
    except LoratoolsError:
        if name.endswith(".safetensors") or name.startswith(WEIGHTS):
            raise
        return {}, {}  # some other program's file, for it to judge


def say_rest(reading: Reading, bundle: Bundle, file: str) -> None:
    """Notes about what the file holds beside tensors, and about its twins in other containers."""
    reading.extras(contents(bundle, file)[2], file)
    reading.mention(bundle, file, twins(bundle, file))


# ------------------------------------------------------------------------------- deltas


@dataclass(slots=True)
class Grouped:
    """A file's leaves by module and part; `rest` are those that no spelling explains."""

    modules: dict[str, dict[str, Leaf]] = field(default_factory=dict)
    rest: dict[str, Leaf] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)
    adapters: dict[str, None] = field(default_factory=dict)  # names left in keys, in order

    def add(self, part: Part, leaf: Leaf) -> None:
        """One more leaf; a second one of the same place must be a copy (`duplicate` if not)."""
        parts = self.modules.setdefault(part.module, {})
        there = parts.setdefault(part.part, leaf)
        if there is leaf:
            return
        if not views.same(there, leaf):
            raise error(
                "duplicate",
                f"{shown(there.name)} and {shown(leaf.name)} are the same parameter and differ",
            )
        self.copies.append(leaf.name)


def grouped(
    reading: Reading, tensors: Iterable[Leaf], module_of: Callable[[Part], str | None]
) -> Grouped:
    """The leaves by module; `module_of` gives the address of a part, or None where it has none."""
    found = Grouped()
    parts: list[tuple[Leaf, Part]] = []
    for leaf in tensors:
        part = part_of(leaf.name)
        module = module_of(part) if part is not None else None
        if part is None or module is None or not _is_name(module):
            found.rest[leaf.name] = leaf
            continue
        found.adapters |= {part.adapter: None} if part.adapter else {}
        parts.append((leaf, replace(part, module=module)))
    first = next(iter(found.adapters), "")
    for leaf, part in parts:
        if part.adapter in ("", first):
            found.add(part, leaf)
    if len(found.adapters) > 1:
        listed = ", ".join(shown(name) for name in found.adapters)
        reading.problem("unexplained", f"the file holds {len(found.adapters)} adapters: {listed}")
    return found


def said_copies(reading: Reading, found: Grouped) -> None:
    """The note about tensors that stand twice with the same numbers."""
    if found.copies:
        first = shown(found.copies[0])
        message = f"{len(found.copies)} tensors are copies of others, such as {first}"
        reading.problem("unexplained", message, severity="note")


def _is_name(module: str) -> bool:
    return module.isprintable() and all(module.split("."))


def clip_module(part: Part) -> str | None:
    """The layer of a CLIP text encoder that a mangled name stands for, in diffusers' names."""
    found = _CLIP.fullmatch(part.module)
    if found is None:
        return None
    component = "text_encoder_2" if found[1] == "2" else "text_encoder"
    group, _, layer = found[3].partition("_fc")
    layer = f"mlp.fc{layer}" if layer else f"self_attn.{group.removeprefix('self_attn_')}"
    return f"{component}.text_model.encoder.layers.{int(found[2])}.{layer}"


def is_kohya(part: Part) -> bool:
    """Whether a part is of a module in kohya's mangled names."""
    return "." not in part.module and part.module.startswith(tuple(KOHYA))


def without_twins(
    reading: Reading, rest: Mapping[str, Leaf], modules: Mapping[str, Mapping[str, Leaf]]
) -> dict[str, Leaf]:
    """The leaves that repeat no part in kohya's names; a note about those that do.

    MalformedError (`duplicate`) where one says something else than the part that it repeats.
    """
    mangled: dict[str, list[str]] = {}
    for module in modules:
        mangled.setdefault(module.partition(".")[2].replace(".", "_"), []).append(module)
    left: dict[str, Leaf] = {}
    copies: list[str] = []
    for key, leaf in rest.items():
        part = part_of(key)
        twin = _twin(part, mangled) if part is not None and is_kohya(part) else None
        if part is None or twin is None:
            left[key] = leaf
            continue
        there = modules[twin].get(part.part)
        if there is None or not views.same(there, leaf):
            here = f"{twin} ({part.part})" if there is None else there.name
            message = f"{shown(key)} and {shown(here)} are the same parameter and differ"
            raise error("duplicate", message)
        copies.append(key)
    if copies:
        message = f"{len(copies)} tensors in kohya's names are copies, such as {shown(copies[0])}"
        reading.problem("unexplained", message, severity="note")
    return left


def _twin(part: Part, mangled: Mapping[str, list[str]]) -> str | None:
    """The module that a part in kohya's names repeats."""
    for front, component in KOHYA.items():
        inner = mangled.get(part.module.removeprefix(front), [])
        if part.module.startswith(front):
            wanted = (component, "transformer", "diffusion_model", "text_encoder_2")
            for name in wanted:
                for module in inner:
                    if module.startswith(f"{name}."):
                        return module
    return None


def take(
    reading: Reading,
    module: str,
    given: dict[str, Leaf],
    *,
    settle: Callable[[float | None, int], tuple[float | None, float | None]] | None = None,
) -> None:
    """All parts of one module as deltas; what does not fit becomes a problem.

    `settle` gives scaling and alpha from the stored alpha and the rank, where the file says more.
    """
    parts = dict(given)
    if any(part.startswith(OTHER) for part in parts) and not _other(reading, module, parts):
        return
    stored = parts.pop("alpha", None)
    alpha = None if stored is None else number(stored)
    a, b, mid = parts.pop("A", None), parts.pop("B", None), parts.pop("mid", None)
    scale, bias = parts.pop("dora_scale", None), parts.pop("B.bias", None)
    magnitude = parts.pop("magnitude", None)
    reshape = parts.pop("reshape", None)
    axis = "out"
    if magnitude is None and scale is not None:
        magnitude, axis = scale, "out" if scale.shape[:1] != (1,) or scale.numel == 1 else "in"
    elif scale is not None:
        reading.unexplained([scale.name])
    if a is not None and mid is not None:
        a = whole_down(a, mid)
    scaling, paired = None, None
    if not parts or any(leaf is not None for leaf in (a, b, mid, magnitude, bias)):
        if settle is not None and a is not None and a.shape and a.shape[0]:
            scaling, alpha = settle(alpha, a.shape[0])
        if (said := reading.number("alpha")) is not None:
            if alpha is not None and alpha != said:
                here = f"{shown(module)} has alpha {alpha:g}"
                raise error("usage", f"--assume alpha={said:g}, but {here}")
            alpha = said
        paired = reading.pair(
            module, a, b, alpha=alpha, scaling=scaling, magnitude=magnitude, axis=axis, bias=bias
        )
    elif stored is not None:
        message = f"{shown(stored.name)} has no pair to scale"
        reading.problem("unexplained", message, module, "note")
    if reshape is not None:
        _widened(reading, module, reshape, paired)
    for part, leaf in parts.items():
        _full(reading, module, part, leaf)


def _other(reading: Reading, module: str, parts: dict[str, Leaf]) -> bool:
    """A module of a method other than LoRA, its parts taken out; whether some are left."""
    mine = {p.split()[2]: parts.pop(p) for p in list(parts) if p.startswith(OTHER)}
    mine |= {f"{name}.weight": mine.pop(name) for name in GLORA if name in mine}
    methods = sorted({method_of(name) or REFUSED.get(name, "an unknown method") for name in mine})
    stored, magnitude = parts.pop("alpha", None), parts.pop("dora_scale", None)
    if method_of(next(iter(mine))) and len(methods) == 1 and not {"A", "B"} & parts.keys():
        take_method(
            reading, module, methods[0], mine, magnitude=magnitude, said=Said(),
            alpha=None if stored is None else number(stored),
        )  # fmt: skip
        reading.unexplained([leaf.name for leaf in mine.values()])
    else:
        message = f"{shown(module)} is {', '.join(methods)}, which is not read as a delta"
        reading.problem("unknown_type", message, module)
    return bool(parts)


def _full(reading: Reading, module: str, part: str, leaf: Leaf) -> None:
    """A difference or a value in full: `.diff`, `.diff_b`, `.diff_m`, `.set_weight`."""
    if leaf.dtype not in FLOATS:
        raise error("dtype_unusable", f"{shown(leaf.name)} is {leaf.dtype}, not floats")
    key = {"diff_b": f"{module}.bias", "diff_m": f"{module}.modulation"}.get(part)
    key = key or parameter(module)
    if part != "set" and views.all_zero(leaf):
        message = f"{shown(leaf.name)} is all zeros and changes nothing"
        reading.problem("no_effect", message, key, "note")
    elif key in reading.deltas:
        message = f"{shown(leaf.name)}: {shown(key)} has another update in this file"
        reading.problem("unexplained", message, key)
    elif part == "set":
        reading.deltas[key] = Replace(leaf)
    elif part in ("diff", "diff_b", "diff_m"):
        reading.deltas[key] = Dense(leaf)
    else:
        reading.unexplained([leaf.name])


def parameter(module: str) -> str:
    """The parameter that a difference or a value in full speaks of."""
    last = module.rpartition(".")[2]
    if last in ("query_norm", "key_norm"):
        return f"{module}.scale"
    return module if last in BARE else f"{module}.weight"


def _widened(reading: Reading, module: str, leaf: Leaf, pair: LowRank | None) -> None:
    """`reshape_weight` (out, in): the weight is padded with zeros to it before it is changed."""
    sizes = tuple(int(n) for n in leaf.numbers()) if leaf.numel <= 8 else ()
    if pair is None or sizes != (pair.b.shape[0], *pair.a.shape[1:]):
        has = "no pair" if pair is None else f"a pair of ({pair.b.shape[0]}, {pair.a.shape[1]})"
        message = f"{shown(leaf.name)} says {sizes}, and there is {has}"
        reading.problem("config_conflict", message, module)


def whole_down(down: Leaf, mid: Leaf) -> Leaf:
    """A of a convolution from its two small factors: mid (rank, rank, *kernel) on (rank, in, 1..).

    ΔW[o, i, k] = Σ up[o, m] mid[m, n, k] down[n, i] (LyCORIS:modules/locon.py).
    """
    if len(mid.shape) < 3 or len(down.shape) < 2 or mid.shape[1] != down.shape[0]:
        raise error(
            "shape_factors",
            f"{shown(mid.name)} is {mid.shape}, {shown(down.name)} is {down.shape}",
        )
    shape = (mid.shape[0], math.prod(down.shape[1:]), *mid.shape[2:])

    def make() -> torch.Tensor:
        import torch

        flat = down.tensor().double().flatten(1)  # (rank, in)
        made = torch.einsum("mn...,ni->mi...", mid.tensor().double(), flat)
        return made.float() if dtype == "F32" else made

    dtype = "F64" if "F64" in (down.dtype, mid.dtype) else "F32"
    return views.later(down.name, dtype, shape, make)
