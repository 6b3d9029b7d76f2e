"""What stands at a source instead of an adapter, in words: `looks_like`."""

from __future__ import annotations

import json
from typing import Any

from loratools.adapter import Source
from loratools.containers import gguf, npy, safetensors, torch_zip
from loratools.containers.bundle import Bundle
from loratools.containers.looks import (
    is_onnx,
    not_the_file,
    what_gguf,
    what_it_is,
    what_weights,
)
from loratools.errors import LoratoolsError, error, shown

WEIGHTS = (
    ".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".onnx", ".nemo",
    ".onnx_adapter",
)  # fmt: skip
HEAD = 4096
PARTIAL = (".part", ".partial", ".crdownload", ".download", ".aria2", ".incomplete", ".tmp")
SMALL = 1_000_000  # bytes of a config that is worth reading for a few words
TRAINING = ("optimizer", "scheduler", "rng_state", "scaler", "training_args", "random_states")


def looks_like(bundle: Bundle) -> str:
    """What stands there instead of an adapter, in words.

    Raises not_weights for a pointer or a web page in the place of weights, and what reading the
    file's headers raises: truncated (with the bytes that are missing), malformed, hostile.
    """
    return _folder(bundle) if bundle.chosen is None else _file(bundle.open(bundle.chosen))


# ------------------------------------------------------------------------------- folders


def _folder(bundle: Bundle) -> str:
    if not bundle.names:
        return "an empty folder"
    weights = [n for n in bundle.names if n.lower().endswith(WEIGHTS)]
    for name in weights[:64]:
        _require_there(bundle.open(name))
    if "model_index.json" in bundle:
        return f"a base model (diffusers pipeline{_of(bundle, 'model_index.json')}), not an adapter"
    onnx = [n for n in weights if n.lower().endswith(".onnx")]
    if "genai_config.json" in bundle:
        return "a base model (ONNX, for onnxruntime-genai), not an adapter"
    if onnx:
        return f"an ONNX graph ({shown(onnx[0])}{_of(bundle, 'config.json')}), not an adapter"
    if "adapter_config.json" in bundle and not weights:
        return "an adapter_config.json without the weights file beside it"
    known = [n for n in weights if not n.lower().startswith(TRAINING)]
    if "config.json" in bundle:
        if known:
            arch = _of(bundle, "config.json")
            return f"a base model (config.json and weights{arch}), not an adapter"
        if not weights:
            return f"a config.json{_of(bundle, 'config.json')} without any weights"
    if weights and not known:
        return "what a training left to go on from (optimizer and the like), without an adapter"
    if len(known) == 1:
        return f"{_file(bundle.open(known[0]))}, in {shown(known[0])}"
    if "run_config.yaml" in bundle or ".metadata" in bundle:
        return "a distributed checkpoint; export it to one file where it was trained"
    return f"no adapter among {len(bundle.names)} files"


def _of(bundle: Bundle, name: str) -> str:
    """The class or architecture that a config names, as words to put behind others."""
    if name not in bundle:
        return ""
    source = bundle.open(name)
    try:
        table: Any = json.loads(source.read(0, source.size)) if source.size <= SMALL else {}
    except (ValueError, RecursionError):
        return ""
    if not isinstance(table, dict):
        return ""
    for key in ("architectures", "_class_name", "model_type"):
        value = table.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and value:
            return f", {shown(value)}"
    return ""


# ------------------------------------------------------------------------------- files


def _file(source: Source) -> str:
    what, name = shown(source.name), source.name.lower()
    head = source.read(0, min(HEAD, source.size))
    _require_there(source)
    if not head:
        raise error("truncated", f"{what} is empty; fetch it again")
    if name.endswith(PARTIAL):
        raise error("truncated", f"{what} is a download that has not ended; fetch it again")
    if head.startswith(b"GGUF"):
        values = gguf.read_header(source).values  # which sees that nothing is missing, too
        return what_gguf(values.get("general.type"), values.get("general.architecture"))
    if name.endswith((".safetensors", ".sft")) or (
        head[8:10] == b'{"' and not head[4:8].strip(b"\0")
    ):
        header = safetensors.read_header(source)
        return what_weights({n: leaf.shape for n, leaf in header.leaves.items()})
    if name.endswith((".pt", ".pth", ".bin", ".ckpt")) and head.startswith((b"PK", b"\x80")):
        return _torch(source)
    if name.endswith(".npz") and head.startswith(b"PK"):
        return what_weights({n: leaf.shape for n, leaf in npy.arrays(source).items()})
    if name.endswith(".onnx") or is_onnx(head):
        return _onnx(source, head)
    if name.endswith(".bin") and (words := _llama2c(head, source.size)):
        return words
    if name.endswith(".json") and head.lstrip()[:1] == b"[":
        return "JSON text"
    return what_it_is(head[:512]) or "a file of some other sort"


