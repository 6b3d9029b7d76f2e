"""Merging adapters into one: the weighted sum of PEFT's own updates, and its best truncation."""

import itertools

import peft
import pytest
import torch

from loratools import LoratoolsError, load, merge
from tests.oracle import models

# Pairs and triples of adapters on one base, with weights: ranks, targets, scalings differ.
LLAMA = {
    "small": {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 3, "seed": 1},
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, "seed": 2},
    "rslora": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "seed": 3,
    },
    "patterns": {
        "target_modules": "all-linear",
        "r": 3,
        "rank_pattern": {"layers.1.mlp.up_proj": 5, "q_proj": 6},
        "alpha_pattern": {"v_proj": 32, r"layers\.0\..*": 5},
        "seed": 4,
    },
    "rslora-patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"gate_proj": 2},
        "alpha_pattern": {"o_proj": 1},
        "seed": 5,
    },
    "head": {"target_modules": ["lm_head", "q_proj"], "r": 6, "seed": 6},
    "half": {"target_modules": ["q_proj"], "dtype": torch.bfloat16, "seed": 7},
}
MERGES = [
    ("llama", LLAMA, ["small", "plain"], [0.5, 0.5]),
    ("llama", LLAMA, ["plain", "rslora"], [1.0, -1.0]),
    ("llama", LLAMA, ["rslora", "rslora-patterns"], [0.25, 1.5]),
    ("llama", LLAMA, ["small", "patterns", "rslora"], [2.0, -0.3, 0.7]),
    ("llama", LLAMA, ["patterns", "patterns"], [0.5, 0.5]),
    ("llama", LLAMA, ["plain", "half", "patterns"], [0.1, 0.2, 0.3]),
    ("llama", LLAMA, ["small"], [0.3]),
    (
        "llama-biases",
        {
            "bias": {"target_modules": ["q_proj", "up_proj"], "lora_bias": True, "seed": 1},
            "other": {
                "target_modules": ["q_proj", "v_proj"],
                "lora_bias": True,
                "r": 2,
                "lora_alpha": 5,
                "seed": 2,
            },
            "none": {"target_modules": ["v_proj", "o_proj"], "seed": 3},
        },
        ["bias", "other", "none"],
        [0.5, -2.0, 1.0],
    ),
    (
        "gpt2",
        {
            "one": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 2},
            "two": {"target_modules": ["c_attn", "c_fc", "wpe"], "fan_in_fan_out": True},
        },
        ["one", "two"],
        [0.6, 0.6],
    ),
    (
        "net",
        {
            "one": {
                "target_modules": ["tokens", "line", "image", "point", "volume", "square"],
                "r": 3,
            },
            "two": {
                "target_modules": ["tokens", "line", "image", "point", "volume", "attention"],
                "r": 2,
                "use_rslora": True,
                "lora_alpha": 5,
            },
        },
        ["one", "two"],
        [0.4, -1.2],
    ),
]
IDS = ["-".join([name, *chosen]) for name, _, chosen, _ in MERGES]
every_merge = pytest.mark.parametrize(("name", "table", "chosen", "weights"), MERGES, ids=IDS)


def made(adapter, name, table, chosen):
    return [adapter(name, **table[c]) for c in chosen]


def summed(name, base, folders, weights):
    parts = [models.updates(name, base, folder) for folder in folders]
    return models.weighted_sum(list(zip(weights, parts, strict=True)))


@every_merge
def test_linear_is_the_weighted_sum_of_the_updates(
    name, table, chosen, weights, base, adapter, valid
):
    """No cross terms (peft#3004), and the scaling of every source counted once (peft#3449)."""
    folders = made(adapter, name, table, chosen)
    expected = summed(name, base(name), folders, weights)
    for dtype, precision in (("fp64", 1e-13), (None, 1e-6)):
        result = valid(folders, weights=weights, dtype=dtype)
        found = models.updates(name, base(name), result.output)  # PEFT reads what we wrote
        none = {k: torch.zeros_like(t) for k, t in found.items() if k.endswith(".bias")}
        assert models.distance(found, none | expected) < precision
    assert result.truncation_error is None
    served = models.served(name, base(name), result.output)
    folded = valid(folders, base(name), weights=weights)
    whole = models.load_folded(name, folded.output)
    torch.testing.assert_close(
        models.outputs(name, served), models.outputs(name, whole), atol=1e-5, rtol=1e-5
    )


