"""Fused graphs against the unfused ones and torch: prefill, padding, steps, tokens."""

import json

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper

from loratools.errors import ProofError, RefusedError
from loratools.exporting import fusing
from loratools.exporting.fusing import fuse, prove_equal
from loratools.exporting.layouts import to_ort
from loratools.exporting.precision import to_fp16
from loratools.exporting.quantising import quantise
from tests.exporting import flat_graphs
from tests.exporting.graphs_run import (
    MAKERS,
    bert,
    close,
    outputs,
    session,
    sidecar,
    with_external_data,
)

SIZES = {**flat_graphs.SIZES, "hidden_size": 32, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0}
DECODERS = {
    "LlamaForCausalLM": LLAMA,
    "Qwen3ForCausalLM": {**LLAMA, "head_dim": 8},
    "MistralForCausalLM": {**LLAMA, "head_dim": 8, "sliding_window": 6},
    "Phi3ForCausalLM": LLAMA,
    "Gemma3ForCausalLM": {**LLAMA, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "GPT2LMHeadModel": SIZES,
    "GPTNeoXForCausalLM": {**SIZES, "intermediate_size": 24},
    "OPTForCausalLM": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 32},
}
QUICK = ("LlamaForCausalLM", "GPT2LMHeadModel")


def decoder(name, path):
    torch.manual_seed(4)
    made = getattr(transformers, name)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    model = made(made.config_class(**{**DECODERS[name], **special})).eval()
    flat_graphs.causal(model, path)
    return model


def greedy(path, model, ids, steps):
    """Tokens by the graph alone, the cache fed back."""
    run = session(path)
    names = [value.name for value in run.get_outputs()]
    said, past, mask = [], None, np.ones_like(ids)
    for _ in range(steps):
        found = run.run(None, flat_graphs.feeds(model, ids, mask=mask, past=past))
        past = {
            n.replace("present", "past_key_values"): x
            for n, x in zip(names[1:], found[1:], strict=True)
        }
        ids = found[0][:, -1:].argmax(-1)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        said.append(ids[:, 0].tolist())
    return said


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in DECODERS]
)
def test_a_fused_decoder_says_what_the_unfused_one_and_torch_say(name, tmp_path):
    path, out = tmp_path / "m.onnx", tmp_path / "fused.onnx"
    model = decoder(name, path)
    config = json.loads((tmp_path / "config.json").read_text())
    done = fuse(path, out, config)
    assert done["GroupQueryAttention"] == 2
    onnx.checker.check_model(out)
    before, after = session(path), session(out)
    for old, new in ((before.get_inputs(), after.get_inputs()),
                     (before.get_outputs(), after.get_outputs())):  # fmt: skip
        assert [(v.name, v.type, v.shape) for v in old] == [(v.name, v.type, v.shape) for v in new]
    assert prove_equal(path, out) < 1e-5
    ids = np.random.default_rng(3).integers(1, 40, (2, 5))
    assert greedy(out, model, ids, 12) == greedy(path, model, ids, 12)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    found = outputs(out, flat_graphs.feeds(model, ids))[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    first = out.read_bytes()
    fuse(path, out, config)
    assert out.read_bytes() == first
    assert not [n for n in onnx.load(out).graph.node if n.op_type == "Softmax"]


def test_weights_and_their_names_stay(tmp_path):
    path, out = tmp_path / "m.onnx", tmp_path / "fused.onnx"
    decoder("LlamaForCausalLM", path)
    fuse(path, out, json.loads((tmp_path / "config.json").read_text()))
    old = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    new = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    matrices = [n for n, x in old.items() if x.ndim == 2]
    assert len(matrices) == 16
    for name in matrices:
        np.testing.assert_array_equal(old[name], new[name])
    assert sidecar(out) == sidecar(path)


@pytest.mark.slow
def test_a_graph_of_the_newer_exporter_is_fused_too(tmp_path):
    torch.manual_seed(4)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    heads, size = flat_graphs.shape_of_past(model.config)
    past = tuple(torch.randn(2, heads, 4, size) for _ in range(4))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    places = (mask.cumsum(-1) - 1).clip(0)[:, -3:]
    words = [f"{n}.{w}" for n in range(2) for w in ("key", "value")]
    names = ["input_ids", "attention_mask", "position_ids"]
    batch, now, before, total = map(
        torch.export.Dim, ("batch", "sequence", "past_sequence", "total_sequence")
    )
    torch.onnx.export(
        flat_graphs.Flat(model),
        (torch.randint(1, 40, (2, 3)), mask, places, *past),
        str(tmp_path / "m.onnx"), dynamo=True, opset_version=20, verbose=False,
        input_names=[*names, *(f"past_key_values.{w}" for w in words)],
        output_names=["logits", *(f"present.{w}" for w in words)],
        dynamic_shapes=({0: batch, 1: now}, {0: batch, 1: total}, {0: batch, 1: now},
                        tuple({0: batch, 2: before} for _ in past)),
    )  # fmt: skip
    done = fuse(tmp_path / "m.onnx", tmp_path / "fused.onnx", model.config.to_dict())
    assert done == {
        "GroupQueryAttention": 2, "RotaryEmbedding": 4, "SkipSimplifiedLayerNormalization": 4,
    }  # fmt: skip
    assert (tmp_path / "fused.onnx.data").exists() == (tmp_path / "m.onnx.data").exists()


def test_an_encoder_is_fused_by_onnxruntimes_optimizer(tmp_path):
    path, out = tmp_path / "m.onnx", tmp_path / "fused.onnx"
    feeds = bert(path)
    done = fuse(path, out, json.loads((tmp_path / "config.json").read_text()))
    assert done["SkipLayerNormalization"] == 4
    for a, b in zip(outputs(path, feeds), outputs(out, feeds), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    first = out.read_bytes()
    fuse(path, out, {"model_type": "bert", "num_attention_heads": 2, "hidden_size": 16})
    assert out.read_bytes() == first


def test_a_wrong_fusion_is_not_kept(tmp_path, monkeypatch):
    path, out = tmp_path / "m.onnx", tmp_path / "fused.onnx"
    decoder("LlamaForCausalLM", path)
    config = json.loads((tmp_path / "config.json").read_text())
    notes = []
    assert "GroupQueryAttention" not in fuse(
        path, out, {**config, "num_attention_heads": 2}, notes=notes
    )
    assert "attention is not fused" in notes[0]
    out.unlink()

    def shifted(model, shape, *, plain_mask, rightly=fusing.fuse_cached):
        done = rightly(model, shape, plain_mask=plain_mask)
        for node in model.graph.node:
            for one in node.attribute:
                if node.op_type == "GroupQueryAttention" and one.name == "scale":
                    one.f *= 1.1
        return done

    monkeypatch.setattr(fusing, "fuse_cached", shifted)
    with pytest.raises(ProofError, match="differs by"):
        fuse(path, out, config)
    assert not out.exists()


def test_heads_that_onnxruntime_refuses_stay_as_they_were(tmp_path):
    """Its attention takes heads of 8, 16, ... numbers; norms are fused, and why is said."""
    path, out, notes = tmp_path / "m.onnx", tmp_path / "fused.onnx", []
    torch.manual_seed(4)
    sizes = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 32}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **special})).eval()
    flat_graphs.causal(model, path)
    done = fuse(path, out, json.loads((tmp_path / "config.json").read_text()), notes=notes)
    assert done == {"SkipSimplifiedLayerNormalization": 4}
    (note,) = notes
    assert note.startswith("attention is not fused: head_size must be a multiple of 8")
    ids = np.random.default_rng(3).integers(1, 40, (2, 5))
    feeds = flat_graphs.feeds(model, ids)
    np.testing.assert_allclose(outputs(out, feeds)[0], outputs(path, feeds)[0], atol=1e-5)


