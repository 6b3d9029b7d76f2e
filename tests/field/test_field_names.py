"""Real lists of names and of pairs of names: every one is explained, and the same way back."""

import json

import pytest

from loratools.names import clip, dit, flux, unet
from loratools.names.mangling import architecture, mangled, unmangled
from loratools.names.orders import SIZES
from loratools.names.rules import Names, asked

UNETS = {
    "sd1": unet.sd1,
    "sd2": unet.sd2,
    "sdxl": unet.sdxl,
    "ssd": unet.sdxl,
    "vega": unet.sdxl,
    "refiner": unet.refiner,
}
# Which encoder each map calls te, te0, te1, and where its single file has it.
ENCODERS = {
    "sd1": {"te": "cond_stage_model.transformer."},
    "sd2": {"te": "cond_stage_model.model."},
    "refiner": {"te1": "conditioner.embedders.0.model."},
}
SDXL = {"te0": "conditioner.embedders.0.transformer.", "te1": "conditioner.embedders.1.model."}
SGM = "model.diffusion_model."


def keymap(folder, name):
    return json.loads((folder / "keymaps" / f"{name}.json").read_text())


def there(names, key):
    """A diffusers key in the other vocabulary."""
    found, rest = asked(names.of_part, key)
    return found.whole + rest


def back(names, key):
    found, rest = asked(names.of_whole, key)
    return [part + rest for part in found.parts]


@pytest.mark.parametrize("name", UNETS)
def test_every_unet_of_ai_toolkit(name, field_data):
    pairs = keymap(field_data, f"aitoolkit__stable_diffusion_{name}")["ldm_diffusers_keymap"]
    names, count = Names(UNETS[name]()), 0
    for original, here in pairs.items():
        if original.startswith(SGM):
            ours = "diffusion_model." + original.removeprefix(SGM)
            key = "unet." + here.removeprefix("unet_")
            assert there(names, key) == ours
            assert back(names, ours) == [key]
            count += 1
    assert count > 500


@pytest.mark.parametrize("name", UNETS)
def test_every_text_encoder_of_ai_toolkit(name, field_data):
    maps = keymap(field_data, f"aitoolkit__stable_diffusion_{name}")
    for said, prefix in ENCODERS.get(name, SDXL).items():
        if prefix.endswith(".transformer."):
            names = Names(clip.stored(clip.CLIP, "text_encoder", prefix))
        else:
            names = Names(clip.openclip("text_encoder", prefix))
        count = 0
        for original, here in maps["ldm_diffusers_keymap"].items():
            if not here.startswith(f"{said}_") or "text_projection" in here:
                continue  # ai-toolkit's own cut files hold the projection as a linear layer
            key = "text_encoder." + here.removeprefix(f"{said}_")
            assert there(names, key) == original
            assert back(names, original) == [key]
            count += 1
        assert count > 190
        for original, made in maps["ldm_diffusers_operator_map"].items():
            if original.startswith(prefix):
                keys = ["text_encoder." + each.removeprefix(f"{said}_") for each in made["cat"]]
                assert back(names, original) == keys  # q, k, v, in this order
                assert {there(names, key) for key in keys} == {original}
                count += 1
        for part, how in maps["diffusers_ldm_operator_map"].items():
            original, rows = how["slice"]
            if part.startswith(f"{said}_") and original.startswith(prefix):
                found, _ = asked(names.of_part, "text_encoder." + part.removeprefix(f"{said}_"))
                start, _, stop = rows.partition(",")[0].partition(":")
                if start and stop:
                    assert int(start) == found.part * (int(stop) - int(start))
                else:
                    assert found.part == (2 if start else 0)


def test_diffsynth_maps_sdxl_and_its_text_encoders(field_data):
    names = Names(unet.sdxl())
    for here, original in keymap(field_data, "diffsynth__sdxl").items():
        assert there(names, f"unet.{here}") == "diffusion_model." + original.removeprefix(SGM)
    first = Names(clip.stored(clip.CLIP, "text_encoder", SDXL["te0"]))
    second = Names(clip.openclip("text_encoder", SDXL["te1"]))
    for file, names in (("", first), ("_2", second)):
        for here, original in keymap(field_data, f"diffsynth__sdxl_text_encoder{file}").items():
            assert there(names, "text_encoder." + here.removeprefix("model.")) == original


