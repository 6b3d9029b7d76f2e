"""diffusers' files as bytes: keys as the specification has them, what is refused, what is lost."""

import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter import Adapter, Dense, Leaf, LowRank, Renormed, Replace, leaves
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError, shown
from loratools.formats import bfl, cloneofsimo, comfy, xlabs
from loratools.formats import diffusers as form
from loratools.formats.diffusers_settings import METADATA
from loratools.formats.image_keys import FACTORS, HALVES, SINGLE, part_of
from tests.formats.image_bytes import found, key_table, read, write

X = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
Q, K = f"unet.{X}.to_q", f"unet.{X}.to_k"
PAIR = {f"{Q}.lora_A.weight": (2, 6), f"{Q}.lora_B.weight": (4, 2)}
OTHER = {f"{K}.lora_A.weight": (3, 6), f"{K}.lora_B.weight": (4, 3)}


@pytest.mark.parametrize("row", key_table("diffusers"), ids=lambda row: row[0])
@pytest.mark.parametrize("front", ["", "base_model.model.", "module.", "_orig_mod."])
@pytest.mark.parametrize("component", ["unet", "transformer", "text_encoder_2"])
def test_the_reader_has_the_keys_of_the_specification(row, front, component):
    key, module, part = (
        re.sub(r"\bN\b", "default", re.sub(r"\bC\b", component, re.sub(r"\bX\b", X, cell)))
        for cell in row
    )
    if component == "text_encoder_2" and "processor" in key:
        return  # text encoders have their own names in that era: the last rows
    named = part_of(front + key)
    assert named is not None
    assert named.part == part
    assert form._module(named, "unet") == module
    assert named.adapter == ("default" if ".N." in row[0] else "")


def test_the_specifications_have_every_part():
    rows = [*key_table("diffusers"), *key_table("comfy")]
    assert {row[2] for row in rows} == {*SINGLE.values(), *FACTORS.values(), *HALVES.values(),
                                        "B.bias", "mid"}  # fmt: skip


BARE = {
    "unet": [f"{X}.to_q", "mid_block.attentions.0.proj_in"],
    "transformer": ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.3.proj_out",
                    "blocks.7.attn1.to_k"],
}  # fmt: skip


@pytest.mark.parametrize("component", BARE)
def test_keys_without_component_get_one(component, tmp_path):
    for module in BARE[component]:
        shapes = {f"{module}.lora_A.weight": (2, 6), f"{module}.lora_B.weight": (4, 2)}
        adapter = read(form, write(tmp_path / "a.safetensors", shapes))
        assert list(adapter.deltas) == [f"{component}.{module}.weight"]
        assert (adapter.vocabulary, adapter.problems) == ("diffusers", ())


NOT_OURS = [
    "transformer.h.0.attn.c_attn.lora_A.weight",
    "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight",
    "transformer.wte.lora_A.weight",
    "transformer.blocks.0.norm_attn_norm.attn.Wqkv.lora_A.weight",
    "transformer.layers.0.attn.qkv_proj.lora_A.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.layers.0.self_attn.q_proj.lora_A.weight",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
    "lora_transformer_single_transformer_blocks_0_attn_to_k.lora_down.weight",
    "double_blocks.0.processor.qkv_lora1.down.weight",
    "single_blocks.0.processor.qkv_lora.down.weight",
    "double_blocks.0.img_attn.qkv.lora_A.weight",
    "base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight",
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
    "unet.down_blocks.0.resnets.0.conv1.weight",
    "unet:0:down",
    "text_encoder:0:down",
    "decoder.layers.0.self_attn.q_proj.lora_A.weight",
    "transformer.text_model.embeddings.weight",
    "layers.0.self_attn.q_proj.lora_a",
]


@pytest.mark.parametrize("key", NOT_OURS)
def test_files_of_others_are_left_to_them(key, tmp_path):
    assert not form.detect(local(write(tmp_path / "a.safetensors", {key: (2, 6)})))


def test_a_peft_folder_is_pefts(tmp_path):
    write(tmp_path / "adapter_model.safetensors", PAIR)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for bundle in (local(tmp_path), local(tmp_path / "adapter_model.safetensors")):
        assert not any(f.detect(bundle) for f in (form, comfy, bfl, xlabs))


def test_a_folder_with_one_file_is_read(tmp_path):
    write(tmp_path / "my_style.safetensors", PAIR)
    assert read(form, tmp_path).files == ("my_style.safetensors",)
    write(tmp_path / "other.safetensors", OTHER)
    assert not form.detect(local(tmp_path))
    write(tmp_path / "pytorch_lora_weights.safetensors", OTHER)
    assert read(form, tmp_path).files == ("pytorch_lora_weights.safetensors",)


