"""litgpt's own files, merge and forward against what we read, fold and write."""

import json
import math

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from loratools.adapter import Adapter, Leaf, LowRank
from loratools.algebra import apply
from loratools.containers.bundle import local
from loratools.formats import litgpt
from loratools.names.heads import config_of
from loratools.names.llama import LITGPT
from tests.environments import run
from tests.oracle.llama_names import FACTS, as_hf

pytestmark = pytest.mark.oracle("litgpt")

MODEL = """
import sys, json, pathlib, torch, yaml
from safetensors.torch import save_file, load_file
from litgpt.lora import GPT, Config, lora_filter, merge_lora_weights
from litgpt.scripts.merge_lora import merge_lora
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import save_config
out = pathlib.Path(sys.argv[1])
SIZES = dict(name="tiny", block_size=32, vocab_size=48, padded_vocab_size=48, n_layer=2, n_head=4,
    n_embd=16, rotary_percentage=1.0, parallel_residual=False, bias=False,
    norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=24, norm_eps=1e-5)
tokens = torch.arange(24).reshape(2, 12) % 48
def keep(tensors, path):
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path)
def checkpoint(folder, config, state):
    folder.mkdir(parents=True)
    save_config(config, folder)
    torch.save(state, folder / "lit_model.pth")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
"""

MAKE = (
    MODEL
    + """
for name, groups, flags in json.loads(sys.argv[2]):
    torch.manual_seed(7)
    hyper = dict(zip(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp",
                      "lora_head"), flags), lora_r=3, lora_alpha=5, lora_dropout=0.0)
    config = Config(**SIZES, n_query_groups=groups, **hyper)
    model = GPT(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            near = 1.0 if "norm" in key or "ln_f" in key else 0.0
            p.copy_(near + 0.2 * torch.randn_like(p))
    folder = out / name
    state = model.state_dict()
    base = {k.replace("linear.", ""): v for k, v in state.items() if not lora_filter(k, v)}
    checkpoint(folder / "base", config, base)
    keep(base, folder / "base.safetensors")
    adapter = folder / "final"
    adapter.mkdir()
    save_config(config, adapter)
    torch.save({"model": {k: v for k, v in state.items() if lora_filter(k, v)}},
               adapter / "lit_model.pth.lora")
    hyper.update(checkpoint_dir=str(folder / "base"), precision=None, devices=1,
                 train={"epochs": 5, "lr_warmup_steps": 100, "max_norm": None})
    (adapter / "hyperparameters.yaml").write_text(yaml.safe_dump(hyper))
    with torch.no_grad():
        logits = model(tokens)
    merge_lora_weights(model)
    merged = {k.replace("linear.", ""): v for k, v in model.state_dict().items()
              if not lora_filter(k, v)}
    keep({**merged, "logits": logits}, folder / "merged.safetensors")
"""
)

# Our folder gets what a litgpt checkpoint has beside the adapter, and litgpt's own command merges.
MERGE = (
    MODEL
    + """
base = pathlib.Path(sys.argv[2])
for name in ("tokenizer.json", "tokenizer_config.json", "model_config.yaml"):
    (out / name).write_bytes((base / name).read_bytes())
merge_lora(out, base)
keep(torch.load(out / "lit_model.pth", weights_only=True), out / "merged.safetensors")
"""
)

