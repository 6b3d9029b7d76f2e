"""PEFT's prompts, prefixes and routers: described, fitted, merged, written; PEFT is the judge."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from loratools import (
    LoratoolsError,
    check,
    convert,
    formats,
    from_model,
    merge,
    to_state_dict,
)
from loratools.commands.inspect import inspect
from loratools.runtime import IN_GRAPHS

SIZES = {"vocab_size": 40, "max_position_embeddings": 32, "hidden_size": 16,
         "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2,
         "intermediate_size": 24, "num_key_value_heads": 1}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
TOKENS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
Q = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 2}
# Config class, options, and what the description must have at least.
CASES = {
    "prompt": ("PromptTuningConfig", TOKENS, {"virtual_tokens": 3, "width": 16}),
    "P-tuning": (
        "PromptEncoderConfig", {**TOKENS, "encoder_hidden_size": 8}, {"virtual_tokens": 3}
    ),
    "P-tuning, LSTM": (
        "PromptEncoderConfig",
        {**TOKENS, "encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"},
        {"virtual_tokens": 3},
    ),
    "prefix": (
        "PrefixTuningConfig", TOKENS, {"virtual_tokens": 3, "layers": 2, "key_width": 8}
    ),
    "prefix, projected": (
        "PrefixTuningConfig", {**TOKENS, "prefix_projection": True, "encoder_hidden_size": 8},
        {"virtual_tokens": 3, "layers": 2, "key_width": 8},
    ),
    "CPT": (
        "CPTConfig", {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2, 39]}, {"virtual_tokens": 3}
    ),
    "multitask": (
        "MultitaskPromptTuningConfig", {**TOKENS, "num_tasks": 2},
        {"virtual_tokens": 3, "num_tasks": 2, "num_ranks": 1},
    ),
    "cartridge": ("CartridgeConfig", TOKENS, {"virtual_tokens": 3, "num_frozen_tokens": 1}),
    "LLaMA-adapter": (
        "AdaptionPromptConfig",
        {"task_type": "CAUSAL_LM", "adapter_len": 4, "adapter_layers": 2,
         "target_modules": "self_attn"},
        {"virtual_tokens": 4, "layers": 2, "width": 16},
    ),
    "Poly": (
        "PolyConfig", {**Q, "n_tasks": 2, "n_skills": 2, "n_splits": 2}, {"rank": 2, "n_skills": 2}
    ),
    "Lily": ("LilyConfig", Q, {"rank": 2, "layers": 2}),
}  # fmt: skip
HEAD = {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}
IDS = torch.arange(1, 13).reshape(2, 6)
RUN = {"multitask": {"task_ids": torch.tensor([0, 1])}, "Poly": {"task_ids": torch.tensor([0, 1])}}


def model_of(base, kind="LlamaForCausalLM"):
    return getattr(transformers, kind).from_pretrained(base).eval()


def logits(folder, base, case, kind="LlamaForCausalLM"):
    """What PEFT computes with an adapter's folder; and of the base without it."""
    plain = model_of(base, kind)
    with torch.no_grad():
        before = plain(input_ids=IDS).logits
        model = peft.PeftModel.from_pretrained(plain, folder).eval()
        return model(input_ids=IDS, **RUN.get(case, {})).logits[:, -before.shape[1] :], before


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("prompts")
    torch.manual_seed(7)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(root / "llama")
    wide = {**SIZES, "hidden_size": 24, "num_key_value_heads": 2, "vocab_size": 39}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide)).save_pretrained(root / "wide")
    deep = {**SIZES, "num_hidden_layers": 3}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**deep)).save_pretrained(root / "deep")
    classes = transformers.LlamaConfig(**SIZES, pad_token_id=0)
    transformers.LlamaForSequenceClassification(classes).save_pretrained(root / "classes")
    t5 = transformers.T5Config(**T5)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(root / "t5")
    return root


