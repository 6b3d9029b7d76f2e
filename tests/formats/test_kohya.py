"""kohya's files as bytes: keys as the specifications have them, alphas, metadata, what is lost."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools import algebra
from loratools.adapter import (
    Adapter,
    Dense,
    Kronecker,
    Leaf,
    LowRank,
    Renormed,
    Replace,
    Rotated,
    Scaled,
)
from loratools.containers import hashes
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.formats import kohya
from loratools.formats.kohya_keys import LEAVES, METHODS, PREFIXES, part_of

SPECS = Path(__file__).parents[2] / "specs" / "formats"
Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
C = "lora_unet_down_blocks_0_resnets_0_conv1"
TE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def rows(name, columns):
    """The rows of the tables under "Keys", their cells without quotes."""
    text = (SPECS / f"{name}.md").read_text().partition("## Keys")[2].partition("\n## ")[0]
    cells = r"\| (`[^`]+`) " * (columns - 1) + r"\| ([^|]+) \|$"
    return [tuple(c.strip("`") for c in row) for row in re.findall("^" + cells, text, re.MULTILINE)]


KEYS = rows("kohya", 4) + rows("lycoris", 4)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_reader_has_the_keys_of_the_specifications(prefix):
    for key, module, part, _ in KEYS:
        given, wanted = (re.sub(r"\bP(?=_?X)", prefix, text) for text in (key, module))
        found = part_of(given)
        assert (found.module, found.part, found.method) == (wanted, part, ""), given
        assert part_of("module." + given.replace(".", "._orig_mod.", 1)) == found
    for key, method in rows("lycoris", 2):
        found = part_of(key.replace("P", prefix))
        assert (found.module, found.method) == (f"{prefix}X", method)


def test_the_specifications_have_every_prefix_part_and_method():
    assert {prefix for prefix, _ in rows("kohya", 2)} == set(PREFIXES)
    assert {part for _, _, part, _ in KEYS} == set(LEAVES.values())
    assert {method for _, method in rows("lycoris", 2)} == set(METHODS.values())


@pytest.mark.parametrize(
    "key",
    ["lora_unet_.alpha", "lora_unet_x", "lora_unet_x.lora_down", "lora_unetx.alpha", "x.alpha",
     "vae.a.lora_down.weight", "lora_unet_x.y.alpha", "alpha", ""],
)  # fmt: skip
def test_other_keys_are_none_of_its_own(key):
    assert part_of(key) is None


# ------------------------------------------------------------------------------- bytes

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


def file(path, tensors, metadata=None):
    """A safetensors file, byte for byte: key → shape, or (dtype, shape, bytes)."""
    header, data = {}, b""
    if metadata is not None:
        header["__metadata__"] = metadata
    for key, entry in tensors.items():
        dtype, shape, raw = (
            entry if isinstance(entry[0] if entry else 0, str) else ("F32", entry, None)
        )
        count = SIZES[dtype]
        for extent in shape:
            count *= extent
        raw = bytes(count) if raw is None else raw
        assert len(raw) == count
        header[key] = {"dtype": dtype, "shape": list(shape),
                       "data_offsets": [len(data), len(data) + count]}  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return local(path)


def pair(module, out=4, width=6, rank=2, alpha=None):
    tensors = {f"{module}.lora_down.weight": (rank, width), f"{module}.lora_up.weight": (out, rank)}
    return tensors | ({f"{module}.alpha": number(alpha)} if alpha is not None else {})


def number(value, dtype="F32", shape=()):
    codes = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q"}
    if dtype == "BF16":
        return dtype, shape, struct.pack("<f", value)[2:]
    return dtype, shape, struct.pack(codes[dtype], value)


def read(bundle, **assume):
    assert kohya.detect(bundle)
    return kohya.read(bundle, assume=assume)


def found(adapter):
    return [(p.code, p.severity) for p in adapter.problems]


def test_a_file_of_all_sorts_of_modules(tmp_path):
    tensors = {
        **pair(Q, alpha=1.0),
        **pair(TE, rank=3, alpha=6.0),
        f"{C}.lora_down.weight": (2, 4, 3, 3),
        f"{C}.lora_up.weight": (8, 2, 1, 1),
        f"{C}.diff_b": (8,),
        **pair("lora_unet__blocks_0_ffn_0"),
    }
    adapter = read(file(tmp_path / "x.safetensors", tensors))
    assert not adapter.problems
    assert {k: d.scaling for k, d in adapter.deltas.items()} == {
        f"{Q}.weight": 0.5, f"{TE}.weight": 2.0, f"{C}.weight": 1.0, f"{C}.bias": 1.0,
        "lora_unet_blocks_0_ffn_0.weight": 1.0,
    }  # fmt: skip
    assert adapter.deltas[f"{Q}.weight"].alpha == 1.0
    assert adapter.vocabulary == "kohya"


def test_the_trainer_s_own_leaves_alone_are_not_lycoris(tmp_path):
    assert read(file(tmp_path / "x.safetensors", pair(Q, alpha=1.0))).format == "kohya"
    with_dora = pair(Q) | {f"{Q}.dora_scale": (4, 1)}
    assert read(file(tmp_path / "x.safetensors", with_dora)).format == "lycoris"
    metadata = {"ss_network_module": "lycoris.kohya"}
    assert read(file(tmp_path / "x.safetensors", pair(Q), metadata)).format == "lycoris"
    assert read(file(tmp_path / "x.safetensors", pair("lycoris_a"))).format == "lycoris"


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "I64"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_of_any_dtype(dtype, shape, tmp_path):
    tensors = pair(Q) | {f"{Q}.alpha": number(3, dtype, shape)}
    adapter = read(file(tmp_path / "x.safetensors", tensors))
    assert adapter.deltas[f"{Q}.weight"].scaling == 1.5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_alpha_of_eight_bits(dtype, tmp_path):
    """All 256 of them, against torch."""
    name = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}[dtype]
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    for byte, value in enumerate(values.tolist()):
        tensors = pair(Q, rank=1) | {f"{Q}.alpha": (name, (), bytes([byte]))}
        bundle = file(tmp_path / "x.safetensors", tensors)
        if torch.tensor(value).isfinite():
            assert read(bundle).deltas[f"{Q}.weight"].scaling == value
        else:
            with pytest.raises(LoratoolsError) as caught:
                read(bundle)
            assert caught.value.code == "nonfinite"


def test_a_flat_up_of_a_convolution(tmp_path):
    tensors = {f"{C}.lora_down.weight": (2, 4, 3, 3), f"{C}.lora_up.weight": (8, 2)}
    adapter = read(file(tmp_path / "x.safetensors", tensors))
    assert not adapter.problems
    assert algebra.shape(adapter.deltas[f"{C}.weight"]) == (8, 4, 3, 3)


@pytest.mark.parametrize("name", ["x.sft", "X.SAFETENSORS"])
def test_safetensors_by_other_names(name, tmp_path):
    adapter = read(file(tmp_path / name, pair(Q)))
    assert adapter.files == (name,)
    assert read(local(tmp_path)).files == (name,)


X = Q.replace("lora_unet_", "oft_unet_")


def test_blocks_of_the_trainer_s_own_rotations(tmp_path):
    """Under their own prefix; of a fused weight in parts (sd-scripts:networks/oft_flux.py)."""
    tensors = {f"{X}.oft_blocks.{i}": (2, 3, 3) for i in range(3)} | {f"{X}.alpha": number(0.25)}
    tensors |= {f"{X.replace('_q', '_v')}.oft_blocks": (2, 3, 3),
                f"{X.replace('_q', '_v')}.alpha": number(0.0)}  # fmt: skip
    adapter = read(file(tmp_path / "x.safetensors", tensors))
    assert adapter.format == "kohya"
    assert found(adapter) == [("no_effect", "warning")]
    assert list(adapter.deltas) == [f"{Q}.weight", f"{Q.replace('_q', '_v')}.weight"]
    for delta in adapter.deltas.values():
        assert isinstance(delta, Rotated)
        assert (delta.method, delta.side) == ("oft of kohya", "out")
    kohya.write(adapter, tmp_path / "y.safetensors")
    theirs, ours = (load_file(tmp_path / f"{n}.safetensors") for n in "xy")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with safe_open(tmp_path / "y.safetensors", "pt") as opened:
        assert opened.metadata()["ss_network_module"] == "networks.oft"


def test_kohya_s_rotations_need_their_alpha(tmp_path):
    bundle = file(tmp_path / "x.safetensors", {f"{X}.oft_blocks": (2, 3, 3)})
    assert found(read(bundle)) == [("alpha_missing", "error")]
    (delta,) = read(bundle, alpha="0.5").deltas.values()
    assert delta.settings == {"alpha": 0.5}


NEW = {"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (4, 2), "b2.weight": (2, 6)}
OLD = {"a1.weight": (2, 6), "a2.weight": (6, 2), "b1.weight": (2, 6), "b2.weight": (4, 2)}
SQUARE = dict.fromkeys(NEW, (3, 3))
# Where both orders multiply, the rank is the smaller number: 6 x 6 by rank 2, or 2 x 2 by rank 6.
EITHER = {"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (6, 2), "b2.weight": (2, 6)}


def module(name, leaves):
    return {f"{name}.{part}": shape for part, shape in leaves.items()}


@pytest.mark.parametrize(
    ("leaves", "age"), [(NEW, "new"), (OLD, "old"), (EITHER, "new"), (dict(OLD, **{
        "b2.weight": (6, 2)}), "old")]
)  # fmt: skip
def test_the_age_of_glora_is_its_shapes(leaves, age, tmp_path):
    tensors = module(Q, leaves) | {f"{Q}.alpha": number(3.0)}
    adapter = read(file(tmp_path / "x.safetensors", tensors))
    assert not adapter.problems
    (delta,) = adapter.deltas.values()
    assert (delta.settings["age"], delta.scaling) == (age, 1.5)


def test_glora_of_square_factors_goes_by_the_others_or_is_asked_for(tmp_path):
    alone = file(tmp_path / "x.safetensors", module(K, SQUARE))
    assert found(read(alone)) == [("unknown_type", "error")]
    assert read(alone, glora="old").deltas[f"{K}.weight"].settings["age"] == "old"
    with pytest.raises(LoratoolsError, match="expected old or new"):
        read(alone, glora="middle")
    for other, age in ((NEW, "new"), (OLD, "old")):
        both = read(file(tmp_path / "x.safetensors", module(K, SQUARE) | module(Q, other)))
        assert both.deltas[f"{K}.weight"].settings["age"] == age


LOHA = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)}
LOKR = {"lokr_w1": (2, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 3)}
IA3 = {"weight": (4,), "on_input": ("I64", (), struct.pack("<q", 0))}
TLORA = {"q_layer.weight": (2, 6), "p_layer.weight": (4, 2), "lambda_layer": (1, 2)}


def without(leaves, name):
    return {k: v for k, v in leaves.items() if k != name}


# What is wrong with a module of another method, the code, and what the message names.
METHOD_ROWS = {
    "half of a LoHa": (without(LOHA, "hada_w2_b"), "missing", "hada_w2_b"),
    "one core": (LOHA | {"hada_t1": (2, 2, 3, 3)}, "missing", "hada_t2"),
    "LoHa of two shapes": (LOHA | {"hada_w2_b": (2, 5)}, "shape_factors", "hada_w2_b"),
    "LoHa of two ranks": (
        LOHA | {"hada_w1_b": (3, 6), "hada_w2_b": (3, 6)}, "shape_factors", "hada_w1_b"
    ),
    "LoHa with cores of another rank": (
        LOHA | {"hada_t1": (3, 3, 2, 2), "hada_t2": (3, 3, 2, 2)}, "shape_factors", "hada_t1"
    ),
    "LoKr without its first": (without(LOKR, "lokr_w1"), "missing", "lokr_w1"),
    "LoKr with half a factor": (without(LOKR, "lokr_w2_b"), "missing", "lokr_w2_b"),
    "LoKr twice": (LOKR | {"lokr_w2": (2, 3)}, "unexplained", "whole and in factors"),
    "LoKr of factors that do not multiply": (
        LOKR | {"lokr_w2_b": (2, 3)}, "shape_factors", "lokr_w2_b"
    ),
    "LoKr of two ranks": (
        {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 3),
         "alpha": ()}, "shape_factors", "alpha"
    ),
    "LoKr with the core that none uses": (LOKR | {"lokr_t1": (2, 2)}, "unknown_type", "lokr_t1"),
    "GLoRA of no order": (NEW | {"b2.weight": (3, 6)}, "shape_factors", "a1"),
    "GLoRA without b2": (without(NEW, "b2.weight"), "missing", "b2"),
    "DoRA over GLoRA": (NEW | {"dora_scale": (4, 1)}, "not_foldable", "no DoRA"),
    "(IA)3 of a matrix": (IA3 | {"weight": (4, 6)}, "shape_factors", "weight"),
    "blocks that are not square": ({"oft_blocks": (2, 3, 2)}, "shape_factors", "oft_blocks"),
    "rescale of others": (
        {"oft_blocks": (2, 3, 3), "rescale": (5, 1)}, "shape_factors", "rescale"
    ),
    "rescale alone": ({"rescale": (5, 1)}, "missing", "oft_blocks"),
    "a part of blocks lost": (
        {"oft_blocks.0": (2, 3, 3), "oft_blocks.2": (2, 3, 3), "alpha": ()}, "missing",
        "oft_blocks.1"
    ),
    "a butterfly of odd blocks": ({"oft_blocks": (2, 4, 3, 3)}, "shape_factors", "oft_blocks"),
    "a butterfly too deep": ({"oft_blocks": (3, 3, 2, 2)}, "shape_factors", "oft_blocks"),
    "T-LoRA of two ranks": (TLORA | {"lambda_layer": (1, 3)}, "shape_factors", "lambda"),
    "half of a T-LoRA": (without(TLORA, "p_layer.weight"), "missing", "p_layer"),
    "old OFT": ({"oft_diag": (2, 3, 3)}, "unknown_type", "oft_diag"),
    "a sparse remainder": (
        {"lora_down.weight": (2, 6), "lora_up.weight": (4, 2), "bias_size": (2,)}, "unknown_type",
        "remainder"
    ),
    "two methods": (LOHA | {"lokr_w1": (2, 2)}, "unexplained", "LoHa, LoKr"),
    "a method and a pair": (
        LOHA | {"lora_down.weight": (2, 6), "lora_up.weight": (4, 2)}, "unexplained", "LoRA"
    ),
    "magnitudes of another size": (LOHA | {"dora_scale": (5, 1)}, "shape_factors", "5 magnitudes"),
    "alpha of 0": (LOHA | {"alpha": number(0.0)}, "no_effect", "alpha is 0"),
    "alpha of much": (LOKR | {"alpha": number(999.0)}, "scaling_unusual", "999"),
}  # fmt: skip


@pytest.mark.parametrize("name", METHOD_ROWS)
def test_what_is_said_of_other_methods(name, tmp_path):
    leaves, code, text = METHOD_ROWS[name]
    problems = read(file(tmp_path / "x.safetensors", module(Q, leaves))).problems
    assert code in [p.code for p in problems]
    assert any(text in p.message for p in problems if p.code == code)


@pytest.mark.parametrize(
    ("leaves", "code"),
    [
        (LOHA | {"hada_w1_a": ("I32", (4, 2), None)}, "dtype_unusable"),
        (LOHA | {"alpha": number(float("inf"))}, "nonfinite"),
        (LOHA | {"dora_scale": ("I32", (4, 1), None)}, "dtype_unusable"),
        (IA3 | {"on_input": ("I64", (), struct.pack("<q", 2))}, "malformed"),
        ({"oft_blocks": (2, 3, 3), "alpha": number(float("nan"))}, "nonfinite"),
    ],
)
def test_what_is_refused_of_other_methods(leaves, code, tmp_path):
    bundle = file(tmp_path / "x.safetensors", module(Q, leaves))
    with pytest.raises(LoratoolsError) as caught:
        kohya.read(bundle, assume={})
    assert caught.value.code == code


def test_alpha_of_two_whole_factors_says_nothing(tmp_path):
    """ai-toolkit stores 1e10 there, which in 16 bits is infinite."""
    alpha = ("F16", (), struct.pack("<e", float("inf")))
    tensors = module(Q, {"lokr_w1": (2, 2), "lokr_w2": (2, 3), "alpha": alpha})
    adapter = read(file(tmp_path / "x.safetensors", tensors))
    assert not adapter.problems
    assert adapter.deltas[f"{Q}.weight"].scaling == 1
    kohya.write(adapter, tmp_path / "y.safetensors")
    assert load_file(tmp_path / "y.safetensors")[f"{Q}.alpha"].isinf()


def test_a_scaling_of_two_whole_factors_is_written_into_one(tmp_path):
    """PEFT divides its alpha by r there too; LyCORIS's readers ask no alpha."""
    w1, w2 = torch.randn(2, 2), torch.randn(2, 3)
    delta = Kronecker((4, 6), 0.5, 1.0, w1=Leaf.of("w1", w1), w2=Leaf.of("w2", w2))
    adapter = Adapter({f"{Q}.weight": delta}, format="kohya", vocabulary="kohya")
    kohya.write(adapter, tmp_path / "y.safetensors")
    (found_again,) = read(local(tmp_path / "y.safetensors")).deltas.values()
    assert torch.equal(algebra.materialise(found_again), algebra.materialise(delta))