@every_merge
def test_a_truncation_is_the_best_of_its_rank(name, table, chosen, weights, base, adapter, valid):
    """Eckart-Young, against a dense SVD in float64."""
    folders = made(adapter, name, table, chosen)
    expected = summed(name, base(name), folders, weights)
    rank = 2
    result = valid(folders, weights=weights, rank=rank, dtype="fp64")
    found = models.updates(name, base(name), result.output)
    cut = whole = 0.0
    for key, delta in expected.items():
        if delta.ndim < 2:
            torch.testing.assert_close(found[key], delta, rtol=1e-12, atol=0)
            continue
        matrix = delta.reshape(len(delta), -1)
        sigma = torch.linalg.svdvals(matrix)
        rest = float(sigma[rank:].square().sum())
        residual = float((found[key].reshape(matrix.shape) - matrix).square().sum())
        assert residual == pytest.approx(rest, rel=1e-9, abs=1e-20 * float(sigma[0]) ** 2)
        assert torch.linalg.matrix_rank(found[key].reshape(matrix.shape)) <= rank
        cut, whole = cut + rest, whole + float(sigma.square().sum())
    assert result.truncation_error == pytest.approx((cut / whole) ** 0.5, rel=1e-6, abs=1e-9)
    models.served(name, base(name), result.output)


def test_energy_keeps_the_fewest_ranks_that_hold_the_share(base, adapter, valid):
    folders = made(adapter, "llama", LLAMA, ["patterns", "rslora"])
    expected = summed("llama", base("llama"), folders, [1.0, 1.0])
    result = valid(folders, weights=[1, 1], energy=0.9, dtype="fp64")
    merged = load(result.output)
    ranks = set()
    for key, delta in expected.items():
        share = torch.linalg.svdvals(delta).square().cumsum(0)
        enough = int((share / share[-1] < 0.9).sum()) + 1
        assert merged.deltas[key].rank == enough
        ranks.add(enough)
    assert len(ranks) > 1
    models.served("llama", base("llama"), result.output)


@pytest.mark.parametrize("first", ["plain", "rslora", "patterns"])
def test_a_weight_alone_scales_the_update(first, base, adapter, valid):
    [folder] = made(adapter, "llama", LLAMA, [first])
    result = valid([folder], weights=[-0.5])
    expected = summed("llama", base("llama"), [folder], [-0.5])
    found = models.updates("llama", base("llama"), result.output)
    assert models.distance(found, expected) < 1e-6


def test_opposite_weights_of_one_adapter_cancel_in_a_fold(base, adapter, valid):
    [folder] = made(adapter, "llama", LLAMA, ["plain"])
    result = valid([folder, folder, folder], base("llama"), weights=[1, -1, 1])
    expected = models.merged("llama", base("llama"), folder, wide=True)
    folded = models.load_folded("llama", result.output).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(folded[name].double(), tensor, rtol=1e-7, atol=1e-9)


def test_replaced_weights_are_averaged(base, adapter, valid):
    """Two adapters that each bring a whole head: weights that sum to 1 need no base."""
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    folders = [adapter("llama", seed=s, **options) for s in (1, 2)]
    result = valid(folders, weights=[0.25, 0.75])
    one, two = (models.merged("llama", base("llama"), f, wide=True) for f in folders)
    served = models.served("llama", base("llama"), result.output).merge_and_unload()
    expected = 0.25 * one["lm_head.weight"] + 0.75 * two["lm_head.weight"]
    torch.testing.assert_close(served.lm_head.weight.double(), expected, rtol=1e-7, atol=1e-8)


def test_sums_that_depend_on_the_base_ask_for_it(base, adapter, tmp_path):
    plain = adapter("llama", **LLAMA["plain"])
    head = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    dora = adapter("llama", target_modules=["q_proj"], use_dora=True)
    heads = [adapter("llama", seed=s, **head) for s in (1, 2)]
    for number, (folders, weights) in enumerate(
        [([plain, dora], [1, 1]), ([dora, dora], [0.5, 0.5]), (heads, [1, 1]), ([heads[0]], [2])]
    ):
        with pytest.raises(LoratoolsError) as refused:
            merge(folders, weights=weights, out=tmp_path / str(number))
        assert refused.value.code == "needs_base"
        assert refused.value.exit == 4


