"""`merge --recipe RECEIPT`: an output made again, from inputs of the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools import receipt
from loratools.commands.replayed import Proof, Sources
from loratools.errors import error, shown

# What a recipe says of a merge, as `merge` itself calls it.
SAID = ("to", "method", "rank", "energy", "dtype", "only", "skip", "allow", "tokenizer")


def recipe_arguments(
    path: str | Path, adapters: Sequence[str | Path], base: str | Path | None
) -> dict[str, Any]:
    """The arguments of the merge that a receipt describes.

    Inputs are looked for among those given, beside the output, in the working folder, and
    accepted only by fingerprint. Raises NotFoundError for what is nowhere, StorageError
    `input_changed` for a given one that is another.
    """
    found = receipt.read(path)
    if found is None:
        raise error("not_found", f"{shown(path)}: no receipt (loratools.json) there")
    recipe = found.get("recipe")
    if not isinstance(recipe, Mapping):
        raise error("malformed", f"{shown(found.path)} has no recipe")
    proof = Proof(found, found.folder)
    sources = Sources(proof, base, adapters, ())
    over = sources.base() if isinstance(recipe.get("base"), Mapping) else None
    loaded = sources.adapters()
    if loaded is None or (over is None and "base" in recipe):
        raise error("not_found", "; ".join(proof.notes))
    entries = proof.part("recipe", "adapters", kind=list)
    ties = recipe.get("ties")
    model = sources.reference() if over is not None and over.graph is not None else None
    return {
        **{key: recipe[key] for key in SAID if recipe.get(key)},
        "adapters": [a.name for a in loaded],
        "base": None if over is None else over.name,
        "reference": None if model is None else model.name,
        "weights": [e["weight"] for e in entries],
        "tied": ties == "tied",
        "untie": ties == "untied",
        "assume": [
            f"{n}:{k}={v}"
            for n, e in enumerate(entries, 1)
            for k, v in (e.get("assumed") or {}).items()
        ],
    }
