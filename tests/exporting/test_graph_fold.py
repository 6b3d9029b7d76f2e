"""A fold into a graph is, byte for byte, what exporting the folded model gives."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from loratools.commands.merge import merge
from loratools.commands.verify import verify
from loratools.containers.bundle import local
from loratools.containers.onnx_graph import read
from loratools.errors import LoratoolsError
from tests.exporting import graph_bases as bases


def without_texts(path: Path) -> bytes:
    """A graph's bytes without the lineage at its end, which no exporter writes."""
    graph = read(local(path), path.name)
    fields = [f for key, f in graph.metadata_fields.items() if key.startswith("loratools.")]
    assert max(f.end for f in fields) == path.stat().st_size
    return path.read_bytes()[: min(f.tag for f in fields)]


def is_exported(folded: Path, exported: Path) -> bool:
    data = exported.with_name(f"{exported.name}.data")
    mine = folded.with_name(data.name)
    same = not data.exists() or mine.read_bytes() == data.read_bytes()
    return same and counted(without_texts(folded)) == counted(exported.read_bytes())


def counted(graph: bytes) -> bytes:
    """Without the count of functions that torch compiled, which dynamo writes on its nodes."""
    return re.sub(rb"<eval_with_key>\.\d+", b"<eval_with_key>", graph)


EVERY = [
    pytest.param(s, e, marks=() if e == "legacy" or s == "gpt2" else pytest.mark.slow)
    for s in bases.SORTS
    for e in ("legacy", "dynamo")
]


@pytest.mark.parametrize(("sort", "exporter"), EVERY)
def test_a_fold_is_the_export_of_the_folded_model(tmp_path: Path, sort: str, exporter: str) -> None:
    base = bases.folder(tmp_path / "base", sort, biases=True)
    graph = bases.export(bases.loaded(base, sort), tmp_path / "graph" / "model.onnx", exporter)
    shutil.copy(base / "config.json", graph.parent)
    lora = bases.adapter(tmp_path / "lora", base, sort)
    tied = {"tied": True} if sort == "tied" else {}
    allow = ["unmatched"] if sort == "bert" else []

    merge([lora], base, out=tmp_path / "folded", **tied)
    result = merge([lora], graph, out=tmp_path / "out", allow=allow, **tied)

    exported = bases.export(
        bases.loaded(tmp_path / "folded", sort), tmp_path / "new" / "model.onnx", exporter
    )
    assert result.targets > 2
    assert is_exported(tmp_path / "out" / "model.onnx", exported)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    onnx.checker.check_model(tmp_path / "out" / "model.onnx")
    difference = bases.numbers(tmp_path / "out" / "model.onnx") - bases.numbers(graph)
    assert np.abs(difference).max() > 1e-4


@pytest.mark.parametrize("kind", ["dora", "oft", "two"])
def test_other_kinds_and_several_adapters(tmp_path: Path, kind: str) -> None:
    """Norms of whole rows, rotations of all rows, a truncated sum: the numbers of any fold."""
    from peft import OFTConfig

    base = bases.folder(tmp_path / "base", "llama", biases=True)
    graph = bases.export(bases.loaded(base, "llama"), tmp_path / "graph" / "model.onnx", "legacy")
    modules = ["q_proj", "down_proj"]
    more: dict = {"weights": [0.5, -1.5], "rank": 3} if kind == "two" else {}
    if kind == "oft":
        trained = get_peft_model(
            bases.loaded(base, "llama"), OFTConfig(oft_block_size=8, target_modules=modules)
        )
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.05
        trained.save_pretrained(tmp_path / "a")
        adapters = [tmp_path / "a"]
    else:
        some = [{"use_dora": True}] if kind == "dora" else [{}, {"r": 2}]
        adapters = [
            bases.adapter(tmp_path / f"a{i}", base, "llama", seed=i, target_modules=modules, **m)
            for i, m in enumerate(some)
        ]
    merge(adapters, base, out=tmp_path / "folded", **more)
    merge(adapters, graph, out=tmp_path / "out", threads=2, **more)
    folded = load_file(tmp_path / "folded" / "model.safetensors")
    made = onnx.load(tmp_path / "out" / "model.onnx").graph
    weights = {t.name: numpy_helper.to_array(t) for t in made.initializer}
    compared = 0
    for node in made.node:
        name = ".".join(node.name.split("/")[2:-1]) + ".weight"
        if node.op_type == "MatMul" and name in folded:
            assert np.array_equal(weights[node.input[1]].T, folded[name].numpy()), name
            compared += 1
    assert compared == 15


