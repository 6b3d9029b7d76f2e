"""The names of an .onnx_adapter as the specification has them, and which way round factors lie."""

import re
from pathlib import Path

import pytest
import torch

from loratools.adapter import Adapter, Leaf, LowRank
from loratools.containers import flatbuffer
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.formats import onnx_adapter
from tests.tiny import write_adapter

SPEC = Path(__file__).parents[2] / "specs" / "formats" / "onnx_adapter.md"
X = "model.layers.0.mlp.up_proj"
A, B = f"{X}.lora_A.weight", f"{X}.lora_B.weight"


def write(path, shapes):
    leaves = {name: Leaf.of(name, torch.ones(shape)) for name, shape in shapes.items()}
    flatbuffer.write(path, leaves)
    return local(path)


def read(bundle, **assume):
    return onnx_adapter.read(bundle, assume=assume)


def key_table():
    text = SPEC.read_text().partition("## Keys")[2].partition("##")[0]
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|", text, re.MULTILINE)
    return list(zip(rows[::2], rows[1::2], strict=True))


@pytest.mark.parametrize(("of_a", "of_b"), key_table())
@pytest.mark.parametrize("front", ["", "base_model.model."])
def test_the_reader_has_the_keys_of_the_specification(front, of_a, of_b, tmp_path):
    assert (of_a[1:], of_b[1:]) == (("X", "A"), ("X", "B"))
    names = [key.replace("X", front + X, 1) for key, _, _ in (of_a, of_b)]
    bundle = write(tmp_path / "made.onnx_adapter", dict(zip(names, [(6, 2), (2, 4)], strict=True)))
    assert onnx_adapter.detect(bundle)
    adapter = read(bundle)
    guessed = of_a[0] == "X_a"
    module = front + X if guessed else X
    [(key, delta)] = adapter.deltas.items()
    assert key == f"{module}.weight"
    assert [p.severity for p in adapter.problems] == ["note"] * guessed
    assert (delta.a.shape, delta.b.shape, delta.scaling) == ((2, 6), (4, 2), 1)
    assert adapter.config == {"onnx_names": {module: names}}
    onnx_adapter.write(adapter, tmp_path / "again.onnx_adapter")
    assert list(flatbuffer.read(local(tmp_path / "again.onnx_adapter").open(
        "again.onnx_adapter")).leaves) == names  # fmt: skip


def test_attention_is_called_as_transformers_calls_it(tmp_path):
    names = [f"model.layers.7.attn.q_proj.lora_{x}.MatMul.weight" for x in "AB"]
    adapter = read(write(tmp_path / "x", dict(zip(names, [(6, 2), (2, 4)], strict=True))))
    assert set(adapter.deltas) == {"model.layers.7.self_attn.q_proj.weight"}
    plain = [
        "transformer.h.0.attn.c_attn.lora_A.weight",
        "transformer.h.0.attn.c_attn.lora_B.weight",
    ]
    adapter = read(write(tmp_path / "y", dict(zip(plain, [(6, 2), (2, 4)], strict=True))))
    assert set(adapter.deltas) == {"transformer.h.0.attn.c_attn.weight"}


# Shapes of the file's A and B, assumptions, the module's (A, B), the problems.
SHAPES = {
    "as graphs have them": ((6, 2), (2, 4), {}, ((2, 6), (4, 2)), []),
    "square": ((6, 2), (2, 6), {}, ((2, 6), (6, 2)), []),
    "as PyTorch has them": ((2, 6), (4, 2), {}, ((2, 6), (4, 2)), [("orientation", "note")]),
    "square, wide": ((2, 6), (6, 2), {}, ((6, 2), (2, 6)), [("orientation", "error")]),
    "square, wide, said": ((2, 6), (6, 2), {"orientation": "out_in"}, ((2, 6), (6, 2)), []),
    "square, wide, said otherwise": (
        (2, 6), (6, 2), {"orientation": "in_out"}, ((6, 2), (2, 6)), []
    ),
    "neither": ((6, 2), (3, 4), {}, None, [("shape_factors", "error")]),
    "flat": ((12,), (2, 4), {}, None, [("shape_factors", "error")]),
}  # fmt: skip


