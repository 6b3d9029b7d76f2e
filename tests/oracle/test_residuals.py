"""Adapters trained on what an initialisation left of the base, folded onto the base itself.

PEFT makes the residual, trains two steps upon it, and its forward is what a fold must do.
"""

import copy
import json
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import loratools
from loratools import LoratoolsError, convert, load, merge, save
from loratools.adapter import Chained, LowRank
from tests.oracle import image_models

transformers.logging.disable_progress_bar()

IDS = torch.tensor([[3, 7, 1, 22, 9, 4, 15, 30]])
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3
    ),
}  # fmt: skip
ALL = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]


def made(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def output(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(model, folder, **options):
    """PEFT's answer after two steps upon its residual base; the adapter as it saves it."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **options})
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    ours = [p for p in wrapped.parameters() if p.requires_grad]
    steps = torch.optim.SGD(ours, lr=0.2)
    for _ in range(2):
        steps.zero_grad()
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        steps.step()
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@pytest.fixture
def base(tmp_path):
    def make(name):
        model = made(name)
        model.save_pretrained(tmp_path / "base")
        return model, tmp_path / "base"

    return make


def folded(adapter, base, out, **options):
    merge([adapter], base=base, out=out, **options)
    return AutoModelForCausalLM.from_pretrained(out).eval()


def close(found, wanted, before):
    assert float((found - wanted).abs().max()) < 1e-4
    assert float((wanted - before).abs().max()) > 1e-2


CASES = {
    "pissa": ("llama", {"init_lora_weights": "pissa", "target_modules": ALL}),
    "pissa-rslora": (
        "llama",
        {"init_lora_weights": "pissa", "target_modules": ALL, "use_rslora": True},
    ),
    "pissa-patterns": (
        "llama",
        {
            "init_lora_weights": "pissa",
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 5, "up_proj": 1},
            "alpha_pattern": {"down_proj": 1},
        },
    ),
    "pissa-all-ranks": ("llama", {"init_lora_weights": "pissa", "target_modules": ALL, "r": 8}),
    "pissa-embedding": (
        "llama",
        {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]},
    ),
    "pissa-conv1d": (
        "gpt2",
        {
            "init_lora_weights": "pissa",
            "target_modules": ["c_attn", "c_proj"],
            "fan_in_fan_out": True,
        },
    ),
    "olora": ("llama", {"init_lora_weights": "olora", "target_modules": ALL}),
    "olora-capital": ("llama", {"init_lora_weights": "OLoRA", "target_modules": ALL}),
    "olora-patterns": (
        "llama",
        {"init_lora_weights": "olora", "target_modules": ALL, "alpha_pattern": {"q_proj": 1}},
    ),
    "olora-conv1d": (  # PEFT decomposes the weight as stored: only square ones get through
        "gpt2",
        {
            "init_lora_weights": "olora",
            "target_modules": ["attn.c_proj"],
            "fan_in_fan_out": True,
            "lora_alpha": 3,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_residual_is_found_again(case, base, tmp_path):
    name, options = CASES[case]
    model, folder = base(name)
    wanted = output(trained(model, tmp_path / "a", **options))
    found = output(folded(tmp_path / "a", folder, tmp_path / "out"))
    close(found, wanted, output(model))
    note = next(p for p in load(tmp_path / "a").problems if p.code == "residual_base")
    count = sum(isinstance(d, Chained) for d in load(tmp_path / "a").deltas.values())
    assert note.severity == "note"
    assert f"{count} pairs" in note.message
    planned = loratools.merge([tmp_path / "a"], folder, weights=[1.0], dry_run=True)
    assert f"{count} weights are held whole in float64" in " ".join(planned.notes)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_the_residual_base_itself_may_be_given(init, base, tmp_path):
    model, _ = base("llama")
    wrapped = trained(model, tmp_path / "a", init_lora_weights=init, target_modules=ALL)
    wanted = output(wrapped)
    residual = wrapped.unload()
    residual.save_pretrained(tmp_path / "residual")
    # What is left of so small a weight is less than what the pair holds.
    assume, allow = ["residual=given"], ["large_update"] if init != "pissa_niter_4" else []
    found = output(
        folded(tmp_path / "a", tmp_path / "residual", tmp_path / "out", assume=assume, allow=allow)
    )
    close(found, wanted, output(residual))


def test_the_converted_form_is_a_plain_adapter(base, tmp_path):
    """PEFT writes the trained pair beside the initial one, negative: twice the rank."""
    model, folder = base("llama")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules=ALL)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    wanted = output(wrapped.eval())
    wrapped.save_pretrained(
        tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    assert not any(p.code == "residual_base" for p in load(tmp_path / "a").problems)
    found = output(folded(tmp_path / "a", folder, tmp_path / "out"))
    close(found, wanted, output(model))


def test_what_w0_does_not_give_again_is_refused(base, tmp_path):
    model, folder = base("llama")
    trained(model, tmp_path / "a", init_lora_weights="pissa", target_modules=ALL)
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    for init in ("pissa_niter_16", "corda", "lora_ga", "loftq"):
        file.write_text(json.dumps(config | {"init_lora_weights": init}))
        with pytest.raises(LoratoolsError, match="residual=given") as refused:
            merge([tmp_path / "a"], base=folder, out=tmp_path / init)
        assert refused.value.code == "residual_base"
        merge([tmp_path / "a"], base=folder, out=tmp_path / init, allow=["residual_base"])


def test_dora_upon_a_residual_is_refused(base, tmp_path):
    model, folder = base("llama")
    options = {"init_lora_weights": "pissa", "target_modules": ALL, "use_dora": True}
    wrapped = trained(model, tmp_path / "a", **options)
    wanted = output(wrapped)
    with pytest.raises(LoratoolsError, match="DoRA") as refused:
        merge([tmp_path / "a"], base=folder, out=tmp_path / "out")
    assert refused.value.code == "residual_base"
    residual = wrapped.unload()
    residual.save_pretrained(tmp_path / "residual")
    assume, allow = ["residual=given"], ["large_update"]
    found = output(
        folded(tmp_path / "a", tmp_path / "residual", tmp_path / "out", assume=assume, allow=allow)
    )
    close(found, wanted, output(residual))


def test_an_assumption_that_says_nothing_is_refused(base, tmp_path):
    model, _ = base("llama")
    trained(model, tmp_path / "a", target_modules=ALL)
    with pytest.raises(LoratoolsError, match="residual=given, but init_lora_weights is True"):
        load(tmp_path / "a", assume={"residual": "given"})
    with pytest.raises(LoratoolsError, match="expected given"):
        load(tmp_path / "a", assume={"residual": "yes"})


def test_without_a_base_a_sum_is_refused(base, tmp_path):
    model, folder = base("llama")
    wrapped = [
        trained(model, tmp_path / str(i), init_lora_weights="pissa", target_modules=ALL[i:])
        for i in range(2)
    ]
    adapters = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(LoratoolsError) as refused:
        merge(adapters, weights=[0.5, 0.5], out=tmp_path / "sum")
    assert refused.value.code == "needs_base"
    merge(adapters, weights=[0.3, 0.6], base=folder, out=tmp_path / "out")
    start, due = model.state_dict(), copy.deepcopy(model).state_dict()
    for weight, one in zip((0.3, 0.6), wrapped, strict=True):
        for key, tensor in one.merge_and_unload().state_dict().items():
            due[key] += weight * (tensor - start[key])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for key, tensor in due.items():
        assert torch.allclose(found[key], tensor, rtol=0, atol=1e-5), key


def test_it_is_written_back_as_it_was(base, tmp_path):
    model, _ = base("llama")
    wanted = output(trained(model, tmp_path / "a", init_lora_weights="pissa", target_modules=ALL))
    save(load(tmp_path / "a"), tmp_path / "b")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "b")
    close(output(again.eval()), wanted, output(model))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_with_the_base_it_becomes_a_plain_adapter_of_twice_the_rank(init, base, tmp_path):
    model, folder = base("llama")
    wanted = output(trained(model, tmp_path / "a", init_lora_weights=init, target_modules=ALL))
    convert([tmp_path / "a"], to="peft", base=folder, out=tmp_path / "b")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "b")
    close(output(again.eval()), wanted, output(model))
    deltas = load(tmp_path / "b").deltas.values()
    assert {type(d) for d in deltas} == {LowRank}
    assert {d.rank for d in deltas} == {6}


def test_wide_and_high_weights(tmp_path):
    """The leading directions by the smaller Gram matrix, whichever side that is."""
    from loratools.algebra import materialise
    from tests.examples_of_deltas import leaf

    for shape in ((12, 5), (5, 12), (7, 7)):
        a, b = leaf(1, 3, shape[1]), leaf(2, shape[0], 3)
        w0 = torch.randn(shape, dtype=torch.float64)
        u, s, v = torch.linalg.svd(w0, full_matrices=False)
        top = (u[:, :3] * s[:3]) @ v[:3]
        pair = 0.5 * b.tensor().double() @ a.tensor().double()
        found = materialise(Chained("pissa", {"a": a, "b": b}, 0.5), w0)
        assert torch.allclose(found, pair - top, rtol=0, atol=1e-12)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_the_residual_of_an_image_model_is_found_again(kind, init, tmp_path):
    """diffusers keeps PEFT's config in the file's metadata."""
    targets = ["to_q", "to_k", "to_v"]
    config = peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=init, target_modules=targets)
    image_models.make(kind).save_pretrained(tmp_path / "base")
    wrapped = image_models.trained(kind, config)
    component = image_models.component_of(kind)
    getattr(diffusers, image_models.PIPELINES[kind]).save_lora_weights(
        tmp_path / "a",
        **{
            f"{component}_lora_layers": peft.get_peft_model_state_dict(
                wrapped, adapter_name="default"
            ),
            f"{component}_lora_adapter_metadata": wrapped.peft_config["default"].to_dict(),
        },
    )
    merge([tmp_path / "a"], base=tmp_path / "base", out=tmp_path / "out")
    plain = image_models.make(kind)
    before = image_models.outputs(kind, plain)
    found = image_models.outputs(kind, type(plain).from_pretrained(tmp_path / "out").eval())
    close(found, image_models.outputs(kind, wrapped), before)
