"""onnxruntime is the judge: it reads what we write, we read what it writes, its graphs run."""

import numpy as np
import onnx
import onnxruntime as ort
import peft
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from loratools.adapter import Adapter, Dense, Leaf, LowRank, Renormed, Replace
from loratools.containers import flatbuffer
from loratools.containers.bundle import local
from loratools.containers.local import LocalFile
from loratools.formats import onnx_adapter

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
DTYPES = {"F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def by_onnxruntime(path):
    file = ort.AdapterFormat.read_adapter(str(path))
    # The arrays lie in the memory of the file, which goes when this returns.
    found = {k: v.numpy().copy() for k, v in file.get_parameters().items()}
    return found, file.get_adapter_version(), file.get_model_version()


def exported(path, parameters, adapter=1, model=2):
    file = ort.AdapterFormat()
    file.set_adapter_version(adapter)
    file.set_model_version(model)
    values = {k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in parameters.items()}
    file.set_parameters(values)
    file.export_adapter(str(path))
    return path


def drawn(*shape, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw).to(dtype)


def pair(seed, out, inside, rank, scaling=1.0, dtype=torch.float32):
    a, b = drawn(rank, inside, seed=seed, dtype=dtype), drawn(out, rank, seed=-seed, dtype=dtype)
    return LowRank(Leaf.of("a", a), Leaf.of("b", b), scaling)


def update(delta):
    return delta.scaling * (delta.b.tensor().double() @ delta.a.tensor().double())


@pytest.mark.parametrize("count", [0, 1, 7])
def test_onnxruntime_reads_every_parameter_that_is_written(count, tmp_path):
    tensors = {
        f"layer.{i}.é{'x' * i}": drawn(*range(1, 2 + i % 4), i, seed=i, dtype=dtype)
        for i in range(count)
        for dtype in [list(DTYPES.values())[i % 3]]
    }
    path = tmp_path / "made.onnx_adapter"
    flatbuffer.write(
        path, {k: Leaf.of(k, t) for k, t in tensors.items()}, adapter_version=7, model_version=9
    )
    found, *versions = by_onnxruntime(path)
    assert versions == [7, 9]
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.numpy().dtype
        assert np.array_equal(found[name], tensor.numpy())
    ort.LoraAdapter().Load(str(path))
    again = flatbuffer.read(LocalFile(path))
    assert (again.adapter_version, again.model_version) == (7, 9)
    assert {k: leaf.shape for k, leaf in again.leaves.items()} == {
        k: tuple(t.shape) for k, t in tensors.items()
    }
    assert all(torch.equal(again.leaves[k].tensor(), t) for k, t in tensors.items())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_onnxruntime_writes_is_read(dtype, tmp_path):
    factors = {
        f"{Q}.lora_A.weight": drawn(6, 2).numpy().astype(dtype),
        f"{Q}.lora_B.weight": drawn(2, 4).numpy().astype(dtype),
    }
    path = exported(tmp_path / "made.onnx_adapter", factors)
    bundle = local(path)
    assert onnx_adapter.detect(bundle)
    assert onnx_adapter.detect(local(tmp_path))
    adapter = onnx_adapter.read(bundle, assume={})
    assert adapter.problems == ()
    assert adapter.metadata == {"adapter_version": "1", "model_version": "2"}
    [delta] = adapter.deltas.values()
    a, b = factors.values()
    assert np.array_equal(delta.a.tensor().numpy(), a.T)
    assert np.array_equal(delta.b.tensor().numpy(), b.T)
    assert delta.scaling == 1
    onnx_adapter.write(adapter, tmp_path / "again.onnx_adapter")
    found, *versions = by_onnxruntime(tmp_path / "again.onnx_adapter")
    assert versions == [1, 2]
    assert found.keys() == factors.keys()
    assert all(np.array_equal(found[k], v) and found[k].dtype == dtype for k, v in factors.items())


def graph(path, weight, name_a, name_b):
    """y = x·W + x·A·B, whose factors may be given from outside; without them it is the base."""
    inside, out = weight.shape
    made = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W"], ["xw"]),
            helper.make_node("MatMul", ["x", name_a], ["xa"]),
            helper.make_node("MatMul", ["xa", name_b], ["xab"]),
            helper.make_node("Add", ["xw", "xab"], ["y"]),
        ],
        "linear",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inside]),
            helper.make_tensor_value_info(name_a, TensorProto.FLOAT, [inside, "r"]),
            helper.make_tensor_value_info(name_b, TensorProto.FLOAT, ["r", out]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", out])],
        [
            numpy_helper.from_array(weight, "W"),
            numpy_helper.from_array(np.zeros((inside, 0), np.float32), name_a),
            numpy_helper.from_array(np.zeros((0, out), np.float32), name_b),
        ],
    )
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(made, opset_imports=[opset], ir_version=10), path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_graph_runs_with_it_as_peft_computes(dtype, tmp_path):
    """The scaling is in B; a graph of float32 takes adapters that were narrower."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
    config = peft.LoraConfig(target_modules=["0"], r=3, lora_alpha=7, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    layer = model.base_model.model[0]
    for side in (layer.lora_A, layer.lora_B):
        side["default"].weight.data = side["default"].weight.data.to(dtype).float()
    a, b = (s["default"].weight.data for s in (layer.lora_A, layer.lora_B))
    delta = LowRank(Leaf.of("a", a.to(dtype)), Leaf.of("b", b.to(dtype)), 7 / 3, 7)
    adapter = Adapter(deltas={"0.weight": delta})
    assert onnx_adapter.lost(adapter) == []
    path = tmp_path / "one.onnx_adapter"
    onnx_adapter.write(adapter, path)
    weight = layer.base_layer.weight.detach().numpy().T.copy()
    graph(tmp_path / "graph.onnx", weight, "0.lora_A.weight", "0.lora_B.weight")
    session = ort.InferenceSession(str(tmp_path / "graph.onnx"))
    x = drawn(5, 6, seed=3)
    loaded, options = ort.LoraAdapter(), ort.RunOptions()
    loaded.Load(str(path))
    options.add_active_adapter(loaded)
    [base] = session.run(None, {"x": x.numpy()})
    [found] = session.run(None, {"x": x.numpy()}, options)
    assert np.abs(found - base).max() > 0.1
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-5)


ROUND = {
    "one dtype": ([("F16", 1.0), ("F16", 1.0)], "F16"),
    "a scaling": ([("F16", 1.0), ("F16", 0.3)], "F32"),
    "two dtypes": ([("F16", 1.0), ("F32", 1.0)], "F32"),
    "double": ([("F64", 0.3), ("F16", 1.0)], "F64"),
}


@pytest.mark.parametrize("row", ROUND)
def test_one_dtype_for_all_and_nothing_is_rounded(row, tmp_path):
    sorts, dtype = ROUND[row]
    deltas = {
        f"{m}.weight": pair(i + 1, 4, 6, 2 + i, s, DTYPES[word])
        for i, (m, (word, s)) in enumerate(zip((Q, V), sorts, strict=True))
    }
    path = tmp_path / "made.onnx_adapter"
    onnx_adapter.write(Adapter(deltas=deltas), path)
    found, *_ = by_onnxruntime(path)
    assert set(found) == {f"{m}.lora_{x}.weight" for m in (Q, V) for x in "AB"}
    assert {v.dtype for v in found.values()} == {drawn(1, dtype=DTYPES[dtype]).numpy().dtype}
    again = onnx_adapter.read(local(path), assume={})
    for key, delta in deltas.items():
        torch.testing.assert_close(update(again.deltas[key]), update(delta), rtol=1e-6, atol=1e-7)


def test_names_of_the_graph_come_back_and_what_is_no_pair_is_named(tmp_path):
    genai = "model.layers.0.attn.q_proj.lora_{}.MatMul.weight"
    factors = {genai.format("A"): drawn(6, 2).numpy(), genai.format("B"): drawn(2, 4).numpy()}
    path = exported(tmp_path / "made.onnx_adapter", factors)
    adapter = onnx_adapter.read(local(path), assume={})
    assert set(adapter.deltas) == {f"{Q}.weight"}
    vector, one = Leaf.of("v", torch.zeros(4)), pair(1, 4, 6, 2)
    more = {
        f"{V}.weight": Renormed(one, vector),
        f"{V}.bias": Dense(vector),
        "lm_head.weight": Replace(Leaf.of("w", torch.zeros(9, 4))),
        "model.embed_tokens.weight": one,
        "conv.weight": LowRank(Leaf.of("a", torch.zeros(2, 6, 3)), one.b, 1.0),
    }
    wider = Adapter(
        deltas={**adapter.deltas, **more},
        config=adapter.config,
        transposed=frozenset({"model.embed_tokens.weight"}),
    )
    assert {p.target for p in onnx_adapter.lost(wider)} == set(more)
    onnx_adapter.write(wider, tmp_path / "again.onnx_adapter")
    assert by_onnxruntime(tmp_path / "again.onnx_adapter")[0].keys() == factors.keys()


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    adapter = Adapter(deltas={f"{m}.weight": pair(3, 4, 6, 2, 0.3) for m in (Q, V)})
    digests = {onnx_adapter.write(adapter, tmp_path / n)[n] for n in ("one", "two")}
    assert len(digests) == 1
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