@pytest.fixture(scope="module")
def saved(root):
    """A case's folder as PEFT saves it, with numbers that change what it computes."""
    made = {}

    def find(case, config, options, kind="LlamaForCausalLM", base="llama", seed=0):
        if (case, seed) not in made:
            torch.manual_seed(seed)
            found = getattr(peft, config)(**options)
            model = peft.get_peft_model(model_of(root / base, kind), found)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.6 * torch.rand_like(parameter) - 0.3)
            made[case, seed] = root / f"{case}-{seed}".replace(" ", "")
            model.save_pretrained(made[case, seed])
        return made[case, seed]

    return find


def of(saved, case, seed=0):
    return saved(case, *CASES[case][:2], seed=seed)


@pytest.mark.parametrize("case", CASES)
def test_every_method_is_described_fits_its_base_and_is_written_again(case, root, saved, tmp_path):
    folder = of(saved, case)
    [found] = inspect(folder)
    assert CASES[case][2].items() <= found.runtime.items()
    tensors = load_file(folder / "adapter_model.safetensors")
    assert (
        found.parameters == found.runtime["parameters"] == sum(t.numel() for t in tensors.values())
    )
    assert found.foldable is False
    assert found.as_json()["runtime"]["method"] == formats.read(folder).runtime.method
    fitting = check([folder], root / "llama")
    assert fitting.ok
    assert fitting.matched == fitting.total > 0
    assert [p.code for p in fitting.problems] == ["not_foldable"]
    [result] = convert([folder], out=tmp_path / "out")
    assert result.lossless
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[k], again[k]) for k in tensors)
    configs = [
        json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path / "out")
    ]
    assert configs[0] == configs[1]
    (after, before), (expected, _) = (
        logits(f, root / "llama", case) for f in (tmp_path / "out", folder)
    )
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(after, expected, atol=0, rtol=0)


@pytest.mark.parametrize("case", ["prompt", "prefix", "LLaMA-adapter"])
def test_it_goes_through_memory(case, root, saved):
    folder = of(saved, case)
    live = peft.PeftModel.from_pretrained(model_of(root / "llama"), folder)
    tensors, config = to_state_dict(from_model(live))
    expected = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[k], expected[k]) for k in expected)
    assert (
        config["peft_type"] == json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    )


@pytest.mark.parametrize("case", CASES)
def test_no_weight_takes_it_in(case, root, saved, tmp_path):
    for allow in ([], ["not_foldable"]):
        with pytest.raises(LoratoolsError) as caught:
            merge([of(saved, case)], root / "llama", out=tmp_path / "out", allow=allow)
        assert caught.value.code == "not_foldable"
        assert "change of a weight" in str(caught.value)
        method = formats.read(of(saved, case)).runtime.method
        [advice] = [p.advice for p in caught.value.problems if p.code == "not_foldable"]
        named = "loratools export BASE --adapter ADAPTER -o OUT" in advice
        assert named == (method in IN_GRAPHS)
        assert "the library that wrote it" in advice
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("Poly", "Lily")])
def test_a_base_of_other_sizes_is_refused(case, root, saved):
    result = check([of(saved, case)], root / "wide")
    assert not result.ok
    wrong = [p for p in result.problems if p.severity == "error"]
    assert {p.code for p in wrong} == {"shape_mismatch"}
    assert len(wrong) == (2 if case == "CPT" else 1)  # its tokens too
    if case in ("prefix", "cartridge"):
        assert "(key heads: 2 x 12)" in wrong[0].message


