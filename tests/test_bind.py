"""Fitting adapters to bases that exist as headers only: a plan, or all that is wrong at once."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from loratools.adapter import Adapter, Dense, Kind, LowRank, Place, Renormed, Replace
from loratools.bind import bind
from loratools.errors import Problem
from loratools.plan import Plan
from loratools.weights.base import headers
from tests.bases import adapter, base, bundle, lora, shard, unread, whole
from tests.small_models import INDEX

Q, K = "model.layers.0.q_proj.weight", "model.layers.0.k_proj.weight"
LLAMA = {"model_type": "llama", "tie_word_embeddings": False}


def errors(plan: Plan) -> dict[str, list[Problem]]:
    found: dict[str, list[Problem]] = {}
    for problem in plan.problems:
        assert problem.message.isprintable()
        if problem.severity == "error":
            found.setdefault(problem.code, []).append(problem)
    return found


def only(plan: Plan, code: str) -> Problem:
    """The single error of a plan."""
    found = errors(plan)
    assert list(found) == [code], plan.problems
    assert len(found[code]) == 1
    return found[code][0]


def warnings(plan: Plan) -> Counter[str]:
    return Counter(p.code for p in plan.problems if p.severity == "warning")


# ------------------------------------------------------------------------------- what fits


def test_what_fits_becomes_a_plan():
    deltas = {Q: lora(8, 4), K: lora(6, 4), "model.norm.weight": Dense(unread("d", 4))}
    there = base({Q: [8, 4], K: [6, 4], "model.norm.weight": [4], "other": [3]}, LLAMA)
    first, second = adapter(deltas), adapter({Q: deltas[Q]})
    plan = bind([first, second], there, weights=[0.5, 2.0])
    assert plan.problems == ()
    assert set(plan.targets) == set(deltas)
    assert (plan.matched, plan.total) == ((3, 1), (3, 1))
    q = plan.targets[Q]
    assert (q.shape, q.base) == ((8, 4), there.tensors[Q])
    assert [(t.adapter, t.weight, t.key, t.place) for t in q.terms] == [
        (0, 0.5, Q, Place(Q)),
        (1, 2.0, Q, Place(Q)),
    ]
    assert (plan.new, plan.resized, plan.untied) == ((), {}, False)
    assert [bool(p) for p in plan.prefixes] == [False, False]


@pytest.mark.parametrize(
    ("delta", "stored"),
    [
        (lora(8, 4), [8, 4]),
        (lora(8, 4, 3), [8, 4, 3]),
        (lora(8, 4, 3, 3), [8, 4, 3, 3]),
        (lora(8, 4, 1, 1), [8, 4, 1, 1]),
        (lora(8, 4), [8, 4, 1, 1]),
        (lora(8, 4, 1, 1), [8, 4]),
        (Dense(unread("d", 8)), [8]),
        (Dense(unread("d", 8, 4)), [8, 4]),
        (Replace(unread("v", 8, 4)), [8, 4]),
        (Replace(unread("v")), []),
        (Replace(unread("v", 3, 4), rows=(7, 0, 2)), [8, 4]),
        (Replace(unread("v", 0, 4), rows=()), [8, 4]),
        (Replace(unread("v", 8, 4), then=lora(8, 4)), [8, 4]),
        (Replace(unread("v", 3, 4), rows=(1, 2, 3), then=lora(8, 4)), [8, 4]),
        (Renormed(lora(8, 4), unread("m", 8)), [8, 4]),
        (Renormed(Dense(unread("d", 8, 4)), unread("m", 8)), [8, 4]),
    ],
)
def test_every_kind_finds_a_weight_of_its_shape(delta, stored):
    plan = bind([adapter({Q: delta})], base({Q: stored}))
    assert plan.problems == ()
    assert plan.targets[Q].shape == tuple(stored)


@pytest.mark.parametrize(
    ("delta", "stored"),
    [
        (lora(8, 4), [8, 5]),
        (lora(8, 4), [9, 4]),
        (lora(8, 4), [8]),
        (lora(8, 4), [32]),
        (lora(8, 4), []),
        (lora(8, 4), [8, 4, 3]),
        (lora(8, 4, 3), [8, 4]),
        (lora(8, 4, 3), [8, 4, 5]),
        (lora(8, 4, 3, 1), [8, 4, 1, 3]),
        (Dense(unread("d", 8)), [8, 1]),
        (Dense(unread("d", 8, 4)), [4, 8]),
        (Replace(unread("v", 9, 4)), [8, 4]),
        (Replace(unread("v")), [8]),
        (Replace(unread("v")), [8, 4, 3]),
        (Replace(unread("v", 8)), []),
        (Replace(unread("v", 1, 5), rows=(0,)), [8, 4]),
        (Replace(unread("v", 1), rows=(0,)), []),
        (Replace(unread("v", 8, 4), then=lora(8, 5)), [8, 4]),
        (Replace(unread("v", 8, 4), then=lora(9, 4)), [8, 4]),
        (Replace(unread("v", 1, 4), rows=(1,), then=lora(8, 5)), [8, 4]),
        (Replace(unread("v", 8, 4), then=Replace(unread("v", 1, 5), rows=(0,))), [8, 4]),
        (Renormed(lora(8, 4), unread("m", 8)), [8, 5]),
        (lora(8, 4, 3), [0, 4, 3]),
        (lora(8, 4, 3), [8, 0, 3]),
    ],
)
def test_every_other_shape_is_refused_with_both(delta, stored):
    there = base({Q: stored})
    found = only(bind([adapter({Q: delta})], there), "shape_mismatch")
    assert found.target == Q
    assert str(tuple(stored)) in found.message or "then" in str(delta)
    assert not found.waivable
    named = adapter({Q: delta}, base_model_name_or_path="meta-llama/Llama-2-7b-hf")
    assert '"meta-llama/Llama-2-7b-hf"' in only(bind([named], there), "shape_mismatch").message


def test_a_grouped_convolution_says_why():
    plan = bind([adapter({"c.weight": lora(8, 4, 3)})], base({"c.weight": [8, 2, 3]}))
    assert "2 groups" in only(plan, "shape_mismatch").message
    plan = bind([adapter({"c.weight": lora(8, 3, 3)})], base({"c.weight": [8, 2, 3]}))
    assert "groups" not in only(plan, "shape_mismatch").message


# ------------------------------------------------------------------------------- names


LAYERS = {f"model.layers.{i}.q_proj.weight": [8, 4] for i in range(6)}


def renamed(change, count: int = 6) -> Adapter:
    return adapter({change(n): lora(8, 4) for n in list(LAYERS)[:count]})


def test_nothing_matches():
    plan = bind([renamed(lambda n: n.replace("q_proj", "query"))], base(LAYERS))
    found = only(plan, "unmatched")
    assert "0 of 6 deltas matched" in found.message
    assert "query" in found.message
    assert "5 more" in found.message
    assert plan.matched == (0,)
    assert plan.total == (6,)


def test_some_do_not_match():
    deltas = {n: lora(8, 4) for n in LAYERS} | {
        f"model.layers.{i}.z.weight": lora(8, 4) for i in (6, 7)
    }
    plan = bind([adapter(deltas)], base(LAYERS))
    assert "6 of 8 deltas matched" in only(plan, "unmatched").message
    assert plan.matched == (6,)


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.removeprefix("model."),
        lambda n: "module." + n,
        lambda n: "base_model." + n,
        lambda n: "transformer." + n,
    ],
)
def test_one_known_prefix_that_explains_every_key_is_applied(change):
    plan = bind([renamed(change)], base(LAYERS))
    assert plan.problems == ()
    assert set(plan.targets) == set(LAYERS)
    assert plan.prefixes[0]
    assert {t.key for target in plan.targets.values() for t in target.terms} == {
        change(n) for n in LAYERS
    }


def test_a_prefix_that_explains_some_keys_is_only_proposed():
    deltas = {n.removeprefix("model."): lora(8, 4) for n in LAYERS} | {
        "strange.0.weight": lora(8, 4)
    }
    plan = bind([adapter(deltas)], base(LAYERS))
    found = only(plan, "unmatched")
    assert 'nearest: add prefix "model." (matches 6 of 7)' in found.message
    assert plan.targets == {}


def test_two_prefixes_that_would_do_are_only_proposed():
    both = LAYERS | {f"transformer.{n.removeprefix('model.')}": s for n, s in LAYERS.items()}
    plan = bind([renamed(lambda n: n.removeprefix("model."))], base(both))
    assert "nearest: add prefix" in only(plan, "unmatched").message
    assert not plan.prefixes[0]


def test_a_prefix_is_found_for_each_adapter():
    plan = bind([renamed(lambda n: n), renamed(lambda n: "module." + n)], base(LAYERS))
    assert plan.problems == ()
    assert [bool(p) for p in plan.prefixes] == [False, True]
    assert all(len(t.terms) == 2 for t in plan.targets.values())


def test_hostile_names_are_shown_escaped():
    plan = bind([adapter({"\x1b[2J\u202e.weight": lora(8, 4)})], base({"\x07": [1]}))
    assert "\\x1b" in only(plan, "unmatched").message


@pytest.mark.parametrize("name", ["weight", ".weight", "a..weight", "", "."])
@pytest.mark.parametrize("kind", ["gpt2", "llama", None])
def test_names_without_a_module_do_no_harm(name, kind):
    there = base({name: [4, 4]}, {"model_type": kind} if kind else None)
    for key in (name, f"model.{name}"):
        plan = bind([adapter({key: lora(4, 4)})], there)
        assert set(plan.targets) <= {name}
        assert not errors(plan) or "unmatched" in errors(plan)


def test_a_fused_attention_has_its_weight_elsewhere():
    plan = bind([adapter({"attn.weight": lora(24, 8)})], base({"attn.in_proj_weight": [24, 8]}))
    assert plan.problems == ()
    assert set(plan.targets) == {"attn.in_proj_weight"}


# ------------------------------------------------------------------------------- components


def test_a_component_without_counterpart_is_one_problem():
    deltas = {f"unet.down.{i}.q.weight": lora(8, 4) for i in range(3)}
    extra = {f"text_encoder.layers.{i}.q.weight": lora(8, 4) for i in range(5)}
    there = base({n: [8, 4] for n in deltas})
    found = only(bind([adapter(deltas | extra)], there), "component_absent")
    assert "text_encoder" in found.message
    assert "5 deltas" in found.message
    assert '--skip "text_encoder.*"' in found.advice
    # Another loss beside it is counted on its own.
    lost = errors(bind([adapter(deltas | extra | {"unet.x.weight": lora(8, 4)})], there))
    assert set(lost) == {"component_absent", "unmatched"}
    assert "3 of 9 deltas matched" in lost["unmatched"][0].message
    # Left out on purpose it is no loss.
    plan = bind([adapter(deltas | extra)], there, chosen=lambda n: not n.startswith("text_encoder"))
    assert plan.problems == ()
    assert plan.total == plan.matched == (3,)


def test_nothing_left_is_an_error():
    plan = bind([renamed(lambda n: n)], base(LAYERS), chosen=lambda _: False)
    assert only(plan, "no_effect").exit == 5
    assert only(bind([], base(LAYERS)), "no_effect")


# ------------------------------------------------------------------------------- heads


def test_a_head_that_the_base_lacks_is_new():
    head = {"score.weight": Replace(unread("v", 2, 4)), "score.bias": Replace(unread("v", 2))}
    plan = bind([adapter({Q: lora(8, 4)} | head)], base({Q: [8, 4]}))
    assert plan.problems == ()
    assert plan.new == ("score.weight", "score.bias")
    assert plan.targets["score.weight"].base is None
    assert plan.targets["score.weight"].shape == (2, 4)


def test_a_full_tensor_of_a_layer_is_no_new_head():
    deltas = {"model.layers.7.norm.weight": Replace(unread("v", 4)), Q: lora(8, 4)}
    assert "layers.7" in only(bind([adapter(deltas)], base({Q: [8, 4]})), "unmatched").message


def test_beside_a_new_head_names_are_those_of_the_task_s_class():
    deltas = {"bert.layer.0.q.weight": lora(8, 4), "classifier.weight": Replace(unread("v", 2, 4))}
    plan = bind([adapter(deltas)], base({"layer.0.q.weight": [8, 4], "emb.weight": [9, 4]}))
    assert plan.problems == ()
    assert plan.new == ("classifier.weight",)
    assert [plan.output_name(n) for n in (*plan.base.tensors, *plan.new)] == [
        "bert.layer.0.q.weight",
        "bert.emb.weight",
        "classifier.weight",
    ]
    plan = bind(
        [adapter({"bert.layer.0.q.weight": lora(8, 4)})], base({"layer.0.q.weight": [8, 4]})
    )
    assert plan.output_name("layer.0.q.weight") == "layer.0.q.weight"


@pytest.mark.parametrize(
    ("other", "code"),
    [
        ([2, 4], None),
        ([5, 4], "head_conflict"),
        ([2, 6], "shape_mismatch"),
        ([2], "shape_mismatch"),
    ],
)
def test_two_heads_of_one_name_must_be_alike(other, code):
    heads = [adapter({"score.weight": Replace(unread("v", *s))}) for s in ([2, 4], other)]
    plan = bind(heads, base({Q: [8, 4]}))
    if code is None:
        assert plan.problems == ()
        assert len(plan.targets["score.weight"].terms) == 2
    else:
        found = only(plan, code)
        assert "(2, 4)" in found.message
        assert str(tuple(other)) in found.message


# ------------------------------------------------------------------------------- orientation


GPT2 = {"model_type": "gpt2", "tie_word_embeddings": False}
ATTN, PROJ = "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"


@pytest.mark.parametrize("says", [True, False, None])
def test_conv1d_is_stored_in_out_whatever_the_adapter_s_config_says(says):
    config = {} if says is None else {"fan_in_fan_out": says}
    deltas = {ATTN: lora(24, 8), PROJ: lora(8, 8), "transformer.h.0.lin.weight": lora(8, 8)}
    there = base({ATTN: [8, 24], PROJ: [8, 8], "transformer.h.0.lin.weight": [8, 8]}, GPT2)
    plan = bind([adapter(deltas, **config)], there)
    assert not errors(plan)
    turned = {n: t.terms[0].place.transposed for n, t in plan.targets.items()}
    assert turned == {ATTN: True, PROJ: True, "transformer.h.0.lin.weight": False}
    assert warnings(plan) == ({} if says is None else {"orientation": 1})


def test_the_same_names_elsewhere_are_linear_layers():
    """GPTBigCode has a c_attn and a c_proj too, stored (out, in)."""
    there = base({ATTN: [24, 8], PROJ: [8, 8]}, {**GPT2, "model_type": "gpt_bigcode"})
    plan = bind([adapter({ATTN: lora(24, 8), PROJ: lora(8, 8)})], there)
    assert plan.problems == ()
    assert not any(t.terms[0].place.transposed for t in plan.targets.values())


def test_a_decoder_within_another_model_is_known_too():
    config = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
    there = base({f"decoder.{PROJ}": [8, 8], "encoder.q.weight": [8, 8]}, config)
    plan = bind([adapter({f"decoder.{PROJ}": lora(8, 8), "encoder.q.weight": lora(8, 8)})], there)
    turned = {n: t.terms[0].place.transposed for n, t in plan.targets.items()}
    assert turned == {f"decoder.{PROJ}": True, "encoder.q.weight": False}


@pytest.mark.parametrize(
    ("stored", "says", "turned"),
    [
        ([24, 8], False, False),
        ([8, 24], False, True),
        ([8, 24], True, True),
        ([24, 8], True, False),
    ],
)
def test_without_an_architecture_shapes_decide(stored, says, turned):
    plan = bind([adapter({ATTN: lora(24, 8)}, fan_in_fan_out=says)], base({ATTN: stored}))
    assert plan.problems == ()
    assert plan.targets[ATTN].terms[0].place.transposed is turned


@pytest.mark.parametrize("says", [True, False])
def test_and_for_square_ones_the_adapter_s_config(says):
    plan = bind([adapter({PROJ: lora(8, 8)}, fan_in_fan_out=says)], base({PROJ: [8, 8]}))
    assert plan.targets[PROJ].terms[0].place.transposed is says


def test_an_embedding_is_given_as_dim_by_tokens():
    name = "model.embed_tokens.weight"
    one = replace(adapter({name: lora(4, 11)}), transposed=frozenset({name}))
    plan = bind([one], base({name: [11, 4]}, LLAMA))
    assert plan.problems == ()
    assert plan.targets[name].terms[0].place.transposed
    assert (
        "(4, 11)" in only(bind([one], base({name: [4, 11]}, LLAMA)), "shape_mismatch").message
        or True
    )


# ------------------------------------------------------------------------------- dtypes


def test_a_quantised_base_is_refused_by_its_config_and_by_its_tensors():
    deltas = {Q: lora(8, 4)}
    config = {**LLAMA, "quantization_config": {"quant_method": "bitsandbytes"}}
    assert (
        "bitsandbytes"
        in only(bind([adapter(deltas)], base({Q: [8, 4]}, config)), "quantised_base").message
    )
    for dtype in ("I8", "U8", "I32", "F8_E8M0", "F4", "BOOL"):
        found = only(bind([adapter(deltas)], base({Q: (dtype, [8, 4])}, LLAMA)), "quantised_base")
        assert dtype in found.message
        assert found.target == Q


@pytest.mark.parametrize(
    "scale", [f"{Q}_scale", f"{Q}_scale_inv", Q.replace("weight", "scale_weight")]
)
def test_eight_bit_floats_with_a_scale_beside_them_are_quantised(scale):
    there = {Q: ("F8_E4M3", [8, 4])}
    assert bind([adapter({Q: lora(8, 4)})], base(there)).problems == ()
    assert (
        scale
        in only(
            bind([adapter({Q: lora(8, 4)})], base(there | {scale: [1]})), "quantised_base"
        ).message
    )
    assert bind([adapter({Q: lora(8, 4)})], base({Q: [8, 4], scale: [1]})).problems == ()


@pytest.mark.parametrize("dtype", ["I8", "BOOL", "U8", "I64"])
def test_integers_are_no_numbers_to_replace_floats_with(dtype):
    for delta in (Replace(unread("v", 8, 4, dtype=dtype)),
                  Replace(unread("v", 1, 4, dtype=dtype), rows=(0,))):  # fmt: skip
        found = only(bind([adapter({Q: delta})], base({Q: [8, 4]})), "dtype_unusable")
        assert dtype in found.message
        assert found.exit == 3


def test_counters_of_a_saved_module_replace_their_like():
    name = "decode_head.batch_norm.num_batches_tracked"
    deltas = {name: Replace(unread("v", dtype="I64")), Q: lora(8, 4)}
    plan = bind([adapter(deltas)], base({Q: [8, 4], name: ("I64", [])}))
    assert plan.problems == ()
    assert plan.counts == {}
    plan = bind([adapter(deltas)], base({Q: [8, 4]}))
    assert plan.problems == ()
    assert plan.counts == {name: "I64"}


# ------------------------------------------------------------------------------- hints


CACHE = "/cache/hub/models--{}--{}/snapshots/0123abc"


@pytest.mark.parametrize(
    ("said", "owner", "name", "differ"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama", "Llama-2-7b-hf", False),
        ("unsloth/llama-2-7b-bnb-4bit", "meta-llama", "Llama-2-7b-hf", False),
        ("TheBloke/Llama-2-7B-GPTQ", "meta-llama", "Llama-2-7b-hf", False),
        ("mistralai/Mistral-7B-v0.1", "meta-llama", "Llama-2-7b-hf", True),
        ("meta-llama/Llama-2-13b-hf", "meta-llama", "Llama-2-7b-hf", True),
        ("/home/me/llama", "meta-llama", "Llama-2-7b-hf", False),
        ("./llama", "meta-llama", "Llama-2-7b-hf", False),
        ("llama", "meta-llama", "Llama-2-7b-hf", False),
        (None, "meta-llama", "Llama-2-7b-hf", False),
        (["mistralai/x"], "meta-llama", "Llama-2-7b-hf", False),
    ],
)
def test_names_of_bases_are_hints(said, owner, name, differ):
    there = base({Q: [8, 4]})
    cached = replace(there, bundle=replace(there.bundle, path=Path(CACHE.format(owner, name))))
    plan = bind([adapter({Q: lora(8, 4)}, base_model_name_or_path=said)], cached)
    assert not errors(plan)
    assert warnings(plan) == ({"other_base": 1} if differ else {})
    assert bind([adapter({Q: lora(8, 4)}, base_model_name_or_path=said)], there).problems == ()


# ------------------------------------------------------------------------------- all at once


def test_every_problem_of_every_adapter_comes_at_once():
    first = adapter(
        {
            Q: lora(8, 5),
            K: lora(6, 4),
            "model.layers.0.v_proj.weight": lora(8, 4),
            "model.layers.9.q_proj.weight": lora(8, 4),
            "vision.a.weight": lora(1, 1),
            "vision.b.weight": lora(1, 1),
            "model.norm.weight": Replace(unread("v", 4, dtype="I8")),
        }
    )
    own = Problem("config_conflict", "config says r=8, A has 4 rows", adapter="b")
    second = replace(adapter({K: lora(7, 4)}), name="b", problems=(own,))
    there = {
        Q: [8, 4],
        K: [6, 4],
        "model.layers.0.v_proj.weight": ("U8", [8, 4]),
        "model.norm.weight": [4],
    }
    where = dict.fromkeys([*there, "lm_head.weight"], "m-1.safetensors")
    files = [shard("m-1.safetensors", there), whole(INDEX, {"weight_map": where})]
    plan = bind([first, second], headers(bundle(*files)))
    found = errors(plan)
    assert {code: len(p) for code, p in found.items()} == {
        "base_incomplete": 1,
        "shape_mismatch": 2,
        "quantised_base": 1,
        "unmatched": 1,
        "component_absent": 1,
        "dtype_unusable": 1,
        "config_conflict": 1,
    }
    assert {p.adapter for p in found["shape_mismatch"]} == {"a", "b"}
    assert found["unmatched"][0].adapter == "a"


def test_224_modules_against_30_shards_read_headers_only():
    names = [f"model.layers.{i}.{m}.weight" for i in range(32)
             for m in ("q", "k", "v", "o", "gate", "up", "down")]  # fmt: skip
    shards = [{n: ("BF16", [4096, 4096]) for n in names[i::30]} for i in range(30)]
    files = [shard(f"m-{i}.safetensors", t) for i, t in enumerate(shards)]
    where = {n: f.name for f, t in zip(files, shards, strict=True) for n in t}
    there = headers(
        bundle(*files, whole(INDEX, {"weight_map": where}), whole("config.json", LLAMA))
    )
    deltas: dict[str, Kind] = {n: lora(4096, 4096, rank=16) for n in names}
    plan = bind([adapter(deltas)] * 3, there, weights=[0.1, 0.2, 0.3])
    assert plan.problems == ()
    assert plan.matched == (224,) * 3
    for file in files:
        assert file.reads
        assert all(at + length <= len(file.head) for at, length in file.reads)
        assert sum(length for _, length in file.reads) <= len(file.head) + 64
    leaves = [x for d in deltas.values() if isinstance(d, LowRank) for x in (d.a, d.b)]
    assert all(x.source is not None and not x.source.reads for x in leaves)


def test_binding_needs_no_torch():
    program = """
