"""Files of loralib that others published, and what only looks like one."""

import json

import pytest
import torch
import transformers

from loratools.containers.bundle import local
from loratools.formats import adapterhub, loralib, raw
from tests.oracle.folds import fold

FORMATS = (loralib, adapterhub, raw)


def folder(field_data, name):
    return field_data / "adapters_and_models" / name


@pytest.mark.parametrize("inside", ["", "roberta_base_lora_mnli.bin"])
def test_the_authors_own_adapter_is_read(field_data, inside):
    bundle = local(folder(field_data, "loralib-roberta-base-mnli") / inside)
    assert loralib.detect(bundle)
    unsaid = loralib.read(bundle, assume={})
    assert [(p.code, p.advice) for p in unsaid.problems] == [
        ("alpha_missing", "--assume alpha=16 (from the training script)")
    ]
    adapter = loralib.read(bundle, assume={"alpha": "16"})
    assert adapter.problems == ()
    assert adapter.kinds == {"LowRank": 24, "Replace": 4}
    assert {(d.rank, d.scaling) for d in adapter.deltas.values() if hasattr(d, "rank")} == {(8, 2)}


def test_it_folds_into_a_classifier_of_its_shape(field_data, tmp_path):
    path = folder(field_data, "loralib-roberta-base-mnli") / "roberta_base_lora_mnli.bin"
    adapter = loralib.read(local(path), assume={"alpha": "16"})
    small = {"vocab_size": 32, "intermediate_size": 8, "max_position_embeddings": 16}
    config = transformers.RobertaConfig(num_labels=3, pad_token_id=1, **small)
    torch.manual_seed(0)
    model = transformers.RobertaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = fold(adapter, tmp_path / "base")
    state = torch.load(path, map_location="cpu")
    for key, tensor in folded.items():
        stem = key.removesuffix("weight")
        expected = state.get(key, before[key])
        if f"{stem}lora_A" in state:
            expected = before[key] + 2 * (state[f"{stem}lora_B"] @ state[f"{stem}lora_A"])
        torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-5)


def test_home_made_names_are_no_format(field_data):
    for rank in (2, 6):
        bundle = local(folder(field_data, "sam-lora-rank2-6-8") / f"lora_rank{rank}.safetensors")
        assert not any(form.detect(bundle) for form in FORMATS)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__.rpartition(".")[2])
def test_nothing_else_is_taken(form, field_data):
    """Each folder and each file in it; MLX's and diffusers' files are for formats before raw."""
    taken = set()
    for place in sorted((field_data / "adapters_and_models").iterdir()):
        for path in [place, *sorted(p for p in place.iterdir() if p.is_file())]:
            if form.detect(local(path)):
                taken.add(place.name)
    allowed = {
        loralib: {"loralib-roberta-base-mnli"},
        adapterhub: set(),
        raw: {"loralib-roberta-base-mnli", "mlx-qwen25-05b", "gpt2-smart-review", "gptneo-movies"},
    }
    assert taken <= allowed[form]


def test_no_published_config_of_peft_is_taken_for_adapterhubs(field_data):
    lines = (field_data / "configs" / "adapter_configs.jsonl").read_text().splitlines()
    configs = [json.loads(json.loads(line)["text"]) for line in lines]
    assert len(configs) == 103
    ours = [c for c in configs if adapterhub.is_ours(c)]
    assert [c for c in ours if "peft_type" in c or "lora_parameters" in c] == []
    assert all("config" in c for c in ours)
