"""`export`: what is written beside the graph and in it, what is refused, and how a proof fails."""

import getpass
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import loratools
from loratools.exporting import tracing
from loratools.exporting.cleaning import array_of
from tests.exporting import exportable_models

ROOT = Path(__file__).parents[2]
RUN = "import sys; from loratools.cli import main; sys.argv[0] = 'loratools'; sys.exit(main())"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A bf16 Llama, whose config names a path of the machine that trained it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    exportable_models.save("llama-tied", folder, lambda m: m.to(torch.bfloat16))
    config = json.loads((folder / "config.json").read_bytes())
    text = json.dumps(config | {"_name_or_path": "/home/somebody/run-7"})
    (folder / "config.json").write_text(text)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    return folder


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "graph"
    result = loratools.export(base, out=out, exporter="legacy")
    return out, result


def cli(*arguments, cwd=None, **environment):
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    path = os.pathsep.join([*filter(None, [environment.pop("PYTHONPATH", "")]), str(ROOT)])
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def opened(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def refused(code, model, **options):
    with pytest.raises(loratools.LoratoolsError) as found:
        loratools.export(model, **options)
    assert found.value.code == code, found.value.message
    return found.value


# ------------------------------------------------------------------------------- what is written


def test_the_folder_has_what_a_reader_of_it_needs(exported):
    out, result = exported
    names = {p.name for p in out.iterdir()}
    assert names == {
        "model.onnx", "config.json", "generation_config.json", "tokenizer_config.json",
        "loratools.json",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_bytes())
    assert config["dtype"] == "float32"
    assert "_name_or_path" not in config
    assert set(result.files) == names - {"loratools.json"}


def test_names_and_dimensions_are_those_of_the_ecosystem(exported):
    graph = onnx.load(exported[0] / "model.onnx").graph
    found = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
    }
    past = ["batch", 2, "past_sequence", 4]
    assert [i.name for i in graph.input][:3] == ["input_ids", "attention_mask", "position_ids"]
    assert found["input_ids"] == found["position_ids"] == ["batch", "sequence"]
    assert found["attention_mask"] == ["batch", "total_sequence"]
    assert found["past_key_values.0.key"] == found["past_key_values.1.value"] == past
    assert found["logits"] == ["batch", "sequence", 48]
    assert found["present.1.key"] == ["batch", 2, "total_sequence", 4]


def test_the_sidecar_names_every_weight_and_its_orientation(exported, base):
    """Also of tied weights, and of norms that are all alike and that exporters make one."""
    model = onnx.load(exported[0] / "model.onnx")
    props = {p.key: p.value for p in model.metadata_props}
    sidecar = json.loads(props["loratools.weights"])
    torch_model = exportable_models.transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32
    )
    parameters = dict(torch_model.named_parameters(remove_duplicate=False))
    arrays = {t.name: array_of(t, exported[0]) for t in model.graph.initializer}
    assert {name for name, _ in sidecar.values()} == set(parameters)
    for initialiser, (name, transposed) in sidecar.items():
        weight = parameters[name].detach().numpy()
        assert np.array_equal(arrays[initialiser], weight.T if transposed else weight), name
        assert initialiser == name


def test_equal_parameters_keep_an_initialiser_each(tmp_path):
    """Zeros, ones and symmetric matrices; after tracing the module is as it was."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.n, self.m = nn.LayerNorm(4), nn.LayerNorm(4)
            with torch.no_grad():
                for parameter in (self.a.weight, self.b.weight):
                    parameter.copy_(torch.eye(4))
                for parameter in (self.a.bias, self.b.bias):
                    parameter.zero_()

        def forward(self, x):
            return self.m(self.b(self.n(self.a(x))).tanh())

    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for exporter in ("legacy", "dynamo"):
        out = tmp_path / f"{exporter}.onnx"
        tracing.trace(net, "module", out, exporter=exporter, inputs=[torch.randn(2, 3, 4)])
        model = onnx.load(out)
        sidecar = json.loads({p.key: p.value for p in model.metadata_props}["loratools.weights"])
        assert {name for name, _ in sidecar.values()} == set(before)
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        for initialiser, (name, _) in sidecar.items():
            assert np.array_equal(arrays[initialiser], before[name].numpy())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_a_weight_that_an_exporter_computes_with_is_right(tmp_path):
    """1 + w of zeros is folded into a constant: no initialiser is w then, and none says so."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x * (1.0 + self.w)

    result = loratools.export(
        Net(), inputs={"x": torch.randn(2, 4)}, out=tmp_path / "o", exporter="dynamo"
    )
    assert result.parity["worst"] == 0


