"""Weights of quantised graphs as numbers, and numbers back in the scheme that they had.

New codes are those that onnxruntime's own quantisers give; a group (what shares a scale) in which
nothing changed keeps its bytes, so requantise(dequantise(w)) is w.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from loratools.errors import error, shown
from loratools.weights.quantised import Form, Quantised, QuantisedNode, form_of

Floats = NDArray[np.float64]
Narrow = NDArray[Any]  # of 8 bits, signed or not

KINDS: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
}
STEP: Final = 1 << 20  # numbers that are in work together


@dataclass(frozen=True, slots=True)
class Stored:
    """An initialiser: its dtype as a Leaf names it, its shape, its bytes as the graph has them."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes


class Held(Protocol):
    """The bytes of an initialiser."""

    @property
    def raw(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Scheme:
    """How numbers become codes: how many bits, from which code on, with which zero and scale."""

    bits: int
    lowest: int  # the smallest code: 0, or -2^(bits-1)
    symmetric: bool
    signed_scale: bool  # scale = (the number farthest from 0) / -2^(bits-1)
    halves_up: bool  # C's roundf, as the kernel for MatMulNBits has it; else to the even code

    @property
    def middle(self) -> int:
        return self.lowest + (1 << (self.bits - 1))


@dataclass(slots=True)
class Weight:
    """The codes of a weight (or of some of its rows), unpacked, in the rows of its form."""

    form: Form
    scheme: Scheme
    codes: Narrow  # (rows, columns), of MatMulNBits filled up to whole blocks
    scales: Floats  # (rows, blocks), or (1, 1)
    zeros: Floats
    filled: Narrow | None = None  # zero points of MatMulNBits, with what fills up their bytes

    def numbers(self, start: int, stop: int) -> Floats:
        """(code − zero) · scale of some rows, exact in float64."""
        return self._numbers(slice(start, stop), slice(0, self.form.columns))

    def numbers_of_columns(self, start: int, stop: int) -> Floats:
        """The same of some columns of all rows."""
        return self._numbers(slice(None), slice(start, stop))

    def _numbers(self, rows: slice, columns: slice) -> Floats:
        codes = self.codes[rows, columns]
        if self.form.single:
            scales, zeros = self.scales, self.zeros
        else:
            of = np.arange(columns.start, columns.stop) // self.form.block
            alone = self.form.blocks == 1
            scales, zeros = (
                x[rows] if alone else x[rows][:, of] for x in (self.scales, self.zeros)
            )
        found: Floats = (codes - zeros) * scales
        return found

    def put(self, start: int, wanted: NDArray[Any]) -> None:
        """Make these numbers those of the rows from `start` on; groups stay where none changed.

        What has one scale for all rows takes all rows. OverflowError where a scale does not fit.
        """
        form, count = self.form, len(wanted)
        rows = np.zeros((count, form.blocks * form.block), np.float32)
        with np.errstate(over="ignore"):
            rows[:, : form.columns] = wanted
        if not np.isfinite(rows).all():
            what = f"{shown(form.names[0])}: the new weight has numbers that are infinite"
            raise error("overflow", what)
        codes = np.zeros(rows.shape, np.int16)
        wide = self.codes[start : start + count]
        codes[:, : wide.shape[1]] = wide
        other = np.zeros(rows.shape, np.bool_)
        now = self.numbers(start, start + count).astype(np.float32)
        other[:, : form.columns] = rows[:, : form.columns] != now
        size = rows.size if form.single else form.block
        changed = other.reshape(-1, size).any(axis=1)
        if not changed.any():
            return
        made = _quantised(rows.reshape(-1, size)[changed], self.scheme, KINDS[form.scale])
        place = slice(None) if form.single else slice(start, start + count)
        for held, new in ((self.scales, made[0]), (self.zeros, made[1])):
            held[place].reshape(-1)[changed] = new
        codes.reshape(-1, size)[changed] = made[2]
        wide[:, : form.columns] = codes[:, : form.columns]

    def written(self) -> dict[str, bytes]:
        """The bytes of the initialisers, by name."""
        form = self.form
        if form.padded:
            codes, scales, zeros = self.codes, self.scales, self.zeros
            if self.filled is not None:
                filled = self.filled.copy()
                filled[:, : form.blocks] = zeros
                packed = _packed(filled, form.bits)
            else:
                packed = zeros.astype(KINDS[form.zero]).tobytes() if form.zero else b""
        else:
            codes = np.ascontiguousarray(
                self.codes.reshape([form.shape[i] for i in form.axes]).transpose(
                    np.argsort(form.axes)
                )
            )
            scales, zeros = (_put_back(x, form) for x in (self.scales, self.zeros))
            packed = _packed(zeros.astype(codes.dtype), form.bits)
        made = {
            form.names[0]: _packed(codes, form.bits),
            form.names[1]: scales.astype(KINDS[form.scale]).tobytes(),
        }
        return made | ({form.names[2]: packed} if form.names[2] else {})


def loaded(form: Form, held: Mapping[str, Held], start: int = 0, stop: int | None = None) -> Weight:
    """The codes of a weight from its initialisers; of MatMulNBits also of some rows alone."""
    stop = form.rows if stop is None else stop
    blocks, signed = form.blocks, form.lowest < 0
    codes_raw, scales_raw = held[form.names[0]], held[form.names[1]]
    scales = np.frombuffer(scales_raw.raw, KINDS[form.scale]).astype(np.float64)
    zeros = np.full(len(scales), 1 << (form.bits - 1) if form.padded else 0, np.float64)
    filled: Narrow | None = None
    if form.names[2]:
        raw = held[form.names[2]].raw
        if form.zero in KINDS:
            zeros = np.frombuffer(raw, KINDS[form.zero]).astype(np.float64)
        elif form.padded:
            each = 8 // form.bits
            wide = -(-blocks // each) * each
            filled = _unpacked(raw, form.bits, form.rows * wide).reshape(form.rows, wide)
            zeros = filled[:, :blocks].reshape(-1).astype(np.float64)
        else:
            zeros = _unpacked(raw, form.bits, len(scales), signed=signed).astype(np.float64)
    middle = form.lowest + (1 << (form.bits - 1))
    symmetric = bool((zeros == middle).all())
    signed_scale = symmetric and (form.padded or bool((scales < 0).any()))
    scheme = Scheme(form.bits, form.lowest, symmetric, signed_scale, form.padded)
    if form.padded:
        width = blocks * form.block
        row = width * form.bits // 8
        raw = _some(codes_raw, start * row, stop * row)
        codes = _unpacked(raw, form.bits, (stop - start) * width).reshape(-1, width)
        rows = slice(start, stop)
        scales, zeros = (x.reshape(form.rows, blocks)[rows] for x in (scales, zeros))
        return Weight(form, scheme, codes, scales.copy(), zeros.copy(), filled)
    flat = _unpacked(codes_raw.raw, form.bits, math.prod(form.shape), signed=signed)
    codes = np.ascontiguousarray(flat.reshape(form.shape).transpose(form.axes))
    codes = codes.reshape(form.rows, form.columns)
    if form.single:
        return Weight(form, scheme, codes, scales.reshape(1, 1), zeros.reshape(1, 1))
    scales, zeros = (_brought(x, form) for x in (scales, zeros))
    return Weight(form, scheme, codes, scales, zeros)


def _some(held: Held, start: int, stop: int) -> bytes:
    """Some of an initialiser's bytes; from a file only those are read."""
    leaf = getattr(held, "leaf", None)
    if leaf is not None and leaf.source is not None and leaf.strides is None:
        return bytes(leaf.source.read(leaf.offset + start, stop - start))
    return held.raw[start:stop]


def _brought(flat: Floats, form: Form) -> Floats:
    """Scales of DequantizeLinear, for each row its own."""
    if form.blocks == 1:
        return flat.reshape(form.rows, 1).copy()
    extents = list(form.shape)
    extents[form.axes[-1]] = form.blocks
    return np.ascontiguousarray(flat.reshape(extents).transpose(form.axes)).reshape(form.rows, -1)


def _put_back(scales: Floats, form: Form) -> Floats:
    """Scales of the rows in the order of the stored tensor."""
    if form.blocks == 1:
        return scales
    extents = [*(form.shape[i] for i in form.axes[:-1]), form.blocks]
    return np.ascontiguousarray(scales.reshape(extents).transpose(np.argsort(form.axes)))


def _quantised(
    rows: NDArray[np.float32], scheme: Scheme, dtype: np.dtype[Any]
) -> tuple[Floats, Floats, NDArray[np.int16]]:
    """Scale, zero and codes of each row, by float32 steps as onnxruntime's kernels take them.

    onnxruntime: core/mlas/lib/q4_dq.cpp; python/tools/quantization/quant_utils.py.
    """
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
        zeros = np.clip(_rounded(-low / safe, scheme), 0, last) + scheme.lowest
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
        _rounded(rows * back[:, None] + zeros[:, None].astype(np.float32), scheme),
        smallest,
        scheme.lowest + int(last),
    )
    return scales.astype(np.float64), zeros, codes.astype(np.int16)


def _rounded(numbers: NDArray[np.float32], scheme: Scheme) -> Floats:
    """Numbers as whole ones; negative ones, which are no codes, as they come."""
    wide = numbers.astype(np.float64)
    return np.floor(wide + 0.5) if scheme.halves_up else np.rint(wide)


def _unpacked(raw: bytes, bits: int, count: int, *, signed: bool = False) -> Narrow:
    """Codes, the lower bits of a byte first; owning their memory."""
    each = 8 // bits
    flat = np.frombuffer(raw, np.uint8)[: -(-count // each)]
    if bits == 8:
        return flat.view(np.int8 if signed else np.uint8).copy()
    codes: Narrow = np.empty((len(flat), each), np.uint8)
    for at in range(each):
        codes[:, at] = (flat >> np.uint8(bits * at)) & np.uint8((1 << bits) - 1)
    some: Narrow = codes.reshape(-1)[:count]
    if not signed:
        return some
    high = some >= 1 << (bits - 1)
    some = some.view(np.int8)
    some[high] -= 1 << bits
    return some


def _packed(codes: Narrow, bits: int) -> bytes:
    flat = codes.reshape(-1).view(np.uint8)
    if bits == 8:
        return flat.tobytes()
    each = 8 // bits
    low = np.zeros(-(-len(flat) // each) * each, np.uint8)
    low[: len(flat)] = flat & np.uint8((1 << bits) - 1)
    whole = np.zeros(len(low) // each, np.uint8)
    for at in range(each):
        whole |= low[at::each] << np.uint8(at * bits)
    return whole.tobytes()


# --------------------------------------------------------------------------- whole weights


def dequantise(node: QuantisedNode, stored: Mapping[str, Stored]) -> Floats:
    """The weight that a node holds: (in, out) of a MatMulNBits, as it is stored of a
    DequantizeLinear.
    """
    form = form_of(node, stored)
    numbers = loaded(form, stored).numbers(0, form.rows)
    back = np.argsort(form.axes)
    return np.ascontiguousarray(numbers.reshape([form.shape[i] for i in form.axes]).transpose(back))


def requantise(
    weight: Floats, node: QuantisedNode, stored: Mapping[str, Stored]
) -> dict[str, bytes]:
    """New bytes of the initialisers of a node whose weight is to be this one, by their names.

    Bits, block, symmetry and dtypes stay as they were; lengths too.
    """
    form = form_of(node, stored)
    if weight.shape != form.shape:
        raise ValueError(f"{weight.shape} is not {form.shape}")
    held = loaded(form, stored)
    held.put(0, weight.transpose(form.axes).reshape(form.rows, form.columns))
    return held.written()


def numbers_of(source: Quantised, weight: Weight, start: int, stop: int) -> Floats:
    """Rows of the weight as its source has it (turned or not)."""
    form = source.form
    width = math.prod(source.shape[1:])
    if source.straight:
        each = width // form.columns if form.columns else 1
        return weight.numbers(start * each, stop * each).reshape(stop - start, width)
    if len(form.shape) == 2:
        return weight.numbers_of_columns(start, stop).T
    back = np.argsort(form.axes)
    whole = weight.numbers(0, form.rows).reshape([form.shape[i] for i in form.axes])
    return whole.transpose(back).reshape(source.shape[0], width)[start:stop]


def steps_of(source: Quantised, weight: Weight, start: int, stop: int) -> Floats:
    """How far apart neighbouring codes of these rows are, number by number."""
    ones = replace(
        weight, codes=np.ones(weight.codes.shape, np.uint8), zeros=np.zeros_like(weight.zeros)
    )
    return np.abs(numbers_of(source, ones, start, stop))


def put_all(source: Quantised, weight: Weight, wanted: NDArray[Any]) -> None:
    """Give a weight all its numbers, (rows, width) as its source has it."""
    form = source.form
    whole = wanted.reshape(source.shape)
    rows = (whole.T if source.turned else whole).transpose(form.axes)
    flat = rows.reshape(form.rows, form.columns)
    step = form.rows if form.single else max(1, STEP // form.columns)
    for start in range(0, form.rows, step):
        weight.put(start, flat[start : start + step])