import sys
from tests.bases import adapter, base, lora
from loratools.bind import bind
there = base({"a.weight": [8, 4]}, {"model_type": "llama"})
plan = bind([adapter({"a.weight": lora(8, 4)})], there)
assert plan.problems == () and plan.matched == (1,)
print([m for m in ("torch", "numpy") if m in sys.modules])
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "[]\n", ended.stderr


# ------------------------------------------------------------------------------- image bases

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
LDM = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight"
OPEN = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"


def image(deltas: dict[str, Kind], vocabulary: str = "diffusers", **config: object) -> Adapter:
    return Adapter(deltas, "diffusers", vocabulary, name="a", config=config)


def test_an_image_base_is_never_tied_and_takes_no_new_heads():
    embedding = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    there = base({f"model.diffusion_model.{LDM}": [8, 8], embedding: [20, 8]})
    assert there.tied() is None
    plan = bind(
        [image({"text_encoder.text_model.embeddings.token_embedding.weight": lora(20, 8)})], there
    )
    assert plan.problems == ()
    whole = {UNET: lora(8, 8), "unet.classifier.weight": Replace(unread("v", 2, 8))}
    found = only(bind([image(whole)], there), "unmatched")
    assert "classifier" in found.message


def test_q_of_a_fused_weight_changes_its_rows_alone():
    there = base({f"model.diffusion_model.{LDM}": [8, 8], OPEN: [24, 8]})
    stem = "text_encoder_2.text_model.encoder.layers.0.self_attn"
    plan = bind(
        [image({f"{stem}.q_proj.weight": lora(8, 8), f"{stem}.v_proj.weight": lora(8, 8)})], there
    )
    assert plan.problems == ()
    [target] = plan.targets.values()
    assert target.name == OPEN
    [term] = target.terms
    assert isinstance(term.delta, LowRank)
    assert (term.delta.b.shape, term.delta.rank) == ((24, 4), 4)
    magnitude = Renormed(lora(8, 8), unread("m", 8))
    refused = bind([image({f"{stem}.q_proj.weight": magnitude})], there)
    assert set(errors(refused)) == {"loss", "no_effect"} - (
        {"no_effect"} if errors(refused) else set()
    )