@pytest.mark.parametrize(
    "exporter", ["legacy", "dynamo", pytest.param("hf", marks=pytest.mark.slow)]
)
def test_nothing_of_this_machine_is_in_any_file(exporter, base, tmp_path):
    """No folder, user, host or time; what torch's newer exporter traces has a stack with each."""
    out = tmp_path / "secret-place" / "out"
    if exporter == "dynamo":
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        loratools.export(net, inputs=[torch.randn(2, 4)], out=out, exporter=exporter)
    else:
        loratools.export(base, out=out, exporter=exporter, kv_cache=False)
    words = [
        str(tmp_path), "secret-place", "/home/", "/tmp/", "site-packages", str(ROOT),
        socket.gethostname(), "/202", "-202", getpass.getuser() + "@",
    ]  # fmt: skip
    for path in out.iterdir():
        content = path.read_bytes()
        if path.suffix == ".onnx":
            model = onnx.load(path)
            assert not any(n.metadata_props or n.doc_string for n in model.graph.node)
            assert not model.graph.value_info
            del model.graph.initializer[:]  # numbers may spell anything
            content = model.SerializeToString()
        assert [w for w in words if w.encode() in content] == [], path.name


def test_two_processes_write_the_same_bytes(base, tmp_path):
    sums = []
    for n in (1, 2):
        room = tmp_path / f"room{n}"
        room.mkdir()
        shutil.copytree(base, room / "model")
        done = cli(
            "export", "model", "-o", "out", "--exporter", "legacy", "-q", cwd=room,
            PYTHONHASHSEED=str(n),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        files = sorted((room / "out").iterdir())
        sums.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
    assert sums[0] == sums[1]


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["hf", "dynamo"])
def test_newer_exporters_write_the_same_bytes_twice(exporter, base, tmp_path):
    graphs = []
    for n in (1, 2):
        out = tmp_path / f"out{n}"
        done = cli("export", base, "-o", out, "--exporter", exporter, "-q", PYTHONHASHSEED=str(n))
        assert done.returncode == 0, done.stderr
        graphs.append((out / "model.onnx").read_bytes())
    assert graphs[0] == graphs[1]


def test_weights_beside_the_graph(base, tmp_path):
    """The same graph with external data; small tensors stay inside."""
    model = exportable_models.made("llama")
    one, two = tmp_path / "one", tmp_path / "two"
    tracing.trace(model, "text-generation", one, exporter="legacy")
    tracing.trace(model, "text-generation", two, exporter="legacy", external=True)
    assert (two / "model.onnx.data").stat().st_size > 0
    assert (two / "model.onnx").stat().st_size < (one / "model.onnx").stat().st_size
    onnx.checker.check_model(str(two / "model.onnx"))
    arrays = []
    for folder in (one, two):
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        arrays.append({t.name: array_of(t, folder) for t in graph.initializer})
    assert arrays[0].keys() == arrays[1].keys()
    assert all(np.array_equal(a, arrays[1][n]) for n, a in arrays[0].items())
    opened(two / "model.onnx")


def test_lineage_is_in_the_graph_and_in_the_receipt(exported):
    out, _ = exported
    said = opened(out / "model.onnx").get_modelmeta().custom_metadata_map
    receipt = json.loads((out / "loratools.json").read_bytes())
    assert said["loratools.model"] == "tiny-llama"
    assert said["loratools.model_fingerprint"] == receipt["recipe"]["model"]["fingerprint"]
    assert said["loratools.task"] == "text-generation-with-past"
    assert receipt["parity"]["ok"]
    assert receipt["outputs"]["model.onnx"]["sha256"]


