"""ComfyUI's own names as bytes: keys as the specification has them, differences, values, copies."""

import struct

import pytest
import torch

from loratools.adapter import Dense, LowRank, Renormed, Replace
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.formats import bfl, comfy, xlabs
from loratools.formats import diffusers as form
from tests.formats.image_bytes import found, key_table, read, write

X = "blocks.0.self_attn.q"
D = f"diffusion_model.{X}"
PAIR = {f"{D}.lora_A.weight": (2, 6), f"{D}.lora_B.weight": (4, 2)}
EXTRA = {"alpha": (), "dora_scale": (4, 1), "magnitude": (4,), "B.bias": (4,), "mid": (2, 2, 3, 3)}


@pytest.mark.parametrize("row", key_table("comfy"), ids=lambda row: row[0])
def test_the_reader_has_the_keys_of_the_specification(row, tmp_path):
    key, address, part = (cell.replace("X.", f"{X}.") for cell in row)
    stem, _, _ = key.rpartition(".lora_")
    if part in "AB":
        old = "lora_down" in key or "lora_up" in key
        words = ("lora_down", "lora_up") if old else ("lora_A", "lora_B")
        shapes = {f"{stem}.{words[0]}.weight": (2, 6), f"{stem}.{words[1]}.weight": (4, 2)}
    elif part == "mid":
        shapes = {f"{D}.lora_down.weight": (2, 6, 1, 1), f"{D}.lora_up.weight": (4, 2, 1, 1),
                  key: EXTRA[part]}  # fmt: skip
    elif part == "reshape":
        return  # whole numbers: the test below
    else:
        shapes = {key: EXTRA.get(part, (4,)), **(PAIR if part in EXTRA else {})}
    assert key in shapes
    path = write(tmp_path / "a.safetensors", shapes)
    adapter = read(comfy, path)
    assert adapter.problems == ()
    assert adapter.vocabulary == "original"
    assert address in adapter.deltas
    kind = {"diff": Dense, "diff_b": Dense, "diff_m": Dense, "B.bias": Dense, "set": Replace,
            "dora_scale": Renormed, "magnitude": Renormed}.get(part, LowRank)  # fmt: skip
    assert isinstance(adapter.deltas[address], kind)
    assert not any(f.detect(local(path)) for f in (form, bfl, xlabs))


def test_alpha_counts_and_a_missing_one_is_the_rank(tmp_path):
    other = "diffusion_model.blocks.1.ffn.0"
    shapes = PAIR | {f"{D}.alpha": ((), 1.0), f"{other}.lora_down.weight": (3, 6),
                     f"{other}.lora_up.weight": (4, 3)}  # fmt: skip
    adapter = read(comfy, write(tmp_path / "a.safetensors", shapes))
    assert [d.scaling for d in adapter.deltas.values()] == [0.5, 1.0]


PARAMETERS = {
    "diffusion_model.double_blocks.0.img_attn.norm.query_norm.set_weight":
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale",
    "diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale.set_weight":
        "diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale",
    "diffusion_model.blocks.0.modulation.diff": "diffusion_model.blocks.0.modulation",
    "diffusion_model.blocks.0.norm3.diff": "diffusion_model.blocks.0.norm3.weight",
    "diffusion_model.head.diff_m": "diffusion_model.head.modulation",
    "text_encoders.clip_l.transformer.text_model.final_layer_norm.diff_b":
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias",
}  # fmt: skip


@pytest.mark.parametrize("key", PARAMETERS)
def test_the_parameter_of_a_difference(key, tmp_path):
    adapter = read(comfy, write(tmp_path / "a.safetensors", PAIR | {key: (4,)}))
    assert adapter.problems == ()
    assert PARAMETERS[key] in adapter.deltas


def test_zeros_are_said_and_left_out(tmp_path):
    zero = "diffusion_model.position_embedding.diff"
    shapes = PAIR | {zero: ((3000,), 0.0), f"{D}.diff_b": ((4,), 0.0)}
    adapter = read(comfy, write(tmp_path / "a.safetensors", shapes))
    assert list(adapter.deltas) == [f"{D}.weight"]
    notes = dict(sorted((message.split()[0], code) for code, message in found(adapter, "note")))
    assert notes == {f"{D}.diff_b": "no_effect", zero: "no_effect"}
    assert found(adapter) == []


def test_the_last_number_of_a_large_tensor_counts(tmp_path):
    path = write(tmp_path / "a.safetensors", {"diffusion_model.x.diff": ((400_000,), 0.0)})
    raw = path.read_bytes()
    path.write_bytes(raw[:-4] + struct.pack("<f", 1e-30))
    assert list(read(comfy, path).deltas) == ["diffusion_model.x.weight"]


