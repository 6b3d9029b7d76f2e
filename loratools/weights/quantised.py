"""Weights that a graph stores as codes with scales: how they lie, by headers alone.

MatMulNBits (onnxruntime:docs/ContribOperators.md): W (in, out) = (code − zero) · scale, in blocks
along `in`, codes packed low bits first. DequantizeLinear (onnx:docs/Operators.md): one scale for
the tensor, for each slice of an axis, or for each block of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Protocol

from loratools.adapter import Leaf
from loratools.containers.onnx_graph import Graph
from loratools.errors import LoratoolsError, error, shown

if TYPE_CHECKING:
    from loratools.weights.requantising import Weight

BITS: Final = {"U8": 8, "I8": 8, "U4": 4, "I4": 4, "U2": 2, "I2": 2}
SCALES: Final = ("F32", "F16", "F64")
HOLDERS: Final = {"MatMulNBits": 1, "DequantizeLinear": 0}  # where the codes come in
# Operators that take codes as they are: what they compute depends on the weight's old scale.
RUNNING: Final = frozenset(
    """DynamicQuantizeLinear MatMulInteger ConvInteger QLinearMatMul QLinearConv QGemm
    DynamicQuantizeMatMul MatMulIntegerToFloat QAttention QEmbedLayerNormalization
    DynamicQuantizeLSTM QLinearAdd QLinearMul""".split()
)
# What quantisers put behind the name of a weight.
ENDS: Final = ("_DQ_Q4", "_DQ_Q8", "_Q4", "_Q8", "_Q2", "_quantized")


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


class Header(Protocol):
    """Of an initialiser: its dtype as a leaf names it (I4 too), and its shape."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Form:
    """How one weight is stored: as rows in which all numbers of a block share a scale.

    `axes` brings the axes of `shape` (what the node gives: (in, out) of MatMulNBits) into the
    order of the rows; `single`: one scale for all rows together.
    """

    op_type: str
    node: str
    names: tuple[str, str, str]  # codes, scales, zero points or ""
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    rows: int
    columns: int
    block: int
    bits: int
    lowest: int  # the smallest code: 0, or -2^(bits-1)
    scale: str  # dtypes
    zero: str
    single: bool = False

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.block)

    @property
    def padded(self) -> bool:
        """Whether codes of a last block are stored in full, and rows as they are here."""
        return self.op_type == "MatMulNBits"

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name)


def form_of(node: QuantisedNode, headers: Mapping[str, Header]) -> Form:
    """How the weight of a node lies in its initialisers; RefusedError graph_changed, malformed."""
    match node.op_type:
        case "MatMulNBits":
            return _nbits(node, headers)
        case "DequantizeLinear":
            return _linear(node, headers)
    raise error("graph_changed", f"{shown(node.name)}: a {shown(node.op_type)} holds no weight")


def _input(
    node: QuantisedNode, at: int, headers: Mapping[str, Header]
) -> tuple[str, Header | None]:
    name = node.inputs[at] if len(node.inputs) > at else ""
    if name and name not in headers:
        raise error(
            "graph_changed", f"{shown(node.name)}: {shown(name)} is no constant of the graph"
        )
    return name, headers.get(name) if name else None


def _fault(node: QuantisedNode, message: str) -> LoratoolsError:
    return error("malformed", f"{shown(node.name)}: {message}")


def _scales(node: QuantisedNode, held: Header | None) -> tuple[str, tuple[int, ...]]:
    if held is None or held.dtype not in SCALES:
        raise error(
            "graph_changed",
            f"{shown(node.name)}: scales of {shown(held.dtype if held else 'no dtype')}, where "
            f"{', '.join(SCALES)} are known",
        )
    return held.dtype, held.shape