@pytest.mark.parametrize("shape", [(4,), (1, 4, 1, 1), (4, 1)])
def test_factors_of_one_are_written_as_their_distance_from_it(shape, tmp_path):
    """PEFT's (IA)3 is the factor itself."""
    factor = torch.linspace(0.5, 1.5, 4).reshape(shape)
    adapter = Adapter({f"{Q}.weight": Scaled("rows", Leaf.of("l", factor))}, vocabulary="kohya")
    assert kohya.lost(adapter) == []
    kohya.write(adapter, tmp_path / "y.safetensors")
    tensors = load_file(tmp_path / "y.safetensors")
    assert tensors[f"{Q}.weight"].shape == ((1, 4, 1, 1) if len(shape) == 4 else (4,))
    torch.testing.assert_close(tensors[f"{Q}.weight"].flatten() + 1, factor.flatten())
    assert tensors[f"{Q}.on_input"] == 0


def test_what_kohya_cannot_hold_of_other_methods(tmp_path):
    blocks = {"oft_blocks": Leaf.of("x", torch.zeros(2, 3, 3))}
    deltas = {
        "columns": Rotated("oft of lycoris", "in", blocks),
        "another_s": Rotated("householder", "out", {"u": Leaf.of("u", torch.ones(2, 6))}),
        "by_elements": Scaled("elements", LowRank(Leaf.of("a", torch.ones(1, 6)),
                                                  Leaf.of("b", torch.ones(4, 1)), 1.0), 1.0),
    }  # fmt: skip
    adapter = Adapter({f"lora_unet_{k}.weight": d for k, d in deltas.items()}, vocabulary="kohya")
    assert [p.code for p in kohya.lost(adapter)] == ["loss"] * 3


