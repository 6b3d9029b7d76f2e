"""The adapter formats, one file each, and the two calls that choose among them: `read`, `write`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from loratools.adapter import Adapter
from loratools.containers.bundle import Bundle, folders, local
from loratools.containers.looks import what_it_is
from loratools.errors import error, shown
from loratools.formats import peft

FORMATS: tuple[ModuleType, ...] = (peft,)
NAMES = tuple(f.__name__.rpartition(".")[2] for f in FORMATS)


def read(source: str | Path | Bundle, *, assume: Mapping[str, str] | None = None) -> Adapter:
    """The adapter at a path or in a bundle, from headers alone.

    Raises NotFoundError, MalformedError, FitError (`unknown_type`: what it looks like instead, or
    the list of adapters in the folder).
    """
    bundle = source if isinstance(source, Bundle) else local(source)
    for form in FORMATS:
        if form.detect(bundle):
            adapter: Adapter = form.read(bundle, assume=assume or {})
            return adapter
    inner = adapters_in(bundle)
    if len(inner) == 1:
        return read(inner[0], assume=assume)
    if inner:
        listed = "\n".join(f"  {p}" for p in inner)
        raise error("unknown_type", f"{shown(bundle.name)} holds several adapters:\n{listed}")
    raise error("unknown_type", f"{shown(bundle.name)}: {looks_like(bundle)}")


def adapters_in(bundle: Bundle) -> list[Path]:
    """The adapters in direct sub-folders: PEFT's named adapters, a trainer's checkpoint-*."""
    if bundle.path is None or bundle.chosen is not None:
        return []
    found = (p for p in folders(bundle.path) if any(f.detect(local(p)) for f in FORMATS))
    return sorted(found, key=lambda p: (len(p.name), p.name))


def looks_like(bundle: Bundle) -> str:
    """What stands there instead of an adapter, in words."""
    if not bundle.names:
        return "an empty folder"
    if "config.json" in bundle and any(n.endswith((".safetensors", ".bin")) for n in bundle.names):
        return "a base model (config.json and weights), not an adapter"
    if "adapter_config.json" in bundle:
        return "an adapter_config.json without the weights file beside it"
    if bundle.chosen is not None:
        source = bundle.open(bundle.chosen)
        return what_it_is(source.read(0, min(64, source.size))) or "a file of some other sort"
    return f"no adapter among {len(bundle.names)} files"