def _nbits(node: QuantisedNode, headers: Mapping[str, Header]) -> Form:
    said = {k: v for k, v in node.attributes.items() if isinstance(v, int)}
    inner, outer = said.get("K", 0), said.get("N", 0)
    bits, block = said.get("bits", 4), said.get("block_size", 0)
    if bits not in (2, 4, 8) or block < 1 or inner < 1 or outer < 1:
        raise _fault(node, f"{bits} bits in blocks of {block}")
    if len(node.inputs) > 4 and node.inputs[4]:
        raise error("graph_changed", f"{shown(node.name)}: its rows are in another order (g_idx)")
    if said.get("weight_prepacked", 0):
        raise error("graph_changed", f"{shown(node.name)}: its codes are packed for one machine")
    count = outer * -(-inner // block)
    names = tuple(_input(node, at, headers)[0] for at in range(1, 4))
    codes, scales, zeros = (_input(node, at, headers)[1] for at in range(1, 4))
    dtype, shape = _scales(node, scales)
    if codes is None or codes.dtype != "U8":
        raise _fault(node, f"codes of {shown(codes.dtype if codes else 'no dtype')}")
    if math.prod(codes.shape) * 8 // bits != count * block or block * bits % 8:
        raise _fault(node, "codes of another size than K, N and block_size say")
    if math.prod(shape) != count:
        raise _fault(node, f"{math.prod(shape)} scales for {count} blocks")
    zero = ""
    if zeros is not None:
        zero = zeros.dtype
        wide = -(-(count // outer) * bits // 8) * outer
        if zero not in ("U8", *SCALES) or math.prod(zeros.shape) != (
            wide if zero == "U8" else count
        ):
            raise _fault(node, f"{zeros.shape} zero points of {zero} for {count} blocks")
    named = (names[0], names[1], names[2])
    return Form(
        "MatMulNBits", node.name, named, (inner, outer), (1, 0), outer, inner, block, bits, 0,
        dtype, zero,
    )  # fmt: skip


def _linear(node: QuantisedNode, headers: Mapping[str, Header]) -> Form:
    names = tuple(_input(node, at, headers)[0] for at in range(3))
    x, scales, zeros = (_input(node, at, headers)[1] for at in range(3))
    if x is None or x.dtype not in BITS:
        raise error(
            "graph_changed",
            f"{shown(node.name)}: codes of {shown(x.dtype if x else 'no dtype')}, where "
            f"{', '.join(BITS)} are known",
        )
    dtype, stored = _scales(node, scales)
    if zeros is not None and (zeros.dtype, math.prod(zeros.shape)) != (x.dtype, math.prod(stored)):
        raise _fault(node, f"{zeros.shape} zero points of {zeros.dtype} for scales {stored}")
    shape, bits = x.shape, BITS[x.dtype]
    lowest = -(1 << (bits - 1)) if x.dtype.startswith("I") else 0
    said = {k: v for k, v in node.attributes.items() if isinstance(v, int)}
    axis, block = said.get("axis", 1), said.get("block_size", 0)
    axis = axis + len(shape) if axis < 0 else axis
    if not math.prod(shape) or block < 0:
        raise _fault(node, f"codes {shape} in blocks of {block}")
    named = (names[0], names[1], names[2])
    every = tuple(range(len(shape)))
    single = math.prod(stored) == 1 and not block
    if not single and axis >= len(shape):
        raise _fault(node, f"axis {axis} of a tensor with {len(shape)} dimensions")
    if single:
        rows, axes, expected = (shape[0] if shape else 1), every, stored
    elif not block:
        rows, axes = shape[axis], (axis, *(i for i in every if i != axis))
        expected = (shape[axis],)
    else:
        count = -(-shape[axis] // block)
        rows = math.prod(shape) // shape[axis]
        axes = (*(i for i in every if i != axis), axis)
        expected = tuple(count if i == axis else n for i, n in enumerate(shape))
    if stored != expected:
        what = f"blocks of {block} on axis {axis}" if block else f"axis {axis}"
        raise _fault(node, f"scales {stored} for {what} of {shape}, not {expected}")
    columns = math.prod(shape) // rows
    return Form(
        "DequantizeLinear", node.name, named, shape, axes, rows, columns, block or columns, bits,
        lowest, dtype, zeros.dtype if zeros is not None else "", single,
    )  # fmt: skip


# ------------------------------------------------------------------------------- of a graph


@dataclass(frozen=True, slots=True)
class Part:
    """An initialiser with codes, scales or zero points: dtype and shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    leaf: Leaf  # of the bytes, whatever they stand for

    @property
    def raw(self) -> bytes:
        return self.leaf.read()


@dataclass(frozen=True, eq=False)
class Quantised:
    """A quantised weight as a source of its numbers, row by row, as its node or torch has them.

    `turned`: the other way round than the node gives it, which is how torch has what products
    take as (in, out).
    """

    form: Form
    held: Mapping[str, Part]
    turned: bool = False

    @property
    def name(self) -> str:
        return self.form.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form.shape[::-1] if self.turned else self.form.shape

    @property
    def size(self) -> int:
        return math.prod(self.form.shape) * {"F64": 8, "F32": 4, "F16": 2}[self.form.scale]

    @property
    def straight(self) -> bool:
        """Whether the form's rows, one after another, are the weight's own."""
        axes = tuple(range(len(self.form.shape)))
        return self.form.axes == (axes[::-1] if self.turned else axes)

    def leaf(self, name: str) -> Leaf:
        """The weight as a leaf in the dtype of its scales."""
        return Leaf(name, self.form.scale, self.shape, self)

    def weight(self) -> Weight:
        """All codes, to be changed."""
        from loratools.weights.requantising import loaded

        return loaded(self.form, self.held)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the numbers, row by row, rounded to the dtype of the scales."""
        from loratools.weights.requantising import loaded, numbers_of

        width = self.size // max(1, self.shape[0] if self.shape else 1)
        start, stop = offset // width, -(-(offset + length) // width)
        if self.straight and self.form.padded:  # those rows alone
            weight, first = loaded(self.form, self.held, start, stop), start
        else:
            weight, first = _kept(self), 0
        rows = numbers_of(self, weight, start - first, stop - first)
        kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[self.form.scale]
        found = rows.astype(kind).tobytes()
        return found[offset - start * width : offset - start * width + length]


@lru_cache(2)
def _kept(source: Quantised) -> Weight:
    """The codes of the weights that were read last: tiles ask for them one after another."""
    return source.weight()


def quantised(graph: Graph) -> tuple[dict[str, Quantised], dict[str, str]]:
    """The quantised weights of a graph by the initialiser with their codes, and of those that
    cannot be read as such, why.
    """
    holding: dict[str, list[int]] = {}
    for at, node in enumerate(graph.nodes):
        slot = HOLDERS.get(node.op_type)
        if slot is not None and len(node.inputs) > slot and node.inputs[slot] in graph.tensors:
            holding.setdefault(node.inputs[slot], []).append(at)
    parts = {
        name: Part(tensor.dtype, tensor.shape, tensor.content)
        for name, tensor in graph.tensors.items()
        if holding and tensor.content is not None
    }
    found: dict[str, Quantised] = {}
    odd: dict[str, str] = {}
    steps = _with_steps(graph) if holding else set[str]()
    for name, places in holding.items():
        try:
            forms = [form_of(graph.nodes[at], parts) for at in places]
            alike = {(f.op_type, f.names, f.axes, f.rows, f.block, f.bits) for f in forms}
            if len(alike) > 1:
                message = f"{shown(name)}: {len(alike)} nodes read its codes in other ways"
                raise error("graph_changed", message)
            if steps & {out for at in places for out in graph.nodes[at].outputs}:
                message = "the bias beside it is stored in steps of its scale"
                raise error("graph_changed", f"{shown(forms[0].node)}: {message}")
        except LoratoolsError as cause:
            odd[name] = cause.message
            continue
        held = {one: parts[one] for one in forms[0].parts}
        found[name] = Quantised(forms[0], held)
    return found, odd


def _with_steps(graph: Graph) -> set[str]:
    """The values that products take beside a bias of 32-bit codes.

    onnxruntime makes one operator of them, and takes the bias's scale for the product of the two
    others (onnxruntime:docs/ContribOperators.md, QGemm).
    """
    biases = {
        node.outputs[0]
        for node in graph.nodes
        if node.op_type == "DequantizeLinear"
        and node.outputs
        and node.inputs
        and node.inputs[0] in graph.tensors
        and graph.tensors[node.inputs[0]].dtype == "I32"
    }
    return {
        node.inputs[1]
        for node in graph.nodes
        if node.op_type in ("Gemm", "Conv", "ConvTranspose")
        and len(node.inputs) > 2
        and node.inputs[2] in biases
    }


def plain_name(name: str) -> str:
    """The name of a weight before it was quantised."""
    end = next((e for e in ENDS if name.endswith(e)), "")
    return name.removesuffix(end) if end else name


def at_run_time(op_types: Iterable[str]) -> str | None:
    """The first operator that takes codes as they are; None where none does."""
    return next((op for op in op_types if op in RUNNING), None)
