"""Names of Llama-like models: one to one, and complete for what real classes have."""

import pytest
import torch
import transformers

from loratools.names import llama
from loratools.names.heads import Facts, inverse, order_of, sizes_of
from loratools.names.rules import Names
from tests.names.both_ways import one_to_one

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}
FACTS = Facts(heads=4, kv_heads=2, head_dim=4, hidden=16, intermediate=24, layers=12)
DENSE = ("Llama", "Mistral", "Qwen2", "Gemma")


def state_of(name):
    """A real class's parameters, every row numbered."""
    config = getattr(transformers, f"{name}Config")(**SIZES, tie_word_embeddings=False)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    state, at = {}, 0
    for key, tensor in model.state_dict().items():
        state[key] = torch.arange(at, at + tensor.shape[0])
        at += tensor.shape[0]
    return state


def forth(rules, state):
    """A state dict in the other vocabulary."""
    names, parts = Names(rules), {}
    for key, rows in state.items():
        module, _, parameter = key.rpartition(".")
        found = names.of_part(module)
        assert found is not None, module
        parts.setdefault(f"{found.whole}.{parameter}", (found.rule, {}))[1][found.part] = rows
    out = {}
    for key, (rule, pieces) in parts.items():
        ordered = [pieces[i] for i in range(len(rule.parts))]
        order = order_of(rule, [len(p) for p in ordered], FACTS)
        joined = torch.cat(ordered)
        out[key] = joined if order is None else joined[list(order)]
    return out


def back(rules, state):
    """And in Hugging Face's again."""
    names, out = Names(rules), {}
    for key, rows in state.items():
        module, _, parameter = key.rpartition(".")
        found = names.of_whole(module)
        sizes = sizes_of(found.rule, len(rows), 16, FACTS)
        order = order_of(found.rule, sizes, FACTS)
        rows = rows if order is None else rows[list(inverse(order))]
        for part, piece in zip(found.parts, rows.split(sizes), strict=True):
            out[f"{part}.{parameter}"] = piece
    return out


FAMILIES = {
    "torchtune": llama.torchtune,
    "litgpt": llama.litgpt,
    "megatron": lambda model_type: llama.MEGATRON,
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_a_name_and_comes_back_from_it(family, name):
    rules = FAMILIES[family](name.lower())
    state = state_of(name)
    there = forth(rules, state)
    again = back(rules, there)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], rows) for key, rows in state.items())


@pytest.mark.parametrize("name", ["Gemma2", "Gemma3"])
def test_gemma_has_two_norms_more(name):
    config = transformers.Gemma2Config(**SIZES)
    with torch.device("meta"):
        model = transformers.Gemma2ForCausalLM(config)
    modules = [k.rpartition(".")[0] for k in model.state_dict()]
    for rules in (llama.torchtune("gemma2"), llama.litgpt(name.lower())):
        names = Names(rules)
        found = [names.of_part(module) for module in modules]
        assert None not in found
        assert all(
            names.of_whole(f.whole).parts[f.part] == m for f, m in zip(found, modules, strict=True)
        )


@pytest.mark.parametrize(
    ("name", "rules"),
    [("GPTNeoX", llama.LITGPT_NEOX), ("Falcon", llama.LITGPT_FALCON)],
)
def test_fused_weights_of_other_orders(name, rules):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        new_decoder_architecture=False, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    names = Names(rules)
    for key in model.state_dict():
        module = key.rpartition(".")[0]
        found = names.of_part(module)
        if found is None:
            assert "layernorm" in module  # Falcon's sizes have norms of different names
        elif module != "lm_head":  # embed_out on disk
            assert names.of_whole(found.whole).parts == (module,)


def test_neox_rows_lie_head_by_head():
    """litgpt:scripts/convert_hf_checkpoint.py `qkv_reassemble`."""
    rule = llama.LITGPT_NEOX[0]
    facts = Facts(heads=3, kv_heads=3, head_dim=2)
    order = order_of(rule, (18,), facts)
    rows = torch.arange(18).reshape(3, 3, 2)
    assert order == tuple(rows.transpose(0, 1).reshape(-1).tolist())


TABLES = {
    "torchtune": llama.TORCHTUNE,
    "torchtune unrotated": llama.TORCHTUNE_UNROTATED,
    "torchtune gemma2": llama.TORCHTUNE_GEMMA2,
    "falcon": llama.LITGPT_FALCON,
    "phi3": llama.LITGPT_PHI3,
}


@pytest.mark.parametrize("name", TABLES)
def test_no_two_rules_share_a_name(name):
    one_to_one(TABLES[name])


@pytest.mark.parametrize("rules", [llama.LITGPT, llama.LITGPT_GEMMA, llama.MEGATRON])
def test_where_a_part_has_two_wholes_the_newer_one_is_written(rules):
    """Older litgpt and adapters before fusing are read as well; every whole has one rule."""
    wholes = [rule.whole for rule in rules]
    assert len(set(wholes)) == len(wholes)
    first = Names(rules).of_part("model.layers.7.self_attn.k_proj")
    assert first.whole.endswith(("attn.qkv", "linear_qkv"))
    assert first.part == 1


def test_experts_have_their_numbers_on_both_sides():
    found = Names(llama.LITGPT).of_part("model.layers.3.block_sparse_moe.experts.5.w2")
    assert found.whole == "transformer.h.3.mlp.experts.5.proj"


def test_only_rotated_bases_are_reordered():
    for model_type, order in {"llama": "rope", None: "rope", "qwen2": "", "phi3": ""}.items():
        found = Names(llama.torchtune(model_type)).of_part("model.layers.0.self_attn.q_proj")
        assert found.rule.order == order
    found = Names(llama.torchtune("gemma2")).of_part("model.layers.0.post_attention_layernorm")
    assert found.whole == "layers.0.sa_scale"
