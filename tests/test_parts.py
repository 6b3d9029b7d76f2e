"""Weights of parts and blocks, beside sums of dense matrices in float64."""

import json
import re
from fnmatch import fnmatchcase

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.commands.verify import verify
from loratools.commands.weighing import Parts, weight
from loratools.errors import MalformedError, UsageError
from loratools.names import blocks, flux, unet
from tests.commands.adapter_files import Pair
from tests.commands.image_files import SD1, kohya, mangled

BOTH = "unet=0.8;text_encoder=-0.4"
# BASE, IN01, IN02, IN04, IN05, IN07, IN08, M00, OUT03 ...: of SD1's modules, the first down block
# lies in IN01, the middle in M00.
SEVENTEEN = (0.5, 2, *[1] * 5, 0, *[1] * 9)


def pairs(seed):
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for module, (out, into, *kernel) in SD1.items():
        a = torch.randn(2, into, *kernel, generator=draw)
        b = torch.randn(out, 2, *[1] * len(kernel), generator=draw)
        found[module] = Pair(a, b, 1.0)
    return found


def dense(pair, scaling=0.5):
    return scaling * (pair.b.double().flatten(1) @ pair.a.double().flatten(1))


def adapter(folder, name, seed):
    found = pairs(seed)
    return kohya(folder / name, found), {m: dense(p) for m, p in found.items()}


def merged(path):
    """Updates of a kohya file as dense matrices, computed here."""
    tensors = load_file(path)
    found = {}
    for module in SD1:
        name = mangled(module)
        if f"{name}.lora_up.weight" in tensors:
            up, down = (tensors[f"{name}.lora_{x}.weight"].double() for x in ("up", "down"))
            scaling = float(tensors[f"{name}.alpha"]) / down.shape[0]
            found[module] = scaling * (up.flatten(1) @ down.flatten(1))
    return found


def base(folder):
    draw = torch.Generator().manual_seed(9)
    tensors = {f"{m}.weight": torch.randn(s, generator=draw) for m, s in SD1.items()}
    save_file(tensors, folder / "base.safetensors")
    return folder / "base.safetensors", tensors


def of_part(module, unet=0.8, text=-0.4):
    return unet if module.startswith("unet.") else text


def of_block(module):
    if module.startswith("text_encoder."):
        return 0.5
    return 0 if "mid_block" in module else 2