# Query groups, and which of query, key, value, projection, MLP and head are adapted.
ROWS = {
    "all": (2, (True,) * 6),
    "equal": (4, (True, True, True, False, False, False)),
    "qv": (2, (True, False, True, True, False, False)),
    "kv": (2, (False, True, True, False, True, False)),
    "q": (1, (True, False, False, False, False, True)),
    "k": (4, (False, True, False, False, False, False)),
    "mlp": (2, (False, False, False, False, True, True)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("litgpt")
    rows = [(name, groups, flags) for name, (groups, flags) in ROWS.items()]
    run("litgpt", MAKE, folder, json.dumps(rows))
    return folder


def folded(deltas, base):
    """Every weight after the deltas, in float32."""
    out = dict(base)
    for key, delta in deltas.items():
        out[key] = apply(delta, base[key].double()).float()
    return out


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def as_merged(deltas, folder):
    merged = load_file(folder / "merged.safetensors")
    merged.pop("logits", None)
    result = folded(deltas, load_file(folder / "base.safetensors"))
    assert set(result) == set(merged)
    for key, tensor in result.items():
        close(tensor, merged[key])


@pytest.mark.parametrize("row", ROWS)
def test_it_folds_as_litgpt_merges(row, made):
    adapter = litgpt.read(local(made / row / "final"), assume={})
    assert adapter.problems == ()
    assert adapter.config["base_config"]["num_key_value_heads"] == ROWS[row][0]
    as_merged(adapter.deltas, made / row)


@pytest.mark.parametrize("row", ["all", "equal", "qv", "kv"])
def test_without_the_bases_config_the_rows_are_guessed_and_that_is_said(row, made, tmp_path):
    for name in ("lit_model.pth.lora", "hyperparameters.yaml"):
        (tmp_path / name).write_bytes((made / row / "final" / name).read_bytes())
    adapter = litgpt.read(local(tmp_path), assume={})
    assert [(p.code, p.severity) for p in adapter.problems] == [("missing", "warning")]
    as_merged(adapter.deltas, made / row)


@pytest.mark.parametrize("row", ["all", "mlp"])
def test_through_hugging_faces_names_the_model_says_the_same(row, made):
    groups, _ = ROWS[row]
    adapter = litgpt.read(local(made / row / "final"), assume={})
    base = load_file(made / row / "base.safetensors")
    whole = Adapter(
        {k: LowRank(Leaf.of(k, torch.zeros(1, v.shape[-1])), Leaf.of(k, v), 1.0)
         for k, v in base.items()}
    )  # fmt: skip
    renamed = as_hf(whole, LITGPT)
    weights = {k: d.b.tensor() for k, d in renamed.items()}
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=groups, max_position_embeddings=32,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(folded(as_hf(adapter, LITGPT), weights), strict=True)
    with torch.no_grad():
        logits = model(torch.arange(24).reshape(2, 12) % 48).logits
    close(logits, load_file(made / row / "merged.safetensors")["logits"])


@pytest.mark.parametrize("row", ROWS)
def test_what_is_written_again_has_the_same_bytes(row, made, tmp_path):
    source = made / row / "final"
    adapter = litgpt.read(local(source), assume={})
    assert litgpt.lost(adapter) == []
    assert set(litgpt.write(adapter, tmp_path)) == {"lit_model.pth.lora"}
    before = torch.load(source / "lit_model.pth.lora", weights_only=True)["model"]
    after = torch.load(tmp_path / "lit_model.pth.lora", weights_only=True)["model"]
    assert set(before) == set(after)
    assert all(torch.equal(after[key], before[key]) for key in before)
    old, new = (
        yaml.safe_load((folder / "hyperparameters.yaml").read_text())
        for folder in (source, tmp_path)
    )
    assert new.pop("base_config")["num_key_value_heads"] == ROWS[row][0]
    assert {k: old[k] for k in new} == new
    again = litgpt.read(local(tmp_path), assume={})
    assert again.problems == ()
    assert again.config["base_config"] == adapter.config["base_config"]


def pair(into, out, rank, scaling, alpha=None):
    a, b = torch.randn(rank, into) * 0.2, torch.randn(out, rank) * 0.2
    return LowRank(Leaf.of("a", a), Leaf.of("b", b), scaling, alpha)


def fused():
    """q and v of ranks 3 and 2 in one pair, as three adapters of Hugging Face's become one."""
    q, v = pair(16, 16, 3, 1.0), pair(16, 8, 2, 1.0)
    b = torch.zeros(32, 5)
    b[:16, :3], b[24:, 3:] = q.b.tensor(), v.b.tensor()
    a = torch.cat([q.a.tensor(), v.a.tensor()])
    return LowRank(Leaf.of("a", a), Leaf.of("b", b), 1.5)


def test_litgpt_merges_what_we_write(made, tmp_path):
    """Ranks and scalings that differ, a dense B over all of q, k, v, and a layer without any."""
    torch.manual_seed(5)
    deltas = {
        "transformer.h.0.attn.qkv.weight": fused(),
        "transformer.h.1.attn.qkv.weight": pair(16, 32, 2, 0.25),
        "transformer.h.1.mlp.fc_2.weight": pair(16, 24, 4, 2.0, alpha=8.0),
        "transformer.h.0.mlp.proj.weight": pair(24, 16, 1, math.pi),
        "lm_head.weight": pair(16, 48, 2, -0.5),
    }
    adapter = Adapter(deltas, vocabulary="litgpt", config={"base_config": config_of(FACTS)})
    assert litgpt.lost(adapter) == []
    litgpt.write(adapter, tmp_path)
    run("litgpt", MERGE, tmp_path, made / "all" / "base")
    base = load_file(made / "all" / "base.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    for key, tensor in folded(deltas, base).items():
        close(tensor, merged[key])
    again = litgpt.read(local(tmp_path), assume={})
    for key, tensor in folded(again.deltas, base).items():
        close(tensor, merged[key])
