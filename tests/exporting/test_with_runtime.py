"""Adapters that stay in the graph: PEFT and AdapterHub's own library say what they compute."""

import json

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

import loratools
from loratools import LoratoolsError, formats
from loratools.exporting.runtime import generate, session
from loratools.exporting.with_runtime import (
    BOTTLENECKS,
    PREFIXES,
    PROMPTS,
    prefix_past,
    prompt_past,
    read_past,
    with_runtime,
    write_past,
)
from loratools.runtime import IN_GRAPHS
from tests import environments
from tests.exporting import flat_graphs

LM, SEQ = {"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_CLS"}
THREE = {"num_virtual_tokens": 3}
# Base, config class of PEFT, its options.
CASES = {
    "prompt": ("llama", "PromptTuningConfig", LM | THREE),
    "prompt, GPT-2": ("gpt2", "PromptTuningConfig", LM | THREE),
    "prompt, RoBERTa": ("roberta", "PromptTuningConfig", SEQ | THREE),
    "P-tuning": ("llama", "PromptEncoderConfig", LM | THREE | {"encoder_hidden_size": 8}),
    "P-tuning, RoBERTa": (
        "roberta", "PromptEncoderConfig", SEQ | THREE | {"encoder_hidden_size": 8}
    ),
    "prefix": ("llama", "PrefixTuningConfig", LM | THREE),
    "prefix, projected": (
        "llama", "PrefixTuningConfig",
        LM | THREE | {"prefix_projection": True, "encoder_hidden_size": 8},
    ),
    "prefix, GPT-2": ("gpt2", "PrefixTuningConfig", LM | THREE),
    "prefix, RoBERTa": ("roberta", "PrefixTuningConfig", SEQ | THREE),
    "CPT": ("llama", "CPTConfig", LM | {"cpt_token_ids": [1, 2, 9]}),
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 4, 5, 11, 12, 13]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def run(path, ids, mask):
    found = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return found.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]


def traced(module, path, output):
    """As a graph, by torch's tracing exporter."""
    axes = {n: {0: "batch", 1: "sequence"} for n in ("input_ids", "attention_mask")}
    with torch.no_grad():
        dims = module(IDS, MASK)[output].dim()
    axes[output] = {0: "batch"} if dims == 2 else {0: "batch", 1: "sequence"}

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids, attention_mask)[output]

    flat_graphs.trace(
        One().eval(), (IDS[:, :5], MASK[:, :5]), path, ["input_ids", "attention_mask"], [output],
        axes,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A case's folder as PEFT saves it, and the live model loaded from it."""
    made = {}

    def find(case):
        if case not in made:
            base, config, options = CASES[case]
            torch.manual_seed(1)
            model = peft.get_peft_model(flat_graphs.fresh(base), getattr(peft, config)(**options))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.6 * torch.rand_like(parameter) - 0.3)
            made[case] = tmp_path_factory.mktemp("adapter")
            model.save_pretrained(made[case])
        return made[case], peft.PeftModel.from_pretrained(
            flat_graphs.fresh(CASES[case][0]), made[case]
        ).eval()

    return find


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_peft_does_also_in_onnxruntime(case, saved, tmp_path):
    folder, live = saved(case)
    base = flat_graphs.fresh(CASES[case][0])
    module = with_runtime(flat_graphs.fresh(CASES[case][0]), formats.read(folder))
    path = traced(module, tmp_path / "model.onnx", "logits")
    wide = torch.cat([IDS, IDS.flip(0), IDS[:, :3]], 1)  # of a length that was never traced
    long = torch.ones_like(wide)
    long[0, -4:] = 0
    for ids, mask in ((IDS, MASK), (wide, long), (wide[:1], torch.ones_like(wide[:1]))):
        with torch.no_grad():
            expected = live(input_ids=ids, attention_mask=mask).logits
            expected = expected[:, -ids.shape[1] :] if expected.dim() == 3 else expected
            found = module(ids, mask)["logits"]
            plain = base(input_ids=ids, attention_mask=mask).logits
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(run(path, ids, mask), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][2]["task_type"] == "CAUSAL_LM"])
def test_virtual_tokens_are_a_past_beside_the_unmodified_graph(case, saved, tmp_path):
    """Greedy tokens and logits of PEFT, out of the base's own graph and a file."""
    folder, live = saved(case)
    base = CASES[case][0]
    model = flat_graphs.fresh(base)
    flat_graphs.causal(model, tmp_path / "model.onnx")
    adapter = formats.read(folder)
    is_prefix = adapter.runtime.method == "prefix tuning"
    past = prefix_past(adapter, model.config) if is_prefix else prompt_past(model, adapter)
    write_past(past, tmp_path / "past.safetensors")
    past = read_past(tmp_path / "past.safetensors")
    assert past.tokens == 3
    assert past.counted
    graph = session(tmp_path / "model.onnx")
    found = generate(graph, IDS.numpy(), steps=6, past=past)
    expected = IDS
    for _ in range(6):
        with torch.no_grad():
            logits = live(input_ids=expected, attention_mask=torch.ones_like(expected)).logits
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert found.tolist() == expected[:, IDS.shape[1] :].tolist()
    assert found.tolist() != generate(graph, IDS.numpy(), steps=6).tolist()


