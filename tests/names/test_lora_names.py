"""What diffusers' LoRA loaders make of files in our original and mangled names."""

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as lora

from loratools.names.architectures import BY_NAME
from loratools.names.mangling import mangled
from loratools.names.orders import ORDERS, SIZES
from loratools.names.rules import Names
from tests.names.both_ways import on_meta
from tests.names.test_mangling import CALLED, REAL, trained

RANK = 2
BLOCKS = ("blocks.", "layers.")
# The model, diffusers' loader, how modules are written, and those that the loader knows at all.
FILES = [
    ("wan", lora._convert_non_diffusers_wan_lora_to_diffusers, "original", BLOCKS),
    (
        "wan from images",
        lora._convert_non_diffusers_wan_lora_to_diffusers,
        "original",
        (*BLOCKS, "img_emb."),
    ),
    ("wan", lora._convert_musubi_wan_lora_to_diffusers, "kohya", BLOCKS),
    (
        "hunyuan-video",
        lora._convert_hunyuan_video_lora_to_diffusers,
        "original",
        ("double_blocks.", "single_blocks."),
    ),
    ("lumina2", lora._convert_non_diffusers_lumina2_lora_to_diffusers, "original", BLOCKS),
    ("z-image", lora._convert_non_diffusers_z_image_lora_to_diffusers, "kohya", ("",)),
    ("qwen-image", lora._convert_non_diffusers_qwen_lora_to_diffusers, "kohya", ("",)),
    ("flux2", lora._convert_non_diffusers_flux2_lora_to_diffusers, "original", ("",)),
    ("flux2", lora._convert_kohya_flux2_lora_to_diffusers, "kohya", BLOCKS),
]


def wholes(name):
    """Modules that trainers adapt, by their original name: rows and columns of the whole."""
    known, model = BY_NAME[CALLED.get(name, name)], on_meta(REAL[name])
    names, found = Names(known.rules()), {}
    for module in trained(REAL[name]):
        hit = names.of_part(f"{known.denoiser}.{module}")
        shape = model.get_submodule(module).weight.shape
        _, rows, _ = found.get(hit.whole, (hit, 0, 0))
        found[hit.whole] = hit, rows + shape[0], shape[1]
    return known, found


@pytest.mark.parametrize(("name", "loader", "vocabulary", "only"), FILES)
def test_every_row_goes_where_diffusers_loads_it(name, loader, vocabulary, only):
    known, found = wholes(name)
    state, wanted = {}, {}
    for whole, (hit, rows, columns) in found.items():
        if not any(each in whole for each in only):
            continue
        apart = vocabulary == "kohya" and known.kohya == "diffusers"
        up = torch.arange(rows, dtype=torch.float64).expand(RANK, rows).T
        count = len(hit.parts)
        sizes = [rows] if count == 1 else SIZES[hit.rule.sizes](rows, columns, count)
        for part, piece in zip(hit.parts, up.split(sizes), strict=True):
            order = ORDERS.get(hit.rule.order, lambda n, **facts: list(range(n)))
            wanted[part] = piece[order(len(piece), columns=columns)]
        for written, b in [(part, wanted[part]) for part in hit.parts] if apart else [(whole, up)]:
            a = torch.zeros(RANK, columns)
            if vocabulary == "original":
                state |= {f"{written}.lora_A.weight": a, f"{written}.lora_B.weight": b.clone()}
            else:
                key = mangled(written, known.name)
                state |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b.clone()}
                state[f"{key}.alpha"] = torch.tensor(float(RANK))
    made = loader(state)
    assert {key.rpartition(".lora_")[0] for key in made} == wanted.keys()
    if loader is lora._convert_non_diffusers_flux2_lora_to_diffusers:
        # It forgets the swap that diffusers makes of the base itself (tests/names/test_flux.py).
        wrong = made.pop("transformer.norm_out.linear.lora_B.weight")
        rows = wanted.pop("transformer.norm_out.linear")
        assert torch.equal(wrong, rows[ORDERS["halves"](len(rows))])
    for part, piece in wanted.items():
        assert torch.equal(made[f"{part}.lora_B.weight"], piece), part
