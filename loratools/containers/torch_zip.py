"""What torch.save wrote (.bin, .pt, .pth, .ckpt) as leaves: without torch, nothing in it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from loratools.adapter import DTYPE_BITS, Leaf, Source
from loratools.containers.local import LocalFile
from loratools.containers.looks import what_it_is
from loratools.containers.pickle_walk import LIMIT, STEPS, walk
from loratools.containers.torch_records import (
    NAMES,
    TOTAL,
    Dtype,
    Storage,
    Tensor,
    is_count,
    storage_record,
)
from loratools.containers.zip_directory import Member, members
from loratools.errors import LoratoolsError, error, shown

DEPTH = 64  # levels of dicts and lists
DIMENSIONS = 64  # as torch
EXTENT = 1 << 40
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A state dict: its tensors by name, and by key everything else that the file holds."""

    tensors: dict[str, Leaf]
    extras: dict[str, Any]


def state_dict(source: Source) -> TorchFile:
    """The tensors of a file whose object is a dict of them, or holds one as "model",
    "state_dict", "model_state_dict" or "module".

    Entries that are no tensors are extras; inside a wrapper their keys get its name in front.
    Raises what `read` raises, and not_weights where the object is no such dict.
    """
    kept = _recent(source) if isinstance(source, LocalFile) else _state_dict(source)
    return TorchFile(dict(kept.tensors), dict(kept.extras))


@lru_cache(maxsize=2)  # every format that asks what a file is reads it
def _recent(source: LocalFile) -> TorchFile:
    return _state_dict(source)


def _state_dict(source: Source) -> TorchFile:
    what = shown(source.name)
    found = read(source)
    if not isinstance(found, dict):
        raise error("not_weights", f"{what} holds a {type(found).__name__}, no dict of tensors")
    wrappers = [key for key in _WRAPPERS if _holds_tensors(found.get(key))]
    if len(wrappers) > 1:
        raise error(
            "malformed", f"{what}: two state dicts, {' and '.join(wrappers)}; save the wanted one"
        )
    tensors: dict[str, Leaf] = {}
    extras: dict[str, Any] = {}
    for wrapper in wrappers:
        for key, value in found.pop(wrapper).items():
            if isinstance(value, Leaf):
                tensors[_text(key, what)] = value
            else:
                extras[f"{wrapper}.{_text(key, what)}"] = value
    for key, value in found.items():
        if isinstance(value, Leaf) and not wrappers:
            tensors[_text(key, what)] = value
        elif _text(key, what) in extras:
            raise error("duplicate", f"{what}: the entry {shown(key)} stands twice, once wrapped")
        else:
            extras[key] = value
    return TorchFile(tensors, extras)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(v, Leaf) for v in value.values())


def _text(key: Any, what: str) -> str:
    if not isinstance(key, str):
        raise error("not_weights", f"{what}: the key {shown(key)} is no text: no state dict")
    return key


def read(source: Source) -> Any:
    """The object in a file of torch.save, its tensors (and Parameters) as leaves.

    Dicts (also OrderedDict and Counter), lists, tuples (also torch.Size), text, bytes, numbers,
    None; a torch.dtype or torch.device as its name. Reads the zip format and the one before
    torch 1.6 (pytorch/pytorch:torch/serialization.py). Whatever a pickle shares becomes a copy,
    storages excepted. Raises hostile, malformed, truncated, duplicate, dtype_unusable, and
    not_weights for other files, TorchScript and the tar format among them.
    """
    head = source.read(0, min(source.size, 512))
    if not head:
        raise error("truncated", f"{shown(source.name)} is empty; fetch it again")
    if head.startswith(b"PK"):
        return _read_zip(source)
    if head[257:262] == b"ustar":
        raise error(
            "not_weights",
            f"{shown(source.name)} is a tar archive, as torch wrote them before 0.1.11; those are "
            "never read: save it again with a torch that can load it",
        )
    if head.startswith(b"\x80"):
        return _read_legacy(source)
    sort = what_it_is(head) or f"something that begins with {head[:40]!r}"
    raise error("not_weights", f"{shown(source.name)} is no file of torch.save but {sort}")


