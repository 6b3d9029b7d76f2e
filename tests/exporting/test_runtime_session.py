"""Sessions that are what was asked for; onnxruntime and transformers are the judges."""

import importlib.metadata

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf

from loratools import LoratoolsError, formats
from loratools.adapter import Leaf
from loratools.containers import flatbuffer
from loratools.containers.local import LocalFile
from loratools.exporting import installed
from loratools.exporting.runtime import generate, session
from loratools.exporting.switchable import pack, switchable
from loratools.exporting.with_runtime import Past
from tests.exporting import flat_graphs

IDS = np.array([[3, 4, 5, 6, 7], [1, 2, 3, 9, 8]])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Llama's graph, a switchable one, two packs and the live models of PEFT."""
    folder = tmp_path_factory.mktemp("session")
    model = flat_graphs.fresh("llama")
    flat_graphs.causal(model, folder / "model.onnx")
    live = []
    for seed, targets in enumerate((["q_proj", "down_proj"], ["v_proj"])):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
        live.append(peft.get_peft_model(flat_graphs.fresh("llama"), config).eval())
        live[-1].save_pretrained(folder / str(seed))
    adapters = [formats.read(folder / str(seed)) for seed in (0, 1)]
    switchable(folder / "model.onnx", folder / "switchable.onnx", adapters)
    for seed, adapter in enumerate(adapters):
        pack(adapter, folder / "switchable.onnx", folder / f"{seed}.onnx_adapter")
    return folder, model, live


def refused(call, *arguments, **options):
    with pytest.raises(LoratoolsError) as caught:
        call(*arguments, **options)
    return caught.value


def greedy(live, ids, steps, mask=None):
    """Token by token without any cache, each row by itself, without its padding."""
    rows = []
    for number, row in enumerate(ids):
        some = torch.tensor(row if mask is None else row[mask[number] == 1])[None]
        first = some.shape[1]
        for _ in range(steps):
            with torch.no_grad():
                logits = live(input_ids=some).logits
            some = torch.cat([some, logits[:, -1].argmax(-1, keepdim=True)], 1)
        rows.append(some[0, first:].tolist())
    return rows


def test_packs_are_switched_call_by_call(made):
    folder, model, live = made
    graph = session(folder / "switchable.onnx")
    base = session(folder / "model.onnx")
    feeds = flat_graphs.feeds(model, IDS)
    plain = base.run(feeds)["logits"]
    for number in (None, 0, 1, 0, None, 1):
        adapter = None if number is None else folder / f"{number}.onnx_adapter"
        found = graph.run(feeds, adapter=adapter)["logits"]
        if number is None:
            assert np.array_equal(found, plain)
        else:
            with torch.no_grad():
                expected = live[number](input_ids=torch.tensor(IDS)).logits.numpy()
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert graph.inputs.keys() == base.inputs.keys()


@pytest.mark.parametrize("number", [None, 0, 1])
def test_greedy_tokens_are_those_of_transformers(number, made):
    folder, model, live = made
    mask = np.ones_like(IDS)
    mask[0, :2] = 0
    graph = session(folder / "switchable.onnx")
    adapter = None if number is None else folder / f"{number}.onnx_adapter"
    one = model if number is None else live[number]
    found = generate(graph, IDS, steps=7, attention_mask=mask, adapter=adapter)
    assert found.tolist() == greedy(one, IDS, 7, mask)


def test_bound_inputs_give_the_same_tokens(made):
    folder, model, _ = made
    graph = session(folder / "model.onnx")
    found = generate(graph, IDS, steps=5, bind=True)
    assert found.tolist() == generate(graph, IDS, steps=5).tolist() == greedy(model, IDS, 5)
    feeds = flat_graphs.feeds(model, IDS)
    bound = graph.bound(feeds)
    assert np.array_equal(bound["logits"].numpy(), graph.run(feeds)["logits"])


def test_adapters_with_bound_inputs_are_refused_since_onnxruntime_ignores_them(made):
    folder, model, _ = made
    graph = session(folder / "switchable.onnx")
    path = folder / "0.onnx_adapter"
    feeds = flat_graphs.feeds(model, IDS)
    for call in (
        lambda: graph.bound(feeds, adapter=path),
        lambda: generate(graph, IDS, steps=1, adapter=path, bind=True),
    ):
        error = refused(call)
        assert error.code == "usage"
        assert "ignores adapters" in str(error)
    # What happens without us:
    binding = graph.inner.io_binding()
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("logits")
    loaded, options = ort.LoraAdapter(), ort.RunOptions()
    loaded.Load(str(path))
    options.add_active_adapter(loaded)
    graph.inner.run_with_iobinding(binding, options)
    assert np.array_equal(binding.copy_outputs_to_cpu()[0], graph.run(feeds)["logits"])


