"""Adapters switched in a graph: onnxruntime runs it, PEFT and transformers say what is right."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import peft
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper

from loratools import LoratoolsError, formats
from loratools.bind import bind
from loratools.containers import flatbuffer
from loratools.containers.local import LocalFile
from loratools.exporting.precision import to_fp16
from loratools.exporting.quantising import quantise
from loratools.exporting.switchable import base_of, described, pack, switchable, switches_of
from tests.exporting import flat_graphs

# Two adapters of other ranks and targets on each model; the third names the ties.
MODELS = {
    "llama": (["q_proj", "down_proj", "lm_head"], ["v_proj", "q_proj"], None),
    "gpt2": (["c_attn", "mlp.c_proj"], ["c_fc", "wpe"], None),
    "embeddings": (["embed_tokens", "q_proj"], ["o_proj"], None),
    "tied": (["embed_tokens", "q_proj"], ["o_proj"], "tied"),
    "untied": (["embed_tokens", "q_proj"], ["o_proj"], "untied"),
    "gpt2, tied": (["wte", "c_attn"], ["c_fc"], "tied"),
    "bert": (["query", "output.dense"], ["word_embeddings"], None),
    "roberta": (["query", "out_proj"], ["value", "dense"], None),
}
BASES = {"embeddings": "llama", "untied": "tied", "gpt2, tied": "gpt2"}
IDS = np.array([[3, 4, 5, 6, 7], [1, 2, 3, 9, 8], [11, 12, 13, 14, 15]])


def peft_of(base, seed, folder, **options):
    torch.manual_seed(seed)
    config = peft.LoraConfig(init_lora_weights=False, **options)
    model = peft.get_peft_model(flat_graphs.fresh(base), config).eval()
    model.save_pretrained(folder)
    return model, formats.read(folder)


class Made:
    """A base's graph, two adapters by PEFT, and all that is made of them."""

    def __init__(self, name, folder):
        first, second, self.ties = MODELS[name]
        self.base = BASES.get(name, name)
        self.folder = folder
        self.model = flat_graphs.fresh(self.base)
        self.graph = folder / "model.onnx"
        if self.base in ("bert", "roberta"):
            output = "logits" if self.base == "roberta" else "last_hidden_state"
            flat_graphs.encoder(self.model, self.graph, output)
        else:
            flat_graphs.causal(self.model, self.graph)
        one = peft_of(self.base, 1, folder / "1", r=3, lora_alpha=7, target_modules=first)
        two = peft_of(
            self.base, 2, folder / "2", r=5, lora_alpha=2, use_rslora=True, target_modules=second
        )
        self.live, self.adapters = [one[0], two[0]], [one[1], two[1]]
        self.out = folder / "switchable.onnx"
        self.switches = switchable(self.graph, self.out, self.adapters, ties=self.ties)
        self.packs = [folder / f"{n}.onnx_adapter" for n in "abc"]
        for number in (0, 1):
            pack(self.adapters[number], self.out, self.packs[number], ties=self.ties)
        pack(self.adapters, self.out, self.packs[2], weights=[0.7, -0.3], ties=self.ties)

    def feeds(self, ids=IDS, **options):
        if self.base in ("bert", "roberta"):
            return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        return flat_graphs.feeds(self.model, ids, **options)

    def expected(self, live):
        with torch.no_grad():
            return live(input_ids=torch.tensor(IDS))[0].numpy()