ALGORITHMS = {
    "loha": LOHA, "lokr": LOKR, "glora": NEW, "ia3": IA3, "diag-oft": {"oft_blocks": (2, 3, 3)},
    "boft": {"oft_blocks": (1, 2, 2, 2)}, "tlora": TLORA,
}  # fmt: skip


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_metadata_names_the_algorithm(algo, tmp_path):
    adapter = read(file(tmp_path / "x.safetensors", module(Q, ALGORITHMS[algo])))
    kohya.write(adapter, tmp_path / "y.safetensors")
    with safe_open(tmp_path / "y.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"]) == {"algo": algo}


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pth", ".bin"])
def test_pickles(suffix, tmp_path):
    tensors = {f"{Q}.lora_down.weight": torch.ones(2, 6), f"{Q}.lora_up.weight": torch.ones(4, 2),
               f"{Q}.alpha": torch.tensor(1.0)}  # fmt: skip
    torch.save(tensors, tmp_path / f"x{suffix}")
    adapter = read(local(tmp_path))
    assert not adapter.problems
    assert adapter.files == (f"x{suffix}",)
    dense = algebra.materialise(adapter.deltas[f"{Q}.weight"])
    assert torch.equal(dense, torch.ones(4, 6, dtype=torch.float64))


def test_what_is_no_tensor_in_a_pickle_is_said(tmp_path):
    tensors = {f"{Q}.lora_down.weight": torch.ones(2, 6), f"{Q}.lora_up.weight": torch.ones(4, 2)}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "x.ckpt")
    adapter = read(local(tmp_path / "x.ckpt"))
    assert found(adapter) == [("unexplained", "note")]
    assert "epoch" in adapter.problems[0].message


