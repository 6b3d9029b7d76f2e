"""Folders of diffusers: the components of a pipeline, and which file of each holds its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from loratools.containers.bundle import Bundle
from loratools.containers.strict_json import loads
from loratools.errors import Problem, error, shown

INDEX = "model_index.json"
# In the order in which transformers and diffusers look for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
# model.fp16.safetensors, and its index as diffusers, transformers and older ones of both name it.
_STEM = r"(?:diffusion_pytorch_model|model|pytorch_model)"
_VARIANT = r"(?P<variant>(?![A-Za-z0-9_-]*-\d{5}-of-)[A-Za-z0-9_-]{1,32})"  # no single shard
_VARIANTS = tuple(
    re.compile(f"{_STEM}{form}", re.ASCII)
    for form in (
        rf"\.{_VARIANT}\.safetensors",
        rf"\.safetensors\.index\.{_VARIANT}\.json",
        rf"\.safetensors\.{_VARIANT}\.index\.json",
        rf"\.{_VARIANT}\.safetensors\.index\.json",
        rf"\.{_VARIANT}\.bin",
        rf"\.bin\.index\.{_VARIANT}\.json",
        rf"\.bin\.{_VARIANT}\.index\.json",
    )
)


def is_pipeline(bundle: Bundle) -> bool:
    """Whether this is a pipeline's folder (or the index in it was named)."""
    return INDEX in bundle and bundle.chosen in (None, INDEX)


def is_index(name: str) -> bool:
    """Whether a file lists the shards of others, with or without a variant in its name."""
    return re.search(r"\.index(\.[A-Za-z0-9_-]{1,32})?\.json$", name) is not None


def weights_in(names: Sequence[str], where: str) -> tuple[str | None, list[str]]:
    """The file (weights or index) that a folder is read from, and the variants left aside.

    A plain file wins; a variant is taken where it is the only one. NotFoundError where several
    are and nothing decides.
    """
    there = set(names)
    found: dict[str, str] = {}
    for form in _VARIANTS:
        for name in sorted(there):
            hit = form.fullmatch(name)
            if hit is not None:
                found.setdefault(hit["variant"], name)
    plain = next((n for n in WEIGHTS if n in there), None)
    if plain is not None or not found:
        return plain, sorted(found)
    if len(found) > 1:
        raise error(
            "not_found",
            f"{shown(where)} holds the variants {', '.join(sorted(found))} and no plain weights; "
            "leave one of them there, or give the plain name to the one that is meant",
        )
    return next(iter(found.values())), []


def components(bundle: Bundle) -> Iterator[tuple[str, Bundle]]:
    """The components of a pipeline that model_index.json names, in its order, as folders.

    Only direct sub-folders that exist are ever named. Raises MalformedError, `hostile`.
    """
    for name, _ in _named(bundle):
        if name in bundle.folders and "." not in name:
            yield name, bundle.inner(name)


def absent(bundle: Bundle) -> list[Problem]:
    """A warning for each component that the index names with a class and no folder holds."""
    return [
        Problem(
            "base_incomplete",
            f"{INDEX} names {shown(name)}, and there is no folder of that name",
            "warning",
            target=name,
        )
        for name, has_class in _named(bundle)
        if has_class and name not in bundle.folders
    ]


def _named(bundle: Bundle) -> list[tuple[str, bool]]:
    """The names in the index, and whether a class stands beside each."""
    what = f"{bundle.name}/{INDEX}"
    table = loads(bundle.read(INDEX, 1_000_000), what)
    if not isinstance(table, dict):
        raise error("malformed", f"{shown(what)} is no object")
    found = []
    for name, said in table.items():
        if name.startswith("_") or not isinstance(said, list):
            continue
        if name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
            raise error("hostile", f"{shown(what)} names a folder outside: {shown(name)}")
        found.append((name, any(part is not None for part in said)))
    return found
