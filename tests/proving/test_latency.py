"""Latencies beside each other: a graph of twice the work takes longer, and the table says so."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from loratools import LoratoolsError
from loratools.proving.latency import Timed, measure, table


def stack(path, depth, size=192):
    """`depth` products and a Relu each."""
    draw = np.random.default_rng(0)
    nodes, weights, at = [], [], "x"
    for n in range(depth):
        weight = (draw.normal(size=(size, size)) / size**0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{n}"))
        nodes.append(helper.make_node("MatMul", [at, f"w{n}"], [f"m{n}"]))
        nodes.append(helper.make_node("Relu", [f"m{n}"], [f"r{n}"]))
        at = f"r{n}"
    made = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", size])],
        [helper.make_tensor_value_info(at, TensorProto.FLOAT, ["n", size])],
        weights,
    )
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(made, opset_imports=[opset], ir_version=10), path)
    return path


def test_more_work_takes_longer_and_ratios_are_to_the_first(tmp_path):
    graphs = {"one": stack(tmp_path / "one.onnx", 1), "eight": stack(tmp_path / "8.onnx", 8)}
    feeds = {"x": np.ones((64, 192), np.float32)}
    found = measure(graphs, feeds, 4, calls=10)
    assert [row.name for row in found] == ["one", "eight"]
    one, eight = found
    assert one.ratio == 1
    assert eight.ratio == eight.seconds / one.seconds
    assert eight.ratio > 2
    assert all(len(row.rounds) == 4 and min(row.rounds) == row.seconds for row in found)
    assert all(row.spread >= 0 for row in found)
    lines = table(found)
    assert len(lines) == 2
    assert lines[1].endswith(f"x{eight.ratio:.2f}")
    assert set(one.as_json()) == {"seconds", "spread", "ratio"}


def test_feeds_may_be_of_each_graph_and_bound(tmp_path):
    path = stack(tmp_path / "one.onnx", 1, 16)
    few, many = (np.ones((n, 16), np.float32) for n in (1, 400))
    graphs = {"few": Timed(path), "many": path, "bound": Timed(path, bind=True)}
    found = measure(graphs, {"few": {"x": few}, "many": {"x": many}, "bound": {"x": few}}, 2)
    assert found[1].ratio > 1


@pytest.mark.parametrize(
    ("graphs", "feeds", "rounds"),
    [({}, {}, 1), ({"a": "a.onnx"}, {}, 0), ({"a": "a.onnx", "b": "b.onnx"}, {"a": {}}, 1)],
)
def test_nothing_to_measure_is_a_mistake(graphs, feeds, rounds):
    with pytest.raises(LoratoolsError) as caught:
        measure(graphs, feeds, rounds)
    assert caught.value.code == "usage"