# out, in, shape of dora_scale, the axis it is of: the rule of specs/formats/lycoris.md.
AXES = [
    (4, 6, (4, 1), "out"), (4, 6, (1, 6), "in"), (5, 5, (5, 1), "out"), (5, 5, (1, 5), "in"),
    (5, 5, (5,), "out"), (4, 6, (4,), "out"), (4, 6, (6,), "in"), (1, 6, (1, 1), "out"),
    (4, 1, (1, 1), "in"), (4, 1, (4, 1), "out"), (1, 1, (1, 1), "out"), (1, 6, (1, 6), "in"),
]  # fmt: skip


@pytest.mark.parametrize(("out", "width", "shape", "axis"), AXES)
def test_the_axis_of_magnitudes_is_their_shape_s(out, width, shape, axis, tmp_path):
    tensors = pair(Q, out, width) | {f"{Q}.dora_scale": shape}
    delta = read(file(tmp_path / "x.safetensors", tensors)).deltas[f"{Q}.weight"]
    assert isinstance(delta, Renormed)
    assert delta.axis == axis
    if len(shape) == 2:
        conv = {f"{C}.lora_down.weight": (2, width, 3, 3), f"{C}.lora_up.weight": (out, 2, 1, 1),
                f"{C}.dora_scale": (*shape, 1, 1)}  # fmt: skip
        delta = read(file(tmp_path / "x.safetensors", conv)).deltas[f"{C}.weight"]
        assert isinstance(delta, Renormed)
        assert delta.axis == axis


