"""GGUF adapters as they are written: one alpha for all pairs, names and key-values of llama.cpp."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.adapter import DTYPE_BITS, Adapter, Experts, Kind, Leaf, LowRank, Renormed, Replace
from loratools.errors import Problem, Severity, error, shown
from loratools.views import later, reshaped, scaled, turned

ARCHITECTURE = "general.architecture"
TYPE = "general.type"
METHOD = "adapter.type"
ALPHA = "adapter.lora.alpha"
INVOCATION = "adapter.alora.invocation_tokens"
FILE_TYPE = "general.file_type"
METADATA = "loratools.metadata."  # what a safetensors header said, carried along
HUB = "https://huggingface.co/"
EMBEDDING = "token_embd"
TOKENS = f"{EMBEDDING}.weight"  # the one weight whose A llama.cpp wants transposed
_POSITIONS = ("position_embd.weight", "token_types.weight")  # embeddings stored as all others
NAME_BYTES = 64  # GGML_MAX_NAME, its final zero included
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
_OF_THE_FILE = (ARCHITECTURE, "general.alignment", "split.")  # true of one file, not of the next
# Key-values that describe an adapter and no file: its author, licence, tags as text.
DESCRIBES = re.compile(
    r"general\.(author|version|organization|finetune|basename|description|license[a-z.]{0,6}|url|"
    r"doi|uuid|repo_url|source\.[a-z_.]{1,40})"
)
_ENDINGS = re.compile(r"\.(gguf|safetensors|bin|pt)$")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def lost(adapter: Adapter) -> list[Problem]:
    """What a GGUF adapter cannot hold, each by name; a note for what no adapter has to hold."""
    return [
        Problem("loss", f"{shown(key)}: {message}", severity, adapter.name, key)
        for key, kind in adapter.deltas.items()
        for severity, message in _losses(key, kind)
    ]


def _losses(key: str, kind: Kind) -> Iterator[tuple[Severity, str]]:
    inner: Kind | None = kind
    while isinstance(inner, Replace):
        if inner.rows is None and inner.then is not None and ".base_layer." in inner.value.name:
            yield "note", "the base's own weight, which PEFT put beside the pair, is left out"
        else:
            rows = "whole" if inner.rows is None else f"in {len(inner.rows)} rows"
            yield "error", f"a weight replaced {rows} has no place in GGUF; fold it into the base"
        inner = inner.then
    if isinstance(inner, Renormed):
        yield "error", "DoRA's magnitude has no place in GGUF: without it this is another update"
        inner = inner.delta
    if inner is None:
        return
    if isinstance(inner, Experts) and inner.over != "in":
        yield "error", "which side of the experts A is on is known with their base only"
        return
    if not isinstance(inner, LowRank | Experts) or not key.endswith(".weight"):
        yield "error", "GGUF has pairs of weights only, no biases and no full differences"
        return
    if isinstance(inner, LowRank) and any(n != 1 for n in inner.a.shape[2:]):
        yield "error", f"A is {inner.a.shape}; GGUF holds matrices, no convolutions"
    if "F64" in (inner.a.dtype, inner.b.dtype):
        yield "error", "F64 is rounded to F32, the widest that llama.cpp multiplies"
    if len(f"{key}.lora_a".encode()) >= NAME_BYTES:
        yield "error", f"llama.cpp takes names of less than {NAME_BYTES} bytes"


def _pair(key: str, kind: Kind | None) -> LowRank | Experts | None:
    """The part of a delta that GGUF holds."""
    match kind:
        case Experts(over="in") if key.endswith(".weight"):
            return kind
        case LowRank(a=a) if key.endswith(".weight") and all(n == 1 for n in a.shape[2:]):
            return kind
        case Renormed(delta=inner):
            return _pair(key, inner)
        case Replace(then=then):
            return _pair(key, then)
        case _:
            return None


def write(adapter: Adapter, out: Path) -> dict[str, str]:
    """Write the adapter, in names of GGUF, as one file; sha256 by file name.

    The base's architecture comes from `config["gguf"]` or `config["gguf_architecture"]`; FitError
    `missing` without. Factors keep their bytes where one alpha says all scalings.
    """
    pairs = {k: p for k, kind in adapter.deltas.items() if (p := _pair(k, kind)) is not None}
    said = adapter.config.get("gguf", {}).get(ALPHA) if adapter.format == "gguf" else None
    alpha, factors = one_alpha(list(pairs.values()), said)
    tensors: dict[str, Leaf] = {}
    for (key, pair), factor in zip(pairs.items(), factors, strict=True):
        if isinstance(pair, Experts):
            tensors[f"{key}.lora_a"] = _held(pair.a)
            tensors[f"{key}.lora_b"] = _held(scaled(pair.b, factor))
            continue
        a, b = _flat(pair.a), _flat(pair.b)
        embedding = key in adapter.transposed
        if embedding if key in _POSITIONS else key == TOKENS and not embedding:
            a, b = turned(b), turned(a)  # the pair of the transposed weight
        if key == TOKENS:
            a = turned(a)
        tensors[f"{key}.lora_a"] = _held(a)
        tensors[f"{key}.lora_b"] = _held(scaled(b, factor))
    return {out.name: _write(out, _values(adapter, alpha, tensors), tensors)}


def one_alpha(pairs: Sequence[LowRank | Experts], said: Any = None) -> tuple[float, list[float]]:
    """The alpha of a file, and by what each pair's B is to be multiplied so that it is true.

    llama.cpp reads float32 and applies alpha/rank, or 1 where alpha is 0.
    """
    wanted = [
        _single(p.alpha if p.alpha is not None and p.alpha / p.rank == p.scaling
                else p.scaling * p.rank)
        for p in pairs
    ]  # fmt: skip
    useful = Counter(v for v in wanted if v != 0 and math.isfinite(v))
    common = useful.most_common(1)[0][0] if useful else 1.0
    all_one = bool(pairs) and all(p.scaling == 1 for p in pairs)
    if all_one and (len(set(wanted)) > 1 or said == 0):
        return 0.0, [1.0] * len(pairs)
    return common, [
        1.0 if value == common else pair.scaling * pair.rank / common
        for value, pair in zip(wanted, pairs, strict=True)
    ]


def _single(value: float) -> float:
    """The float32 next to a number."""
    try:
        (single,) = struct.unpack("<f", struct.pack("<f", value))
    except OverflowError:
        return math.inf
    return float(single)


def _flat(leaf: Leaf) -> Leaf:
    return leaf if len(leaf.shape) == 2 else reshaped(leaf, *leaf.shape[:2])


def _held(leaf: Leaf) -> Leaf:
    """The leaf in a dtype that llama.cpp multiplies: F8 fits into F16, F64 is rounded to F32."""
    if leaf.dtype in FILE_TYPES:
        return leaf
    dtype = "F32" if DTYPE_BITS[leaf.dtype] > 16 else "F16"

    def make() -> Any:
        import torch

        return leaf.tensor().to(torch.float32 if dtype == "F32" else torch.float16)

    return later(leaf.name, dtype, leaf.shape, make)


def _values(adapter: Adapter, alpha: float, tensors: Mapping[str, Leaf]) -> dict[str, Any]:
    """The key-values of the file, the architecture first."""
    source = adapter.config.get("gguf", {})
    arch = adapter.config.get("gguf_architecture") or source.get(ARCHITECTURE)
    if not isinstance(arch, str) or not arch:
        raise error(
            "missing",
            f"{shown(adapter.name)}: GGUF says for which architecture an adapter is "
            f"({ARCHITECTURE}: llama, qwen2, ...), and nothing here does; give --base",
        )
    values: dict[str, Any] = {ARCHITECTURE: arch, TYPE: "adapter"}
    kept = {k: v for k, v in source.items() if not k.startswith(_OF_THE_FILE)}
    values |= {k: v for k, v in kept.items() if v != []}  # the package writes no empty arrays
    name = _ENDINGS.sub("", Path(adapter.name).name)
    if name.isprintable() and name:
        values.setdefault("general.name", name)
    base = adapter.config.get("base_model_name_or_path")
    if isinstance(base, str) and "general.base_model.count" not in values:
        values |= _named(base)
    kinds = Counter(leaf.dtype for leaf in tensors.values())
    values[FILE_TYPE] = FILE_TYPES[kinds.most_common(1)[0][0]] if kinds else 0
    tokens = adapter.config.get("alora_invocation_tokens")
    if tokens:
        values[INVOCATION] = list(tokens)
    values |= {METHOD: "lora", ALPHA: alpha}
    for key, text in sorted(adapter.metadata.items()):
        if DESCRIBES.fullmatch(key):
            values.setdefault(key, text)
        elif key != "format":
            values[METADATA + key] = text
    return values


def _named(base: str) -> dict[str, Any]:
    """The base as llama.cpp's own converter names it; nothing for a path."""
    if not HUB_ID.fullmatch(base):
        return {}
    owner, _, name = base.partition("/")
    front = "general.base_model."
    return {
        f"{front}count": 1,
        f"{front}0.name": name,
        f"{front}0.organization": owner,
        f"{front}0.repo_url": HUB + base,
    }


