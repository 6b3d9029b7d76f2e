"""diffusers as the judge: what it saves we read as it computes, what we write it loads."""

import json
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters
from safetensors.torch import load_file, save_file

from loratools import algebra
from loratools.adapter import Adapter, Dense, Leaf, LowRank
from loratools.containers.bundle import local
from loratools.formats import bfl, cloneofsimo, xlabs
from loratools.formats import diffusers as form
from tests.oracle.image_models import (
    MODELS,
    PIPELINES,
    component_of,
    judged,
    make,
    outputs,
    text_encoder,
    trained,
    tuned_state,
)

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = [*ATTENTION, "conv1", "conv_in", "proj_in", "ff.net.0.proj"]

CASES = {
    "attention": ("sd1", {"r": 4, "lora_alpha": 4, "target_modules": ATTENTION}),
    "alpha": ("sd1", {"r": 4, "lora_alpha": 3, "target_modules": ATTENTION}),
    "convolutions": ("sd1", {"r": 2, "lora_alpha": 7, "target_modules": CONVOLUTIONS}),
    "patterns": (
        "sd1",
        {
            "r": 4, "lora_alpha": 8, "target_modules": CONVOLUTIONS,
            "rank_pattern": {"to_k": 2, "^conv_in": 3}, "alpha_pattern": {"attn2.to_q": 1},
        },
    ),
    "rslora": ("sd1", {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ATTENTION}),
    "biases": ("sd1", {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["to_out.0"]}),
    "dora": ("sd1", {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": CONVOLUTIONS}),
    "sdxl": ("sdxl", {"r": 3, "lora_alpha": 5, "target_modules": [*CONVOLUTIONS, "linear_1"]}),
    "flux": (
        "flux",
        {
            "r": 4, "lora_alpha": 2,
            "target_modules": [*ATTENTION, "add_k_proj", "proj_mlp", "proj_out", "norm.linear"],
            "rank_pattern": {"^proj_out": 2},
        },
    ),
    "flux dora": ("flux", {"r": 4, "lora_alpha": 2, "use_dora": True, "target_modules": ATTENTION}),
}  # fmt: skip


def saved(case: str, folder: Path, *, metadata: bool = True) -> tuple[str, torch.nn.Module, Path]:
    """A component with a trained adapter, and the file that its pipeline saved."""
    name, options = CASES[case]
    model = trained(name, peft.LoraConfig(**options))
    layers = peft.get_peft_model_state_dict(model, adapter_name="default")
    said = model.peft_config["default"].to_dict() if metadata else None
    component = component_of(name)
    pipeline = getattr(diffusers, PIPELINES[name])
    pipeline.save_lora_weights(
        folder, **{f"{component}_lora_layers": layers},
        **{f"{component}_lora_adapter_metadata": said},
    )  # fmt: skip
    return name, model, folder / "pytorch_lora_weights.safetensors"


def loaded(name: str, file: Path) -> torch.nn.Module:
    """The component after its pipeline loaded a file."""
    model = make(name)
    judged(name, model).load_lora_weights(str(file.parent), weight_name=file.name)
    return model


def read(path: Path) -> Adapter:
    bundle = local(path)
    assert form.detect(bundle)
    adapter = form.read(bundle, assume={})
    assert [p for p in adapter.problems if p.severity != "note"] == []
    return adapter


@pytest.mark.parametrize("case", CASES)
def test_what_diffusers_saves_is_read_as_it_computes(case, tmp_path):
    name, model, file = saved(case, tmp_path)
    adapter = read(file)
    assert form.lost(adapter) == []
    plain = make(name)
    before = outputs(name, plain)
    plain.load_state_dict(tuned_state(plain.state_dict(), adapter, component_of(name)))
    expected = outputs(name, model)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(outputs(name, plain), expected, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_is_loaded_and_computes_the_same(case, tmp_path):
    name, model, file = saved(case, tmp_path)
    adapter = read(file)
    out = tmp_path / "ours.safetensors"
    assert list(form.write(adapter, out)) == ["ours.safetensors"]
    ours, theirs = load_file(out), load_file(file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    torch.testing.assert_close(outputs(name, loaded(name, out)), outputs(name, model), **CLOSE)
    again = read(out)
    assert {k: type(d) for k, d in again.deltas.items()} == {
        k: type(d) for k, d in adapter.deltas.items()
    }
    pairs = [(again.deltas[k], d) for k, d in adapter.deltas.items() if isinstance(d, LowRank)]
    assert all((a.scaling, a.alpha, a.rank) == (b.scaling, b.alpha, b.rank) for a, b in pairs)


@pytest.mark.parametrize("name", PIPELINES)
def test_scalings_that_no_alpha_can_say_go_into_b(name, tmp_path):
    _, _, file = saved({"sd1": "alpha", "sdxl": "sdxl", "flux": "flux"}[name], tmp_path)
    adapter = read(file)
    odd = {
        k: LowRank(d.a, d.b, 0.1 + 1e-17 + i / 7) for i, (k, d) in enumerate(adapter.deltas.items())
    }
    strange = Adapter(odd, "kohya", "diffusers")
    out = tmp_path / "written"
    out.mkdir()
    assert list(form.write(strange, out)) == ["pytorch_lora_weights.safetensors"]
    plain = make(name)
    plain.load_state_dict(tuned_state(plain.state_dict(), strange, component_of(name)))
    from_file = loaded(name, out / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(outputs(name, from_file), outputs(name, plain), **CLOSE)


def test_without_metadata_and_alphas_the_scaling_is_1(tmp_path):
    name, _, file = saved("patterns", tmp_path, metadata=False)
    adapter = read(file)
    assert {d.scaling for d in adapter.deltas.values()} == {1.0}
    assert len({d.rank for d in adapter.deltas.values()}) == 3
    plain = make(name)
    plain.load_state_dict(tuned_state(plain.state_dict(), adapter, "unet"))
    torch.testing.assert_close(outputs(name, loaded(name, file)), outputs(name, plain), **CLOSE)


def test_a_file_of_one_component_has_no_prefix(tmp_path):
    model = trained("flux", peft.LoraConfig(**CASES["flux"][1]))
    model.save_lora_adapter(tmp_path)
    adapter = read(tmp_path / "pytorch_lora_weights.safetensors")
    plain = make("flux")
    plain.load_state_dict(tuned_state(plain.state_dict(), adapter, "transformer"))
    torch.testing.assert_close(outputs("flux", plain), outputs("flux", model), **CLOSE)


OLD = {
    "processor": {
        "to_q.lora_A": "processor.to_q_lora.down", "to_q.lora_B": "processor.to_q_lora.up",
        "to_out.0.lora_A": "processor.to_out_lora.down",
        "to_out.0.lora_B": "processor.to_out_lora.up",
    },
    "0.17": {".lora_A": ".lora.down", ".lora_B": ".lora.up"},
}  # fmt: skip


@pytest.mark.parametrize("era", OLD)
@pytest.mark.parametrize("front", ["unet.", ""])
def test_older_names_are_those_of_today(era, front, tmp_path):
    options = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_out.0"]}
    model = trained("sd1", peft.LoraConfig(**options))
    tensors = {}
    for key, tensor in peft.get_peft_model_state_dict(model, adapter_name="default").items():
        for new, old in OLD[era].items():
            key = key.replace(new, old)
        assert "lora_A" not in key
        tensors[front + key] = tensor.contiguous()
    file = tmp_path / "old.safetensors"
    save_file(tensors, file)
    plain = make("sd1")
    plain.load_state_dict(tuned_state(plain.state_dict(), read(file), "unet"))
    torch.testing.assert_close(outputs("sd1", plain), outputs("sd1", model), **CLOSE)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(tensors, pickled / "pytorch_lora_weights.bin")
    again = read(pickled)
    assert again.deltas.keys() == read(file).deltas.keys()
    plain.load_state_dict(tuned_state(make("sd1").state_dict(), again, "unet"))
    torch.testing.assert_close(outputs("sd1", plain), outputs("sd1", model), **CLOSE)
    theirs = make("sd1")
    theirs.load_lora_adapter(load_file(file), prefix=front.rstrip(".") or None)
    torch.testing.assert_close(outputs("sd1", theirs), outputs("sd1", model), **CLOSE)


TEXT_ERAS = {
    "peft": {},
    "0.17": {".lora_A": ".lora_linear_layer.down", ".lora_B": ".lora_linear_layer.up"},
    "processor": {
        "q_proj.lora_A": "to_q_lora.down", "q_proj.lora_B": "to_q_lora.up",
        "out_proj.lora_A": "to_out_lora.down", "out_proj.lora_B": "to_out_lora.up",
    },
}  # fmt: skip


@pytest.mark.parametrize("era", TEXT_ERAS)
def test_text_encoders_in_all_eras(era, tmp_path):
    encoder, ids = text_encoder(), torch.arange(6)[None]
    encoder.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "out_proj"]))
    torch.manual_seed(1)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = encoder(ids).last_hidden_state
    tensors = {}
    for key, tensor in peft.get_peft_model_state_dict(encoder, adapter_name="default").items():
        for new, old in TEXT_ERAS[era].items():
            key = key.replace(new, old)
        tensors[f"text_encoder.text_model.{key.removeprefix('text_model.')}"] = tensor.contiguous()
    file = tmp_path / "te.safetensors"
    save_file(tensors, file)
    adapter = read(file)
    plain = text_encoder()
    state = plain.state_dict()
    here = "" if any(k.startswith("text_model.") for k in state) else "text_encoder.text_model."
    renamed = {"text_encoder." + k.removeprefix(here): d for k, d in adapter.deltas.items()}
    plain.load_state_dict(tuned_state(state, Adapter(renamed), "text_encoder"))
    torch.testing.assert_close(plain(ids).last_hidden_state, expected, **CLOSE)
    out = tmp_path / "ours.safetensors"
    form.write(adapter, out)
    theirs = text_encoder()
    judged("sd1", make("sd1"), theirs).load_lora_weights(str(tmp_path), weight_name=out.name)
    torch.testing.assert_close(theirs(ids).last_hidden_state, expected, **CLOSE)


def test_a_text_encoders_own_ranks_and_alphas_reach_it(tmp_path):
    """transformers 5.6 took `text_model.` away; metadata that names it would find no module."""
    ids = torch.arange(6)[None]
    front = "text_encoder.text_model.encoder.layers"
    torch.manual_seed(3)
    deltas = {}
    rows = [("0.mlp.fc1", 16, 8, 2, 0.5), ("1.mlp.fc2", 8, 16, 3, 2.0),
            ("0.self_attn.q_proj", 8, 8, 2, 0.5), ("1.self_attn.k_proj", 8, 8, 2, 1.5)]  # fmt: skip
    for name, out, into, rank, scaling in rows:
        a, b = torch.randn(rank, into), torch.randn(out, rank)
        deltas[f"{front}.{name}.weight"] = LowRank(Leaf.of("", a), Leaf.of("", b), scaling)
    file = tmp_path / "te.safetensors"
    form.write(Adapter(deltas, vocabulary="diffusers"), file)
    assert len(json.loads(_metadata(file))["text_encoder.alpha_pattern"]) == 2
    theirs, plain = text_encoder(), text_encoder()
    judged("sd1", make("sd1"), theirs).load_lora_weights(str(tmp_path), weight_name=file.name)
    names = {k.replace("text_model.", ""): d for k, d in deltas.items()}
    there = {k.replace("text_model.", ""): k for k in plain.state_dict()}
    state = {k: plain.state_dict()[old] for k, old in there.items()}
    tuned = tuned_state(state, Adapter(names), "text_encoder")
    plain.load_state_dict({old: tuned[k] for k, old in there.items()})
    expected = plain(ids).last_hidden_state
    assert (expected - text_encoder()(ids).last_hidden_state).abs().max() > 1e-3
    torch.testing.assert_close(theirs(ids).last_hidden_state, expected, **CLOSE)


def test_where_some_alphas_are_missing_diffusers_is_wrong_and_we_are_not(tmp_path):
    """A module without alpha has scaling 1; diffusers gives it the alpha that most have."""
    name, _, file = saved("flux", tmp_path, metadata=False)
    tensors = load_file(file)
    modules = sorted({k.rpartition(".lora_")[0] for k in tensors})
    for module in modules[1:]:
        tensors[f"{module}.alpha"] = torch.tensor(1.0)
    save_file(tensors, file)
    adapter = read(file)
    found = [adapter.deltas[f"{m}.weight"] for m in modules]
    assert [d.scaling for d in found] == [1.0, *(1 / d.rank for d in found[1:])]
    module = dict(loaded(name, file).named_modules())[modules[0].removeprefix("transformer.")]
    assert module.scaling == {"default_0": pytest.approx(1 / found[0].rank)}


def test_the_stable_diffusion_pipelines_refuse_alpha_keys(tmp_path):
    """Why scalings are never written as `.alpha`; those of others are read all the same."""
    _, _, file = saved("attention", tmp_path, metadata=False)
    tensors = load_file(file)
    module = next(iter(tensors)).rpartition(".lora_")[0]
    save_file({**tensors, f"{module}.alpha": torch.tensor(1.0)}, file)
    assert read(file).deltas[f"{module}.weight"].scaling == 0.25
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        loaded("sd1", file)


def test_the_control_loras_norms_are_set(tmp_path):
    name, model, file = saved("flux", tmp_path)
    key = "transformer.transformer_blocks.0.attn.norm_q.weight"
    norm = torch.rand(16) + 0.5
    metadata = {"lora_adapter_metadata": _metadata(file)}
    save_file({**load_file(file), key: norm}, file, metadata)
    adapter = read(file)
    assert form.lost(adapter) == []
    out = tmp_path / "ours.safetensors"
    form.write(adapter, out)
    theirs = loaded(name, out)
    model.transformer_blocks[0].attn.norm_q.weight.data = norm
    torch.testing.assert_close(outputs(name, theirs), outputs(name, model), **CLOSE)


def _metadata(file: Path) -> str:
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header["__metadata__"]["lora_adapter_metadata"]


# ------------------------------------------------------------------------------- dialects


def xlabs_file(path: Path, dim: int = 6, rank: int = 2) -> dict[str, torch.Tensor]:
    """A file in XLabs' names: all four sorts of module in a double block, both in a single one."""
    torch.manual_seed(0)
    rows = {
        "double_blocks.0.processor.qkv_lora1": (dim, 3 * dim),
        "double_blocks.0.processor.qkv_lora2": (dim, 3 * dim),
        "double_blocks.0.processor.proj_lora1": (dim, dim),
        "double_blocks.0.processor.proj_lora2": (dim, dim),
        "single_blocks.11.processor.qkv_lora": (dim, 3 * dim),
        "single_blocks.11.processor.proj_lora": (5 * dim, dim),
    }
    tensors = {}
    for module, (into, out) in rows.items():
        tensors[f"{module}.down.weight"] = torch.randn(rank, into)
        tensors[f"{module}.up.weight"] = torch.randn(out, rank)
    save_file(tensors, path)
    return tensors


def test_xlabs_names_are_those_of_diffusers_converter(tmp_path):
    file = tmp_path / "xlabs.safetensors"
    tensors = xlabs_file(file)
    assert not form.detect(local(file))
    adapter = xlabs.read(local(file), assume={})
    assert adapter.problems == ()
    expected = converters._convert_xlabs_flux_lora_to_diffusers(tensors)
    assert {k.removesuffix(".weight") for k in adapter.deltas} == {
        k.rpartition(".lora_")[0] for k in expected
    }
    for key, delta in adapter.deltas.items():
        stem = key.removesuffix(".weight")
        assert delta.scaling == 1
        assert torch.equal(delta.a.tensor(), expected[f"{stem}.lora_A.weight"])
        assert torch.equal(delta.b.tensor(), expected[f"{stem}.lora_B.weight"])


FINAL = "diffusion_model.final_layer.adaLN_modulation.1"


def bfl_file(path: Path) -> dict[str, torch.Tensor]:
    """A control LoRA with every key that diffusers' converter asks for, as small as it allows."""
    torch.manual_seed(0)
    dim, rank = 3072, 2
    rows: dict[str, tuple[int, int]] = {}
    for front in ("time_in", "vector_in", "guidance_in"):
        rows[f"{front}.in_layer"] = rows[f"{front}.out_layer"] = (2, 2)
    rows |= {"txt_in": (2, 2), "img_in": (8, 2), "final_layer.linear": (2, 2)}
    rows["final_layer.adaLN_modulation.1"] = (2, 4)
    norms = []
    for i in range(19):
        block = f"double_blocks.{i}"
        for side in ("img", "txt"):
            rows |= {
                f"{block}.{side}_mod.lin": (2, 2), f"{block}.{side}_attn.qkv": (2, 6),
                f"{block}.{side}_attn.proj": (2, 2), f"{block}.{side}_mlp.0": (2, 2),
                f"{block}.{side}_mlp.2": (2, 2),
            }  # fmt: skip
            norms += [f"{block}.{side}_attn.norm.{n}_norm.scale" for n in ("query", "key")]
    for i in range(38):
        block = f"single_blocks.{i}"
        rows |= {f"{block}.modulation.lin": (2, 2), f"{block}.linear1": (1, 7 * dim)}
        rows[f"{block}.linear2"] = (2, 2)
        norms += [f"{block}.norm.{n}_norm.scale" for n in ("query", "key")]
    tensors = {norm: torch.rand(2) for norm in norms}
    for module, (into, out) in rows.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, into)
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, rank)
        tensors[f"{module}.lora_B.bias"] = torch.randn(out)
    save_file(tensors, path)
    return tensors


