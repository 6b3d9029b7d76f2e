"""Mangled names: those of the real classes there and back, and where diffusers puts them."""

import diffusers
import pytest
import torch
import transformers as hf
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)

from loratools.errors import RefusedError
from loratools.names.architectures import ARCHITECTURES, BY_NAME, ORIGINAL, stated
from loratools.names.architectures import modules as known_modules
from loratools.names.mangling import _templates, architecture, mangled, unmangled
from loratools.names.rules import Names, asked
from tests.names.both_ways import modules, on_meta
from tests.names.test_clip import DECODER, T5, TEXT
from tests.names.test_dit import MODELS as DITS
from tests.names.test_flux import KIN
from tests.names.test_unet import UNETS

REAL = {
    **{name: lambda c=UNETS[name][1]: diffusers.UNet2DConditionModel(**c) for name in UNETS},
    **{name: make for name, (_, make, _) in (KIN | DITS).items()},
    "qwen-image": lambda: diffusers.QwenImageTransformer2DModel(num_layers=2),
    "krea2": lambda: diffusers.Krea2Transformer2DModel(num_layers=2),
    "hunyuan-image": lambda: diffusers.HunyuanImageTransformer2DModel(
        num_layers=2, num_single_layers=2, num_refiner_layers=2, text_embed_2_dim=64
    ),
}
CALLED = {
    "refiner": "sdxl-refiner",
    "unclip": "sd2",
    "vace": "wan",
    "wan from images": "wan",
}
MEANT = {"cosmos": "anima", "sd2": "sd1"}  # where nothing tells the two apart
ENCODERS = {
    "clip": lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**TEXT)),
    "t5": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
    "decoder": lambda: hf.Qwen3Model(hf.Qwen3Config(**DECODER)),
}


def trained(make):
    """Modules that trainers adapt: linear layers and convolutions."""
    model = on_meta(make)
    kinds = torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d
    return [name for name in modules(model) if isinstance(model.get_submodule(name), kinds)]


def addresses(name, vocabulary):
    known = BY_NAME[CALLED.get(name, name)]
    here = [f"{known.denoiser}.{module}" for module in trained(REAL[name])]
    if vocabulary == "diffusers":
        return here
    names = Names(known.rules())
    return list(dict.fromkeys(asked(names.of_part, each)[0].whole for each in here))


@pytest.mark.parametrize("vocabulary", ["diffusers", "original"])
@pytest.mark.parametrize("name", REAL)
def test_all_modules_of_a_real_model_there_and_back(name, vocabulary):
    called = CALLED.get(name, name)
    wanted = addresses(name, vocabulary)
    names = {mangled(address, called): address for address in wanted}
    assert len(names) == len(wanted)
    for told in (None, called):
        found = unmangled(names, architecture=told)
        assert found.problems == ()
        assert found.architecture == (told or MEANT.get(name, called))
        same = BY_NAME[called].rules is BY_NAME["qwen-image"].rules  # one set of names for both
        for each, (said, address) in found.found.items():
            assert (said, address) == (vocabulary, names[each]) or same
    assert architecture(names) == MEANT.get(name, called)
    assert architecture(wanted) == MEANT.get(name, called)
    keys = [f"{address}.weight" for address in wanted]
    assert architecture(keys) == architecture(wanted)


@pytest.mark.parametrize("known", ARCHITECTURES, ids=lambda known: known.name)
def test_no_two_weights_of_an_architecture_are_written_the_same(known):
    """Where both vocabularies have one mangled name, it is one rule's."""
    pairs = {
        (rule.parts[0].removesuffix(".weight"), rule.whole.removesuffix(".scale"))
        for rule in known.rules()
    }
    for entries in _templates(known.name).values():
        by_text: dict[str, dict[str, set[str]]] = {}
        for text, (vocabulary, template) in entries:
            if not text.startswith("lycoris"):  # a wrapper around any component
                by_text.setdefault(text, {}).setdefault(vocabulary, set()).add(template)
        for meanings in by_text.values():
            assert all(len(each) == 1 for each in meanings.values())
            if len(meanings) == 2:
                assert (min(meanings["diffusers"]), min(meanings["original"])) in pairs


@pytest.mark.parametrize("known", ARCHITECTURES, ids=lambda known: known.name)
def test_text_encoders_there_and_back(known):
    for encoder in known.encoders:
        kind = {"encoder": "t5", "layers": "decoder"}.get(encoder.names[1].split(".")[0], "clip")
        wanted = {f"{encoder.component}.{each}" for each in trained(ENCODERS[kind])}
        names = {mangled(address, known.name) for address in wanted}
        found = unmangled(names, architecture=known.name)
        assert found.problems == ()
        assert {address for _, address in found.found.values()} == wanted


