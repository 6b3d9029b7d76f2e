"""kohya's and LyCORIS's files: one file of mangled module names, read by most image programs."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from loratools.adapter import (
    DTYPE_BITS,
    FLOATS,
    Adapter,
    Chained,
    Dense,
    Kind,
    Kronecker,
    Leaf,
    LowRank,
    Renormed,
    Replace,
)
from loratools.containers.bundle import Bundle
from loratools.errors import LoratoolsError, error, shown
from loratools.formats.kohya_keys import (
    LYCORIS_PARTS,
    REFUSED_METHOD,
    Found,
    Module,
    group,
    is_kohya,
)
from loratools.formats.kohya_metadata import claims, contradictions, split_said
from loratools.formats.kohya_writing import lost as lost
from loratools.formats.kohya_writing import write as write
from loratools.formats.lycoris_parts import (
    RANK_STABLE,
    REFUSED,
    Said,
    said_by,
    take_method,
)
from loratools.formats.lycoris_shapes import axis_of, glora_age
from loratools.formats.reading import Reading, contents, number, twins
from loratools.views import later, reshaped, widest

if TYPE_CHECKING:
    import torch

SUFFIX = ".safetensors"
VOCABULARY = "kohya"

SAFETENSORS = (".safetensors", ".sft")
PICKLES = (".pt", ".ckpt", ".pth", ".bin")
SPLIT = "kohya_split_qkv"  # --assume kohya_split_qkv=fix


# ------------------------------------------------------------------------------- reading


def detect(bundle: Bundle) -> bool:
    """Whether a file, or the one weights file of a folder, has kohya's or LyCORIS's keys."""
    name = _file(bundle)
    if name is None:
        return False
    try:
        return is_kohya(contents(bundle, name)[0])
    except LoratoolsError as cause:
        if bundle.chosen is None or cause.code not in ("hostile", "truncated"):
            return False
        raise


def _file(bundle: Bundle) -> str | None:
    """The file to read: the one named, or the only one of its sort in a folder."""
    if bundle.chosen is not None:
        return bundle.chosen if bundle.chosen.lower().endswith((*SAFETENSORS, *PICKLES)) else None
    for suffixes in (SAFETENSORS, PICKLES):
        there = [n for n in bundle.names if n.lower().endswith(suffixes)]
        if there:
            return there[0] if len(there) == 1 else None
    return None


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """The adapter of a kohya or LyCORIS file, from its header and its alphas."""
    name = _file(bundle)
    if name is None:
        raise error("not_found", f"{shown(bundle.name)} holds no single weights file")
    tensors, metadata, extras = contents(bundle, name)
    reading = Reading(bundle.name, assume)
    reading.extras(extras, name)
    reading.mention(bundle, name, twins(bundle, name))
    found = group(tensors)
    _set_copies_aside(reading, found)
    lycoris = _is_lycoris(found, metadata)
    padded: dict[str, list[int]] = {}
    split: list[str] = []
    said = said_by(metadata, kohya=False, age=_age(found))
    for module, there in found.modules.items():
        if there.methods:
            _method(reading, module, there, said)
        if there.parts:
            _module(reading, module, there.parts, padded)
            split += _split_qkv(reading, module)
    _say_ranks(reading, said)
    reading.unexplained(found.other)
    if found.bundled:
        listed = ", ".join(sorted({shown(k.split(".")[1]) for k in found.bundled}))
        message = f"textual-inversion embeddings lie in the file and are left there: {listed}"
        reading.problem("unexplained", message, severity="note")
    _say_split(reading, split, metadata)
    for code, message in contradictions(metadata, reading.deltas):
        reading.problem(code, message, severity="note")
    config = claims(metadata)
    for key in reading.deltas:
        if not key.isprintable():
            reading.problem("malformed", f'"{shown(key)}" is no name of a module', key)
    if padded:
        config["reshape_weight"] = padded
    return Adapter(
        deltas=reading.deltas,
        format="lycoris" if lycoris else "kohya",
        vocabulary=VOCABULARY,
        config=config,
        metadata=metadata,
        name=bundle.name,
        folder=bundle.path,
        files=(name,),
        problems=reading.settle(),
        assumed=dict(assume),
    )


def _is_lycoris(found: Found, metadata: Mapping[str, str]) -> bool:
    """Whether something stands there that only LyCORIS writes."""
    return metadata.get("ss_network_module", "").startswith("lycoris") or any(
        name.startswith("lycoris_")
        or (module.methods and not module.kohya)
        or LYCORIS_PARTS & set(module.parts)
        for name, module in found.modules.items()
    )


def _set_copies_aside(reading: Reading, found: Found) -> None:
    """Leave out a Flux update's second spelling: diffusers' dotted names beside kohya's own."""
    own = [m for m in found.modules if m.startswith(("lora_unet_double_", "lora_unet_single_"))]
    dotted = [m for m in found.dotted if m.startswith("lora_transformer_")]
    if own and dotted:
        for module in own:
            del found.modules[module]
        message = (
            f"{len(own)} modules of lora_unet_ stand beside {len(dotted)} of transformer: two "
            "spellings of one update; transformer's is read, as diffusers does"
        )
        reading.problem("unexplained", message, severity="warning")


