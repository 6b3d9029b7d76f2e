"""Adapters of PEFT's methods written again: as they were, as their own type, as plain LoRA."""

import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file

from loratools import LoratoolsError, convert, formats, merge
from loratools.formats import peft as form
from tests.oracle import methods
from tests.oracle.methods import CASES_A

FOLDS = [name for name in CASES_A if methods.said(name)["Linear"] == "yes"]
ALL = [
    pytest.param(name, layer, marks=() if methods.is_main(name, layer) else pytest.mark.slow)
    for name in CASES_A
    for layer in methods.LAYERS
    if methods.said(name)[layer] == "yes"
]
# PEFT's LoRA of a grouped convolution has another shape; of norms and biases there is none.
PLAIN = [
    p for p in ALL if p.values[1] != "Conv2d grouped" and p.values[0] not in ("LN_TUNING", "BEFT")
]


def served(folder, layer):
    """What PEFT makes of a written adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(methods.net(layer), folder).eval()
    with torch.no_grad():
        return model(methods.inputs(layer)), model.peft_config["default"]


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", [n for n in FOLDS if n not in ("LORA", "LORA DoRA")])
def test_what_was_read_is_written_again_tensor_by_tensor(name, tmp_path):
    made = methods.make(CASES_A[name], "Linear", tmp_path)
    (result,) = convert(made.adapter, to="peft", out=tmp_path / "again")
    assert result.lossless
    old, new = (
        load_file(f / "adapter_model.safetensors") for f in (made.adapter, tmp_path / "again")
    )
    assert old.keys() == new.keys()
    assert all(old[key].equal(new[key]) for key in old)
    configs = [json.loads((f / "adapter_config.json").read_text())
               for f in (made.adapter, tmp_path / "again")]  # fmt: skip
    assert configs[0] == configs[1]
    close(served(tmp_path / "again", "Linear")[0], made.outputs)


# PEFT's W2 ⊗ W1 on Conv1d is no LoKr of ours: written as read, or as LoRA.
OWN = [
    p
    for p in ALL
    if p.values[0].split()[0] in ("LOHA", "LOKR", "IA3") and p.values != ("LOKR whole", "Conv1d")
]


@pytest.mark.parametrize(("name", "layer"), OWN)
def test_products_and_scales_are_written_as_their_own_type(name, layer, tmp_path):
    made = methods.make(CASES_A[name], layer, tmp_path)
    adapter = replace(formats.read(made.adapter), original={}, config={})
    assert form.lost(adapter) == []
    (tmp_path / "new").mkdir()
    form.write(adapter, tmp_path / "new")
    outputs, config = served(tmp_path / "new", layer)
    assert config.peft_type == name.split()[0]
    close(outputs, made.outputs)


@pytest.mark.parametrize(("name", "layer"), PLAIN)
def test_with_a_base_every_method_becomes_plain_lora(name, layer, tmp_path):
    made = methods.make(CASES_A[name], layer, tmp_path)
    (result,) = convert(made.adapter, to="peft", base=made.base, rank=1000, out=tmp_path / "plain")
    assert result.truncation_error is not None
    assert result.truncation_error < 1e-6
    outputs, config = served(tmp_path / "plain", layer)
    assert config.peft_type == "LORA"
    close(outputs, made.outputs, 1e-4)


EXACT = "LOHA|LOKR|ADALORA|DELORA|MISS|MISS mini|VERA|VERA seeded|PVERA|VBLORA".split("|")


@pytest.mark.parametrize("name", EXACT)
def test_what_is_low_rank_needs_no_rank_to_be_said(name, tmp_path):
    made = methods.make(CASES_A[name], "Linear", tmp_path)
    (result,) = convert(made.adapter, to="peft", base=made.base, out=tmp_path / "plain")
    assert result.truncation_error is None
    outputs, config = served(tmp_path / "plain", "Linear")
    assert config.peft_type == "LORA"
    close(outputs, made.outputs)


@pytest.mark.parametrize("name", ["IA3", "HIRA", "MISS bat"])
def test_what_is_not_says_that_a_rank_is_to_be_given(name, tmp_path):
    made = methods.make(CASES_A[name], "Linear", tmp_path)
    with pytest.raises(LoratoolsError, match="no exact factors") as refused:
        convert(made.adapter, to="peft", base=made.base, out=tmp_path / "plain")
    assert refused.value.code == "loss"
    assert "--rank" in refused.value.problems[0].advice


@pytest.mark.parametrize("name", ["IA3", "HIRA", "MISS", "VERA", "LORA DoRA"])
def test_a_function_of_the_weight_has_no_rank_without_it(name, tmp_path):
    made = methods.make(CASES_A[name], "Linear", tmp_path)
    with pytest.raises(LoratoolsError, match="cannot be reduced") as refused:
        convert(made.adapter, to="peft", rank=2, out=tmp_path / "plain")
    assert refused.value.code == "needs_base"
    assert "--base" in refused.value.problems[0].advice


def test_a_rank_cuts_as_well_as_can_be_and_says_how_well(tmp_path):
    made = methods.make(CASES_A["HIRA"], "Linear", tmp_path)
    (result,) = convert(made.adapter, to="peft", base=made.base, rank=2, out=tmp_path / "plain")
    cut = total = 0.0
    deltas = formats.read(made.adapter).deltas
    weights = load_file(made.base / "model.safetensors")
    for key, delta in deltas.items():
        pair = delta.factor
        change = weights[key].double() * (pair.b.tensor().double() @ pair.a.tensor().double())
        sigma = torch.linalg.svdvals(change).square()
        cut, total = cut + float(sigma[2:].sum()), total + float(sigma.sum())
    assert result.truncation_error == pytest.approx((cut / total) ** 0.5, rel=1e-6)
    assert {p.rank for p in formats.read(tmp_path / "plain").deltas.values()} == {2}


def test_a_mixture_is_lost_by_name(tmp_path):
    one = methods.make(CASES_A["LOHA"], "Linear", tmp_path / "one")
    two = methods.make(CASES_A["LOKR"], "Linear", tmp_path / "two")
    deltas = dict(formats.read(one.adapter).deltas)
    deltas["second.weight"] = formats.read(two.adapter).deltas["second.weight"]
    adapter = replace(formats.read(one.adapter), deltas=deltas, original={})
    assert [(p.code, p.target) for p in form.lost(adapter)] == [
        ("loss", "first.weight"), ("loss", "second.weight"),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_another_dtype_rounds_the_tensors_and_nothing_else(dtype, tmp_path):
    made = methods.make(CASES_A["VERA"], "Linear", tmp_path)
    convert(made.adapter, to="peft", dtype=dtype, out=tmp_path / "short")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    old = load_file(made.adapter / "adapter_model.safetensors")
    new = load_file(tmp_path / "short" / "adapter_model.safetensors")
    assert all(new[key].equal(old[key].to(kind)) for key in old)


def test_a_choice_of_targets_no_longer_is_the_file(tmp_path):
    made = methods.make(CASES_A["LOHA"], "Linear", tmp_path)
    convert(made.adapter, to="peft", only=["first"], out=tmp_path / "some")
    config = json.loads((tmp_path / "some" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["target_modules"]) == ("LOHA", ["first"])
    made = methods.make(CASES_A["VERA"], "Linear", tmp_path / "vera")
    with pytest.raises(LoratoolsError, match="contains the weight") as refused:
        convert(made.adapter, to="peft", only=["first"], out=tmp_path / "vera" / "some")
    assert refused.value.code == "loss"


@pytest.mark.parametrize("pair", [("LOHA", "LOKR"), ("ADALORA", "VBLORA"), ("LOHA", "LORA")])
def test_a_merge_of_methods_is_the_sum_of_peft_updates(pair, tmp_path):
    made = [methods.make(CASES_A[name], "Linear", tmp_path / name) for name in pair]
    merge([m.adapter for m in made], weights=[0.5, -2.0], out=tmp_path / "sum")
    outputs, config = served(tmp_path / "sum", "Linear")
    assert config.peft_type == "LORA"
    plain = methods.net("Linear")
    base = {key: value.clone() for key, value in plain.state_dict().items()}
    whole = [m.model.merge_and_unload().state_dict() for m in made]
    summed = {
        key: value + 0.5 * (whole[0][key] - value) - 2.0 * (whole[1][key] - value)
        for key, value in base.items()
    }
    plain.load_state_dict(summed)
    with torch.no_grad():
        close(outputs, plain(methods.inputs("Linear")), 1e-4)


def test_a_merge_of_functions_of_the_weight_needs_the_weight(tmp_path):
    made = [methods.make(CASES_A[n], "Linear", tmp_path / n) for n in ("HIRA", "LOHA")]
    both = [m.adapter for m in made]
    with pytest.raises(LoratoolsError) as refused:
        merge(both, weights=[0.5, 0.5], out=tmp_path / "sum")
    assert refused.value.code == "needs_base"
    merge(both, made[0].base, weights=[0.5, 0.5], out=tmp_path / "whole")
    found = load_file(tmp_path / "whole" / "model.safetensors")
    base = load_file(made[0].base / "model.safetensors")
    whole = [m.model.merge_and_unload().state_dict() for m in made]
    for key, value in base.items():
        close(found[key], value + sum(0.5 * (w[key] - value) for w in whole))


def test_another_delta_is_not_written_as_the_file(tmp_path):
    made = methods.make(CASES_A["LOHA"], "Linear", tmp_path)
    adapter = formats.read(made.adapter)
    deltas = {key: replace(d, scaling=2 * d.scaling) for key, d in adapter.deltas.items()}
    (tmp_path / "twice").mkdir()
    form.write(replace(adapter, deltas=deltas), tmp_path / "twice")
    again = formats.read(tmp_path / "twice")
    assert {k: d.scaling for k, d in again.deltas.items()} == {
        key: 2 * d.scaling for key, d in adapter.deltas.items()
    }


def test_columns_whose_name_ends_another_are_named_by_a_pattern():
    from peft.tuners.ia3.model import IA3Model

    from loratools.adapter import Adapter, Leaf, Scaled
    from loratools.formats.peft_writing import disassemble

    def vector(*shape):
        return Leaf.of("v", torch.ones(shape))

    deltas = {
        "first.weight": Scaled("columns", vector(1, 4)),
        "a.first.weight": Scaled("rows", vector(4, 1)),
        "a.first.bias": Scaled("rows", vector(4, 1)),
    }
    _, said = disassemble(Adapter(deltas))
    assert said["peft_type"] == "IA3"
    config = peft.IA3Config(feedforward_modules=said["feedforward_modules"], target_modules=["x"])
    is_columns = IA3Model._check_target_module_feedforward
    assert (is_columns(config, "first"), is_columns(config, "a.first")) == (True, False)
