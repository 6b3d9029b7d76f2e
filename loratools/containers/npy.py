"""Arrays as numpy writes them, .npy and .npz, as leaves: without numpy, nothing is evaluated."""

from __future__ import annotations

import math
import re
from typing import Any

from loratools.adapter import DTYPE_BITS, Leaf, Source
from loratools.containers.zip_directory import members
from loratools.errors import LoratoolsError, error, shown

MAGIC = b"\x93NUMPY"
HEADER_LIMIT = 8192  # bytes of a header; those of plain arrays have about a hundred
DIMENSIONS = 64
EXTENT = 1 << 40
SUFFIX = ".npy"

# numpy's letters; V2 is how bfloat16 is written, by mlx and by numpy with ml_dtypes alike.
DTYPES = {
    "f8": "F64", "f4": "F32", "f2": "F16", "V2": "BF16", "c8": "C64",
    "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8",
    "u8": "U64", "u4": "U32", "u2": "U16", "u1": "U8", "b1": "BOOL",
}  # fmt: skip

_DESCR = re.compile(r"'(?P<order>[<>|=])(?P<letter>[A-Za-z])(?P<size>\d{0,9})'")
_SHAPE = re.compile(r"\((?: ?\d{1,18}L?,)* ?(?:\d{1,18}L?)? ?\)")
_VALUES = {
    "descr": _DESCR,
    "fortran_order": re.compile("True|False"),
    "shape": _SHAPE,
}
_KEY = re.compile(r" *'(descr|fortran_order|shape)' *: *")
_NEXT = re.compile(r" *(,? *\}|,) *")


def arrays(source: Source) -> dict[str, Leaf]:
    """The arrays of an .npz by name, from their headers (numpy/numpy: lib/_npyio_impl.py, savez).

    Members must be stored, not compressed, and be arrays all. Raises what `zip_directory.members`
    and `array` raise.
    """
    what = shown(source.name)
    found: dict[str, Leaf] = {}
    for member, place in members(source).items():
        if not member.endswith(SUFFIX):
            raise error("not_weights", f'{what}: "{shown(member)}" is no array: this is no .npz')
        if place.method:
            raise error(
                "malformed",
                f'{what}: "{shown(member)}" is compressed (zip method {place.method}); only arrays '
                "stored as they are can be read in place: load it and save it with savez, not "
                "savez_compressed",
            )
        name = member.removesuffix(SUFFIX)
        found[name] = array(source, name, place.start, place.size)
    return found


def is_npz(source: Source) -> bool:
    """Whether a file is a zip whose first member is an array; never raises on other files."""
    head = source.read(0, min(source.size, 512))
    length = int.from_bytes(head[26:28], "little")
    return head.startswith(b"PK\3\4") and head[30 : 30 + length].endswith(SUFFIX.encode())


def array(source: Source, name: str, start: int = 0, size: int | None = None) -> Leaf:
    """The array in `size` bytes from `start` as a leaf (numpy/numpy: lib/format.py, "NPY format").

    Raises truncated, malformed, hostile (an array of objects, a pickle) and dtype_unusable
    (structured, big-endian, text).
    """
    size = source.size - start if size is None else size

    def fault(message: str, code: str = "malformed") -> LoratoolsError:
        return error(code, f'{shown(source.name)}: array "{shown(name)}": {message}')

    head = source.read(start, min(12, size))
    if not head.startswith(MAGIC):
        raise fault(f"begins with {head[:6]!r}, no .npy does", "not_weights")
    version = head[6:8]
    if version not in (b"\1\0", b"\2\0", b"\3\0") or len(head) < 12:
        raise fault(f"version {version.hex('.')} of .npy, only 1 to 3 are known")
    begin = 10 if version == b"\1\0" else 12
    length = int.from_bytes(head[8:begin], "little")
    if length > HEADER_LIMIT:
        raise fault(f"a header of {length} bytes, at most {HEADER_LIMIT} are read")
    if begin + length > size:
        raise fault(f"ends inside its header, {begin + length - size} bytes early", "truncated")
    fields = _fields(source.read(start + begin, length), fault)
    dtype, shape = _dtype(fields["descr"], fault), _shape(fields["shape"], fault)
    has, wanted = size - begin - length, math.prod(shape) * DTYPE_BITS[dtype] // 8
    if has != wanted:
        code = "truncated" if has < wanted else "malformed"
        raise fault(f"{shape} of {dtype} are {wanted} bytes, it has {has}", code)
    strides = None
    if fields["fortran_order"] == "True" and sum(n != 1 for n in shape) > 1:
        strides = tuple(math.prod(shape[:i]) for i in range(len(shape)))
    return Leaf(name, dtype, shape, source, start + begin + length, strides)


def _fields(raw: bytes, fault: Any) -> dict[str, str]:
    """The three texts of a header, a literal of Python's of exactly one form."""
    if b"'O'" in raw or re.search(rb"'[<>|=]?O\d*'", raw):
        raise fault("its elements are Python objects, that is a pickle", "hostile")
    text = raw.decode("latin-1").rstrip(" \n\0")
    found: dict[str, str] = {}
    at, closed = 1, False
    while text.startswith("{") and not closed:
        key = _KEY.match(text, at)
        value = _VALUES[key[1]].match(text, key.end()) if key else None
        if key and not value and key[1] == "descr" and text[key.end()] in "['":
            what = shown(text[key.end() : key.end() + 40])
            raise fault(f"its elements are {what}, no plain numbers", "dtype_unusable")
        after = _NEXT.match(text, value.end()) if value else None
        if key is None or value is None or after is None or key[1] in found:
            break
        found[key[1]] = value[0]
        at, closed = after.end(), after[1].endswith("}")
    if not closed or at != len(text) or found.keys() != _VALUES.keys():
        raise fault(f"its header is no header of an array: {shown(text)}")
    return found


def _dtype(descr: str, fault: Any) -> str:
    match = _DESCR.match(descr)
    assert match is not None
    order, name = match["order"], match["letter"] + match["size"]
    if name not in DTYPES:
        raise fault(f"its elements are {shown(descr)}, no numbers that are read", "dtype_unusable")
    if order == ">" and match["size"] != "1":
        raise fault(
            f"its elements are {shown(descr)}, big-endian; load it and save it little-endian",
            "dtype_unusable",
        )
    return DTYPES[name]


def _shape(text: str, fault: Any) -> tuple[int, ...]:
    shape = tuple(int(n) for n in re.findall(r"\d+", text))
    if len(shape) > DIMENSIONS or any(n > EXTENT for n in shape):
        raise fault(f"its shape {shown(text)} is larger than any tensor")
    if len(shape) == 1 and "," not in text:
        raise fault(f"its shape {shown(text)} is a number, not a tuple")
    return shape