def _age(found: Found) -> str:
    """The one order that GLoRA's factors are in throughout; empty where no shape shows it."""
    ages = set()
    for there in found.modules.values():
        shapes = {n.removesuffix(".weight"): x.shape for n, x in there.parts.items()}
        if {"a1", "a2", "b1", "b2"} <= shapes.keys():
            ages.add(glora_age(shapes))
    ages &= {"old", "new"}
    return ages.pop() if len(ages) == 1 else ""


def _method(reading: Reading, module: str, there: Module, said: Said) -> None:
    """A module's delta by a method other than LoRA; what belongs to it is taken out of its parts.

    What only looks like a method is unexplained, and so is a second one.
    """
    parts = there.parts
    for part in [p for p in parts if p in REFUSED]:
        leaf = parts.pop(part)
        message = f"{shown(leaf.name)}: {REFUSED[part]}"
        reading.problem("unknown_type", message, module)
    there.methods.discard(REFUSED_METHOD)
    if there.methods == {"(IA)3"} and "on_input" not in parts:
        reading.unexplained([parts.pop("weight").name])
        return
    if not there.methods:
        return
    method, *others = sorted(there.methods)
    if others or "down" in parts or "up" in parts:
        names = ", ".join((method, *others, *(["LoRA"] if "down" in parts else [])))
        reading.problem("unexplained", f"{shown(module)} has the parts of {names}", module)
        parts.clear()
        return
    alpha, magnitude = parts.pop("alpha", None), parts.pop("magnitude", None)
    take_method(
        reading, module, method, parts, alpha=None if alpha is None else _alpha(alpha),
        magnitude=magnitude, said=replace(said, kohya=said.kohya or there.kohya),
    )  # fmt: skip


def _say_ranks(reading: Reading, said: Said) -> None:
    """Where rs_lora's scale is not in the file: GLoRA's alpha, and LoKr's of two whole factors."""
    some = any(_is_scaled_apart(delta) for delta in reading.deltas.values())
    if some and said.rank_stable and RANK_STABLE not in reading.assume:
        message = (
            "trained with rs_lora, whose larger scale GLoRA and LoKr of two whole factors do not "
            "store: all readers use the plain one, and so is it read; "
            f"--assume {RANK_STABLE}=fix reads what was trained"
        )
        reading.problem("scaling_unusual", message, severity="note")
    elif not some and RANK_STABLE in reading.assume:
        message = "the file has no GLoRA and no LoKr of two whole factors"
        raise error("usage", f"--assume {RANK_STABLE}: {message}")