def refused(call, *arguments):
    with pytest.raises(LoratoolsError) as caught:
        call(*arguments)
    return caught.value


def test_a_refused_fold_names_the_export_for_what_a_graph_carries():
    assert {*BOTTLENECKS, *PREFIXES, *PROMPTS} == IN_GRAPHS


def test_what_cannot_stay_in_a_graph_is_refused(saved, tmp_path):
    prefix = formats.read(saved("prefix")[0])
    wide = transformers.LlamaConfig(**flat_graphs.MODELS["llama"][1] | {"hidden_size": 32})
    assert refused(prefix_past, prefix, wide).code == "shape_mismatch"
    assert refused(prefix_past, formats.read(saved("prompt")[0]), wide).code == "not_exportable"
    model = flat_graphs.fresh("llama")
    assert refused(prompt_past, model, prefix).code == "not_exportable"
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    peft.get_peft_model(flat_graphs.fresh("llama"), config).save_pretrained(tmp_path / "lora")
    error = refused(with_runtime, model, formats.read(tmp_path / "lora"))
    assert error.code == "not_exportable"
    assert "fold it" in str(error)
    config = peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2, target_modules="self_attn"
    )
    peft.get_peft_model(flat_graphs.fresh("llama"), config).save_pretrained(tmp_path / "adaption")
    error = refused(with_runtime, model, formats.read(tmp_path / "adaption"))
    assert error.code == "not_exportable"
    head = formats.read(saved("prompt, RoBERTa")[0])
    assert refused(with_runtime, flat_graphs.fresh("llama"), head).code == "unmatched"


def test_a_file_that_is_no_past_is_malformed(tmp_path):
    for tensors in ({}, {"a": torch.zeros(3)}):
        save_file(tensors, tmp_path / "past.safetensors")
        assert refused(read_past, tmp_path / "past.safetensors").code == "malformed"


# ------------------------------------------------------------------------------- AdapterHub