def test_a_clip_is_written_with_text_model_and_read_without_it_too():
    bare = "text_encoder.encoder.layers.3.self_attn.q_proj"
    full = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
    assert mangled(bare, "sdxl") == mangled(full, "sdxl")
    short = "lora_te1_encoder_layers_3_self_attn_q_proj"
    assert unmangled([short]).found == {short: ("diffusers", full)}
    # The base's own names come first, whichever they are.
    for there in (bare, full):
        for name in (short, mangled(full, "sdxl")):
            assert unmangled([name], [there]).found == {name: ("diffusers", there)}


def test_sdxl_as_diffusers_reads_kohya():
    """SGM's blocks: diffusers' two steps and ours lead to the same modules."""
    model = on_meta(REAL["sdxl"])
    state, wanted = {}, {}
    names = Names(BY_NAME["sdxl"].rules())
    for module in trained(REAL["sdxl"]):
        if "blocks" in module and ".attentions." in module:
            whole = names.of_part(f"unet.{module}").whole
            kohya = mangled(whole, "sdxl")
            wanted[kohya] = f"unet.{module}"
            for end in ("lora_down.weight", "lora_up.weight"):
                state[f"{kohya}.{end}"] = torch.zeros(1, 1)
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(state), model.config)
    made, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    stems = {key.rpartition(".lora")[0] or key.rpartition("_lora")[0] for key in made}
    theirs = {stem.replace(".processor", "") for stem in stems}
    theirs = {stem + ".0" if stem.endswith("to_out") else stem for stem in theirs}
    assert theirs == set(wanted.values())
    found = unmangled(wanted).found
    assert {names.of_whole(address).parts[0] for _, address in found.values()} == theirs


def test_prefixes_of_other_trainers():
    for name, meant in {
        "lora_unet__blocks_7_cross_attn_k": ("original", f"{ORIGINAL}.blocks.7.cross_attn.k"),
        "lora_transformer_single_transformer_blocks_3_attn_to_q": (
            "diffusers",
            "transformer.single_transformer_blocks.3.attn.to_q",
        ),
        "lycoris_single_transformer_blocks_3_proj_mlp": (
            "diffusers",
            "transformer.single_transformer_blocks.3.proj_mlp",
        ),
        "lycoris_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q": (
            "diffusers",
            "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
        ),
        "lora_te2_encoder_block_3_layer_1_DenseReluDense_wi_0": (
            "diffusers",
            "text_encoder_2.encoder.block.3.layer.1.DenseReluDense.wi_0",
        ),
        "lora_prior_unet_down_blocks_0_2_attention_to_q": (
            "diffusers",
            "prior.down_blocks.0.2.attention.to_q",
        ),
    }.items():
        found = unmangled([name])
        assert found.found == {name: meant}, found.problems


def test_t5_has_its_prefix_from_the_model():
    name = "lora_te3_encoder_block_3_layer_0_SelfAttention_q"
    for other, component in (
        ("lora_unet_double_blocks_0_img_mod_lin", "text_encoder_2"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "text_encoder_3"),
    ):
        _, address = unmangled([name, other]).found[name]
        assert address == f"{component}.encoder.block.3.layer.0.SelfAttention.q"
    [problem] = unmangled([name]).problems
    assert "text_encoder_2" in problem.message
    assert "text_encoder_3" in problem.message


