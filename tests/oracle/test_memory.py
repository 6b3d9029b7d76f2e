"""The library in memory gives what the files give."""

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import loratools
from loratools import LoratoolsError
from loratools.memory import plan_for
from tests.oracle import models
from tests.oracle.cases import CASES

LIVE = [
    "linear", "patterns-rslora", "bfloat16", "lora-bias", "bias-all", "dora", "head-saved",
    "embedding", "tokens-dict", "tokens-type", "tokens-tied", "tied", "gpt2", "gpt2-dora", "t5",
    "whisper", "vit", "net", "net-dora", "net-attention", "net-saved",
]  # fmt: skip


@pytest.mark.parametrize("case", LIVE)
def test_a_live_module_is_folded_as_its_files_are(case, base, adapter):
    name, options = CASES[case]
    where, made = base(name), adapter(name, **options)
    module = models.load(name, where)
    kept = loratools.fold_into(module, [loratools.load(made)])
    assert all(share is None or share == pytest.approx(1, abs=1e-3) for share in kept.values())
    models.same_tensors(module.state_dict(), models.merged(name, where, made))


@pytest.mark.parametrize("case", LIVE)
def test_the_adapter_of_a_live_peft_model_is_the_one_it_saves(case, base, adapter):
    name, options = CASES[case]
    made = adapter(name, **options)
    model = models.served(name, base(name), made)
    found, config = loratools.to_state_dict(loratools.from_model(model))
    expected = load_file(made / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key].to(tensor.dtype), tensor), key
    assert config["peft_type"] == model.peft_config["default"].peft_type


def test_patterns_keep_the_order_that_peft_loses_when_it_saves(base, adapter, tmp_path):
    """The first match counts, and PEFT sorts the keys of its config: it cannot load this again."""
    order = {"q_proj": 6, "layers.0.self_attn.q_proj": 2}
    config = peft.LoraConfig(target_modules=["q_proj"], rank_pattern=order, r=4)
    live = models.trained("llama", base("llama"), config)
    written = loratools.save(loratools.from_model(live), tmp_path / "ours")
    expected = models.outputs("llama", live)
    found = models.outputs("llama", models.served("llama", base("llama"), written))
    assert torch.equal(found, expected)
    live.save_pretrained(tmp_path / "theirs")
    with pytest.raises(LoratoolsError, match="config says r=2, A has 6 rows"):
        loratools.load(tmp_path / "theirs")


def test_a_named_adapter_of_a_live_model(base, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    live = models.trained("llama", base("llama"), config)
    torch.manual_seed(9)
    live.add_adapter("other", peft.LoraConfig(target_modules=["v_proj"], r=2, use_dora=True))
    models.train(live)
    live.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        found, _ = loratools.to_state_dict(loratools.from_model(live, name))
        models.same_tensors(found, load_file(folder / "adapter_model.safetensors"))


def test_from_state_dict_and_back(base, adapter):
    made = adapter("llama", **CASES["dora"][1])
    model = models.served("llama", base("llama"), made)
    tensors = peft.get_peft_model_state_dict(model)
    read = loratools.from_state_dict(tensors, model.peft_config["default"].to_dict())
    again, config = loratools.to_state_dict(read)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], t) for k, t in tensors.items())
    assert config["use_dora"] is True


def test_merge_adapters_in_memory_is_the_merge_of_files(base, adapter, valid):
    folders = [adapter("llama", **CASES[c][1]) for c in ("linear", "patterns", "rslora")]
    for options in ({}, {"rank": 3}, {"energy": 0.8}, {"dtype": "bf16"}):
        merged = loratools.merge_adapters(
            [loratools.load(f) for f in folders], weights=[0.5, -1, 2], **options
        )
        found, _ = loratools.to_state_dict(merged)
        result = valid(folders, weights=[0.5, -1, 2], **options)
        models.same_tensors(found, load_file(result.output / "adapter_model.safetensors"))


def test_fold_into_takes_weights_and_shared_parameters_once(base, adapter, valid):
    where = base("llama-tied")
    folders = [adapter("llama-tied", seed=s, **CASES["tied"][1]) for s in (1, 2)]
    module = models.load("llama-tied", where)
    loratools.fold_into(module, [loratools.load(f) for f in folders], weights=[0.3, 0.6])
    result = valid(folders, where, weights=[0.3, 0.6])
    models.same_tensors(
        module.state_dict(), models.load_folded("llama-tied", result.output).state_dict()
    )
    head = adapter("llama-tied", target_modules=["lm_head"])
    tied = models.load("llama-tied", where)
    loratools.fold_into(tied, [loratools.load(head)])
    models.same_tensors(tied.state_dict(), models.merged("llama-tied", where, head))
    assert tied.lm_head.weight.data_ptr() == tied.model.embed_tokens.weight.data_ptr()


def test_fold_into_refuses_before_it_changes_anything(base, adapter):
    module = models.load("llama", base("llama"))
    before = {k: t.clone() for k, t in module.state_dict().items()}
    wrong = loratools.load(adapter("gpt2", **CASES["gpt2"][1]))
    with pytest.raises(LoratoolsError) as refused:
        loratools.fold_into(module, [loratools.load(adapter("llama", **CASES["linear"][1])), wrong])
    assert refused.value.exit == 4
    grown = loratools.load(adapter("llama", change=models.grown, target_modules=["q_proj"]))
    with pytest.raises(LoratoolsError, match="live module") as refused:
        loratools.fold_into(module, [grown])
    models.same_tensors(module.state_dict(), before)


def test_fold_tensors_streams_what_the_file_fold_writes(base, adapter, valid):
    where = base("llama")
    folders = [adapter("llama", **CASES[c][1]) for c in ("dora", "head-saved")]
    written = load_file(valid(folders, where, weights=[0.5, 0.5]).output / "model.safetensors")
    adapters = [loratools.load(f) for f in folders]
    with safe_open(where / "model.safetensors", "pt") as source:
        tensors = {k: source.get_tensor(k) for k in source.keys()}  # noqa: SIM118
        plan = plan_for(adapters, tensors, weights=[0.5, 0.5])
        models.same_tensors(dict(loratools.fold_tensors(source, plan)), written)


def test_fold_tensors_brings_new_heads_and_rows(base, adapter, valid):
    made = adapter("roberta-mlm", **CASES["roberta-mlm"][1])
    written = load_file(valid([made], base("roberta-mlm")).output / "model.safetensors")
    with safe_open(base("roberta-mlm") / "model.safetensors", "pt") as source:
        tensors = {k: source.get_tensor(k) for k in source.keys()}  # noqa: SIM118
        plan = plan_for([loratools.load(made)], tensors)
        models.same_tensors(dict(loratools.fold_tensors(source, plan)), written)