def test_where_neither_attention_nor_norms_fit_onnxruntimes_reason_is_given(tmp_path):
    torch.manual_seed(4)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    sizes = {**SIZES, "num_attention_heads": 8, **special}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    flat_graphs.causal(model, tmp_path / "m.onnx")
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(RefusedError, match="multiple of 8") as refused:
        fuse(tmp_path / "m.onnx", tmp_path / "fused.onnx", config)
    assert refused.value.code == "not_exportable"
    assert not (tmp_path / "fused.onnx").exists()


def test_a_window_of_which_the_config_says_nothing_is_kept(tmp_path):
    path, out = tmp_path / "m.onnx", tmp_path / "fused.onnx"
    model = decoder("MistralForCausalLM", path)
    config = {**json.loads((tmp_path / "config.json").read_text()), "sliding_window": None}
    assert fuse(path, out, config)["GroupQueryAttention"] == 2
    ids = np.random.default_rng(3).integers(1, 40, (1, 20))
    feeds = flat_graphs.feeds(model, ids)
    np.testing.assert_allclose(outputs(out, feeds)[0], outputs(path, feeds)[0], atol=1e-5)


def test_where_nothing_fits_it_says_so(tmp_path):
    MAKERS["mlp"](tmp_path / "m.onnx")
    with pytest.raises(RefusedError, match="nothing in this graph") as refused:
        fuse(tmp_path / "m.onnx", tmp_path / "fused.onnx", {"model_type": "mlp"})
    assert refused.value.code == "not_exportable"


@pytest.mark.parametrize("how", ["fp16", "nbits", "dynamic", "ort"])
def test_a_fused_graph_is_made_smaller_like_any_other(how, tmp_path):
    path, out, small = (tmp_path / f"{name}.onnx" for name in ("m", "fused", "small"))
    model = decoder("LlamaForCausalLM", path)
    fuse(path, out, json.loads((tmp_path / "config.json").read_text()))
    match how:
        case "fp16":
            to_fp16(out, small)
        case "ort":
            small = to_ort(out)
        case _:
            quantise(out, small, bits=8, method=how)
    ids = np.random.default_rng(3).integers(1, 40, (2, 9))
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    feeds = flat_graphs.feeds(model, ids, mask=mask)
    expected, found = (outputs(p, feeds)[0][mask == 1] for p in (path, small))
    assert close(expected, found) > (0.97 if how == "dynamic" else 0.999)


def test_data_beside_the_graph_stay_beside_it(tmp_path):
    decoder("LlamaForCausalLM", tmp_path / "m.onnx")
    config = json.loads((tmp_path / "config.json").read_text())
    outside = with_external_data(tmp_path / "m.onnx", tmp_path / "big" / "model.onnx")
    fuse(outside, tmp_path / "fused.onnx", config)
    assert (tmp_path / "fused.onnx.data").exists()
