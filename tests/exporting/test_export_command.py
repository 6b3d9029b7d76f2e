"""`loratools export` as it is typed: each option's files, opened by the programs they are for."""

import json
import os
import sys

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
import transformers

import loratools
from loratools.cli import main
from loratools.exporting.graph_files import EXTERNAL_ABOVE
from tests.exporting import exportable_models
from tests.exporting.test_layouts import checkpoint
from tests.exporting.test_layouts import llama as wide_llama
from tests.oracle.models import train


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return exportable_models.save(
        "distilbert", tmp_path_factory.mktemp("models") / "tiny-distilbert"
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama and its tokenizer of whole words."""
    return checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama", wide_llama(), 120)


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A Llama with a tokenizer of bytes and their pairs, as onnxruntime-genai reads them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokens.train_from_iterator(["Once upon a time there was a small fox."] * 3, trainer)
    folder = tmp_path_factory.mktemp("models") / "tiny-writer"
    wide_llama(vocab_size=tokens.get_vocab_size()).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys):
    def call(*arguments, code=0):
        capsys.readouterr()
        status = main(["export", *map(str, arguments)])
        said = capsys.readouterr()
        assert status == code, said.err
        return said.out if code == 0 else said.err

    return call


IDS = np.array([[5, 9, 3, 30, 12, 7, 8]])


def opened(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def logits(path):
    return opened(path).run(["logits"], {"input_ids": IDS, "attention_mask": np.ones_like(IDS)})[0]


def torchs(folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


def cosine(a, b):
    a, b = (x.ravel().astype(np.float64) for x in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# -------------------------------------------------------------------------- smaller graphs


SMALLER = {
    "int8 dynamic": ("--quantize int8 --quantize-method dynamic", 0.97, "MatMulInteger"),
    "int8 nbits": ("--quantize int8", 0.999, "MatMulNBits"),
    "int8 qdq": ("--quantize int8 --quantize-method qdq", 0.999, "DequantizeLinear"),
    "int4 nbits": ("--quantize int4 --quantize-method nbits", 0.9, "MatMulNBits"),
    "int4 qdq": (
        "--quantize int4 --quantize-method qdq --exporter dynamo", 0.9, "DequantizeLinear",
    ),
    "fp16": ("--dtype fp16", 0.999, "MatMul"),
}  # fmt: skip
SLOW = ("int8 nbits", "int8 qdq", "int4 qdq")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in SMALLER]
)
def test_smaller_numbers(case, run, bert, tmp_path):
    options, least, operator = SMALLER[case]
    by = [] if "--exporter" in options else ["--exporter", "legacy"]
    said = run(bert, "-o", tmp_path / "o", *by, *options.split())
    assert case in said
    model = onnx.load(tmp_path / "o" / "model.onnx")
    assert operator in {n.op_type for n in model.graph.node}
    assert model.opset_import[0].version == (21 if case == "int4 qdq" else 20 if not by else 18)
    assert cosine(logits(tmp_path / "o" / "model.onnx"), torchs(bert)) > least
    assert files(tmp_path / "o") == ["config.json", "loratools.json", "model.onnx"]


def test_a_fixed_shape_and_an_ort_file(run, bert, tmp_path):
    out = tmp_path / "o"
    run(bert, "-o", out, "--exporter", "legacy", "--ort", "--shape", "batch=1,sequence=7")
    assert files(out) == ["config.json", "loratools.json", "model.onnx", "model.ort"]
    (out / "model.onnx").unlink()
    assert [i.shape for i in opened(out / "model.ort").get_inputs()] == [[1, 7]] * 2
    np.testing.assert_allclose(logits(out / "model.ort"), torchs(bert), atol=1e-5)


# -------------------------------------------------------------------------- layouts


def test_the_layout_of_transformers_js(run, llama, tmp_path):
    out = tmp_path / "o"
    run(llama, "-o", out, "--exporter", "legacy", "--to", "transformers.js", "--quantize", "int8")
    assert files(out) == [
        "config.json", "generation_config.json", "loratools.json", "onnx/model_quantized.onnx",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    tokens = transformers.AutoTokenizer.from_pretrained(out)("t5 t6 t7")["input_ids"]
    assert tokens == [5, 6, 7]
    assert "past_key_values.0.key" in {
        i.name for i in opened(out / "onnx" / "model_quantized.onnx").get_inputs()
    }
    assert loratools.verify(out).ok


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_onnxruntime_genai_tells_what_the_folded_model_does(quantize, run, writer, tmp_path):
    import onnxruntime_genai

    torch.manual_seed(4)
    made = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(writer),
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    )
    train(made)
    made.save_pretrained(tmp_path / "lora")
    out = tmp_path / "o"
    said = run(writer, "-o", out, "--to", "genai", "--adapter", tmp_path / "lora",
               "--quantize", quantize)  # fmt: skip
    assert "cosine with torch at least" in said
    model = onnxruntime_genai.Model(str(out))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    prompt = [int(t) for t in tokenizer.encode("Once upon a fox")]
    known = transformers.AutoTokenizer.from_pretrained(writer)
    assert prompt == known("Once upon a fox")["input_ids"]
    wanted = onnxruntime_genai.GeneratorParams(model)
    wanted.set_search_options(max_length=16, do_sample=False)
    generator = onnxruntime_genai.Generator(model, wanted)
    generator.append_tokens([prompt])
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(t) for t in generator.get_sequence(0)]
    assert tokenizer.decode(found).startswith("Once upon a fox")
    merged = made.merge_and_unload().eval()
    due = merged.generate(torch.tensor([prompt]), max_length=16, do_sample=False, pad_token_id=0)
    if quantize == "none":
        assert found == due[0].tolist()
    assert all(str(tmp_path).encode() not in p.read_bytes() for p in out.iterdir())


@pytest.mark.slow
def test_a_tokenizer_that_genai_cannot_read_is_said(run, llama, tmp_path):
    said = run(llama, "-o", tmp_path / "o", "--to", "genai", "--no-verify")
    assert "onnxruntime-genai cannot read this tokenizer" in said


def test_genai_without_its_package(run, llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert "pip install" in run(llama, "-o", tmp_path / "o", "--to", "genai", code=2)


# -------------------------------------------------------------------------- large weights


@pytest.mark.slow
def test_more_than_a_gigabyte_lies_beside_the_graph(tmp_path):
    """And is folded there: the data are patched, at multiples of 4,096 bytes."""

    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(16, EXTERNAL_ABOVE // 64 + 1024)
            self.fc = torch.nn.Linear(8, 8, bias=False)

        def forward(self, ids):
            return self.fc(self.table(ids)[:, :8])

    torch.manual_seed(0)
    net = Wide()
    ids = torch.tensor([3, 1, 2])
    result = loratools.export(net, inputs={"ids": ids}, out=tmp_path / "o", exporter="legacy")
    assert result.parity["ok"]
    assert files(tmp_path / "o") == ["loratools.json", "model.onnx", "model.onnx.data"]
    assert (tmp_path / "o" / "model.onnx").stat().st_size < 100_000
    graph = onnx.load(tmp_path / "o" / "model.onnx", load_external_data=False).graph
    (large,) = [t for t in graph.initializer if t.name == "table.weight"]
    assert int({e.key: e.value for e in large.external_data}["offset"]) % 4096 == 0
    found = opened(tmp_path / "o" / "model.onnx").run(None, {"ids": ids.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, net(ids).numpy(), atol=1e-6)


# -------------------------------------------------------------------------- what is said


def test_times_are_a_table(run, bert, tmp_path):
    said = run(bert, "-o", tmp_path / "o", "--exporter", "legacy", "--measure")
    title, row = (
        line.split() for line in said.splitlines() if "ms a call" in line or "x1.00" in line
    )
    assert title == ["graph", "ms", "a", "call", "to", "the", "first", "spread"]
    assert row[0] == "model.onnx"
    assert row[3].endswith("%")


def test_a_summary_names_inputs_proof_and_the_next_step(run, bert, tmp_path):
    said = run(bert, "-o", tmp_path / "o", "--exporter", "legacy")
    assert "equals torch to" in said
    assert "input_ids" in said
    assert said.splitlines()[-1] == f"Next: loratools verify {tmp_path / 'o'}"
    again = json.loads(run(bert, "-o", tmp_path / "o", "--exporter", "legacy", "--json", "--force"))
    assert again["opset"] == 18
    assert again["parity"]["ok"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--task unet", "is no model of diffusers"),
        ("--task image-classification", "AutoModelForImageClassification"),
        ("--task poetry", "known tasks are auto"),
        ("--fuse --for-ort 1.20", "fused graphs need onnxruntime 1.21"),
        ("--quantize-method qdq", "needs --quantize int8 or int4"),
        ("--quantize int4 --quantize-method qdq --for-ort 1.17", "needs opset 21, not 20"),
        ("--quantize int4 --quantize-method qdq --opset 20", "needs opset 21, not 20"),
        ("--to genai --no-kv-cache", "--no-kv-cache and --to genai do not go together"),
        ("--to genai --fuse", "do not go together"),
        ("--into graph.onnx", "--into folds adapters into a graph; name them"),
    ],
)
def test_mistakes_are_answered(options, words, run, bert, tmp_path):
    code = 5 if options in ("--task unet", "--task image-classification") else 2
    assert words in run(bert, "-o", tmp_path / "o", *options.split(), code=code)
    assert os.listdir(tmp_path) == []


def test_what_is_no_folder_of_a_model(run, bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peft.get_peft_model(
        transformers.AutoModelForSequenceClassification.from_pretrained(bert),
        peft.LoraConfig(target_modules=["q_lin"]),
    ).save_pretrained("lora")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    said = run("lora", "-o", "o", code=2)
    assert "lora is an adapter: loratools export BASE --adapter lora -o OUT" in said
    assert "model.gguf is a GGUF file; export the model that" in run(
        "model.gguf", "-o", "o", code=5
    )
    run(bert, "-o", "there", code=7)
    assert (tmp_path / "there" / "notes.txt").read_text() == "mine"