def test_peft_s_magnitudes_of_a_convolution(tmp_path):
    conv = {f"{C}.lora_A.weight": (2, 3, 3, 3), f"{C}.lora_B.weight": (4, 2, 1, 1),
            f"{C}.lora_magnitude_vector": (1, 4, 1, 1)}  # fmt: skip
    assert read(file(tmp_path / "x.safetensors", conv)).deltas[f"{C}.weight"].axis == "out"


def test_two_families_in_one_file(tmp_path):
    tensors = {
        **pair("lora_transformer_single_transformer_blocks_0_attn_to_q"),
        **pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        **pair("lora_te2_encoder_block_0_layer_0_SelfAttention_q"),
        **pair("text_encoder.text_model.encoder.layers.0.mlp.fc2"),
    }
    adapter = read(file(tmp_path / "x.safetensors", tensors))
    assert not adapter.problems
    assert len(adapter.deltas) == 4
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc2.weight" in adapter.deltas


def test_one_update_in_two_spellings(tmp_path):
    tensors = {
        **pair("lora_unet_double_blocks_0_img_attn_qkv", out=18),
        **pair("transformer.transformer_blocks.0.attn.to_q"),
        **pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    }
    adapter = read(file(tmp_path / "x.safetensors", tensors))
    assert found(adapter) == [("unexplained", "warning")]
    assert "lora_unet_double_blocks_0_img_attn_qkv.weight" not in adapter.deltas
    assert len(adapter.deltas) == 2


def test_weights_that_are_set_and_padded(tmp_path):
    tensors = pair(Q) | {
        f"{Q}.reshape_weight": ("I64", (2,), struct.pack("<2q", 4, 6)),
        "lora_unet_norm.set_weight": (4,),
    }
    adapter = read(file(tmp_path / "x.safetensors", tensors))
    assert found(adapter) == [("not_foldable", "warning")]
    assert isinstance(adapter.deltas["lora_unet_norm.weight"], Replace)
    kohya.write(adapter, tmp_path / "y.safetensors")
    theirs, ours = (load_file(tmp_path / f"{n}.safetensors") for n in "xy")
    assert theirs.keys() < ours.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# What is wrong with each, the code, its severity, and what the message names.
ROWS = {
    "no up": ({f"{Q}.lora_down.weight": (2, 6)}, "missing", "error", "lora_down without lora_up"),
    "alpha alone": ({f"{Q}.alpha": ()}, "missing", "error", "neither lora_down nor lora_up"),
    "ranks": (pair(Q) | {f"{Q}.lora_up.weight": (4, 3)}, "shape_factors", "error", r"\(4, 3\)"),
    "flat": (pair(Q) | {f"{Q}.lora_up.weight": (8,)}, "shape_factors", "error", "sharded"),
    "empty": (pair(Q) | {f"{Q}.lora_down.weight": (0, 6)}, "shape_factors", "error", "sharded"),
    "mid": (
        pair(Q) | {f"{Q}.lora_mid.weight": (3, 3, 3, 3)}, "shape_factors", "error", "lora_mid"
    ),
    "magnitudes": (pair(Q) | {f"{Q}.dora_scale": (5, 1)}, "shape_factors", "error", "5 magnitudes"),
    "zero": (pair(Q, alpha=0.0), "no_effect", "warning", "alpha is 0"),
    "large": (pair(Q, alpha=999.0), "scaling_unusual", "warning", "499.5"),
    "unknown leaf": (pair(Q) | {f"{Q}.lora_sideways": (2,)}, "unexplained", "error", "sideways"),
    "a base's weight": (pair(Q) | {"unet.a.weight": (2,)}, "unexplained", "error", "unet.a.weight"),
    "weight alone": (pair(Q) | {f"{K}.weight": (2,)}, "unexplained", "error", "to_k.weight"),
    "magnitudes of a difference": (
        {f"{Q}.diff": (4, 6), f"{Q}.dora_scale": (4, 1)}, "unexplained", "error", "dora_scale"
    ),
    "two updates": (pair(Q) | {f"{Q}.diff": (4, 6)}, "unexplained", "error", "diff"),
    "alpha of a difference": (
        {f"{Q}.diff": (4, 6), f"{Q}.alpha": ()}, "unexplained", "note", "belongs to no pair"
    ),
    "embeddings": (
        pair(Q) | {"bundle_emb.cat.clip_l": (2, 6)}, "unexplained", "note", "left there: cat"
    ),
    "a name of control characters": (
        pair("lora_unet_a\x1b[2J"), "malformed", "error", r"lora_unet_a\\x1b"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_what_is_said(name, tmp_path):
    tensors, code, severity, text = ROWS[name]
    problems = read(file(tmp_path / "x.safetensors", tensors)).problems
    assert (code, severity) in [(p.code, p.severity) for p in problems]
    assert any(re.search(text, p.message) for p in problems if p.code == code)
    assert all(p.message.isprintable() for p in problems)


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        (pair(Q) | {f"{Q}.lora_A.weight": (2, 6)}, "duplicate"),
        (pair("lora_unet_a") | pair("lora_unet__a"), "duplicate"),
        (pair(Q) | {f"{Q}.alpha": (2,)}, "malformed"),
        (pair(Q) | {f"{Q}.lora_up.weight": ("I32", (4, 2), None)}, "dtype_unusable"),
        (pair(Q) | {f"{Q}.alpha": number(float("nan"))}, "nonfinite"),
        ({f"{Q}.diff": ("I32", (4, 2), None)}, "dtype_unusable"),
    ],
)
def test_what_is_refused(tensors, code, tmp_path):
    bundle = file(tmp_path / "x.safetensors", tensors)
    with pytest.raises(LoratoolsError) as caught:
        kohya.read(bundle, assume={})
    assert caught.value.code == code


