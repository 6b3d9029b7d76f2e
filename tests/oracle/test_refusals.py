"""Adapters and bases that do not belong together: found before a byte is written, with the code."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools import LoratoolsError
from tests.oracle import models

QV = {"target_modules": ["q_proj", "v_proj"], "r": 4}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def edit(base, adapter, tmp_path):
    """A copy of an adapter with its tensors or its config changed by a function."""

    def make(change=None, config=None, *, name="llama", **options):
        folder = shutil.copytree(adapter(name, **(options or QV)), tmp_path / "edited")
        if change is not None:
            tensors = load_file(folder / WEIGHTS)
            save_file(change(tensors), folder / WEIGHTS, {"format": "pt"})
        if config is not None:
            said = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(config(said)))
        return folder

    return make


@pytest.fixture
def based(base, tmp_path):
    """A copy of a base with its tensors or its config changed by a function."""

    def make(name, change=None, config=None):
        folder = shutil.copytree(base(name), tmp_path / "base")
        if change is not None:
            tensors = change(load_file(folder / "model.safetensors"))
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if config is not None:
            said = json.loads((folder / "config.json").read_text()) | config
            (folder / "config.json").write_text(json.dumps(said))
        return folder

    return make


def refused(adapter, where, tmp_path, **options):
    """The error of a fold; the same as `check` finds it, and nothing is written."""
    with pytest.raises(LoratoolsError) as caught:
        loratools.merge([adapter], where, out=tmp_path / "out", **options)
    assert not any(p.name.startswith("out") for p in tmp_path.iterdir())
    report = loratools.check([adapter], where, data=True, **options)
    codes = [p.code for p in report.problems if p.severity == "error"]
    assert caught.value.code in codes
    assert not report.ok
    return caught.value


def test_52_no_key_matches(edit, base, tmp_path):
    made = edit(lambda t: {k.replace("model.layers", "decoder.layers"): v for k, v in t.items()})
    error = refused(made, base("llama"), tmp_path)
    assert (error.code, error.exit) == ("unmatched", 4)
    assert "0 of 4 deltas matched" in error.message


def test_52_the_nearest_prefix_is_proposed_where_it_does_not_explain_all(edit, base, tmp_path):
    def change(tensors):
        found = {k.replace("model.model.layers", "model.layers"): v for k, v in tensors.items()}
        return {k.replace("1.self_attn.v_proj", "9.self_attn.v_proj"): v for k, v in found.items()}

    error = refused(edit(change), base("llama"), tmp_path)
    assert error.code == "unmatched"
    assert 'nearest: add prefix "model." (matches 3 of 4)' in error.message


def test_53_some_keys_are_unmatched_and_may_be_left_out_by_name(edit, base, tmp_path):
    made = edit(lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()})
    error = refused(made, base("llama"), tmp_path)
    assert (error.code, error.exit) == ("unmatched", 4)
    assert "2 of 4 deltas matched" in error.message
    assert "layers.7.self_attn" in error.message
    result = loratools.merge(
        [made], base("llama"), out=tmp_path / "out", allow=["unmatched:*layers.7*"]
    )
    assert (result.targets, result.total) == (2, 4)
    receipt = json.loads((tmp_path / "out" / "loratools.json").read_text())
    assert [w["code"] for w in receipt["waived"]] == ["unmatched"]


def test_55_the_shapes_are_another_models(base, edit, tmp_path):
    made = edit(lambda t: {k: torch.ones(4, 20) if "lora_A" in k else v for k, v in t.items()})
    error = refused(made, base("llama"), tmp_path)
    assert (error.code, error.exit) == ("shape_mismatch", 4)
    assert "adapter is (16, 20), base is (16, 16)" in error.message
    with pytest.raises(LoratoolsError, match="cannot be waived"):
        loratools.merge([made], base("llama"), out=tmp_path / "out", allow=["shape_mismatch"])


def test_56_another_name_of_the_base_is_a_warning(edit, base, tmp_path):
    cache = tmp_path / "models--mistralai--Mistral-7B-v0.1" / "snapshots" / "abc"
    shutil.copytree(base("llama"), cache)
    made = edit(config=lambda c: c | {"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"})
    report = loratools.check([made], cache)
    assert report.ok
    assert [(p.code, p.severity) for p in report.problems] == [("other_base", "warning")]
    said = json.loads((made / "adapter_config.json").read_text())
    said["base_model_name_or_path"] = "unsloth/mistral-7b-v0.1-bnb-4bit"
    (made / "adapter_config.json").write_text(json.dumps(said))
    assert loratools.check([made], cache).problems == ()


def test_57_the_adapter_is_in_the_base_already(adapter, base, tmp_path):
    made = adapter("llama", **QV)
    loratools.merge([made], base("llama"), out=tmp_path / "once")
    with pytest.raises(LoratoolsError) as caught:
        loratools.merge([made], tmp_path / "once", out=tmp_path / "twice")
    assert (caught.value.code, caught.value.exit) == ("already_merged", 5)
    loratools.merge([made], tmp_path / "once", out=tmp_path / "twice", allow=["already_merged"])


def test_58_a_missing_alpha_is_asked_for(edit, base, adapter, tmp_path):
    made = edit(config=lambda c: {k: v for k, v in c.items() if k != "lora_alpha"})
    error = refused(made, base("llama"), tmp_path)
    assert (error.code, error.exit) == ("alpha_missing", 5)
    out = tmp_path / "assumed"
    loratools.merge([made], base("llama"), out=out, assume=["alpha=8"])
    models.same_tensors(
        load_file(out / "model.safetensors"),
        models.merged("llama", base("llama"), adapter("llama", **QV)),
    )


def test_63_the_architecture_decides_how_a_square_weight_is_stored(edit, base, tmp_path):
    """PEFT sets the flag aright when it wraps the layers, whatever the config says."""
    options = {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}
    made = edit(config=lambda c: c | {"fan_in_fan_out": False}, name="gpt2", **options)
    result = loratools.merge([made], base("gpt2"), out=tmp_path / "out")
    assert {p.code for p in result.problems} == {"orientation"}
    folded = models.load_folded("gpt2", tmp_path / "out").state_dict()
    models.same_tensors(folded, models.merged("gpt2", base("gpt2"), made))


def test_64_a_quantised_base(adapter, based, tmp_path):
    where = based("llama", config={"quantization_config": {"quant_method": "bitsandbytes"}})
    error = refused(adapter("llama", **QV), where, tmp_path)
    assert (error.code, error.exit) == ("quantised_base", 5)
    assert "bitsandbytes" in error.message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_66_numbers_that_are_none(bad, edit, based, adapter, tmp_path):
    def spoil(tensors):
        key = next(k for k in sorted(tensors) if "q_proj" in k and "lora_A" not in k)
        tensors[key].view(-1)[3] = bad
        return tensors

    error = refused(edit(spoil), based("llama"), tmp_path)
    assert (error.code, error.exit) == ("nonfinite", 3)
    assert "1 NaN or infinite" in error.message
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(LoratoolsError, match="the base has 1 NaN or infinite") as caught:
        loratools.merge([adapter("llama", **QV)], based("llama", spoil), out=tmp_path / "out")
    assert caught.value.exit == 3


def test_66_numbers_that_do_not_fit(edit, based, tmp_path):
    where = based("llama", lambda t: {k: v.half() for k, v in t.items()})
    made = edit(lambda t: {k: v * 1e4 if "q_proj.lora" in k else v for k, v in t.items()})
    with pytest.raises(LoratoolsError) as caught:
        loratools.merge([made], where, out=tmp_path / "out", allow=["large_update"])
    assert (caught.value.code, caught.value.exit) == ("overflow", 5)
    assert "--dtype fp32" in caught.value.message
    assert not (tmp_path / "out").exists()


def test_67_an_adapter_that_was_never_trained(edit, base, tmp_path):
    made = edit(lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()})
    error = refused(made, base("llama"), tmp_path)
    assert (error.code, error.exit) == ("no_effect", 5)
    one = load_file(made / WEIGHTS)
    key = next(k for k in one if "lora_B" in k)
    save_file(one | {key: one[key] + 0.01}, made / WEIGHTS)
    result = loratools.merge([made], base("llama"), out=tmp_path / "out")
    assert [(p.code, p.severity) for p in result.problems] == [("no_effect", "warning")]


def test_58_a_scaling_out_of_all_proportion(edit, base, tmp_path):
    error = refused(edit(config=lambda c: c | {"lora_alpha": 8000}), base("llama"), tmp_path)
    assert (error.code, error.exit) == ("large_update", 5)
    assert "4 of 4 targets" in error.message


def test_a_grouped_convolution_has_no_place_for_the_update(base, adapter, based, tmp_path):
    """PEFT's A mixes all input channels; its own merge raises."""

    def groups(tensors):
        tensors["line.weight"] = tensors["line.weight"][:, :4].contiguous()
        return tensors

    error = refused(adapter("net", target_modules=["line"]), based("net", groups), tmp_path)
    assert error.code == "shape_mismatch"
    assert "2 groups" in error.message


def test_several_problems_are_told_together(edit, base, tmp_path):
    def change(tensors):
        found = {k: v for k, v in tensors.items() if "0.self_attn.v_proj.lora_A" not in k}
        return {k.replace("1.self_attn.q_proj", "9.self_attn.q_proj"): v for k, v in found.items()}

    error = refused(
        edit(change, lambda c: c | {"init_lora_weights": "loftq"}), base("llama"), tmp_path
    )
    assert {p.code for p in error.problems} == {"missing", "unmatched", "residual_base"}
    assert error.exit == 4
