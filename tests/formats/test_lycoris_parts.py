"""LyCORIS's leaves behind the names of ComfyUI, diffusers and kohya: one delta for all names."""

import pytest

from loratools.adapter import Chained, Hadamard, Kronecker, Renormed, Rotated
from loratools.containers.bundle import local
from loratools.formats import comfy, diffusers, kohya
from loratools.formats.lycoris_shapes import axis_of, glora_age
from tests.examples_of_deltas import leaf
from tests.formats.image_bytes import found, read, write

INNER = "transformer_blocks.0.attn.to_q"
# How a file names a module, its format, and the address.
NAMES = {
    f"transformer.{INNER}": (diffusers, f"transformer.{INNER}"),
    f"unet.down_blocks.0.attentions.0.{INNER}": (
        diffusers, f"unet.down_blocks.0.attentions.0.{INNER}"
    ),
    "diffusion_model.double_blocks.0.img_attn.qkv": (
        comfy, "diffusion_model.double_blocks.0.img_attn.qkv"
    ),
    "lycoris_transformer_blocks_0_attn_to_q": (kohya, "lycoris_transformer_blocks_0_attn_to_q"),
    "lora_unet_double_blocks_0_img_attn_qkv": (kohya, "lora_unet_double_blocks_0_img_attn_qkv"),
}  # fmt: skip
METHODS = {
    "loha": ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)},
             Hadamard),
    "lokr": ({"lokr_w1": (2, 3), "lokr_w2": (2, 2)}, Kronecker),
    "lokr, in factors": ({"lokr_w1": (2, 3), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2)}, Kronecker),
    "glora": ({"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (4, 2),
               "b2.weight": (2, 6)}, Chained),
    "oft": ({"oft_blocks": (2, 2, 2), "rescale": (4, 1)}, Rotated),
    "boft": ({"oft_blocks": (2, 2, 2, 2)}, Rotated),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_one_delta_whoever_names_it(name, method, tmp_path):
    form, address = NAMES[name]
    leaves, kind = METHODS[method]
    tensors = {f"{name}.{part}": shape for part, shape in leaves.items()}
    adapter = read(form, write(tmp_path / "a.safetensors", tensors | {f"{name}.alpha": ((), 1.0)}))
    assert adapter.problems == ()
    assert list(adapter.deltas) == [f"{address}.weight"]
    assert isinstance(adapter.deltas[f"{address}.weight"], kind)
    others = {comfy, diffusers, kohya} - {form}
    bundle = write(tmp_path / "b.safetensors", tensors)
    assert not any(other.detect(local(bundle)) for other in others)


@pytest.mark.parametrize("method", ["loha", "lokr"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "axis"), [((4, 1), "out"), ((1, 6), "in")])
def test_magnitudes_over_it(name, method, shape, axis, tmp_path):
    form, address = NAMES[name]
    tensors = {f"{name}.{part}": size for part, size in METHODS[method][0].items()}
    path = write(tmp_path / "a.safetensors", tensors | {f"{name}.dora_scale": shape})
    delta = read(form, path).deltas[f"{address}.weight"]
    assert isinstance(delta, Renormed)
    assert delta.axis == axis


def test_what_no_method_takes_is_said(tmp_path):
    name = "transformer." + INNER
    tensors = {f"{name}.{part}": shape for part, shape in METHODS["lokr"][0].items()}
    path = write(tmp_path / "a.safetensors", tensors | {f"{name}.hada_w1_a": (4, 2)})
    ((code, message),) = found(read(diffusers, path))
    assert code == "unknown_type"
    assert "LoHa, LoKr" in message


# The magnitudes' shape, out and in of the weight (a convolution's flat), and whose they are.
AXES = [
    ((4, 1), 4, 6, "out"), ((1, 6), 4, 6, "in"), ((4, 1, 1, 1), 4, 6, "out"),
    ((1, 6, 1, 1), 4, 6, "in"), ((1, 4, 1, 1), 4, 6, "out"), ((1, 4, 1, 1), 4, 4, "in"),
    ((6,), 4, 6, "in"), ((4,), 4, 6, "out"), ((1, 1), 1, 1, "out"), ((4,), 4, None, "out"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "out", "width", "axis"), AXES)
def test_the_axis_of_magnitudes(shape, out, width, axis):
    assert axis_of(leaf(1, *shape), out, width) == axis


@pytest.mark.parametrize("wrong", ["a1", "a2", "b1", "b2", "bm"])
def test_factors_of_no_age(wrong):
    shapes = {"a1": (6, 2), "a2": (2, 6), "b1": (4, 2), "b2": (2, 6, 1), "bm": (2, 2, 3)}
    assert glora_age(shapes) == "new"
    assert glora_age({**shapes, wrong: (5, 5)}) == ""
    assert glora_age({**shapes, wrong: (5,)}) == ""
