"""Weights of quantised graphs as numbers, and numbers back in the scheme that they had.

MatMulNBits (onnxruntime:docs/ContribOperators.md): W (in, out) = (code − zero) · scale, in blocks
along `in`, codes packed low bits first. DequantizeLinear (onnx:docs/Operators.md): one scale for
the tensor, for each slice of an axis, or for each block of one. New codes are those that
onnxruntime's own quantisers give; a group (what shares a scale) in which nothing changed keeps
its bytes, so requantise(dequantise(w)) is w.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from loratools.errors import error, shown

Floats = NDArray[np.float64]
Codes = NDArray[np.int16]
Places = NDArray[np.int64]

BITS: Final = {"U8": 8, "I8": 8, "U4": 4, "I4": 4, "U2": 2, "I2": 2}
SCALES: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
}


class QuantisedNode(Protocol):
    """A node of a graph, as containers.onnx_graph reads it."""

    @property
    def op_type(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def attributes(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """An initialiser: its dtype as a Leaf names it, its shape, its bytes as the graph has them."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes


@dataclass(frozen=True, slots=True)
class Scheme:
    """How numbers become codes: how many bits, from which code on, with which zero and scale."""

    bits: int
    lowest: int  # the smallest code: 0, or -2^(bits-1)
    symmetric: bool
    signed_scale: bool  # scale = (the number farthest from 0) / -2^(bits-1)

    @property
    def middle(self) -> int:
        return self.lowest + (1 << (self.bits - 1))


@dataclass(slots=True)
class Groups:
    """A weight as groups with one scale each: codes (groups, size), scales and zeros (groups,)."""

    codes: Codes
    scales: Floats
    zeros: Floats
    scheme: Scheme
    inside: NDArray[np.bool_]  # (groups, size): False where a last block is filled up

    def numbers(self) -> Floats:
        """(code − zero) · scale, exact in float64."""
        found: Floats = (self.codes - self.zeros[:, None]) * self.scales[:, None]
        return found


def dequantise(node: QuantisedNode, stored: Mapping[str, Stored]) -> Floats:
    """The weight that a node holds: (in, out) of a MatMulNBits, as it is stored of a
    DequantizeLinear.
    """
    layout = _layout(node, stored)
    return layout.whole(layout.groups.numbers())


def requantise(
    weight: Floats, node: QuantisedNode, stored: Mapping[str, Stored]
) -> dict[str, bytes]:
    """New bytes of the initialisers of a node whose weight is to be this one, by their names.

    Bits, block, symmetry and dtypes stay as they were; lengths too.
    """
    layout = _layout(node, stored)
    groups = layout.groups
    if not np.isfinite(weight).all():
        raise error("overflow", f"{shown(node.name)}: the new weight has numbers that are infinite")
    wanted = layout.cut(np.asarray(weight, np.float64))
    changed = ((wanted != groups.numbers()) & groups.inside).any(axis=1)
    wanted[~groups.inside] = 0.0
    scales, zeros, codes = _quantised(wanted[changed], groups.scheme, layout.scale_dtype)
    groups.scales[changed], groups.zeros[changed] = scales, zeros
    groups.codes[changed] = np.where(groups.inside[changed], codes, groups.codes[changed])
    return layout.written()


def _quantised(
    numbers: Floats, scheme: Scheme, dtype: np.dtype[Any]
) -> tuple[Floats, Floats, Codes]:
    """Scale, zero and codes of each row, by float32 steps as onnxruntime's kernels take them.

    onnxruntime: core/mlas/lib/q4_dq.cpp; python/tools/quantization/quant_utils.py.
    """
    rows = numbers.astype(np.float32)
    last = np.float32((1 << scheme.bits) - 1)
    zeros = np.full(len(rows), scheme.middle, np.float64)
    if scheme.signed_scale:
        far = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)[:, 0]
        scales = far / np.float32(-(1 << (scheme.bits - 1)))
    elif scheme.symmetric:
        scales = np.abs(rows).max(axis=1) / np.float32((1 << (scheme.bits - 1)) - 1)
    else:
        low = np.minimum(rows.min(axis=1), 0)
        scales = (np.maximum(rows.max(axis=1), 0) - low) / last
        safe = np.where(scales == 0, 1, scales)
        zeros = np.clip(np.rint(-low / safe), 0, last).astype(np.float64) + scheme.lowest
        zeros[scales == 0] = scheme.lowest
    with np.errstate(over="ignore"):
        scales = scales.astype(dtype)
    if not np.isfinite(scales).all():
        raise error("overflow", f"a scale of the new weight does not fit {dtype}")
    # the step back is divided by what is stored, as the runtime multiplies with it
    back = np.divide(
        np.float32(1), scales, out=np.zeros(len(scales), np.float32), where=scales != 0
    )
    smallest = scheme.lowest
    if scheme.symmetric and not scheme.signed_scale:
        smallest += 1  # -127 to 127
    codes = np.clip(
        np.rint(rows * back[:, None] + zeros[:, None].astype(np.float32)),
        smallest,
        scheme.lowest + int(last),
    )
    return scales.astype(np.float64), zeros, codes.astype(np.int16)