def test_a_base_of_other_depth_is_refused(root, saved):
    [problem, _] = sorted(
        check([of(saved, "prefix")], root / "deep").problems, key=lambda p: p.severity
    )
    assert problem.code == "shape_mismatch"
    assert "2 layers, the base has 3" in problem.message
    assert check([of(saved, "prompt")], root / "deep").ok


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_saved_head_comes_along(config, root, saved, tmp_path):
    kind = "LlamaForSequenceClassification"
    folder = saved(f"head {config}", config, HEAD, kind, "classes")
    adapter = formats.read(folder)
    assert list(adapter.deltas) == ["score.weight"]
    convert([folder], out=tmp_path / "out")
    found, expected = (logits(f, root / "classes", "", kind)[0] for f in (tmp_path / "out", folder))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_virtual_tokens_of_two_halves(root, saved):
    options = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 3}
    for config in ("PromptTuningConfig", "PrefixTuningConfig"):
        folder = saved(f"s2s {config}", config, options, "T5ForConditionalGeneration", "t5")
        assert formats.read(folder).runtime.numbers["virtual_tokens"] == 3
        assert check([folder], root / "t5").ok


# ------------------------------------------------------------------------------- merging


def test_prompts_in_a_row_are_all_there(root, saved, tmp_path):
    some = [of(saved, "prompt"), of(saved, "prompt", 1)]
    merge(some, weights=[1, 1], method="cat", out=tmp_path / "out")
    rows = [load_file(f / "adapter_model.safetensors")["prompt_embeddings"] for f in some]
    model = model_of(root / "llama")
    with torch.no_grad():
        words = model.get_input_embeddings()(IDS)
        both = torch.cat(rows)[None].expand(2, -1, -1)
        expected = model(inputs_embeds=torch.cat([both, words], 1)).logits[:, -6:]
    found, _ = logits(tmp_path / "out", root / "llama", "prompt")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["prompt", "prefix", "P-tuning"])
def test_virtual_tokens_are_averaged_or_put_in_a_row(case, root, saved, tmp_path):
    some = [of(saved, case), of(saved, case, 1)]
    rows = [load_file(f / "adapter_model.safetensors")["prompt_embeddings"] for f in some]
    result = merge(some, weights=[0.25, 0.5], out=tmp_path / "mean")
    assert "heuristic" in " ".join(result.notes)
    merge(some, weights=[1, 1], method="cat", out=tmp_path / "row")
    for name, expected in (("mean", 0.25 * rows[0] + 0.5 * rows[1]), ("row", torch.cat(rows))):
        model = peft.PeftModel.from_pretrained(model_of(root / "llama"), tmp_path / name)
        found = model.prompt_encoder["default"].embedding.weight
        torch.testing.assert_close(found.detach(), expected, atol=1e-6, rtol=1e-6)
        assert check([tmp_path / name], root / "llama").ok


def test_what_cannot_be_merged_is_refused(root, saved, tmp_path):
    prompt, prefix, cpt = (of(saved, c) for c in ("prompt", "prefix", "CPT"))
    rows = (
        ([prompt, prefix], {}, "no_match"),
        ([cpt, of(saved, "CPT", 1)], {}, "not_foldable"),
        ([of(saved, "Poly"), of(saved, "Poly", 1)], {}, "not_foldable"),
        ([prompt, of(saved, "prompt", 1)], {"weights": [2, 1], "method": "cat"}, "usage"),
        ([prompt, of(saved, "prompt", 1)], {"rank": 2}, "usage"),
        ([prompt, of(saved, "prompt", 1)], {"only": ["x"]}, "usage"),
        ([cpt, of(saved, "CPT", 1)], {"method": "cat"}, "usage"),
    )
    for adapters, options, code in rows:
        with pytest.raises(LoratoolsError) as caught:
            merge(adapters, out=tmp_path / "out", **{"weights": [1, 1]} | options)
        assert caught.value.code == code, options


@pytest.mark.parametrize("case", ["CPT", "multitask", "LLaMA-adapter", "Poly"])
def test_what_has_no_twin_is_refused(case, root, saved, tmp_path):
    with pytest.raises(LoratoolsError, match="no twin in adapterhub; --to peft keeps it") as caught:
        convert([of(saved, case)], to="adapterhub", out=tmp_path / "out", base=root / "llama")
    assert caught.value.code == "loss"
