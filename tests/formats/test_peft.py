"""PEFT adapters as bytes: keys as the specification has them, and what is refused, by its code."""

import json
import re
import struct
from pathlib import Path

import pytest

from loratools import formats
from loratools.adapter import leaves
from loratools.errors import LoratoolsError
from loratools.formats.peft_keys import COPY, PARTS, SPARE, TOKENS, VALUE, part_of

SPEC = Path(__file__).parents[2] / "specs" / "formats" / "peft.md"


def key_table():
    """(key, module, part) of every row under "Keys"."""
    text = SPEC.read_text().partition("## Keys")[2].partition("##")[0]
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|", text, re.MULTILINE)
    return [tuple(re.sub(r"\bX\b", "model.layers.0.q", cell) for cell in row) for row in rows]


@pytest.mark.parametrize(("key", "module", "part"), key_table())
@pytest.mark.parametrize("front", ["base_model.model.", "", "module.base_model.model."])
def test_the_reader_has_the_keys_of_the_specification(front, key, module, part):
    for name in ("default", "my_adapter"):
        given = re.sub(r"\bN\b", name, re.sub(r"\bP\b", "weight", key))
        found = part_of(front + given)
        assert (found.module, found.part) == (re.sub(r"\bP\b", "weight", module), part)
        assert found.adapter == (name if re.search(r"\bN\b", key) else "")


def test_the_specification_has_every_part():
    described = {part.removesuffix(".bias") for _, _, part in key_table()}
    assert described == {*PARTS, TOKENS, VALUE, SPARE, COPY}


# ------------------------------------------------------------------------------- refusals

FRONT = "base_model.model."
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
PAIR = {f"{FRONT}{Q}.lora_A.weight": (2, 6), f"{FRONT}{Q}.lora_B.weight": (4, 2)}
OTHER = {f"{FRONT}{V}.lora_A.weight": (2, 6), f"{FRONT}{V}.lora_B.weight": (4, 2)}
HEAD = {f"{FRONT}lm_head.weight": (9, 6)}


def write(folder: Path, shapes, config, dtype="F32"):
    """An adapter of zeros, byte for byte."""
    header, at = {}, 0
    for key, shape in shapes.items():
        size = {"F32": 4, "I32": 4, "F16": 2}[dtype]
        for extent in shape:
            size *= extent
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    raw = struct.pack("<Q", len(text)) + text + bytes(at)
    (folder / "adapter_model.safetensors").write_bytes(raw)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def lacking(shapes, part):
    return {key: shape for key, shape in shapes.items() if part not in key}


def shaped(part, shape):
    return {key: shape if part in key else old for key, old in PAIR.items()}


