"""Flux and its kin: diffusers' own converters, run on what we call each weight."""

import pytest
import torch
from diffusers import ChromaTransformer2DModel, Flux2Transformer2DModel, FluxTransformer2DModel
from diffusers.loaders import single_file_utils as convert
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_xlabs_flux_lora_to_diffusers,
)

from loratools.errors import FitError
from loratools.names import flux
from loratools.names.mangling import mangled
from loratools.names.orders import ORDERS, SIZES
from loratools.names.rules import Names
from tests.names.both_ways import agree, on_meta, one_to_one

FEW = {"num_layers": 2, "num_single_layers": 2}
KIN = {
    "flux": (
        flux.flux,
        lambda: FluxTransformer2DModel(**FEW, guidance_embeds=True),
        convert.convert_flux_transformer_checkpoint_to_diffusers,
    ),
    "chroma": (
        flux.chroma,
        lambda: ChromaTransformer2DModel(**FEW),
        convert.convert_chroma_transformer_checkpoint_to_diffusers,
    ),
    "flux2": (
        flux.flux2,
        lambda: Flux2Transformer2DModel(**FEW),
        convert.convert_flux2_transformer_checkpoint_to_diffusers,
    ),
}


@pytest.mark.parametrize("name", KIN)
def test_diffusers_converter_makes_its_names_of_ours(name):
    rules, make, converter = KIN[name]
    agree(rules(), on_meta(make), converter)
    one_to_one(rules())


def test_sizes_come_from_shapes_and_not_from_flux_dev():
    names = Names(flux.flux())
    for inner, mlp in ((64, 256), (48, 80)):
        made = SIZES[names.of_whole("diffusion_model.single_blocks.41.linear1").rule.sizes]
        assert made(3 * inner + mlp, inner, 4) == [inner, inner, inner, mlp]
    with pytest.raises(FitError, match="192 rows are not 3 parts of 64 and a rest"):
        SIZES["square"](192, 64, 4)
    with pytest.raises(FitError, match="have no halves"):
        ORDERS["halves"](7)


def test_a_kohya_file_goes_where_diffusers_puts_it():
    """Every module that kohya trains, as diffusers' LoRA loader renames and divides it."""
    rank, inner, mlp = 2, 3072, 12288
    names = Names(flux.flux())
    rows = {"qkv": 3 * inner, "linear1": 3 * inner + mlp, "modulation.lin": 3 * inner}
    rows |= {"img_mod.lin": 6 * inner, "txt_mod.lin": 6 * inner, "mlp.0": mlp}
    wide = {"linear2": inner + mlp, "mlp.2": mlp}
    state, wholes = {}, {}
    for rule in flux.flux():
        if "_blocks.{n}" in rule.whole and "norm.{" not in rule.whole:
            if rule.whole.endswith(".scale"):
                continue
            module = rule.whole.replace("{n}", "0")
            out = next((n for end, n in rows.items() if module.endswith(end)), inner)
            into = next((n for end, n in wide.items() if module.endswith(end)), inner)
            kohya = mangled(module, "flux")
            wholes[module] = into
            state[f"{kohya}.lora_down.weight"] = torch.randn(rank, into)
            state[f"{kohya}.lora_up.weight"] = torch.randn(out, rank)
            state[f"{kohya}.alpha"] = torch.tensor(float(rank))
    given = dict(state)
    made = _convert_kohya_flux_lora_to_diffusers(state)
    seen = set()
    for module, into in wholes.items():
        found = names.of_whole(module)
        up = given[f"{mangled(module, 'flux')}.lora_up.weight"]
        count = len(found.parts)
        sizes = [len(up)] if count == 1 else SIZES[found.rule.sizes](len(up), into, count)
        for part, piece in zip(found.parts, up.split(sizes), strict=True):
            torch.testing.assert_close(made[f"{part}.lora_B.weight"], piece, rtol=0, atol=0)
            seen.add(part)
    assert {key.rpartition(".lora_")[0] for key in made} == seen


def test_xlabs_names_mean_the_same_modules():
    """XLabs' processors stand for the modules that its own names suggest."""
    blocks = "double_blocks.3.processor"
    state = {}
    for name in ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2"):
        state[f"{blocks}.{name}.down.weight"] = torch.randn(2, 3072)
        state[f"{blocks}.{name}.up.weight"] = torch.randn(3072 * (3 if "qkv" in name else 1), 2)
    made = {k.rpartition(".lora_")[0] for k in _convert_xlabs_flux_lora_to_diffusers(state)}
    names = Names(flux.flux())
    wholes = {f"{a}_attn.{b}" for a in ("img", "txt") for b in ("qkv", "proj")}
    found = [names.of_whole(f"diffusion_model.double_blocks.3.{whole}") for whole in wholes]
    assert made == {part for each in found for part in each.parts}
