"""The state dicts of microsoft/LoRA (loralib): X.lora_A and X.lora_B beside other parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from loratools.adapter import FLOATS, Adapter, Dense, Leaf
from loratools.containers.bundle import Bundle
from loratools.errors import error, shown
from loratools.formats.grouped import FUSED, scattered
from loratools.formats.reading import Reading, contents
from loratools.formats.state_dicts import (
    alpha_of,
    ask,
    flag,
    flags,
    is_table,
    keys_of,
    note_rest,
    others_in,
    take_full,
    unwrapped_all,
    weights_in,
)
from loratools.views import later

if TYPE_CHECKING:
    import torch

VOCABULARY = "hf"
PARTS = ("lora_A", "lora_B")
# The same leaves in the files of others: PEFT's, AdapterHub's, minLoRA's, litgpt's.
_OTHERS = re.compile(
    r"^base_model\.|\.lora_E$|\.loras\.|\.parametrizations\.|^transformer\.h\.\d+\.attn\.(qkv|attn)\."
)
_MERGES = (
    "loralib merges a layer when .eval() is called, so the file does not say whether the weight "
    "contains it"
)


def detect(bundle: Bundle) -> bool:
    """Whether a bundle is a state dict of loralib's layers."""
    keys = keys_of(bundle)
    ours = [key for key in keys if key.rpartition(".")[2] in PARTS and "." in key]
    return bool(ours) and not any(_OTHERS.search(key) for key in keys)


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """The adapter in a state dict, from its headers; what only the training script knows is asked.

    Understands `--assume` alpha, enable_lora, conv, embedding, fan_in_fan_out and merged.
    """
    file = weights_in(bundle)
    assert file is not None
    tensors, metadata, extras = contents(bundle, file)
    reading = Reading(bundle.name, assume)
    modules: dict[str, dict[str, Leaf]] = {}
    full: dict[str, Leaf] = {}
    for key, leaf in unwrapped_all(tensors).items():
        module, _, last = key.rpartition(".")
        if last in PARTS:
            modules.setdefault(module, {})[last] = leaf
        elif "lora_" in last:
            reading.unexplained([key])
        else:
            full[key] = leaf
    alpha = alpha_of(reading)
    transposed: set[str] = set()
    for module, leaves in modules.items():
        a, b = leaves.get("lora_A"), leaves.get("lora_B")
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or 0 in b.shape:
            reading.pair(module, a, b)
            continue
        inside = full.get(f"{module}.conv.weight")
        kernel = _kernel(reading, module, None if inside is None else inside.shape, a, b)
        if kernel is not None:
            _convolution(reading, module, a, b, kernel, alpha)
        elif f"{module}.conv.bias" in full and inside is None:
            message = f"{shown(module)} is a convolution of an unknown kernel"
            remedy = f"--assume conv={shown(module)}:3 for a kernel of 3 x 3"
            ask(reading, "missing", message, remedy, module)
        else:
            _linear(reading, module, a, b, alpha)
            if is_table(module, assume):
                transposed.add(f"{module}.weight")
    take_full(reading, {_plain(key, modules): leaf for key, leaf in full.items()}, _MERGES)
    note_rest(reading, extras, file)
    reading.mention(bundle, file, others_in(bundle, file))
    turned = flag(assume, "fan_in_fan_out")
    return Adapter(
        deltas=reading.deltas,
        format="loralib",
        vocabulary=VOCABULARY,
        config={} if turned is None else {"fan_in_fan_out": turned},
        metadata=metadata,
        name=bundle.name,
        folder=bundle.path,
        files=(file,),
        transposed=frozenset(transposed & reading.deltas.keys()),
        problems=reading.settle(),
        assumed=dict(assume),
    )


def _plain(key: str, modules: Mapping[str, object]) -> str:
    """A key as the base has it: a convolution of loralib holds the layer that it replaced."""
    module, _, parameter = key.rpartition(".")
    owner = module.removesuffix(".conv")
    return f"{owner}.{parameter}" if owner != module and owner in modules else key