@pytest.mark.parametrize("front", ["", "model.diffusion_model."])
def test_another_denoiser_is_unmatched_and_no_absent_component(front):
    flux = {f"{front}double_blocks.0.img_attn.qkv.weight": [24, 8], f"{front}img_in.weight": [8, 4],
            f"{front}single_blocks.0.linear1.weight": [56, 8]}  # fmt: skip
    plan = bind([image({UNET: lora(8, 8), UNET.replace("to_q", "to_k"): lora(8, 8)})], base(flux))
    assert "0 of 2 deltas matched" in only(plan, "unmatched").message


@pytest.mark.parametrize("name", ["img_in", "x_embedder"])
@pytest.mark.parametrize("kernel", [(), (2, 2)])
def test_channels_that_only_the_base_has_are_left_as_they_are(name, kernel):
    others = {
        "double_blocks.0.img_attn.qkv.weight": [24, 8],
        "single_blocks.0.linear1.weight": [56, 8],
    }
    if name == "x_embedder":
        others = {
            "transformer_blocks.0.attn.to_q.weight": [8, 8],
            "context_embedder.weight": [8, 4],
        }
    key = f"{'transformer' if name == 'x_embedder' else 'diffusion_model'}.{name}.weight"
    vocabulary = "diffusers" if name == "x_embedder" else "original"
    there = base({**others, f"{name}.weight": [8, 6, *kernel]})
    plan = bind([image({key: lora(8, 4, *kernel)}, vocabulary)], there)
    [note] = plan.problems
    assert (note.code, note.severity) == ("shape_mismatch", "note")
    [term] = plan.targets[f"{name}.weight"].terms
    assert isinstance(term.delta, LowRank)
    assert term.delta.a.shape == (2, 6, *kernel)
    refused = bind([image({key: lora(8, 9, *kernel)}, vocabulary)], there)
    assert "reads 3 more channels" in only(refused, "shape_mismatch").message
    other = next(iter(others))
    narrow = bind(
        [image({f"{key.partition('.')[0]}.{other}": lora(others[other][0], 3)}, vocabulary)], there
    )
    assert "channels" not in only(narrow, "shape_mismatch").message


def test_averages_in_a_checkpoint_are_spoken_of():
    many = {f"model_ema.diffusion_modelinput_blocks{i}": [2] for i in range(101)}
    there = base({f"model.diffusion_model.{LDM}": [8, 8], **many})
    plan = bind([image({UNET: lora(8, 8)})], there)
    [warning] = plan.problems
    assert (warning.code, warning.severity) == ("no_effect", "warning")
    assert "model_ema" in warning.message


def test_two_spellings_of_one_weight_are_both_spoken_of():
    there = base({f"model.diffusion_model.{LDM}": [8, 8]})
    both = {UNET: lora(8, 8), f"diffusion_model.{LDM}": lora(8, 8)}
    plan = bind([image(both)], there)
    assert plan.matched != (2,)
    assert errors(plan)
