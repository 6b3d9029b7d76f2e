"""Adapters and bases as they lie on disk: pickles, dumps, sub-folders, shards, half precision."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loratools import LoratoolsError, fold_into, inspect, load, merge
from loratools.names.spellings import Spelling
from tests.oracle import models

OPTIONS = {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head"], "r": 4}


@pytest.fixture(scope="module")
def folded(base, adapter, tmp_path_factory):
    """What a fold of the plain adapter of OPTIONS writes."""
    out = tmp_path_factory.mktemp("plain")
    merge([adapter("llama", **OPTIONS)], base("llama"), out=out)
    return load_file(out / "model.safetensors")


def same(result, folded):
    models.same_tensors(load_file(result.output / "model.safetensors"), folded)


def live(base):
    return models.trained("llama", base("llama"), peft.LoraConfig(**OPTIONS))


def test_a_pickle_that_peft_saved(base, valid, folded, tmp_path):
    live(base).save_pretrained(tmp_path / "old", safe_serialization=False)
    assert (tmp_path / "old" / "adapter_model.bin").exists()
    same(valid([tmp_path / "old"], base("llama")), folded)


@pytest.mark.parametrize("around", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_dump_of_the_trained_parameters(around, name, base, valid, folded, tmp_path):
    """With the adapter's name in its keys, and what wraps a training's model around them."""
    model = live(base)
    model.peft_config["default"].save_pretrained(tmp_path / "raw")
    kept = {around + k: p for k, p in model.named_parameters() if p.requires_grad}
    assert any(".lora_A.default.weight" in k for k in kept)
    assert any(".modules_to_save.default.weight" in k for k in kept)
    torch.save(kept, tmp_path / "raw" / name)
    same(valid([tmp_path / "raw"], base("llama")), folded)


def test_named_adapters_lie_in_sub_folders(base, valid, folded, tmp_path):
    model = live(base)
    torch.manual_seed(5)
    model.add_adapter("other", peft.LoraConfig(target_modules=["v_proj"], r=2))
    models.train(model)
    model.save_pretrained(tmp_path / "both")
    found = inspect(tmp_path / "both", tmp_path / "both" / "other")
    assert [set(i.ranks) for i in found] == [{4}, {2}]
    result = valid([tmp_path / "both" / "other"], base("llama"))
    assert result.targets == 2


def test_checkpoints_of_a_trainer(adapter, base, valid, folded, tmp_path):
    made = adapter("llama", **OPTIONS)
    shutil.copytree(made, tmp_path / "checkpoint-500")
    same(valid([tmp_path], base("llama")), folded)
    shutil.copytree(made, tmp_path / "checkpoint-1000")
    assert [i.source for i in inspect(tmp_path) if i.format] == [
        str(tmp_path / "checkpoint-500"),
        str(tmp_path / "checkpoint-1000"),
    ]
    with pytest.raises(LoratoolsError, match="holds several adapters") as refused:
        merge([tmp_path], base("llama"), out=tmp_path / "out")
    assert str(tmp_path / "checkpoint-500") in refused.value.message


def test_an_adapter_of_the_bare_model_finds_its_place_in_the_whole_one(base, adapter, valid):
    """Its names lack the base's prefix (peft#1579)."""
    made = adapter("llama-bare", target_modules=["q_proj", "up_proj"])
    result = valid([made], base("llama"))
    inner = models.merged("llama-bare", base("llama"), made)
    found = load_file(result.output / "model.safetensors")
    models.same_tensors(
        {k.removeprefix("model."): v for k, v in found.items() if k != "lm_head.weight"}, inner
    )


def test_an_adapter_of_the_whole_model_finds_its_place_in_the_bare_one(base, adapter, valid):
    made = adapter("llama", target_modules=["q_proj", "up_proj"])
    result = valid([made], base("llama-bare"))
    expected = models.merged("llama", base("llama-bare"), made)
    found = load_file(result.output / "model.safetensors")
    expected.pop("lm_head.weight")
    models.same_tensors({f"model.{k}": v for k, v in found.items()}, expected)


