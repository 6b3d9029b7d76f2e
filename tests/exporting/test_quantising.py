"""Quantised graphs against the float32 ones, in onnxruntime."""

import numpy as np
import onnx
import pytest

from loratools.errors import RefusedError, UsageError
from loratools.exporting.quantising import quantise
from tests.exporting.graphs_run import (
    MAKERS,
    close,
    mlp,
    outputs,
    session,
    sidecar,
    with_external_data,
)

WAYS = [("dynamic", 8, 0.98), ("nbits", 8, 0.999), ("nbits", 4, 0.95), ("qdq", 8, 0.999)]


@pytest.mark.parametrize(("method", "bits", "cosine"), WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_a_quantised_graph_says_nearly_the_same(name, method, bits, cosine, tmp_path):
    path, out = tmp_path / "m.onnx", tmp_path / "q.onnx"
    feeds = MAKERS[name](path)
    done = quantise(path, out, bits=bits, method=method)
    onnx.checker.check_model(out)
    before, after = session(path), session(out)
    for old, new in ((before.get_inputs(), after.get_inputs()),
                     (before.get_outputs(), after.get_outputs())):  # fmt: skip
        assert [(v.name, v.type, v.shape) for v in old] == [(v.name, v.type, v.shape) for v in new]
    first = before.run(None, feeds)[0][1:]  # the first row of a batch is padded
    assert close(first, after.run(None, feeds)[0][1:]) > cosine
    proj = {"mlp": "mid.weight", "llama": "model.layers.1.mlp.down_proj.weight",
            "bert": "encoder.layer.1.output.dense.weight"}[name]  # fmt: skip
    assert proj in done.weights
    assert not set(done.weights) & set(done.kept)
    written = onnx.load(out)
    there = {t.name for t in written.graph.initializer}
    said = sidecar(out)
    assert set(said) <= there
    assert {where[0] for where in said.values()} >= set(done.weights)
    entries = {p.key: p.value for p in written.metadata_props}
    assert entries["loratools.quantisation"].startswith(f"{method}-int{bits}")
    bytes_of = out.read_bytes()
    assert str(tmp_path).encode() not in bytes_of
    quantise(path, out, bits=bits, method=method)
    assert out.read_bytes() == bytes_of
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "m.onnx", "q.onnx"]


@pytest.mark.parametrize("block", [16, 32, 128])
def test_four_bits_by_the_standard_operators(block, tmp_path):
    path, out = tmp_path / "m.onnx", tmp_path / "q.onnx"
    feeds = mlp(path, opset=18)
    with pytest.raises(UsageError, match="opset 21"):
        quantise(path, out, bits=4, method="qdq")
    model = onnx.load(path)
    model = onnx.version_converter.convert_version(model, 21)
    onnx.save(model, path)
    done = quantise(path, out, bits=4, method="qdq", block=block)
    assert done.block == block
    assert set(done.weights) == {"up.weight", "mid.weight", "down.weight"}
    onnx.checker.check_model(out)
    assert close(outputs(path, feeds)[0], outputs(out, feeds)[0]) > 0.97


def test_data_beside_the_graph_stay_beside_it(tmp_path):
    path = tmp_path / "m.onnx"
    feeds = mlp(path)
    outside = with_external_data(path, tmp_path / "big" / "model.onnx")
    for method, bits, _ in WAYS:
        quantise(outside, tmp_path / "q.onnx", bits=bits, method=method)
        quantise(path, tmp_path / "whole.onnx", bits=bits, method=method)
        assert (tmp_path / "q.onnx.data").exists()
        np.testing.assert_array_equal(
            *(outputs(tmp_path / n, feeds)[0] for n in ("q.onnx", "whole.onnx"))
        )


@pytest.mark.parametrize("ir", [3, 8])
@pytest.mark.parametrize(("method", "bits", "cosine"), WAYS)
def test_weights_that_an_exporter_lists_among_the_inputs(method, bits, cosine, ir, tmp_path):
    """As `keep_initializers_as_inputs` has it, and all graphs before IR 4 had to."""
    path, listed, out = (tmp_path / f"{n}.onnx" for n in "mlo")
    feeds = mlp(path)
    model = onnx.load(path)
    for one in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(one.name, 1, one.dims))
    model.ir_version = ir
    onnx.save(model, listed)
    done = quantise(listed, out, bits=bits, method=method)
    assert {"up.weight", "mid.weight"} <= set(done.weights)
    onnx.checker.check_model(out)
    assert {v.name for v in session(out).get_inputs()} == {"x"}
    assert close(outputs(path, feeds)[0], outputs(out, feeds)[0]) > cosine


@pytest.mark.parametrize(
    "asked", [{"bits": 3}, {"bits": 4, "method": "dynamic"}, {"block": 24}, {"block": 8}]
)
def test_what_cannot_be_is_a_usage_error(asked, tmp_path):
    mlp(tmp_path / "m.onnx")
    with pytest.raises(UsageError):
        quantise(tmp_path / "m.onnx", tmp_path / "q.onnx", **asked)


def test_a_graph_without_float32_matrices_is_refused(tmp_path):
    mlp(tmp_path / "m.onnx")
    quantise(tmp_path / "m.onnx", tmp_path / "q.onnx", bits=4)
    with pytest.raises(RefusedError, match="no float32 matrix"):
        quantise(tmp_path / "q.onnx", tmp_path / "again.onnx", bits=4)


@pytest.mark.parametrize(("method", "bits", "cosine"), WAYS)
def test_nothing_is_said_by_the_way(method, bits, cosine, tmp_path, capfd):
    import logging

    mlp(tmp_path / "m.onnx")
    before = logging.root.level, list(logging.root.handlers)
    capfd.readouterr()
    quantise(tmp_path / "m.onnx", tmp_path / "q.onnx", bits=bits, method=method)
    assert capfd.readouterr() == ("", "")
    assert (logging.root.level, logging.root.handlers) == before
