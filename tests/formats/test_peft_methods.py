"""PEFT's other methods as bytes: keys as the specification has them, and what is refused."""

import itertools
import re
from pathlib import Path

import pytest
from peft import PeftType

from loratools import formats
from loratools.adapter import leaves
from loratools.errors import LoratoolsError
from loratools.formats import peft
from loratools.formats.peft_keys import group
from loratools.formats.peft_method_writing import factors_of
from loratools.formats.peft_methods import METHODS, REFUSED
from loratools.formats.peft_prompts import is_runtime
from tests.bases import unread
from tests.formats.test_peft import FRONT, HEAD, write

SPEC = Path(__file__).parents[2] / "specs" / "formats" / "peft_methods.md"


def key_table():
    """(type, parts, shared) of every row under "Keys"."""
    text = SPEC.read_text().partition("## Keys")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([A-Z0-9_]+) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    return {name: [set(re.findall("`(.+?)`", cell)) for cell in cells] for name, *cells in rows}


def test_the_specification_has_the_parts_of_every_method():
    table = key_table()
    assert table.keys() == METHODS.keys()
    assert table == {name: [set(m.parts), set(m.shared)] for name, m in METHODS.items()}


@pytest.mark.parametrize("front", ["base_model.model.", "", "module.base_model.model."])
@pytest.mark.parametrize("kind", METHODS)
def test_the_reader_has_the_keys_of_the_specification(kind, front):
    parts, shared = key_table()[kind]
    for part, adapter in itertools.product(sorted(parts), ("", "default", "mine")):
        first, _, rest = part.partition(".")
        key = ".".join(p for p in ("layers.0.q", first, adapter, rest) if p)
        found = group({front + key: unread("x", 1)}, parts, shared)
        assert list(found.modules) == ["layers.0.q"]
        assert list(found.modules["layers.0.q"].leaves) == [part]
        assert found.adapters == ({adapter} if adapter else set())
    for name in sorted(shared):
        for key in (f"base_model.{name}", name, f"base_model.{name}.default"):
            assert list(group({key: unread("x", 1)}, parts, shared).modules[""].leaves) == [name]


def test_every_type_of_peft_is_read_or_refused_by_name():
    named = {*peft.READ_TYPES, *METHODS, *REFUSED}
    left = {t.value for t in PeftType} - named
    assert {t for t in left if not is_runtime({"peft_type": t})} == set()


@pytest.mark.parametrize("kind", [k for k in REFUSED if not is_runtime({"peft_type": k})])
def test_a_type_that_changes_no_weight_is_refused_with_its_reason(kind, tmp_path):
    adapter = formats.read(write(tmp_path, {f"{FRONT}a.b": (1,)}, {"peft_type": kind}))
    found = [p for p in adapter.problems if p.severity == "error"]
    assert next(p.code for p in found) == "not_foldable"
    assert REFUSED[kind] in found[0].message


# ------------------------------------------------------------------------------- refusals

Q = "layers.0.q"


def of(kind, *parts, module=Q, **config):
    """An adapter of a method: its parts with their shapes."""
    shapes = {f"{FRONT}{module}.{part}": shape for part, shape in parts}
    base = {"peft_type": kind, "target_modules": ["q"], "r": 2, "alpha": 4, "lora_alpha": 4}
    return shapes, {**base, **config}