def _read_zip(source: Source) -> Any:
    what = shown(source.name)
    files = _inside(members(source), what)
    pickle = files["data.pkl"]
    if pickle.size > LIMIT:
        raise error(
            "malformed", f"{what}: a pickle of {pickle.size} bytes, at most {LIMIT} are read"
        )
    raw = source.read(pickle.start, pickle.size)
    seen: dict[str, Storage] = {}
    value, end = walk(
        raw, 0, f"{what}: data.pkl", names=NAMES, persistent=partial(storage_record, seen, 5)
    )
    if end != len(raw):
        raise error("malformed", f"{what}: {len(raw) - end} bytes follow the pickle in data.pkl")
    _require_little_endian(_small(source, files.get("byteorder")), what)
    version = _small(source, files.get("version"))
    if not version.strip().isdigit() or not 1 <= int(version) <= 10:
        raise error("malformed", f"{what}: version {version!r} of the zip format, not 1 to 10")
    _require_usable(seen, what)
    starts: dict[str, int] = {}
    for key, storage in seen.items():
        member = files.get(f"data/{key}")
        if member is None or member.size != storage.nbytes:
            has = "nothing" if member is None else f"{member.size} bytes"
            raise error(
                "malformed",
                f'{what}: storage "{shown(key)}" should have {storage.nbytes} bytes, the zip has '
                f"{has} for it",
            )
        starts[key] = member.start
    return _settled(value, source, starts, len(raw))


def _inside(files: Mapping[str, Member], what: str) -> dict[str, Member]:
    """The members of the one folder that torch.save makes, by the rest of their names."""
    folder = next(iter(files), "").split("/")[0] + "/"
    outside = [name for name in files if not name.startswith(folder)]
    inside = {name.removeprefix(folder): member for name, member in files.items()}
    pickles = [name for name in files if name.lower().split("/")[-1] == "data.pkl"]
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise error(
            "not_weights",
            f"{what}: this is a TorchScript program; save the state_dict() of the module",
        )
    for name, member in files.items():
        if member.method:
            raise error(
                "malformed",
                f'{what}: "{shown(name)}" is compressed (zip method {member.method}); torch.save '
                "stores members as they are: unpack the archive and zip it with -0",
            )
    if len(pickles) > 1:
        names = " and ".join(f'"{shown(name)}"' for name in pickles[:2])
        raise error("hostile", f"{what}: two pickles, {names}; readers disagree on which counts")
    if outside or "data.pkl" not in inside:
        raise error(
            "not_weights", f"{what} is a zip, but none of torch.save: no FOLDER/data.pkl, or more"
        )
    return inside


def _small(source: Source, member: Member | None) -> bytes:
    return source.read(member.start, min(member.size, 16)) if member else b""


def _require_little_endian(order: bytes, what: str) -> None:
    if order not in (b"", b"little"):  # torch before 1.13 wrote none
        raise error(
            "malformed",
            f"{what}: byte order {order!r}, and only little-endian files are read; load it with "
            "torch and save it again",
        )


def _read_legacy(source: Source) -> Any:
    what = shown(source.name)
    raw = source.read(0, min(source.size, LIMIT))
    seen: dict[str, Storage] = {}
    step = partial(walk, raw, what=what, names=NAMES)
    magic, at = step(0)
    if magic != _MAGIC:
        raise error("not_weights", f"{what} is a pickle, but none of torch.save")
    version, at = step(at)
    if version != _VERSION:
        raise error("malformed", f"{what}: another version of the old torch format than {_VERSION}")
    system, at = step(at)
    if not isinstance(system, dict) or type(system.get("little_endian")) is not bool:
        raise error("malformed", f"{what}: does not say the byte order of its writer")
    _require_little_endian(b"little" if system["little_endian"] else b"big", what)
    begin = at
    value, at = step(at, persistent=partial(storage_record, seen, 6))
    pickled = at - begin
    keys, at = step(at)
    roots = {key for key, storage in seen.items() if storage.key == key}
    if not isinstance(keys, list) or any(type(key) is not str for key in keys):
        raise error("malformed", f"{what}: its list of storages is none")
    if len(keys) != len(roots) or set(keys) != roots:
        raise error(
            "malformed", f"{what}: lists {len(keys)} storages, its tensors use {len(roots)}"
        )
    _require_usable(seen, what)
    starts: dict[str, int] = {}
    for key in keys:
        storage = seen[key]
        if source.size - at < 8 + storage.nbytes:
            raise error("truncated", f'{what}: ends inside storage "{shown(key)}"; fetch it again')
        numel = int.from_bytes(source.read(at, 8), "little")
        if numel != storage.numel:
            raise error(
                "malformed",
                f'{what}: storage "{shown(key)}" has {numel} elements, its tensors say '
                f"{storage.numel}",
            )
        starts[key] = at + 8
        at += 8 + storage.nbytes
    if at != source.size:
        raise error("malformed", f"{what}: {source.size - at} bytes follow the last storage")
    return _settled(value, source, starts, pickled)