def _is_scaled_apart(delta: Kind) -> bool:
    inner = delta.delta if isinstance(delta, Renormed) else delta
    if isinstance(inner, Kronecker):
        return inner.w1 is not None and inner.w2 is not None
    return isinstance(inner, Chained) and "age" in inner.settings


def _module(
    reading: Reading, module: str, parts: dict[str, Leaf], padded: dict[str, list[int]]
) -> None:
    """The deltas of one module."""
    down, up, mid, magnitude = (parts.pop(p, None) for p in ("down", "up", "mid", "magnitude"))
    alpha, up_bias, shape = (parts.pop(p, None) for p in ("alpha", "up_bias", "reshape_weight"))
    if down is not None or up is not None or not parts:
        if mid is not None and down is not None:
            down = _through(reading, module, mid, down)
            if down is None:
                return
        if down is not None and up is not None and len(up.shape) == 2 < len(down.shape):
            up = reshaped(up, *up.shape, *(1 for _ in down.shape[2:]))  # extracted, left flat
        axis = "out" if magnitude is None or up is None else _axis(magnitude, up, down)
        reading.pair(
            module, down, up, alpha=None if alpha is None else _alpha(alpha),
            magnitude=magnitude, axis=axis, bias=up_bias, words=("lora_down", "lora_up"),
        )  # fmt: skip
        magnitude = mid = up_bias = None
    elif alpha is not None:  # LyCORIS's full and norm modules have no scaling
        reading.problem(
            "unexplained", f"{shown(alpha.name)} belongs to no pair", module, severity="note"
        )
    reading.unexplained([x.name for x in (magnitude, mid, up_bias) if x is not None])
    if shape is not None:
        padded[module] = [int(n) for n in shape.numbers()] if shape.numel <= 8 else []
        message = (
            f"{shown(module)}: its weight is padded with zeros to {tuple(padded[module])} before "
            "the update; a base of that shape is needed"
        )
        reading.problem("not_foldable", message, module, "warning")
    for part, parameter in _PLAIN.items():
        leaf = parts.get(part)
        if leaf is None:
            continue
        if leaf.dtype not in FLOATS:
            raise error("dtype_unusable", f"{shown(leaf.name)} is {leaf.dtype}, not floats")
        key = f"{module}.{parameter}"
        there = reading.deltas.get(key)
        if part == "set_weight":
            reading.deltas[key] = Replace(leaf, None, there)
        elif there is not None:
            message = f"{shown(leaf.name)} stands beside another update of {shown(key)}"
            reading.problem("unexplained", message, module)
        else:
            reading.deltas[key] = Dense(leaf)


_PLAIN = {
    "diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias",
    "set_weight": "weight",
}  # fmt: skip


def _axis(magnitude: Leaf, up: Leaf, down: Leaf | None) -> Literal["out", "in"]:
    """Which side the magnitudes are of."""
    width = None if down is None or len(down.shape) < 2 else down.shape[1]
    return axis_of(magnitude, up.shape[0] if up.shape else 1, width)


def _through(reading: Reading, module: str, mid: Leaf, down: Leaf) -> Leaf | None:
    """A of a Tucker module: A[m, i, ...] = Σ_n mid[m, n, ...]·down[n, i], made when opened."""
    rank = down.shape[:1]
    fits = len(mid.shape) > 2 and len(down.shape) > 1 and mid.shape[1:2] == rank
    if not fits or any(n != 1 for n in down.shape[2:]) or 0 in mid.shape:
        message = f"{shown(module)}: lora_mid is {mid.shape}, lora_down is {down.shape}"
        reading.problem("shape_factors", f"{message}; expected (r, r, k...), (r, in, 1...)", module)
        return None
    for leaf in (mid, down):
        if leaf.dtype not in FLOATS:
            raise error("dtype_unusable", f"{shown(leaf.name)} is {leaf.dtype}, not floats")
    wide = "F64" if widest([mid.dtype, down.dtype]) == "F64" else "F32"

    def make() -> torch.Tensor:
        import torch

        middle, inner = mid.tensor().double(), down.tensor().double().reshape(down.shape[:2])
        whole = torch.einsum("mn...,ni->mi...", middle, inner)
        return whole.to(torch.float64 if wide == "F64" else torch.float32)

    return later(down.name, wide, (mid.shape[0], down.shape[1], *mid.shape[2:]), make)


