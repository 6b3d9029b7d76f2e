"""`export` of a model and adapters on the Hub: fetched, proven, and their commits in the graph."""

import json

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
import transformers
from huggingface_hub import constants

from tests.exporting import exportable_models
from tests.exporting.test_layouts import checkpoint
from tests.oracle.models import train


@pytest.fixture
def published(hub, tmp_path, monkeypatch):
    """A Llama with its tokenizer and an adapter of it, in two repositories."""
    base = checkpoint(tmp_path / "base", exportable_models.made("llama"), 48)
    torch.manual_seed(2)
    made = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    )
    train(made)
    made.save_pretrained(tmp_path / "lora")
    hub.put("org/name", base)
    hub.put("org/adapter", tmp_path / "lora")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return hub, made.merge_and_unload().eval()


def test_both_come_from_the_hub_and_the_graph_says_of_which_commit(published, run, tmp_path):
    hub, merged = published
    done = run("export", "org/name", "--adapter", "org/adapter", "-o", "out",
               "--exporter", "legacy")  # fmt: skip
    assert done.status == 0, done.err
    out = tmp_path / "work" / "out"
    assert {p.name for p in out.iterdir()} == {
        "model.onnx", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "loratools.json",
    }  # fmt: skip
    commits = {repo: hub.repos[repo].head.oid for repo in ("org/name", "org/adapter")}
    recipe = json.loads((out / "loratools.json").read_bytes())["recipe"]
    (adapter,) = recipe["adapters"]
    said = {e["id"]: e["revision"] for e in (recipe["model"], adapter)}
    assert said == commits
    props = {p.key: p.value for p in onnx.load(out / "model.onnx").metadata_props}
    assert props["loratools.model"] == "org/name"
    assert props["loratools.model_revision"] == commits["org/name"]
    (entry,) = json.loads(props["loratools.adapters"])
    assert (entry["id"], entry["revision"]) == ("org/adapter", commits["org/adapter"])
    assert str(tmp_path).encode() not in (out / "model.onnx").read_bytes()

    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    ids = torch.tensor([[5, 9, 3, 30]])
    feeds = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    feeds |= {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 4), np.int64),
              "position_ids": np.arange(4)[None]}  # fmt: skip
    with torch.no_grad():
        due = merged(ids).logits.numpy()
    found = session.run(["logits"], feeds)[0]
    assert np.abs(found - due).max() < 1e-5 * max(1, np.abs(due).max())

    known = {i.name for i in session.get_inputs()}
    assert {"input_ids", "attention_mask", "position_ids"} < known
    checked = run("verify", "out")
    assert checked.status == 0, checked.err


def test_a_second_time_without_a_network(published, run, tmp_path, monkeypatch):
    hub, _ = published
    options = ("--adapter", "org/adapter", "--exporter", "legacy", "--no-verify", "--no-kv-cache")
    assert run("export", "org/name", "-o", "one", *options).status == 0
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = run("export", "org/name", "-o", "two", *options)
    assert done.status == 0, done.err
    assert hub.log == []
    graphs = [(tmp_path / "work" / n / "model.onnx").read_bytes() for n in ("one", "two")]
    assert graphs[0] == graphs[1]


def test_what_is_not_there_or_is_something_else(published, run):
    done = run("export", "org/nothing", "-o", "out")
    assert done.status == 10, done.err
    assert "org/nothing" in done.err
    done = run("export", "org/adapter", "-o", "out")
    assert done.status == 2, done.err
    assert "is an adapter: loratools export BASE --adapter org/adapter" in done.err
