"""torchtune's own files, forward and loader against what we read, fold and write."""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from loratools.adapter import Adapter, Leaf, LowRank
from loratools.algebra import apply, prepare
from loratools.containers.bundle import local
from loratools.formats import peft, torchtune
from loratools.names.llama import TORCHTUNE
from tests.environments import run
from tests.oracle.llama_names import as_hf

pytestmark = pytest.mark.oracle("torchtune")

MODEL = """
import sys, json, pathlib, torch
from safetensors.torch import save_file, load_file
from torchtune.models.llama3 import lora_llama3
from torchtune.models.convert_weights import *
from torchtune.modules.peft import *
out = pathlib.Path(sys.argv[1])
SIZES = dict(num_heads=4, num_kv_heads=2, dim=16)
ALL = ["q_proj", "k_proj", "v_proj", "output_proj"]
def build(rank, alpha, dora, modules=ALL, mlp=True, head=True):
    return lora_llama3(list(modules), mlp, head, vocab_size=48, num_layers=2, num_heads=4,
        num_kv_heads=2, embed_dim=16, max_seq_len=32, intermediate_dim=24, rope_base=10000,
        lora_rank=rank, lora_alpha=alpha, use_dora=dora)
def is_adapter(key):
    return "lora" in key or "magnitude" in key
tokens = torch.arange(24).reshape(2, 12) % 48
"""

MAKE = (
    MODEL
    + """
for dora in (False, True):
    folder = out / ("dora" if dora else "lora")
    torch.manual_seed(3)
    model = build(4, 6, dora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.1 * torch.randn_like(p) if "scale" in name else 0.2 * torch.randn_like(p))
        for module in model.modules():
            if isinstance(module, DoRALinear):
                module.initialize_dora_magnitude()
                module.magnitude.mul_(1 + 0.3 * torch.rand_like(module.magnitude))
        logits = model(tokens)
    state = model.state_dict()
    adapter = get_adapter_state_dict(state)
    assert set(adapter) == set(get_adapter_params(model))
    base = {k: v for k, v in state.items() if not is_adapter(k)}
    (folder / "native").mkdir(parents=True); (folder / "export").mkdir()
    torch.save(adapter, folder / "native" / "adapter_model.pt")
    save_file({k: v.contiguous() for k, v in base.items()}, folder / "base.safetensors")
    hf = tune_to_hf(base, **SIZES)
    save_file({k: v.contiguous() for k, v in hf.items()}, folder / "hf.safetensors")
    config = {"r": 4, "lora_alpha": 6, "peft_type": "LORA",
              "target_modules": get_lora_module_names(list(ALL), True, True)}
    config = tune_to_peft_adapter_config(config, "org/base")
    for name in ("native", "export"):
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    exported = tune_to_peft_adapter_weights(adapter, **SIZES)
    save_file({k: v.contiguous() for k, v in exported.items()},
              folder / "export" / "adapter_model.safetensors", metadata={"format": "pt"})
    merged = get_merged_lora_ckpt({k: v.clone() for k, v in state.items()}, 4, 6)
    save_file({**{k: v.contiguous() for k, v in merged.items()}, "logits": logits},
              folder / "merged.safetensors")
"""
)

# Every folder that we wrote, loaded as the recipe does, upon the base of the same sort.
LOAD = (
    MODEL
    + """
for folder in map(pathlib.Path, sys.argv[2:]):
    config = json.loads((folder / "adapter_config.json").read_text())
    adapter = torch.load(folder / "adapter_model.pt", weights_only=True)
    targets, dora = config["target_modules"], config.get("use_dora", False)
    attention, mlp, head = [t for t in ALL if t in targets], "w1" in targets, "output" in targets
    model = build(config["r"], config["lora_alpha"], dora, attention, mlp, head)
    base = load_file(out / ("dora" if dora else "lora") / "base.safetensors")
    found = model.load_state_dict(base, strict=False)
    again = model.load_state_dict(adapter, strict=False)
    validate_missing_and_unexpected_for_lora(attention, mlp, head, found.missing_keys,
        found.unexpected_keys, again.missing_keys, again.unexpected_keys)
    with torch.no_grad():
        save_file({"logits": model(tokens)}, folder / "logits.safetensors")
"""
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of what torchtune saves: `lora` and `dora` in it."""
    folder = tmp_path_factory.mktemp("torchtune")
    run("torchtune", MAKE, folder)
    return folder


@pytest.fixture(params=["lora", "dora"])
def made(request, files):
    return files / request.param


def folded(deltas, base):
    """Every weight after the deltas, in float32."""
    out = dict(base)
    for key, delta in deltas.items():
        w0 = base[key].double()
        out[key] = apply(prepare(delta, lambda w0=w0: [(0, w0)]), w0.clone()).float()
    return out


def logits_of(weights):
    """What transformers' Llama says with these weights."""
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12) % 48).logits


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_its_own_names_fold_as_it_merges(made):
    adapter = torchtune.read(local(made / "native"), assume={})
    assert [p for p in adapter.problems if p.severity == "error"] == []
    merged = load_file(made / "merged.safetensors")
    result = folded(adapter.deltas, load_file(made / "base.safetensors"))
    for key, tensor in result.items():
        close(tensor, merged[key])


