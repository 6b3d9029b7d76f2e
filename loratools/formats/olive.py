"""Olive's convert-adapters: PEFT's names, factors for x·A·B, the scaling in B; .npz and others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from loratools.adapter import Adapter, Leaf
from loratools.containers.bundle import Bundle
from loratools.errors import LoratoolsError, error, shown
from loratools.formats.reading import Reading, contents, unwrapped
from loratools.views import turned

SUFFIXES = (".npz", ".safetensors", ".pt")
A, B = ".lora_A.weight", ".lora_B.weight"
QUANTISED = (".quant.weight", ".quant.scale", ".quant.zero_point")
PREFIX = "base_model.model."

Pair = tuple[Leaf | None, Leaf | None]


def detect(bundle: Bundle) -> bool:
    """Whether a file has PEFT's keys over factors that can only be (in, rank) and (rank, out).

    In an .npz, which PEFT does not write, it is enough that they can. Square weights alone in
    another container do not tell Olive from PEFT: such a file is not taken.
    """
    name = _file(bundle)
    if name is None:
        return False
    try:
        tensors = contents(bundle, name)[0]
    except LoratoolsError:
        return False
    if any(_is_quantised(key) for key in tensors):
        return True
    pairs = [(a, b) for a, b in _pairs(tensors).values() if a is not None and b is not None]
    if not pairs or not all(_fits(a, b) for a, b in pairs):
        return False
    tall = name.endswith(".npz") and all(a.shape[1] <= a.shape[0] for a, _ in pairs)
    return tall or any(a.shape[0] != b.shape[1] for a, b in pairs)


def _file(bundle: Bundle) -> str | None:
    """The file named, or the only file of a folder, where it is an .npz."""
    if bundle.chosen is not None:
        return bundle.chosen if PurePath(bundle.chosen).suffix in SUFFIXES else None
    found = [name for name in bundle.names if name.endswith(SUFFIXES)]
    return found[0] if len(found) == 1 and found[0].endswith(".npz") else None


def _is_quantised(key: str) -> bool:
    return key.endswith(QUANTISED) and (".lora_A." in key or ".lora_B." in key)


def _pairs(tensors: Mapping[str, Leaf]) -> dict[str, Pair]:
    """A and B by module, wrappers and PEFT's prefix taken off."""
    found: dict[str, Pair] = {}
    for key, leaf in tensors.items():
        if not key.endswith((A, B)):
            continue
        module = unwrapped(key.removesuffix(A).removesuffix(B).removeprefix(PREFIX))
        a, b = found.get(module, (None, None))
        if (a if key.endswith(A) else b) is not None:
            raise error("duplicate", f"{shown(key)}: {shown(module)} has a second factor")
        found[module] = (leaf, b) if key.endswith(A) else (a, leaf)
    return found


def _fits(a: Leaf, b: Leaf) -> bool:
    return len(a.shape) == 2 == len(b.shape) and a.shape[1] == b.shape[0] > 0


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """Olive's adapter from its headers; what is neither A nor B becomes a problem by name."""
    name = _file(bundle)
    if name is None:
        raise error("not_found", f"{shown(bundle.name)} holds no adapter of Olive's")
    tensors, _, extras = contents(bundle, name)
    reading = Reading(bundle.name, assume)
    pairs = _pairs(tensors)
    for module, (a, b) in pairs.items():
        for leaf in (a, b):
            if leaf is not None and len(leaf.shape) != 2:
                message = f"{shown(leaf.name)} is {leaf.shape}, expected (in, rank), (rank, out)"
                reading.problem("shape_factors", message, module)
                break
        else:
            reading.pair(
                module,
                None if a is None else turned(a),
                None if b is None else turned(b),
                scaling=1.0,
            )
    for key in tensors:
        if _is_quantised(key):
            message = f"{shown(key)} is of 4 bits; convert the adapter without --quantize_int4"
            reading.problem("unknown_type", message, shown(key))
        elif not key.endswith((A, B)):
            reading.unexplained([key])
    reading.extras(extras, name)
    return Adapter(
        deltas=reading.deltas,
        format="olive",
        vocabulary="hf",
        name=bundle.name,
        folder=bundle.path,
        files=(name,),
        problems=reading.settle(),
        assumed=dict(assume),
    )
