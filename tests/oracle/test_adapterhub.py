"""AdapterHub's own program: what it saves folds as it runs it, what we write it loads and runs."""

import json
import shutil

import peft
import pytest
import torch
import transformers

from loratools import formats
from loratools.containers.bundle import local
from loratools.formats import adapterhub
from loratools.formats.adapterhub_writing import VERSION
from tests import environments
from tests.oracle.folds import fold

pytestmark = pytest.mark.oracle("adapters")

TINY = {"vocab_size": 40, "max_position_embeddings": 32}
MODELS = {
    "bert": ("BertModel", {"hidden_size": 16, "intermediate_size": 24}),
    "roberta": ("RobertaModel", {"hidden_size": 16, "intermediate_size": 24, "pad_token_id": 0}),
    "gpt2": ("GPT2Model", {"hidden_size": 16, "n_inner": 24}),
    "llama": (
        "LlamaModel",
        {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 1},
    ),
}
FULL = {"intermediate_lora": True, "output_lora": True}
# What each has: its base, the options of LoRAConfig, and what is changed of its file afterwards.
CASES = {
    "bert": ("bert", {"r": 4, "alpha": 8, "attn_matrices": ["q", "k", "v"], **FULL}, {}),
    "bert, layers left out": ("bert", {"r": 2, "alpha": 3, "leave_out": [0]}, {}),
    "bert, old": ("bert", {"r": 4, "alpha": 8}, {"version": "adapters.1.0.1"}),
    "bert, its predecessor": ("bert", {"r": 4, "alpha": 8}, {"version": "3.2.1"}),
    "roberta, safetensors": ("roberta", {"r": 3, "alpha": 1, "output_lora": True}, {}),
    "gpt2": ("gpt2", {"r": 2, "alpha": 8, **FULL}, {}),
    "gpt2, key alone": ("gpt2", {"r": 2, "alpha": 5, "attn_matrices": ["k"]}, {}),
    "gpt2, all three": ("gpt2", {"r": 2, "alpha": 5, "attn_matrices": ["v", "q", "k"]}, {}),
    "gpt2, old": ("gpt2", {"r": 2, "alpha": 8, **FULL}, {"version": "adapters.1.0.0"}),
    "llama": ("llama", {"r": 2, "alpha": 4, **FULL}, {}),
    "llama, DoRA": ("llama", {"r": 4, "alpha": 4, "use_dora": True, **FULL}, {}),
    "bert, DoRA": ("bert", {"r": 4, "alpha": 4, "use_dora": True, **FULL}, {}),
}

MAKE = """
import json, sys, pathlib, torch, adapters
from adapters import AutoAdapterModel, LoRAConfig
root, cases = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
ids = torch.arange(1, 13).reshape(2, 6)
for number, (base, options, changes) in enumerate(cases):
    torch.manual_seed(number)
    model = AutoAdapterModel.from_pretrained(root / base).eval()
    model.add_adapter("task", config=LoRAConfig(**options))
    if number == 0:
        model.add_classification_head("task", num_labels=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".loras." in name:
                parameter.add_(0.4 * torch.rand_like(parameter) - 0.2)
    folder = root / f"made{number}"
    model.save_adapter(folder, "task", use_safetensors=number == 4)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    model = AutoAdapterModel.from_pretrained(root / base).eval()
    info = {}
    model.load_adapter(str(folder), use_safetensors=True, with_head=False, loading_info=info)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    model.set_active_adapters("task")
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
    model.merge_adapter("task")
    merged = model.base_model.state_dict()
    torch.save({"hidden": hidden, "merged": merged}, root / f"expected{number}.pt")
"""

LOAD = """
import sys, pathlib, torch
from adapters import AutoAdapterModel
root = pathlib.Path(sys.argv[1])
ids = torch.arange(1, 13).reshape(2, 6)
for folder in sorted(root.glob("written-*")):
    base = (folder / "base.txt").read_text()
    model = AutoAdapterModel.from_pretrained(root / base).eval()
    info = {}
    name = model.load_adapter(str(folder), loading_info=info)
    assert not info["unexpected_keys"], info
    model.set_active_adapters(name)
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        model.set_active_adapters(None)
        before = model.base_model(ids).last_hidden_state
    assert (hidden - before).abs().max() > 1e-3
    torch.save({"hidden": hidden, "missing": info["missing_keys"]}, folder / "hidden.pt")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Bases of transformers, and all cases as adapters saved them, with what it computes."""
    root = tmp_path_factory.mktemp("adapterhub")
    for name, (kind, options) in MODELS.items():
        torch.manual_seed(7)
        made = getattr(transformers, kind)
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, **TINY, **options}
        model = made(made.config_class(**sizes))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):  # zero as they are made
                    parameter.normal_()
        model.save_pretrained(root / name)
    environments.run("adapters", MAKE, root, json.dumps(list(CASES.values())))
    return root


def made(root, case):
    """A case's folder, its base, and what adapters computes with it."""
    number = list(CASES).index(case)
    expected = torch.load(root / f"expected{number}.pt")
    return root / f"made{number}", root / CASES[case][0], expected