def run(path, feeds, *packs):
    """All outputs, as onnxruntime computes them without anything of ours."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options)
    chosen, loaded = ort.RunOptions(), []
    for one in packs:
        loaded.append(ort.LoraAdapter())
        loaded[-1].Load(str(one))
        chosen.add_active_adapter(loaded[-1])
    return session.run(None, feeds, chosen)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found = {}

    def find(name):
        if name not in found:
            found[name] = Made(name, tmp_path_factory.mktemp("graph"))
        return found[name]

    return find


@pytest.mark.parametrize("name", MODELS)
def test_without_a_pack_it_is_the_base_bit_for_bit(name, made):
    one = made(name)
    onnx.checker.check_model(str(one.out), full_check=True)
    for base, idle in zip(run(one.graph, one.feeds()), run(one.out, one.feeds()), strict=True):
        assert np.array_equal(base, idle)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("number", [0, 1])
def test_with_a_pack_it_computes_what_peft_does(name, number, made):
    one = made(name)
    live = one.live[number]
    if one.ties == "tied":  # head and embedding both, as in the model that PEFT merges
        live = peft.PeftModel.from_pretrained(
            flat_graphs.fresh(one.base), one.folder / "12"[number]
        )
        live = live.merge_and_unload().eval()
    expected, found = one.expected(live), run(one.out, one.feeds(), one.packs[number])[0]
    scale = max(1, np.abs(expected).max())
    assert np.abs(found - run(one.graph, one.feeds())[0]).max() > 1e-3
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "tied"])
def test_a_stack_is_the_weighted_sum_of_both(name, made):
    """Merged by PEFT one after another, by their weights."""
    one = made(name)
    merged = flat_graphs.fresh(one.base)
    for folder, weight in (("1", 0.7), ("2", -0.3)):
        live = peft.PeftModel.from_pretrained(merged, one.folder / folder)
        for module in live.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                module.scaling["default"] *= weight
        merged = live.merge_and_unload().eval()
    expected, found = one.expected(merged), run(one.out, one.feeds(), one.packs[2])[0]
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoding_from_the_cache_is_as_prefilling_it_all(name, made):
    one = made(name)
    first = run(one.out, one.feeds(IDS[:, :3]), one.packs[0])
    words = [f"past_key_values.{n}.{w}" for n in range(2) for w in ("key", "value")]
    past = dict(zip(words, first[1:], strict=True))
    then = run(one.out, one.feeds(IDS[:, 3:], past=past), one.packs[0])[0]
    with torch.no_grad():
        expected = one.live[0](input_ids=torch.tensor(IDS)).logits[:, 3:].numpy()
    np.testing.assert_allclose(then, expected, atol=1e-5)


def test_padded_rows_are_as_those_of_peft(made):
    one = made("llama")
    mask = np.ones_like(IDS)
    mask[0, :2] = 0
    feeds = one.feeds(mask=mask)
    with torch.no_grad():
        given = {k: torch.tensor(feeds[k]) for k in ("attention_mask", "position_ids")}
        expected = one.live[0](input_ids=torch.tensor(IDS), **given).logits.numpy()
    found = run(one.out, feeds, one.packs[0])[0]
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-5)


def test_every_parameter_is_in_every_pack(made):
    one = made("llama")
    names = {n for s in one.switches.parameters for n in (s.a, s.b)}
    assert switches_of(one.out) == one.switches
    session = ort.InferenceSession(str(one.out), ort.SessionOptions())
    assert {v.name for v in session.get_overridable_initializers()} == names
    assert {i.name for i in session.get_inputs()}.isdisjoint(names)
    for path in one.packs:
        file = flatbuffer.read(LocalFile(path))
        assert set(file.leaves) == names
        assert file.model_version == one.switches.version
    second = flatbuffer.read(LocalFile(one.packs[1])).leaves
    assert second["lm_head.lora_A.weight"].shape == (16, 0)  # of which the second has nothing
    both = flatbuffer.read(LocalFile(one.packs[2])).leaves
    assert both["model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (16, 3 + 5)
    said = described(one.packs[2])
    assert said["base"] == one.switches.base
    assert said["weights"] == [0.7, -0.3]
    assert said["ranks"]["model.layers.1.self_attn.q_proj.weight"] == 8


def test_our_own_reader_takes_a_pack(made):
    one = made("llama")
    again = formats.read(one.packs[1])
    assert {p.code for p in again.problems} == {"no_effect"}  # notes of the untouched
    key = "model.layers.0.self_attn.v_proj.weight"
    ours, theirs = again.deltas[key], one.adapters[1].deltas[key]
    assert again.deltas.keys() == one.adapters[1].deltas.keys()
    torch.testing.assert_close(
        ours.b.tensor() @ ours.a.tensor(), theirs.scaling * theirs.b.tensor() @ theirs.a.tensor()
    )


def test_equal_inputs_give_equal_bytes(made, tmp_path):
    one = made("llama")
    assert switchable(one.graph, tmp_path / "again.onnx", one.adapters) == one.switches
    assert (tmp_path / "again.onnx").read_bytes() == one.out.read_bytes()
    shutil.copy(one.graph.parent / "config.json", tmp_path)
    pack(one.adapters[0], tmp_path / "again.onnx", tmp_path / "a.onnx_adapter")
    assert (tmp_path / "a.onnx_adapter").read_bytes() == one.packs[0].read_bytes()


def test_data_beside_the_graph_is_carried_along(made, tmp_path):
    one = made("llama")
    model = onnx.load(one.graph)
    onnx.save(
        model, tmp_path / "base.onnx", save_as_external_data=True, location="base.onnx.data",
        size_threshold=0,
    )  # fmt: skip
    shutil.copy(one.graph.parent / "config.json", tmp_path)
    there = tmp_path / "there"
    made_of = switchable(tmp_path / "base.onnx", there / "model.onnx", one.adapters)
    assert made_of.base == one.switches.base  # the same numbers, elsewhere
    assert (there / "base.onnx.data").read_bytes() == (tmp_path / "base.onnx.data").read_bytes()
    found = run(there / "model.onnx", one.feeds(), one.packs[0])
    assert np.array_equal(found[0], run(one.out, one.feeds(), one.packs[0])[0])


def test_a_graph_of_half_precision_takes_packs_of_half_precision(made, tmp_path):
    one = made("llama")
    to_fp16(one.graph, tmp_path / "half.onnx")
    shutil.copy(one.graph.parent / "config.json", tmp_path)
    switchable(tmp_path / "half.onnx", tmp_path / "out.onnx", one.adapters)
    pack(one.adapters[0], tmp_path / "out.onnx", tmp_path / "a.onnx_adapter")
    leaves = flatbuffer.read(LocalFile(tmp_path / "a.onnx_adapter")).leaves
    assert {leaf.dtype for leaf in leaves.values()} == {"F16"}
    found = run(tmp_path / "out.onnx", one.feeds(), tmp_path / "a.onnx_adapter")[0]
    np.testing.assert_allclose(found, one.expected(one.live[0]), atol=3e-2)
    with pytest.raises(LoratoolsError) as caught:
        pack(one.adapters[0], tmp_path / "out.onnx", tmp_path / "b.onnx_adapter", weights=[1e6])
    assert caught.value.code == "overflow"


@pytest.mark.parametrize(("method", "bits"), [("dynamic", 8), ("nbits", 4), ("qdq", 8)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
def test_a_quantised_graph_is_switched_by_the_same_packs(name, method, bits, made, tmp_path):
    """Idle it is the quantised base; active it is off by what the base loses to the quantiser."""
    one = made(name)
    plain = quantise(one.graph, tmp_path / "base.onnx", bits=bits, method=method)
    found = quantise(one.out, tmp_path / "out.onnx", bits=bits, method=method)
    assert (found.weights, found.kept) == (plain.weights, plain.kept)  # the parameters are neither
    assert switches_of(tmp_path / "out.onnx") == one.switches
    names = {n for s in one.switches.parameters for n in (s.a, s.b)}
    session = ort.InferenceSession(str(tmp_path / "out.onnx"), ort.SessionOptions())
    assert {v.name for v in session.get_overridable_initializers()} == names
    base, idle = (run(tmp_path / n, one.feeds()) for n in ("base.onnx", "out.onnx"))
    for left, right in zip(base, idle, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)

    def off(number, right):
        return np.linalg.norm(number - right) / np.linalg.norm(right)

    lost = off(base[0], run(one.graph, one.feeds())[0])
    for path in one.packs:
        moved = run(tmp_path / "out.onnx", one.feeds(), path)[0]
        assert off(moved, run(one.out, one.feeds(), path)[0]) < max(2 * lost, 1e-3)
        assert off(moved, idle[0]) > lost


@pytest.mark.parametrize(("method", "bits"), [("nbits", 4), ("qdq", 8)])
@pytest.mark.parametrize("name", ["gpt2", "embeddings", "roberta"])
def test_a_quantised_graph_gets_switches(name, method, bits, made, tmp_path):
    """Idle it is the quantised base, active it is as one that was quantised afterwards."""
    one = made(name)
    shutil.copy(one.graph.parent / "config.json", tmp_path)
    base, after, before = (tmp_path / f"{n}.onnx" for n in ("base", "after", "before"))
    quantise(one.graph, base, bits=bits, method=method)
    found = switchable(base, after, one.adapters)
    assert found.parameters == one.switches.parameters
    onnx.checker.check_model(str(after))
    for left, right in zip(run(base, one.feeds()), run(after, one.feeds()), strict=True):
        # onnxruntime multiplies behind a DequantizeLinear in another order where an Add follows
        np.testing.assert_allclose(left, right, atol=0 if method == "nbits" else 1e-6, rtol=0)
    quantise(one.out, before, bits=bits, method=method)
    for number in (0, 1):
        path = tmp_path / f"{number}.onnx_adapter"
        pack(one.adapters[number], after, path)
        expected = run(before, one.feeds(), one.packs[number])[0]
        np.testing.assert_allclose(run(after, one.feeds(), path)[0], expected, atol=1e-5)


@pytest.mark.parametrize(("method", "bits"), [("dynamic", 8), ("nbits", 4), ("qdq", 8)])
def test_packs_are_made_for_a_quantised_graph_too(method, bits, made, tmp_path):
    one = made("gpt2")
    shutil.copy(one.graph.parent / "config.json", tmp_path)
    quantise(one.out, tmp_path / "out.onnx", bits=bits, method=method)
    pack(one.adapters[0], tmp_path / "out.onnx", tmp_path / "a.onnx_adapter")
    assert (tmp_path / "a.onnx_adapter").read_bytes() == one.packs[0].read_bytes()


def test_what_a_quantised_graph_cannot_take_is_refused_by_name(made, tmp_path):
    one = made("llama")  # PEFT saves a copy of the head with the first adapter
    shutil.copy(one.graph.parent / "config.json", tmp_path)
    base = tmp_path / "base.onnx"
    quantise(one.graph, base, bits=4, method="nbits")
    error = refused(switchable, base, tmp_path / "out.onnx", one.adapters)
    assert error.code == "not_exportable"
    assert "lm_head.weight: the adapter brings a copy" in str(error)
    assert "then quantise that" in str(error)
    quantise(one.graph, base, bits=8, method="dynamic")
    error = refused(switchable, base, tmp_path / "out.onnx", one.adapters)
    assert error.code in ("quantised_base", "graph_changed")
    assert "codes" in str(error) or "is stored as I8" in str(error)


# ------------------------------------------------------------------------------- refusals


def refused(call, *arguments, **options):
    with pytest.raises(LoratoolsError) as caught:
        call(*arguments, **options)
    return caught.value


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (peft.LoraConfig, {"use_dora": True, "r": 2, "target_modules": ["q_proj"]}),
        (peft.IA3Config, {"target_modules": ["k_proj"], "feedforward_modules": []}),
        (peft.OFTConfig, {"target_modules": ["q_proj"], "oft_block_size": 4, "r": 0}),
    ],
)
def test_what_is_no_product_is_refused_with_what_to_do(config, options, made, tmp_path):
    model = peft.get_peft_model(flat_graphs.fresh("llama"), config(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "a")
    error = refused(
        switchable, made("llama").graph, tmp_path / "out.onnx", [formats.read(tmp_path / "a")]
    )
    assert error.code == "not_exportable"
    assert "fold it instead" in str(error)
    assert not (tmp_path / "out.onnx").exists()


def test_a_loha_is_exactly_a_product_of_the_squared_rank(made, tmp_path):
    config = peft.LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False)
    peft.get_peft_model(flat_graphs.fresh("llama"), config).save_pretrained(tmp_path / "a")
    adapter = formats.read(tmp_path / "a")
    one = made("llama")
    out = tmp_path / "out.onnx"
    switchable(one.graph, out, [adapter])  # LoHa of rank 2 is exactly of rank 4
    shutil.copy(one.graph.parent / "config.json", tmp_path)
    pack(adapter, out, tmp_path / "a.onnx_adapter")
    live = peft.PeftModel.from_pretrained(flat_graphs.fresh("llama"), tmp_path / "a").eval()
    found = run(out, one.feeds(), tmp_path / "a.onnx_adapter")[0]
    np.testing.assert_allclose(found, one.expected(live), atol=1e-5)


def test_an_adapter_of_another_base_is_refused(made, tmp_path):
    adapter = peft_of("gpt2", 5, tmp_path / "a", r=2, target_modules=["c_attn"])[1]
    error = refused(switchable, made("llama").graph, tmp_path / "out.onnx", [adapter])
    assert error.exit == 4


def test_a_weight_without_a_switch_is_named(made, tmp_path):
    one = made("llama")
    adapter = peft_of("llama", 5, tmp_path / "a", r=2, target_modules=["k_proj"])[1]
    error = refused(pack, adapter, one.out, tmp_path / "a.onnx_adapter")
    assert error.code == "unmatched"
    assert "k_proj.weight has no switch" in str(error)
    assert error.problems[0].remedy


def test_plain_graphs_and_switchable_ones_are_told_apart(made, tmp_path):
    one = made("llama")
    error = refused(pack, one.adapters[0], one.graph, tmp_path / "a.onnx_adapter")
    assert error.code == "not_exportable"
    shutil.copy(one.graph.parent / "config.json", tmp_path)
    shutil.copy(one.out, tmp_path / "in.onnx")
    error = refused(switchable, tmp_path / "in.onnx", tmp_path / "out.onnx", one.adapters)
    assert error.code in ("duplicate", "not_exportable")
    assert "switchable" in str(error)


def test_names_may_be_chosen(made, tmp_path):
    one = made("llama")
    shutil.copy(one.graph.parent / "config.json", tmp_path)
    out = tmp_path / "out.onnx"
    found = switchable(one.graph, out, one.adapters, names="{module}.lora_{side}.MatMul.weight")
    assert found.parameters[0].a.endswith(".lora_A.MatMul.weight")
    pack(one.adapters[0], out, tmp_path / "a.onnx_adapter")
    expected = run(one.out, one.feeds(), one.packs[0])[0]
    assert np.array_equal(run(out, one.feeds(), tmp_path / "a.onnx_adapter")[0], expected)
    for bad in ("{module}", "lora_{side}", "{module}.{side}.{0}", "x"):
        assert refused(switchable, one.graph, out, one.adapters, names=bad).code == "usage"


def test_a_plan_says_which_weights_take_part(made, tmp_path):
    one = made("llama")
    shutil.copy(one.graph.parent / "config.json", tmp_path)
    plan = bind(
        one.adapters[:1], base_of(one.graph), chosen=lambda *names: "q_proj" in names[0],
        weights=[0.5],
    )  # fmt: skip
    found = switchable(one.graph, tmp_path / "out.onnx", one.adapters[:1], plan=plan)
    assert {s.target.split(".")[-2] for s in found.parameters} == {"q_proj"}
    pack(one.adapters[:1], tmp_path / "out.onnx", tmp_path / "a.onnx_adapter", plan=plan)
    leaves = flatbuffer.read(LocalFile(tmp_path / "a.onnx_adapter")).leaves
    name = found.parameters[0]
    delta = one.adapters[0].deltas[name.target]
    torch.testing.assert_close(
        leaves[name.b].tensor(), 0.5 * delta.scaling * delta.b.tensor().T.contiguous()
    )


def small(path, nodes, weight, **more):
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, more.get("x", ["n", 6]))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])],
        [numpy_helper.from_array(weight, "fc.weight"), *more.get("others", [])],
    )
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(made, opset_imports=[opset], ir_version=10), path)
    return path


def linear(tmp_path, out=4, inside=6):
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("fc", torch.nn.Linear(inside, out, bias=False))
    config = peft.LoraConfig(target_modules=["fc"], r=2, lora_alpha=5, init_lora_weights=False)
    live = peft.get_peft_model(model, config)
    live.save_pretrained(tmp_path / "fc")
    return live, formats.read(tmp_path / "fc")


NODES = {
    "Gemm": lambda: [helper.make_node("Gemm", ["x", "fc.weight"], ["y"], transB=1)],
    "Transpose": lambda: [
        helper.make_node("Transpose", ["fc.weight"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ],
    "in a branch": lambda: [
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node(
            "If", ["yes"], ["y"],
            then_branch=helper.make_graph(
                [helper.make_node("Gemm", ["x", "fc.weight"], ["y1"], transB=1)], "then", [],
                [helper.make_tensor_value_info("y1", TensorProto.FLOAT, ["a", "b"])],
            ),
            else_branch=helper.make_graph(
                [helper.make_node("Identity", ["x"], ["y2"])], "else", [],
                [helper.make_tensor_value_info("y2", TensorProto.FLOAT, ["a", "b"])],
            ),
        ),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", NODES)
def test_the_ways_in_which_graphs_multiply(kind, tmp_path):
    live, adapter = linear(tmp_path)
    weight = live.base_model.model.fc.base_layer.weight.detach().numpy()
    graph = small(tmp_path / "model.onnx", NODES[kind](), weight)
    switchable(graph, tmp_path / "out.onnx", [adapter])
    pack(adapter, tmp_path / "out.onnx", tmp_path / "a.onnx_adapter")
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    found = run(tmp_path / "out.onnx", {"x": x}, tmp_path / "a.onnx_adapter")[0]
    np.testing.assert_allclose(found, live(torch.tensor(x)).detach().numpy(), atol=1e-5)
    assert np.array_equal(run(graph, {"x": x})[0], run(tmp_path / "out.onnx", {"x": x})[0])


OTHERS = {
    "left": ([helper.make_node("MatMul", ["fc.weight", "x"], ["y"])], {"x": [6, "n"]}),
    "alpha": ([helper.make_node("Gemm", ["x", "fc.weight"], ["y"], transB=1, alpha=2.0)], {}),
    "added": ([helper.make_node("Add", ["x", "fc.weight"], ["y"])], {"x": [4, 6]}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_weight_that_is_no_right_factor_is_refused_by_name(kind, tmp_path):
    live, adapter = linear(tmp_path)
    weight = live.base_model.model.fc.base_layer.weight.detach().numpy()
    nodes, more = OTHERS[kind]
    graph = small(tmp_path / "model.onnx", nodes, weight, **more)
    error = refused(switchable, graph, tmp_path / "out.onnx", [adapter])
    assert error.code == "not_exportable"
    assert "fc.weight" in str(error)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"base": "zz", "parameters": {}}', "[" * 5000])
def test_metadata_that_we_did_not_write_is_malformed(text, made, tmp_path):
    model = onnx.load(made("llama").out)
    for entry in model.metadata_props:
        if entry.key == "loratools.switchable":
            entry.value = text
    onnx.save(model, tmp_path / "bad.onnx")
    assert refused(switches_of, tmp_path / "bad.onnx").code == "malformed"


# ------------------------------------------------------------------------------- others' files


def test_the_sample_of_onnxruntime_is_read(field_data):
    path = field_data / "adapters_and_models" / "ort-two-params-onnx-adapter"
    [path] = path.glob("*.onnx_adapter")
    adapter = formats.read(path)
    theirs = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    assert len(theirs) == 2
    file = flatbuffer.read(LocalFile(path))
    for name, value in theirs.items():
        assert np.array_equal(value.numpy(), file.leaves[name].tensor().numpy())
    assert len(adapter.deltas) <= 1


def test_a_graph_that_optimum_made_takes_switches(field_data, tmp_path):
    """Its weights, in transformers' own class, with PEFT's adapter on it, say what is right."""
    for name in ("model.onnx", "config.json"):
        shutil.copy(field_data / "adapters_and_models" / "optimum-tiny-onnx" / name, tmp_path)
    graph = tmp_path / "model.onnx"
    config = transformers.AutoConfig.from_pretrained(tmp_path)

    def fresh():
        model = transformers.DistilBertForSequenceClassification(config).eval()
        weights = {name: leaf.tensor() for name, leaf in base_of(graph).tensors.items()}
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        return model

    torch.manual_seed(3)
    options = peft.LoraConfig(
        r=2, target_modules=["q_lin", "lin1", "classifier"], init_lora_weights=False, lora_alpha=5
    )
    live = peft.get_peft_model(fresh(), options).eval()
    live.save_pretrained(tmp_path / "a")
    adapter = formats.read(tmp_path / "a")
    switchable(graph, tmp_path / "out.onnx", [adapter])
    pack(adapter, tmp_path / "out.onnx", tmp_path / "a.onnx_adapter")
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    base = run(graph, feeds)[0]
    assert np.array_equal(base, run(tmp_path / "out.onnx", feeds)[0])
    found = run(tmp_path / "out.onnx", feeds, tmp_path / "a.onnx_adapter")[0]
    with torch.no_grad():
        expected = live(**{k: torch.tensor(v) for k, v in feeds.items()}).logits.numpy()
    assert np.abs(found - base).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_pack_says_what_it_is_for(made):
    one = made("llama")
    said = json.loads(one.packs[0].with_name("a.onnx_adapter.json").read_text())
    assert said["adapters"] == ["1"]
    assert said["schema"] == 1
    assert not any("/" in str(v) for v in said.values())