# ------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("given", [BOTH, {"unet": 0.8, "text_encoder": -0.4}, [BOTH]])
def test_a_merge_weighs_each_part(tmp_path, given):
    path, found = adapter(tmp_path, "a", 1)
    loratools.merge([path], weights=given, out=tmp_path / "out.safetensors")
    wanted = {m: of_part(m) * d for m, d in found.items()}
    for module, update in merged(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(update, wanted[module], rtol=1e-6, atol=1e-6)


def test_two_adapters_have_a_specification_each(tmp_path):
    (a, first), (b, second) = adapter(tmp_path, "a", 1), adapter(tmp_path, "b", 2)
    result = loratools.merge([a, b], weights=[BOTH, 0.5], out=tmp_path / "out.safetensors")
    assert result.as_json()["weights"] == [BOTH, 0.5]
    for module, update in merged(tmp_path / "out.safetensors").items():
        wanted = of_part(module) * first[module] + 0.5 * second[module]
        torch.testing.assert_close(update, wanted, rtol=1e-5, atol=1e-5)
    assert verify(tmp_path / "out.safetensors").ok


def test_a_fold_weighs_each_part_and_says_so(tmp_path):
    path, found = adapter(tmp_path, "a", 1)
    over, tensors = base(tmp_path)
    out = tmp_path / "out.safetensors"
    loratools.merge([path], over, weights=BOTH, out=out)
    for module, update in found.items():
        before = tensors[f"{module}.weight"].double()
        wanted = (before + of_part(module) * update.reshape(before.shape)).float()
        assert torch.equal(load_file(out)[f"{module}.weight"], wanted), module
    receipt = json.loads((tmp_path / f"{out.name}.loratools.json").read_text())
    said = receipt["recipe"]["adapters"][0]["weight"]
    assert said == BOTH
    proof = verify(out, adapters=[path], base=over)
    assert (proof.ok, proof.proved) == (True, "replay")
    again = tmp_path / "again.safetensors"
    recipe = tmp_path / f"{out.name}.loratools.json"
    loratools.merge([path], over, recipe=recipe, out=again)
    assert again.read_bytes() == out.read_bytes()


def test_the_first_part_that_names_a_target_counts(tmp_path):
    path, found = adapter(tmp_path, "a", 1)
    over, tensors = base(tmp_path)
    out = tmp_path / "out.safetensors"
    loratools.merge([path], over, weights="*.attn2.*=3;unet=0.5;*=2", out=out)
    for module, update in found.items():
        number = 3 if fnmatchcase(module, "*.attn2.*") else of_part(module, 0.5, 2)
        before = tensors[f"{module}.weight"].double()
        wanted = (before + number * update.reshape(before.shape)).float()
        assert torch.equal(load_file(out)[f"{module}.weight"], wanted), module


def test_the_order_of_the_rest_and_of_one_among_all_text_encoders_does_not_matter():
    parts = weight("*=1;text_encoder=2;text_encoder_2=3")
    names = "unet.conv_in.weight", "text_encoder.x.weight", "text_encoder_2.x.weight"
    assert [parts(name) for name in names] == [1, 2, 3]


# ------------------------------------------------------------------------------- blocks


def test_a_list_weighs_blocks_and_zeros_leave_them_out(tmp_path):
    path, found = adapter(tmp_path, "a", 1)
    over, tensors = base(tmp_path)
    out, spec = tmp_path / "out.safetensors", "lbw=" + ",".join(map(str, SEVENTEEN))
    result = loratools.merge([path], over, weights=spec, out=out)
    assert "blocks left out: M00" in result.notes
    for module, update in found.items():
        before = tensors[f"{module}.weight"].double()
        wanted = (before + of_block(module) * update.reshape(before.shape)).float()
        assert torch.equal(load_file(out)[f"{module}.weight"], wanted), module
    receipt = json.loads((tmp_path / f"{out.name}.loratools.json").read_text())
    assert receipt["recipe"]["adapters"][0]["left_out"] == ["M00"]
    assert receipt["recipe"]["adapters"][0]["weight"] == spec
    assert verify(out, adapters=[path], base=over).proved == "replay"


def test_a_list_multiplies_the_parts_weights_in_a_merge_too(tmp_path):
    path, found = adapter(tmp_path, "a", 1)
    spec = f"{BOTH};lbw=" + ",".join(map(str, SEVENTEEN))
    loratools.merge([path], weights=spec, out=tmp_path / "out.safetensors")
    got = merged(tmp_path / "out.safetensors")
    assert got.keys() == {m for m in found if of_block(m)}
    for module, update in got.items():
        wanted = of_part(module) * of_block(module) * found[module]
        torch.testing.assert_close(update, wanted, rtol=1e-6, atol=1e-6)
    assert verify(tmp_path / "out.safetensors").ok


@pytest.mark.parametrize("rules", [unet.sd1, unet.sd2, unet.sdxl])
def test_a_module_is_in_one_block_by_all_of_its_names(rules):
    """diffusers' names, LDM's and what kohya makes of both."""
    known = blocks.weighted([1] * 26)
    seen = set()
    for rule in rules():
        for number in "0", "7":
            part, whole = (x.replace("{n}", number) + ".weight" for x in (*rule.parts, rule.whole))
            other = re.sub(r"\.(?!weight)", "_", part.replace("unet.", "lora_unet_"))
            found = {blocks.block([name], known) for name in (part, whole, other)}
            assert len(found) == 1, (part, whole, found)
            seen |= found
    last = 8 if rules is unet.sdxl else 11
    ends = {f"IN{last:02}", f"OUT{last:02}", "IN00", "OUT00", "M00"}
    assert ends <= seen
    assert f"IN{last + 1:02}" not in seen
    assert seen - {None} <= known.keys()
    assert None in seen  # time embeddings, the last convolution


def test_attention_of_sdxl_lies_in_the_twelve_blocks_and_of_sd1_in_the_seventeen():
    for rules, length in ((unet.sdxl, 12), (unet.sd1, 17)):
        known = blocks.weighted([1] * length)
        names = [r.whole for r in rules() if ".transformer_blocks." in r.whole]
        found = {blocks.block([name.replace("{n}", "0")], known) for name in names}
        assert found == known.keys() - {"BASE"}


def test_blocks_of_flux():
    known = blocks.weighted([1] * 61)
    for rule in flux.flux():
        if "blocks" not in rule.whole:
            continue
        names = [x.replace("{n}", "7") for x in (*rule.parts, rule.whole)]
        letter = "S" if "single" in rule.whole else "D"
        assert {blocks.block([name], known) for name in names} == {f"{letter}07"}
    for name, where in {
        "diffusion_model.img_in": "IN", "transformer.x_embedder": "IN",
        "lora_unet_time_in_in_layer": "IN", "diffusion_model.final_layer.linear": "OUT",
        "transformer.proj_out.weight": "OUT", "text_encoder.text_model.x": "CLIP",
        "lora_te1_text_model_x": "CLIP", "lora_te3_encoder_block_0_x": "T5",
        "text_encoder_2.encoder.block.0": "T5", "lora_unet_single_blocks_3_linear1": "S03",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "IN01",
    }.items():  # fmt: skip
        assert blocks.block([name], known) == where, name


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("unet=0.8", r"no part names .* more targets .*\*=1"),
        ("unet=0.8;text_encoder=1;transformer=2", "transformer names no target"),
        ("unet=0;*=1", r"weight 0 of unet: .* --skip"),
        ("unet=nan;*=1", "weight nan of unet"),
        ("unet=a;*=1", "weight a: expected any finite number but 0"),
        ("unet=1;unet=2", "stands there twice"),
        ("unet=1;2", "expected PART=NUMBER"),
        ("=1", "expected PART=NUMBER"),
        (";=", "expected PART=NUMBER"),
        ("lbw=1,2", "has 2 numbers; lists of block weights have 12, 17"),
        ("lbw=" + ",".join("0" * 17), "zeros only"),
        ("lbw=" + ",".join("1" * 61), "of 61 numbers has none for IN01"),
        ("lbw=" + ",".join("1" * 12), "has none for IN01, .* kohya would keep it, A1111"),
        ("lbw=", "expected a finite number"),
    ],
)
@pytest.mark.parametrize("folded", [True, False])
def test_what_is_refused(tmp_path, given, message, folded):
    path, _ = adapter(tmp_path, "a", 1)
    over = base(tmp_path)[0] if folded else None
    with pytest.raises(UsageError, match=message):
        loratools.merge([path], over, weights=given, out=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("given", [{}, {"lbw": 3}, {"lbw": "x"}, {1: 2.0}, True, "x", {"unet": []}])
def test_mappings_that_are_no_weights(given):
    with pytest.raises(UsageError):
        weight(given)


def test_a_receipt_with_weights_that_are_none_is_malformed(tmp_path):
    path, _ = adapter(tmp_path, "a", 1)
    over, out = base(tmp_path)[0], tmp_path / "out.safetensors"
    loratools.merge([path], over, weights=BOTH, out=out)
    receipt = tmp_path / f"{out.name}.loratools.json"
    receipt.write_text(receipt.read_text().replace("0.8", "0"))
    with pytest.raises(MalformedError):
        verify(out, adapters=[path], base=over)


def test_what_is_written_is_read_again():
    spec = f"{BOTH};lbw=" + ",".join(map(str, SEVENTEEN))
    found = weight(spec)
    assert isinstance(found, Parts)
    assert str(found) == str(weight(str(found))) == spec
    assert str(weight({"unet": 1 / 3, "a": 1e-30})) == "unet=0.3333333333333333;a=1e-30"