@pytest.mark.parametrize(
    "key",
    ["base_model.model.q.lora_A.weight", "unet.a.to_q.lora_A.weight", "a.lora_down.weight",
     "diffusion_model.a.lora_A.weight", "q.lora_a", "lora_unet_x.weight", "emb_params"],
)  # fmt: skip
def test_files_of_others_are_not_kohya_s(key, tmp_path):
    assert not kohya.detect(file(tmp_path / "x.safetensors", {key: (2, 2)}))


def test_odd_files_are_not_kohya_s(tmp_path):
    for name in ("a.safetensors", "b.pt", "c.bin", "d.gguf", "e.ckpt"):
        (tmp_path / name).write_bytes(b"<html>" + bytes(40))
        assert not kohya.detect(local(tmp_path / name))
    assert not kohya.detect(local(tmp_path))
    file(tmp_path / "f.safetensors", pair(Q))
    assert kohya.detect(local(tmp_path / "f.safetensors"))
    assert not kohya.detect(local(tmp_path))  # two safetensors: which one is for the user to say


def test_a_download_cut_short_says_so(tmp_path):
    path = tmp_path / "x.safetensors"
    file(path, pair(Q))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(LoratoolsError, match="5 bytes are missing"):
        kohya.detect(local(path))


# ------------------------------------------------------------------------------- metadata

FLUX = pair("lora_unet_double_blocks_0_img_mod_lin", out=8, width=3072)
EMPTY = {"sshs_model_hash": hashes.EMPTY}
CLAIMED = {
    "rank": (pair(Q), {"ss_network_dim": "8"}, "says rank 8, the tensors have 2"),
    "flux as sd": (FLUX, {"ss_base_model_version": "sd_1.5"}, "says sd_1.5, .* say flux"),
    "flux as sdxl": (
        FLUX, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "stable-diffusion-xl"
    ),
    "sd1 as sdxl": (pair(K, width=768), {"ss_base_model_version": "sdxl_base_v1-0"}, "say sd1"),
    "wan as sd": (
        pair("lora_unet_blocks_0_ffn_0"), {"ss_base_model_version": "sd_v1"}, "another architecture"
    ),
    "hash of nothing": (pair(Q), EMPTY, "hash of nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMED)
def test_metadata_that_lies_is_not_believed(name, tmp_path):
    tensors, metadata, text = CLAIMED[name]
    adapter = read(file(tmp_path / "x.safetensors", tensors, metadata))
    (problem,) = adapter.problems
    assert (problem.code, problem.severity) == ("config_conflict", "note")
    assert re.search(text, problem.message)
    kohya.write(adapter, tmp_path / "y.safetensors")
    written = header(tmp_path / "y.safetensors")
    assert not {*metadata.items()} & {*written.items()}


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (pair(Q), {"ss_network_dim": "2", "ss_base_model_version": "sd_v2_v"}),
        (pair(Q), {"ss_network_dim": "None"}),
        (pair(Q), {"ss_network_dim": "Dynamic"}),
        (pair(Q, rank=12), {"ss_network_dim": "4"}),  # split_qkv
        (pair(Q) | pair(TE, rank=8), {"ss_network_dim": "8"}),
        (pair(TE), {"ss_base_model_version": "flux1"}),  # text encoders tell nothing
        (pair(K, width=2048), {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}),
        (FLUX, {"ss_base_model_version": "flux1", "modelspec.architecture": "flux-1-dev/lora"}),
        (pair("lora_unet_blocks_0_ffn_0"), {"ss_base_model_version": "wan2.1"}),
        (pair(Q), {"ss_network_args": "{", "ss_network_dim": "9" * 5000}),
    ],
)
def test_metadata_that_may_be_true_is_left_alone(tensors, metadata, tmp_path):
    assert not read(file(tmp_path / "x.safetensors", tensors, metadata)).problems


@pytest.mark.parametrize(
    ("said", "base"),
    [("runwayml/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"), ("a.safetensors", None),
     ("models/sd_xl_base_1.0.safetensors", None), ("/home/x/y", None), ("a/b/c", None),
     ("C:\\models\\x", None), ("../x", None), ("", None)],
)  # fmt: skip
def test_only_a_hub_id_becomes_the_base(said, base, tmp_path):
    metadata = {"ss_sd_model_name": said, "modelspec.architecture": "x/lora"}
    config = read(file(tmp_path / "x.safetensors", pair(Q), metadata)).config
    assert config.get("base_model_name_or_path") == base
    assert config.get("ss_sd_model_name", "") == said
    assert config["modelspec.architecture"] == "x/lora"


