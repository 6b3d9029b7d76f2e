"""Weighted folds of any mixture: W0 + Σ w (apply(W0) − W0), against PEFT's merges in float64."""

import itertools
import json

import pytest
import torch

from loratools import LoratoolsError, load, merge
from tests.oracle import models

BIASES = {
    "lora": {"target_modules": ["q_proj", "v_proj"], "r": 4},
    "rslora": {"target_modules": "all-linear", "r": 2, "use_rslora": True, "lora_bias": True},
    "dora": {"target_modules": ["q_proj", "k_proj", "up_proj"], "use_dora": True},
    "dora-all": {"target_modules": "all-linear", "use_dora": True, "r": 3, "seed": 4},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "head-too": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "seed": 2},
    "bias": {"target_modules": ["q_proj"], "bias": "all", "seed": 3},
    "tokens": {"target_modules": ["o_proj"], "trainable_token_indices": [1, 5, 7]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head"]},
}
CONV1D = {
    "lora": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "dora": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
}
NET = {
    "lora": {"target_modules": ["line", "image", "volume", "tokens", "attention"], "r": 3},
    "dora": {"target_modules": ["line", "image", "volume", "tokens"], "use_dora": True},
    "saved": {"target_modules": ["square"], "modules_to_save": ["image", "head"]},
}
MIXTURES = [
    ("llama-biases", BIASES, {"lora": 0.5, "rslora": -0.25}),
    ("llama-biases", BIASES, {"lora": 0.7, "dora": -0.4}),
    ("llama-biases", BIASES, {"dora": 0.5, "dora-all": 0.8}),
    ("llama-biases", BIASES, {"dora": 1.0}),
    ("llama-biases", BIASES, {"dora": 0.3}),
    ("llama-biases", BIASES, {"lora": 1.0, "dora-all": 1.0, "head": 1.0, "bias": 1.0}),
    ("llama-biases", BIASES, {"head": 0.25, "head-too": 0.5, "bias": 2.0, "rslora": 0.5}),
    ("llama-biases", BIASES, {"tokens": 0.5, "head": -1.0, "embedding": 0.3}),
    ("llama-biases", BIASES, dict.fromkeys(BIASES, 0.4)),
    ("gpt2", CONV1D, {"lora": 0.6, "dora": 0.7}),
    ("net", NET, {"lora": 0.3, "dora": 0.5, "saved": 0.6}),
]


@pytest.mark.parametrize(
    ("name", "table", "weights"), MIXTURES, ids=["-".join([m[0], *m[2]]) for m in MIXTURES]
)
def test_a_mixture_is_the_weighted_sum_of_task_vectors(name, table, weights, base, adapter, valid):
    where = base(name)
    folders = [adapter(name, **table[kind]) for kind in weights]
    result = valid(folders, where, weights=list(weights.values()))
    start = models.load(name, where).double().state_dict()
    expected = {key: tensor.clone() for key, tensor in start.items()}
    for folder, weight in zip(folders, weights.values(), strict=True):
        for key, tensor in models.merged(name, where, folder, wide=True).items():
            expected[key] += weight * (tensor - start[key])
    found = models.load_folded(name, result.output).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        # One rounding to float32, and the float64 sums of either side.
        error = (found[key].double() - tensor).abs()
        assert bool((error <= tensor.abs() * 2**-24 + 1e-12).all()), key
    plain = models.outputs(name, models.load(name, where))
    assert (
        models.outputs(name, models.load_folded(name, result.output)) - plain
    ).abs().max() > 1e-4


def heads(adapter, *, labels=(3, 3)):
    names = {3: "bert", 5: "bert-tokens"}
    return [
        adapter(names[n], seed=i, target_modules=["query"], task_type="SEQ_CLS" if n == 3 else
                "TOKEN_CLS")
        for i, n in enumerate(labels)
    ]  # fmt: skip