def test_diffsynth_maps_flux(field_data):
    """Both vocabularies stand beside a third: what is one there is one rule here."""
    pairs = keymap(field_data, "diffsynth__flux_dit")
    rules = [rule for rule in flux.flux() if len(rule.parts) == 1]
    checked = 0
    for rule in rules:
        ends = [
            each.split("{n}.")[-1].removesuffix(".weight") for each in (*rule.parts, rule.whole)
        ]
        here, original = (end.split(".", 1)[1] if "{n}" not in rule.whole else end for end in ends)
        third = pairs.get(f"{original}.weight") or pairs.get(original)
        if third and here in pairs and "norm" not in original:
            assert third.removesuffix(".weight").endswith(pairs[here]), (here, original)
            checked += 1
    assert checked > 15


def test_diffsynth_maps_wan_and_krea2(field_data):
    names = Names(dit.wan())
    for here, original in keymap(field_data, "diffsynth__wan_video_dit").items():
        assert there(names, f"transformer.{here}") == f"diffusion_model.{original}"
        assert back(names, f"diffusion_model.{original}") == [f"transformer.{here}"]
    names = Names(dit.krea2())
    for original, here in keymap(field_data, "diffsynth__krea2_dit").items():
        made = back(names, f"diffusion_model.{original}")
        if "qnorm" in original:  # that map sends both norms to norm_k; diffusers has norm_q
            here = here.replace("norm_k", "norm_q")
        assert made == [f"transformer.{here}"]


@pytest.mark.parametrize(
    ("file", "rules", "prefix"),
    [
        ("invoke__flux2_transformer_bfl_keys", flux.flux2, ""),
        ("invoke__z_image_transformer_comfyui_keys", dit.z_image, ""),
        ("invoke__anima_comfyui_keys", dit.anima, "net."),
    ],
)
def test_base_files_in_the_original_names(file, rules, prefix, field_data):
    names = Names(rules())
    for key in keymap(field_data, file):
        if key == "norm_final.weight":  # Lumina's, which no model uses (diffusers drops it too)
            continue
        original = f"diffusion_model.{key.removeprefix(prefix)}"
        parts = back(names, original)
        assert {there(names, part) for part in parts} == {original}


# file, prefix to take away and to put there, the architecture that its names are those of
LORAS = [
    ("invoke__flux_lora_kohya_format", "", "", "flux"),
    ("invoke__flux_lora_diffusers_format", "", "", "flux"),
    ("invoke__flux_lora_diffusers_base_model_format", "base_model.model.", "transformer.", "flux"),
    ("invoke__flux_lokr_bfl_format", "", "", None),  # one block, as in Flux, Flux 2 and Chroma
    ("invoke__anima_lora_kohya_format", "", "", "anima"),
    ("invoke__anima_lora_peft_format", "", "", "anima"),
    ("invoke__qwen_image_lora_diffusers_format", "", "transformer.", None),
    ("lorainspector__inspector__file__tests__alpha_keys", "", "", "sd1"),
    ("lorainspector__inspector__file__tests__base_names", "", "", "sd1"),
]
LEAVES = (".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha")
LEAVES += (".lokr_w1", ".lokr_w2")


def modules(keys, old, new):
    """The modules of a LoRA file's keys."""
    found = {}
    for key in keys:
        end = next((end for end in LEAVES if key.endswith(end)), "")
        found[new + key.removesuffix(end).removeprefix(old)] = None
    return list(found)


@pytest.mark.parametrize(("file", "old", "new", "meant"), LORAS)
def test_the_model_of_real_loras(file, old, new, meant, field_data):
    names = modules(keymap(field_data, file), old, new)
    assert architecture(names) == meant
    if "." not in names[0]:
        found = unmangled(names)
        assert found.problems == ()
        assert list(found.found) == names
        assert [mangled(address, meant) for _, address in found.found.values()] == names


def test_shapes_of_real_flux_loras_divide_as_the_rules_say(field_data):
    shapes = keymap(field_data, "invoke__flux_lora_kohya_format")
    fused = keymap(field_data, "invoke__flux_lora_diffusers_format")
    names, checked = Names(flux.flux()), 0
    for name, (_, address) in unmangled({k.partition(".")[0] for k in shapes}).found.items():
        found = names.of_whole(address)
        rows = shapes[f"{name}.lora_up.weight"][0]
        columns = shapes[f"{name}.lora_down.weight"][1]
        count = len(found.parts)
        sizes = [rows] if count == 1 else SIZES[found.rule.sizes](rows, columns, count)
        for part, size in zip(found.parts, sizes, strict=True):
            if f"{part}.lora_B.weight" in fused:
                assert fused[f"{part}.lora_B.weight"][0] == size
                assert fused[f"{part}.lora_A.weight"][1] == columns
                checked += 1
    assert checked > 400