def test_verify_knows_an_export(base, tmp_path):
    out = tmp_path / "out"
    loratools.export(base, out=out, exporter="legacy")
    found = loratools.verify(out)
    assert (found.ok, found.proved, found.checked) == (True, "hashes", 4)
    content = bytearray((out / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "model.onnx").write_bytes(content)
    wrong = loratools.verify(out)
    assert [m.file for m in wrong.mismatches] == ["model.onnx"]


# ------------------------------------------------------------------------------- options


def test_fixed_shapes_are_fixed_and_proven(base, tmp_path):
    result = loratools.export(
        base, out=tmp_path / "o", shape="batch=1,sequence=1", exporter="legacy"
    )
    assert result.inputs["input_ids"] == [1, 1]
    assert result.outputs["present.0.key"] == [1, 2, "total_sequence", 4]
    assert result.parity["tokens"] > 5
    wrong = refused("usage", base, out=tmp_path / "p", shape="height=4", exporter="legacy")
    assert "batch, past_sequence, sequence" in wrong.message


def test_without_a_cache(base, tmp_path):
    result = loratools.export(base, out=tmp_path / "o", kv_cache=False, exporter="legacy")
    assert result.task == "text-generation"
    assert list(result.inputs) == ["input_ids", "attention_mask", "position_ids"]
    assert list(result.outputs) == ["logits"]


def test_the_opset_and_ir_of_an_old_runtime(base, tmp_path):
    result = loratools.export(base, out=tmp_path / "o", for_ort="1.16", exporter="legacy")
    model = onnx.load(tmp_path / "o" / "model.onnx")
    assert (model.opset_import[0].version, model.ir_version) == (19, 9)
    assert (result.opset, result.ir_version) == (19, 9)


def test_smaller_graphs_are_proven_too(base, tmp_path):
    half = loratools.export(base, out=tmp_path / "h", dtype="fp16", exporter="legacy")
    assert half.parity["proofs"] == ["fp16", "fp32"]
    assert half.parity["worst"] < 2e-2
    small = loratools.export(base, out=tmp_path / "q", quantize="int8", exporter="legacy")
    assert small.parity["proofs"] == ["fp32", "int8"]
    assert small.parity["cosine"] > 0.98
    for folder in ("h", "q"):
        said = opened(tmp_path / folder / "model.onnx").get_modelmeta().custom_metadata_map
        assert said["loratools.model"] == "tiny-llama"


def test_a_module_of_ones_own(tmp_path):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    net.train()
    result = loratools.export(net, inputs=[torch.randn(1, 4)], out=tmp_path / "o")
    assert result.inputs == {"input": ["batch", 4]}
    assert result.outputs == {"output": ["batch", 2]}
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    found = opened(tmp_path / "o" / "model.onnx").run(None, {"input": x})[0]
    assert np.allclose(found, net(torch.from_numpy(x)).detach().numpy(), atol=1e-6)
    assert net.training


# ------------------------------------------------------------------------------- refusals


class Branching(nn.Module):
    """A trace keeps the branch that it took."""

    def forward(self, x):
        return x * 2 if float(x.sum()) > 0 else x * 3


def test_a_failed_proof_keeps_the_files_aside(tmp_path):
    out, given = tmp_path / "o", {"x": torch.tensor([[1.0, -1.1, 2.0, -1.9]])}
    found = refused(
        "proof_failed", Branching(), inputs=given, out=out,
        exporter="legacy",
    )  # fmt: skip
    assert found.exit == 8
    assert not out.exists()
    aside = tmp_path / "o.failed"
    assert (aside / "model.onnx").exists()
    assert not json.loads((aside / "failed.json").read_bytes())["parity"]["fp32"]["ok"]
    loratools.export(
        Branching(), inputs=given, out=out, exporter="legacy",
        verify=False,
    )  # fmt: skip
    assert (out / "model.onnx").exists()


def test_an_input_that_the_graph_lost_is_no_export(tmp_path):
    class Deaf(nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids * 2

    given = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}
    found = refused("not_exportable", Deaf(), inputs=given, out=tmp_path / "o", exporter="legacy")
    assert "lost its input attention_mask; padded batches would be wrong" in found.message


def test_each_exporter_says_why_it_cannot(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.from_numpy(np.linalg.eigvals(x.numpy() @ x.numpy().T).real)

    given = {"x": torch.eye(3) + torch.randn(3, 3).abs()}
    found = refused("not_exportable", Odd(), inputs=given, out=tmp_path / "o")
    lines = found.message.splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "torch's dynamo exporter", "torch's legacy exporter",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_fallback_is_named(base, tmp_path):
    """Opset 11 is none that the newer exporters write."""

    class Sized(nn.Module):
        def forward(self, x):
            return x * float(x.shape[0] * 0 + int(x.detach().numel() > 0))

    result = loratools.export(Sized(), inputs={"x": torch.randn(2, 3)}, out=tmp_path / "o")
    assert result.exporter in ("dynamo", "legacy")
    if result.exporter == "legacy":
        assert any("torch's dynamo exporter cannot" in note for note in result.notes)


def test_a_weight_that_the_files_lack_is_not_made_up(tmp_path):
    folder = exportable_models.save("bert", tmp_path / "bert")
    found = refused(
        "missing", folder, out=tmp_path / "o", task="text-classification", exporter="legacy"
    )
    assert "classifier.bias" in str(found.problems) or "pooler" in found.message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "poetry"}, "known tasks are auto, audio-classification"),
        ({"exporter": "best"}, "expected auto, hf, dynamo, legacy"),
        ({"quantize": "int3"}, "expected none, int8 or int4"),
        ({"quantize": "int4", "quantize_method": "dynamic"}, "of int4 there is nbits, qdq"),
        ({"dtype": "bf16"}, "no kernels"),
        ({"shape": "batch"}, "expected batch=1,sequence=128"),
        ({"to": "coreml"}, "expected onnx, genai, transformers.js"),
        ({"switchable": True}, "needs the adapters to switch"),
        ({"weights": [1.0]}, "name them: --adapter A"),
        ({"for_ort": "one"}, "no onnxruntime version"),
        ({"dtype": "fp16", "quantize": "int8"}, "do not go together"),
    ],
)
def test_what_contradicts_itself(options, words, base, tmp_path):
    assert words in refused("usage", base, out=tmp_path / "o", **options).message


