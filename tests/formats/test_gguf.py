"""GGUF adapters as bytes: keys as the specification has them, what is refused, what is written."""

import math
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf as package
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.adapter import Adapter, Dense, Leaf, LowRank, Renormed, Replace, leaves
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.formats import gguf
from tests.containers.gguf_corpus import BOOL, F32, STRING, U32, array, built, info, pair, text

SPEC = Path(__file__).parents[2] / "specs" / "formats" / "gguf.md"


def key_table():
    """(key, module, part) of every row under "Keys"."""
    section = SPEC.read_text().partition("## Keys")[2].partition("##")[0]
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|", section, re.MULTILINE)


@pytest.mark.parametrize(("key", "module", "part"), key_table())
def test_the_reader_has_the_keys_of_the_specification(key, module, part):
    for name in ("blk.0.attn_q", "output", "blk.31.ffn_gate_inp"):
        given = re.sub(r"\bX(?=[._]|$)", name, key)
        assert gguf.part_of(given) == (re.sub(r"\bX(?=[._]|$)", name, module), part)


def test_the_specification_has_every_part():
    assert {part for _, _, part in key_table()} == {"lora_a", "lora_b", "norm"}
    for other in ("blk.0.attn_q.weight", "blk.0.attn_q.lora_a", "x.bias.lora_a", ".weight.lora_a"):
        assert gguf.part_of(other) == (other, "")


# ------------------------------------------------------------------------------- reading

Q, V = "blk.0.attn_q.weight", "blk.0.attn_v.weight"
ALPHA = pair("adapter.lora.alpha", F32, struct.pack("<f", 6))
SAID = {
    "general.architecture": pair("general.architecture", STRING, text("llama")),
    "general.type": pair("general.type", STRING, text("adapter")),
    "adapter.type": pair("adapter.type", STRING, text("lora")),
    "adapter.lora.alpha": ALPHA,
}
PAIR = {f"{Q}.lora_a": (2, 6), f"{Q}.lora_b": (4, 2)}
OTHER = {f"{V}.lora_a": (2, 6), f"{V}.lora_b": (4, 2)}


def file(path: Path, shapes, said=None, kind=0) -> Path:
    """An adapter of zeros, byte for byte; shapes in numpy's order."""
    infos, at = [], 0
    for name, shape in shapes.items():
        infos.append(info(name, list(shape)[::-1], kind, at))
        size = math.prod(shape) // 32 * 34 if kind == 8 else math.prod(shape) * 4
        at += size + -size % 32
    path.write_bytes(built(list((SAID if said is None else said).values()), infos, bytes(at)))
    return path


def lacking(key):
    return {k: v for k, v in SAID.items() if k != key}


def said(key, kind, raw):
    return SAID | {key: pair(key, kind, raw)}


