"""Orders and sizes of attention rows against the reshapes that other programs carry out."""

import numpy as np
import pytest
import transformers

from loratools.errors import LoratoolsError
from loratools.names.heads import (
    ORDERS,
    Facts,
    config_of,
    facts_from,
    group_order,
    inverse,
    order_of,
    rope_back,
    rope_order,
    sizes_of,
)
from loratools.names.rules import Rule

SHAPES = [(1, 2), (2, 4), (4, 6), (3, 8), (32, 128)]


@pytest.mark.parametrize(("heads", "size"), SHAPES)
def test_rope_is_the_permutation_of_llama_cpp_and_torchtune(heads, size):
    """llama.cpp:conversion/llama.py `permute`, torchtune:models/convert_weights.py `_permute`."""
    rows = np.arange(heads * size)
    theirs = rows.reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)
    assert rope_order(heads * size, heads) == tuple(theirs)
    back = rows.reshape(heads, size // 2, 2).swapaxes(1, 2).reshape(-1)
    assert rope_back(heads * size, heads) == tuple(back) == inverse(tuple(theirs))


@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 3), (6, 6, 2), (8, 1, 4), (1, 1, 1)])
def test_groups_are_the_interleaving_that_megatron_splits(heads, groups, size):
    """Megatron-Bridge:models/conversion/param_mapping.py `merge_qkv_weights`."""
    q = np.arange(heads * size).reshape(groups, heads // groups, size)
    k = heads * size + np.arange(groups * size).reshape(groups, 1, size)
    v = (heads + groups) * size + np.arange(groups * size).reshape(groups, 1, size)
    theirs = np.concatenate([q, k, v], axis=1).reshape(-1)
    assert group_order(heads, groups, size) == tuple(theirs)
    facts = Facts(heads=heads, kv_heads=groups, head_dim=size)
    rows = len(theirs)
    there, back = ORDERS["groups"](rows, facts), ORDERS["ungroup"](rows, facts)
    assert [there[i] for i in back] == list(range(rows)) == [back[i] for i in there]


def sizes(name, rows, columns, parts, facts):
    """The sizes that a rule of this name gives to its parts."""
    return sizes_of(Rule(tuple("abcde"[:parts]), "whole", sizes=name), rows, columns, facts)


def halves(rows):
    return order_of(Rule(("a",), "whole", order="halves"), (rows,), Facts())


def test_halves():
    assert halves(6) == (3, 4, 5, 0, 1, 2)


def test_a_rule_orders_its_parts_one_by_one_or_joined():
    facts = Facts(heads=2, kv_heads=1, head_dim=4)
    rope = Rule(("q", "k"), "qk", order="rope")
    assert order_of(rope, (8, 4), facts) == (0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11)
    joined = Rule(("q", "k", "v"), "qkv", order="groups", sizes="gqa")
    each = sizes_of(joined, 16, 8, facts)
    assert each == (8, 4, 4)
    assert order_of(joined, each, facts) == tuple(range(16))
    assert order_of(Rule(("a",), "b"), (8,), facts) is None
    assert sizes_of(Rule(("a",), "b"), 7, 3, Facts()) == (7,)


def test_sizes():
    facts = Facts(heads=4, kv_heads=2, head_dim=8)
    assert sizes("equal", 12, 5, 3, Facts()) == (4, 4, 4)
    assert sizes("gqa", 64, 32, 3, facts) == (32, 16, 16)
    assert sizes("gqa", 32, 32, 2, facts) == (16, 16)
    assert sizes("square", 26, 5, 4, Facts()) == (5, 5, 5, 11)


ODD = {
    "halves of 7": (lambda: halves(7), "shape_mismatch"),
    "an odd head": (lambda: rope_order(6, 2), "shape_mismatch"),
    "no heads": (lambda: rope_order(8, 0), "shape_mismatch"),
    "heads that do not share": (lambda: group_order(3, 2, 4), "shape_mismatch"),
    "rope of unknown heads": (lambda: ORDERS["rope"](8, Facts()), "needs_base"),
    "rope of part of a head": (lambda: ORDERS["rope"](9, Facts(head_dim=4)), "shape_mismatch"),
    "other rows": (lambda: sizes("gqa", 9, 2, 3, Facts(2, 1, 2)), "shape_mismatch"),
    "four parts": (lambda: sizes("gqa", 8, 2, 4, Facts(2, 1, 2)), "shape_mismatch"),
    "no facts": (lambda: sizes("gqa", 8, 2, 3, Facts()), "needs_base"),
    "five in three": (lambda: sizes("equal", 5, 2, 3, Facts()), "shape_mismatch"),
    "nothing left": (lambda: sizes("square", 6, 2, 4, Facts()), "shape_mismatch"),
    "groups of other rows": (lambda: ORDERS["groups"](9, Facts(2, 1, 2)), "shape_mismatch"),
}


@pytest.mark.parametrize("row", ODD)
def test_what_does_not_divide_is_refused(row):
    make, code = ODD[row]
    with pytest.raises(LoratoolsError) as refused:
        make()
    assert refused.value.code == code


# Configs that transformers itself writes, and what they say.
REAL = {
    "LlamaConfig": ({}, (32, 32, 128, 4096, 11008, 32, None)),
    "Qwen3Config": ({"head_dim": 64}, (32, 32, 64, 4096, 22016, 32, None)),
    "MixtralConfig": ({}, (32, 8, 128, 4096, 14336, 32, 8)),
    "GPT2Config": ({"n_inner": 77}, (12, 12, 64, 768, 77, 12, None)),
    "FalconConfig": ({}, (71, 1, 64, 4544, 18176, 32, None)),
    "BloomConfig": ({}, (8, 8, 8, 64, None, 2, None)),
    "T5Config": ({}, (8, 8, 64, 512, 2048, 6, None)),
    "Gemma3Config": ({}, (8, 4, 256, 2304, 9216, 26, None)),
    "LlavaConfig": ({}, (32, 32, 128, 4096, 11008, 32, None)),
}


@pytest.mark.parametrize("name", REAL)
def test_the_facts_of_a_real_config(name):
    options, wanted = REAL[name]
    config = getattr(transformers, name)(**options).to_dict()
    facts = facts_from(config)
    found = (
        facts.heads,
        facts.kv_heads,
        facts.head_dim,
        facts.hidden,
        facts.intermediate,
        facts.layers,
        facts.experts,
    )
    assert found == wanted
    assert facts.model_type == config["model_type"]
    assert facts_from({"base_config": config_of(facts)}) == facts


def test_the_facts_of_other_programs_configs():
    litgpt = {"n_head": 32, "n_query_groups": 4, "head_size": 64, "n_embd": 2048, "n_layer": 22}
    assert facts_from(litgpt) == Facts(32, 4, 64, 2048, None, 22)
    nemo = {
        "num_attention_heads": 32, "num_query_groups": 8, "hidden_size": 4096,
        "kv_channels": None, "ffn_hidden_size": 14336, "num_layers": 32,
    }  # fmt: skip
    assert facts_from(nemo) == facts_from({"model": nemo}) == Facts(32, 8, 128, 4096, 14336, 32)
    tune = {"num_heads": 24, "num_kv_heads": 8, "embed_dim": 3072, "intermediate_dim": 8192}
    assert facts_from(tune) == Facts(24, 8, 128, 3072, 8192)
    values = {
        "general.architecture": "llama",
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "llama.embedding_length": 4096,
        "llama.block_count": 32,
    }
    assert facts_from({"gguf": values}) == Facts(32, 8, 128, 4096, None, 32, None, "llama")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_attention_heads": True, "hidden_size": 64},
        {"num_attention_heads": "4"},
        {"num_attention_heads": -4, "text_config": 3},
        {"num_attention_heads": [4, 8]},
        {"text_config": {"text_config": {"text_config": {}}}},
        {"gguf": {}},
        {"gguf": {"general.architecture": ["llama"]}},
    ],
)
def test_what_a_config_does_not_say_is_not_made_up(config):
    assert facts_from(config).heads is None
    assert facts_from(config).head_dim is None


def test_numbers_of_every_layer_count_where_they_agree():
    assert facts_from({"num_attention_heads": [4, 4], "hidden_size": 32}).head_dim == 8