def test_a_base_that_is_one_file(base, adapter, tmp_path):
    options = {"target_modules": ["line", "image", "volume", "tokens", "attention"], "r": 3}
    made, file = adapter("net", **options), base("net") / "model.safetensors"
    result = merge([made], file, out=tmp_path / "folded.safetensors")
    assert [p.severity for p in result.problems] == ["note"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "folded.safetensors",
        "folded.safetensors.loratools.json",
    ]
    models.same_tensors(
        load_file(tmp_path / "folded.safetensors"), models.merged("net", base("net"), made)
    )


def test_an_adapter_may_have_the_names_of_transformers_4(base, adapter, valid, tmp_path):
    """It was trained on the module whose names the file of the base still has."""
    options = {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]}
    made = adapter("vit", **options)
    old = shutil.copytree(made, tmp_path / "old")
    tensors = load_file(made / "adapter_model.safetensors")
    disk = {Spelling("vit")(key): tensor for key, tensor in tensors.items()}
    assert any(".encoder.layer.0.attention.attention.query.lora_A" in key for key in disk)
    save_file(disk, old / "adapter_model.safetensors", {"format": "pt"})
    expected = models.merged("vit", base("vit"), made)
    folded = models.load_folded("vit", valid([old], base("vit")).output)
    models.same_tensors(folded.state_dict(), expected)
    live = models.load("vit", base("vit"))
    fold_into(live, [load(old)])
    models.same_tensors(live.state_dict(), expected)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_residual_initialisation_folds_when_peft_converted_it(kind, base, valid, tmp_path):
    """Converted, it is a LoRA of twice the rank on the plain base; unconverted it comes to it."""
    where = base("llama")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=3, init_lora_weights=kind)
    model = peft.get_peft_model(models.load("llama", where), config)
    model.save_pretrained(tmp_path / "start")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    expected = models.outputs("llama", model.eval())
    model.save_pretrained(tmp_path / "plain")
    folded = models.load_folded("llama", valid([tmp_path / "plain"], where).output)
    assert (models.outputs("llama", folded) - expected).abs().max() < 1e-4
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    result = valid([tmp_path / "converted"], where)
    assert set(inspect(tmp_path / "converted")[0].ranks) == {6}
    found = models.outputs("llama", models.load_folded("llama", result.output))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "torch"])
def test_a_base_in_shards(pickled, base, adapter, valid, folded, tmp_path):
    whole = transformers.LlamaForCausalLM.from_pretrained(base("llama"))
    whole.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    if pickled:
        _as_torch(tmp_path / "base")
    result = valid([adapter("llama", **OPTIONS)], tmp_path / "base")
    index = json.loads((result.output / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    found = {k: t for s in shards for k, t in load_file(result.output / s).items()}
    models.same_tensors(found, folded)
    models.same_tensors(models.load_folded("llama", result.output).state_dict(), folded)


def _as_torch(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = {}
    for name, shard in index["weight_map"].items():
        weights.setdefault(shard.replace("model", "pytorch_model").replace("safetensors", "bin"),
                           {})[name] = load_file(folder / shard)[name]  # fmt: skip
    for shard, tensors in weights.items():
        torch.save(tensors, folder / shard)
    for shard in folder.glob("model*"):
        shard.unlink()
    index["weight_map"] = {k: shard for shard, tensors in weights.items() for k in tensors}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, base, adapter, valid, tmp_path):
    """PEFT rounds the update before it adds it (safe_merge); the sum is rounded here, and once."""
    half = transformers.LlamaForCausalLM.from_pretrained(base("llama"), dtype=dtype)
    half.save_pretrained(tmp_path / "half")
    made = adapter("llama", target_modules="all-linear", use_dora=True)
    found = load_file(valid([made], tmp_path / "half").output / "model.safetensors")
    exact = models.merged("llama", tmp_path / "half", made, wide=True)
    assert found.keys() == exact.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        models.nearest(tensor, exact[name])
