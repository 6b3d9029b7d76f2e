"""The body of our card: short, whole, and nothing in it that a text of others could turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from loratools.hub import loading
from loratools.hub.artefact import Artefact
from loratools.hub.facts import Facts, Parent
from loratools.hub.markdown import block, code, dumped, hub_link, plain, table
from loratools.weights.base import is_hub_id

# What the world calls the kinds of deltas.
KINDS = {
    "LowRank": "LoRA", "Renormed": "DoRA", "Dense": "full differences", "Hadamard": "LoHa",
    "Kronecker": "LoKr", "Scaled": "IA³", "Rotated": "OFT", "Sparse": "sparse", "Replace":
    "replaced weights", "Experts": "LoRA of experts", "Spectral": "Fourier", "Chained": "chained",
}  # fmt: skip
TAGS = {"LowRank": "lora", "Renormed": "dora", "Hadamard": "loha", "Kronecker": "lokr",
        "Scaled": "ia3", "Rotated": "oft", "Experts": "lora"}  # fmt: skip
FILES = 40  # rows of the table of hashes
WORDS = 12  # trigger words
# Of a recipe: what says how, without what only `loratools.json` needs.
LEFT_OUT = ("fingerprint", "shards", "files", "header", "digest")


def body(artefact: Artefact, facts: Facts, data: Mapping[str, Any], repo: str) -> str:
    """The card's text below its metadata."""
    name = repo.rpartition("/")[2]
    if repo == loading.PLACEHOLDER:
        name = artefact.path.resolve().name
    base = next((p for p in facts.parents if p.role == "base"), None)
    parts = [
        f"# {plain(name)}",
        _opening(artefact, facts, base),
        *_loading(artefact, facts, base, repo),
        *_words(facts),
        *_parents(facts),
        *_made(artefact, facts),
        *_pictures(artefact),
        *_results(data),
        *_files(artefact, repo),
    ]
    return "\n\n".join(parts) + "\n"


def _opening(artefact: Artefact, facts: Facts, base: Parent | None) -> str:
    """One sentence that says what it is."""
    of = f" for {_named(base)}" if base else ""
    adapters = [p for p in facts.parents if p.role == "adapter"]
    match artefact.kind:
        case "adapter":
            sort = " + ".join(KINDS.get(k, k) for k in list(facts.kinds)[:3])
            sort = f"{plain(sort)} adapter" if sort else "adapter"
            said = f"{'An' if sort[0] in 'aeiouAEIOU' else 'A'} {sort}{of}"
            if len(adapters) > 1:
                said += f", merged from {len(adapters)} adapters"
        case "onnx":
            exact = f", with weights of {facts.bits} bits" if facts.bits in (4, 8) else ""
            said = f"{_named(base) if base else 'A model'} as an ONNX graph{exact}"
        case _ if adapters:
            count = "an adapter" if len(adapters) == 1 else f"{len(adapters)} adapters"
            said = f"{_named(base) if base else 'A model'} with {count} folded into its weights"
        case _:
            said = "A model" + (f" made from {_named(base)}" if base else "")
    by = f", made with loratools {plain(facts.versions['loratools'])}" if facts.versions else ""
    return f"{said}{by}."


def _named(parent: Parent) -> str:
    if parent.id and is_hub_id(parent.id):
        return hub_link(parent.id)
    return code(parent.name)


def _loading(artefact: Artefact, facts: Facts, base: Parent | None, repo: str) -> list[str]:
    lines = loading.snippet(artefact, facts, base.id if base else None, repo)
    return ["## How to load it", *([lines.before] if lines.before else []),
            block(lines.text, lines.language)]  # fmt: skip


def _words(facts: Facts) -> list[str]:
    if not facts.trigger_words:
        return []
    words = ", ".join(code(w) for w in facts.trigger_words[:WORDS])
    return [f"Trigger words: {words}"]


def _parents(facts: Facts) -> list[str]:
    if not facts.parents:
        return []
    rows = [
        (
            p.role,
            _named(p),
            code(p.revision[:12] if len(p.revision) == 40 else p.revision, cell=True)
            if p.revision
            else "",
            plain(p.license or ""),
            plain(_number(p.weight)),
        )
        for p in facts.parents
    ]
    return ["## Made from", table(("", "what", "revision", "license", "weight"), rows)]


