"""A fold into a quantised graph is what quantising the folded float graph gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from loratools.commands.check import check
from loratools.commands.merge import merge
from loratools.commands.verify import verify
from loratools.errors import LoratoolsError
from loratools.exporting.quantising import quantise
from tests.exporting import graph_bases as bases
from tests.exporting.graphs_run import outputs
from tests.exporting.test_graph_fold import graph_of, lora, product, refused, update, weight

HOLDERS = {"MatMulNBits": 1, "DequantizeLinear": 0}
SIZE = {"llama": 14, "bert": 8, "gpt2": 8}  # how many weights the adapters change


def by_onnxruntime(source: Path, out: Path, **options: object) -> None:
    made = MatMulNBitsQuantizer(onnx.load(source), **options)
    made.process()
    out.write_bytes(made.model.model.SerializeToString())


def ours(source: Path, out: Path, **options: object) -> None:
    quantise(source, out, **options)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "nbits-4": partial(ours, bits=4, method="nbits"),
    "nbits-8": partial(ours, bits=8, method="nbits"),
    "nbits-4-block-128": partial(ours, bits=4, method="nbits", block=128),
    "qdq-8": partial(ours, bits=8, method="qdq"),
    "qdq-4": partial(ours, bits=4, method="qdq"),
    "ort-4": partial(by_onnxruntime, bits=4, block_size=32, is_symmetric=True),
    "ort-4-zeros": partial(by_onnxruntime, bits=4, block_size=32, is_symmetric=False),
    "ort-8-zeros": partial(by_onnxruntime, bits=8, block_size=128, is_symmetric=False),
    "ort-qdq-4": partial(by_onnxruntime, block_size=32, quant_format=QuantFormat.QDQ,
                         is_symmetric=True),
    "ort-qdq-4-zeros": partial(by_onnxruntime, block_size=32, quant_format=QuantFormat.QDQ,
                               is_symmetric=False),
}  # fmt: skip


def at_opset_21(path: Path) -> Path:
    """What 4 bits by the standard operators need."""
    onnx.save(onnx.version_converter.convert_version(onnx.load(path), 21), path)
    return path


def weights(path: Path) -> dict[str, np.ndarray]:
    """By the float graph's name: every quantised weight, as onnxruntime computes with it."""
    model, found = onnx.load(path), {}
    kept = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in HOLDERS:
            continue
        parts = [n for n in node.input if n in kept]
        if node.op_type == "MatMulNBits":
            inner = next(a.i for a in node.attribute if a.name == "K")
            alone = helper.make_node(node.op_type, ["eye", *parts], ["y"], domain=node.domain)
            given = [numpy_helper.from_array(np.eye(inner, dtype=np.float32), "eye")]
        else:
            alone, given = helper.make_node(node.op_type, parts, ["y"]), []
        alone.attribute.extend(node.attribute)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        one = helper.make_model(
            helper.make_graph([alone], "g", [], [y], [*given, *(kept[n] for n in parts)]),
            opset_imports=model.opset_import, ir_version=10,
        )  # fmt: skip
        place = path.with_suffix(".one")
        place.write_bytes(one.SerializeToString())
        name = parts[0]
        for end in ("_DQ_Q4", "_Q4", "_Q8"):
            name = name.removesuffix(end)
        found[name] = outputs(place, {})[0]
    return found


def with_weights(graph: Path, numbers: dict[str, np.ndarray], out: Path) -> Path:
    """The float graph with other weights."""
    model = onnx.load(graph)
    for tensor in model.graph.initializer:
        for name, turned in ((tensor.name, False), (f"{tensor.name}_transposed", True)):
            if name in numbers:
                values = np.ascontiguousarray(numbers[name].T if turned else numbers[name])
                assert values.shape == tuple(tensor.dims)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(model.SerializeToString(deterministic=True))
    return out


def stored(path: Path) -> dict[str, bytes]:
    return {t.name: t.raw_data for t in onnx.load(path).graph.initializer}


