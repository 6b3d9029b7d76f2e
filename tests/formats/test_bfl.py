"""BFL's files as bytes: keys as the specification has them, norms that are set, wider inputs."""

import pytest

from loratools.adapter import Dense, LowRank, Replace
from loratools.containers.bundle import local
from loratools.formats import bfl, comfy, xlabs
from loratools.formats import diffusers as form
from tests.formats.image_bytes import found, key_table, read, write

QKV = "double_blocks.0.img_attn.qkv"
PAIR = {f"{QKV}.lora_A.weight": (2, 4), f"{QKV}.lora_B.weight": (12, 2)}
KINDS = {"A": LowRank, "B": LowRank, "B.bias": Dense, "value": Replace}


@pytest.mark.parametrize("row", key_table("bfl"), ids=lambda row: row[0])
@pytest.mark.parametrize("side", ["query", "key"])
def test_the_reader_has_the_keys_of_the_specification(row, side, tmp_path):
    key, address, part = (
        c.replace("X.", f"{QKV}.").replace(".N.", ".0.").replace(".S_", f".{side}_") for c in row
    )
    front = "base_model.model." if key.startswith("base_model") else ""
    shapes = {f"{front}{k}": s for k, s in PAIR.items()}
    if part not in "AB":
        shapes[key] = (12,) if part == "B.bias" else (4,)
    assert key in shapes
    path = write(tmp_path / "a.safetensors", shapes)
    adapter = read(bfl, path)
    assert adapter.problems == ()
    assert adapter.vocabulary == "original"
    assert isinstance(adapter.deltas[f"diffusion_model.{address}"], KINDS[part])
    assert not any(f.detect(local(path)) for f in (form, comfy, xlabs))


def test_a_wider_input_is_kept_as_it_is(tmp_path):
    shapes = {"img_in.lora_A.weight": (2, 128), "img_in.lora_B.weight": (12, 2)}
    adapter = read(bfl, write(tmp_path / "a.safetensors", shapes))
    assert adapter.deltas["diffusion_model.img_in.weight"].a.shape == (2, 128)


@pytest.mark.parametrize(
    "key", ["double_blocks.0.img_attn.norm.query_norm.bias", "x.y", "img_in.weight"]
)
def test_strays_are_named(key, tmp_path):
    adapter = read(bfl, write(tmp_path / "a.safetensors", PAIR | {key: (4,)}))
    assert [c for c, m in found(adapter) if key in m] == ["unexplained"]


def test_a_checkpoint_is_no_adapter(tmp_path):
    shapes = {f"{QKV}.weight": (12, 4), "double_blocks.0.img_attn.norm.key_norm.scale": (4,)}
    assert not bfl.detect(local(write(tmp_path / "a.safetensors", shapes)))