def test_what_is_no_model_to_trace(base, exported, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    quantised = tmp_path / "quantised"
    shutil.copytree(base, quantised)
    config = json.loads((base / "config.json").read_bytes())
    said = config | {"quantization_config": {"quant_method": "gptq"}}
    (quantised / "config.json").write_text(json.dumps(said))
    nameless = tmp_path / "nameless"
    shutil.copytree(base, nameless)
    (nameless / "config.json").write_text(json.dumps(config | {"architectures": None}))
    remote = tmp_path / "remote"
    shutil.copytree(base, remote)
    code = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    (remote / "config.json").write_text(json.dumps(config | code))
    (remote / "own.py").write_text("raise SystemExit('it was run')")
    cases = {
        base / "model.safetensors": "not_exportable",
        exported[0] / "model.onnx": "usage",
        quantised: "not_exportable",
        nameless: "not_exportable",
        remote: "not_exportable",
        tmp_path / "nothing": "not_found",
    }
    for path, code in cases.items():
        refused(code, path, out=tmp_path / "o", exporter="legacy")
    assert not (tmp_path / "o").exists()


def test_an_output_that_exists_is_refused_before_any_work(base, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(base, out)
    refused("output_exists", base, out=out)
    refused("same_path", base, out=base)
    refused("usage", base, out=tmp_path / "model.onnx")


def test_both_onnxruntimes_at_once_are_explained(base, tmp_path):
    """Another distribution's metadata on the path is all that an installer leaves of it."""
    facts = tmp_path / "site" / "onnxruntime_gpu-1.31.1.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n"
    )
    done = cli("export", base, "-o", tmp_path / "o", PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 2
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in done.stderr


def test_a_missing_package_is_named(base, tmp_path):
    code = f"import sys; sys.modules['onnxscript'] = None; {RUN}"
    done = subprocess.run(
        [sys.executable, "-c", code, "export", base, "-o", tmp_path / "o"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "export needs onnxscript: pip install 'loratools[onnx]'" in done.stderr