EVERY = [(sort, way) for sort in ("llama", "bert") for way in WAYS]
# Weights that torch has (in, out) too, whose blocks run along torch's rows.
EVERY += [("gpt2", "nbits-4"), ("gpt2", "qdq-8")]


@pytest.mark.parametrize(("sort", "way"), EVERY)
def test_a_fold_is_the_quantised_fold_of_the_same_numbers(
    tmp_path: Path, sort: str, way: str
) -> None:
    base = bases.folder(tmp_path / "base", sort, biases=True)
    graph = bases.export(bases.loaded(base, sort), tmp_path / "float" / "model.onnx", "legacy")
    if way == "qdq-4" or "ort-qdq" in way:
        at_opset_21(graph)
    adapter = bases.adapter(tmp_path / "lora", base, sort, bias="none")
    (tmp_path / "codes").mkdir()
    codes = tmp_path / "codes" / "model.onnx"
    WAYS[way](graph, codes)
    shutil.copy(base / "config.json", codes.parent)

    said = check([adapter], codes)
    assert said.ok
    assert said.matched == said.total
    result = merge([adapter], codes, out=tmp_path / "out")
    before = weights(codes)
    plain = with_weights(graph, before, tmp_path / "dequantised" / "model.onnx")
    merge([adapter], plain, out=tmp_path / "folded")
    WAYS[way](tmp_path / "folded" / "model.onnx", tmp_path / "expected.onnx")

    out = tmp_path / "out" / "model.onnx"
    onnx.checker.check_model(out) if "qdq" in way else None
    mine, old, new = (stored(p) for p in (out, codes, tmp_path / "expected.onnx"))
    changed = {n for n in old if mine[n] != old[n]}
    touched = {n for n in changed if n.endswith(("_Q4", "_Q8"))}
    assert result.targets == len(touched) > SIZE[sort] - 1
    assert {n: mine[n] for n in changed} == {n: new[n] for n in changed}
    after, wanted = weights(out), weights(tmp_path / "folded" / "model.onnx") or before

    # What was kept is what onnxruntime's own numbers show.
    floats = {t.name: numpy_helper.to_array(t)
              for t in onnx.load(tmp_path / "folded" / "model.onnx").graph.initializer}  # fmt: skip
    assert wanted
    kept, whole = 0.0, 0.0
    for name, w0 in before.items():
        if name in floats:
            step = floats[name].astype("f8") - w0
            kept += float(((after[name].astype("f8") - w0) * step).sum())
            whole += float((step * step).sum())
    assert result.update_kept == pytest.approx(kept / whole, rel=1e-3)
    receipt = json.loads((tmp_path / "out" / "loratools.json").read_text())
    assert all("update_kept" in entry for entry in receipt["targets"].values())
    assert f"{result.targets} weights keep" in " ".join(result.notes)
    proved = verify(tmp_path / "out", base=codes, adapters=[adapter])
    assert (proved.mismatches, proved.proved) == ((), "replay")


# ------------------------------------------------------------------------------- small graphs


def stored_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def two_layers(path: Path, *, shared: bool = False) -> Path:
    nodes = [product("a", "v", y="h"), product("b", "v" if shared else "w", x="h")]
    some = [weight("v", 32, 32), *([] if shared else [weight("w", 32, 32, seed=1)])]
    return graph_of(path, nodes, *some, size=32)


