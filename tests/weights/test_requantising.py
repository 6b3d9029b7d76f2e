"""Weights of quantised graphs, against what onnxruntime computes with them and makes of them."""

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from loratools.errors import MalformedError, RefusedError
from loratools.exporting.quantising import quantise
from loratools.weights.requantising import Stored, dequantise, requantise
from tests.exporting.graphs_run import outputs

NAMES = {TensorProto.FLOAT: "F32", TensorProto.FLOAT16: "F16", TensorProto.UINT8: "U8",
         TensorProto.INT8: "I8", TensorProto.INT4: "I4", TensorProto.UINT4: "U4",
         TensorProto.DOUBLE: "F64"}  # fmt: skip


@dataclass(frozen=True)
class Node:
    op_type: str
    name: str
    inputs: tuple[str, ...]
    attributes: MappingProxyType


def drawn(seed, rows=72, columns=10):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def product(path, weight):
    """y = x @ weight, opset 21."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", k])
            for n, k in (("x", weight.shape[0]), ("y", weight.shape[1]))]  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")], "g", ends[:1], ends[1:],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def held(path):
    """The node with the weight, and its initialisers."""
    graph = onnx.load(path).graph
    node = next(n for n in graph.node if n.op_type in ("MatMulNBits", "DequantizeLinear"))
    stored = {
        t.name: Stored(NAMES[t.data_type], tuple(t.dims), t.raw_data) for t in graph.initializer
    }
    said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return Node(node.op_type, node.name, tuple(node.input), MappingProxyType(said)), stored


def asymmetric(source, out, bits, block=32, **options):
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(
        onnx.load(source), bits=bits, block_size=block, is_symmetric=False, **options
    )
    made.process()
    out.write_bytes(made.model.model.SerializeToString())


def half_scales(source, out):
    """MatMulNBits of float16: what quantising a float16 graph gives."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(
            numpy_helper.to_array(tensor).astype(np.float16), tensor.name))  # fmt: skip
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    source.with_suffix(".half").write_bytes(model.SerializeToString())
    asymmetric(source.with_suffix(".half"), out, 4)


def qdq_of_onnxruntime(source, out, *, symmetric):
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(
        onnx.load(source), block_size=32, is_symmetric=symmetric, quant_format=QuantFormat.QDQ
    )
    made.process()
    out.write_bytes(made.model.model.SerializeToString())


WAYS = {
    "nbits-4": lambda s, o: quantise(s, o, bits=4, method="nbits"),
    "nbits-8": lambda s, o: quantise(s, o, bits=8, method="nbits"),
    "nbits-4-block-16": lambda s, o: quantise(s, o, bits=4, method="nbits", block=16),
    "nbits-4-block-128": lambda s, o: quantise(s, o, bits=4, method="nbits", block=128),
    "nbits-4-zeros": lambda s, o: asymmetric(s, o, 4),
    "nbits-8-zeros": lambda s, o: asymmetric(s, o, 8),
    "nbits-2-zeros": lambda s, o: asymmetric(s, o, 2),
    "nbits-4-half": half_scales,
    "qdq-8": lambda s, o: quantise(s, o, bits=8, method="qdq"),
    "qdq-4": lambda s, o: quantise(s, o, bits=4, method="qdq"),
    "qdq-4-onnxruntime": lambda s, o: qdq_of_onnxruntime(s, o, symmetric=True),
    "qdq-4-onnxruntime-zeros": lambda s, o: qdq_of_onnxruntime(s, o, symmetric=False),
}
each_way = pytest.mark.parametrize("way", WAYS)


@each_way
def test_the_weight_is_the_one_that_onnxruntime_multiplies_with(way, tmp_path):
    out = tmp_path / "q.onnx"
    WAYS[way](product(tmp_path / "m.onnx", drawn(1)), out)
    node, stored = held(out)
    weight = dequantise(node, stored)
    assert weight.shape == (72, 10)
    kind = np.float16 if way.endswith("half") else np.float32
    found = outputs(out, {"x": np.eye(72, dtype=kind)})[0]
    np.testing.assert_allclose(found, weight, atol=2e-3 if way.endswith("half") else 1e-6)
    assert requantise(weight, node, stored) == {
        n: stored[n].raw for n in node.inputs if n in stored
    }