def _require_usable(seen: Mapping[str, Storage], what: str) -> None:
    for key, storage in seen.items():
        if storage.dtype not in DTYPE_BITS:
            raise error(
                "dtype_unusable",
                f'{what}: storage "{shown(key)}" is {storage.dtype}; convert it with torch',
            )


def _settled(value: Any, source: Source, starts: Mapping[str, int], pickled: int) -> Any:
    """The walked object as a tree of plain values and leaves.

    A leaf is named after the nearest key. `starts` are the offsets of the storages, `pickled` the
    bytes of the pickle: a tree that is much larger was made of references to itself.
    """
    what = shown(source.name)
    left = min(STEPS, 100_000 + 4 * pickled)

    def settle(value: Any, name: str, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise error(
                "hostile", f"{what}: the object unfolds to far more than its {pickled} bytes"
            )
        if depth > DEPTH:
            raise error("hostile", f"{what}: dicts and lists nest deeper than {DEPTH} levels")
        match value:
            case Tensor():
                return _leaf(value, name, source, starts)
            case None | bool() | int() | float() | str() | bytes():
                return value
            case dict():
                return {k: settle(v, str(k), depth + 1) for k, v in value.items()}
            case list():
                return [settle(v, name, depth + 1) for v in value]
            case tuple():
                return tuple(settle(v, name, depth + 1) for v in value)
            case Dtype():
                return f"torch.{value.name}"
        raise error("malformed", f'{what}: "{shown(name)}" is a storage or a function, no tensor')

    return settle(value, "", 0)


def _leaf(tensor: Tensor, name: str, source: Source, starts: Mapping[str, int]) -> Leaf:
    def fault(message: str, code: str = "malformed") -> LoratoolsError:
        return error(code, f'{shown(source.name)}: tensor "{shown(name)}": {message}')

    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if tensor.dtype not in DTYPE_BITS:
        raise fault(f"is {tensor.dtype}; convert it with torch", "dtype_unusable")
    if len(shape) != len(strides) or len(shape) > DIMENSIONS:
        raise fault(f"{len(shape)} extents, {len(strides)} strides; at most {DIMENSIONS} are read")
    if not all(map(is_count, (tensor.offset, *shape, *strides))):
        raise fault("its shape, strides or offset are no whole numbers from 0")
    if any(n > EXTENT for n in shape) or math.prod(n for n in shape if n) > TOTAL:
        raise fault(f"its shape {shown(shape)} is larger than any tensor")
    itemsize = DTYPE_BITS[tensor.dtype] // 8
    numel, has = math.prod(shape), storage.count * storage.itemsize
    begin = starts[storage.key] + storage.first * storage.itemsize
    if not numel:  # an empty view may lie anywhere, even behind its storage
        return Leaf(name, tensor.dtype, shape, source, begin)
    span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if numel * itemsize > has:
        raise fault(f"{numel} elements of {itemsize} bytes, its storage has {has} bytes", "hostile")
    if (tensor.offset + span) * itemsize > has:
        raise fault(
            f"reaches byte {(tensor.offset + span) * itemsize} of a storage of {has} bytes",
            "hostile",
        )
    contiguous, expected = True, 1
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        contiguous = contiguous and (n == 1 or step == expected)
        expected *= n
    begin += tensor.offset * itemsize
    return Leaf(name, tensor.dtype, shape, source, begin, None if contiguous else strides)
