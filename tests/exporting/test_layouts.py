"""Other layouts of exported folders, opened by the programs that they are for."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loratools.errors import ProofError, RefusedError, UsageError
from loratools.exporting.layouts import genai, prove_genai, to_ort, transformers_js
from tests.environments import folder as environments
from tests.exporting.graphs_run import MAKERS, bert, outputs, session, with_external_data


@pytest.mark.parametrize("name", MAKERS)
def test_an_ort_file_says_the_same_without_its_graph(name, tmp_path):
    path = tmp_path / "m.onnx"
    feeds = MAKERS[name](path)
    expected = outputs(path, feeds)
    made = to_ort(path)
    assert made == tmp_path / "m.ort"
    first = made.read_bytes()
    assert first[4:8] == b"ORTM"
    assert str(tmp_path).encode() not in first
    path.unlink()
    for a, b in zip(expected, session(made).run(None, feeds), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    MAKERS[name](path)
    assert to_ort(path).read_bytes() == first


def laid_out(folder, *, external):
    """A BERT as an exported folder, and its graph as it was."""
    folder.mkdir(parents=True)
    feeds = bert(folder / "plain.onnx")
    plain = folder.parent / "plain.onnx"
    (folder / "plain.onnx").rename(plain)
    if external:
        with_external_data(plain, folder / "model.onnx")
    else:
        shutil.copy(plain, folder / "model.onnx")
    return plain, feeds


@pytest.mark.parametrize("external", [False, True])
def test_files_stand_where_transformers_js_looks(external, tmp_path):
    plain, feeds = laid_out(tmp_path / "hub" / "tiny", external=external)
    folder = tmp_path / "hub" / "tiny"
    graphs = ["onnx/model_quantized.onnx"] + ["onnx/model_quantized.onnx_data"] * external
    assert transformers_js(folder, dtype="q8") == ["config.json", *graphs]
    found = outputs(folder / "onnx" / "model_quantized.onnx", feeds)
    np.testing.assert_array_equal(found[0], outputs(plain, feeds)[0])
    said = json.loads((folder / "config.json").read_text())
    assert said["model_type"] == "bert"
    expected = {"use_external_data_format": {"model_quantized.onnx": 1}} if external else None
    assert said.get("transformers.js_config") == expected


LOADED = """
import { env, AutoModel, Tensor } from '@huggingface/transformers';
import { readFileSync } from 'fs';
env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const feeds = JSON.parse(readFileSync(0));
const inputs = {};
for (const [name, rows] of Object.entries(feeds))
  inputs[name] = new Tensor('int64', BigInt64Array.from(rows.flat().map(BigInt)),
                            [rows.length, rows[0].length]);
const model = await AutoModel.from_pretrained(process.argv[3], {dtype: 'fp32', device: 'cpu'});
const said = await model(inputs);
console.log(JSON.stringify(Array.from(said.last_hidden_state.data)));
"""


@pytest.mark.oracle("transformersjs")
@pytest.mark.parametrize("external", [False, True])
def test_transformers_js_runs_it_offline(external, tmp_path):
    plain, feeds = laid_out(tmp_path / "hub" / "tiny", external=external)
    transformers_js(tmp_path / "hub" / "tiny")
    there = environments() / "transformersjs"
    (tmp_path / "node_modules").symlink_to(there / "node_modules")
    (tmp_path / "run.mjs").write_text(LOADED)
    done = subprocess.run(
        ["node", "run.mjs", str(tmp_path / "hub"), "tiny"], cwd=tmp_path, text=True,
        input=json.dumps({k: v.tolist() for k, v in feeds.items()}),
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = outputs(plain, feeds)[0]
    found = np.array(json.loads(done.stdout.splitlines()[-1]), np.float32)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-5)


# -------------------------------------------------------------------------- onnxruntime-genai


def checkpoint(folder, model, words):
    """A model and a tokenizer of whole words, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({f"t{i}": i for i in range(words)}, unk_token="t0"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t0"
    ).save_pretrained(folder)
    return folder


def llama(**sizes):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**{
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 120,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
            **sizes,
        })
    ).eval()  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_onnxruntime_genai_generates_from_what_its_builder_made(precision, tmp_path):
    import onnxruntime_genai

    model = llama()
    checkpoint(tmp_path / "m", model, 120)
    files = genai(tmp_path / "m", tmp_path / "out", precision=precision)
    assert {"genai_config.json", "model.onnx", "tokenizer.json"} <= set(files)
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    assert prove_genai(tmp_path / "m", tmp_path / "out", precision)[1] > 0.9
    opened = onnxruntime_genai.Model(str(tmp_path / "out"))
    wanted = onnxruntime_genai.GeneratorParams(opened)
    wanted.set_search_options(max_length=16, do_sample=False)
    run = onnxruntime_genai.Generator(opened, wanted)
    run.append_tokens([[5, 6, 7]])
    while not run.is_done():
        run.generate_next_token()
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_length=16, do_sample=False)[0]
    found = [int(token) for token in run.get_sequence(0)]
    if precision == "fp32":
        assert found == expected.tolist()
    else:
        assert len(found) == 16


@pytest.mark.slow
def test_a_builder_that_mistakes_a_layer_for_the_head_is_found_out(tmp_path):
    checkpoint(tmp_path / "m", llama(intermediate_size=120), 120)
    genai(tmp_path / "m", tmp_path / "out")
    with pytest.raises(ProofError, match="differs from the model"):
        prove_genai(tmp_path / "m", tmp_path / "out", "fp32")


@pytest.mark.slow
def test_what_the_builder_does_not_know_is_refused_with_its_reason(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=120))
    checkpoint(tmp_path / "m", model, 120)
    with pytest.raises(RefusedError, match="gpt2") as refused:
        genai(tmp_path / "m", tmp_path / "out")
    assert refused.value.code == "not_exportable"
    assert str(tmp_path) not in str(refused.value)


def test_another_precision_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="int2"):
        genai(tmp_path / "m", tmp_path / "out", precision="int2")