def test_the_kernel_of_a_convolution_goes_into_a(tmp_path):
    shapes = {f"{D}.lora_down.weight": (2, 6, 1, 1), f"{D}.lora_up.weight": (4, 2, 1, 1),
              f"{D}.lora_mid.weight": (2, 2, 3, 3)}  # fmt: skip
    delta = read(comfy, write(tmp_path / "a.safetensors", shapes)).deltas[f"{D}.weight"]
    leaves = comfy.keys_of(local(tmp_path / "a.safetensors"))[0]
    down, up, mid = (leaves[f"{D}.lora_{x}.weight"].tensor() for x in ("down", "up", "mid"))
    # One convolution after another, as the layers of LyCORIS' module run.
    image = torch.arange(5 * 6 * 7.0).reshape(1, 6, 5, 7) % 11
    run = torch.conv2d(torch.conv2d(torch.conv2d(image, down), mid, padding=1), up)
    assert (delta.a.shape, delta.rank) == ((2, 6, 3, 3), 2)
    weight = torch.einsum("or,rikl->oikl", delta.b.tensor()[:, :, 0, 0], delta.a.tensor())
    torch.testing.assert_close(torch.conv2d(image, weight, padding=1), run)


def widened(path, sizes):
    write(path, PAIR)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    text, body = raw[8 : 8 + size].decode(), raw[8 + size :]
    at = len(body)
    entry = (
        f'"{D}.reshape_weight": {{"dtype": "I64", "shape": [2], "data_offsets": [{at}, {at + 16}]}}'
    )
    text = (text[:-1] + f", {entry}}}").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body + struct.pack("<2q", *sizes))
    return path


def test_the_widened_sizes_must_be_the_pairs(tmp_path):
    assert read(comfy, widened(tmp_path / "a.safetensors", (4, 6))).problems == ()
    errors = found(read(comfy, widened(tmp_path / "b.safetensors", (4, 9))))
    assert [c for c, _ in errors] == ["config_conflict"]
    assert "(4, 9)" in errors[0][1]


def test_equal_copies_are_a_note_and_others_are_refused(tmp_path):
    a, b = ((2, 6), 1.0), ((4, 2), 2.0)
    twins = {
        f"transformer.{X}.lora_A.weight": a,
        "lora_unet_blocks_0_self_attn_q.lora_up.weight": b,
    }
    tensors = {f"{D}.lora_A.weight": a, f"{D}.lora_B.weight": b, **twins}
    path = write(tmp_path / "a.safetensors", tensors)
    adapter = comfy.read(local(path), assume={})
    assert list(adapter.deltas) == [f"{D}.weight"]
    assert found(adapter) == []
    assert len(found(adapter, "note")) == 2
    for key in twins:
        path = write(tmp_path / "b.safetensors", tensors | {key: (twins[key][0], 9.0)})
        with pytest.raises(LoratoolsError, match="differ") as refused:
            comfy.read(local(path), assume={})
        assert refused.value.code == "duplicate"


ERRORS = {
    "lokr": ({f"{D}.lokr_w1": (2, 2), f"{D}.lokr_t1": (2, 2), f"{D}.alpha": ()}, "unknown_type"),
    "half a lokr": ({f"{D}.lokr_w1": (2, 2), f"{D}.alpha": ()}, "missing"),
    "both": (PAIR | {f"{D}.diff": (4, 6)}, "unexplained"),
    "stray": (PAIR | {"somewhere.else": (2,)}, "unexplained"),
    "kohya": (PAIR | {"lora_unet_other.lora_up.weight": (2, 2)}, "unexplained"),
    "half": ({f"{D}.lora_up.weight": (4, 2)}, "missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_found(case, tmp_path):
    shapes, code = ERRORS[case]
    errors = found(read(comfy, write(tmp_path / "a.safetensors", shapes)))
    assert [c for c, _ in errors] == [code]


def test_text_encoders_beside_it_are_ours_and_diffusers_leaves_them(tmp_path):
    te = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    shapes = PAIR | {f"{te}.lora_A.weight": (2, 6), f"{te}.lora_B.weight": (4, 2)}
    path = write(tmp_path / "a.safetensors", shapes)
    assert not form.detect(local(path))
    assert list(read(comfy, path).deltas) == [f"{D}.weight", f"{te}.weight"]


def test_a_checkpoint_is_no_adapter(tmp_path):
    shapes = {
        f"model.{D}.weight": (4, 6),
        f"model.{D}.alpha": (),
        "model.diffusion_model.a1.weight": (2, 2),
    }
    assert not comfy.detect(local(write(tmp_path / "a.safetensors", shapes)))