def _require_there(source: Source) -> None:
    lost = not_the_file(source.read(0, min(512, source.size)))
    if lost:
        raise error("not_weights", f"{shown(source.name)} {lost}")


def _torch(source: Source) -> str:
    try:
        file = torch_zip.state_dict(source)
    except LoratoolsError as cause:
        # Whole and harmless, but no dict of tensors: a scripted or pickled object, a list.
        if cause.code == "not_weights":
            return f"a torch file that holds no weights by name ({cause.message})"
        raise
    if "activation_func" in file.extras or "layer_structure" in file.extras:
        return "a hypernetwork"
    if {"param_groups", "state"} <= file.extras.keys() or "optimizer" in file.extras:
        return "optimizer state, left over from training"
    if "string_to_param" in file.extras or any(k.startswith("string_to_") for k in file.tensors):
        return "a textual-inversion embedding"
    shapes = {n: leaf.shape for n, leaf in file.tensors.items()}
    return what_weights(shapes) if shapes else "a torch file without tensors"


def _llama2c(head: bytes, size: int) -> str | None:
    # karpathy/llama2.c: run.c, `Config`: seven int32 (dim, hidden, layers, heads, kv heads, vocab,
    # length); a vocabulary below 0 means a head of its own.
    if len(head) < 28:
        return None
    dim, hidden, layers, heads, kv, vocab, length = (
        int.from_bytes(head[i : i + 4], "little", signed=True) for i in range(0, 28, 4)
    )
    fits = 0 < kv <= heads <= 1024 and 0 < dim <= 1 << 16 and heads and dim % heads == 0
    if not fits or not 0 < layers <= 512 or not 0 < length <= 1 << 22 or hidden <= 0:
        return None
    block = dim * (2 * dim + 2 * dim // heads * kv + 3 * hidden + 2)
    least = 4 * (abs(vocab) * dim + layers * block)
    return "a base model (llama2.c), not an adapter" if least <= size else None


# ------------------------------------------------------------------------------- ONNX

_GRAPH = 7  # the field of ModelProto that holds the graph
_PRODUCER = 2


def _onnx(source: Source, head: bytes) -> str:
    """An ONNX graph, its fields walked (onnx/onnx: onnx/onnx.proto, ModelProto)."""
    at, producer, graph = 0, "", False
    for _ in range(4096):
        if at >= source.size:
            break
        raw = source.read(at, min(32, source.size - at))
        tag, here = _varint(raw, 0)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            here = _varint(raw, here)[1]
            length = 0
        elif wire == 2:
            length, here = _varint(raw, here)
        else:
            length = {1: 8, 5: 4}.get(wire, -1)
        if here == 0 or length < 0 or not 1 <= number <= 32:
            return "a file of some other sort (its name says ONNX, its bytes do not)"
        if number == _PRODUCER and length <= 100 and at + here + length <= source.size:
            producer = source.read(at + here, length).decode(errors="replace")
        graph |= number == _GRAPH
        at += here + length
    if at > source.size:
        raise error(
            "truncated",
            f"{shown(source.name)}: {at - source.size} bytes are missing at the end "
            f"({source.size} of at least {at}); fetch the file again",
        )
    if not graph:
        return "a file of some other sort (its name says ONNX, it has no graph)"
    return f"an ONNX graph{f' (made by {shown(producer)})' if producer else ''}, not an adapter"


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A protobuf number and where it ends; an end of 0 where there is none."""
    value = 0
    for i in range(10):
        if at + i >= len(raw):
            return 0, 0
        byte = raw[at + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    return 0, 0