def test_the_order_of_adapters_does_not_matter(base, adapter, valid):
    folders = made(adapter, "llama", LLAMA, ["small", "plain", "rslora"])
    found = []
    for order in itertools.permutations(range(3)):
        weights = [[0.5, -1.0, 0.7][i] for i in order]
        result = valid([folders[i] for i in order], weights=weights, dtype="fp64")
        found.append(models.updates("llama", base("llama"), result.output))
    assert all(models.distance(f, found[0]) < 1e-13 for f in found)


def test_peft_reads_a_merge_of_rank_patterns_into_a_model_that_has_adapters(base, adapter, valid):
    """PEFT's own merge of such adapters cannot be loaded again (peft#3737)."""
    folders = made(adapter, "llama", LLAMA, ["patterns", "rslora-patterns"])
    merged = valid(folders, weights=[1, 1], rank=3).output
    model = peft.PeftModel.from_pretrained(models.load("llama", base("llama")), folders[0])
    for name, folder in (("b", folders[1]), ("merged", merged)):
        report = model.load_adapter(folder, name)
        assert report.unexpected_keys == []
        assert [k for k in report.missing_keys if f".{name}." in k] == []


EMBEDDINGS = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}


@pytest.mark.parametrize("weights", [[1, 1], [0.5, -0.25]])
def test_the_copies_of_the_base_that_peft_saves_beside_an_embedding_need_no_base(
    weights, base, adapter, valid
):
    """Their sum is 1.5 times the base's embedding, or none: they are no part of the update."""
    folders = [adapter("llama", seed=s, r=s + 1, **EMBEDDINGS) for s in (1, 2)]
    expected = summed("llama", base("llama"), folders, weights)
    for options, size in (({}, 5), ({"rank": 4}, 4)):
        merged = valid(folders, weights=weights, dtype="fp64", **options).output
        assert rank_of(merged, "model.embed_tokens.weight") == size
        found = models.updates("llama", base("llama"), merged)
        if size == 5:
            assert models.distance(found, expected) < 1e-13
    one = adapter("llama", target_modules=["lm_head"])
    expected = summed("llama", base("llama"), [folders[0], one], weights)
    merged = valid([folders[0], one], weights=weights, dtype="fp64").output
    assert models.distance(models.updates("llama", base("llama"), merged), expected) < 1e-13


def rank_of(folder, key):
    return load(folder).deltas[key].then.rank


def test_trained_tokens_are_united(base, adapter, valid, tmp_path):
    """Each row by the adapters that have it: their weights sum to 1 there, or W0 is needed."""
    tokens = [[3, 9], [5, 9], [2]]
    options = {"target_modules": ["q_proj"]}
    folders = [adapter("llama", trainable_token_indices=t, seed=i, **options)
               for i, t in enumerate(tokens)]  # fmt: skip
    one, two, three = (models.merged("llama", base("llama"), f, wide=True) for f in folders)
    result = valid([folders[0], folders[2]], weights=[1, 1])
    served = models.served("llama", base("llama"), result.output).merge_and_unload()
    expected = one["model.embed_tokens.weight"].clone()
    expected[2] = three["model.embed_tokens.weight"][2]
    torch.testing.assert_close(served.model.embed_tokens.weight.double(), expected)
    with pytest.raises(LoratoolsError, match="tokens replaced with weights") as refused:
        merge(folders[:2], weights=[0.5, 0.5], out=tmp_path / "out")
    assert refused.value.code == "needs_base"
    start = models.load("llama", base("llama")).double().state_dict()["model.embed_tokens.weight"]
    folded = valid(folders[:2], base("llama"), weights=[0.5, 0.5])
    expected = start + sum(0.5 * (t["model.embed_tokens.weight"] - start) for t in (one, two))
    found = models.load_folded("llama", folded.output).model.embed_tokens.weight
    torch.testing.assert_close(found.double(), expected)