def test_bfls_control_lora_is_what_diffusers_makes_of_it(tmp_path):
    file = tmp_path / "control.safetensors"
    tensors = bfl_file(file)
    adapter = bfl.read(local(file), assume={})
    assert adapter.problems == ()
    expected = converters._convert_bfl_flux_control_lora_to_diffusers(tensors)
    names = {"transformer_blocks.3.attn.to_": "double_blocks.3.img_attn.qkv",
             "transformer_blocks.3.attn.add_": "double_blocks.3.txt_attn.qkv"}  # fmt: skip
    for new, old in names.items():
        ends = ("q_proj", "k_proj", "v_proj") if "add" in new else ("q", "k", "v")
        delta = adapter.deltas[f"diffusion_model.{old}.weight"]
        bias = adapter.deltas[f"diffusion_model.{old}.bias"]
        b = torch.cat([expected[f"transformer.{new}{e}.lora_B.weight"] for e in ends])
        b_bias = torch.cat([expected[f"transformer.{new}{e}.lora_B.bias"] for e in ends])
        assert isinstance(delta, LowRank)
        assert isinstance(bias, Dense)
        assert torch.equal(delta.b.tensor(), b)
        assert torch.equal(delta.a.tensor(), expected[f"transformer.{new}{ends[0]}.lora_A.weight"])
        assert torch.equal(bias.diff.tensor(), b_bias)
        assert (delta.scaling, bias.scaling) == (1, 1)
    plain = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
             "single_transformer_blocks.37.proj_out": "single_blocks.37.linear2"}  # fmt: skip
    for new, old in plain.items():
        product = algebra.materialise(adapter.deltas[f"diffusion_model.{old}.weight"])
        up, down = (expected[f"transformer.{new}.lora_{half}.weight"] for half in "BA")
        torch.testing.assert_close(product, up.double() @ down.double())
    # diffusers swaps the halves of A, which are ranks, as it does those of B: not what was trained.
    swapped = algebra.materialise(adapter.deltas[f"{FINAL}.weight"]).roll(2, 0)
    up, down = (expected[f"transformer.norm_out.linear.lora_{half}.weight"] for half in "BA")
    torch.testing.assert_close(swapped, up.double() @ down.double().roll(1, 0))
    assert not torch.allclose(swapped, up.double() @ down.double())
    norm = adapter.deltas["diffusion_model.double_blocks.18.txt_attn.norm.key_norm.scale"]
    set_to = expected["transformer.transformer_blocks.18.attn.norm_added_k.weight"]
    assert torch.equal(norm.value.tensor(), set_to)