def test_other_files_are_not_refused_by_recognising(tmp_path):
    for name, raw in {
        "a.bin": b"not a zip",
        "b.pt": b"",
        "c.ckpt": b"PK\3\4",
        "d.txt": b"",
    }.items():
        (tmp_path / name).write_bytes(raw)
        assert not form.detect(local(tmp_path / name))


# ------------------------------------------------------------------------------- scaling


def test_a_module_without_alpha_has_scaling_1_whatever_others_have(tmp_path):
    shapes = PAIR | OTHER | {f"{K}.alpha": ((), 12.0)}
    adapter = read(form, write(tmp_path / "a.safetensors", shapes))
    assert (adapter.deltas[f"{Q}.weight"].scaling, adapter.deltas[f"{Q}.weight"].alpha) == (1, None)
    assert (adapter.deltas[f"{K}.weight"].scaling, adapter.deltas[f"{K}.weight"].alpha) == (4, 12)
    assert adapter.problems == ()


def said(**fields):
    return {METADATA: json.dumps({f"unet.{k}": v for k, v in fields.items()})}


SCALINGS = {
    "alpha": (said(r=2, lora_alpha=3, rank_pattern={"to_k": 3}), 1.5, 1.0),
    "rslora": (
        said(r=3, rank_pattern={"to_q": 2}, lora_alpha=3, use_rslora=True), 3 / 2**0.5, 3**0.5
    ),
    "patterns": (
        said(r=2, lora_alpha=1, rank_pattern={f"^{X}.to_k": 3}, alpha_pattern={"attn1.to_k": 6}),
        0.5, 2.0,
    ),
    "bare": (
        {METADATA: json.dumps({"r": 2, "lora_alpha": 4, "rank_pattern": {"to_k": 3}})}, 2, 4 / 3
    ),
    "another component's": ({METADATA: json.dumps({"transformer.r": 9})}, 1.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALINGS)
def test_metadata_gives_the_scalings(case, tmp_path):
    metadata, q, k = SCALINGS[case]
    adapter = read(form, write(tmp_path / "a.safetensors", PAIR | OTHER, metadata))
    assert found(adapter) == []
    scalings = [adapter.deltas[f"{m}.weight"].scaling for m in (Q, K)]
    assert scalings == pytest.approx([q, k], rel=1e-12)


CONFLICTS = {
    "rank": (PAIR, said(r=8, lora_alpha=8), "config_conflict", "r=8, A has 2 rows"),
    "alpha": (
        PAIR | {f"{Q}.alpha": ((), 1.0)}, said(r=2, lora_alpha=8), "config_conflict",
        "alpha 8, .* 1",
    ),
    "pattern": (PAIR, said(r=2, alpha_pattern={"to_z": 1}), "config_conflict", "to_z"),
    "beyond": (PAIR, said(r=2, alpha_pattern={"(?=x)": 1}), "unknown_config", "lookaround"),
    "corda": (PAIR, said(r=2, init_lora_weights="corda"), "residual_base", "the inputs"),
    "runtime": (PAIR, said(r=2, alora_invocation_tokens=[1]), "not_foldable", "alora"),
    "no magnitude": (PAIR, said(r=2, use_dora=True), "missing", "no magnitude"),
    "magnitude": (
        PAIR | {f"{Q}.lora_magnitude_vector": (4,)}, said(r=2, use_dora=False), "config_conflict",
        "use_dora",
    ),
    "half": ({f"{Q}.lora_A.weight": (2, 6)}, {}, "missing", "lora_A without lora_B"),
    "stray": (PAIR | {"unet.foo.bar": (2,)}, {}, "unexplained", "unet.foo.bar"),
    "stray value": (PAIR | {f"{Q}.bias": (4,)}, {}, "unexplained", "to_q.bias"),
    "comfy": (PAIR | {"diffusion_model.q.lora_A.weight": (2, 2)}, {}, "unexplained", "diffusion_m"),
    "kohya": (PAIR | {"lora_unet_x.lora_down.weight": (2, 2)}, {}, "unexplained", "lora_unet_x"),
    "lokr": (PAIR | {f"{K}.lokr_w1": (2, 2)}, {}, "missing", "lokr_w1 without lokr_w2"),
    "loha": (PAIR | {f"{K}.hada_w1_a": (2, 2)}, {}, "missing", "hada_w1_a without hada"),
    "glora": (PAIR | {f"{K}.a1.weight": (2, 2)}, {}, "missing", "a1.weight without a2"),
    "two names": (
        {k.replace(".weight", ".one.weight"): s for k, s in PAIR.items()}
        | {k.replace(".weight", ".two.weight"): s for k, s in OTHER.items()},
        {}, "unexplained", "one, two",
    ),
    "only alpha": (PAIR | {f"{K}.alpha": ()}, {}, "missing", "to_k has neither"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFLICTS)
def test_what_contradicts_is_found(case, tmp_path):
    shapes, metadata, code, text = CONFLICTS[case]
    adapter = read(form, write(tmp_path / "a.safetensors", shapes, metadata))
    errors = found(adapter)
    assert [c for c, _ in errors] == [code]
    assert re.search(text, errors[0][1])


RAISED = {
    "no json": (PAIR, {METADATA: "{"}, "malformed"),
    "a list": (PAIR, {METADATA: "[1]"}, "malformed"),
    "a field twice": (PAIR, {METADATA: '{"unet.r": 1, "unet.r": 2}'}, "duplicate"),
    "patterns as text": (PAIR, said(r=2, alpha_pattern="to_q"), "malformed"),
    "alpha as text": (PAIR, said(r=2, lora_alpha="4"), "malformed"),
    "alphas": (PAIR | {f"{Q}.alpha": (2,)}, {}, "malformed"),
    "another spelling that differs": (PAIR | {f"{Q}.lora.down.weight": (2, 6)}, {}, "duplicate"),
    "kohya's name that differs": (
        PAIR | {f"lora_unet_{X.replace('.', '_')}_to_q.lora_up.weight": (4, 2)}, {}, "duplicate"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RAISED)
def test_what_no_reader_should_take_is_raised(case, tmp_path):
    shapes, metadata, code = RAISED[case]
    with pytest.raises(LoratoolsError) as refused:
        read(form, write(tmp_path / "a.safetensors", shapes, metadata))
    assert (refused.value.code, refused.value.exit) == (code, 3)


def test_equal_copies_in_other_names_are_a_note(tmp_path):
    a, b = ((2, 6), 1.5), ((4, 2), 0.5)
    flux = "transformer.single_transformer_blocks.0.attn.to_k"
    tensors = {
        f"{flux}.lora_down.weight": a, f"{flux}.lora_up.weight": b, f"{flux}.alpha": ((), 4.0),
        f"{flux}.lora_A.weight": a,
        "lora_unet_single_transformer_blocks_0_attn_to_k.lora_down.weight": a,
        "lora_unet_single_transformer_blocks_0_attn_to_k.lora_up.weight": b,
        "lora_unet_single_transformer_blocks_0_attn_to_k.alpha": ((), 4.0),
    }  # fmt: skip
    adapter = read(form, write(tmp_path / "a.safetensors", tensors))
    assert list(adapter.deltas) == [f"{flux}.weight"]
    assert adapter.deltas[f"{flux}.weight"].scaling == 2
    assert found(adapter) == []
    notes = [message for _, message in found(adapter, "note")]
    assert len(notes) == 2
    assert "3 tensors in kohya's names are copies" in notes[0]
    assert "1 tensors are copies" in notes[1]


def test_alpha_is_assumed_only_where_the_file_is_silent(tmp_path):
    file = write(tmp_path / "a.safetensors", PAIR)
    assert read(form, file, alpha="6").deltas[f"{Q}.weight"].scaling == 3
    file = write(tmp_path / "b.safetensors", PAIR | {f"{Q}.alpha": ((), 2.0)})
    with pytest.raises(LoratoolsError, match="has alpha 2") as refused:
        read(form, file, alpha="6")
    assert refused.value.code == "usage"


def test_hunyuan_videos_own_names_are_original(tmp_path):
    module = "double_blocks.0.img_attn_qkv"
    shapes = {
        f"transformer.{module}.lora_A.weight": (2, 6),
        f"transformer.{module}.lora_B.weight": (9, 2),
    }
    adapter = read(form, write(tmp_path / "a.safetensors", shapes))
    assert adapter.vocabulary == "original"
    assert list(adapter.deltas) == [f"diffusion_model.{module}.weight"]


def test_doras_axes_and_biases(tmp_path):
    module = f"unet.{X}.to_out.0"
    shapes = {
        f"{module}.lora_A.weight": (2, 6), f"{module}.lora_B.weight": (4, 2),
        f"unet.{X}.to_out.lora_magnitude_vector": (4,), f"{module}.lora_B.bias": (4,),
        f"{module}.alpha": ((), 1.0), **PAIR, f"{Q}.dora_scale": (1, 6),
    }  # fmt: skip
    adapter = read(form, write(tmp_path / "a.safetensors", shapes))
    assert adapter.problems == ()
    rows, columns = adapter.deltas[f"{module}.weight"], adapter.deltas[f"{Q}.weight"]
    assert isinstance(rows, Renormed)
    assert isinstance(columns, Renormed)
    assert (rows.axis, columns.axis) == ("out", "in")
    assert adapter.deltas[f"{module}.bias"].scaling == 0.5


# ------------------------------------------------------------------------------- writing


def leaf(*shape: int) -> Leaf:
    import torch

    return Leaf.of("x", torch.arange(float(torch.Size(shape).numel())).reshape(shape))


def pair(scaling: float = 1.0, alpha: float | None = None) -> LowRank:
    return LowRank(leaf(2, 6), leaf(4, 2), scaling, alpha)


LOST = {
    "a difference": ({"unet.x.weight": Dense(leaf(4, 6))}, "Dense"),
    "a bias alone": ({"unet.x.bias": Dense(leaf(4))}, "Dense"),
    "columns": ({"unet.x.weight": Renormed(pair(), leaf(6), "in")}, "by column"),
    "a value": ({"unet.norm_q.weight": Replace(leaf(4))}, "Replace"),
    "a head": ({"transformer.head.weight": Replace(leaf(4, 6))}, "a value in full"),
    "no component": ({"model.layers.0.weight": pair()}, "no component"),
    "no magnitude": ({"unet.x.weight": pair(), "unet.y.weight": Renormed(pair(), leaf(4))}, "DoRA"),
}


@pytest.mark.parametrize("case", LOST)
def test_what_diffusers_cannot_hold_is_named(case, tmp_path):
    deltas, why = LOST[case]
    adapter = Adapter({**deltas, "transformer.q.weight": pair()}, vocabulary="diffusers")
    problems = form.lost(adapter)
    first = next(iter(deltas))
    assert [(p.code, p.severity, p.target) for p in problems] == [("loss", "error", first)]
    assert why in problems[0].message
    form.write(adapter, tmp_path / "a.safetensors")
    assert first not in read(form, tmp_path / "a.safetensors").deltas


def test_only_embeddings_are_transposed(tmp_path):
    key = "text_encoder.embeddings.token_embedding.weight"
    adapter = Adapter({key: pair()}, vocabulary="diffusers", transposed=frozenset({key}))
    assert [p.target for p in form.lost(adapter)] == [key]


def test_scalings_are_kept_where_alpha_over_rank_is_exact(tmp_path):
    deltas = {
        "unet.a.weight": pair(1.5, 3.0), "unet.b.weight": pair(0.1), "unet.c.weight": pair(1 / 3),
        "unet.d.weight": pair(0.0, 0.0), "unet.e.weight": pair(-2.0),
        "unet.c.bias": Dense(leaf(4), 5.0),
        "text_encoder.text_model.encoder.x.weight": pair(0.25),
    }  # fmt: skip
    adapter = Adapter(deltas, vocabulary="diffusers", metadata={"mine": "yes"})
    assert form.lost(adapter) == []
    written = form.write(adapter, tmp_path)
    assert list(written) == ["pytorch_lora_weights.safetensors"]
    back = read(form, tmp_path)
    assert found(back) == []
    assert back.metadata["mine"] == "yes"
    for key, delta in deltas.items():
        there = back.deltas[key]
        assert there.scaling == delta.scaling or isinstance(delta, Dense)
        if isinstance(delta, LowRank):
            assert there.a.read() == delta.a.read()
            assert there.b.read() == delta.b.read()
    assert back.deltas["unet.c.bias"].scaling * back.deltas["unet.c.bias"].diff.numbers()[3] == (
        pytest.approx(15)
    )
    assert set(back.deltas["unet.a.bias"].diff.numbers()) == {0.0}


def test_names_that_patterns_cannot_hold_take_the_scaling_into_b(tmp_path):
    adapter = Adapter(
        {"unet.a+b.weight": pair(0.5), "unet.c.weight": pair(2.0)}, vocabulary="diffusers"
    )
    form.write(adapter, tmp_path)
    back = read(form, tmp_path)
    assert METADATA not in back.metadata
    assert [d.scaling for d in back.deltas.values()] == [1, 1]
    assert back.deltas["unet.c.weight"].b.numbers() == tuple(2.0 * i for i in range(8))


SCALED = st.tuples(
    st.integers(1, 9),
    st.one_of(
        st.integers(-64, 64).map(float),
        st.floats(1e-6, 1e6, allow_nan=False),
        st.none(),
    ),
    st.floats(-1e3, 1e3, allow_nan=False),
)


@settings(max_examples=60)
@given(st.lists(SCALED, min_size=1, max_size=6), st.booleans())
def test_ranks_alphas_and_scalings_come_back(modules, root):
    """Whatever the scalings: they come back to the last bit, or stand in B."""
    deltas: dict[str, LowRank] = {}
    for i, (rank, alpha, scaling) in enumerate(modules):
        a, b = leaf(rank, 3), leaf(2, rank)
        given_by = scaling if alpha is None else alpha / (rank**0.5 if root else rank)
        deltas[f"unet.blocks.{i}.to_q.weight"] = LowRank(a, b, given_by, alpha)
    config = {"unet.use_rslora": root}
    adapter = Adapter(deltas, format="diffusers", vocabulary="diffusers", config=config)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.safetensors"
        form.write(adapter, file)
        back = read(form, file)
        assert {code for code, _ in found(back)} <= {"no_effect"}
        for key, delta in deltas.items():
            there = back.deltas[key]
            assert isinstance(there, LowRank)
            assert there.a.read() == delta.a.read()
            if there.scaling == delta.scaling:
                assert there.b.read() == delta.b.read()
            else:
                assert there.scaling == 1
                wanted = [delta.scaling * n for n in delta.b.numbers()]
                assert there.b.numbers() == pytest.approx(wanted, rel=1e-7)


def test_clip_layers_in_kohyas_names_beside_it_are_read(tmp_path):
    layers = {
        "lora_te_text_model_encoder_layers_11_mlp_fc2":
            "text_encoder.text_model.encoder.layers.11.mlp.fc2",
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj":
            "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
        "lora_te2_text_model_encoder_layers_31_self_attn_q_proj":
            "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj",
    }  # fmt: skip
    shapes = dict(PAIR)
    for old in layers:
        shapes |= {f"{old}.lora_down.weight": (2, 6), f"{old}.lora_up.weight": (4, 2),
                   f"{old}.alpha": ()}  # fmt: skip
    adapter = read(form, write(tmp_path / "a.safetensors", shapes))
    assert found(adapter) == []
    assert set(adapter.deltas) == {f"{Q}.weight", *(f"{new}.weight" for new in layers.values())}


# ------------------------------------------------------------------------------- hostile

WORDS = st.sampled_from(
    [
        *"""unet transformer text_encoder diffusion_model double_blocks img_in lora_unet_x lora_te_
        to_out lora_A lora_B lora_down lora_up lora lora_linear_layer to_q_lora _lora down up weight
        bias alpha diff diff_b set_weight reshape_weight lora_mid processor base_model model norm_q
        default lora_magnitude_vector dora_scale lokr_w1 a1 unet:0:up unet:0:down query_norm scale
        module _orig_mod base_layer blocks attn1 0 7""".split(),
        "",
        "\n",
        "é",
        "a b",
    ]
)
FRONTS = st.sampled_from(["unet.x", "diffusion_model.x", "double_blocks.0", "transformer.y", "z"])
ENDS = st.sampled_from(["lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight"])
KEYS = st.one_of(
    st.lists(WORDS, min_size=1, max_size=6).map(".".join),
    st.tuples(FRONTS, WORDS).map(".".join),
    st.tuples(FRONTS, ENDS).map(".".join),
)
SIZES = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@settings(max_examples=300)
@given(st.dictionaries(KEYS, SIZES, max_size=8))
def test_no_names_and_shapes_break_the_readers(shapes):
    """Whatever the file says: an answer or one of our own errors, and no tensor goes missing."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.safetensors", shapes)
        for reader in (form, xlabs, bfl, comfy, cloneofsimo):
            try:
                if not reader.detect(local(path)):
                    continue
                adapter = reader.read(local(path), assume={})
                problems = [*adapter.problems, *form.lost(adapter)]
                form.write(adapter, Path(folder) / "b.safetensors")
            except LoratoolsError:
                continue
            told = " ".join(f"{p.message} {p.target}" for p in problems)
            used = {one.name for d in adapter.deltas.values() for one in leaves(d)}
            for key in shapes:
                part = part_of(key)
                names = {shown(key), key.rpartition(":")[0] or key}
                if part is not None:
                    address = form._module(part, "unet") or key
                    names |= {part.module.split(".")[-1], address.split(".")[-1]}
                within = part is not None and part.part in ("alpha", "mid", "reshape")
                spread = "copies" in told or "adapters:" in told
                assert key in used or within or spread or any(n in told for n in names)
