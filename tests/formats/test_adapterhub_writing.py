"""AdapterHub's format written: what has no place is named, the rest reads as the same updates."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.adapter import Adapter, Dense, Leaf, LowRank, Renormed, Replace
from loratools.algebra import materialise
from loratools.containers.bundle import local
from loratools.formats import adapterhub
from loratools.formats.adapterhub_writing import place_of

Q = "bert.encoder.layer.0.attention.self.query"


def pair(rank, wide, high, scaling, seed=0):
    torch.manual_seed(seed)
    a, b = Leaf.of("a", torch.randn(rank, wide)), Leaf.of("b", torch.randn(high, rank))
    return LowRank(a, b, scaling)


def ones(*shape):
    return Leaf.of("x", torch.ones(shape))


GPT = "transformer.h.0.attn.c_attn"
LOST = {
    "an embedding": ({"model.embed_tokens.weight": pair(2, 9, 4, 1)}, "query, key, value"),
    "elsewhere": ({"bert.layer.0.attention.output.dense.weight": pair(2, 4, 4, 1)}, "query"),
    "the output of attention": ({"layers.0.self_attn.o_proj.weight": pair(2, 4, 4, 1)}, "MLP"),
    "a difference": ({f"{Q}.weight": Dense(ones(4, 6))}, "Dense"),
    "a bias": ({f"{Q}.bias": Dense(ones(4))}, "Dense"),
    "a head of another": ({"classifier.weight": Replace(ones(3, 6))}, "Replace"),
    "columns": ({f"{Q}.weight": Renormed(pair(2, 6, 4, 1), ones(6), "in")}, "Renormed"),
    "a convolution": ({f"{Q}.weight": LowRank(ones(2, 6, 3, 3), ones(4, 2, 1, 1), 1)}, "convol"),
    "some DoRA": (
        {f"{Q}.weight": pair(2, 6, 4, 1),
         f"{Q.replace('query', 'key')}.weight": Renormed(pair(2, 6, 4, 1), ones(4))},
        "all modules",
    ),
    "fused DoRA": ({f"{GPT}.weight": Renormed(pair(2, 4, 12, 1), ones(12))}, "fused"),
    "unequal thirds": ({f"{GPT}.weight": pair(2, 4, 13, 1)}, "13 rows"),
}  # fmt: skip


@pytest.mark.parametrize("row", LOST)
def test_what_has_no_place_is_named(row, tmp_path):
    deltas, text = LOST[row]
    adapter = Adapter(deltas, name="some", metadata={})
    found = [p for p in adapterhub.lost(adapter) if p.severity == "error"]
    assert [(p.code, p.target) for p in found] == [("loss", next(iter(deltas)))]
    assert text in found[0].message
    adapterhub.write(adapter, tmp_path)  # leaves out what is lost
    left = adapterhub.read(local(tmp_path), assume={}).deltas
    assert left.keys() == deltas.keys() - {p.target for p in found}


def test_lora_on_a_transposed_table_is_named():
    key = f"{Q}.weight"
    adapter = Adapter({key: pair(2, 6, 4, 1)}, transposed=frozenset({key}))
    assert "embeddings" in adapterhub.lost(adapter)[0].message


def test_only_what_lies_outside_the_base_model_goes_into_the_head(tmp_path):
    deltas = {
        f"{Q}.weight": pair(2, 6, 4, 1),
        "bert.embeddings.LayerNorm.weight": Replace(ones(6)),
        "classifier.weight": Replace(ones(3, 6)),
    }
    adapter = Adapter(deltas, format="adapterhub", config={"head_config": {"name": "task"}})
    assert [p.target for p in adapterhub.lost(adapter)] == ["bert.embeddings.LayerNorm.weight"]
    adapterhub.write(adapter, tmp_path)
    assert torch.load(tmp_path / "pytorch_model_head.bin").keys() == {"classifier.weight"}


@pytest.mark.parametrize(
    ("module", "place"),
    [
        (Q, "q"), ("model.layers.0.self_attn.v_proj", "v"), (GPT, "qkv"),
        ("bert.encoder.layer.0.intermediate.dense", "mlp"),
        ("bert.encoder.layer.0.output.dense", "mlp"), ("transformer.h.0.mlp.c_proj", "mlp"),
        ("encoder.block.0.layer.0.SelfAttention.k", "k"), ("model.layers.0.mlp.down_proj", "mlp"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_1", "mlp"),
        ("bert.encoder.layer.0.attention.output.dense", None), ("h.0.attn.c_proj", None),
        ("model.layers.0.mlp.gate_proj", None), ("gpt_neox.layers.0.query_key_value", None),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0", None), ("bert.pooler.dense", None),
    ],
)  # fmt: skip
def test_the_places_are_those_that_adapters_wraps(module, place):
    assert place_of(module) == place


PLACES = [Q, Q.replace("query", "value"), "bert.encoder.layer.1.output.dense"]
one = st.tuples(st.integers(1, 4), st.sampled_from([0.5, 1.0, 2.0, 3.0, -1.5, 0.3]))


@given(st.lists(one, min_size=1, max_size=3), st.booleans())
def test_what_is_written_reads_as_the_same_updates(tmp_path_factory, drawn, dora):
    deltas = {}
    for number, (place, (rank, scaling)) in enumerate(zip(PLACES, drawn, strict=False)):
        made = pair(rank, 6, 4, scaling, number)
        deltas[f"{place}.weight"] = Renormed(made, ones(4)) if dora else made
    folder = tmp_path_factory.mktemp("out")
    assert [p for p in adapterhub.lost(Adapter(deltas)) if p.severity == "error"] == []
    adapterhub.write(Adapter(deltas), folder)
    again = adapterhub.read(local(folder), assume={})
    assert [p for p in again.problems if p.severity == "error"] == []
    assert again.deltas.keys() == deltas.keys()
    torch.manual_seed(3)
    w0 = torch.randn(4, 6, dtype=torch.float64)
    alike = len(set(drawn)) == 1 and not dora
    for key, delta in deltas.items():
        found = again.deltas[key]
        torch.testing.assert_close(
            materialise(found, w0), materialise(delta, w0), atol=1e-6, rtol=1e-6
        )
        if alike:  # factors and scaling stand untouched
            assert torch.equal(found.a.tensor(), delta.a.tensor())
            assert torch.equal(found.b.tensor(), delta.b.tensor())
            assert found.scaling == delta.scaling


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_a_fused_pair_of_any_form_is_written_in_groups(rank, tmp_path):
    adapter = Adapter({f"{GPT}.weight": pair(rank, 4, 12, 2), f"{Q}.weight": pair(3, 4, 4, 1)})
    adapterhub.write(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())["config"]
    assert (config["r"], config["attn_matrices"]) == (max(rank, 3), ["q", "k", "v"])
    again = adapterhub.read(local(tmp_path), assume={})
    assert again.problems == ()
    for key, delta in adapter.deltas.items():
        torch.testing.assert_close(materialise(again.deltas[key]), materialise(delta))


def test_the_same_adapter_is_the_same_bytes(tmp_path):
    adapter = Adapter({f"{Q}.weight": pair(2, 6, 4, 2)})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert adapterhub.write(adapter, tmp_path / "one") == adapterhub.write(
        adapter, tmp_path / "two"
    )
