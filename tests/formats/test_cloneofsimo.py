"""cloneofsimo/lora's numbered pairs as bytes: what they are called, and what is refused."""

import pytest

from loratools.formats import cloneofsimo
from tests.formats.image_bytes import found, key_table, read, write

TEXT = {f"text_encoder:{i}:{h}": (1, 8) if h == "down" else (8, 1)
        for i in range(8) for h in ("up", "down")}  # fmt: skip


def test_the_reader_has_the_keys_of_the_specification(tmp_path):
    for key, part in key_table("cloneofsimo"):
        name = key.replace(":N:", ":0:").replace("T", "<s1>") if part == "token" else key
        given = name.replace(":N:", ":0:")
        pair = {given: (1, 8) if part == "A" else (8, 1)} if part != "token" else {given: (8,)}
        adapter = read(
            cloneofsimo, write(tmp_path / "a.safetensors", TEXT | pair, {"<s1>": "<embed>"})
        )
        if part == "token":
            assert adapter.config == {"tokens": ["<s1>"]}
            assert [c for c, _ in found(adapter, "note")] == ["unexplained"]
        else:
            assert not [m for c, m in found(adapter) if c == "unexplained"]


def test_the_layers_of_clip_are_named(tmp_path):
    adapter = read(cloneofsimo, write(tmp_path / "a.safetensors", TEXT))
    front = "text_encoder.text_model.encoder.layers"
    assert list(adapter.deltas) == [
        f"{front}.{i}.self_attn.{p}.weight"
        for i in range(2)
        for p in ("k_proj", "v_proj", "q_proj", "out_proj")
    ]
    assert adapter.vocabulary == "diffusers"
    assert {d.scaling for d in adapter.deltas.values()} == {1.0}
    assumed = read(cloneofsimo, tmp_path / "a.safetensors", alpha="2")
    assert {d.scaling for d in assumed.deltas.values()} == {2.0}


UNNAMED = {
    "too few": {k: s for k, s in TEXT.items() if ":7:" not in k},
    "a gap": {k: s for k, s in TEXT.items() if ":3:" not in k},
    "widths": TEXT | {"text_encoder:2:up": (9, 1)},
    "a net": {"unet:0:up": (8, 1), "unet:0:down": (1, 8)},
    "convolutions": {"unet:0:up": (8, 1, 1, 1), "unet:0:down": (1, 8, 3, 3)},
}


@pytest.mark.parametrize("case", UNNAMED)
def test_numbers_of_other_models_are_refused(case, tmp_path):
    errors = found(read(cloneofsimo, write(tmp_path / "a.safetensors", UNNAMED[case])))
    assert [c for c, _ in errors] == ["unknown_type"]


def test_half_pairs_ranks_and_strays_are_found(tmp_path):
    shapes = {k: s for k, s in TEXT.items() if k != "text_encoder:0:up"} | {"x": (2,)}
    metadata = {"text_encoder:1:rank": "4", "text_encoder:2:rank": "1"}
    adapter = read(cloneofsimo, write(tmp_path / "a.safetensors", shapes, metadata))
    assert [c for c, _ in found(adapter)] == ["unexplained", "unknown_type", "missing"]
    assert [c for c, _ in found(adapter, "warning")] == ["config_conflict"]