def test_two_adapters_at_once_are_refused_since_onnxruntime_takes_the_first(made):
    folder, model, _ = made
    graph = session(folder / "switchable.onnx")
    both = [folder / "0.onnx_adapter", folder / "1.onnx_adapter"]
    feeds = flat_graphs.feeds(model, IDS)
    error = refused(graph.run, feeds, adapter=both)
    assert error.code == "usage"
    assert "stack" in str(error)
    options, loaded = ort.RunOptions(), [ort.LoraAdapter(), ort.LoraAdapter()]
    for one, path in zip(loaded, both, strict=True):
        one.Load(str(path))
        options.add_active_adapter(one)
    theirs = graph.inner.run(["logits"], feeds, options)[0]
    assert np.array_equal(theirs, graph.run(feeds, adapter=both[0])["logits"])


def test_packs_that_do_not_fit_are_refused_before_a_run(made, tmp_path):
    folder = made[0]
    graph = session(folder / "switchable.onnx")
    leaves = flatbuffer.read(LocalFile(folder / "0.onnx_adapter"))
    some = dict(leaves.leaves)
    name = next(iter(some))
    wrong = Leaf.of(name, torch.zeros(some[name].shape[0] + 1, 2))
    for changed, code in (
        (some | {"nope": wrong}, "unmatched"),
        (some | {name: wrong}, "shape_mismatch"),
        ({k: v for k, v in some.items() if k != name}, "missing"),
    ):
        flatbuffer.write(tmp_path / "x.onnx_adapter", changed, model_version=0)
        error = refused(graph.run, {}, adapter=tmp_path / "x.onnx_adapter")
        assert error.code == code
        graph.packs.clear()
    flatbuffer.write(tmp_path / "x.onnx_adapter", some, model_version=7)
    assert refused(graph.run, {}, adapter=tmp_path / "x.onnx_adapter").code == "other_base"
    assert refused(graph.run, {}, adapter=tmp_path / "none.onnx_adapter").code == "not_found"


@pytest.mark.parametrize("name", ["cuda", "CUDAExecutionProvider", "tensorrt", "coreml", "nope"])
def test_a_provider_that_does_not_come_is_an_error(name, made):
    folder = made[0]
    if name == "nope" or torch.cuda.is_available() is False:
        error = refused(session, folder / "model.onnx", providers=[name, "cpu"])
        assert error.code == "not_installed"
        assert "was requested but could not be loaded" in str(error)
        if "cuda" in name.lower():
            assert "onnxruntime-gpu[cuda,cudnn]" in str(error)


def test_both_packages_of_onnxruntime_are_told_apart_from_one(made, monkeypatch, tmp_path):
    """A distribution of that name on the path is what pip leaves of an overwritten one."""
    about = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n"
    )
    installed.require("onnxruntime")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.metadata.version("onnxruntime-gpu") == "1.31.1"
    error = refused(session, made[0] / "model.onnx")
    assert error.code == "not_installed"
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in str(error)


def test_what_is_no_graph_is_refused(made, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no graph at all")
    assert refused(session, tmp_path / "bad.onnx").code == "not_exportable"
    assert refused(session, tmp_path / "none.onnx").code == "not_found"
    with pytest.raises(InvalidProtobuf):
        ort.InferenceSession(str(tmp_path / "bad.onnx"))


def test_a_past_needs_a_graph_that_takes_one(made, tmp_path):
    model = flat_graphs.fresh("bert")
    flat_graphs.encoder(model, tmp_path / "model.onnx", "last_hidden_state")
    past = Past({"past_key_values.0.key": np.zeros((1, 2, 3, 8), np.float32)})
    graph = session(tmp_path / "model.onnx")
    assert refused(generate, graph, IDS, steps=1, past=past).code == "not_exportable"
    llama = session(made[0] / "model.onnx")
    assert refused(generate, llama, IDS, steps=1, past=past).code == "missing"
    assert generate(llama, IDS, steps=0).shape == (2, 0)


@pytest.mark.gpu
def test_a_gpu_computes_the_same(made):
    folder, model, _ = made
    graph = session(folder / "model.onnx", providers=["cuda"])
    assert graph.device == "cuda"
    expected = greedy(model, IDS, 5)
    assert generate(graph, IDS, steps=5).tolist() == expected
    assert generate(graph, IDS, steps=5, bind=True).tolist() == expected
