"""Latencies beside each other: whose call is timed, what is kept of it, and the table."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from loratools import LoratoolsError
from loratools.proving import latency
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


@pytest.fixture
def clock(monkeypatch):
    """Calls take what the test says: how long a machine takes is no fact to assert."""

    def scripted(*seconds):
        ticks = iter([tick for one in seconds for tick in (0.0, one)])
        monkeypatch.setattr(latency.time, "perf_counter", lambda: next(ticks))

    return scripted


def test_the_least_of_rounds_in_turn_and_ratios_to_the_first(tmp_path, clock):
    graphs = {"one": stack(tmp_path / "one.onnx", 1), "eight": stack(tmp_path / "8.onnx", 8)}
    feeds = {"x": np.ones((64, 192), np.float32)}
    # Two calls of each graph in each of three rounds; the second round begins with the second.
    clock(0.3, 0.2, 0.9, 0.8, 0.7, 1.6, 0.1, 0.4, 0.4, 0.3, 0.9, 0.5)
    one, eight = measure(graphs, feeds, 3, calls=2)
    assert (one.name, one.rounds, one.seconds) == ("one", (0.2, 0.1, 0.3), 0.1)
    assert (eight.name, eight.rounds, eight.seconds) == ("eight", (0.8, 0.7, 0.5), 0.5)
    assert (one.ratio, eight.ratio) == (1, 5)
    assert one.spread == pytest.approx(1)
    assert eight.spread == pytest.approx(0.4)
    assert table((one, eight)) == [
        "one      100.000 ms  +100%  x1.00",
        "eight    500.000 ms  +40%  x5.00",
    ]
    assert set(one.as_json()) == {"seconds", "spread", "ratio"}


def test_calls_are_timed_by_a_clock_that_runs(tmp_path):
    found = measure({"one": stack(tmp_path / "one.onnx", 1)}, {"x": np.ones((9, 192), "f")}, 2)
    assert 0 < found[0].seconds == min(found[0].rounds)
    assert found[0].spread >= 0


def test_feeds_may_be_of_each_graph_and_bound(tmp_path):
    paths = {n: stack(tmp_path / f"{n}.onnx", 1, n) for n in (16, 24)}
    few, many = (np.ones((2, n), np.float32) for n in paths)
    graphs = {"few": Timed(paths[16]), "many": paths[24], "bound": Timed(paths[16], bind=True)}
    feeds = {"few": {"x": few}, "many": {"x": many}, "bound": {"x": few}}
    assert [row.name for row in measure(graphs, feeds, 2, calls=2)] == ["few", "many", "bound"]
    with pytest.raises(InvalidArgument, match="Expected: 24"):  # onnxruntime: it got the other's
        measure(graphs, feeds | {"many": {"x": few}}, 1, calls=1)


@pytest.mark.parametrize(
    ("graphs", "feeds", "rounds"),
    [({}, {}, 1), ({"a": "a.onnx"}, {}, 0), ({"a": "a.onnx", "b": "b.onnx"}, {"a": {}}, 1)],
)
def test_nothing_to_measure_is_a_mistake(graphs, feeds, rounds):
    with pytest.raises(LoratoolsError) as caught:
        measure(graphs, feeds, rounds)
    assert caught.value.code == "usage"
