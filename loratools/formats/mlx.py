"""MLX adapters (mlx-lm): adapters.safetensors, or adapters.npz, beside adapter_config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from loratools.adapter import FLOATS, Adapter, Leaf, Replace
from loratools.containers import npy
from loratools.containers.bundle import Bundle
from loratools.containers.strict_json import loads, require
from loratools.errors import LoratoolsError, Problem, error, shown
from loratools.formats.mlx_writing import BASE, CONFIG
from loratools.formats.mlx_writing import lost as lost
from loratools.formats.mlx_writing import write as write
from loratools.formats.reading import Reading, contents
from loratools.views import turned

SUFFIX: str | None = None
VOCABULARY = "hf"

WEIGHTS = ("adapters.safetensors", "adapters.npz")
PARTS = ("lora_a", "lora_b", "m")
FIELDS = ("lora_parameters", "fine_tune_type", "num_layers", "lora_layers")
SORTED = {"lora_parameters": "an object", "fine_tune_type": "text", "use_dora": "true or false"}

_SNAPSHOT = re.compile(r"\d{1,9}_adapters\.(safetensors|npz)")
# Names of embeddings in mlx-lm's models; embed_out is a linear head.
_EMBEDDINGS = frozenset(
    """embed_tokens embed_tokens_per_layer embed embed_in embedding embeddings wte wpe
    word_embeddings tok_embeddings token_embeddings position_embeddings position_embedding_table
    """.split()
)


def detect(bundle: Bundle) -> bool:
    """Whether a bundle is an MLX adapter: by fields of its config, or by keys such as X.lora_a."""
    try:
        weights = _weights(bundle)
        if weights is None:
            return False
        config = _config(bundle)
        if config is not None and "peft_type" not in config and _is_ours(config):
            return bundle.chosen is None or _named(weights)
        keys = contents(bundle, weights)[0] if _readable(bundle, weights) else {}
    except LoratoolsError as refused:
        # A config that cannot be read may still be one of MLX's: `read` says what is wrong.
        return refused.exit == 3 and "adapters.safetensors" in bundle and bundle.chosen is None
    return any(key.endswith((".lora_a", ".lora_b")) for key in keys)


def _is_ours(config: Mapping[str, Any]) -> bool:
    """Whether the fields are mlx-lm's, and the config none of AdapterHub's, PEFT's."""
    return any(f in config for f in FIELDS) and not isinstance(config.get("config"), dict)


def _named(name: str) -> bool:
    return name in WEIGHTS or _SNAPSHOT.fullmatch(name) is not None


def _weights(bundle: Bundle) -> str | None:
    """The file to read: the one named, the last one trained, or the last snapshot of it."""
    if bundle.chosen is not None:
        return bundle.chosen if bundle.chosen.endswith((".safetensors", ".npz")) else None
    for name in WEIGHTS:
        if name in bundle:
            return name
    shots = [name for name in bundle.names if _SNAPSHOT.fullmatch(name)]
    return max(shots, key=lambda name: int(name.partition("_")[0]), default=None)


def _readable(bundle: Bundle, name: str) -> bool:
    """Whether a file is of a sort that can hold an adapter; a torch file by this name is not."""
    return name.endswith(".safetensors") or npy.is_npz(bundle.open(name))


def _config(bundle: Bundle) -> dict[str, Any] | None:
    if CONFIG not in bundle:
        return None
    found = loads(bundle.read(CONFIG, 1_000_000), f"{bundle.name}/{CONFIG}")
    return found if isinstance(found, dict) else None


# ------------------------------------------------------------------------------- reading


def read(bundle: Bundle, *, assume: Mapping[str, str]) -> Adapter:
    """An MLX adapter from its headers; contradictions become `problems`."""
    weights = _weights(bundle)
    if weights is None:
        raise error("not_found", f"{shown(bundle.name)} holds none of {', '.join(WEIGHTS)}")
    tensors, metadata, _ = contents(bundle, weights)
    reading = Reading(bundle.name, assume)
    found = _config(bundle)
    config: dict[str, Any] = {}
    if found is not None and "peft_type" not in found and _is_ours(found):
        config = require(found, SORTED, f"{bundle.name}/{CONFIG}")
    transposed = _assemble(reading, tensors, config)
    reading.mention(bundle, weights, [n for n in WEIGHTS if n in bundle])
    others = [n for n in bundle.names if _SNAPSHOT.fullmatch(n) and n != weights]
    if others:
        listed = ", ".join(shown(n) for n in others[:8]) + (", ..." if len(others) > 8 else "")
        message = f"{listed} lies beside {shown(weights)} and was not read"
        reading.problem("unexplained", message, severity="note")
    if isinstance(config.get("model"), str):
        config = {**config, BASE: config["model"]}
    return Adapter(
        deltas=reading.deltas,
        format="mlx",
        vocabulary=VOCABULARY,
        config=config,
        metadata=metadata,
        name=bundle.name,
        folder=bundle.path,
        files=(weights, CONFIG) if config else (weights,),
        transposed=frozenset(transposed),
        problems=reading.settle(),
        assumed=dict(assume),
    )