def hidden(base, folded, tmp_path):
    """What transformers computes with folded weights."""
    from safetensors.torch import save_file

    folder = tmp_path / "folded"
    shutil.copytree(base, folder)
    kept = {k: t.contiguous() for k, t in folded.items() if not k.startswith("heads.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    kind = getattr(transformers, MODELS[base.name][0])
    with torch.no_grad():
        ids = torch.arange(1, 13).reshape(2, 6)
        return kind.from_pretrained(folder).eval()(ids).last_hidden_state


@pytest.mark.parametrize("case", CASES)
def test_what_adapters_saves_folds_as_it_runs_and_merges_it(case, root, tmp_path):
    folder, base, expected = made(root, case)
    assert adapterhub.detect(local(folder))
    adapter = adapterhub.read(local(folder), assume={})
    assert [p.message for p in adapter.problems if p.severity == "error"] == []
    folded = fold(adapter, base)
    for key, tensor in expected["merged"].items():
        if key in folded:
            torch.testing.assert_close(folded[key], tensor, atol=1e-5, rtol=1e-5)
    computed = hidden(base, folded, tmp_path)
    if case == "bert, DoRA":  # adapters runs it with other biases than it merges
        assert (computed - expected["hidden"]).abs().max() > 1e-3
        assert [p.code for p in adapter.problems] == ["not_foldable"]
    else:
        torch.testing.assert_close(computed, expected["hidden"], atol=1e-5, rtol=1e-5)
    if case == "bert":
        heads = {key: tensor for key, tensor in folded.items() if key.startswith("heads.task.")}
        saved = torch.load(folder / "pytorch_model_head.bin")
        assert heads.keys() == saved.keys()
        assert all(torch.equal(heads[key], saved[key]) for key in saved)


@pytest.mark.parametrize("case", CASES)
def test_what_adapters_saved_is_written_again_as_it_was(case, root, tmp_path):
    folder, _, _ = made(root, case)
    adapter = adapterhub.read(local(folder), assume={})
    assert [p for p in adapterhub.lost(adapter) if p.severity == "error"] == []
    out = tmp_path / "out"
    out.mkdir()
    digests = adapterhub.write(adapter, out)
    assert digests.keys() == {path.name for path in out.iterdir()}
    again = adapterhub.read(local(out), assume={})
    before, after = tensors(folder), tensors(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    first, second = (json.loads((f / "adapter_config.json").read_text()) for f in (folder, out))
    if "old" in case:  # its scaling of 1, said as files of today say it
        first["config"]["alpha"] = first["config"]["r"]
    assert first | {"version": VERSION} == second
    assert {k: scalings(d) for k, d in again.deltas.items()} == {
        k: scalings(d) for k, d in adapter.deltas.items()
    }


def tensors(folder):
    from safetensors.torch import load_file

    found = {}
    for path in folder.iterdir():
        if path.suffix == ".bin":
            found |= torch.load(path)
        elif path.suffix == ".safetensors":
            found |= load_file(path)
    return found


def scalings(delta):
    return getattr(getattr(delta, "delta", delta), "scaling", None)


# ------------------------------------------------------------------------------- from elsewhere

PATTERN = r".*(query|value|intermediate\.dense|layer\.\d\.output\.dense)"
ELSEWHERE = {
    "bert": ("bert", {"target_modules": PATTERN, "r": 4, "lora_alpha": 6}),
    "bert, ranks and alphas": (
        "bert",
        {
            "target_modules": PATTERN, "r": 4, "lora_alpha": 6,
            "rank_pattern": {"query": 2, "layer.1.attention.self.value": 7},
            "alpha_pattern": {"layer.0.attention.self.query": 9, "output.dense": 1},
        },
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "r": 3, "lora_alpha": 5}),
    "gpt2, ranks": (
        "gpt2",
        {
            "target_modules": ["c_attn", "mlp.c_proj"], "r": 3, "lora_alpha": 5,
            "rank_pattern": {"h.0.attn.c_attn": 5},
        },
    ),
    "llama, DoRA": (
        "llama",
        {"target_modules": ["q_proj", "up_proj", "down_proj"], "use_dora": True, "lora_alpha": 3},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def served(root):
    """PEFT's adapters in AdapterHub's format: what PEFT computes, and what adapters does."""
    expected = {}
    for number, (case, (base, options)) in enumerate(ELSEWHERE.items()):
        torch.manual_seed(number)
        kind = getattr(transformers, MODELS[base][0])
        model = peft.get_peft_model(kind.from_pretrained(root / base), peft.LoraConfig(**options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.rand_like(parameter) - 0.5)
            ids = torch.arange(1, 13).reshape(2, 6)
            expected[case] = model.eval()(ids).last_hidden_state
        model.save_pretrained(root / f"peft{number}")
        out = root / f"written-{number}"
        out.mkdir()
        (out / "base.txt").write_text(base)
        adapter = formats.read(root / f"peft{number}")
        assert [p for p in adapterhub.lost(adapter) if p.severity == "error"] == []
        adapterhub.write(adapter, out)
    environments.run("adapters", LOAD, root)
    return expected


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_we_write_adapters_loads_and_runs_alike(case, root, served):
    out = root / f"written-{list(ELSEWHERE).index(case)}"
    found = torch.load(out / "hidden.pt")
    # Modules that the config switches on and the file lacks begin without an effect.
    torch.testing.assert_close(found["hidden"], served[case], atol=1e-5, rtol=1e-5)
    again = fold(adapterhub.read(local(out), assume={}), root / ELSEWHERE[case][0])
    number = list(ELSEWHERE).index(case)
    direct = fold(formats.read(root / f"peft{number}"), root / ELSEWHERE[case][0])
    for key, tensor in direct.items():
        torch.testing.assert_close(again[key], tensor, atol=1e-6, rtol=1e-6)
