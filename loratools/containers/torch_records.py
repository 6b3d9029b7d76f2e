"""The globals that a pickle of tensors may name, and the inert records that stand for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from loratools.adapter import DTYPE_BITS, TORCH_NAMES
from loratools.containers.pickle_walk import Call, Ordered
from loratools.errors import shown

TOTAL = 1 << 60  # elements and bytes: torch multiplies in 64 bits


@dataclass(frozen=True, slots=True)
class Dtype:
    name: str  # torch's


@dataclass(frozen=True, slots=True)
class TensorType:
    pass


@dataclass(frozen=True, slots=True)
class StorageType:
    dtype: str  # as in DTYPE_BITS, or torch's name where that has none


@dataclass(frozen=True, slots=True)
class Storage:
    """A part of a stored run of elements; all of it but for views, which old files may hold."""

    key: str
    dtype: str
    numel: int
    first: int
    count: int

    @property
    def itemsize(self) -> int:
        return DTYPE_BITS[self.dtype] // 8

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True, slots=True)
class Tensor:
    storage: Storage
    dtype: str
    offset: int
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]


def storage_record(seen: dict[str, Storage], length: int, pid: Any) -> Storage:
    """The record of a persistent id; the old format's has `length` 6, a view coming last."""
    match pid:
        case ("storage", StorageType(dtype), str(key), str(location), int(numel), *view) if (
            type(pid) is tuple and len(pid) == length and location != "meta" and is_count(numel)
        ):
            pass
        case _:
            raise ValueError("names a storage in a way that torch.save does not")
    whole = _once(seen, key, Storage(key, dtype, numel, 0, numel))
    match view:
        case [] | [None]:
            return whole
        case [(str(name), int(first), int(count))] if (
            name != key and is_count(first) and is_count(count) and first + count <= numel
        ):
            return _once(seen, name, Storage(key, dtype, numel, first, count))
        case _:
            raise ValueError("names a view of a storage that does not fit it")


def _once(seen: dict[str, Storage], key: str, storage: Storage) -> Storage:
    # torch would go by the first of two descriptions, whatever the second says.
    if seen.setdefault(key, storage) != storage and (seen[key].numel or storage.numel):
        raise ValueError(f'describes storage "{shown(key)}" in two ways')
    return storage


def is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number <= TOTAL


def _tensor(arguments: tuple[Any, ...]) -> Tensor:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides)):
            return Tensor(storage, storage.dtype, offset, shape, strides)
    raise ValueError("rebuilds a tensor from arguments that torch.save does not write")


def _tensor_v2(arguments: tuple[Any, ...]) -> Tensor:
    # After the four: requires_grad, backward hooks, and metadata of conj() and neg() views,
    # whose elements are not the stored ones.
    rest = arguments[4:]
    if not 2 <= len(rest) <= 3 or type(rest[0]) is not bool or any(rest[1:]):
        raise ValueError("rebuilds a tensor with hooks, or a conjugated or negated view")
    return _tensor(arguments[:4])


def _tensor_v3(arguments: tuple[Any, ...]) -> Tensor:
    match arguments[6:7]:
        case (Dtype(dtype),):
            tensor = _tensor_v2(arguments[:6] + arguments[7:])
            return replace(tensor, dtype=_FROM_TORCH.get(dtype, dtype))
    return _tensor(())


def _parameter(arguments: tuple[Any, ...]) -> Tensor:
    match arguments:
        # A fourth argument are Python attributes, which no leaf can keep.
        case (Tensor() as tensor, bool(), hooks) | (Tensor() as tensor, bool(), hooks, _) if (
            not hooks
        ):
            return tensor
    raise ValueError("rebuilds a parameter from arguments that torch.save does not write")


def _with_attributes(arguments: tuple[Any, ...]) -> Tensor:
    # A tensor with Python attributes (the last argument), which no leaf can keep. Its own
    # arguments begin with a storage: a call in a call could recurse without end.
    match arguments:
        case (Call() as rebuild, TensorType(), tuple((Storage(), *_) as inner), dict()):
            tensor = rebuild.make(inner)
            if isinstance(tensor, Tensor):
                return tensor
    raise ValueError("rebuilds a tensor of another class, or in an unknown way")


def _ordered(arguments: tuple[Any, ...]) -> Ordered:
    match arguments:
        case ():
            return Ordered()
        case (list(pairs),) if all(type(pair) is list and len(pair) == 2 for pair in pairs):
            found = Ordered()
            for key, value in pairs:  # Python 2 wrote it so
                if type(key) is not str:
                    raise ValueError("makes an OrderedDict with a key that is no text")
                if key in found:
                    raise ValueError(f"makes an OrderedDict with the key {shown(key)} twice")
                found[key] = value
            return found
    raise ValueError("makes an OrderedDict of what is no list of pairs")


def _counter(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    match arguments:
        case (dict(counts),):
            return dict(counts)
    raise ValueError("makes a Counter of what is no dict")


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    match arguments:
        case (tuple(shape),):
            return shape
    raise ValueError("makes a torch.Size of what is no tuple")


def _device(arguments: tuple[Any, ...]) -> str:
    match arguments:
        case (str(kind),):
            return kind
        case (str(kind), int(index)):
            return f"{kind}:{index}"
    raise ValueError("makes a torch.device of other things than a name and a number")


def _bytes(arguments: tuple[Any, ...]) -> bytes:
    match arguments:
        case (str(text), "latin1"):  # how protocol 2 spells bytes
            return text.encode("latin1")
    raise ValueError("encodes what is no latin1 text")


_FROM_TORCH = {name: dtype for dtype, name in TORCH_NAMES.items()}

# torch.NAMEStorage, and the dtype of its elements.
_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "ComplexFloat": "C64",
    "Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL",
    "ComplexDouble": "complex128", "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32",
    "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4",
}  # fmt: skip

# Known, so that messages can name them; no leaf can be one.
_UNUSABLE = (
    "complex128", "complex32", "float4_e2m1fn_x2", "qint8", "quint8", "qint32", "quint4x2",
    "quint2x4", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
)  # fmt: skip

NAMES: dict[str, Any] = {
    "collections.OrderedDict": Call(_ordered),
    "collections.Counter": Call(_counter),
    "_codecs.encode": Call(_bytes),
    "torch.Size": Call(_size),
    "torch.device": Call(_device),
    "torch._utils._rebuild_tensor": Call(_tensor),
    "torch._utils._rebuild_tensor_v2": Call(_tensor_v2),
    "torch._utils._rebuild_tensor_v3": Call(_tensor_v3),
    "torch._utils._rebuild_parameter": Call(_parameter),
    "torch._utils._rebuild_parameter_with_state": Call(_parameter),
    "torch._tensor._rebuild_from_type_v2": Call(_with_attributes),
    "torch.Tensor": TensorType(),
    "torch.storage.UntypedStorage": StorageType("U8"),
    **{f"torch.{name}Storage": StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": Dtype(name) for name in (*_FROM_TORCH, *_UNUSABLE)},
}