# ------------------------------------------------------------------------------- layers


def _linear(reading: Reading, module: str, a: Leaf, b: Leaf, alpha: float | None) -> None:
    """A linear layer or an embedding, or a fused projection in groups (MergedLinear)."""
    rank = b.shape[1]
    count, rest = divmod(a.shape[0], rank)
    said = flags(reading.assume, "enable_lora")
    if said is not None and not any(said):
        raise error("usage", "--assume enable_lora has no true in it")
    scaling = None if alpha is None else alpha / rank
    if rest or not count:
        reading.pair(module, a, b)
        return
    if count == 1 and not (said and sum(said) == 1 and module.rpartition(".")[2] in FUSED):
        reading.pair(module, a, b, alpha=alpha)
        return
    slots = said if said is not None and sum(said) == count else None
    if said is not None and slots is None:
        listed = reading.assume["enable_lora"]
        message = f"{shown(module)} has {count} groups, --assume enable_lora={listed} another count"
        reading.problem("config_conflict", message, module)
        return
    if slots is None and count >= 3:
        slots = (True,) * count
    if slots is None:
        ask(
            reading,
            "missing",
            f"{shown(module)} is a fused projection with {count} updates, and the file does not "
            "say to which of its parts they belong",
            "--assume enable_lora=true,false,true (query and value of three)",
            module,
        )
        return
    if b.shape[0] % count:
        message = f"{shown(module)}: {b.shape[0]} rows of lora_B are no {count} equal groups"
        reading.problem("shape_factors", message, module)
        return
    reading.pair(module, a, scattered(b, slots), scaling=scaling)


def _kernel(
    reading: Reading, module: str, inside: tuple[int, ...] | None, a: Leaf, b: Leaf
) -> tuple[int, ...] | None:
    """The shape (out, in/groups, k, k) of a convolution's weight: the file's, or as assumed."""
    if inside is not None:
        return inside
    for entry in reading.assume.get("conv", "").split(","):
        name, _, numbers = entry.strip().partition(":")
        if not name or not fnmatchcase(module, name):
            continue
        pieces = (numbers or "?").split(":")
        if len(pieces) > 2 or not all(p.isascii() and p.isdigit() and p != "0" for p in pieces):
            raise error("usage", f"--assume conv={shown(entry)}: expected NAME:KERNEL[:GROUPS]")
        size, groups = int(pieces[0][:9]), int((pieces[1:] or ["1"])[0][:9])
        return (b.shape[0] * groups // size, a.shape[1] // (size * groups), size, size)
    return None


def _convolution(
    reading: Reading, module: str, a: Leaf, b: Leaf, shape: tuple[int, ...], alpha: float | None
) -> None:
    """ΔW = scaling · (B·A) read as (out, in/groups, k, k): of no low rank as a convolution."""
    size = shape[-1] if len(shape) > 2 else 0
    fits = a.shape[0] == b.shape[1] and math.prod(shape) == b.shape[0] * a.shape[1]
    if not size or a.shape[0] % size or not fits:
        reading.problem(
            "shape_factors",
            f"{shown(module)}: lora_A is {a.shape}, lora_B is {b.shape}; together no update of a "
            f"convolution's {shape}",
            module,
        )
        return
    for leaf in (a, b):
        if leaf.dtype not in FLOATS:
            raise error("dtype_unusable", f"{shown(leaf.name)} is {leaf.dtype}, not floats")

    def product() -> torch.Tensor:
        import torch

        whole = b.tensor().to(torch.float64) @ a.tensor().to(torch.float64)
        return whole.reshape(shape)

    scaling = 1.0 if alpha is None else alpha * size / a.shape[0]
    name = f"{module}.weight"
    reading.deltas[name] = Dense(later(name, "F64", shape, product), scaling)
