"""Graphs with weights of 8 or 4 bits, made from a float32 graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from loratools.errors import error, shown
from loratools.exporting import graph_files

Method = Literal["dynamic", "nbits", "qdq"]
SMALLEST_BLOCK: Final = 16
OPSET_OF_INT4: Final = 21  # also of DequantizeLinear with blocks
IR_OF_INT4: Final = 10
IR_OF_CONSTANTS: Final = 4  # before, every initialiser was an input too
PREPROCESSED: Final = "onnx.quant.pre_process"  # spares us a warning about shapes we have inferred


@dataclass(frozen=True, slots=True)
class Quantised:
    """What was done: the weights by name (parameters where the graph says them), and the rest."""

    method: Method
    bits: int
    block: int | None
    weights: tuple[str, ...]
    kept: tuple[str, ...]  # matrices that are still float32


def quantise(
    source: Path, out: Path, *, bits: int = 8, method: Method = "nbits", block: int = 32
) -> Quantised:
    """Write the graph with quantised weights; says which.

    `dynamic`: onnxruntime's int8 with activations quantised as they come (8 bits only; the one
    that is faster on CPUs). `nbits`: weights alone, in blocks along the input axis, symmetric
    (`MatMulNBits` of com.microsoft). `qdq`: weights alone, standard operators: int8 with a scale
    for each output channel, int4 in blocks (opset 21).
    """
    if bits not in (4, 8):
        raise error("usage", f"weights of {bits} bits: 8 and 4 are possible")
    if method == "dynamic" and bits != 8:
        raise error("usage", "dynamic quantisation has 8 bits; for 4 take nbits or qdq")
    if block < SMALLEST_BLOCK or block & (block - 1):
        raise error("usage", f"a block of {block}: a power of two from {SMALLEST_BLOCK} on")
    model, beside = graph_files.read(source)
    if method == "qdq" and bits == 4 and graph_files.opset(model) < OPSET_OF_INT4:
        raise error(
            "usage",
            f"{shown(source.name)} has opset {graph_files.opset(model)} and 4-bit QDQ needs "
            f"{OPSET_OF_INT4}: export with --opset {OPSET_OF_INT4}, or take nbits",
        )
    switched = _switched(model)
    before = set(matrices(model))
    entries = graph_files.props(model)
    turned: dict[str, str] = {}
    match method:
        case "dynamic":
            model, names = _dynamic(model, out)
        case "nbits":
            turned = _without_gemm(model)
            entries = graph_files.props(model)
            model, names = _nbits(model, bits, block)
        case "qdq":
            names = _qdq(model, bits, block)
    if not names:
        raise error("graph_changed", f"{shown(source.name)} has no float32 matrix to quantise")
    model.graph.initializer.extend(switched)
    how = f"{method}-int{bits}" + (f"-block{block}" if method == "nbits" or bits == 4 else "")
    graph_files.set_props(model, entries | {"loratools.quantisation": how})
    said = graph_files.sidecar(model)
    graph_files.remove_unused(model)
    graph_files.renamed_sidecar(model, names)
    graph_files.write(model, out, external=beside)

    def parameter(name: str) -> str:
        return said[name][0] if name in said else name

    blocked = block if method == "nbits" or (method == "qdq" and bits == 4) else None
    done = {parameter(turned.get(name, name)) for name in names}
    kept = {parameter(name) for name in before} - done
    return Quantised(method, bits, blocked, tuple(sorted(done)), tuple(sorted(kept)))


def matrices(model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    """The float32 initialisers of two dimensions or more, by name."""
    return {
        t.name: numpy_helper.to_array(t)
        for g in graph_files.graphs(model.graph)
        for t in g.initializer
        if t.data_type == TensorProto.FLOAT and len(t.dims) >= 2
    }


def _switched(model: onnx.ModelProto) -> list[TensorProto]:
    """Takes out the initialisers that a caller may override, and gives them back to be put in.

    To a quantiser they are inputs then, which they are: packs bring them as they are. Where every
    matrix is listed among the inputs, that is an exporter's habit and no offer.
    """
    given = {v.name for v in model.graph.input}
    every = [t for t in model.graph.initializer if len(t.dims) >= 2 and 0 not in t.dims]
    if model.ir_version < IR_OF_CONSTANTS or all(t.name in given for t in every):
        full = {t.name for t in model.graph.initializer if 0 not in t.dims}
        kept_inputs = [v for v in model.graph.input if v.name not in full]
        del model.graph.input[:]
        model.graph.input.extend(kept_inputs)
        model.ir_version = max(model.ir_version, IR_OF_CONSTANTS)
        given -= full
    found = [t for t in model.graph.initializer if t.name in given]
    kept = [t for t in model.graph.initializer if t.name not in given]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return found


# ------------------------------------------------------------------------------ onnxruntime's own


def _dynamic(model: onnx.ModelProto, out: Path) -> tuple[onnx.ModelProto, dict[str, str]]:
    """onnxruntime's `quantize_dynamic`, int8 weights with a scale for each output channel."""
    with graph_files.quiet():
        from onnxruntime.quantization import (  # type: ignore[import-untyped]
            QuantType,
            quantize_dynamic,
        )

    model.metadata_props.add(key=PREPROCESSED, value="onnxruntime.quant")
    before = matrices(model)
    fresh = out.with_name(f"{out.name}.quantising")
    try:
        with graph_files.quiet():
            quantize_dynamic(
                model,
                fresh,
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
                # what onnx cannot infer is what onnxruntime's operators give in a fused graph
                extra_options={"DefaultTensorType": TensorProto.FLOAT},
            )
        made, _ = graph_files.read(fresh)
    finally:
        for left in (fresh, fresh.with_name(f"{fresh.name}.data")):
            left.unlink(missing_ok=True)
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    there = {t.name for t in made.graph.initializer}
    return made, {n: f"{n}_quantized" for n in before if f"{n}_quantized" in there}


