"""`export` with adapters switched, running in the graph or folded into one, against PEFT."""

import json

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers

import loratools
from loratools.exporting.runtime import session
from loratools.exporting.with_runtime import read_past
from tests.exporting import exportable_models
from tests.oracle.models import train

SEED = 21
CONFIGS = {
    "a": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "b": peft.LoraConfig(r=2, target_modules=["v_proj"]),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A Llama and adapters trained on it."""
    place = tmp_path_factory.mktemp("room")
    exportable_models.save("llama", place / "base")
    for name, config in CONFIGS.items():
        torch.manual_seed(SEED)
        model = peft.get_peft_model(loaded(place), config)
        train(model)
        model.save_pretrained(place / name)
    return place


def loaded(place):
    return transformers.AutoModelForCausalLM.from_pretrained(place / "base").eval()


def sample(rows=2, length=6):
    torch.manual_seed(SEED)
    ids = torch.randint(3, 48, (rows, length))
    mask = torch.ones_like(ids)
    return ids, mask


def feeds_of(graph, ids, mask, past=()):
    """Feeds for a prefill, on a past or an empty one."""
    held = dict(past)
    for i in onnx.load(graph).graph.input:
        if i.name.startswith("past_key_values") and i.name not in held:
            dims = [d.dim_value for d in i.type.tensor_type.shape.dim]
            held[i.name] = np.zeros((len(ids), dims[1], 0, dims[3]), np.float32)
    more = next(iter(held.values())).shape[2]
    whole = np.pad(mask.numpy(), ((0, 0), (more, 0)), constant_values=1)
    places = np.clip(whole.cumsum(1) - 1, 0, None)[:, more:]
    given = {"input_ids": ids.numpy(), "attention_mask": whole, "position_ids": places}
    return {**given, **held}


def test_packs_of_a_switchable_graph_are_peft_s_adapters(room, tmp_path):
    out = tmp_path / "o"
    result = loratools.export(
        room / "base", out=out, adapters=[room / "a", room / "b"], switchable=True,
        exporter="legacy",
    )  # fmt: skip
    assert {"a.onnx_adapter", "b.onnx_adapter"} <= set(result.files)
    assert any("a active" in case["case"] for case in result.parity["cases"])
    ids, mask = sample()
    graph = out / "model.onnx"
    opened = session(graph)
    for name in ("a", "b"):
        model = peft.PeftModel.from_pretrained(loaded(room), room / name).eval()
        with torch.no_grad():
            due = model(input_ids=ids, attention_mask=mask).logits.numpy()
        got = opened.run(feeds_of(graph, ids, mask), adapter=out / f"{name}.onnx_adapter")
        assert np.abs(got["logits"] - due).max() < 1e-5 * max(1, np.abs(due).max())


def test_a_switchable_graph_may_be_quantised(room, tmp_path):
    out = tmp_path / "o"
    loratools.export(
        room / "base", out=out, adapters=[room / "a"], switchable=True, exporter="legacy",
        quantize="int8", quantize_method="nbits",
    )  # fmt: skip
    ids, mask = sample()
    model = peft.PeftModel.from_pretrained(loaded(room), room / "a").eval()
    with torch.no_grad():
        due = model(input_ids=ids, attention_mask=mask).logits.numpy()
    given = feeds_of(out / "model.onnx", ids, mask)
    opened = session(out / "model.onnx")
    idle = opened.run(given)["logits"]
    active = opened.run(given, adapter=out / "a.onnx_adapter")["logits"]
    norm = np.linalg.norm
    assert norm(active - due) < 0.05 * norm(due) < norm(idle - due)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_virtual_tokens_in_the_graph_and_as_a_past(name, room, tmp_path):
    ids, mask = sample()
    model = peft.PeftModel.from_pretrained(loaded(room), room / name).eval()
    with torch.no_grad():
        due = model(input_ids=ids, attention_mask=mask).logits[:, -6:].numpy()
    within, beside = tmp_path / "within", tmp_path / "beside"
    loratools.export(
        room / "base", out=within, adapters=[room / name], kv_cache=False, exporter="legacy"
    )
    found = session(within / "model.onnx").run(
        {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    )
    assert np.abs(found["logits"] - due).max() < 1e-5 * max(1, np.abs(due).max())
    result = loratools.export(room / "base", out=beside, adapters=[room / name], exporter="legacy")
    assert any("virtual tokens" in note for note in result.notes)
    past = read_past(beside / f"{name}.past.safetensors")
    wide = {n: np.repeat(a, len(ids), 0) for n, a in past.arrays.items()}
    graph = beside / "model.onnx"
    got = session(graph).run(feeds_of(graph, ids, mask, wide))
    assert np.abs(got["logits"] - due).max() < 1e-5 * max(1, np.abs(due).max())


def test_a_fold_into_a_graph_is_the_export_of_the_fold(room, tmp_path):
    loratools.export(room / "base", out=tmp_path / "plain", exporter="legacy")
    loratools.export(
        room / "base", into=tmp_path / "plain" / "model.onnx", adapters=[room / "a"],
        out=tmp_path / "into",
    )  # fmt: skip
    loratools.export(room / "base", adapters=[room / "a"], out=tmp_path / "on", exporter="legacy")
    graphs = []
    for folder in ("into", "on"):
        model = onnx.load(tmp_path / folder / "model.onnx")
        del model.metadata_props[:]  # lineage
        graphs.append(model.SerializeToString(deterministic=True))
    assert graphs[0] == graphs[1]


def test_base_merged_and_switchable_are_timed_in_one_run(room, tmp_path):
    result = loratools.export(
        room / "base", out=tmp_path / "o", adapters=[room / "a", room / "b"], weights=[0.7, 0.3],
        exporter="legacy", measure=True,
    )  # fmt: skip
    assert list(result.latency) == ["base", "switchable, idle", "switchable, active", "merged"]
    assert result.latency["base"]["ratio"] == 1
    assert not [p for p in (tmp_path / "o").iterdir() if p.name.startswith(".")]


def test_one_runtime_adapter_at_a_time(room, tmp_path):
    with pytest.raises(loratools.LoratoolsError, match="acts where the model runs") as refused:
        loratools.export(
            room / "base", out=tmp_path / "o", adapters=[room / "prefix", room / "a"],
            weights=[1, 1],
        )  # fmt: skip
    assert refused.value.code == "usage"


def test_adapters_are_folded_into_a_copy_of_a_live_module(room, tmp_path):
    live = loaded(room)
    before = {n: t.clone() for n, t in live.state_dict().items()}
    result = loratools.export(
        live, adapters=[room / "a", f"{room / 'a'}"], weights=[0.75, 0.25], out=tmp_path / "o",
        exporter="legacy",
    )  # fmt: skip
    assert result.makes.startswith("export: 2 adapters in LlamaForCausalLM")
    assert all(torch.equal(before[n], t) for n, t in live.state_dict().items())
    ids, mask = sample()
    model = peft.PeftModel.from_pretrained(loaded(room), room / "a").eval()
    with torch.no_grad():
        due = model(input_ids=ids, attention_mask=mask).logits.numpy()
    graph = tmp_path / "o" / "model.onnx"
    got = session(graph).run(feeds_of(graph, ids, mask))
    assert np.abs(got["logits"] - due).max() < 1e-5 * max(1, np.abs(due).max())
    props = {p.key: p.value for p in onnx.load(graph).metadata_props}
    assert len(json.loads(props["loratools.adapters"])) == 2


@pytest.mark.parametrize(
    ("adapters", "options", "words"),
    [
        (["prefix"], {}, "export it from the model's folder"),
        (["a"], {"only": ["*q_proj*"]}, "only belongs to a model in a folder"),
        (["a"], {"weights": [{"*q_proj*": 1, "*": 0.5}]}, "belong to a model in a folder"),
        (["a", "b"], {}, "weight"),
    ],
)
def test_what_a_live_module_does_not_take(adapters, options, words, room, tmp_path):
    with pytest.raises(loratools.LoratoolsError, match=words) as refused:
        loratools.export(
            loaded(room), adapters=[room / a for a in adapters], out=tmp_path / "o", **options
        )
    assert refused.value.code == "usage"
    assert not (tmp_path / "o").exists()