UNSHARED = {"shared_phm_rule": False, "factorized_phm_W": False, "phm_bias": False}
# Base, config class of adapters, its options.
HUB = {
    "Pfeiffer": ("bert", "SeqBnConfig", {"reduction_factor": 4}),
    "Houlsby": ("roberta", "DoubleSeqBnConfig", {"reduction_factor": 4}),
    "parallel, BERT": ("bert", "ParBnConfig", {"reduction_factor": 2, "scaling": "learned"}),
    "norms": ("bert", "SeqBnConfig", {"reduction_factor": 8, "ln_before": True, "ln_after": True}),
    "residual in the norm": (
        "bert", "SeqBnConfig",
        {"reduction_factor": 8, "ln_after": True, "adapter_residual_before_ln": True},
    ),
    "residual behind": ("bert", "SeqBnConfig", {"residual_before_ln": False}),
    "residual after adding": ("bert", "SeqBnConfig", {"residual_before_ln": "post_add"}),
    "no norm after": ("bert", "SeqBnConfig", {"original_ln_after": False}),
    "by layer": ("bert", "SeqBnConfig", {"reduction_factor": {"0": 4, "default": 8}}),
    "gated": ("bert", "SeqBnConfig", {"reduction_factor": 4, "use_gating": True}),
    "by channel": ("roberta", "SeqBnConfig", {"scaling": "channel", "non_linearity": "leakyrelu"}),
    "invertible": ("roberta", "SeqBnInvConfig", {"reduction_factor": 4}),
    "Houlsby, DistilBERT": ("distilbert", "DoubleSeqBnConfig", {"reduction_factor": 4}),
    "Pfeiffer, DistilBERT": ("distilbert", "SeqBnConfig", {"reduction_factor": 4}),
    "Houlsby, GPT-2": ("gpt2", "DoubleSeqBnConfig", {"reduction_factor": 4}),
    "Pfeiffer, Llama": ("llama", "SeqBnConfig", {"reduction_factor": 2, "non_linearity": "gelu"}),
    "Houlsby, Llama": ("llama", "DoubleSeqBnConfig", {"reduction_factor": 4}),
    "Houlsby, Mistral": ("mistral", "DoubleSeqBnConfig", {"reduction_factor": 4}),
    "parallel, Llama": ("llama", "ParBnConfig", {"reduction_factor": 2, "scaling": "learned"}),
    "no norm after, Llama": ("llama", "SeqBnConfig", {"original_ln_after": False}),
    "Compacter": ("roberta", "CompacterConfig", {"reduction_factor": 4}),
    "Compacter, GPT-2": ("gpt2", "CompacterPlusPlusConfig", {"reduction_factor": 4, **UNSHARED}),
    "prefix": ("gpt2", "PrefixTuningConfig", {"prefix_length": 3, "bottleneck_size": 5}),
    "prefix, Llama": ("llama", "PrefixTuningConfig", {"prefix_length": 3, "bottleneck_size": 5}),
    "prefix, BERT": ("bert", "PrefixTuningConfig", {"prefix_length": 2, "flat": True}),
    "prompt": ("bert", "PromptTuningConfig", {"prompt_length": 3}),
    "prompt behind the first": (
        "bert", "PromptTuningConfig", {"prompt_length": 3, "combine": "prefix_after_bos"}
    ),
}  # fmt: skip

RUN = """
import json, sys, pathlib, torch, adapters, transformers
root = pathlib.Path(sys.argv[1])
ids, mask = (torch.tensor(x) for x in json.loads(sys.argv[3]))
for number, (base, kind, config, options) in enumerate(json.loads(sys.argv[2])):
    load = getattr(transformers, kind).from_pretrained
    model = load(root / base, attn_implementation="eager").eval()
    adapters.init(model)
    torch.manual_seed(number)
    model.add_adapter("task", config=getattr(adapters, config)(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".task." in name and ".0.base" not in name:
                parameter.add_(0.6 * torch.rand_like(parameter) - 0.3)
    model.save_adapter(root / f"made{number}", "task")
    with torch.no_grad():
        model.set_active_adapters(None)
        plain = model(input_ids=ids, attention_mask=mask)[0]
        model.set_active_adapters("task")
        found = model(input_ids=ids, attention_mask=mask)[0]
    torch.save((plain, found), root / f"out{number}.pt")
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The cases as adapters saved them, with what it computes."""
    root = tmp_path_factory.mktemp("adapterhub")
    for base in {base for base, *_ in HUB.values()}:
        flat_graphs.fresh(base).save_pretrained(root / base)
    cases = [(b, flat_graphs.MODELS[b][0], c, o) for b, c, o in HUB.values()]
    given = json.dumps([IDS.tolist(), MASK.tolist()])
    environments.run("adapters", RUN, root, json.dumps(cases), given)
    return root


def of_hub(hub, case):
    """Our module, what adapters computed, which positions count, and by what it is measured."""
    number, base = list(HUB).index(case), HUB[case][0]
    plain, expected = torch.load(hub / f"out{number}.pt")
    if case == "prompt":
        expected = expected[:, 3:]
    if case == "prompt behind the first":
        expected = torch.cat([expected[:, :1], expected[:, 4:]], 1)
    assert (expected - plain).abs().max() > 1e-3
    kind = getattr(transformers, flat_graphs.MODELS[base][0])
    model = kind.from_pretrained(hub / base, attn_implementation="eager").eval()
    module = with_runtime(model, formats.read(hub / f"made{number}"))
    seen = MASK.bool() if expected.dim() == 3 else slice(None)
    return module, expected, seen, max(1.0, float(expected.abs().max()))


def output_of(base):
    return "last_hidden_state" if base == "bert" else "logits"