# ------------------------------------------------------------------------------- small graphs


def lora(path: Path, **updates: tuple[int, int]) -> Path:
    """A PEFT adapter of rank 2: module (with __ for dots) → (out, in)."""
    path.mkdir()
    tensors = {}
    draw = torch.Generator().manual_seed(5)
    for module, (rows, columns) in updates.items():
        front = f"base_model.model.{module.replace('__', '.')}"
        tensors[f"{front}.lora_A.weight"] = torch.randn(2, columns, generator=draw) * 0.1
        tensors[f"{front}.lora_B.weight"] = torch.randn(rows, 2, generator=draw) * 0.1
    save_file(tensors, path / "adapter_model.safetensors")
    modules = [m.replace("__", ".") for m in updates]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": modules}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def update(path: Path, module: str) -> np.ndarray:
    """ΔW (out, in) in float64, by numpy."""
    tensors = load_file(path / "adapter_model.safetensors")
    front = f"base_model.model.{module}"
    a, b = (tensors[f"{front}.lora_{x}.weight"].double().numpy() for x in "AB")
    return 2 * (b @ a)


def graph_of(path: Path, nodes: list, *tensors: TensorProto, size: int = 6, **texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", size])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])
    graph = helper.make_graph(nodes, "g", [x], [y], list(tensors))
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    for key, value in texts.items():
        model.metadata_props.add(key=key.replace("__", "."), value=value)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def weight(name: str, *shape: int, dtype: str = "<f4", seed: int = 0) -> TensorProto:
    values = np.random.default_rng(seed).standard_normal(shape)
    return numpy_helper.from_array(values.astype(dtype), name)


def product(path: str, w: str, x: str = "x", y: str = "y") -> onnx.NodeProto:
    return helper.make_node("MatMul", [x, w], [y], name=f"/{path.replace('.', '/')}/MatMul")


def stored(path: Path, name: str) -> np.ndarray:
    model = onnx.load(path)
    (found,) = [t for t in model.graph.initializer if t.name == name]
    return numpy_helper.to_array(found)


def refused(code: str, *args, **more) -> str:
    with pytest.raises(LoratoolsError) as caught:
        merge(*args, **more)
    assert caught.value.code == code, caught.value
    return caught.value.message


def test_two_layers_of_one_tensor_are_split(tmp_path: Path) -> None:
    """Equal weights that an exporter made one: only the layer that the adapter changes changes."""
    shared = weight("onnx::MatMul_1", 6, 6)
    nodes = [product("a", shared.name, y="h"), product("b", shared.name, x="h")]
    base = graph_of(tmp_path / "base.onnx", nodes, shared)
    result = merge([lora(tmp_path / "lora", b=(6, 6))], base, out=tmp_path / "out")
    out = tmp_path / "out" / "base.onnx"
    onnx.checker.check_model(out, full_check=True)
    model, w0 = onnx.load(out), numpy_helper.to_array(shared)
    assert [list(n.input) for n in model.graph.node] == [
        ["x", "onnx::MatMul_1"],
        ["h", "b.weight"],
    ]
    assert (stored(out, "onnx::MatMul_1") == w0).all()
    expected = (w0.astype("f8") + update(tmp_path / "lora", "b").T).astype("f4")
    assert (stored(out, "b.weight") == expected).all()
    assert "b.weight" in " ".join(result.notes)
    assert verify(tmp_path / "out").proved == "replay"


@pytest.mark.parametrize("encoding", ["raw", "typed", "external", "constant"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_encoding(tmp_path: Path, dtype: str, encoding: str) -> None:
    kind = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
    numbers = helper.tensor_dtype_to_np_dtype(kind[dtype])
    values = np.random.default_rng(3).standard_normal((6, 8)).astype(numbers)
    if encoding == "typed":
        tensor = helper.make_tensor("w", kind[dtype], [6, 8], values.flatten())
    else:
        tensor = numpy_helper.from_array(values, "w")
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT, name="/fc/Cast"),
        product("fc", "wide"),
    ]
    if encoding == "constant":
        held = numpy_helper.from_array(values, "unnamed")
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=held))
    base = graph_of(tmp_path / "base.onnx", nodes, *([] if encoding == "constant" else [tensor]))
    if encoding == "external":
        onnx.save(onnx.load(base), base, save_as_external_data=True, location="w.bin",
                  size_threshold=0)  # fmt: skip
    merge([lora(tmp_path / "lora", fc=(8, 6))], base, out=tmp_path / "out")
    out = tmp_path / "out" / "base.onnx"
    assert (tmp_path / "out" / "w.bin").exists() == (encoding == "external")
    wide = values.astype("f8") + update(tmp_path / "lora", "fc").T
    torch_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    expected = torch.from_numpy(wide).to(torch_dtype).float().numpy()
    x = np.random.default_rng(4).standard_normal((3, 6)).astype("f4")
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, {"x": x})[0], x @ expected, atol=1e-5)
    assert verify(tmp_path / "out").proved == "replay"
    again = merge([tmp_path / "lora"], out, out=tmp_path / "twice", allow=["already_merged"])
    assert again.targets == 1
    onnx.checker.check_model(tmp_path / "twice" / "base.onnx")
    said = onnx.load(tmp_path / "twice" / "base.onnx").metadata_props
    (listed,) = [json.loads(p.value) for p in said if p.key == "loratools.adapters"]
    assert len(listed) == 2
    assert str(tmp_path) not in str(said)


