"""The adapter formats, one file each, and the two calls that choose among them: `read`, `write`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from loratools.adapter import Adapter
from loratools.containers.bundle import Bundle, local
from loratools.errors import error, shown
from loratools.formats.looking import looks_like as looks_like

if TYPE_CHECKING:
    FORMATS: tuple[ModuleType, ...]
    WRITERS: dict[str, ModuleType]

# In the order in which they are asked: first those whose files say what they are, then those that
# know their files by keys, from the telling ones to the plain ones.
NAMES = tuple(
    "onnx_adapter gguf nemo olive mlx litgpt torchtune adapterhub loralib "
    "xlabs bfl comfy cloneofsimo diffusers kohya peft raw".split()
)
WRITTEN = "peft kohya diffusers gguf mlx torchtune litgpt adapterhub onnx_adapter".split()
# What may lie beside the weights in a folder as PEFT writes it, and which formats that may be: the
# others need files of other names, and importing them all takes longer than reading it.
BESIDE = (".json", ".jinja", ".md", ".model", ".png", ".txt")
IN_PEFT_FOLDERS = ("torchtune", "loralib", "kohya", "peft", "raw")
# Other names of formats: of programs that read them, and of what stands in the same container.
ALIASES = {
    "lycoris": "kohya",
    "comfyui": "kohya",
    "a1111": "kohya",
    "civitai": "kohya",
    "olive": "onnx_adapter",
}


def __getattr__(name: str) -> Any:
    if name == "FORMATS":
        return tuple(named(each) for each in NAMES)
    if name == "WRITERS":
        return {each: named(each) for each in WRITTEN}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def named(name: str) -> ModuleType:
    """The module of a format, imported when it is first asked for."""
    return import_module(f"{__name__}.{name}")


def detected(bundle: Bundle) -> ModuleType | None:
    """The first format that a bundle is of; None where it is no adapter."""
    weights = [name for name in bundle.names if not name.endswith(BESIDE)]
    is_peft = weights == ["adapter_model.safetensors"] and "adapter_config.json" in bundle
    asked = IN_PEFT_FOLDERS if is_peft and bundle.chosen is None else NAMES
    return next((form for form in map(named, asked) if form.detect(bundle)), None)


def read(source: str | Path | Bundle, *, assume: Mapping[str, str] | None = None) -> Adapter:
    """The adapter at a path or in a bundle, from headers alone.

    Raises NotFoundError, MalformedError, FitError (`unknown_type`: what it looks like instead, or
    the list of adapters in the folder).
    """
    bundle = source if isinstance(source, Bundle) else local(source)
    form = detected(bundle)
    if form is not None:
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
    return [one for one in inner if detected(one) is not None]