def header(path):
    with safe_open(path, "pt") as there:
        return there.metadata()


def test_written_metadata_is_true(tmp_path):
    said = {
        "ss_network_dim": "64", "ss_network_alpha": "32", "ss_network_module": "networks.lora",
        "ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "flux-1-dev/lora",
        "sshs_model_hash": "ab" * 32, "sshs_legacy_hash": "ab" * 4, "ss_tag_frequency": '{"a": 1}',
        "modelspec.trigger_phrase": "ohwx", "ss_network_args": '{"algo": "lokr"}',
        "modelspec.hash_sha256": "0x12", "ss_learning_rate": "0.0001",
    }  # fmt: skip
    tensors = pair(K, width=768, alpha=1.0)
    adapter = read(file(tmp_path / "x.safetensors", tensors, said))
    kohya.write(adapter, tmp_path / "y.safetensors")
    written = header(tmp_path / "y.safetensors")
    found = hashes.civitai(local(tmp_path).open("y.safetensors"))
    assert written == {
        "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": "2",
        "ss_network_alpha": "1", "ss_base_model_version": "sd_v1", "ss_tag_frequency": '{"a": 1}',
        "ss_learning_rate": "0.0001", "modelspec.trigger_phrase": "ohwx",
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.title": "x",
        "modelspec.implementation": "diffusers", "modelspec.sai_model_spec": "1.0.1",
        "modelspec.hash_sha256": f"0x{found.tensors}", "sshs_model_hash": found.tensors,
        "sshs_legacy_hash": written["sshs_legacy_hash"],
    }  # fmt: skip
    # Written again, nothing changes; the file is the same to the byte.
    kohya.write(read(local(tmp_path / "y.safetensors")), tmp_path / "z.safetensors")
    again = {**header(tmp_path / "z.safetensors")}
    assert again == written
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "z.safetensors").read_bytes()


def test_a_merge_names_its_parents(tmp_path):
    adapter = read(file(tmp_path / "x.safetensors", pair(Q) | pair(TE, rank=3)))
    config = {"merged_from": ["a", "/home/me/b.safetensors"], "ss_base_model_version": "sd_v2"}
    merged = Adapter(adapter.deltas, "kohya", "kohya", config, name="merged")
    kohya.write(merged, tmp_path / "y.safetensors")
    written = header(tmp_path / "y.safetensors")
    assert written["modelspec.merged_from"] == "a, b"
    assert written["ss_network_dim"] == written["ss_network_alpha"] == "Dynamic"
    assert written["ss_base_model_version"] == "sd_v2"
    assert not any("home" in value for value in written.values())


# ------------------------------------------------------------------------------- split qkv


def split(tmp_path, module, sizes, width, rank=2, dtype=torch.float32):
    """A module as sd-scripts saves it with split_qkv, and the update that was trained."""
    torch.manual_seed(len(sizes))
    downs = [torch.randn(rank, width).to(dtype) for _ in sizes]
    ups = [torch.randn(size, rank).to(dtype) for size in sizes]
    trained = torch.cat([u.double() @ d.double() * (1.0 / rank)
                         for u, d in zip(ups, downs, strict=True)])  # fmt: skip
    saved = {
        f"{module}.lora_down.weight": torch.cat(downs),
        f"{module}.lora_up.weight": torch.block_diag(*ups),
        f"{module}.alpha": torch.tensor(1.0),
    }
    path = tmp_path / "x.safetensors"
    save_file(saved, path, {"ss_network_args": json.dumps({"split_qkv": "True"})})
    return local(path), trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "sizes", "width"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", [6, 6, 6], 6),
        ("lora_unet_single_blocks_7_linear1", [6, 6, 6, 24], 6),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", [4, 4, 4], 4),
    ],
)
def test_split_qkv(module, sizes, width, dtype, tmp_path):
    bundle, trained = split(tmp_path, module, sizes, width, dtype=dtype)
    as_read = read(bundle)
    assert found(as_read) == [("scaling_unusual", "note")]
    dense = algebra.materialise(as_read.deltas[f"{module}.weight"])
    torch.testing.assert_close(dense * len(sizes), trained)
    fixed = read(bundle, kohya_split_qkv="fix")
    torch.testing.assert_close(algebra.materialise(fixed.deltas[f"{module}.weight"]), trained)
    kohya.write(fixed, tmp_path / "y.safetensors")
    again = read(local(tmp_path / "y.safetensors"))
    torch.testing.assert_close(algebra.materialise(again.deltas[f"{module}.weight"]), trained)


def test_split_qkv_is_not_assumed_of_what_is_whole(tmp_path):
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    torch.manual_seed(0)
    save_file({f"{module}.lora_down.weight": torch.randn(6, 6),
               f"{module}.lora_up.weight": torch.randn(18, 6)},
              tmp_path / "x.safetensors")  # fmt: skip
    for said in ("fix", "yes"):
        with pytest.raises(LoratoolsError, match="kohya_split_qkv"):
            read(local(tmp_path / "x.safetensors"), kohya_split_qkv=said)


# ------------------------------------------------------------------------------- writing