def test_our_own_list_decides(tmp_path: Path) -> None:
    """Names of nodes are gone, the model's own text says what is what."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["y"]),
    ]
    listing = {"w1": ["layers.0.fc.weight", True], "w2": ["layers.1.fc.weight", True]}
    base = graph_of(tmp_path / "base.onnx", nodes, weight("w1", 6, 6), weight("w2", 6, 6, seed=1),
                    loratools__weights=json.dumps(listing))  # fmt: skip
    merge([lora(tmp_path / "lora", layers__1__fc=(6, 6))], base, out=tmp_path / "out")
    out = tmp_path / "out" / "base.onnx"
    assert (stored(out, "w1") == stored(base, "w1")).all()
    change = stored(out, "w2").astype("f8") - stored(base, "w2")
    assert np.allclose(change, update(tmp_path / "lora", "layers.1.fc").T, atol=1e-6)
    code = refused("graph_changed", [tmp_path / "lora"], graph_of(
        tmp_path / "bare.onnx", nodes, weight("w1", 6, 6), weight("w2", 6, 6, seed=1)),
        out=tmp_path / "no")  # fmt: skip
    assert "1 of 1 target weights" in code
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------- ties


@pytest.mark.parametrize("exporter", ["legacy", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_untied(tmp_path: Path, exporter: str) -> None:
    base = bases.folder(tmp_path / "base", "tied", biases=True)
    graph = bases.export(bases.loaded(base, "tied"), tmp_path / "graph" / "model.onnx", exporter)
    shutil.copy(base / "config.json", graph.parent)
    adapter = bases.adapter(tmp_path / "lora", base, "tied", target_modules=["lm_head"])
    refused("tied", [adapter], graph, out=tmp_path / "no")
    merge([adapter], graph, out=tmp_path / "out", untie=True)
    merge([adapter], base, out=tmp_path / "folded", untie=True)
    expected = bases.Plain(bases.loaded(tmp_path / "folded", "tied"))(bases.IDS, bases.MASK)
    got = bases.numbers(tmp_path / "out" / "model.onnx")
    real = bases.MASK.bool().numpy()  # of padding the exporter's graph makes other numbers
    assert np.abs(got - expected.detach().numpy())[real].max() < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_untied_where_one_tensor_serves_both(tmp_path: Path) -> None:
    """Looked up by tokens and, turned, the head's: the head gets a tensor of its own."""
    table = weight("model.embed_tokens.weight", 9, 6)
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.INT64),
        helper.make_node("Gather", [table.name, "ids"], ["h"]),
        helper.make_node("Transpose", [table.name], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "turned"], ["y"]),
    ]
    base = tmp_path / "base" / "model.onnx"
    graph_of(base, nodes, table, loratools__weights=json.dumps({table.name: [table.name, False]}))
    config = {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "architectures": ["LlamaForCausalLM"],
    }
    (base.parent / "config.json").write_text(json.dumps(config))
    merge([lora(tmp_path / "lora", lm_head=(9, 6))], base, out=tmp_path / "out", untie=True)
    out = tmp_path / "out" / "model.onnx"
    assert (stored(out, table.name) == stored(base, table.name)).all()
    change = stored(out, "lm_head.weight").astype("f8") - stored(base, table.name)
    assert np.allclose(change, update(tmp_path / "lora", "lm_head"), atol=1e-6)
    listing = {p.key: p.value for p in onnx.load(out).metadata_props}["loratools.weights"]
    assert json.loads(listing)["lm_head.weight"] == ["lm_head.weight", False]
    merge([tmp_path / "lora"], base, out=tmp_path / "both", tied=True)
    both = stored(tmp_path / "both" / "model.onnx", table.name).astype("f8")
    assert np.allclose(
        both - stored(base, table.name), update(tmp_path / "lora", "lm_head"), atol=1e-6
    )