def test_layers_of_one_tensor_of_codes_are_split(tmp_path: Path) -> None:
    plain, base = two_layers(tmp_path / "f.onnx", shared=True), tmp_path / "base.onnx"
    quantise(plain, base, bits=4)
    adapter = lora(tmp_path / "lora", b=(32, 32))
    result = merge([adapter], base, out=tmp_path / "out")
    out = tmp_path / "out" / "base.onnx"
    before, after = stored(base), stored(out)
    assert {n: after[n] for n in before} == before
    first, second = onnx.load(out).graph.node
    assert list(first.input)[1:] == list(onnx.load(base).graph.node[0].input)[1:]
    assert not set(first.input[1:]) & set(second.input[1:])
    assert "b.weight" in " ".join(result.notes)
    x = np.eye(32, dtype=np.float32)
    w0 = weights(base)["v"]
    w1 = np.linalg.solve(w0.astype("f8"), outputs(out, {"x": x})[0].astype("f8"))
    wanted = w0 + update(adapter, "b").T
    step = np.abs(w0).max() / 7
    assert np.abs(w1 - wanted).max() < step
    assert verify(tmp_path / "out").proved == "replay"
    again = merge([adapter], out, out=tmp_path / "twice", allow=["already_merged"])
    assert again.targets == 1


def test_zero_points_that_layers_share_are_split_only_where_they_change(tmp_path: Path) -> None:
    plain, base = two_layers(tmp_path / "f.onnx"), tmp_path / "base.onnx"
    by_onnxruntime(plain, base, bits=4, block_size=32, is_symmetric=False)
    model = onnx.load(base)
    first, second = model.graph.node
    kept = {t.name: t for t in model.graph.initializer}
    second.input[3] = first.input[3]
    kept[first.input[3]].raw_data = bytes([0x77]) * len(kept[first.input[3]].raw_data)
    base.write_bytes(model.SerializeToString())
    merge([lora(tmp_path / "lora", a=(32, 32))], base, out=tmp_path / "out")
    made = onnx.load(tmp_path / "out" / "base.onnx").graph
    assert made.node[1].input == second.input
    assert made.node[0].input[3] not in kept
    assert stored(tmp_path / "out" / "base.onnx")[second.input[3]] == kept[second.input[3]].raw_data
    assert verify(tmp_path / "out").proved == "replay"


@pytest.mark.parametrize("kind", ["float16", "external", "typed"])
def test_other_encodings(tmp_path: Path, kind: str) -> None:
    plain, base = two_layers(tmp_path / "f.onnx"), tmp_path / "base.onnx"
    if kind == "float16":
        model = onnx.load(plain)
        for tensor in model.graph.initializer:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype("f2"), tensor.name)
            )
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
        plain.write_bytes(model.SerializeToString())
        by_onnxruntime(plain, base, bits=4, block_size=32, is_symmetric=True)
    elif kind == "typed":
        onnx.save(onnx.version_converter.convert_version(onnx.load(plain), 21), plain)
        quantise(plain, base, bits=4, method="qdq")
        model = onnx.load(base)
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.INT4:
                raw = tensor.raw_data
                tensor.ClearField("raw_data")
                tensor.int32_data.extend(raw)
        base.write_bytes(model.SerializeToString())
    else:
        quantise(plain, base, bits=8)
        onnx.save(onnx.load(base), base, save_as_external_data=True, location="w.bin",
                  size_threshold=0)  # fmt: skip
    adapter = lora(tmp_path / "lora", a=(32, 32))
    merge([adapter], base, out=tmp_path / "out")
    out = tmp_path / "out" / "base.onnx"
    x = np.random.default_rng(4).standard_normal((3, 32))
    x = x.astype("f2" if kind == "float16" else "f4")
    w0 = np.linalg.lstsq(np.eye(32), stored_of(plain)["v"].astype("f8"))[0]
    y = x.astype("f8") @ (w0 + update(adapter, "a").T) @ stored_of(plain)["w"].astype("f8")
    found = outputs(out, {"x": x})[0].astype("f8").ravel()
    assert found @ y.ravel() / np.linalg.norm(found) / np.linalg.norm(y) > 0.97
    proved = verify(tmp_path / "out")
    assert (proved.mismatches, proved.proved) == ((), "replay")
    out.write_bytes(out.read_bytes().replace(b"MatMulNBits", b"MatMulNBitz"))
    if kind != "typed":
        assert not verify(tmp_path / "out").ok