def test_what_may_be_two_things_is_not_guessed():
    """Flux and HunyuanVideo write the same for modules whose dots are elsewhere."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    said = unmangled([name])
    assert said.found == {}
    assert said.architecture is None
    assert [p.target for p in said.problems] == [name]
    flux = ("original", f"{ORIGINAL}.double_blocks.0.img_attn.qkv")
    video = ("original", f"{ORIGINAL}.double_blocks.0.img_attn_qkv")
    assert unmangled([name], architecture="flux").found == {name: flux}
    assert unmangled([name], architecture="hunyuan-video").found == {name: video}
    # Names decide over what somebody said.
    more = [name, "lora_unet_double_blocks_0_img_mlp_fc1"]
    found = unmangled(more, architecture="flux")
    assert found.found[name] == video
    assert found.architecture is None  # HunyuanVideo or HunyuanImage
    there = [f"{ORIGINAL}.double_blocks.0.img_attn.qkv"]
    assert unmangled([name], there).found == {name: flux}
    both = unmangled([name], [*there, f"{ORIGINAL}.double_blocks.0.img_attn_qkv"])
    assert both.found == {}


def test_names_of_no_model_and_of_another_are_problems():
    known = ["lora_unet_input_blocks_4_1_proj_in", "lora_unet_output_blocks_0_1_proj_in"]
    strange = ["lora_unet_to_q", "x" * 5000, "", "lora_te_²", "lora_unet_input_blocks_4_1_proj_in_"]
    alien = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    said = unmangled([*known, *strange, alien])
    assert list(said.found) == known
    assert said.architecture == "sdxl"
    assert {p.target for p in said.problems} == {*strange, alien}
    assert {p.code for p in said.problems} == {"unexplained"}
    assert any("sd3" in p.message and "two adapters" in p.message for p in said.problems)
    assert unmangled([]).architecture is None
    assert architecture(["model.layers.0.self_attn.q_proj", "score"]) is None
    assert architecture([]) is None


def test_a_base_of_no_known_architecture_gives_its_own_names():
    there = ["transformer.strange_layers.0.to_q", "transformer.strange_layers.0.to.q"]
    name = "lora_transformer_strange_layers_0_to_q"
    assert unmangled([name], there[:1]).found == {name: ("diffusers", there[0])}
    assert unmangled([name], there).found == {}


def test_widths_tell_unets_of_one_layout_apart():
    module = "attentions_0_transformer_blocks_0_attn2_to_k"
    name = f"lora_unet_down_blocks_1_{module}"
    for known in ("sd1", "sd2", "sdxl"):
        assert architecture([name], {name: BY_NAME[known].width}) == known
    dotted = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert architecture([dotted]) is None
    assert architecture([dotted], {dotted: 1280}) == "sdxl-refiner"
    # Blocks of the other end of the model are SD 1's or 2's alone.
    assert architecture(["lora_unet_down_blocks_0_" + module]) == "sd1"


def test_what_many_models_have_is_none_of_them():
    assert architecture(["transformer.transformer_blocks.0.attn.to_k"]) is None
    assert architecture(["text_encoder.text_model.encoder.layers.0.mlp.fc1"]) is None
    one = "transformer.transformer_blocks.0"
    assert architecture([f"{one}.attn.to_k", f"{one}.img_mod.1"]) == "qwen-image"


def blocks(double, single):
    names = [f"transformer.transformer_blocks.{i}.attn.to_q" for i in range(double)]
    return names + [f"transformer.single_transformer_blocks.{i}.attn.to_q" for i in range(single)]


def test_how_many_blocks_there_are_tells_models_of_the_same_names_apart():
    assert architecture(blocks(19, 38)) == "flux"
    assert architecture(blocks(19, 0)) == "flux"
    assert architecture(blocks(8, 48)) is None  # Flux 2 has no such module in its single blocks
    assert architecture(blocks(60, 0)) == "qwen-image"
    assert architecture(blocks(24, 0)) == "sd3"
    assert architecture(blocks(20, 40)) is None  # HunyuanVideo or HunyuanImage
    assert architecture(blocks(20, 40), said="hunyuan-image") == "hunyuan-image"
    assert architecture(blocks(19, 38), said="wan") == "flux"
    mangled_names = [f"lora_unet_single_blocks_{i}_linear1" for i in range(48)]
    assert architecture(mangled_names) == "flux2"
    assert unmangled(mangled_names).architecture == "flux2"


def test_models_with_two_sets_of_original_names():
    for name, fused, alone, part in (
        ("z-image", "layers.3.attention.qkv", "layers.3.attention.to_k", "layers.3.attention.to_k"),
        (
            "hunyuan-image",
            "single_blocks.3.linear1",
            "single_blocks.3.linear1_k",
            "single_transformer_blocks.3.attn.to_k",
        ),
    ):
        names = known_modules(name)
        assert names.of_whole(f"{ORIGINAL}.{alone}").parts == (f"transformer.{part}",)
        assert names.of_whole(f"{ORIGINAL}.{fused}").parts[1] == f"transformer.{part}"
        assert names.of_part(f"transformer.{part}").whole == f"{ORIGINAL}.{fused}"
        assert architecture([f"{ORIGINAL}.{alone}"]) == name


def test_what_metadata_says():
    for known in ARCHITECTURES:
        if known.version:
            assert stated({"ss_base_model_version": known.version}) == known.name
            assert stated({"modelspec.architecture": f"{known.modelspec}/lora"}) == known.name
    for version, name in (("sd_v1_v", "sd1"), ("sdxl_base_v0-9", "sdxl"), ("5-large", None)):
        assert stated({"ss_base_model_version": version}) == name
    for spec, name in (("stable-diffusion-3-5-large", "sd3"), ("flux-1-schnell", "flux")):
        assert stated({"modelspec.architecture": f"{spec}/lora"}) == name
    assert stated({}) is None
    assert stated({"modelspec.architecture": "mine/lora", "ss_base_model_version": ""}) is None


def test_a_component_without_a_prefix_is_refused():
    with pytest.raises(RefusedError, match="no place for vae of sdxl"):
        mangled("vae.decoder.conv_in", "sdxl")
    with pytest.raises(RefusedError, match="no place for text_encoder_3 of flux"):
        mangled("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", "flux")