def leaf(*shape, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Leaf.of("x", torch.randn(*shape).to(dtype))


LOW = LowRank(leaf(2, 6), leaf(4, 2), 1.0)
LOSSES = {
    "embedding rows": ("lora_te_a.weight", Replace(leaf(2, 6), (3, 5)), "trained token rows"),
    "a head": ("lora_te_a.weight", Replace(leaf(2, 6)), "trained in full"),
    "a head's bias": ("lora_te_a.bias", Replace(leaf(2)), "trained in full"),
    "a pair upon a new weight": (
        "lora_te_a.weight", Replace(leaf(4, 6), None, LOW), "trained in full"
    ),
    "another parameter": ("lora_te_a.scale", Dense(leaf(2)), "weight or a bias"),
    "a pair of a bias": ("lora_te_a.in_proj_weight", LOW, "of a weight only"),
    "magnitudes of a difference": (
        "lora_te_a.weight", Renormed(Dense(leaf(4, 6)), leaf(4)), "beside a pair"
    ),
    "another vocabulary": ("model.layers.0.q_proj.weight", LOW, "no kohya name"),
    "no component": ("down_blocks_0.weight", LOW, "no kohya name"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_what_it_cannot_hold_is_named_and_left_out(name, tmp_path):
    key, delta, text = LOSSES[name]
    adapter = Adapter({key: delta, "lora_te_b.weight": LOW}, "peft")
    (problem,) = kohya.lost(adapter)
    assert (problem.code, problem.severity, problem.target) == ("loss", "error", key)
    assert text in problem.message
    kohya.write(adapter, tmp_path / "y.safetensors")
    assert list(read(local(tmp_path / "y.safetensors")).deltas) == ["lora_te_b.weight"]


def test_a_weight_stored_the_other_way_round_is_lost():
    adapter = Adapter({"lora_te_a.weight": LOW}, "peft", transposed=frozenset({"lora_te_a.weight"}))
    assert "stored (in, out)" in kohya.lost(adapter)[0].message


DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
EXTENT = st.integers(1, 5)
SCALING = st.floats(1e-3, 60, allow_nan=False) | st.sampled_from([0.5, 1.0, 2.0, 1 / 3])


@st.composite
def deltas(draw):
    out, width, rank = draw(EXTENT), draw(EXTENT), draw(st.integers(1, 8))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (2,)]))
    dtype, seed = draw(DTYPES), draw(st.integers(0, 9))
    a = leaf(rank, width, *kernel, seed=seed, dtype=dtype)
    b = leaf(out, rank, *(1 for _ in kernel), seed=seed + 1, dtype=dtype)
    low = LowRank(a, b, draw(SCALING))
    match draw(st.sampled_from(["low", "alpha", "out", "in", "dense", "norm"])):
        case "alpha":
            alpha = draw(st.sampled_from([1.0, 8.0, 0.25]))
            return {"weight": LowRank(a, b, alpha / rank, alpha)}
        case "out":
            return {"weight": Renormed(low, leaf(out, dtype=dtype))}
        case "in" if (out, width) != (1, 1):
            return {"weight": Renormed(low, leaf(width, dtype=dtype), "in")}
        case "dense":
            return {"weight": Dense(leaf(out, width, *kernel)), "bias": Dense(leaf(out))}
        case "norm":
            return {"weight": Dense(leaf(out, dtype=dtype)), "bias": Dense(leaf(out))}
    return {"weight": low, "bias": Dense(leaf(out, dtype=dtype))}


@settings(max_examples=150, deadline=None)
@given(modules=st.lists(deltas(), min_size=1, max_size=4))
def test_written_and_read_again_it_is_the_same(modules, tmp_path_factory):
    path = tmp_path_factory.mktemp("k") / "y.safetensors"
    there = {f"lora_unet_m{i}.{p}": d for i, m in enumerate(modules) for p, d in m.items()}
    adapter = Adapter(there, "peft", "kohya")
    assert kohya.lost(adapter) == []
    kohya.write(adapter, path)
    again = read(local(path))
    assert not [p for p in again.problems if p.code not in ("scaling_unusual",)]
    assert again.deltas.keys() == there.keys()
    for key, delta in there.items():
        same(delta, again.deltas[key])


def same(x, y):
    assert type(x) is type(y)
    match x:
        case LowRank():
            assert y.scaling == pytest.approx(x.scaling, rel=1e-15)
            assert x.alpha is None or y.alpha == x.alpha
            assert bits(x.a) == bits(y.a)
            assert bits(x.b) == bits(y.b)
        case Renormed():
            assert x.axis == y.axis
            assert x.magnitude.read() == y.magnitude.read()
            same(x.delta, y.delta)
        case Dense():
            assert bits(x.diff) == bits(y.diff)
            assert y.scaling == 1


def bits(leaf):
    return leaf.dtype, leaf.shape, leaf.read()


def test_scaled_differences_are_multiplied_out(tmp_path):
    adapter = Adapter({"lora_unet_a.bias": Dense(leaf(4, dtype=torch.float16), 0.3)}, "peft")
    kohya.write(adapter, tmp_path / "y.safetensors")
    written = load_file(tmp_path / "y.safetensors")["lora_unet_a.diff_b"]
    expected = leaf(4, dtype=torch.float16).tensor().double() * 0.3
    assert torch.equal(written, expected.float())


def test_an_alpha_that_float32_would_change_is_written_wider(tmp_path):
    for scaling, dtype in ((0.5, torch.float32), (1 / 3, torch.float64)):
        adapter = Adapter({"lora_unet_a.weight": LowRank(leaf(2, 6), leaf(4, 2), scaling)}, "peft")
        kohya.write(adapter, tmp_path / "y.safetensors")
        alpha = load_file(tmp_path / "y.safetensors")["lora_unet_a.alpha"]
        assert alpha.dtype == dtype
        assert alpha.shape == ()
        assert alpha.item() / 2 == scaling
