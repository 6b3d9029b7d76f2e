"""Which tensors a written model must have: other names, tied heads, buffers, what is missing."""

import pytest
import torch

from loratools.adapter import Adapter, Leaf, LowRank
from loratools.bind import bind
from loratools.containers.bundle import Bundle
from loratools.proving.foreign import Signal
from loratools.proving.inventory import compare_all, take_inventory, wrong_size
from loratools.weights.base import Base, Shard

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY, NORM = "model.layers.0.q_proj.weight", "model.norm.weight"


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


B, A = numbers(8, 2, seed=1) * 0.1, numbers(2, 8, seed=2)
WEIGHTS = {EMBEDDING: numbers(6, 8), QUERY: numbers(8, 8), NORM: numbers(8)}


def model(tensors, *, tied=False):
    leaves = {name: Leaf.of(name, tensor) for name, tensor in tensors.items()}
    bundle = Bundle("memory", (), lambda name: pytest.fail(name))
    config = {"tie_word_embeddings": tied}
    return Base(bundle, (Shard("m.safetensors", leaves, {}, ""),), leaves, config)


def folded(tensors):
    found = dict(tensors)
    found[QUERY] = tensors[QUERY] + B @ A
    return found


def compare(before, after, *, tied=False, still_tied=None, ties=None, key=QUERY):
    adapter = Adapter({key: LowRank(Leaf.of("A", A), Leaf.of("B", B), 1.0)})
    plan = bind([adapter], model(before, tied=tied), ties=ties)
    written = model(after, tied=tied if still_tied is None else still_tied)
    inventory = take_inventory(plan, written)
    compared = compare_all(inventory, written)
    return inventory, {m.tensor: m.what for m in compared.mismatches}


def found_wrong(before, after, **how):
    return compare(before, after, **how)[1]


def test_a_fold_under_its_own_names():
    assert found_wrong(WEIGHTS, folded(WEIGHTS)) == {}
    assert found_wrong(WEIGHTS, WEIGHTS) == {QUERY: "not folded"}
    less = folded(WEIGHTS)
    del less[NORM]
    assert found_wrong(WEIGHTS, less) == {NORM: "missing"}
    more = folded(WEIGHTS) | {"model.layers.1.norm.weight": numbers(8)}
    assert list(found_wrong(WEIGHTS, more)) == ["model.layers.1.norm.weight"]


@pytest.mark.parametrize("prefix", ["base_model.model.", "transformer.", "module."])
def test_a_prefix_more_or_less(prefix):
    longer = {f"{prefix}{n}": t for n, t in folded(WEIGHTS).items()}
    inventory, wrong = compare(WEIGHTS, longer)
    assert (wrong, inventory.prefix.added) == ({}, prefix)
    bare = {n.removeprefix("model."): t for n, t in folded(WEIGHTS).items()}
    inventory, wrong = compare(WEIGHTS | {HEAD: numbers(6, 8)}, bare | {HEAD: numbers(6, 8)})
    assert (wrong, inventory.prefix.removed) == ({}, "model.")
    del bare["norm.weight"]
    assert found_wrong(WEIGHTS, bare) == {NORM: "missing"}


def test_old_names_of_norms():
    before = WEIGHTS | {"model.LayerNorm.gamma": numbers(3), "model.LayerNorm.beta": numbers(4)}
    after = folded(WEIGHTS) | {
        "model.LayerNorm.weight": numbers(3),
        "model.LayerNorm.bias": numbers(4),
    }
    assert found_wrong(before, after) == {}
    after["model.LayerNorm.bias"] = numbers(4, seed=9)
    assert list(found_wrong(before, after)) == ["model.LayerNorm.beta"]