LOHA = [("hada_w1_a", (4, 2)), ("hada_w1_b", (2, 6)), ("hada_w2_a", (4, 2)), ("hada_w2_b", (2, 6))]
VERA = [("vera_lambda_b", (4,)), ("vera_lambda_d", (2,))]
# What is wrong with each, the code, and what the message names.
ROWS = {
    "three factors of four": (of("LOHA", *LOHA[:3]), "missing", "without hada_w2_b"),
    "factors of other ranks": (
        of("LOHA", *LOHA[:3], ("hada_w2_b", (3, 6))), "shape_factors", r"\(3, 6\)"
    ),
    "one core": (of("LOHA", *LOHA, ("hada_t1", (2, 2, 3, 3))), "missing", "one core of two"),
    "a rank that the config denies": (of("LOHA", *LOHA, r=3), "config_conflict", "r=3"),
    "a pattern of no module": (
        of("LOHA", *LOHA, rank_pattern={"k": 3}), "config_conflict", 'names "k"'
    ),
    "no alpha": (of("LOHA", *LOHA, alpha=None), "alpha_missing", "no alpha"),
    "half of a Kronecker product": (of("LOKR", ("lokr_w1", (2, 2))), "shape_factors", "lokr_w1"),
    "a factor whole and in two": (
        of("LOKR", ("lokr_w1", (2, 2)), ("lokr_w2", (3, 3)), ("lokr_w2_a", (3, 1)),
           ("lokr_w2_b", (1, 3))), "shape_factors", "lokr_w2_a"
    ),
    "diagonal of another rank": (
        of("ADALORA", ("lora_A", (2, 6)), ("lora_B", (4, 2)), ("lora_E", (3, 1)), init_r=3),
        "shape_factors", r"lora_E is \(3, 1\)",
    ),
    "norms of another width": (
        of("DELORA", ("delora_A", (2, 6)), ("delora_B", (4, 2)), ("delora_lambda", (1,)),
           ("delora_w_norm", (5,))), "shape_factors", "delora_w_norm"
    ),
    "no bank": (of("VBLORA", ("vblora_logits_A", (2, 3, 5))), "missing", "vector bank"),
    "lambda of another rank": (of("VERA", *VERA, r=3), "config_conflict", "r=3"),
    "a vector on the wrong side": (
        of("IA3", ("ia3_l", (1, 6)), feedforward_modules=[]), "config_conflict", "scales rows"
    ),
    "a block of another way": (
        of("MISS", ("miss_block", (2, 4)), init_weights="bat"), "config_conflict", "bat"
    ),
    "an unknown way": (of("MISS", ("miss_block", (2, 4)), init_weights="x"), "unknown_type", "x"),
    "no pair": (of("HIRA", ("hira_A", (2, 6))), "missing", "no pair"),
    "factors that do not multiply": (
        of("HIRA", ("hira_A", (2, 6)), ("hira_B", (4, 3))), "shape_factors", r"\(4, 3\)"
    ),
    "a tensor of no part": (
        of("IA3", ("ia3_l", (4, 1)), ("ia3_x", (4, 1)), feedforward_modules=[]),
        "config_conflict", "ia3_x",
    ),
    "a head unannounced": (
        (of("LOHA", *LOHA)[0] | HEAD, of("LOHA", *LOHA, modules_to_save=["score"])[1]),
        "missing", "score",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_what_config_and_tensors_contradict_is_found(row, tmp_path):
    (shapes, config), code, text = ROWS[row]
    adapter = formats.read(write(tmp_path, shapes, config))
    found = [p for p in adapter.problems if p.severity == "error"]
    assert any(p.code == code and re.search(text, p.message) for p in found), found


RAISED = {
    "whole numbers": (of("LOHA", *LOHA), "I32", "dtype_unusable"),
    "r as text": (of("VERA", *VERA, r="2"), "F32", "malformed"),
    "a seed as text": (of("VERA", *VERA, projection_prng_key="x"), "F32", "malformed"),
    "topk as a flag": (
        (
            {f"{FRONT}{Q}.vblora_logits_A": (2, 3, 5), "base_model.vblora_vector_bank": (5, 2)},
            {"peft_type": "VBLORA", "topk": True},
        ),
        "F32",
        "malformed",
    ),
    "blocks as text": (
        (
            {f"{FRONT}{Q}.lora_A.weight": (2, 6), f"{FRONT}{Q}.lora_B.weight": (4, 2)},
            {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_bdlora": "yes"},
        ),
        "F32",
        "malformed",
    ),
}


@pytest.mark.parametrize("row", RAISED)
def test_what_no_reader_should_take_is_raised(row, tmp_path):
    (shapes, config), dtype, code = RAISED[row]
    with pytest.raises(LoratoolsError) as refused:
        formats.read(write(tmp_path, shapes, config, dtype))
    assert refused.value.code == code


def test_an_alpha_is_assumed_where_there_is_none(tmp_path):
    write(tmp_path, *of("LOHA", *LOHA, alpha=None))
    adapter = formats.read(tmp_path, assume={"alpha": "8"})
    assert [p for p in adapter.problems if p.severity == "error"] == []
    assert adapter.deltas[f"{Q}.weight"].scaling == 4


def test_bone_is_miss_under_its_old_name(tmp_path):
    (tmp_path / "miss").mkdir()
    (tmp_path / "bone").mkdir()
    one = formats.read(write(tmp_path / "miss", *of("MISS", ("miss_block", (2, 4)))))
    two = formats.read(write(tmp_path / "bone", *of("BONE", ("bone_block", (2, 4)))))
    a, b = one.deltas[f"{Q}.weight"], two.deltas[f"{Q}.weight"]
    assert (a.method, a.settings) == (b.method, b.settings)
    assert [x.shape for x in leaves(a)] == [x.shape for x in leaves(b)]


def test_every_tensor_of_a_method_is_kept_to_be_written_again(tmp_path):
    shapes, config = of("LOHA", *LOHA)
    adapter = formats.read(
        write(tmp_path, shapes | HEAD, config | {"modules_to_save": ["lm_head"]})
    )
    assert adapter.original.keys() == {*shapes, *HEAD}
    assert set(adapter.deltas) == {f"{Q}.weight", "lm_head.weight"}


def test_a_lokr_is_split_as_peft_splits_it():
    from peft.tuners.lokr.layer import factorization

    for size in [*range(1, 130), 768, 1024, 3072, 4096, 11008]:
        for factor in (-1, 2, 3, 4, 7, 8, 16):
            assert factors_of(size, factor) == factorization(size, factor), (size, factor)