@pytest.mark.oracle("adapters")
@pytest.mark.parametrize("case", HUB)
def test_it_computes_what_adapterhub_does(case, hub):
    module, expected, seen, scale = of_hub(hub, case)
    with torch.no_grad():
        found = module(IDS, MASK)[output_of(HUB[case][0])]
    torch.testing.assert_close(found[seen] / scale, expected[seen] / scale, atol=1e-5, rtol=1e-5)


QUICK = ("Pfeiffer", "parallel, Llama", "prefix, Llama", "prompt")


@pytest.mark.oracle("adapters")
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in HUB]
)
def test_onnxruntime_computes_what_adapterhub_does(case, hub, tmp_path):
    module, expected, seen, scale = of_hub(hub, case)
    path = traced(module, tmp_path / "model.onnx", output_of(HUB[case][0]))
    ran = torch.from_numpy(run(path, IDS, MASK))
    torch.testing.assert_close(ran[seen] / scale, expected[seen] / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.oracle("adapters")
@pytest.mark.parametrize("case", ["Pfeiffer", "Houlsby, DistilBERT", "Houlsby, Llama"])
def test_export_leaves_it_in_the_graph(case, hub, tmp_path):
    """The whole way: proven against the module, and equal to what adapters computed."""
    _, expected, seen, scale = of_hub(hub, case)
    base, made = hub / HUB[case][0], hub / f"made{list(HUB).index(case)}"
    result = loratools.export(
        base, adapters=[made], out=tmp_path / "o", exporter="legacy", kv_cache=False
    )
    assert result.parity["ok"]
    assert f"with {made.name}" in result.makes
    opened = session(tmp_path / "o" / "model.onnx")
    given = {
        "input_ids": IDS, "attention_mask": MASK, "token_type_ids": torch.zeros_like(IDS),
        "position_ids": torch.arange(IDS.shape[1]).expand_as(IDS),
    }  # fmt: skip
    found = opened.run({name: given[name].numpy() for name in result.inputs})
    ran = torch.from_numpy(found[output_of(HUB[case][0])])
    torch.testing.assert_close(ran[seen] / scale, expected[seen] / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.oracle("adapters")
@pytest.mark.parametrize("case", ["prefix", "prefix, Llama"])
def test_a_prefix_of_adapterhub_is_a_past_whose_positions_do_not_count(case, hub, tmp_path):
    number, base = list(HUB).index(case), HUB[case][0]
    _, expected = torch.load(hub / f"out{number}.pt")
    model = flat_graphs.fresh(base)
    flat_graphs.causal(model, tmp_path / "model.onnx")
    past = prefix_past(formats.read(hub / f"made{number}"), model.config)
    write_past(past, tmp_path / "past.safetensors")
    past = read_past(tmp_path / "past.safetensors")
    assert not past.counted
    states = {name: np.repeat(state, len(IDS), 0) for name, state in past.arrays.items()}
    feeds = flat_graphs.feeds(model, IDS.numpy(), past=states)
    feeds["position_ids"] = np.tile(np.arange(IDS.shape[1]), (len(IDS), 1))
    feeds["attention_mask"][:, 3:] = MASK.numpy()
    graph = session(tmp_path / "model.onnx")
    found = torch.from_numpy(graph.run(feeds)["logits"])
    seen = MASK.bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=1e-5)
    # The first token that is generated is what these logits say.
    first = generate(graph, IDS[:1].numpy(), steps=1, past=past)
    assert first[0, 0] == int(expected[0, -1].argmax())


@pytest.mark.oracle("adapters")
@pytest.mark.parametrize("kind", ["Gemma2", "Olmo2", "GPTNeoX", "Phi"])
def test_layers_whose_names_mean_something_else_are_refused(kind, hub):
    """All have a self_attn, an mlp and norms of the names that Llama's have, put otherwise."""
    adapter = formats.read(hub / f"made{list(HUB).index('Houlsby, Llama')}")
    sizes = {**flat_graphs.SIZES, "intermediate_size": 24, "pad_token_id": 0, "head_dim": 8}
    found = getattr(transformers, f"{kind}ForCausalLM")
    before = (model := found(found.config_class(**sizes))).state_dict().keys()
    error = refused(with_runtime, model, adapter)
    assert error.code in ("not_exportable", "unmatched")
    assert model.state_dict().keys() == before