def _alpha(leaf: Leaf) -> float:
    """An alpha of any float dtype; the two of eight bits are unpacked here."""
    if leaf.dtype not in ("F8_E4M3", "F8_E5M2") or leaf.numel != 1:
        return number(leaf)
    byte = leaf.read()[0]
    if leaf.dtype == "F8_E5M2":  # the upper half of an F16
        return float(struct.unpack("<e", bytes([0, byte]))[0])
    if byte & 127 == 127:
        raise error("nonfinite", f"{shown(leaf.name)} is NaN")
    exponent, fraction = byte >> 3 & 15, byte & 7
    size = fraction / 512 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)
    return -size if byte & 128 else size


# --------------------------------------------------------------------------- fused and split


_FUSED = re.compile(
    r"lora_unet_(double_blocks_\d+_(img|txt)_attn_qkv|single_blocks_\d+_linear1"
    r"|joint_blocks_\d+_(x|context)_block_attn_qkv)"
)


def _split_qkv(reading: Reading, module: str) -> list[str]:
    """With `--assume kohya_split_qkv=fix`: give a fused module the scaling it was trained with.

    Its q, k, v (and mlp) were pairs of their own of a rank n times smaller, saved as one with B
    block-diagonal and alpha unchanged (kohya-ss/sd-scripts:networks/lora_flux.py state_dict).
    """
    said = reading.assume.get(SPLIT)
    if said not in (None, "fix"):
        raise error("usage", f"--assume {SPLIT}={shown(said)}: only fix is known")
    delta = reading.deltas.get(f"{module}.weight")
    pair = delta.delta if isinstance(delta, Renormed) else delta
    if said is None or not isinstance(pair, LowRank) or not _FUSED.fullmatch(module):
        return []
    out, width = pair.b.shape[0], pair.a.shape[1]
    sizes = [width] * 3 + [out - 3 * width] if module.endswith("linear1") else [out // 3] * 3
    if min(sizes) <= 0 or sum(sizes) != out or pair.rank % len(sizes):
        return []
    if not _block_diagonal(pair.b, sizes):
        return []
    trained = replace(pair, scaling=pair.scaling * len(sizes))
    whole: Kind = replace(delta, delta=trained) if isinstance(delta, Renormed) else trained
    reading.deltas[f"{module}.weight"] = whole
    return [module]


def _block_diagonal(b: Leaf, sizes: list[int]) -> bool:
    """Whether B (out, rank) is zero outside its blocks: rows as given, columns in equal parts."""
    raw, width = b.read(), DTYPE_BITS[b.dtype] // 8 * b.shape[1]
    part, at = width // len(sizes), 0
    for i, size in enumerate(sizes):
        for row in range(at, at + size):
            line = raw[row * width : (row + 1) * width]
            if any(line[: i * part]) or any(line[(i + 1) * part :]):
                return False
        at += size
    return True


def _say_split(reading: Reading, split: list[str], metadata: Mapping[str, str]) -> None:
    if split:
        message = f"{len(split)} fused modules have 3 or 4 times their stored scaling ({SPLIT}=fix)"
        reading.problem("scaling_unusual", message, severity="note")
    elif SPLIT in reading.assume:
        raise error("usage", f"--assume {SPLIT}=fix: no module has a block-diagonal lora_up")
    elif split_said(metadata):
        message = (
            "trained with split_qkv: all readers apply a third or a quarter of what was trained to "
            f"fused modules, and so is it read; --assume {SPLIT}=fix reads what was trained"
        )
        reading.problem("scaling_unusual", message, severity="note")
