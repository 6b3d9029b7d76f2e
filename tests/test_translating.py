"""An adapter in another vocabulary changes the same weights by the same numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter import Adapter, Dense, Kind, LowRank, Renormed
from loratools.algebra import materialise
from loratools.names.heads import Facts
from loratools.translating import translate
from tests import examples_of_deltas as examples
from tests.examples_of_deltas import leaf
from tests.refusing import refused

HEADS, KV, SIZE, HIDDEN, WIDE = 4, 2, 6, 10, 14
FACTS = Facts(heads=HEADS, kv_heads=KV, head_dim=SIZE, hidden=HIDDEN, model_type="llama")
SHAPES = {
    "self_attn.q_proj": (HEADS * SIZE, HIDDEN),
    "self_attn.k_proj": (KV * SIZE, HIDDEN),
    "self_attn.v_proj": (KV * SIZE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * SIZE),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
FLUX = {
    "attn.to_q": (8, 8), "attn.to_k": (8, 8), "attn.to_v": (8, 8), "proj_mlp": (20, 8),
    "proj_out": (8, 28),
    "norm.linear": (24, 8),
}  # fmt: skip


def pair(seed: int, shape: tuple[int, int], rank: int = 2, scaling: float = 0.5) -> LowRank:
    return examples.pair(seed, shape, rank, scaling, alpha=scaling * rank)


def llama(modules: list[str] | None = None, *, dora: bool = False, bias: bool = False) -> Adapter:
    deltas: dict[str, Kind] = {}
    for layer in range(2):
        for i, name in enumerate(modules or SHAPES):
            module, shape = f"model.layers.{layer}.{name}", SHAPES[name]
            delta: Kind = pair(10 * layer + 2 * i, shape)
            if dora:
                delta = Renormed(delta, leaf(i, shape[0]))
            deltas[f"{module}.weight"] = delta
            if bias:
                deltas[f"{module}.bias"] = Dense(leaf(99 + i, shape[0]))
    return Adapter(deltas, vocabulary="hf")


def dense(adapter: Adapter) -> dict[str, np.ndarray]:
    return {key: materialise(delta).numpy() for key, delta in adapter.deltas.items()}


def same(one: Adapter, other: Adapter) -> None:
    assert one.deltas.keys() == other.deltas.keys()
    for key, numbers_of in dense(one).items():
        assert np.allclose(numbers_of, dense(other)[key], rtol=0, atol=1e-13), key


def there(adapter: Adapter, to: str, **more: object) -> Adapter:
    found = translate(adapter, to, facts=FACTS, **more)  # type: ignore[arg-type]
    assert found.unknown == ()
    assert found.adapter.problems == adapter.problems
    assert found.adapter.vocabulary == to
    return found.adapter


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("to", ["gguf", "torchtune", "litgpt", "megatron"])
def test_there_and_back_is_the_same_update(to, bias):
    adapter = llama(bias=bias)
    same(there(there(adapter, to), "hf"), adapter)


@pytest.mark.parametrize("to", ["gguf", "torchtune"])
def test_names_that_only_change_keep_factors_and_scaling(to):
    adapter = llama()
    back = there(there(adapter, to), "hf")
    for key, delta in adapter.deltas.items():
        now = back.deltas[key]
        assert (now.a.read(), now.b.read()) == (delta.a.read(), delta.b.read())
        assert (now.scaling, now.alpha) == (delta.scaling, delta.alpha)


def test_magnitudes_follow_their_rows():
    adapter = llama(["self_attn.q_proj", "self_attn.k_proj"], dora=True)
    back = there(there(adapter, "torchtune"), "hf")
    for key, delta in adapter.deltas.items():
        assert back.deltas[key].magnitude.read() == delta.magnitude.read()
    turned = there(adapter, "torchtune").deltas["layers.0.attn.q_proj.weight"]
    first = adapter.deltas["model.layers.0.self_attn.q_proj.weight"].magnitude.tensor()
    half = SIZE // 2  # Meta's rows: the two halves of a head take turns
    wanted = first.reshape(HEADS, 2, half).transpose(1, 2).reshape(-1)
    assert torch.equal(turned.magnitude.tensor(), wanted)


def test_a_fused_weight_has_its_parts_in_megatrons_order():
    adapter = llama(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
    fused = dense(there(adapter, "megatron"))["decoder.layers.0.self_attention.linear_qkv.weight"]
    q, k, v = (dense(adapter)[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv")
    per = HEADS // KV
    groups = []
    for g in range(KV):
        groups += [q[g * per * SIZE : (g + 1) * per * SIZE]]
        groups += [x[g * SIZE : (g + 1) * SIZE] for x in (k, v)]
    assert np.allclose(fused, np.concatenate(groups), atol=1e-13)


@pytest.mark.parametrize("parts", [["q_proj"], ["q_proj", "v_proj"], ["k_proj", "v_proj"]])
def test_parts_that_are_not_there_change_nothing(parts):
    adapter = llama([f"self_attn.{p}" for p in parts])
    back = dense(there(there(adapter, "litgpt"), "hf"))
    for name in "qkv":
        key = f"model.layers.1.self_attn.{name}_proj.weight"
        assert np.allclose(back[key], dense(adapter).get(key, 0), atol=1e-13)


def test_what_fused_weights_cannot_hold_is_said():
    adapter = llama(["self_attn.q_proj"], dora=True)
    found = translate(adapter, "litgpt", facts=FACTS)
    assert {p.code for p in found.adapter.problems} == {"loss"}
    assert "also holds" in found.adapter.problems[0].message
    unsaid = translate(llama(["self_attn.k_proj"]), "litgpt", facts=Facts(model_type="llama"))
    assert {p.code for p in unsaid.adapter.problems} == {"needs_base"}


def test_names_that_a_vocabulary_lacks_are_listed():
    adapter = Adapter({"model.odd.thing.weight": pair(1, (4, 4))}, vocabulary="hf")
    assert translate(adapter, "gguf", facts=FACTS).unknown == ("model.odd.thing.weight",)


def test_no_base_has_both_sorts_of_names():
    refused("loss", translate, llama(), "kohya")
    refused("loss", translate, Adapter({}, vocabulary="gguf"), "diffusers")


def flux(*, skip: tuple[str, ...] = ()) -> Adapter:
    block = "transformer.single_transformer_blocks.37."
    deltas: dict[str, Kind] = {
        "transformer.transformer_blocks.18.attn.to_out.0.weight": pair(77, (8, 8))
    }
    for i, (name, shape) in enumerate(FLUX.items()):
        if name not in skip:
            deltas[f"{block}{name}.weight"] = pair(i, shape)
    return Adapter(deltas, vocabulary="diffusers")


@pytest.mark.parametrize("skip", [(), ("attn.to_k",), ("attn.to_q", "attn.to_v")])
@pytest.mark.parametrize("way", ["original", "kohya"])
def test_flux_there_and_back(way, skip):
    adapter = flux(skip=skip)
    back = dense(there(there(adapter, way), "diffusers"))
    for key, wanted in dense(flux()).items():
        present = key in adapter.deltas
        assert np.allclose(back[key], wanted if present else 0, atol=1e-13)


def test_flux_single_blocks_are_one_weight_in_kohyas_names():
    fused = there(flux(), "kohya")
    assert set(fused.deltas) == {
        "lora_unet_double_blocks_18_img_attn_proj.weight",
        "lora_unet_single_blocks_37_linear1.weight",
        "lora_unet_single_blocks_37_linear2.weight",
        "lora_unet_single_blocks_37_modulation_lin.weight",
    }
    wanted = np.concatenate(list(dense(flux()).values())[1:5])
    one = dense(fused)["lora_unet_single_blocks_37_linear1.weight"]
    assert np.allclose(one, wanted, atol=1e-13)


def test_the_last_modulation_has_its_halves_swapped():
    key = "transformer.norm_out.linear.weight"
    adapter = Adapter({key: pair(1, (16, 8)), **flux().deltas}, vocabulary="diffusers")
    moved = dense(there(adapter, "original"))
    scale, shift = np.split(dense(adapter)[key], 2)
    wanted = np.concatenate([shift, scale])
    assert np.allclose(moved["diffusion_model.final_layer.adaLN_modulation.1.weight"], wanted)


def test_a_peft_adapter_of_one_component_finds_its_own():
    bare = {k.removeprefix("transformer."): d for k, d in flux().deltas.items()}
    adapter = Adapter(bare, vocabulary="hf")
    assert there(adapter, "diffusers").deltas.keys() == flux().deltas.keys()
    same(there(there(adapter, "kohya"), "hf"), adapter)
    two = Adapter(
        {
            **flux().deltas,
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight": pair(1, (4, 4)),
        },
        vocabulary="diffusers",
    )
    refused("loss", translate, two, "hf")


@settings(max_examples=30)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    scalings=st.lists(st.sampled_from([1.0, 0.5, 2.0]), min_size=3, max_size=3),
    one_a=st.booleans(),
)
def test_fused_and_cut_again_for_any_ranks_and_scalings(ranks, scalings, one_a):
    pairs = [
        pair(7 * i, SHAPES[f"self_attn.{n}_proj"], ranks[0 if one_a else i], scalings[i])
        for i, n in enumerate("qkv")
    ]
    if one_a:
        pairs = [LowRank(pairs[0].a, p.b, p.scaling) for p in pairs]
    adapter = Adapter(
        {f"model.layers.0.self_attn.{n}_proj.weight": p for n, p in zip("qkv", pairs, strict=True)},
        vocabulary="hf",
    )
    fused = there(adapter, "litgpt")
    (only,) = fused.deltas.values()
    assert only.rank == (ranks[0] if one_a else sum(ranks))
    same(there(fused, "hf"), adapter)
