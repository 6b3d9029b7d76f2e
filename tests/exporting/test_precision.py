"""float16 graphs against the float32 ones, in onnxruntime."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from loratools.errors import RefusedError
from loratools.exporting.precision import to_fp16
from tests.exporting.graphs_run import MAKERS, outputs, session, sidecar, with_external_data


@pytest.mark.parametrize("name", MAKERS)
def test_a_float16_graph_says_nearly_the_same(name, tmp_path):
    path, out = tmp_path / "m.onnx", tmp_path / "half.onnx"
    feeds = MAKERS[name](path)
    to_fp16(path, out)
    onnx.checker.check_model(out)
    before, after = session(path), session(out)
    for old, new in ((before.get_inputs(), after.get_inputs()),
                     (before.get_outputs(), after.get_outputs())):  # fmt: skip
        assert [(v.name, v.type, v.shape) for v in old] == [(v.name, v.type, v.shape) for v in new]
    for a, b in zip(before.run(None, feeds), after.run(None, feeds), strict=True):
        assert b.dtype == a.dtype
        np.testing.assert_allclose(a[1:], b[1:], atol=2e-2)  # the first row of a batch is padded
    kinds = {t.data_type for t in onnx.load(out).graph.initializer if len(t.dims) == 2}
    assert kinds == {TensorProto.FLOAT16}
    assert sidecar(out) == sidecar(path)
    first = out.read_bytes()
    to_fp16(path, out)
    assert out.read_bytes() == first
    assert str(tmp_path).encode() not in first


def test_data_beside_the_graph_stay_beside_it(tmp_path):
    path = tmp_path / "m.onnx"
    feeds = MAKERS["mlp"](path)
    outside = with_external_data(path, tmp_path / "big" / "model.onnx")
    out = tmp_path / "half.onnx"
    to_fp16(outside, out)
    assert (tmp_path / "half.onnx.data").stat().st_size > 10_000 > out.stat().st_size
    to_fp16(path, tmp_path / "whole.onnx")
    np.testing.assert_array_equal(*(outputs(p, feeds)[0] for p in (out, tmp_path / "whole.onnx")))


def one_weight(path, values, *, filler=-1.0):
    """y = (x + filler) @ w."""
    values = np.array(values, np.float32).reshape(-1, 1)
    constants = [
        numpy_helper.from_array(values, "proj.weight"),
        numpy_helper.from_array(np.float32(filler), "filler"),
    ]
    nodes = [
        helper.make_node("Add", ["x", "filler"], ["s"]),
        helper.make_node("MatMul", ["s", "proj.weight"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", k])
            for n, k in (("x", len(values)), ("y", 1))]  # fmt: skip
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    path.write_bytes(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10
        ).SerializeToString()
    )
    return path


@pytest.mark.parametrize("worst", [70000.0, -65520.0, 3e38])
def test_a_weight_beyond_float16_is_refused_by_name(worst, tmp_path):
    path = one_weight(tmp_path / "m.onnx", [1.0, worst])
    with pytest.raises(RefusedError, match=r"proj\.weight: 1 of 2") as refused:
        to_fp16(path, tmp_path / "half.onnx")
    assert refused.value.code == "overflow"
    assert not (tmp_path / "half.onnx").exists()


def test_numbers_that_fit_and_fillers_of_masks_are_taken(tmp_path):
    lowest = float(np.finfo(np.float32).min)
    for filler in (lowest, -np.inf, 0.5):
        path = one_weight(tmp_path / "m.onnx", [1.0, 65504.0, -65519.0], filler=filler)
        to_fp16(path, tmp_path / "half.onnx")
        (said,) = outputs(tmp_path / "half.onnx", {"x": np.zeros((1, 3), np.float32)})
        assert said.shape == (1, 1)
    with pytest.raises(RefusedError, match="filler"):
        to_fp16(one_weight(path, [1.0], filler=1e6), tmp_path / "half.onnx")
