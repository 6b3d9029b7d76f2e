"""The adapter formats, one file each, and the two calls that choose among them: `read`, `write`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from loratools.adapter import Adapter
from loratools.containers.bundle import Bundle, local
from loratools.errors import error, shown
from loratools.formats import (
    adapterhub,
    bfl,
    cloneofsimo,
    comfy,
    diffusers,
    gguf,
    kohya,
    litgpt,
    loralib,
    mlx,
    nemo,
    olive,
    onnx_adapter,
    peft,
    raw,
    torchtune,
    xlabs,
)
from loratools.formats.looking import looks_like as looks_like

# In the order in which they are asked: first those whose files say what they are, then those that
# know their files by keys, from the telling ones to the plain ones.
FORMATS: tuple[ModuleType, ...] = (
    onnx_adapter, gguf, nemo, olive, mlx, litgpt, torchtune, adapterhub, loralib,
    xlabs, bfl, comfy, cloneofsimo, diffusers, kohya, peft, raw,
)  # fmt: skip
NAMES = tuple(f.__name__.rpartition(".")[2] for f in FORMATS)
_ORDER = "peft kohya diffusers gguf mlx torchtune litgpt adapterhub onnx_adapter".split()
WRITERS = {name: FORMATS[NAMES.index(name)] for name in _ORDER}
# Other names of formats: of programs that read them, and of what stands in the same container.
ALIASES = {
    "lycoris": "kohya",
    "comfyui": "kohya",
    "a1111": "kohya",
    "civitai": "kohya",
    "olive": "onnx_adapter",
}


def read(source: str | Path | Bundle, *, assume: Mapping[str, str] | None = None) -> Adapter:
    """The adapter at a path or in a bundle, from headers alone.

    Raises NotFoundError, MalformedError, FitError (`unknown_type`: what it looks like instead, or
    the list of adapters in the folder).
    """
    bundle = source if isinstance(source, Bundle) else local(source)
    for form in FORMATS:
        if form.detect(bundle):
            adapter: Adapter = form.read(bundle, assume=assume or {})
            return replace(adapter, origin=bundle.origin) if bundle.origin else adapter
    inner = adapters_in(bundle)
    if len(inner) == 1:
        return read(inner[0], assume=assume)
    if inner:
        listed = "\n".join(f"  {one.name}" for one in inner)
        raise error("unknown_type", f"{shown(bundle.name)} holds several adapters:\n{listed}")
    raise error("unknown_type", f"{shown(bundle.name)}: {looks_like(bundle)}")


def adapters_in(bundle: Bundle) -> list[Bundle]:
    """The adapters in direct sub-folders: PEFT's named adapters, a trainer's checkpoint-*."""
    if bundle.chosen is not None:
        return []
    inner = [bundle.inner(name) for name in sorted(bundle.folders, key=lambda n: (len(n), n))]
    return [one for one in inner if any(f.detect(one) for f in FORMATS)]
