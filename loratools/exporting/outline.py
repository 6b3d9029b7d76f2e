"""A graph's file opened without its external data, and written beside a copy of that."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.adapter import Leaf
from loratools.containers import onnx_graph
from loratools.containers.bundle import local
from loratools.errors import error, shown

if TYPE_CHECKING:
    import onnx

LIMIT = (1 << 31) - 1  # bytes of a protobuf
_CHUNK = 1 << 24


def opened(path: Path) -> onnx.ModelProto:
    """The protobuf; weights in other files stay there."""
    import onnx

    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError as cause:
        raise error("storage", f"{shown(path)} cannot be read: {cause.strerror}") from cause
    except Exception as cause:  # protobuf's DecodeError, which no stub names
        raise error("malformed", f"{shown(path.name)} is no ONNX graph") from cause


def locations(model: onnx.ModelProto) -> list[str]:
    """The files, beside the graph, that its initialisers lie in."""
    found: dict[str, None] = {}
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                found[entry.value] = None
    return list(found)


def written(model: onnx.ModelProto, source: Path, out: Path) -> None:
    """Write the graph, equal bytes for equal graphs; its other files are copied beside it."""
    if out.resolve() == source.resolve():
        raise error("same_path", f"{shown(out)} is the graph itself")
    others = locations(model)
    for name in others:
        if Path(name).name != name or name in (".", ".."):
            message = f"{shown(source.name)}: its weights lie at {shown(name)}, not beside it"
            raise error("hostile", message)
    if model.ByteSize() > LIMIT:
        raise error("loss", f"{shown(out.name)}: beyond 2 GiB a graph keeps its weights in a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.parent.resolve() != source.parent.resolve():
        for name in others:
            there = source.parent / name
            if there.is_symlink() or not there.is_file():
                raise error("not_found", f"{shown(source.name)}: no file {shown(name)} beside it")
            shutil.copyfile(there, out.parent / name)
    out.write_bytes(model.SerializeToString(deterministic=True))


def property_of(path: Path, key: str) -> str | None:
    """One of the model's metadata_props."""
    return onnx_graph.read(local(path), path.name).metadata.get(key)


def pieces(leaf: Leaf) -> Iterator[bytes]:
    """A tensor's bytes, some at a time."""
    if leaf.source is None or leaf.strides is not None:
        yield leaf.read()
        return
    for at in range(0, leaf.nbytes, _CHUNK):
        yield leaf.source.read(leaf.offset + at, min(_CHUNK, leaf.nbytes - at))