# ------------------------------------------------------------------------------- numbers


def numbered(model: torch.nn.Module, classes: set[str]) -> list[str]:
    """The linear layers in the order in which cloneofsimo/lora numbers them."""
    names, seen = [], set()
    for parent, module in model.named_modules():
        if type(module).__name__ in classes:
            for name, inner in module.named_modules():
                if isinstance(inner, torch.nn.Linear) and inner not in seen:
                    seen.add(inner)
                    names.append(f"{parent}.{name}")
    return names


@pytest.mark.parametrize("classes", [{"Attention", "GEGLU"}, {"Attention"}])
def test_numbered_pairs_get_the_names_of_stable_diffusion(classes, tmp_path):
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8, 16, 16), cross_attention_dim=6,
        norm_num_groups=2, attention_head_dim=2,
    )  # fmt: skip
    order = {
        "unet": (unet, numbered(unet, classes)),
        "text_encoder": (text_encoder(), numbered(text_encoder(), {"CLIPAttention"})),
    }
    tensors, weights = {}, {}
    for component, (model, names) in order.items():
        for i, name in enumerate(names):
            out, into = model.get_submodule(name).weight.shape
            tensors[f"{component}:{i}:up"] = torch.full((out, 1), float(i))
            tensors[f"{component}:{i}:down"] = torch.ones(1, into)
            weights[f"{component}.{name.removeprefix('text_model.')}.weight"] = i
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    adapter = cloneofsimo.read(local(file), assume={})
    assert adapter.problems == ()
    found = {k.replace("text_model.", ""): d.b.numbers()[0] for k, d in adapter.deltas.items()}
    assert found == weights


def test_the_models_of_these_tests_are_all_there():
    assert set(MODELS) == set(PIPELINES) == {name for name, _ in CASES.values()}