def test_one_scale_for_the_whole_weight(tmp_path: Path) -> None:
    """Its range depends on every row, so the weight is folded as a whole."""
    plain, base = two_layers(tmp_path / "f.onnx"), tmp_path / "base.onnx"
    model = onnx.load(plain)
    for name in ("v", "w"):
        (tensor,) = [t for t in model.graph.initializer if t.name == name]
        numbers = numpy_helper.to_array(tensor)
        scale = np.float32(np.abs(numbers).max() / 127)
        tensor.CopyFrom(numpy_helper.from_array(np.rint(numbers / scale).astype("i1"), f"{name}_q"))
        model.graph.initializer.append(numpy_helper.from_array(scale, f"{name}_s"))
        dequantise = helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s"], [name])
        model.graph.node.insert(0, dequantise)
    base.write_bytes(model.SerializeToString())
    adapter = lora(tmp_path / "lora", b=(32, 32))
    result = merge([adapter], base, out=tmp_path / "out")
    old, new = stored_of(base), stored_of(tmp_path / "out" / "base.onnx")
    w0 = old["w_q"] * old["w_s"].astype("f8")
    wanted = w0.astype("f4") + update(adapter, "b").T
    assert new["w_s"] == np.float32(np.abs(wanted.astype("f4")).max() / np.float32(127))
    assert np.abs(new["w_q"] * new["w_s"].astype("f8") - wanted).max() <= new["w_s"] * 0.501
    step = wanted - w0
    kept = float(((new["w_q"] * new["w_s"].astype("f8") - w0) * step).sum() / (step**2).sum())
    assert result.update_kept == pytest.approx(kept, rel=1e-4)
    assert (new["v_q"] == old["v_q"]).all()
    assert verify(tmp_path / "out").proved == "replay"


def test_an_update_that_drowns_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = bases.folder(tmp_path / "base", "llama")
    graph = bases.export(bases.loaded(base, "llama"), tmp_path / "model.onnx", "legacy")
    quantise(graph, tmp_path / "q4.onnx", bits=4, block=128)
    adapter = bases.adapter(tmp_path / "lora", base, "llama", lora_alpha=0.001)
    message = refused("loss", [adapter], tmp_path / "q4.onnx", out=tmp_path / "no", min_kept=0.9)
    assert "float32 graph" in message or "survives" in message or "drowns" in message
    assert not (tmp_path / "no").exists()
    result = merge([adapter], tmp_path / "q4.onnx", out=tmp_path / "out")
    assert any(p.code == "loss" for p in result.problems)


# ------------------------------------------------------------------------------- refused


