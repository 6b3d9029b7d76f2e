"""AdapterHub's program: the runtime adapters it saves are read, moved and averaged as it does."""

import json
import shutil

import pytest
import torch
import transformers

from loratools import LoratoolsError, check, convert, formats, merge
from loratools.commands.runtimes import expanded
from loratools.containers.bundle import local
from loratools.formats import adapterhub
from loratools.runtime import IN_GRAPHS, described
from tests import environments
from tests.oracle.folds import fold

pytestmark = pytest.mark.oracle("adapters")

SIZES = {"vocab_size": 40, "max_position_embeddings": 32, "hidden_size": 16,
         "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}  # fmt: skip
MODELS = {
    "bert": ("BertModel", {**SIZES, "intermediate_size": 24}),
    "gpt2": ("GPT2LMHeadModel", {**SIZES, "n_inner": 24}),
    "llama": ("LlamaForCausalLM", {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1}),
}
UNSHARED = {"shared_phm_rule": False, "factorized_phm_W": False, "phm_bias": False}
FACTORS = {"factorized_phm_rule": True, "shared_W_phm": True, "non_linearity": "relu"}
# Base, config class of adapters, its options.
CASES = {
    "Pfeiffer": ("bert", "SeqBnConfig", {"reduction_factor": 4}),
    "Houlsby": ("gpt2", "DoubleSeqBnConfig", {"reduction_factor": 4}),
    "Houlsby, other": ("gpt2", "DoubleSeqBnConfig", {"reduction_factor": 4}),
    "parallel": ("llama", "ParBnConfig", {"reduction_factor": 2, "scaling": "learned"}),
    "norms": ("bert", "SeqBnConfig", {"reduction_factor": 8, "ln_before": True, "ln_after": True}),
    "by layer": ("bert", "SeqBnConfig", {"reduction_factor": {"0": 4, "default": 8}}),
    "invertible": ("bert", "SeqBnInvConfig", {"reduction_factor": 4}),
    "Compacter": ("bert", "CompacterConfig", {"reduction_factor": 4}),
    "Compacter++": ("gpt2", "CompacterPlusPlusConfig", {"reduction_factor": 4, **UNSHARED}),
    "Compacter, factors": ("llama", "CompacterConfig", {"reduction_factor": 2, **FACTORS}),
    "prefix": ("gpt2", "PrefixTuningConfig", {"prefix_length": 3, "bottleneck_size": 5}),
    "prefix, grouped": ("llama", "PrefixTuningConfig", {"prefix_length": 3, "bottleneck_size": 5}),
    "flat prefix": ("gpt2", "PrefixTuningConfig", {"prefix_length": 2, "flat": True}),
    "prompt": ("bert", "PromptTuningConfig", {"prompt_length": 3}),
    "ReFT": ("llama", "LoReftConfig", {"r": 2}),
    "MAM": ("bert", "MAMConfig", {}),
    "UniPELT": ("bert", "UniPELTConfig", {}),
    "gated LoRA": ("bert", "LoRAConfig", {"r": 2, "use_gating": True}),
}  # fmt: skip
FOLDED = {
    "IA3": ("bert", "IA3Config", {}),
    "IA3 with alpha": ("bert", "IA3Config", {"alpha": 3}),
    "IA3, fused": ("gpt2", "IA3Config", {}),
    "IA3, fused, query": ("gpt2", "IA3Config", {"attn_matrices": ["q", "v"]}),
    "IA3, no biases": ("llama", "IA3Config", {}),
    "VeRA": ("bert", "LoRAConfig", {"vera_d": 0.1, "vera_b": 0.2, "r": 3, "init_weights": "vera"}),
    "MTL-LoRA": ("bert", "MTLLoRAConfig", {"r": 2, "n_up_projection": 3}),
}

RUN = """
import json, sys, pathlib, torch, adapters, transformers
from adapters import AutoAdapterModel
root = pathlib.Path(sys.argv[1])
ids = torch.arange(1, 13).reshape(2, 6)
def fresh(base):
    torch.manual_seed(0)
    # With sdpa adapters 1.3.0 lets early tokens see the first of a prefix only: a causal mask of
    # other sizes, where none was given.
    return AutoAdapterModel.from_pretrained(root / base, attn_implementation="eager").eval()
def hidden(model):
    with torch.no_grad():
        return model.base_model(ids).last_hidden_state
def load(base, folder, *others):
    model = fresh(base)
    info = {}
    load = lambda f, name: model.load_adapter(str(f), loading_info=info, load_as=name)
    names = [load(folder, "x0"), *(load(f, "x1") for f in others)] if others else [
        load(folder, None)]
    assert not info["unexpected_keys"], info
    model.set_active_adapters(names[0])
    return model, names
"""
MAKE = """
cases = json.loads(sys.argv[2])
for number, (base, config, options) in enumerate(cases):
    torch.manual_seed(number)
    model = fresh(base)
    model.add_adapter("task", config=getattr(adapters, config)(**options))
    torch.manual_seed(number)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".task." in name and ".0.base" not in name:
                parameter.add_(0.6 * torch.rand_like(parameter) - 0.3)
    folder = root / f"made{number}"
    model.save_adapter(folder, "task")
    model, _ = load(base, folder)
    found = hidden(model)
    model.set_active_adapters(None)
    assert (found[:, -6:] - hidden(model)).abs().max() > 1e-3, config
    torch.save(found, root / f"hidden{number}.pt")
    if config == "PrefixTuningConfig" and base == "gpt2" and "flat" not in options:
        model.eject_prefix_tuning("task")
        model.save_adapter(root / "ejected", "task")
first, other = sys.argv[3:]
model, names = load("gpt2", root / first, root / other)
model.average_adapter("mean", names, weights=[0.3, 0.7])
model.save_adapter(root / "averaged", "mean")
"""
LOAD = """
for folder in sorted(root.glob("written-*")):
    model, _ = load((folder / "base.txt").read_text(), folder)
    torch.save(hidden(model), folder / "hidden.pt")
"""


def number(case):
    return list(CASES | FOLDED).index(case)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Bases of transformers, and all cases as adapters saved them, with what it computes."""
    root = tmp_path_factory.mktemp("runtime")
    for name, (kind, sizes) in MODELS.items():
        torch.manual_seed(7)
        made = getattr(transformers, kind)
        model = made(made.config_class(**sizes))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_()
        model.save_pretrained(root / name)
    pair = [f"made{number(case)}" for case in ("Houlsby", "Houlsby, other")]
    cases = json.dumps(list((CASES | FOLDED).values()))
    environments.run("adapters", RUN + MAKE, root, cases, *pair)
    return root


def made(root, case):
    """A case's folder, its base, and what adapters computes with it."""
    base = (CASES | FOLDED)[case][0]
    return root / f"made{number(case)}", root / base, torch.load(root / f"hidden{number(case)}.pt")


@pytest.fixture(scope="module")
def served(root):
    """What adapters computes with what we write: every case again, Compacters expanded, averages,
    and PEFT's prefixes.
    """
    todo = {}
    for case in CASES | FOLDED:
        folder, base, hidden = made(root, case)
        todo[f"again-{number(case)}"] = (folder, base, hidden, {"to": "adapterhub"})
        if case.startswith("Compacter"):
            todo[f"plain-{number(case)}"] = (folder, base, hidden, {"to": "bottleneck"})
    for case in ("prefix", "prefix, grouped", "prompt"):
        folder, base, hidden = made(root, case)
        there = root / f"peft{number(case)}"
        allow = {"allow": ["loss"]} if case != "prefix, grouped" else {}
        convert([folder], to="peft", out=there, base=base, **allow)
        options = {"to": "adapterhub", "base": base, **allow}
        todo[f"back-{number(case)}"] = (there, base, hidden, options)
    for name, (folder, base, _, options) in todo.items():
        out = root / f"written-{name}"
        [result] = convert([folder], out=out, **options)
        assert result.lossless != ("allow" in options)
        (out / "base.txt").write_text(base.name)
    environments.run("adapters", RUN + LOAD, root)
    return {name: (hidden, root / f"written-{name}") for name, (_, _, hidden, _) in todo.items()}


# ------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_described_and_no_weight_takes_it_in(case, root):
    folder = made(root, case)[0]
    assert adapterhub.detect(local(folder))
    adapter = formats.read(folder)
    assert [p.code for p in adapter.problems] == ["not_foldable"]
    said = "loratools export BASE --adapter ADAPTER -o OUT" in adapter.problems[0].remedy
    assert said == (adapter.runtime.method in IN_GRAPHS)
    assert adapter.runtime is not None
    saved = torch.load(folder / "pytorch_adapter.bin")
    assert adapter.runtime.tensors.keys() == saved.keys()
    said = described(adapter.runtime)
    unique = {t.data_ptr(): t.numel() for t in saved.values()}
    if case != "norms":  # whose first norm stands there under two names
        assert said["parameters"] == sum(unique.values())


PREFIX, PROMPT = "prefix_tuning.prefix_tunings.task", "prompt_tuning.prompt_tunings.task"
INVERTIBLE = "invertible_adapters.task"
BARE = {
    "invertible": ("SeqBnInvConfig", {"reduction_factor": 4}, f"{INVERTIBLE}.F.0.weight"),
    "coupled": ("DoubleSeqBnInvConfig", {"reduction_factor": 4}, f"{INVERTIBLE}.G.2.bias"),
    "prefix": ("PrefixTuningConfig", {}, f"{PREFIX}.self_prefix.wte.weight"),
    "prompt": ("PromptTuningConfig", {}, f"{PROMPT}.prompt_embedding.weight"),
}
BARE_RUN = """
def bare(base):
    model = transformers.AutoModel.from_pretrained(root / base, attn_implementation="eager").eval()
    adapters.init(model)
    return model
def states(model):
    model.set_active_adapters("task")
    with torch.no_grad():
        return model(ids).last_hidden_state
for name, (config, options, _) in json.loads(sys.argv[2]).items():
    if sys.argv[3] == "make":
        torch.manual_seed(0)
        model = bare("bert")
        model.add_adapter("task", config=getattr(adapters, config)(**options))
        model.save_adapter(root / f"bare-{name}", "task")
        torch.save(states(model), root / f"bare-{name}.pt")
    else:
        model, info = bare("bert"), {}
        model.load_adapter(str(root / f"bare-again-{name}"), loading_info=info)
        assert not info["unexpected_keys"] and not info["missing_keys"], info
        torch.save(states(model), root / f"bare-again-{name}.pt")
"""


def test_an_adapter_of_a_bare_model_has_keys_with_nothing_in_front(root):
    environments.run("adapters", RUN + BARE_RUN, root, json.dumps(BARE), "make")
    for name, (_, _, key) in BARE.items():
        adapter = formats.read(root / f"bare-{name}")
        assert [p.code for p in adapter.problems] == ["not_foldable"], name
        assert key in adapter.runtime.tensors
        checked = check([root / f"bare-{name}"], base=root / "bert")
        assert [(p.code, p.severity) for p in checked.problems] == [("not_foldable", "warning")]
        convert([root / f"bare-{name}"], to="adapterhub", out=root / f"bare-again-{name}")
    said = described(formats.read(root / "bare-invertible").runtime)
    assert said["invertible"] is True
    environments.run("adapters", RUN + BARE_RUN, root, json.dumps(BARE), "load")
    for name in BARE:
        found, expected = (torch.load(root / f"bare-{w}{name}.pt") for w in ("again-", ""))
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_numbers_of_the_cases(root):
    said = {case: described(formats.read(made(root, case)[0]).runtime) for case in CASES}
    assert {k: said["Houlsby"][k] for k in ("variant", "layers", "places", "width")} == {
        "variant": "Houlsby", "layers": 2, "places": 4, "width": 4
    }  # fmt: skip
    assert [said[c]["variant"] for c in ("Pfeiffer", "parallel")] == ["Pfeiffer", "parallel"]
    assert said["by layer"]["width"] == [2, 4]
    assert said["invertible"]["invertible"] is True
    assert (said["Compacter"]["method"], said["Compacter"]["phm_dim"]) == ("Compacter", 4)
    assert [said["prefix, grouped"][k] for k in ("virtual_tokens", "layers", "key_width")] == [
        3, 2, 8
    ]  # fmt: skip
    assert said["prompt"]["virtual_tokens"] == 3
    assert (said["ReFT"]["rank"], said["ReFT"]["layers"]) == (2, 2)
    assert [p["method"] for p in said["MAM"]["parts"]] == ["bottleneck", "prefix tuning"]
    assert [p["method"] for p in said["UniPELT"]["parts"]] == [
        "bottleneck", "prefix tuning", "gated LoRA"
    ]  # fmt: skip


def test_the_flat_form_of_a_prefix_is_what_adapters_ejects(root):
    virtual = formats.read(made(root, "prefix")[0]).runtime.virtual.tensor()
    ejected = formats.read(root / "ejected").runtime
    torch.testing.assert_close(virtual, ejected.virtual.tensor(), atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------- folding


def last_hidden(base, folded, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "folded"
    shutil.copytree(base, folder)
    save_file({k: t.contiguous() for k, t in folded.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    model = getattr(transformers, MODELS[base.name][0]).from_pretrained(folder).eval()
    with torch.no_grad():
        return model.base_model(torch.arange(1, 13).reshape(2, 6)).last_hidden_state


@pytest.mark.parametrize("case", FOLDED)
def test_relatives_of_lora_fold_as_adapters_runs_them(case, root, tmp_path):
    folder, base, expected = made(root, case)
    adapter = formats.read(folder)
    assert [p for p in adapter.problems if p.severity != "note"] == []
    assert adapter.runtime is None
    found = last_hidden(base, fold(adapter, base), tmp_path)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("case", CASES | FOLDED)
def test_what_was_read_is_written_again_and_runs_alike(case, root, served):
    expected, out = served[f"again-{number(case)}"]
    torch.testing.assert_close(torch.load(out / "hidden.pt"), expected, atol=0, rtol=0)
    before = torch.load(made(root, case)[0] / "pytorch_adapter.bin")
    after = torch.load(out / "pytorch_adapter.bin")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config = [
        json.loads((f / "adapter_config.json").read_text()) for f in (made(root, case)[0], out)
    ]
    assert config[0] == config[1]


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("Compacter")])
def test_a_compacter_is_a_plain_bottleneck(case, root, served):
    expected, out = served[f"plain-{number(case)}"]
    torch.testing.assert_close(torch.load(out / "hidden.pt"), expected, atol=1e-5, rtol=1e-5)
    again = formats.read(out)
    assert again.runtime.method == "bottleneck"
    assert not any("phm" in key or ".W" in key for key in again.runtime.tensors)
    assert expanded(again) is again


@pytest.mark.parametrize("case", ["prefix", "prefix, grouped", "prompt"])
def test_what_went_to_peft_and_back_runs_as_before(case, served):
    expected, out = served[f"back-{number(case)}"]
    torch.testing.assert_close(torch.load(out / "hidden.pt"), expected, atol=1e-5, rtol=1e-5)


def run_by_peft(base, folder):
    """The last hidden states of the input's six tokens, as PEFT computes them."""
    import peft

    kind = getattr(transformers, MODELS[base.name][0])
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(base), folder).eval()
    with torch.no_grad():
        ids = torch.arange(1, 13).reshape(2, 6)
        return model(input_ids=ids, output_hidden_states=True).hidden_states[-1][:, -6:]


def test_peft_runs_a_prefix_of_adapters_alike_where_positions_turn_keys(root, tmp_path):
    folder, base, expected = made(root, "prefix, grouped")
    [result] = convert([folder], to="peft", out=tmp_path / "out", base=base)
    assert result.lossless
    torch.testing.assert_close(run_by_peft(base, tmp_path / "out"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["prefix", "flat prefix"])
def test_elsewhere_it_is_refused_since_peft_counts_positions_otherwise(case, root, tmp_path):
    folder, base, expected = made(root, case)
    with pytest.raises(LoratoolsError, match="counts the input's positions from 0") as caught:
        convert([folder], to="peft", out=tmp_path / "out", base=base)
    assert caught.value.code == "loss"
    convert([folder], to="peft", out=tmp_path / "out", base=base, allow=["loss"])
    assert (run_by_peft(base, tmp_path / "out") - expected).abs().max() > 1e-3
    # With the positions of adapters it is the same: the numbers are where they belong.
    rows = formats.read(tmp_path / "out").runtime.virtual.tensor()
    model = transformers.GPT2LMHeadModel.from_pretrained(base).eval()
    states = rows.view(1, len(rows), 4, 2, 8).permute(2, 0, 3, 1, 4).repeat(1, 2, 1, 1, 1)
    cache = transformers.DynamicCache()
    for layer, (keys, values) in enumerate(states.split(2)):
        cache.update(keys, values, layer)
    ids, places = torch.arange(1, 13).reshape(2, 6), torch.arange(6)[None]
    with torch.no_grad():
        found = model.transformer(ids, past_key_values=cache, position_ids=places)
    torch.testing.assert_close(found.last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_the_same_prompt_is_put_elsewhere_by_peft(root, tmp_path):
    folder, base, expected = made(root, "prompt")
    with pytest.raises(LoratoolsError, match="behind its embeddings of positions") as caught:
        convert([folder], to="peft", out=tmp_path / "out", base=base)
    assert caught.value.code == "loss"
    convert([folder], to="peft", out=tmp_path / "out", base=base, allow=["loss"])
    found = run_by_peft(base, tmp_path / "out")
    assert (found - expected[:, -6:]).abs().max() > 1e-3


# ------------------------------------------------------------------------------- merging


def test_an_average_of_bottlenecks_is_that_of_adapters(root, tmp_path):
    some = [made(root, case)[0] for case in ("Houlsby", "Houlsby, other")]
    result = merge(some, weights=[0.3, 0.7], out=tmp_path / "out")
    assert "heuristic" in " ".join(result.notes)
    found = torch.load(tmp_path / "out" / "pytorch_adapter.bin")
    theirs = torch.load(root / "averaged" / "pytorch_adapter.bin")
    theirs = {key.replace(".mean.", ".task."): tensor for key, tensor in theirs.items()}
    assert found.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=1e-6)
