"""LoRA adapters of llama.cpp: one GGUF file with pairs by the base's tensor names and one alpha."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter, Leaf
from loratools.containers.bundle import Bundle
from loratools.containers.gguf import Header, Omitted, is_gguf, read_header, value_of
from loratools.errors import LoratoolsError, error, shown
from loratools.formats.gguf_writing import (
    ALPHA,
    ARCHITECTURE,
    EMBEDDING,
    HUB,
    HUB_ID,
    INVOCATION,
    METADATA,
    METHOD,
    TYPE,
    lost,
    write,
)
from loratools.formats.reading import Reading
from loratools.views import reshaped, turned

__all__ = ["SUFFIX", "VOCABULARY", "detect", "lost", "read", "write"]

SUFFIX: str | None = ".gguf"
VOCABULARY = "gguf"


def detect(bundle: Bundle) -> bool:
    """Whether a bundle is, or a folder holds, a GGUF file that calls itself an adapter."""
    return bool(_adapters(bundle))


def _files(bundle: Bundle) -> list[str]:
    if bundle.chosen is not None:
        return [bundle.chosen] if is_gguf(bundle.open(bundle.chosen)) else []
    return [n for n in bundle.names if n.endswith(".gguf") and _begins(bundle, n)]


def _begins(bundle: Bundle, name: str) -> bool:
    try:
        return is_gguf(bundle.open(name))
    except LoratoolsError:  # a FIFO among the files of a folder is no adapter
        return False


def _adapters(bundle: Bundle) -> list[str]:
    return [n for n in _files(bundle) if value_of(bundle.open(n), TYPE) == "adapter"]


# ------------------------------------------------------------------------------- reading


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """A GGUF adapter from its header; contradictions become `problems`, malformed files raise."""
    names = _adapters(bundle)
    if len(names) > 1:
        listed = "\n".join(f"  {Path(bundle.name) / n}" for n in names)
        raise error("unknown_type", f"{shown(bundle.name)} holds several adapters:\n{listed}")
    header = read_header(bundle.open(names[0]))
    reading = Reading(bundle.name, assume)
    config, metadata = _config(header, reading)
    transposed: set[str] = set()
    method = header.values.get(METHOD)
    if method == "lora":
        _deltas(header, reading, transposed)
    else:
        message = f"{METHOD} is {shown(method)}: its tensors are not read as deltas"
        reading.problem("unknown_type", message)
    return Adapter(
        deltas=reading.deltas,
        format="gguf",
        vocabulary=VOCABULARY,
        config=config,
        metadata=metadata,
        name=bundle.name,
        folder=bundle.path,
        files=(names[0],),
        transposed=frozenset(transposed),
        problems=reading.settle(),
        assumed=dict(assume),
    )


def _config(header: Header, reading: Reading) -> tuple[dict[str, Any], dict[str, str]]:
    """The key-values as a config, the base they name, and the metadata carried in them."""
    values: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for key, value in header.values.items():
        if isinstance(value, Omitted):
            message = f"{shown(key)} {value} is not kept"
            reading.problem("unexplained", message, shown(key), "note")
        elif key.startswith(METADATA) and isinstance(value, str):
            metadata[key.removeprefix(METADATA)] = value
        else:
            values[key] = value
    config: dict[str, Any] = {"gguf": values}
    base = _base_id(values)
    if base is not None:
        config["base_model_name_or_path"] = base
    if not isinstance(values.get(ARCHITECTURE), str):
        message = f"{ARCHITECTURE} is {shown(values.get(ARCHITECTURE))}: llama.cpp wants the base's"
        reading.problem("missing", message, severity="warning")
    tokens = values.get(INVOCATION)
    if tokens:
        config["alora_invocation_tokens"] = tokens
        message = f"{INVOCATION}: it applies only behind its invocation tokens"
        reading.problem("not_foldable", message)
    return config, metadata


def _base_id(values: Mapping[str, Any]) -> str | None:
    url = values.get("general.base_model.0.repo_url")
    if isinstance(url, str) and url.startswith(HUB) and HUB_ID.fullmatch(url[len(HUB) :]):
        return url[len(HUB) :]
    name = values.get("general.base_model.0.name")
    return name if isinstance(name, str) and name else None


def _alpha(header: Header, reading: Reading) -> float | None:
    """The file's one alpha; None where every pair has the scaling 1."""
    said, given = header.values.get(ALPHA), reading.number("alpha")
    if said is not None and (isinstance(said, bool) or not isinstance(said, int | float)):
        raise error("malformed", f"{shown(reading.name)}: {ALPHA} is {shown(said)}, not a number")
    if said is not None and given is not None and said != given:
        raise error("usage", f"--assume alpha={given:g}, but {ALPHA} says {said:g}")
    alpha = given if said is None else float(said)
    if alpha is None:
        message = f"there is no {ALPHA} (llama.cpp then applies the pairs with scaling 1)"
        reading.problem("alpha_missing", message)
    elif alpha == 0:
        message = f"{ALPHA} is 0: llama.cpp applies the pairs with scaling 1, and so it is here"
        reading.problem("scaling_unusual", message, severity="note")
    return alpha or None


def _deltas(header: Header, reading: Reading, transposed: set[str]) -> None:
    """The pairs by module; other tensors become problems or notes, by name."""
    alpha = _alpha(header, reading)
    pairs: dict[str, dict[str, str]] = {}
    for name in header.tensors:
        module, part = part_of(name)
        if part == "norm":
            message = f"{shown(name)}: llama.cpp ignores norms in an adapter, and so it is here"
            reading.problem("unexplained", message, shown(name), "note")
        elif part:
            pairs.setdefault(module, {})[part] = name
        else:
            reading.unexplained([name])
    for module, names in pairs.items():
        a, b = (
            _matrix(header.leaf(names[part])) if part in names else None
            for part in ("lora_a", "lora_b")
        )
        if a is not None and b is not None and max(len(a.shape), len(b.shape)) > 2:
            scaling = 1.0 if alpha is None else None
            words = ("lora_a", "lora_b")
            reading.stack(module, a, b, alpha=alpha, scaling=scaling, words=words)
            continue
        if module == EMBEDDING and a is not None:
            a = turned(a)
            transposed.add(f"{module}.weight")
        scaling = 1.0 if alpha is None else None
        words = ("lora_a", "lora_b")
        reading.pair(module, a, b, alpha=alpha, scaling=scaling, words=words)
    transposed &= set(reading.deltas)


def part_of(name: str) -> tuple[str, str]:
    """The module that a tensor's name is about, and which part of it; no part: unexplained."""
    base, _, part = name.rpartition(".")
    module = base.removesuffix(".weight")
    if part in ("lora_a", "lora_b") and module and module != base:
        return module, part
    return (base, "norm") if name.endswith("_norm.weight") else (name, "")


def _matrix(leaf: Leaf) -> Leaf:
    """The leaf in two dimensions: programs in C++ leave out leading ones, or write them all."""
    shape = list(leaf.shape)
    while len(shape) > 2 and shape[0] == 1:
        del shape[0]
    shape = [1] * (2 - len(shape)) + shape
    return leaf if tuple(shape) == leaf.shape else reshaped(leaf, *shape)
