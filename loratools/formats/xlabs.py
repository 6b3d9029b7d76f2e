"""XLabs' Flux adapters: double_blocks.N.processor.qkv_lora1.down.weight and its siblings."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools import views
from loratools.adapter import Adapter, Leaf
from loratools.containers.bundle import Bundle
from loratools.errors import error, shown
from loratools.formats.image_keys import Grouped, Part, keys_of, said_copies, say_rest, weights_of
from loratools.formats.reading import Reading, unwrapped

_KEY = re.compile(
    r"(?:diffusion_model\.)?(double|single)_blocks\.([0-9]{1,4})\.processor\."
    r"(qkv_lora[12]?|proj_lora[12]?)\.(down|up)\.weight"
)
# What each is in diffusers' names: several are the thirds of B's rows.
MODULES = {
    ("double", "qkv_lora1"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("double", "qkv_lora2"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("double", "proj_lora1"): ("attn.to_out.0",),
    ("double", "proj_lora2"): ("attn.to_add_out",),
    ("single", "qkv_lora"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("single", "proj_lora"): ("proj_out",),
}
WORDS = ("down", "up")
BLOCKS = {
    "double": "transformer.transformer_blocks",
    "single": "transformer.single_transformer_blocks",
}


def module_of(key: str) -> tuple[str, str, tuple[str, ...]] | None:
    """A key's module, half ("down", "up") and the modules of diffusers that it stands for."""
    found = _KEY.fullmatch(unwrapped(key))
    parts = MODULES.get((found[1], found[3])) if found else None
    if found is None or parts is None:
        return None
    stem = f"{BLOCKS[found[1]]}.{int(found[2])}"
    module = f"{found[1]}_blocks.{int(found[2])}.processor.{found[3]}"
    return module, found[4], tuple(f"{stem}.{part}" for part in parts)


def detect(bundle: Bundle) -> bool:
    """Whether a file has a key of XLabs'."""
    if weights_of(bundle) is None:
        return False
    return any(module_of(key) for key in keys_of(bundle)[0])


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """An adapter in diffusers' names: B of a fused q, k, v is cut in thirds, A serves all three."""
    file = weights_of(bundle)
    leaves, metadata = keys_of(bundle)
    if file is None:
        raise error("unknown_type", f"{shown(bundle.name)} holds no tensors of XLabs'")
    reading = Reading(bundle.name, assume)
    say_rest(reading, bundle, file)
    found = Grouped()
    parts: dict[str, tuple[str, ...]] = {}
    for key, leaf in leaves.items():
        named = module_of(key)
        if named is None:
            reading.unexplained([key])
            continue
        module, half, parts[module] = named
        found.add(Part(module, half), leaf)
    for module, halves in found.modules.items():
        _thirds(reading, module, parts[module], halves.get("down"), halves.get("up"))
    said_copies(reading, found)
    return reading.adapter(bundle, file, format="xlabs", vocabulary="diffusers", metadata=metadata)


def _thirds(
    reading: Reading, module: str, parts: tuple[str, ...], down: Leaf | None, up: Leaf | None
) -> None:
    alpha = reading.number("alpha")
    if len(parts) == 1 or down is None or up is None or not up.shape:
        # One module, or half a pair, which is said by the file's own name.
        name = parts[0] if len(parts) == 1 and down is not None and up is not None else module
        reading.pair(name, down, up, alpha=alpha, words=WORDS)
        return
    rows, rest = divmod(up.shape[0], len(parts))
    if rest:
        message = f"{shown(module)}: up is {up.shape}, expected the rows of q, k and v"
        reading.problem("shape_factors", message, module)
        return
    for i, part in enumerate(parts):
        reading.pair(part, down, views.part(up, i * rows, (i + 1) * rows), alpha=alpha, words=WORDS)