def test_heads_that_the_base_lacks_are_averaged(base, adapter, valid):
    """There is no W0: the weights are divided by their sum."""
    folders = heads(adapter)
    weights = [0.3, 0.9]
    result = valid(folders, base("bert"), weights=weights)
    one, two = (models.merged("bert", base("bert"), f, wide=True) for f in folders)
    folded = models.load_folded("bert", result.output).state_dict()
    for name in ("classifier.weight", "classifier.bias"):
        expected = (0.3 * one[name] + 0.9 * two[name]) / 1.2
        torch.testing.assert_close(folded[name].double(), expected, rtol=1e-7, atol=1e-9)
    layer = "bert.encoder.layer.0.attention.self.query.weight"
    start = models.load("bert", base("bert")).double().state_dict()[layer]
    expected = start + 0.3 * (one[layer] - start) + 0.9 * (two[layer] - start)
    torch.testing.assert_close(folded[layer].double(), expected, rtol=1e-7, atol=1e-9)


def test_heads_of_two_tasks_are_refused(base, adapter, tmp_path):
    with pytest.raises(LoratoolsError, match=r"classifier\.(weight|bias) is") as refused:
        merge(heads(adapter, labels=(3, 5)), base("bert"), weights=[1, 1], out=tmp_path / "out")
    assert refused.value.code == "head_conflict"


def test_grown_rows_are_averaged_and_the_others_interpolated(base, adapter, valid):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    folders = [adapter("llama", seed=s, change=models.grown, **options) for s in (1, 2)]
    result = valid(folders, base("llama"), weights=[0.5, 1.5])
    one, two = (models.merged("llama", base("llama"), f, models.grown, wide=True) for f in folders)
    start = models.load("llama", base("llama")).double().state_dict()
    folded = models.load_folded("llama", result.output).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, count = start[name], len(start[name])
        rows = old + 0.5 * (one[name][:count] - old) + 1.5 * (two[name][:count] - old)
        new = (0.5 * one[name][count:] + 1.5 * two[name][count:]) / 2
        expected = torch.cat([rows, new])
        torch.testing.assert_close(folded[name].double(), expected, rtol=1e-7, atol=1e-9)
    config = json.loads((result.output / "config.json").read_text())
    assert config["vocab_size"] == models.VOCABULARY + 5


def test_mixtures_do_not_depend_on_the_order(base, adapter, valid):
    where = base("llama-biases")
    kinds = ["lora", "dora", "bias"]
    found = []
    for order in itertools.permutations(kinds):
        folders = [adapter("llama-biases", **BIASES[kind]) for kind in order]
        weights = [{"lora": 0.5, "dora": 0.4, "bias": -1.0}[kind] for kind in order]
        result = valid(folders, where, weights=weights)
        found.append(models.load_folded("llama-biases", result.output).state_dict())
    for other in found[1:]:
        for key, tensor in found[0].items():
            torch.testing.assert_close(other[key], tensor, rtol=2e-7, atol=1e-9)


def test_a_truncated_fold_cuts_the_merged_update(base, adapter, valid):
    """--rank applies to the sum, before it is folded."""
    folders = [adapter("llama-biases", **BIASES[k]) for k in ("lora", "rslora")]
    result = valid(folders, base("llama-biases"), weights=[1, 2], rank=2)
    name = "model.layers.0.self_attn.v_proj.weight"
    start = models.load("llama-biases", base("llama-biases")).double().state_dict()[name]
    one, two = (
        models.merged("llama-biases", base("llama-biases"), f, wide=True)[name] for f in folders
    )
    u, s, vt = torch.linalg.svd((one - start) + 2 * (two - start))
    expected = start + u[:, :2] * s[:2] @ vt[:2]
    found = models.load_folded("llama-biases", result.output).state_dict()[name]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-8)
    assert result.truncation_error > 0.01


def test_a_weight_scales_what_is_trained_upon_new_rows(base, adapter, valid):
    """New rows are replaced in full, the LoRA upon them counts as in the old rows."""
    made = adapter("llama-tied", change=models.grown, target_modules=["embed_tokens"])
    result = valid([made], base("llama-tied"), weights=[0.5], tied=True)
    name = "model.embed_tokens.weight"
    [delta] = load(made).deltas.values()
    kept = delta.value.tensor().double()
    update = (delta.then.b.tensor().double() @ delta.then.a.tensor().double()).T
    expected = kept + 0.5 * delta.then.scaling * update
    found = models.load_folded("llama-tied", result.output).state_dict()[name]
    torch.testing.assert_close(found.double(), expected, rtol=1e-7, atol=1e-9)
