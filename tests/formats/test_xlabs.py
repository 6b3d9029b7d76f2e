"""XLabs' files as bytes: keys as the specification has them, thirds of B, what is refused."""

import pytest

from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.formats import bfl, comfy, xlabs
from loratools.formats import diffusers as form
from tests.formats.image_bytes import found, key_table, read, write

ROWS = key_table("xlabs")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
@pytest.mark.parametrize("front", ["", "diffusion_model.", "module."])
@pytest.mark.parametrize("half", ["down", "up"])
def test_the_reader_has_the_keys_of_the_specification(row, front, half):
    key, *modules = (cell.replace(".N.", ".17.").replace(".H.", f".{half}.") for cell in row)
    named = xlabs.module_of(front + key)
    assert named is not None
    assert (named[1], named[2]) == (half, tuple(modules))


def test_the_specification_has_every_module():
    described = {(row[0].split("_")[0], row[0].split(".")[3]) for row in ROWS}
    assert described == set(xlabs.MODULES)


QKV = "double_blocks.0.processor.qkv_lora1"
PROJ = "single_blocks.3.processor.proj_lora"
TO = "transformer.transformer_blocks.0.attn.to_"


def test_b_is_cut_in_thirds_and_a_is_shared(tmp_path):
    shapes = {f"{QKV}.down.weight": (2, 5), f"{QKV}.up.weight": (12, 2),
              f"{PROJ}.down.weight": (2, 20), f"{PROJ}.up.weight": (4, 2)}  # fmt: skip
    path = write(tmp_path / "a.safetensors", shapes)
    adapter = read(xlabs, path)
    assert adapter.problems == ()
    assert adapter.vocabulary == "diffusers"
    assert not any(f.detect(local(path)) for f in (form, comfy, bfl))
    q, k, v = (adapter.deltas[f"{TO}{x}.weight"] for x in "qkv")
    assert {q.scaling, k.scaling, v.scaling} == {1.0}
    assert q.a == k.a == v.a
    whole = local(path)
    up = next(x for n, x in xlabs.keys_of(whole)[0].items() if n == f"{QKV}.up.weight")
    assert q.b.numbers() + k.b.numbers() + v.b.numbers() == up.numbers()
    out = adapter.deltas["transformer.single_transformer_blocks.3.proj_out.weight"]
    assert (out.a.shape, out.b.shape) == ((2, 20), (4, 2))
    assert read(xlabs, path, alpha="4").deltas[f"{TO}q.weight"].scaling == 2


ERRORS = {
    "no thirds": ({f"{QKV}.down.weight": (2, 5), f"{QKV}.up.weight": (10, 2)}, "shape_factors"),
    "half": ({f"{QKV}.down.weight": (2, 5)}, "missing"),
    "half of one": ({f"{PROJ}.up.weight": (4, 2)}, "missing"),
    "ranks": ({f"{QKV}.down.weight": (2, 5), f"{QKV}.up.weight": (12, 3)}, "shape_factors"),
    "stray": (
        {f"{PROJ}.down.weight": (2, 5), f"{PROJ}.up.weight": (4, 2), "x": (1,)}, "unexplained"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_found(case, tmp_path):
    shapes, code = ERRORS[case]
    errors = found(read(xlabs, write(tmp_path / "a.safetensors", shapes)))
    assert {c for c, _ in errors} == {code}


def test_one_key_with_and_without_front(tmp_path):
    half = {f"{PROJ}.down.weight": ((2, 5), 1.0), f"{PROJ}.up.weight": ((4, 2), 1.0)}
    same = half | {f"diffusion_model.{PROJ}.up.weight": ((4, 2), 1.0)}
    adapter = read(xlabs, write(tmp_path / "a.safetensors", same))
    assert [c for c, _ in found(adapter, "note")] == ["unexplained"]
    differs = half | {f"diffusion_model.{PROJ}.up.weight": ((4, 2), 2.0)}
    with pytest.raises(LoratoolsError) as refused:
        read(xlabs, write(tmp_path / "b.safetensors", differs))
    assert refused.value.code == "duplicate"