@pytest.mark.parametrize("row", SHAPES)
def test_which_way_round_factors_lie(row, tmp_path):
    a, b, assume, expected, problems = SHAPES[row]
    adapter = read(write(tmp_path / "x", {A: a, B: b}), **assume)
    found = [(d.a.shape, d.b.shape) for d in adapter.deltas.values()]
    assert found == ([] if expected is None else [expected])
    assert [(p.code, p.severity) for p in adapter.problems] == problems


def test_a_pair_of_rank_0_is_the_graph_itself(tmp_path):
    other = {f"{X}2.lora_A.weight": (6, 2), f"{X}2.lora_B.weight": (2, 4)}
    adapter = read(write(tmp_path / "x", {A: (6, 0), B: (0, 4), **other}))
    assert set(adapter.deltas) == {f"{X}2.weight"}
    assert [(p.code, p.severity) for p in adapter.problems] == [("no_effect", "note")]
    adapter = read(write(tmp_path / "y", {A: (6, 0), B: (0, 4)}))
    assert [p.severity for p in adapter.problems if p.code == "no_effect"] == ["note", "error"]


ODD = {
    "half a pair": ({A: (6, 2)}, "missing", X),
    "four bits": ({f"{X}.lora_A.quant.weight": (6,)}, "unknown_type", "quant"),
    "another name": ({A: (6, 2), B: (2, 4), "steps": (1,)}, "unexplained", "steps"),
    "a letter without its twin": ({A: (6, 2), B: (2, 4), "w_a": (6, 2)}, "unexplained", "w_a"),
    "two letters": ({"a.b": (6, 2), "b.a": (2, 4)}, "unexplained", "a.b"),
    "nothing": ({}, "no_effect", "no adapter"),
}


@pytest.mark.parametrize("row", ODD)
def test_what_is_no_pair_is_named(row, tmp_path):
    shapes, code, text = ODD[row]
    problems = read(write(tmp_path / "x", shapes)).problems
    assert any(p.code == code and p.severity == "error" and text in p.message for p in problems)


def test_a_module_with_two_names_is_refused(tmp_path):
    both = {A: (6, 2), f"{X}.lora_A": (6, 2), B: (2, 4)}
    with pytest.raises(LoratoolsError) as refused:
        read(write(tmp_path / "x", both))
    assert refused.value.code == "duplicate"
    with pytest.raises(LoratoolsError) as refused:
        read(write(tmp_path / "y", {A: (6, 2), B: (2, 4)}), orientation="upside_down")
    assert refused.value.code == "usage"


NAMES = {
    "of the graph": (["p", "q"], ["p", "q"]),
    "none": (None, [A, B]),
    "one": (["p"], [A, B]),
    "no texts": ([1, 2], [A, B]),
}


@pytest.mark.parametrize("row", NAMES)
def test_names_come_from_the_config_or_are_those_of_olive(row, tmp_path):
    given, expected = NAMES[row]
    delta = LowRank(Leaf.of("", torch.ones(2, 6)), Leaf.of("", torch.ones(4, 2)), 1.0)
    adapter = Adapter(deltas={f"{X}.weight": delta}, config={"onnx_names": {X: given}})
    onnx_adapter.write(adapter, tmp_path / "x")
    assert list(flatbuffer.read(local(tmp_path / "x").open("x")).leaves) == expected


def test_one_name_for_two_is_refused(tmp_path):
    delta = LowRank(Leaf.of("", torch.ones(2, 6)), Leaf.of("", torch.ones(4, 2)), 1.0)
    for names in ({"x": ["p", "p"]}, {"x": ["p", "q"], "y": ["q", "r"]}):
        adapter = Adapter(
            deltas={"x.weight": delta, "y.weight": delta}, config={"onnx_names": names}
        )
        with pytest.raises(LoratoolsError) as refused:
            onnx_adapter.write(adapter, tmp_path / "x")
        assert refused.value.code == "duplicate"


def test_other_files_are_not_taken(tmp_path):
    write_adapter(tmp_path / "peft")
    assert not onnx_adapter.detect(local(tmp_path / "peft"))
    for raw in (b"", b"1234TOR", b"1234TFL3", b"\x80\x02"):
        (tmp_path / "x.onnx_adapter").write_bytes(raw)
        assert not onnx_adapter.detect(local(tmp_path / "x.onnx_adapter"))
        assert not onnx_adapter.detect(local(tmp_path))