EXPERTS = {
    "blk.0.ffn_up_exps.weight.lora_a": (3, 2, 6),
    "blk.0.ffn_up_exps.weight.lora_b": (3, 4, 2),
}
# What is wrong with each, the code, its severity, and what the message names.
ROWS = {
    "no B": ({f"{Q}.lora_a": (2, 6)}, SAID, "missing", "error", "lora_a without lora_b"),
    "no A": ({f"{Q}.lora_b": (4, 2)}, SAID, "missing", "error", "lora_b without lora_a"),
    "ranks": (PAIR | {f"{Q}.lora_b": (4, 3)}, SAID, "shape_factors", "error", r"\(4, 3\)"),
    "a part of nothing": (PAIR | {"blk.0.x.lora_c": (1,)}, SAID, "unexplained", "error", "lora_c"),
    "a weight in full": (PAIR | {Q: (4, 6)}, SAID, "unexplained", "error", Q),
    "a norm": (
        PAIR | {"blk.0.attn_norm.weight": (6,)}, SAID, "unexplained", "note", "ignores norms"
    ),
    "experts": (
        PAIR | EXPERTS | {"blk.0.ffn_up_exps.weight.lora_b": (4, 4, 2)}, SAID, "shape_factors",
        "error", "experts, rank, in",
    ),
    "no alpha": (PAIR, lacking("adapter.lora.alpha"), "alpha_missing", "error", "no adapter.lora"),
    "alpha 0": (
        PAIR, said("adapter.lora.alpha", F32, b"\0" * 4), "scaling_unusual", "note", "scaling 1"
    ),
    "another type": (
        PAIR, said("adapter.type", STRING, text("vera")), "unknown_type", "error", "vera"
    ),
    "no adapter.type": (PAIR, lacking("adapter.type"), "unknown_type", "error", "None"),
    "no architecture": (
        PAIR, lacking("general.architecture"), "missing", "warning", "general.architecture"
    ),
    "activated": (
        PAIR,
        SAID | {"t": array("adapter.alora.invocation_tokens", U32, 2, b"\7\0\0\0\1\0\0\0")},
        "not_foldable", "error", "invocation_tokens",
    ),
    "a vocabulary": (
        PAIR, SAID | {"t": array("tokens", STRING, 5000, text("a") * 5000)},
        "unexplained", "note", "5000 strings",
    ),
    "nothing": ({}, SAID, "no_effect", "error", "no adapter tensors"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_what_is_odd_is_found(row, tmp_path):
    shapes, values, code, severity, words = ROWS[row]
    adapter = gguf.read(local(file(tmp_path / "x.gguf", shapes, values)), assume={})
    found = [p for p in adapter.problems if (p.code, p.severity) == (code, severity)]
    assert any(re.search(words, p.message) for p in found)


RAISED = {
    "alpha in words": (PAIR, said("adapter.lora.alpha", STRING, text("6")), 0, "malformed"),
    "alpha as a flag": (PAIR, said("adapter.lora.alpha", BOOL, b"\1"), 0, "malformed"),
    "alpha infinite": (PAIR, said("adapter.lora.alpha", F32, b"\0\0\x80\x7f"), 0, "nonfinite"),
    "quantised": (
        {f"{Q}.lora_a": (1, 32), f"{Q}.lora_b": (4, 32)}, SAID, 8, "dtype_unusable"
    ),
    "whole numbers": (PAIR, SAID, 26, "dtype_unusable"),
}  # fmt: skip


@pytest.mark.parametrize("row", RAISED)
def test_what_no_reader_should_take_is_raised(row, tmp_path):
    shapes, values, kind, code = RAISED[row]
    with pytest.raises(LoratoolsError) as refused:
        gguf.read(local(file(tmp_path / "x.gguf", shapes, values, kind)), assume={})
    assert (refused.value.code, refused.value.exit) == (code, 3)


def test_a_pair_and_what_the_file_says(tmp_path):
    path = file(tmp_path / "x.gguf", PAIR | OTHER)
    assert gguf.detect(local(path))
    assert gguf.detect(local(tmp_path))
    adapter = gguf.read(local(path), assume={})
    assert adapter.problems == ()
    assert list(adapter.deltas) == [Q, V]
    found = adapter.deltas[Q]
    assert (found.a.shape, found.b.shape) == ((2, 6), (4, 2))
    assert (found.scaling, found.alpha) == (3, 6)
    assert adapter.config["gguf"]["general.architecture"] == "llama"
    assert adapter.files == ("x.gguf",)


def test_a_missing_alpha_is_assumed_and_a_given_one_is_not(tmp_path):
    path = file(tmp_path / "x.gguf", PAIR, lacking("adapter.lora.alpha"))
    adapter = gguf.read(local(path), assume={"alpha": "8"})
    assert (adapter.problems, adapter.deltas[Q].scaling) == ((), 4)
    assert gguf.read(local(path), assume={}).deltas[Q].scaling == 1  # with --allow alpha_missing
    with pytest.raises(LoratoolsError, match="says 6") as refused:
        gguf.read(local(file(path, PAIR)), assume={"alpha": "8"})
    assert refused.value.exit == 2


def test_leading_dimensions_may_be_left_out_or_be_ones(tmp_path):
    shapes = {
        f"{Q}.lora_a": (6,), f"{Q}.lora_b": (4, 1),
        f"{V}.lora_a": (1, 1, 2, 6), f"{V}.lora_b": (1, 4, 2),
    }  # fmt: skip
    adapter = gguf.read(local(file(tmp_path / "x.gguf", shapes)), assume={})
    assert adapter.problems == ()
    assert [leaf.shape for d in adapter.deltas.values() for leaf in leaves(d)] == [
        (1, 6), (4, 1), (2, 6), (4, 2)
    ]  # fmt: skip


def test_what_is_no_adapter(tmp_path):
    model = {k: v for k, v in SAID.items() if k == "general.architecture"}
    file(tmp_path / "model.gguf", {Q: (4, 6)}, model)
    (tmp_path / "y.bin").write_bytes(b"PK\3\4")
    for path in (tmp_path, tmp_path / "model.gguf", tmp_path / "y.bin"):
        assert not gguf.detect(local(path))
    file(tmp_path / "one.gguf", PAIR)
    assert list(gguf.read(local(tmp_path), assume={}).deltas) == [Q]
    file(tmp_path / "two.gguf", PAIR)
    with pytest.raises(LoratoolsError, match=r"several adapters:\n.*one.gguf\n.*two.gguf"):
        gguf.read(local(tmp_path), assume={})


def test_reading_needs_neither_torch_nor_numpy(tmp_path):
    path = file(tmp_path / "x.gguf", PAIR)
    code = (
        "import sys\n"
        "from loratools.containers.bundle import local\n"
        "from loratools.formats import gguf\n"
        f"adapter = gguf.read(local({str(path)!r}), assume={{}})\n"
        "assert len(adapter.deltas) == 1\n"
        "assert not {'torch', 'numpy', 'gguf'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# ------------------------------------------------------------------------------- writing


def low_rank(out, size, rank, scaling, alpha=None, *, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, size, generator=draw), torch.randn(out, rank, generator=draw)
    return LowRank(Leaf.of("a", a.to(dtype)), Leaf.of("b", b.to(dtype)), scaling, alpha)


def adapter_of(deltas, **options) -> Adapter:
    given = {"format": "peft", "vocabulary": "gguf", "config": {"gguf_architecture": "llama"}}
    return Adapter(deltas, **given | options)


def again(adapter: Adapter, path: Path) -> Adapter:
    assert set(gguf.write(adapter, path)) == {path.name}
    found = gguf.read(local(path), assume={})
    assert [p.message for p in found.problems if p.severity != "note"] == []
    return found


def product(delta: LowRank) -> torch.Tensor:
    return delta.scaling * (delta.b.tensor().double() @ delta.a.tensor().double())


@given(data=st.data())
def test_there_and_back(data, tmp_path_factory):
    """Factors keep their bytes where one alpha says all scalings, else the update is the same."""
    path = tmp_path_factory.mktemp("x") / "x.gguf"
    count = data.draw(st.integers(1, 4))
    one = data.draw(st.booleans())
    alphas = st.sampled_from([0.5, 1, 6, 13.3, 32, -4, 0.05])
    ranks = st.integers(1, 5)
    alpha, rank = data.draw(alphas), data.draw(ranks)
    deltas = {}
    for i in range(count):
        if not one:
            alpha, rank = data.draw(alphas), data.draw(ranks)
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        if data.draw(st.booleans()):
            deltas[f"blk.{i}.attn_q.weight"] = low_rank(
                4, 6, rank, alpha / rank, alpha, seed=i, dtype=dtype
            )
        else:
            deltas[f"blk.{i}.attn_q.weight"] = low_rank(
                4, 6, rank, alpha / rank, seed=i, dtype=dtype
            )
    adapter = adapter_of(deltas)
    assert gguf.lost(adapter) == []
    found = again(adapter, path)
    assert list(found.deltas) == list(deltas)
    for key, delta in deltas.items():
        back = found.deltas[key]
        assert back.a.read() == delta.a.read()
        assert (back.a.dtype, back.a.shape) == (delta.a.dtype, delta.a.shape)
        if one:
            assert (back.b.dtype, back.b.read()) == (delta.b.dtype, delta.b.read())
            assert back.scaling == pytest.approx(delta.scaling, rel=2**-24)
        error = (product(back) - product(delta)).norm()
        assert error <= 2**-22 * product(delta).norm()
    assert found.config["gguf"]["general.type"] == "adapter"
    twice = again(found, path.with_name("y.gguf"))
    for key, delta in found.deltas.items():
        assert twice.deltas[key].b.read() == delta.b.read()
        assert twice.deltas[key].scaling == delta.scaling


def test_the_same_adapter_gives_the_same_bytes_and_key_values_come_back(tmp_path):
    config = {
        "gguf_architecture": "qwen2", "base_model_name_or_path": "Qwen/Qwen2-7B",
        "alora_invocation_tokens": [5, 7],
    }  # fmt: skip
    adapter = adapter_of({Q: low_rank(4, 6, 2, 2.0, 4.0)}, config=config, name="/a/my.lora/",
                         metadata={"format": "pt", "trained": "ja, é"})  # fmt: skip
    first = gguf.write(adapter, tmp_path / "a.gguf")
    assert first["a.gguf"] == gguf.write(adapter, tmp_path / "b.gguf")["b.gguf"]
    found = gguf.read(local(tmp_path / "a.gguf"), assume={})
    assert found.metadata == {"trained": "ja, é"}
    assert found.config["base_model_name_or_path"] == "Qwen/Qwen2-7B"
    assert found.config["alora_invocation_tokens"] == [5, 7]
    assert found.config["gguf"] == {
        "general.architecture": "qwen2", "general.type": "adapter", "general.name": "my.lora",
        "general.base_model.count": 1, "general.base_model.0.name": "Qwen2-7B",
        "general.base_model.0.organization": "Qwen",
        "general.base_model.0.repo_url": "https://huggingface.co/Qwen/Qwen2-7B",
        "general.file_type": 0, "adapter.alora.invocation_tokens": [5, 7],
        "adapter.type": "lora", "adapter.lora.alpha": 4.0,
    }  # fmt: skip
    reader = package.GGUFReader(tmp_path / "a.gguf")
    kinds = package.GGUFValueType
    tokens = reader.fields["adapter.alora.invocation_tokens"]
    assert tokens.types == [kinds.ARRAY, kinds.UINT32]
    assert reader.fields["adapter.lora.alpha"].types == [kinds.FLOAT32]


def test_values_of_every_type_come_back(tmp_path):
    values = {
        "general.architecture": "llama", "a.b": True, "a.i": -3, "a.u": 2**40, "a.l": -(2**40),
        "a.f": 0.5, "a.d": 0.1, "a.s": "x\n", "a.li": [1, -2], "a.lu": [2**40, 1],
        "a.lf": [0.5, 0.1], "a.ls": ["", "é"], "a.lb": [True, False],
        "general.alignment": 64,
    }  # fmt: skip
    adapter = adapter_of({Q: low_rank(4, 6, 2, 2.0)}, format="gguf", config={"gguf": values})
    found = again(adapter, tmp_path / "x.gguf").config["gguf"]
    assert {k: v for k, v in found.items() if k.startswith("a.")} == {
        k: v for k, v in values.items() if k.startswith("a.")
    }
    assert "general.alignment" not in found


def test_scalings_of_one_at_several_ranks_are_an_alpha_of_0(tmp_path):
    deltas = {Q: low_rank(4, 6, 2, 1.0), V: low_rank(4, 6, 3, 1.0)}
    found = again(adapter_of(deltas), tmp_path / "x.gguf")
    assert found.config["gguf"]["adapter.lora.alpha"] == 0
    for key, delta in deltas.items():
        assert found.deltas[key].b.read() == delta.b.read()
        assert found.deltas[key].scaling == 1
    back = again(replace(found, deltas={Q: found.deltas[Q]}), tmp_path / "y.gguf")
    assert back.config["gguf"]["adapter.lora.alpha"] == 0


def test_a_scaling_of_0_is_not_written_as_an_alpha_of_0(tmp_path):
    deltas = {Q: low_rank(4, 6, 2, 0.0, 0.0), V: low_rank(4, 6, 2, 3.0, 6.0)}
    found = again(adapter_of(deltas), tmp_path / "x.gguf")
    assert found.config["gguf"]["adapter.lora.alpha"] == 6
    assert not product(found.deltas[Q]).any()
    alone = again(adapter_of({Q: deltas[Q]}), tmp_path / "y.gguf")
    assert alone.config["gguf"]["adapter.lora.alpha"] != 0
    assert not product(alone.deltas[Q]).any()


def test_rslora_keeps_its_factors(tmp_path):
    deltas = {k: low_rank(4, 6, 3, 16 / 3**0.5, 16.0) for k in (Q, V)}
    found = again(adapter_of(deltas), tmp_path / "x.gguf")
    assert found.deltas[Q].b.read() == deltas[Q].b.read()
    assert found.deltas[Q].scaling == pytest.approx(16 / 3**0.5, rel=2**-24)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("name", ["token_embd", "position_embd"])
def test_an_embedding_is_stored_as_llama_cpp_wants_it(name, transposed, tmp_path):
    """The update of the stored weight (rows, dim) is the one that went in."""
    key = f"{name}.weight"
    rows, dim = 10, 6
    delta = low_rank(dim, rows, 2, 2.0) if transposed else low_rank(rows, dim, 2, 2.0)
    stored = product(delta).T if transposed else product(delta)
    adapter = adapter_of({key: delta}, transposed=frozenset({key} if transposed else ()))
    again(adapter, tmp_path / "x.gguf")
    a, b = (torch.tensor(t.data) for t in package.GGUFReader(tmp_path / "x.gguf").tensors)
    if name == "token_embd":
        assert (a.shape, b.shape) == ((rows, 2), (dim, 2))
        theirs = a.double() @ b.double().T  # llama.cpp:tools/export-lora/export-lora.cpp
    else:
        assert (a.shape, b.shape) == ((2, dim), (rows, 2))
        theirs = b.double() @ a.double()
    assert torch.allclose(2 * theirs, stored)
    back = gguf.read(local(tmp_path / "x.gguf"), assume={})
    assert back.transposed == ({key} if name == "token_embd" else set())
    update = product(back.deltas[key])
    assert torch.allclose(update.T if back.transposed else update, stored)


def test_dtypes_that_llama_cpp_does_not_multiply(tmp_path):
    narrow = low_rank(4, 6, 2, 2.0, dtype=torch.float8_e4m3fn)
    wide = low_rank(4, 6, 2, 2.0, dtype=torch.float64)
    adapter = adapter_of({Q: narrow, V: wide})
    assert [p.target for p in gguf.lost(adapter)] == [V]
    found = again(adapter, tmp_path / "x.gguf")
    assert (found.deltas[Q].a.dtype, found.deltas[V].a.dtype) == ("F16", "F32")
    assert torch.equal(found.deltas[Q].a.tensor().float(), narrow.a.tensor().float())


def some(*shape):
    return Leaf.of("x", torch.ones(shape))


LOST = {
    "DoRA": (Q, Renormed(low_rank(4, 6, 2, 2.0), some(4)), "magnitude", True),
    "a bias": ("blk.0.attn_q.bias", Dense(some(4)), "no biases", False),
    "a full difference": (Q, Dense(some(4, 6)), "full differences", False),
    "a saved module": ("output.weight", Replace(some(9, 6)), "replaced whole", False),
    "trained rows": ("token_embd.weight", Replace(some(2, 6), (1, 3)), "in 2 rows", False),
    "trained rows under a pair": (
        Q, Replace(some(4, 6), None, low_rank(4, 6, 2, 2.0)), "replaced whole", True
    ),
    "a convolution": (
        Q, LowRank(some(2, 3, 3, 3), some(4, 2, 1, 1), 1.0), "no convolutions", False
    ),
    "a long name": (f"{'x' * 50}.weight", low_rank(4, 6, 2, 2.0), "less than 64 bytes", True),
}  # fmt: skip


@pytest.mark.parametrize("row", LOST)
def test_what_is_lost_is_said_by_name_and_left_out(row, tmp_path):
    key, delta, words, kept = LOST[row]
    adapter = adapter_of({V: low_rank(4, 6, 2, 2.0), key: delta})
    (problem,) = gguf.lost(adapter)
    assert (problem.code, problem.severity, problem.target) == ("loss", "error", key)
    assert words in problem.message
    assert set(again(adapter, tmp_path / "x.gguf").deltas) == ({V, key} if kept else {V})


def test_the_copy_that_peft_puts_beside_an_embedding_is_no_loss(tmp_path):
    value = Leaf.of("base_model.model.embed.base_layer.weight", torch.ones(4, 6))
    adapter = adapter_of({Q: Replace(value, None, low_rank(4, 6, 2, 2.0))})
    assert [p.severity for p in gguf.lost(adapter)] == ["note"]
    assert set(again(adapter, tmp_path / "x.gguf").deltas) == {Q}


def test_a_pointwise_convolution_is_a_matrix(tmp_path):
    delta = LowRank(some(2, 3, 1, 1), some(4, 2, 1, 1), 1.0)
    assert gguf.lost(adapter_of({Q: delta})) == []
    assert again(adapter_of({Q: delta}), tmp_path / "x.gguf").deltas[Q].a.shape == (2, 3)


def test_without_an_architecture_nothing_is_written(tmp_path):
    adapter = adapter_of({Q: low_rank(4, 6, 2, 2.0)}, config={})
    with pytest.raises(LoratoolsError, match=r"general\.architecture.*--base") as refused:
        gguf.write(adapter, tmp_path / "x.gguf")
    assert refused.value.code == "missing"
    assert not (tmp_path / "x.gguf").exists()


def test_half_a_character_and_a_folder_that_is_not_there(tmp_path):
    adapter = adapter_of({Q: low_rank(4, 6, 2, 2.0)}, metadata={"x": "\ud800"})
    with pytest.raises(LoratoolsError, match="half a character"):
        gguf.write(adapter, tmp_path / "x.gguf")
    with pytest.raises(LoratoolsError, match="cannot be written") as refused:
        gguf.write(replace(adapter, metadata={}), tmp_path / "none" / "x.gguf")
    assert refused.value.code == "storage"