# ------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("reference", [False, True])
def test_a_fused_graph_is_refused_with_counts(tmp_path: Path, reference: bool) -> None:
    """Queries, keys and values packed into one product, as fusing makes them."""
    parts = [weight(n, 6, 6, seed=i) for i, n in enumerate("qkv")]
    packed = np.concatenate([numpy_helper.to_array(p) for p in parts], 1)
    nodes = [
        product("attn.qkv", "packed", y="h"),
        helper.make_node("Split", ["h"], ["q", "k", "v"], axis=-1, num_outputs=3),
        helper.make_node("Add", ["q", "k"], ["qk"]),
        helper.make_node("Add", ["qk", "v"], ["a"]),
        product("attn.o", "o", x="a"),
    ]
    o = weight("o", 6, 6, seed=4)
    base = graph_of(tmp_path / "base.onnx", nodes, numpy_helper.from_array(packed, "packed"), o)
    adapter = lora(tmp_path / "lora", attn__q=(6, 6), attn__v=(6, 6), attn__o=(6, 6))
    (tmp_path / "model").mkdir()
    plain = {f"attn.{p.name}.weight": numpy_helper.to_array(p).T for p in [*parts, o]}
    torch_plain = {n: torch.from_numpy(np.ascontiguousarray(w)) for n, w in plain.items()}
    save_file(torch_plain, tmp_path / "model" / "model.safetensors")
    more = {"reference": tmp_path / "model"} if reference else {}
    message = refused("graph_changed", [adapter], base, out=tmp_path / "no", **more)
    assert "2 of 3 target weights were not found" in message
    assert not (tmp_path / "no").exists()