@each_way
def test_a_new_weight_gets_the_bytes_that_the_quantiser_gives_it(way, tmp_path):
    for name, seed in (("old", 1), ("new", 2)):
        WAYS[way](product(tmp_path / "m.onnx", drawn(seed)), tmp_path / name)
    node, stored = held(tmp_path / "old")
    _, expected = held(tmp_path / "new")
    weight = drawn(2).astype(np.float16 if way.endswith("half") else np.float32)
    found = requantise(weight.astype(np.float64), node, stored)
    if way.endswith("half"):  # onnxruntime divides by the scale as it was before its rounding
        new = {n: Stored(s.dtype, s.shape, found.get(n, s.raw)) for n, s in stored.items()}
        apart = np.abs(dequantise(node, new) - dequantise(node, expected)).max()
        assert apart <= np.abs(np.frombuffer(expected[node.inputs[2]].raw, np.float16)).max()
    else:
        assert found == {n: expected[n].raw for n in found}
    assert found.keys() == {n for n in node.inputs if n in stored}


@each_way
def test_groups_that_did_not_change_keep_their_bytes(way, tmp_path):
    WAYS[way](product(tmp_path / "m.onnx", drawn(1)), tmp_path / "q.onnx")
    node, stored = held(tmp_path / "q.onnx")
    weight = dequantise(node, stored)
    wanted = weight.copy()
    wanted[3, 4] += 2.5
    found = requantise(wanted, node, stored)
    new = {n: Stored(s.dtype, s.shape, found.get(n, s.raw)) for n, s in stored.items()}
    after = dequantise(node, new)
    moved = (after != weight).any(axis=0)
    assert moved.tolist() == [at == 4 for at in range(10)]
    assert abs(after[3, 4] - wanted[3, 4]) < 1.0
    assert after[3, 4] != weight[3, 4]


def linear(codes, scales, zeros=None, **said):
    """A DequantizeLinear, and what onnx's reference says that it gives."""
    arrays = {"x": codes, "s": scales} | ({} if zeros is None else {"z": zeros})
    stored = {n: Stored(KIND[str(a.dtype)], a.shape, a.tobytes()) for n, a in arrays.items()}
    made = helper.make_node("DequantizeLinear", list(arrays), ["y"], **said)
    graph = helper.make_graph(
        [made], "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, codes.shape)],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    expected = onnx.reference.ReferenceEvaluator(model).run(None, {})[0]
    return Node("DequantizeLinear", "d", tuple(arrays), MappingProxyType(said)), stored, expected


KIND = {"uint8": "U8", "int8": "I8", "float32": "F32"}
DRAW = np.random.default_rng(5)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("shape", "scales", "said"),
    [
        ((6, 4), (), {}),
        ((6, 4), (4,), {"axis": 1}),
        ((6, 4), (6,), {"axis": -2}),
        ((3, 2, 5), (2,), {"axis": 1}),
        ((6, 4), (3, 4), {"axis": 0, "block_size": 2}),
        ((6, 4), (6, 2), {"axis": 1, "block_size": 2}),
    ],
)
def test_every_form_of_dequantizelinear(kind, zeros, shape, scales, said):
    limits = np.iinfo(kind)
    codes = DRAW.integers(limits.min, limits.max, shape, endpoint=True).astype(kind)
    zero = DRAW.integers(limits.min, limits.max, scales, endpoint=True).astype(kind)
    steps = DRAW.uniform(0.01, 0.1, scales).astype(np.float32)
    node, stored, expected = linear(codes, steps, zero if zeros else None, **said)
    weight = dequantise(node, stored)
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    assert requantise(weight, node, stored) == {n: s.raw for n, s in stored.items()}


def test_what_does_not_fit_together_is_refused(tmp_path):
    quantise(product(tmp_path / "m.onnx", drawn(1)), tmp_path / "q.onnx", bits=4)
    node, stored = held(tmp_path / "q.onnx")
    for said in ({"K": 71}, {"K": 500}, {"bits": 3}, {"block_size": 0}, {"N": 11}):
        wrong = Node(node.op_type, "n", node.inputs, MappingProxyType({**node.attributes, **said}))
        if said == {"K": 71}:  # the same number of blocks
            assert dequantise(wrong, stored).shape == (71, 10)
            continue
        with pytest.raises(MalformedError):
            dequantise(wrong, stored)
    with pytest.raises(RefusedError, match="g_idx"):
        dequantise(Node(node.op_type, "n", (*node.inputs, "", "order"), node.attributes), stored)
    with pytest.raises(RefusedError, match="no constant"):
        dequantise(node, {n: s for n, s in stored.items() if "scales" not in n})
    with pytest.raises(RefusedError, match="infinite"):
        requantise(np.full((72, 10), np.inf), node, stored)