def test_buffers_may_come_and_go():
    buffers = {
        "model.layers.0.rotary_emb.inv_freq": numbers(4),
        "model.position_ids": torch.arange(9),
        "h.0.attn.bias": torch.ones(1, 1, 5, 5, dtype=torch.bool),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    assert found_wrong(WEIGHTS | buffers, folded(WEIGHTS)) == {}
    assert found_wrong(WEIGHTS, folded(WEIGHTS) | buffers) == {}
    bias = {"h.0.attn.bias": numbers(5)}  # of a linear layer
    assert found_wrong(WEIGHTS | bias, folded(WEIGHTS)) == {"h.0.attn.bias": "missing"}


def test_a_tied_head_may_be_stored_or_not():
    both = folded(WEIGHTS) | {HEAD: WEIGHTS[EMBEDDING]}
    assert found_wrong(WEIGHTS, folded(WEIGHTS), tied=True) == {}
    assert found_wrong(WEIGHTS, both, tied=True) == {}
    assert found_wrong(WEIGHTS, both, tied=True, still_tied=False) == {}
    assert found_wrong(WEIGHTS | {HEAD: WEIGHTS[EMBEDDING]}, folded(WEIGHTS), tied=True) == {}
    moved = both | {HEAD: numbers(6, 8, seed=7)}
    assert list(found_wrong(WEIGHTS, moved, tied=True)) == [HEAD]
    lost = found_wrong(WEIGHTS | {HEAD: WEIGHTS[EMBEDDING]}, folded(WEIGHTS), tied=False)
    assert lost == {HEAD: "missing"}


def test_an_embedding_may_be_stored_again_where_a_model_shares_it():
    shared = {"shared.weight": WEIGHTS[EMBEDDING], QUERY: WEIGHTS[QUERY]}
    again = folded(shared) | {"encoder.embed_tokens.weight": WEIGHTS[EMBEDDING]}
    assert found_wrong(shared, again, tied=True) == {}
    again["encoder.embed_tokens.weight"] = numbers(6, 8, seed=3)
    assert list(found_wrong(shared, again, tied=True)) == ["encoder.embed_tokens.weight"]


def test_a_tied_head_follows_what_is_folded_into_the_embedding():
    square = {EMBEDDING: numbers(8, 8), QUERY: numbers(8, 8)}
    once = square | {EMBEDDING: square[EMBEDDING] + B @ A}
    both = once | {HEAD: once[EMBEDDING]}
    half = once | {HEAD: square[EMBEDDING]}
    for after, wrong in ((once, []), (both, []), (half, [HEAD])):
        assert list(found_wrong(square, after, tied=True, ties="tied", key=HEAD)) == wrong
    split = square | {HEAD: once[EMBEDDING]}
    how = {"tied": True, "still_tied": False, "ties": "untied", "key": HEAD}
    assert found_wrong(square, split, **how) == {}
    assert sorted(found_wrong(square, both, **how)) == [EMBEDDING]
    assert found_wrong(square, square, **how) == {HEAD: "missing"}


def test_shapes_and_dtypes():
    after = folded(WEIGHTS)
    assert "is (4, 2)" in found_wrong(WEIGHTS, after | {NORM: numbers(4, 2)})[NORM]
    assert "is (4, 16)" in found_wrong(WEIGHTS, after | {QUERY: numbers(4, 16)})[QUERY]
    assert "is I64" in found_wrong(WEIGHTS, after | {NORM: torch.arange(8)})[NORM]
    assert found_wrong(WEIGHTS, after | {NORM: WEIGHTS[NORM].double()}) == {}
    lossy = after | {NORM: WEIGHTS[NORM].bfloat16()}
    assert found_wrong(WEIGHTS, lossy) == {}
    assert list(found_wrong(WEIGHTS, lossy | {NORM: lossy[NORM] + 1})) == [NORM]


def test_a_scaling_is_spoken_of_only_where_it_shows():
    exact = Signal(update=1.0, moved=1.001, off=0.001, along=1e-12)
    assert exact.scaling == pytest.approx(1.001)
    assert exact.is_off
    assert exact.is_clear
    assert "1.00100" in wrong_size(exact).what
    noisy = Signal(update=1.0, moved=1.001, off=0.001, along=1e-6)
    assert not noisy.is_off
    assert not noisy.is_clear
    assert wrong_size(noisy) is None
    small = Signal(update=1.0, moved=1.0001, off=0.0001, along=1e-16)
    assert not small.is_off
    nothing = Signal()
    assert nothing.scaling is None
    assert not nothing.is_off
    assert not nothing.is_clear