def _number(value: object) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _made(artefact: Artefact, facts: Facts) -> list[str]:
    """Figures of what it is and how it was made, and the recipe itself."""
    rows: list[tuple[str, str]] = []
    if facts.kinds:
        kinds = ", ".join(f"{KINDS.get(k, k)} ({n})" for k, n in facts.kinds.items())
        rows.append(("kinds" if len(facts.kinds) > 1 else "kind", plain(kinds)))
    if facts.ranks:
        ranks = ", ".join(str(r) for r in sorted(facts.ranks))
        rows.append(("rank" if len(facts.ranks) == 1 else "ranks", ranks))
    if facts.targets:
        rows.append(("target weights", f"{facts.targets:,}"))
    if facts.parameters:
        rows.append(("parameters", f"{facts.parameters:,}"))
    if facts.dtypes:
        rows.append(("stored as", plain(", ".join(facts.dtypes))))
    if artefact.weights:
        rows.append(("size", _human(sum(f.size for f in artefact.weights))))
    if facts.format and artefact.kind == "adapter":
        rows.append(("format", plain(facts.format)))
    if facts.bits in (4, 8):
        rows.append(("quantised to", f"{facts.bits} bits"))
    if isinstance(facts.recipe.get("method"), str):
        rows.append(("method", plain(facts.recipe["method"])))
    if facts.truncation_error is not None:
        rows.append(("truncation error", f"{facts.truncation_error:.2%} of the update's norm"))
    if facts.update_kept is not None:
        kept, least = f"{facts.update_kept:.2%}", facts.least_kept
        if least is not None and f"{least:.2%}" != kept:
            kept += f" on average over target weights, {least:.2%} at least"
        rows.append(("update kept", kept))
    lines = "\n".join(f"- {name}: {value}" for name, value in rows)
    told = ["## What it is", lines] if rows else []
    recipe = _recipe(facts.recipe)
    if recipe:
        told += ["The recipe, in full in `loratools.json`:" if artefact.receipt else "The recipe:",
                 block(dumped(recipe), "yaml")]  # fmt: skip
    return told


def _human(nbytes: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    units = ("bytes", "kB", "MB", "GB")
    step = next((n for n in range(3) if nbytes < 999.5 * 1000**n), 3)
    return f"{nbytes / 1000**step:.3g} {units[step]}"


def _recipe(value: Any) -> Any:
    """A recipe without what is empty and without fingerprints; paths by their last part."""
    if isinstance(value, Mapping):
        kept = {str(k): _recipe(v) for k, v in value.items() if k not in LEFT_OUT}
        if kept.get("id"):
            kept.pop("source", None)
        return {k: v for k, v in kept.items() if v not in (None, [], {}, "", False)}
    if isinstance(value, list | tuple):
        return [_recipe(v) for v in value]
    if isinstance(value, str) and "/" in value and not is_hub_id(value):
        return PurePosixPath(value).name
    return value


def _pictures(artefact: Artefact) -> list[str]:
    if not artefact.pictures:
        return []
    lines = [
        f"![{plain(PurePosixPath(artefact.local_name(p)).stem.replace('_', ' '))}]"
        f"({quote(artefact.local_name(p))})"
        for p in artefact.pictures
    ]
    return ["## Pictures", *lines]


def _results(data: Mapping[str, Any]) -> list[str]:
    rows: list[tuple[str, str, str]] = []
    for entry in data.get("model-index") or []:
        for result in entry.get("results", []):
            for metric in result.get("metrics", []):
                value = metric.get("value")
                rows.append(
                    (
                        plain(result.get("dataset", {}).get("name", "")),
                        plain(metric.get("name") or metric.get("type", "")),
                        plain(_number(value)),
                    )
                )
    return ["## Results", table(("data set", "metric", "value"), rows)] if rows else []


def _files(artefact: Artefact, repo: str) -> list[str]:
    """The hashes of the weights, and how they are checked against the receipt."""
    weights = artefact.weights
    if not weights:
        return []
    rows = [(code(artefact.local(f), cell=True), code(f.sha256(), cell=True))
            for f in weights[:FILES]]  # fmt: skip
    said = ["## Files", table(("weights", "sha256"), rows)]
    if len(weights) > FILES:
        said.append(f"{len(weights) - FILES} more are listed in `loratools.json`.")
    if artefact.receipt is not None:
        said.append(
            "`loratools.json` is the receipt: what this was made from, how, and the hash of every "
            "file."
        )
        said.append(block(f"loratools verify {repo}", "bash"))
    return said


def tags_of(kinds: Sequence[str]) -> list[str]:
    """The Hub's tags of kinds of deltas."""
    return list(dict.fromkeys(TAGS[k] for k in kinds if k in TAGS))