def _write(out: Path, values: Mapping[str, Any], tensors: Mapping[str, Leaf]) -> str:
    """The file by the gguf package, one tensor in memory at a time; its sha256."""
    try:
        import gguf
        import numpy as np
    except ImportError:
        raise error("usage", "GGUF is written with the package gguf: pip install gguf") from None

    def raw(leaf: Leaf) -> Any:
        width = DTYPE_BITS[leaf.dtype] // 8
        return np.frombuffer(leaf.read(), np.uint8).reshape(
            *leaf.shape[:-1], leaf.shape[-1] * width
        )

    try:
        writer = gguf.GGUFWriter(out, values[ARCHITECTURE])
        for key, value in values.items():
            if key != ARCHITECTURE:
                writer.add_key_value(key, value, *_type(gguf.GGUFValueType, key, value))
        for name, leaf in tensors.items():
            kind = gguf.GGMLQuantizationType[leaf.dtype]
            width = DTYPE_BITS[leaf.dtype] // 8
            shape = (*leaf.shape[:-1], leaf.shape[-1] * width)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), leaf.nbytes, kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for leaf in tensors.values():
                writer.write_tensor_data(raw(leaf))
        finally:
            writer.close()
        with out.open("r+b") as file:
            os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()
    except UnicodeEncodeError as cause:
        bad = shown(cause.object[cause.start : cause.start + 40])
        raise error("malformed", f"a key-value would hold half a character: {bad}") from None
    except OSError as cause:
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        message = f"{shown(out)} cannot be written: {cause.strerror}"
        raise error("disk_full" if full else "storage", message) from cause


def _type(types: Any, key: str, value: Any) -> tuple[Any, Any]:
    """The type of a value in the file, and of its elements where it is an array."""
    if isinstance(value, list):
        kinds = {_type(types, key, v)[0] for v in value}
        signed = kinds & {types.INT32, types.INT64}
        return types.ARRAY, types.INT64 if signed and len(kinds) > 1 else max(kinds)
    match value:
        case bool():
            return types.BOOL, None
        case str():
            return types.STRING, None
        case int() if 0 <= value < 1 << 32:
            return types.UINT32, None
        case int() if -(1 << 31) <= value < 0:
            return types.INT32, None
        case int():
            return types.UINT64 if value > 0 else types.INT64, None
        case float() if key == ALPHA or math.isnan(value) or _single(value) == value:
            return types.FLOAT32, None
        case _:
            return types.FLOAT64, None