class Feeds(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [{"x": np.random.default_rng(i).standard_normal((2, 32)).astype("f4")}
                     for i in range(3)]  # fmt: skip

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def test_a_graph_that_computes_with_codes_is_refused(tmp_path: Path) -> None:
    plain = two_layers(tmp_path / "f.onnx")
    quantize_dynamic(plain, tmp_path / "dynamic.onnx")
    static = {"calibration_data_reader": Feeds(), "quant_format": QuantFormat.QOperator}
    quantize_static(plain, tmp_path / "static.onnx", **static)
    adapter = lora(tmp_path / "lora", a=(32, 32))
    for name in ("dynamic", "static"):
        with pytest.raises(LoratoolsError) as caught:
            merge([adapter], tmp_path / f"{name}.onnx", out=tmp_path / "no")
        assert caught.value.code == "graph_changed"
        assert any("quantise that" in (p.remedy or "") for p in caught.value.problems)
        assert not (tmp_path / "no").exists()


def test_activations_with_fixed_ranges_are_no_obstacle(tmp_path: Path) -> None:
    """onnxruntime's static quantisation in its QDQ form: the weights' own nodes are the same."""
    plain, base = two_layers(tmp_path / "f.onnx"), tmp_path / "base.onnx"
    quantize_static(plain, base, Feeds(), quant_format=QuantFormat.QDQ, per_channel=True,
                    weight_type=QuantType.QInt8)  # fmt: skip
    adapter = lora(tmp_path / "lora", a=(32, 32))
    merge([adapter], base, out=tmp_path / "out")
    old, new = stored_of(base), stored_of(tmp_path / "out" / "base.onnx")
    (name,) = [n for n in old if (old[n] != new[n]).any() and n.endswith("_quantized")]
    scale = new[name.replace("_quantized", "_scale")]
    wanted = stored_of(plain)["v"] + update(adapter, "a").T
    assert np.abs(new[name] * scale - wanted).max() < 2 * scale.max()


def test_a_bias_in_steps_of_the_weights_scale_is_refused(tmp_path: Path) -> None:
    """onnxruntime runs such a Gemm with the weight's scale for both."""
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="/fc/Gemm", transB=1)
    some = weight("w", 32, 32), weight("b", 32, seed=2)
    plain = graph_of(tmp_path / "f.onnx", [gemm], *some, size=32)
    quantize_static(plain, tmp_path / "base.onnx", Feeds(), quant_format=QuantFormat.QDQ,
                    weight_type=QuantType.QInt8)  # fmt: skip
    adapter = lora(tmp_path / "lora", fc=(32, 32))
    message = refused("graph_changed", [adapter], tmp_path / "base.onnx", out=tmp_path / "no")
    assert "in steps of its scale" in message


def test_a_float_weight_behind_a_quantizelinear_is_refused(tmp_path: Path) -> None:
    """Its scale was found for the old numbers, and larger ones would be cut off."""
    plain = two_layers(tmp_path / "f.onnx")
    quantize_static(plain, tmp_path / "base.onnx", Feeds(), quant_format=QuantFormat.QDQ,
                    extra_options={"AddQDQPairToWeight": True})  # fmt: skip
    adapter = lora(tmp_path / "lora", a=(32, 32))
    message = refused("graph_changed", [adapter], tmp_path / "base.onnx", out=tmp_path / "no")
    assert "QuantizeLinear" in message


def test_rows_in_another_order_are_refused_with_the_reason(tmp_path: Path) -> None:
    plain, base = two_layers(tmp_path / "f.onnx"), tmp_path / "base.onnx"
    quantise(plain, base, bits=4)
    model = onnx.load(base)
    order = numpy_helper.from_array(np.zeros(32, np.int32), "order")
    model.graph.initializer.append(order)
    model.graph.node[0].input.extend(["", "order"])
    base.write_bytes(model.SerializeToString())
    adapter = lora(tmp_path / "lora", a=(32, 32), b=(32, 32))
    message = refused("graph_changed", [adapter], base, out=tmp_path / "no")
    assert "g_idx" in message
    assert "1 of 2" in message


@pytest.mark.parametrize("way", ["nbits-4", "qdq-8", "ort-4-zeros"])
def test_the_reference_confirms_codes_to_a_step(tmp_path: Path, way: str) -> None:
    base = bases.folder(tmp_path / "base", "llama", biases=True)
    other = bases.folder(tmp_path / "other", "llama", seed=9)
    graph = bases.export(bases.loaded(base, "llama"), tmp_path / "model.onnx", "legacy")
    WAYS[way](graph, tmp_path / "codes.onnx")
    adapter = bases.adapter(tmp_path / "lora", base, "llama")
    codes = tmp_path / "codes.onnx"
    result = merge([adapter], codes, out=tmp_path / "out", reference=base)
    assert result.targets == SIZE["llama"]
    merge([adapter], codes, out=tmp_path / "named")
    assert stored(tmp_path / "out" / "codes.onnx") == stored(tmp_path / "named" / "codes.onnx")
    refused("other_base", [adapter], codes, out=tmp_path / "no", reference=other)
    assert verify(tmp_path / "out").proved == "replay"