def _assemble(reading: Reading, tensors: Mapping[str, Leaf], config: Mapping[str, Any]) -> set[str]:
    """Take in all tensors; the keys whose weight is stored (in, out) are returned."""
    modules: dict[str, dict[str, Leaf]] = {}
    for key, leaf in tensors.items():
        module, _, part = key.rpartition(".")
        if part in ("lora_a", "lora_b") and module:
            modules.setdefault(module, {})[part] = leaf
    plain: dict[str, Leaf] = {}
    for key, leaf in tensors.items():
        module, _, part = key.rpartition(".")
        if part == "m" and module in modules:
            modules[module]["m"] = leaf
        elif part not in ("lora_a", "lora_b") or not module:
            plain[key] = leaf
    scale = _scale(reading, config) if modules else 1.0
    kind = config.get("fine_tune_type") or ("dora" if config.get("use_dora") else "lora")
    if kind == "full" and modules:
        message = "config says fine_tune_type full, the file has factors, which are read"
        reading.problem("config_conflict", message, severity="warning")
    transposed = {
        f"{module}.weight"
        for module, parts in modules.items()
        if _pair(reading, module, parts, config, kind, scale)
    }
    if kind == "full" and not modules:
        for key, leaf in plain.items():
            if leaf.dtype in FLOATS and "." in key:
                reading.deltas[key] = Replace(leaf)
            else:
                reading.unexplained([key])
    else:
        reading.unexplained(list(plain))
    return transposed


def _pair(
    reading: Reading,
    module: str,
    parts: Mapping[str, Leaf],
    config: Mapping[str, Any],
    kind: Any,
    scale: float,
) -> bool:
    """Take in one module's factors, (in, rank) and (rank, out); whether it is an embedding."""
    a, b, m = (parts.get(part) for part in PARTS)
    if a is not None and b is not None and 3 in (len(a.shape), len(b.shape)):
        said, words = _parameters(config).get("rank"), ("lora_a", "lora_b")
        stack = reading.stack(module, a, b, scaling=scale, words=words)
        if stack is not None and said is not None and said != stack.rank:
            message = f"{shown(module)}: config says rank {shown(said)}, lora_a has {stack.rank}"
            reading.problem("config_conflict", message, module)
        if m is not None:
            reading.unexplained([f"{module}.m"])
        return False
    if kind != "dora" and m is not None and config:
        message = f"{shown(module)} has DoRA magnitudes, and the config says {shown(kind)}"
        reading.problem("config_conflict", message, module)
    if kind == "dora" and m is None:
        message = f"{shown(module)} has no magnitudes (m), the config says dora"
        reading.problem("missing", message, module)
    embedding = _is_embedding(module)
    for leaf in (a, b):
        if leaf is not None and len(leaf.shape) != 2:
            message = f"{shown(leaf.name)} is {leaf.shape}, expected (in, rank) or (rank, out)"
            reading.problem("shape_factors", message, module)
            return False
    said = _parameters(config).get("rank")
    taken = reading.pair(
        module,
        None if a is None else turned(a),
        None if b is None else turned(b),
        scaling=scale,
        magnitude=m,
        axis="in" if embedding else "out",
        words=("lora_a", "lora_b"),
    )
    if taken is not None and said is not None and said != taken.rank:
        message = f"{shown(module)}: config says rank {shown(said)}, lora_a has {taken.rank}"
        reading.problem("config_conflict", message, module)
    return embedding and taken is not None


def _is_embedding(module: str) -> bool:
    """Whether a module is an embedding by its last name: shapes cannot tell."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def _parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("lora_parameters")
    return found if isinstance(found, dict) else {}


def _scale(reading: Reading, config: Mapping[str, Any]) -> float:
    """The factor of every update; which arithmetic it is depends on who wrote the config.

    mlx-lm before 0.14.2 multiplied by scale * alpha / rank, later ones by scale alone though alpha
    stayed in their configs until 2025 (ml-explore/mlx-examples pull 614, mlx-lm pull 65).
    """
    said = _parameters(config)
    scale, alpha, rank = (_number(said.get(f), f) for f in ("scale", "alpha", "rank"))
    given = reading.number("scale")
    if scale is None:
        if given is not None:
            return given
        where = "its config has no scale" if config else f"there is no {CONFIG}"
        more = "" if alpha is None else f" (alpha {alpha:g} alone decides nothing)"
        reading.problems.append(
            Problem(
                "alpha_missing",
                f"{shown(reading.name)}: {where}{more}",
                "error",
                reading.name,
                remedy="--assume scale=20 (what mlx-lm does unless told otherwise)",
            )
        )
        return 1.0
    old = scale * alpha / rank if alpha is not None and rank else scale
    before = "lora_layers" in config and "num_layers" not in config and old != scale
    unsure = before and "use_dora" in config
    if given is not None and given != scale and not (before and math.isclose(given, old)):
        raise error("usage", f"--assume scale={given:g}, but {CONFIG} says {scale:g}")
    if given is not None:
        return given
    if unsure:
        reading.problem(
            "config_conflict",
            f"config says scale {scale:g} and alpha {alpha:g}: {scale:g} is what mlx-lm 0.14.2 to "
            f"0.18 applied, and is taken; 0.14.0 and 0.14.1 applied {old:g} (--assume "
            f"scale={old:g})",
            severity="warning",
        )
    elif before:
        reading.problem(
            "config_conflict",
            f"scale {scale:g} times alpha / rank, {old:g}, as mlx-lm before 0.14 applied it",
            severity="note",
        )
        return old
    elif alpha is not None:
        message = f"config has alpha {alpha:g} too, which mlx-lm does not use; scale {scale:g} is"
        reading.problem("config_conflict", message, severity="note")
    return scale


def _number(value: Any, field: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise error("malformed", f"{CONFIG}: {field} is {shown(value)}, expected a number")
    return float(value)