# --------------------------------------------------------------------------- where they lie


class _Layout(Protocol):
    groups: Groups
    scale_dtype: np.dtype[Any]

    def whole(self, numbers: Floats) -> Floats: ...
    def cut(self, weight: Floats) -> Floats: ...
    def written(self) -> dict[str, bytes]: ...


def _layout(node: QuantisedNode, stored: Mapping[str, Stored]) -> _Layout:
    match node.op_type:
        case "MatMulNBits":
            return _NBits(node, stored)
        case "DequantizeLinear":
            return _Linear(node, stored)
    raise error("graph_changed", f"{shown(node.name)}: a {shown(node.op_type)} holds no weight")


def _input(node: QuantisedNode, at: int, stored: Mapping[str, Stored]) -> tuple[str, Stored | None]:
    name = node.inputs[at] if len(node.inputs) > at else ""
    if name and name not in stored:
        raise error(
            "graph_changed", f"{shown(node.name)}: {shown(name)} is no constant of the graph"
        )
    return name, stored.get(name) if name else None


def _fault(node: QuantisedNode, message: str) -> Exception:
    return error("malformed", f"{shown(node.name)}: {message}")


def _unpacked(raw: bytes, bits: int, count: int, *, signed: bool = False) -> Codes:
    """Codes, the lower bits of a byte first."""
    each = 8 // bits
    flat = np.frombuffer(raw, np.uint8)[: -(-count // each)]
    parts = [(flat >> (bits * i)) & ((1 << bits) - 1) for i in range(each)]
    codes = np.stack(parts, axis=-1).reshape(-1)[:count].astype(np.int16)
    if signed:
        codes[codes >= 1 << (bits - 1)] -= 1 << bits
    return codes


def _packed(codes: Codes, bits: int) -> bytes:
    each = 8 // bits
    flat = codes.reshape(-1) & ((1 << bits) - 1)
    flat = np.append(flat, np.zeros(-len(flat) % each, np.int16)).reshape(-1, each)
    whole = np.zeros(len(flat), np.uint8)
    for at in range(each):
        whole |= flat[:, at].astype(np.uint8) << np.uint8(at * bits)
    return whole.tobytes()


def _scales(node: QuantisedNode, held: Stored | None) -> tuple[Floats, np.dtype[Any]]:
    if held is None or held.dtype not in SCALES:
        raise error(
            "graph_changed",
            f"{shown(node.name)}: scales of {shown(held.dtype if held else 'no dtype')}, where "
            f"{', '.join(SCALES)} are known",
        )
    dtype = SCALES[held.dtype]
    return np.frombuffer(held.raw, dtype).astype(np.float64), dtype


class _NBits:
    """B (out, blocks, bytes), scales (out, blocks), zeros packed for each row or as numbers."""

    def __init__(self, node: QuantisedNode, stored: Mapping[str, Stored]) -> None:
        said = node.attributes
        self.rows, self.columns = int(said["K"]), int(said["N"])
        self.bits, self.block = int(said.get("bits", 4)), int(said["block_size"])
        if self.bits not in (2, 4, 8) or self.block < 1 or self.rows < 1 or self.columns < 1:
            raise _fault(node, f"{self.bits} bits in blocks of {self.block}")
        if len(node.inputs) > 4 and node.inputs[4]:
            raise error(
                "graph_changed", f"{shown(node.name)}: its rows are in another order (g_idx)"
            )
        self.blocks = -(-self.rows // self.block)
        self.names = [_input(node, at, stored)[0] for at in range(1, 4)]
        codes, scales, zeros = (_input(node, at, stored)[1] for at in range(1, 4))
        held, self.scale_dtype = _scales(node, scales)
        count = self.columns * self.blocks
        if codes is None or len(codes.raw) * 8 // self.bits != count * self.block:
            raise _fault(node, "codes of another size than K, N and block_size say")
        if len(held) != count:
            raise _fault(node, f"{len(held)} scales for {count} blocks")
        self.zero_dtype = SCALES.get(zeros.dtype) if zeros is not None else None
        middle = 1 << (self.bits - 1)
        if zeros is None:
            offsets = np.full(count, middle, np.float64)
        elif self.zero_dtype is not None:
            offsets = np.frombuffer(zeros.raw, self.zero_dtype).astype(np.float64)
        else:
            each = 8 // self.bits
            wide = -(-self.blocks // each) * each
            rows = _unpacked(zeros.raw, self.bits, self.columns * wide).reshape(-1, wide)
            self.zero_rows = rows  # what fills up a byte stays as it is
            offsets = rows[:, : self.blocks].reshape(-1).astype(np.float64)
        if len(offsets) != count:
            raise _fault(node, f"{len(offsets)} zero points for {count} blocks")
        symmetric = bool((offsets == middle).all())
        inside = np.arange(self.blocks * self.block).reshape(self.blocks, -1) < self.rows
        self.groups = Groups(
            _unpacked(codes.raw, self.bits, count * self.block).reshape(count, self.block),
            held, offsets.copy(), Scheme(self.bits, 0, symmetric, symmetric),
            np.tile(inside, (self.columns, 1)),
        )  # fmt: skip

    def whole(self, numbers: Floats) -> Floats:
        rows = numbers.reshape(self.columns, self.blocks * self.block)[:, : self.rows]
        return np.ascontiguousarray(rows.T)

    def cut(self, weight: Floats) -> Floats:
        if weight.shape != (self.rows, self.columns):
            raise ValueError(f"{weight.shape} is not ({self.rows}, {self.columns})")
        filled = np.zeros((self.columns, self.blocks * self.block))
        filled[:, : self.rows] = weight.T
        return filled.reshape(-1, self.block)

    def written(self) -> dict[str, bytes]:
        made = {
            self.names[0]: _packed(self.groups.codes, self.bits),
            self.names[1]: self.groups.scales.astype(self.scale_dtype).tobytes(),
        }
        if self.names[2] and self.zero_dtype is not None:
            made[self.names[2]] = self.groups.zeros.astype(self.zero_dtype).tobytes()
        elif self.names[2]:
            self.zero_rows[:, : self.blocks] = self.groups.zeros.reshape(self.columns, self.blocks)
            made[self.names[2]] = _packed(self.zero_rows, self.bits)
        return made


class _Linear:
    """x of any shape; scales for the whole, for slices of an axis or for blocks of one."""

    def __init__(self, node: QuantisedNode, stored: Mapping[str, Stored]) -> None:
        self.names = [_input(node, at, stored)[0] for at in range(3)]
        x, scales, zeros = (_input(node, at, stored)[1] for at in range(3))
        if x is None or x.dtype not in BITS:
            raise error(
                "graph_changed",
                f"{shown(node.name)}: codes of {shown(x.dtype if x else 'no dtype')}, where "
                f"{', '.join(BITS)} are known",
            )
        self.bits, self.shape = BITS[x.dtype], x.shape
        held, self.scale_dtype = _scales(node, scales)
        assert scales is not None
        axis = int(node.attributes.get("axis", 1))
        axis = axis + len(self.shape) if axis < 0 else axis
        block = int(node.attributes.get("block_size", 0))
        self.order = self._order(node, scales.shape, axis, block)
        signed = x.dtype.startswith("I")
        flat = _unpacked(x.raw, self.bits, int(np.prod(self.shape)), signed=signed)
        inside = self.order >= 0
        codes = np.where(inside, flat[self.order], np.int16(0))
        lowest = -(1 << (self.bits - 1)) if signed else 0
        offsets = np.zeros(len(held))
        if zeros is not None:
            offsets = _unpacked(zeros.raw, self.bits, len(held), signed=signed).astype(np.float64)
        middle = lowest + (1 << (self.bits - 1))
        symmetric = bool((offsets == middle).all())
        scheme = Scheme(self.bits, lowest, symmetric, symmetric and bool((held < 0).any()))
        self.groups = Groups(codes, held, offsets, scheme, inside)

    def _order(self, node: QuantisedNode, scales: tuple[int, ...], axis: int, block: int) -> Places:
        """(groups, size): which number of the flat tensor stands where; -1 where none does."""
        places = np.arange(int(np.prod(self.shape)), dtype=np.int64).reshape(self.shape)
        if int(np.prod(scales)) == 1 and not block:
            return places.reshape(1, -1)
        if axis >= len(self.shape):
            raise _fault(node, f"axis {axis} of a tensor with {len(self.shape)} dimensions")
        length = self.shape[axis]
        if not block:
            if scales != (length,):
                raise _fault(node, f"scales {scales} for axis {axis} of {self.shape}")
            return np.moveaxis(places, axis, 0).reshape(length, -1)
        count = -(-length // block)
        expected = tuple(count if i == axis else n for i, n in enumerate(self.shape))
        if scales != expected:
            raise _fault(
                node, f"scales {scales} for blocks of {block} on axis {axis}, not {expected}"
            )
        widths = [(0, count * block - length if i == axis else 0) for i in range(len(self.shape))]
        filled = np.pad(places, widths, constant_values=-1)
        split = (*expected[:axis], count, block, *self.shape[axis + 1 :])
        return np.moveaxis(filled.reshape(split), axis + 1, -1).reshape(-1, block)

    def whole(self, numbers: Floats) -> Floats:
        flat = np.zeros(int(np.prod(self.shape)))
        flat[self.order[self.groups.inside]] = numbers[self.groups.inside]
        return flat.reshape(self.shape)

    def cut(self, weight: Floats) -> Floats:
        if weight.shape != self.shape:
            raise ValueError(f"{weight.shape} is not {self.shape}")
        return np.where(self.groups.inside, weight.reshape(-1)[self.order], 0.0)

    def written(self) -> dict[str, bytes]:
        flat = np.zeros(int(np.prod(self.shape)), np.int16)
        flat[self.order[self.groups.inside]] = self.groups.codes[self.groups.inside]
        made = {
            self.names[0]: _packed(flat, self.bits),
            self.names[1]: self.groups.scales.astype(self.scale_dtype).tobytes(),
        }
        if self.names[2]:
            made[self.names[2]] = _packed(self.groups.zeros.astype(np.int16), self.bits)
        return made
