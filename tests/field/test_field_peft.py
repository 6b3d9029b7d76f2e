"""Configs, adapters and a model that others published, read and folded as PEFT does."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from loratools import check, inspect, load, merge
from loratools.formats.peft_config import config_problems, read_config, scaling_of
from tests.oracle import models


def test_every_published_config_is_read(field_data: Path):
    lines = (field_data / "configs" / "adapter_configs.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert len(entries) == 103
    for entry in entries:
        config = read_config(entry["text"].encode(), entry["path"])
        assert config == json.loads(entry["text"])
        problems = list(config_problems(config, [], entry["path"]))
        assert not [p for p in problems if p.exit == 3]
        if config.get("peft_type") == "LORA":
            said = scaling_of(config, "model.layers.0.self_attn.q_proj")
            assert said.of(said.rank) == pytest.approx(_peft_scaling(config))


def _peft_scaling(config):
    same = {k: config[k] for k in ("r", "lora_alpha", "use_rslora") if k in config}
    wanted = peft.LoraConfig(target_modules=["0"], **same)
    wrapped = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), wanted)
    return wrapped.base_model.model[0].scaling["default"]


# The published adapters change attention alone, so that all else of their base may be small.
PUBLISHED = {
    "gpt2-smart-review": (
        "GPT2LMHeadModel", torch.float16, {"vocab_size": 64, "n_inner": 8, "n_positions": 16}
    ),
    "gptneo-movies": (
        "GPTNeoForCausalLM",
        torch.bfloat16,
        {
            "vocab_size": 64,
            "hidden_size": 768,
            "num_layers": 12,
            "num_heads": 12,
            "attention_types": [[["global", "local"], 6]],
            "intermediate_size": 8,
            "max_position_embeddings": 16,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_adapter_folds_as_peft_merges_it(name, field_data, tmp_path):
    folder = field_data / "adapters_and_models" / name
    [found] = inspect(folder)
    assert (found.format, found.kinds, found.foldable) == ("peft", {"LowRank": found.targets}, True)
    assert set(found.ranks) == {8}
    assert set(found.scalings) == {2.0}
    assert found.problems == ()
    made_by, dtype, small = PUBLISHED[name]
    kind = getattr(transformers, made_by)
    torch.manual_seed(0)
    kind(kind.config_class(**small)).to(dtype).save_pretrained(tmp_path / "base")
    assert check([folder], tmp_path / "base", data=True).ok
    result = merge([folder], tmp_path / "base", out=tmp_path / "out")
    assert result.targets == found.targets
    wide = kind.from_pretrained(tmp_path / "base", dtype=torch.float64)
    expected = peft.PeftModel.from_pretrained(wide, folder).merge_and_unload().state_dict()
    before = load_file(tmp_path / "base" / "model.safetensors")
    folded = load_file(tmp_path / "out" / "model.safetensors")
    assert folded.keys() == before.keys()
    changed = {key for key, tensor in folded.items() if not torch.equal(tensor, before[key])}
    assert changed == set(load(folder).deltas)
    for key in changed:
        models.nearest(folded[key], expected[key])


def test_a_real_model_tells_its_story_after_there_and_back(field_data, tmp_path):
    """An adapter folded, then its negative: the numbers to 1e-6, the story word for word."""
    base = field_data / "adapters_and_models" / "stories260k-hf"
    story = json.loads((base / "greedy_expected.json").read_text())
    made, negative = tmp_path / "adapter", tmp_path / "negative"
    train(base, story["greedy_ids"], made)
    merge([made], weights=[-1], out=negative)
    merge([made], base, out=tmp_path / "there")
    merge([negative], tmp_path / "there", out=tmp_path / "back")
    before = load_file(base / "model.safetensors")
    there, back = (load_file(tmp_path / n / "model.safetensors") for n in ("there", "back"))
    moved = max(float((there[k] - t).abs().max()) for k, t in before.items())
    assert moved > 1e-3
    for key, tensor in before.items():
        torch.testing.assert_close(back[key], tensor, rtol=0, atol=1e-6)
    assert tell(tmp_path / "back", story) == story["greedy_ids"]
    assert tell(tmp_path / "there", story) != story["greedy_ids"]
    merge([made, made], base, weights=[1, -1], out=tmp_path / "none")
    models.same_tensors(load_file(tmp_path / "none" / "model.safetensors"), before)
    # Made again from its receipt, beside which the inputs lie: the same bytes, the same story.
    merge(
        [], tmp_path / "there", recipe=tmp_path / "back" / "loratools.json", out=tmp_path / "again"
    )
    for name in ("model.safetensors", "loratools.json"):
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (tmp_path / "back" / name).read_bytes()
    assert tell(tmp_path / "again", story) == story["greedy_ids"]


def train(base: Path, ids: list[int], folder: Path) -> None:
    """Two steps of PEFT away from the story."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4))
    steps = torch.optim.AdamW(model.parameters(), lr=0.02)
    tokens = torch.tensor([ids])
    for _ in range(2):
        (-model(input_ids=tokens, labels=tokens).loss).backward()
        steps.step()
        steps.zero_grad()
    model.save_pretrained(folder)


def tell(folder: Path, story: dict[str, list[int]]) -> list[int]:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([story["prompt_ids"]])
    length = len(story["greedy_ids"])
    return model.generate(prompt, max_length=length, do_sample=False)[0].tolist()