def test_through_hugging_faces_names_the_model_says_the_same(made):
    """Rows of q and k, and their magnitudes, lie otherwise there."""
    adapter = torchtune.read(local(made / "native"), assume={})
    weights = folded(as_hf(adapter, TORCHTUNE), load_file(made / "hf.safetensors"))
    close(logits_of(weights), load_file(made / "merged.safetensors")["logits"])


def test_its_export_is_right_for_lora_and_wrong_for_dora(made):
    """It leaves the magnitudes of q and k in its own order; ours are the ones that it means."""
    ours = as_hf(torchtune.read(local(made / "native"), assume={}), TORCHTUNE)
    export = peft.read(local(made / "export"), assume={}).deltas
    assert set(ours) == set(export)
    dora = made.name == "dora"
    for key, theirs in export.items():
        mine = ours[key]
        pair, other = (d.delta if dora else d for d in (mine, theirs))
        assert torch.equal(pair.a.tensor(), other.a.tensor())
        assert torch.equal(pair.b.tensor(), other.b.tensor())
        assert pair.scaling == other.scaling == 1.5
        if dora:
            same = torch.equal(mine.magnitude.tensor(), theirs.magnitude.tensor())
            assert same is not key.endswith(("q_proj.weight", "k_proj.weight"))


def test_of_both_files_in_one_folder_the_right_one_is_read(made, tmp_path):
    for name in ("adapter_model.pt", "adapter_config.json"):
        (tmp_path / name).write_bytes((made / "native" / name).read_bytes())
    export = "adapter_model.safetensors"
    (tmp_path / export).write_bytes((made / "export" / export).read_bytes())
    dora = made.name == "dora"
    assert torchtune.detect(local(tmp_path)) is dora
    assert torchtune.detect(local(tmp_path / "adapter_model.pt"))
    assert not torchtune.detect(local(tmp_path / export))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert torchtune.detect(local(tmp_path))


def test_what_is_written_again_has_the_same_bytes(made, tmp_path):
    adapter = torchtune.read(local(made / "native"), assume={})
    assert torchtune.lost(adapter) == []
    digests = torchtune.write(adapter, tmp_path)
    assert set(digests) == {"adapter_model.pt"}
    before = torch.load(made / "native" / "adapter_model.pt", weights_only=True)
    after = torch.load(tmp_path / "adapter_model.pt", weights_only=True)
    assert set(before) == set(after)
    assert all(torch.equal(after[key], before[key]) for key in before)
    again = torchtune.read(local(tmp_path), assume={})
    assert {k: d.scaling for k, d in again.deltas.items() if isinstance(d, LowRank)} == {
        k: d.scaling for k, d in adapter.deltas.items() if isinstance(d, LowRank)
    }


def pair(into, out, rank, scaling, alpha=None):
    a, b = torch.randn(rank, into) * 0.2, torch.randn(out, rank) * 0.2
    return LowRank(Leaf.of("a", a), Leaf.of("b", b), scaling, alpha)


@pytest.fixture(scope="module")
def written(files, tmp_path_factory):
    """Adapters and the folders that we wrote them to, in each what torchtune says with it."""
    torch.manual_seed(5)
    deltas = {
        "layers.0.attn.q_proj.weight": pair(16, 16, 3, 2.0),
        "layers.1.attn.k_proj.weight": pair(16, 8, 5, 2.0, alpha=10.0),
        "layers.1.mlp.w2.weight": pair(24, 16, 1, math.pi),
        "output.weight": pair(16, 48, 2, -0.5),
    }
    adapters = {
        "lora": torchtune.read(local(files / "lora" / "native"), assume={}),
        "dora": torchtune.read(local(files / "dora" / "native"), assume={}),
        "mixed": Adapter(deltas, vocabulary="torchtune", name="mixed"),
    }
    folders = {name: tmp_path_factory.mktemp(name) for name in adapters}
    for name, adapter in adapters.items():
        torchtune.write(adapter, folders[name])
    run("torchtune", LOAD, files, *folders.values())
    return {name: (adapter, folders[name]) for name, adapter in adapters.items()}


def said(folder):
    return load_file(folder / "logits.safetensors")["logits"]


def test_it_loads_what_we_write(made, written):
    _, folder = written[made.name]
    close(said(folder), load_file(made / "merged.safetensors")["logits"])


def test_ranks_and_scalings_that_differ_and_layers_without_an_update(files, written):
    """All are one rank and one alpha in torchtune, and it loads all layers or none."""
    adapter, folder = written["mixed"]
    assert torchtune.lost(adapter) == []
    weights = folded(as_hf(adapter, TORCHTUNE), load_file(files / "lora" / "hf.safetensors"))
    close(logits_of(weights), said(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 10)
    base = load_file(files / "lora" / "base.safetensors")
    again = torchtune.read(local(folder), assume={})
    result, wanted = folded(again.deltas, base), folded(adapter.deltas, base)
    for key in base:
        close(result[key], wanted[key])