# What is wrong with each, the code, its severity, and what the message names.
ROWS = {
    "no B": (lacking(PAIR, "lora_B"), CONFIG, "missing", "lora_A without lora_B"),
    "no A": (lacking(PAIR, "lora_A"), CONFIG, "missing", "lora_B without lora_A"),
    "ranks of the pair": (shaped("lora_B", (4, 3)), CONFIG, "shape_factors", r"\(4, 3\)"),
    "one part of a sharded save": (shaped("lora_A", (12,)), CONFIG, "shape_factors", "sharded"),
    "an empty part": (shaped("lora_A", (0, 6)), CONFIG, "shape_factors", "sharded"),
    "rank": (PAIR, CONFIG | {"r": 8}, "config_conflict", "r=8, A has 2 rows"),
    "rank as text": (PAIR, CONFIG | {"r": "2"}, "config_conflict", "no whole number"),
    "rank by pattern": (
        PAIR, CONFIG | {"rank_pattern": {"q_proj": 3}}, "config_conflict", "r=3, A has 2 rows"
    ),
    "no alpha": (PAIR, {"peft_type": "LORA", "r": 2}, "alpha_missing", "has no lora_alpha"),
    "no config": (PAIR, None, "alpha_missing", "there is no adapter_config.json"),
    "pattern without module": (
        PAIR, CONFIG | {"alpha_pattern": {"k_proj": 1}}, "config_conflict", '"k_proj"'
    ),
    "a head unannounced": (PAIR | HEAD, CONFIG | {"modules_to_save": ["score"]},
                           "missing", "score"),
    "a module unannounced": (
        PAIR | {f"{FRONT}classifier.weight": (3, 6)}, CONFIG, "config_conflict", "classifier.weight"
    ),
    "a head absent": (PAIR, CONFIG | {"modules_to_save": ["lm_head"]}, "missing", "lm_head"),
    "a bias unannounced": (
        PAIR | {f"{FRONT}{Q}.base_layer.bias": (4,)}, CONFIG, "config_conflict", "q_proj.bias"
    ),
    "magnitude unannounced": (
        PAIR | {f"{FRONT}{Q}.lora_magnitude_vector": (4,)}, CONFIG, "config_conflict", "use_dora"
    ),
    "no magnitude": (PAIR, CONFIG | {"use_dora": True}, "missing", "no magnitude"),
    "magnitudes": (
        PAIR | {f"{FRONT}{Q}.lora_magnitude_vector": (5,)},
        CONFIG | {"use_dora": True}, "shape_factors", "5 magnitudes for 4",
    ),
    "rows without indices": (
        PAIR | {f"{FRONT}model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 6)},
        CONFIG, "config_conflict", "2 trained token rows",
    ),
    "as many indices as rows": (
        PAIR | {f"{FRONT}model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 6)},
        CONFIG | {"trainable_token_indices": [1, 2, 3]}, "config_conflict", "names 3 indices",
    ),
    "an index twice": (
        PAIR | {f"{FRONT}model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 6)},
        CONFIG | {"trainable_token_indices": [1, 1]}, "config_conflict", "trained token rows",
    ),
    "pissa": (PAIR, CONFIG | {"init_lora_weights": "pissa_niter_16"}, "residual_base", "pissa"),
    "corda": (PAIR, CONFIG | {"init_lora_weights": "corda"}, "residual_base", "corda"),
    "activated": (
        PAIR, CONFIG | {"alora_invocation_tokens": [1, 2]}, "not_foldable", "invocation tokens"
    ),
    "unknown type": (PAIR, {"peft_type": "NEWTUNER"}, "unknown_type", "NEWTUNER"),
    "parameters of experts": (
        {f"{FRONT}experts.lora_A.weight": (8, 6)},
        CONFIG | {"target_parameters": ["experts.down_proj"]}, "missing", "lora_A without lora_B",
    ),
    "more parameters than named": (
        {f"{FRONT}experts.{inner}lora_{side}.weight": shape for inner in ("", "base_layer.")
         for side, shape in (("A", (8, 6)), ("B", (4, 8)))},
        CONFIG | {"target_parameters": ["experts.down_proj"]}, "config_conflict", "which is which",
    ),
    "parameters of unknown order": (
        {f"{FRONT}experts.{inner}lora_{side}.weight": shape for inner in ("", "base_layer.")
         for side, shape in (("A", (8, 6)), ("B", (4, 8)))},
        CONFIG | {"target_parameters": ["experts.one", "experts.two"]},
        "config_conflict", "which is which",
    ),
    "experts of no whole number": (
        {f"{FRONT}experts.lora_A.weight": (7, 6), f"{FRONT}experts.lora_B.weight": (4, 7)},
        CONFIG | {"target_parameters": ["experts.down_proj"]}, "config_conflict", "no multiple",
    ),
    "experts that do not multiply": (
        {f"{FRONT}experts.lora_A.weight": (8, 6), f"{FRONT}experts.lora_B.weight": (4, 6)},
        CONFIG | {"target_parameters": ["experts.down_proj"]}, "shape_factors", "lora_A is",
    ),
    "two adapters": (
        {
            **{k.replace(".weight", ".one.weight"): s for k, s in PAIR.items()},
            **{k.replace(".weight", ".two.weight"): s for k, s in OTHER.items()},
        },
        CONFIG, "unexplained", "one, two",
    ),
    "nothing": ({}, CONFIG, "no_effect", "no adapter tensors"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_what_config_and_tensors_contradict_is_found(row, tmp_path):
    shapes, config, code, text = ROWS[row]
    adapter = formats.read(write(tmp_path, shapes, config))
    found = [p for p in adapter.problems if p.severity == "error"]
    assert code in [p.code for p in found]
    assert any(re.search(text, p.message) for p in found if p.code == code)


RAISED = {
    "whole numbers": (PAIR, CONFIG, "I32", "dtype_unusable"),
    "one parameter twice": (
        PAIR | {f"{Q}.lora_A.weight": (2, 6)}, CONFIG, "F32", "duplicate"
    ),
    "alpha as text": (PAIR, CONFIG | {"lora_alpha": "4"}, "F32", "malformed"),
    "alpha as a flag": (PAIR, CONFIG | {"lora_alpha": True}, "F32", "malformed"),
    "a config that is a list": (PAIR, [1], "F32", "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("row", RAISED)
def test_what_no_reader_should_take_is_raised(row, tmp_path):
    shapes, config, dtype, code = RAISED[row]
    with pytest.raises(LoratoolsError) as refused:
        formats.read(write(tmp_path, shapes, config, dtype))
    assert refused.value.code == code
    assert refused.value.exit == 3


CLEAN = {
    "a pair": (PAIR, CONFIG, {f"{Q}.weight"}),
    "an alpha of 0 in one of two": (
        PAIR | OTHER,
        CONFIG | {"alpha_pattern": {"v_proj": 0}},
        {f"{Q}.weight", f"{V}.weight"},
    ),
    "saved by the end of its name": (
        PAIR | {f"{FRONT}model.layers.0.input_layernorm.weight": (6,)},
        CONFIG | {"modules_to_save": ["norm"]},
        {f"{Q}.weight", "model.layers.0.input_layernorm.weight"},
    ),
    "one of two names": (
        PAIR | {f"{FRONT}score.weight": (3, 6)},
        CONFIG | {"modules_to_save": ["classifier", "score"]},
        {f"{Q}.weight", "score.weight"},
    ),
    "a resized head": (PAIR | HEAD, CONFIG, {f"{Q}.weight", "lm_head.weight"}),
    "unknown fields": (PAIR, CONFIG | {"use_newlora": True, "x": None}, {f"{Q}.weight"}),
    "an old bias": (
        PAIR | {f"{FRONT}{Q}.bias": (4,)},
        CONFIG | {"bias": "lora_only"},
        {f"{Q}.weight", f"{Q}.bias"},
    ),
    "copies": (
        PAIR
        | HEAD
        | {
            f"{FRONT}lm_head.modules_to_save.weight": (9, 6),
            f"{FRONT}lm_head.original_module.weight": (9, 6),
        },
        CONFIG | {"modules_to_save": ["lm_head"]},
        {f"{Q}.weight", "lm_head.weight"},
    ),
}


@pytest.mark.parametrize("row", CLEAN)
def test_what_peft_writes_is_not_refused(row, tmp_path):
    shapes, config, keys = CLEAN[row]
    adapter = formats.read(write(tmp_path, shapes, config))
    assert [p.message for p in adapter.problems if p.severity == "error"] == []
    assert set(adapter.deltas) == keys
    assert adapter.config == config
    used = len(shapes) - sum("modules_to_save." in k or "original" in k for k in shapes)
    assert sum(1 for d in adapter.deltas.values() for _ in leaves(d)) == used


def test_a_missing_alpha_is_assumed_and_a_given_one_is_not(tmp_path):
    write(tmp_path, PAIR, {"peft_type": "LORA", "r": 2})
    adapter = formats.read(tmp_path, assume={"alpha": "8"})
    assert adapter.problems == ()
    assert adapter.deltas[f"{Q}.weight"].scaling == 4
    assert adapter.assumed == {"alpha": "8"}
    write(tmp_path, PAIR, CONFIG)
    with pytest.raises(LoratoolsError, match="says 4") as refused:
        formats.read(tmp_path, assume={"alpha": "8"})
    assert refused.value.exit == 2


@pytest.mark.parametrize(
    ("version", "times"),
    [({}, 2), ({"peft_version": "0.21.2"}, 2), ({"peft_version": "0.22.0"}, 1)],
)
def test_the_inner_projection_of_an_attention_counts_as_its_peft_trained_it(
    version, times, tmp_path
):
    pair = {f"{FRONT}attn.lora_A.weight": (2, 4), f"{FRONT}attn.lora_B.weight": (12, 2)}
    inner = {
        f"{FRONT}attn.base_layer.out_proj.lora_A.weight": (2, 4),
        f"{FRONT}attn.base_layer.out_proj.lora_B.weight": (4, 2),
    }
    config = CONFIG | version | {"target_modules": ["attn"], "alpha_pattern": {"attn": 6}}
    adapter = formats.read(write(tmp_path, pair | inner, config))
    assert adapter.deltas["attn.weight"].scaling == 3
    assert adapter.deltas["attn.out_proj.weight"].scaling == 3 * times
    notes = [p.severity for p in adapter.problems]
    assert notes == ["note"] * (times - 1)