def test_a_graph_that_onnxruntime_optimised(tmp_path: Path) -> None:
    """Operators fused around the weights leave them what they were: the fold is right."""
    from onnxruntime.transformers.optimizer import optimize_model

    base = bases.folder(tmp_path / "base", "bert", biases=True)
    graph = bases.export(bases.loaded(base, "bert"), tmp_path / "graph" / "model.onnx", "legacy")
    made = optimize_model(str(graph), "bert", num_heads=4, hidden_size=32, opt_level=0)
    fused = tmp_path / "fused.onnx"
    made.save_model_to_file(str(fused))
    assert "SkipLayerNormalization" in {n.op_type for n in made.model.graph.node}
    adapter = bases.adapter(tmp_path / "lora", base, "bert", bias="none")
    merge([adapter], fused, out=tmp_path / "out", reference=base)
    merge([adapter], base, out=tmp_path / "folded")
    expected = bases.Plain(bases.loaded(tmp_path / "folded", "bert"))(bases.IDS, bases.MASK)
    got = bases.numbers(tmp_path / "out" / "fused.onnx")
    assert np.abs(got - expected.detach().numpy()).max() < 1e-5


def test_a_quantised_graph_is_refused(tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    base = bases.folder(tmp_path / "base", "llama")
    graph = bases.export(bases.loaded(base, "llama"), tmp_path / "graph" / "model.onnx", "legacy")
    quantize_dynamic(graph, tmp_path / "int8.onnx")
    adapter = bases.adapter(tmp_path / "lora", base, "llama")
    with pytest.raises(LoratoolsError) as caught:
        merge([adapter], tmp_path / "int8.onnx", out=tmp_path / "no")
    assert caught.value.code in ("graph_changed", "quantised_base")
    assert not (tmp_path / "no").exists()


def test_what_the_graph_does_not_compute_may_be_left_out(tmp_path: Path) -> None:
    base = bases.folder(tmp_path / "base", "bert")
    graph = bases.export(bases.loaded(base, "bert"), tmp_path / "graph" / "model.onnx", "legacy")
    adapter = bases.adapter(tmp_path / "lora", base, "bert", bias="none",
                            target_modules=["query", "pooler.dense"])  # fmt: skip
    refused("unmatched", [adapter], graph, out=tmp_path / "no")
    result = merge([adapter], graph, out=tmp_path / "out", allow=["unmatched:pooler.*"])
    assert result.targets == 2


def test_a_weight_of_another_size(tmp_path: Path) -> None:
    base = graph_of(tmp_path / "base.onnx", [product("fc", "w")], weight("w", 6, 8))
    refused("shape_mismatch", [lora(tmp_path / "lora", fc=(8, 5))], base, out=tmp_path / "no")
    refused("usage", [tmp_path / "lora"], base, out=tmp_path / "no", dtype="fp16")


def test_two_tensors_in_the_same_bytes(tmp_path: Path) -> None:
    base = graph_of(tmp_path / "base.onnx", [product("a", "v", y="h"), product("b", "w", x="h")],
                    weight("v", 6, 6), weight("w", 6, 6))  # fmt: skip
    model = onnx.load(base)
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.bin")
    (tmp_path / "w.bin").write_bytes(raw)
    base.write_bytes(model.SerializeToString())
    message = refused(
        "graph_changed", [lora(tmp_path / "lora", a=(6, 6))], base, out=tmp_path / "no"
    )
    assert "same bytes" in message


# ------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("sort", ["llama", "gpt2"])
def test_content_finds_what_names_do_not_say(tmp_path: Path, sort: str) -> None:
    """Every name gone, as after a cleaning: the model that it was exported from finds them all."""
    base = bases.folder(tmp_path / "base", sort, biases=True)
    graph = bases.export(bases.loaded(base, sort), tmp_path / "graph" / "model.onnx", "legacy")
    model = onnx.load(graph)
    names = {t.name: f"t{i}" for i, t in enumerate(model.graph.initializer)}
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
    for node in model.graph.node:
        node.name = ""
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
    bare = tmp_path / "bare.onnx"
    bare.write_bytes(model.SerializeToString(deterministic=True))
    adapter = bases.adapter(tmp_path / "lora", base, sort)
    refused("graph_changed", [adapter], bare, out=tmp_path / "no")
    merge([adapter], graph, out=tmp_path / "named")
    result = merge([adapter], bare, out=tmp_path / "found", reference=base)
    mine, theirs = (bases.numbers(tmp_path / n) for n in ("found/bare.onnx", "named/model.onnx"))
    assert np.array_equal(mine, theirs)
    other = bases.folder(tmp_path / "other", sort, seed=9)
    refused("other_base", [adapter], bare, out=tmp_path / "no", reference=other)
    refused("other_base", [adapter], graph, out=tmp_path / "no", reference=other)
    receipt = json.loads((tmp_path / "found" / "loratools.json").read_text())
    assert receipt["recipe"]["reference"]["fingerprint"]
    proved = verify(tmp_path / "found")
    assert (proved.mismatches, proved.proved) == ((), "replay")
    merge([], recipe=tmp_path / "found", out=tmp_path / "again")
    assert (tmp_path / "again/bare.onnx").read_bytes() == (
        tmp_path / "found/bare.onnx"
    ).read_bytes()
    again = merge([adapter], tmp_path / "found", out=tmp_path / "twice", allow=["already_merged"])
    assert again.targets == result.targets


def test_what_content_cannot_tell_is_refused(tmp_path: Path) -> None:
    """A symmetric matrix reads the same both ways; two equal layers are each other."""
    w = np.random.default_rng(0).standard_normal((6, 6)).astype("f4")
    plain = {"a.weight": torch.from_numpy(w + w.T), "b.weight": torch.from_numpy(w)}
    (tmp_path / "model").mkdir()
    save_file(plain, tmp_path / "model" / "model.safetensors")
    nodes = [
        helper.make_node("MatMul", ["x", "s"], ["h"]),
        helper.make_node("MatMul", ["h", "t"], ["y"]),
    ]
    base = graph_of(tmp_path / "base.onnx", nodes, numpy_helper.from_array(w + w.T, "s"),
                    numpy_helper.from_array(np.ascontiguousarray(w.T), "t"))  # fmt: skip
    one, two = lora(tmp_path / "one", a=(6, 6)), lora(tmp_path / "two", b=(6, 6))
    message = refused(
        "graph_changed", [one], base, out=tmp_path / "no", reference=tmp_path / "model"
    )
    assert "as it is and transposed" in message
    merge([two], base, out=tmp_path / "out", reference=tmp_path / "model")
    change = stored(tmp_path / "out" / "base.onnx", "t").astype("f8") - w.T
    assert np.allclose(change, update(two, "b").T, atol=1e-6)
    refused("usage", [two], tmp_path / "model", out=tmp_path / "no", reference=tmp_path / "model")


# ------------------------------------------------------------------------------- layouts


def test_a_folder_of_transformers_js(tmp_path: Path) -> None:
    base = graph_of(
        tmp_path / "base" / "onnx" / "model.onnx", [product("fc", "w")], weight("w", 6, 8)
    )
    (tmp_path / "base" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    adapter = lora(tmp_path / "lora", fc=(8, 6))
    result = merge([adapter], tmp_path / "base", out=tmp_path / "out")
    assert result.targets == 1
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert files == {"onnx", "onnx/model.onnx", "config.json", "tokenizer.json", "loratools.json"}
    merge([adapter], base, out=tmp_path / "one.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "out/onnx/model.onnx").read_bytes()
    assert verify(tmp_path / "out").proved == "replay"
    assert verify(tmp_path / "one.onnx", base=base, adapters=[adapter]).proved == "replay"


def test_several_graphs_are_named(tmp_path: Path) -> None:
    for name in ("decoder_model.onnx", "encoder_model.onnx"):
        graph_of(tmp_path / "base" / name, [product("fc", "w")], weight("w", 6, 8))
    adapter = lora(tmp_path / "lora", fc=(8, 6))
    message = refused("usage", [adapter], tmp_path / "base", out=tmp_path / "no")
    assert "decoder_model.onnx" in message
    assert (
        merge([adapter], tmp_path / "base" / "decoder_model.onnx", out=tmp_path / "out").targets
        == 1
    )


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    base = graph_of(tmp_path / "base.onnx", [product("fc", "w")], weight("w", 6, 8))
    merge([lora(tmp_path / "lora", fc=(8, 6))], base, out=tmp_path / "out")
    out = tmp_path / "out" / "base.onnx"
    raw = bytearray(out.read_bytes())
    at = read(local(out), out.name).tensors["w"].leaf.offset
    raw[at] ^= 1
    out.write_bytes(raw)
    assert not verify(tmp_path / "out").ok


def test_nothing_is_left_of_a_fold_that_fails(tmp_path: Path) -> None:
    base = graph_of(tmp_path / "base.onnx", [product("fc", "w")], weight("w", 6, 8, dtype="<f2"))
    model = onnx.load(base)
    model.graph.initializer[0].raw_data = np.full((6, 8), 65504, "<f2").tobytes()
    base.write_bytes(model.SerializeToString())
    adapter = lora(tmp_path / "lora", fc=(8, 6))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v * 1000 for k, v in tensors.items()}, adapter / "adapter_model.safetensors")
    refused("overflow", [adapter], base, out=tmp_path / "out", allow=["large_update"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.onnx", "lora"]


def test_check_needs_neither_torch_nor_onnx(tmp_path: Path) -> None:
    base = graph_of(tmp_path / "base.onnx", [product("fc", "w")], weight("w", 6, 8))
    adapter = lora(tmp_path / "lora", fc=(8, 6))
    code = (
        "import sys; from loratools.commands.check import check;"
        f"found = check([{str(adapter)!r}], {str(base)!r}); assert found.ok and found.matched == 1;"
        "heavy = {'torch', 'onnx', 'numpy', 'onnxruntime', 'google.protobuf'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_optimums_own_graph(tmp_path: Path, field_data: Path) -> None:
    """A graph of optimum's whose products have no names but those of the biases behind them."""
    base = field_data / "adapters_and_models" / "optimum-tiny-onnx"
    name = "distilbert__transformer__layer__0__attention__q_lin"
    adapter = lora(tmp_path / "lora", **{name: (2, 2)})
    merge([adapter], base, out=tmp_path / "out")
    change = stored(tmp_path / "out" / "model.onnx", "302").astype("f8") - stored(
        base / "model.onnx", "302"
    )
    assert np.allclose(change, update(adapter, name.replace("__", ".")).T, atol=1e-6)


@pytest.mark.slow
def test_transformers_own_exporter(tmp_path: Path) -> None:
    """One graph for prompt and decoding, by transformers' exporter."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    def exported(model: Path, out: Path) -> Path:
        inputs = {"input_ids": bases.IDS, "attention_mask": bases.MASK}
        made = OnnxExporter().export_for_generation(
            bases.loaded(model, "llama"), inputs, OnnxConfig(dynamic=True), multi_token_decode=True
        )
        made.save_pretrained(out)
        return out / "decode.onnx"

    base = bases.folder(tmp_path / "base", "llama", biases=True)
    graph = exported(base, tmp_path / "graph")
    adapter = bases.adapter(tmp_path / "lora", base, "llama")
    merge([adapter], base, out=tmp_path / "folded")
    result = merge([adapter], graph, out=tmp_path / "out", reference=base)
    assert result.targets == 14
    assert is_exported(
        tmp_path / "out" / "decode.onnx", exported(tmp_path / "folded", tmp_path / "n")
    )