def _nbits(model: onnx.ModelProto, bits: int, block: int) -> tuple[onnx.ModelProto, dict[str, str]]:
    """onnxruntime's `MatMulNBitsQuantizer` on every MatMul and Gemm by a constant matrix."""
    with graph_files.quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import (  # type: ignore[import-untyped]
            MatMulNBitsQuantizer,
        )

    before = matrices(model)
    quantiser = MatMulNBitsQuantizer(
        model, bits=bits, block_size=block, is_symmetric=True, op_types_to_quantize=("MatMul",)
    )
    with graph_files.quiet():
        quantiser.process()
    made: onnx.ModelProto = quantiser.model.model
    there = {t.name for t in made.graph.initializer}
    return made, {n: f"{n}_Q{bits}" for n in before if f"{n}_Q{bits}" in there}


def _without_gemm(model: onnx.ModelProto) -> dict[str, str]:
    """Gemm by a constant matrix as MatMul and Add, which the quantiser knows; turned → original."""
    constants = {t.name: t for t in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    turned: dict[str, str] = {}
    for node in model.graph.node:
        said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = said.get("alpha", 1.0) == said.get("beta", 1.0) == 1.0 and not said.get("transA", 0)
        if node.op_type != "Gemm" or node.input[1] not in constants or not plain:
            nodes.append(node)
            continue
        weight = node.input[1]
        if said.get("transB", 0):
            fresh = f"{weight}_transposed"
            if fresh not in constants:
                array = np.ascontiguousarray(numpy_helper.to_array(constants[weight]).T)
                constants[fresh] = numpy_helper.from_array(array, fresh)
                model.graph.initializer.append(constants[fresh])
                turned[fresh] = weight
            weight = fresh
        biased = len(node.input) > 2 and bool(node.input[2])
        product = f"{node.output[0]}_product" if biased else node.output[0]
        nodes.append(
            helper.make_node("MatMul", [node.input[0], weight], [product], f"{node.name}_m")
        )
        if biased:
            summed = [product, node.input[2]]
            nodes.append(helper.make_node("Add", summed, [node.output[0]], f"{node.name}_a"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    said_of = graph_files.sidecar(model)
    both = said_of | {
        t: (said_of[w][0], not said_of[w][1]) for t, w in turned.items() if w in said_of
    }
    graph_files.set_sidecar(model, both)
    return turned


# --------------------------------------------------------------------------- DequantizeLinear


def _qdq(model: onnx.ModelProto, bits: int, block: int) -> dict[str, str]:
    """Every constant matrix of MatMul, Gemm and Conv behind a DequantizeLinear; activations stay.

    8 bits: int8, q = round(w / s), s = max|w| / 127 for each output channel. 4 bits (MatMul and
    Gemm): int4, s = max|w| / 7 for each block of the input axis.
    """
    constants = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    made: dict[tuple[str, int], str] = {}
    names: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        axis = _input_axis(node, constants[name].dims) if name in constants else None
        if axis is not None and not (bits == 4 and node.op_type == "Conv"):
            key = name, axis
            if key not in made:
                stem = name if name not in names else f"{name}_{axis}"
                names.setdefault(name, f"{stem}_Q{bits}")
                made[key] = f"{stem}_dequantised"
                array = numpy_helper.to_array(constants[name])
                turned = _one_each(array, axis) if bits == 8 else _blocks(array, axis, block)
                q, scales, attributes = turned
                q.name, scales.name = f"{stem}_Q{bits}", f"{stem}_scales"
                model.graph.initializer.extend([q, scales])
                inputs, outputs = [q.name, scales.name], [made[key]]
                nodes.append(_node("DequantizeLinear", inputs, outputs, made[key], attributes))
            node.input[1] = made[key]
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if bits == 4:
        model.ir_version = max(model.ir_version, IR_OF_INT4)
    return names


def _input_axis(node: onnx.NodeProto, dims: Sequence[int]) -> int | None:
    """Along which axis a node sums over its weight; None where it is no matrix of ours."""
    match node.op_type:
        case "MatMul" if len(dims) == 2:
            return 0
        case "Gemm":
            said = {a.name: a.i for a in node.attribute}
            return 1 if said.get("transB", 0) else 0
        case "Conv":
            return 1
    return None


def _one_each(
    array: NDArray[np.float32], axis: int
) -> tuple[TensorProto, TensorProto, dict[str, int]]:
    """int8 with one scale for each output channel."""
    channel = 0 if axis == 1 else 1
    others = tuple(i for i in range(array.ndim) if i != channel)
    scales = np.abs(array).max(axis=others, keepdims=True).astype(np.float32) / np.float32(127)
    scales[scales == 0] = 1
    q = np.clip(np.rint(array / scales), -127, 127).astype(np.int8)
    return (
        numpy_helper.from_array(q),
        numpy_helper.from_array(scales.reshape(-1)),
        {"axis": channel},
    )


def _blocks(
    array: NDArray[np.float32], axis: int, block: int
) -> tuple[TensorProto, TensorProto, dict[str, int]]:
    """int4 with one scale for each block of the input axis."""
    rows = np.moveaxis(array, axis, 0)
    count = -(-rows.shape[0] // block)
    padded = np.zeros((count * block, rows.shape[1]), np.float32)
    padded[: rows.shape[0]] = rows
    cut = padded.reshape(count, block, rows.shape[1])
    scales = np.abs(cut).max(axis=1).astype(np.float32) / np.float32(7)
    scales[scales == 0] = 1
    q = np.clip(np.rint(cut / scales[:, None]), -7, 7).astype(np.int8)
    whole = np.moveaxis(q.reshape(count * block, -1)[: rows.shape[0]], 0, axis)
    nibbles = whole.reshape(-1).astype(np.uint8) & 0xF
    nibbles = np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8))
    tensor = TensorProto(data_type=TensorProto.INT4, dims=array.shape)
    tensor.raw_data = (nibbles[0::2] | nibbles[1::2] << 4).tobytes()
    turned = np.ascontiguousarray(np.moveaxis(scales, 0, axis))
    return tensor, numpy_helper.from_array(turned), {"axis": axis, "block_size": block}


def _node(
    kind: str, inputs: list[str], outputs: list[str], name: str, attributes: dict[str, int]
) -> onnx.NodeProto:
    node = helper.make_node(kind, inputs, outputs, name)
    node.attribute.extend(helper.make_attribute(k, v) for k, v in sorted(attributes.items()))
    return node
