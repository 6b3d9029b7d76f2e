"""Folds into tiny pipelines and their single files, beside what diffusers fuses."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.commands.check import check
from loratools.commands.merge import merge
from loratools.commands.verify import verify
from loratools.containers.local import LocalFile
from loratools.containers.safetensors import read_header
from loratools.weights.base import headers
from tests.oracle import image_bases as made
from tests.oracle.image_bases import ALPHA, NAMES, RANK, State

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
METADATA = {"modelspec.title": "tiny", "format": "pt"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A family's pipeline folder and the single file of the same weights, made once."""
    folder = tmp_path_factory.mktemp("bases")

    def of(name: str) -> tuple[Path, Path]:
        pipe, file = folder / name, folder / f"{name}.safetensors"
        if not pipe.exists():
            made.saved(name, pipe)
            states = made.states(made.pipeline(name))
            save_file(made.single(name, states), file, METADATA)
        return pipe, file

    return of


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, State]]:
    """What diffusers fuses from an adapter in its own spelling."""
    folder = tmp_path_factory.mktemp("truth")
    found: dict[str, dict[str, State]] = {}

    def of(name: str, tensors: State, key: str = "") -> dict[str, State]:
        if name + key not in found:
            file = made.write(folder, f"{name}{key}.safetensors", tensors)
            found[name + key] = made.judged(name, file)
        return found[name + key]

    return of


def require_same(got: dict[str, State], due: dict[str, State]) -> None:
    """All components that were read back have the weights that are due."""
    for component, state in got.items():
        there, wanted = made.same_names(state), made.same_names(due[component])
        assert there.keys() == wanted.keys(), component
        for key, value in there.items():
            torch.testing.assert_close(
                value, wanted[key], **CLOSE, msg=lambda m, k=key: f"{k}: {m}"
            )


def require_changed(name: str, due: dict[str, State]) -> None:
    """That the adapter really changes every component that it should."""
    before = made.states(made.pipeline(name))
    for component in made.trained(name):
        there, wanted = before[component], due[component]
        assert any((wanted[k] - there[k]).abs().max() > 1e-3 for k in there), component


# The prefixes of mangled names: sd-scripts' for SD1 and SD2, OneTrainer's for the others.
PREFIXES = {
    "sd1": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "sd2": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "sdxl": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "sd3": {"transformer": "lora_transformer", "text_encoder": "lora_te1",
            "text_encoder_2": "lora_te2"},
    "flux": {"transformer": "lora_transformer", "text_encoder": "lora_te1"},
}  # fmt: skip


SPELLINGS = ("diffusers", "without alpha", "diffusers 0.17", "mangled", "without text_model")


def spelt(name: str, spelling: str, folder: Path) -> Path:
    """One adapter of all components in a spelling."""
    found = made.trained(name)
    match spelling:
        case "diffusers":
            return made.save_as_diffusers(name, found, folder)
        case "without alpha":
            tensors = made.plain(found)
        case "diffusers 0.17":
            tensors = made.in_old_diffusers(found)
        case "mangled":
            tensors = made.in_kohya(name, found, PREFIXES[name])
        case _:  # trained with transformers 5.6 or later
            tensors = {k.replace(".text_model.", "."): v for k, v in made.plain(found).items()}
    return made.write(folder, "lora.safetensors", tensors)


# Each family and each spelling once; all pairs of them with the slow tests.
QUICK = {
    ("sd1", "mangled"), ("sd2", "without alpha"), ("sdxl", "diffusers"), ("sdxl", "mangled"),
    ("sd3", "diffusers 0.17"), ("flux", "mangled"), ("flux", "without text_model"),
}  # fmt: skip
PAIRS = [
    pytest.param(n, s, marks=[] if (n, s) in QUICK else [pytest.mark.slow])
    for n in NAMES
    for s in SPELLINGS
]


@pytest.mark.parametrize("layout", ["pipeline", "single file"])
@pytest.mark.parametrize(("name", "spelling"), PAIRS)
def test_a_fold_is_what_diffusers_fuses(name, spelling, layout, bases, truth, tmp_path):
    due = truth(name, made.plain(made.trained(name)))
    require_changed(name, due)
    file = spelt(name, spelling, tmp_path)
    pipe, single = bases(name)
    found = check([file], pipe if layout == "pipeline" else single)
    assert found.ok, found.problems
    if layout == "pipeline":
        merge([file], pipe, out=tmp_path / "out")
        got = made.read_back(tmp_path / "out")
        assert got.keys() == due.keys()
        require_same(got, due)
        return
    merge([file], single, out=tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    require_same(made.apart(name, got, made.pipeline(name)), due)
    before = load_file(single)
    rest = [k for k in before if k.startswith("first_stage_model.")]
    assert len(rest) > 90
    assert all(torch.equal(got[k], before[k]) for k in rest)


# ------------------------------------------------------------------------------- original names


def flux_pairs(*, with_mlp: bool) -> made.Pairs:
    """The attention modules of the tiny Flux that the fused spellings can name."""
    layers = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_add_out",
              "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")  # fmt: skip
    layers += ("proj_mlp",) if with_mlp else ()
    found = made.trained("flux")["transformer"]
    single = {m for m in found if m.startswith("single") and m.endswith(".proj_out")}
    return {m: pair for m, pair in found.items() if m.endswith(layers) or m in single}


def fused_flux(spelling: str) -> State:
    pairs = made.in_bfl(flux_pairs(with_mlp=True))
    match spelling:
        case "kohya":
            return made.mangled(pairs, "lora_unet")
        case "diffusion_model":  # ComfyUI, newer ai-toolkit
            front = {f"diffusion_model.{m}": pair for m, pair in pairs.items()}
            return {
                f"{m}.lora_{half}.weight": t * (ALPHA / RANK if half == "B" else 1)
                for m, pair in front.items()
                for half, t in zip("AB", pair, strict=True)
            }
        case _:
            return made.in_xlabs(flux_pairs(with_mlp=False))


@pytest.mark.parametrize("layout", ["pipeline", "single file", "bare", "one component"])
@pytest.mark.parametrize("spelling", ["kohya", "diffusion_model", "xlabs"])
def test_fused_names_of_flux(spelling, layout, bases, truth, tmp_path):
    pairs = flux_pairs(with_mlp=spelling != "xlabs")
    due = truth("flux", made.plain({"transformer": pairs}), spelling)
    file = made.write(tmp_path, "lora.safetensors", fused_flux(spelling))
    pipe, single = bases("flux")
    match layout:
        case "pipeline":
            merge([file], pipe, out=tmp_path / "out")
            require_same(made.read_back(tmp_path / "out"), due)
        case "one component":
            merge([file], pipe / "transformer", out=tmp_path / "out")
            got = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
            require_same({"transformer": got}, due)
            assert (tmp_path / "out" / "config.json").exists()
        case _:
            if layout == "bare":
                front, all_of_it = "model.diffusion_model.", load_file(single)
                bare = {k.removeprefix(front): v for k, v in all_of_it.items() if front in k}
                single = made.write(tmp_path, "bare.safetensors", bare)
            merge([file], single, out=tmp_path / "out.safetensors")
            got = load_file(tmp_path / "out.safetensors")
            if layout == "bare":
                assert list(read_header(LocalFile(single)).leaves) == list(
                    read_header(LocalFile(tmp_path / "out.safetensors")).leaves
                )
                got = {f"model.diffusion_model.{k}": v for k, v in got.items()}
                got |= {k: v for k, v in all_of_it.items() if k not in got}
            require_same(made.apart("flux", got, made.pipeline("flux")), due)


@pytest.mark.parametrize("layout", ["pipeline", "single file"])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_kohya_s_original_names_of_a_unet(name, layout, bases, truth, tmp_path):
    due = truth(name, made.plain(made.trained(name)))
    original = made.original_names(name)
    found = dict(made.trained(name))
    unet = {original[module]: pair for module, pair in found.pop("unet").items()}
    tensors = made.mangled(unet, "lora_unet") | made.in_kohya(name, found, PREFIXES[name])
    file = made.write(tmp_path, "lora.safetensors", tensors)
    pipe, single = bases(name)
    if layout == "pipeline":
        merge([file], pipe, out=tmp_path / "out")
        require_same(made.read_back(tmp_path / "out"), due)
    else:
        merge([file], single, out=tmp_path / "out.safetensors")
        got = load_file(tmp_path / "out.safetensors")
        require_same(made.apart(name, got, made.pipeline(name)), due)


# ------------------------------------------------------------------------------- other channels


def first_layer(channels: int) -> made.Pairs:
    draw = torch.Generator().manual_seed(9)
    a, b = torch.randn(RANK, channels, generator=draw), torch.randn(32, RANK, generator=draw)
    return {"x_embedder": (a * 0.2, b * 0.2)}


def test_an_adapter_of_fewer_channels_is_filled_with_zeros_as_diffusers_does(tmp_path):
    pipe = tmp_path / "control"
    kept = made.pipeline("flux", in_channels=8, out_channels=4)
    parts = {
        k: v for k, v in kept.components.items() if k not in ("image_encoder", "feature_extractor")
    }
    control = made.diffusers.FluxControlPipeline(**parts)
    control.save_pretrained(pipe)
    file = made.write(tmp_path, "lora.safetensors", made.plain({"transformer": first_layer(4)}))
    control.load_lora_weights(str(tmp_path), weight_name=file.name)
    control.fuse_lora(components=["transformer"])
    control.unload_lora_weights()
    found = check([file], pipe)
    assert found.ok
    [note] = [p for p in found.problems if p.code == "shape_mismatch"]
    assert (note.severity, note.target) == ("note", "transformer.x_embedder.weight")
    assert "4 of the base's 8 channels" in note.message
    merge([file], pipe, out=tmp_path / "out")
    require_same(made.read_back(tmp_path / "out"), made.states(control))


def test_a_control_adapter_is_refused_by_a_base_without_its_channels(bases, tmp_path):
    file = made.write(tmp_path, "lora.safetensors", made.plain({"transformer": first_layer(8)}))
    for base in bases("flux"):
        found = check([file], base)
        [problem] = [p for p in found.problems if p.severity == "error"]
        assert problem.code == "shape_mismatch"
        assert "reads 4 more channels than this base has" in problem.message
    # Where the base has them too, it is a fold like any other.
    wide = made.pipeline("flux", in_channels=8, out_channels=4)
    wide.save_pretrained(tmp_path / "wide")
    merge([file], tmp_path / "wide", out=tmp_path / "out")
    got = made.read_back(tmp_path / "out")["transformer"]["x_embedder.weight"]
    a, b = first_layer(8)["x_embedder"]
    before = wide.transformer.x_embedder.weight
    torch.testing.assert_close(got, before + ALPHA / RANK * b @ a, **CLOSE)


def test_bfl_norms_are_set_and_biases_added(bases, tmp_path):
    """The control adapters of Black Forest Labs, as diffusers reads them."""
    draw = torch.Generator().manual_seed(11)
    a, b = torch.randn(RANK, 32, generator=draw), torch.randn(96, RANK, generator=draw)
    tensors = {
        "double_blocks.0.img_attn.qkv.lora_A.weight": a * 0.05,
        "double_blocks.0.img_attn.qkv.lora_B.weight": b * 0.05,
        "double_blocks.0.img_attn.qkv.lora_B.bias": torch.randn(96, generator=draw) * 0.01,
        "double_blocks.0.img_attn.norm.query_norm.scale": torch.rand(16, generator=draw),
        "double_blocks.0.txt_attn.norm.key_norm.scale": torch.rand(16, generator=draw),
        "single_blocks.1.norm.query_norm.scale": torch.rand(16, generator=draw),
    }
    file = made.write(tmp_path, "control.safetensors", tensors)
    pipe, single = bases("flux")
    merge([file], pipe, out=tmp_path / "out")
    merge([file], single, out=tmp_path / "out.safetensors")
    got = made.read_back(tmp_path / "out")
    apart = made.apart("flux", load_file(tmp_path / "out.safetensors"), made.pipeline("flux"))
    require_same(apart, got)
    transformer, before = got["transformer"], made.states(made.pipeline("flux"))["transformer"]
    norms = {
        "transformer_blocks.0.attn.norm_q": "double_blocks.0.img_attn.norm.query_norm",
        "transformer_blocks.0.attn.norm_added_k": "double_blocks.0.txt_attn.norm.key_norm",
        "single_transformer_blocks.1.attn.norm_q": "single_blocks.1.norm.query_norm",
    }
    for here, there in norms.items():
        assert torch.equal(transformer[f"{here}.weight"], tensors[f"{there}.scale"])
    bias = tensors["double_blocks.0.img_attn.qkv.lora_B.bias"]
    for i, part in enumerate("qkv"):
        key, rows = f"transformer_blocks.0.attn.to_{part}", slice(32 * i, 32 * i + 32)
        update = b[rows] @ a * 0.0025
        torch.testing.assert_close(transformer[f"{key}.weight"], before[f"{key}.weight"] + update)
        torch.testing.assert_close(transformer[f"{key}.bias"], before[f"{key}.bias"] + bias[rows])
    unchanged = set(transformer) - {f"{k}.weight" for k in norms} - {
        f"transformer_blocks.0.attn.to_{p}.{end}" for p in "qkv" for end in ("weight", "bias")
    }  # fmt: skip
    assert all(torch.equal(transformer[k], before[k]) for k in unchanged)


# ------------------------------------------------------------------------------- components


def test_what_the_base_has_not_is_one_problem_that_names_the_skip(bases, tmp_path):
    file = spelt("sdxl", "mangled", tmp_path)
    pipe, single = bases("sdxl")
    front = "conditioner.embedders.1."
    less = {k: v for k, v in load_file(single).items() if not k.startswith(front)}
    for base in (made.write(tmp_path, "less.safetensors", less), pipe / "unet"):
        found = check([file], base)
        errors = [p for p in found.problems if p.severity == "error"]
        assert {p.code for p in errors} == {"component_absent"}
        lacking = ["text_encoder_2"] if base.suffix else ["text_encoder", "text_encoder_2"]
        assert [p.target for p in errors] == [f"{c}.*" for c in lacking]
        assert all(f'--skip "{c}.*"' in p.advice for c, p in zip(lacking, errors, strict=True))
        assert check([file], base, skip=[f"{c}.*" for c in lacking]).ok
        assert check([file], base, skip=lacking).ok
        assert check([file], base, only=["unet"]).ok


@pytest.mark.parametrize("word", ["unet", "text_encoder_2", "unet.down_blocks.*"])
def test_a_part_is_chosen_by_one_word_in_every_layout(word, bases, tmp_path):
    file = spelt("sdxl", "mangled", tmp_path)
    pipe, single = bases("sdxl")
    kept = {base: check([file], base, only=[word]) for base in (pipe, single)}
    assert all(found.ok for found in kept.values())
    merge([file], pipe, out=tmp_path / "out", only=[word])
    merge([file], single, out=tmp_path / "out.safetensors", only=[word])
    apart = made.apart("sdxl", load_file(tmp_path / "out.safetensors"), made.pipeline("sdxl"))
    got = made.read_back(tmp_path / "out")
    require_same(apart, got)
    before = made.states(made.pipeline("sdxl"))
    touched = {
        c for c in before if any(not torch.equal(got[c][k], before[c][k]) for k in before[c])
    }
    assert touched == {word.partition(".")[0]}
    rest = merge([file], single, out=tmp_path / "rest.safetensors", skip=[word])
    assert rest.targets + kept[single].matched == check([file], single).matched


def test_a_convolution_of_one_pixel_is_a_linear_layer(bases, truth, tmp_path):
    """Adapters of SD1 have proj_in as a convolution, SD2 has a linear layer there, and back."""
    found = made.trained("sd2")
    due = truth("sd2", made.plain(found))
    as_conv = {
        m: tuple(t[:, :, None, None] for t in pair) if "proj_in" in m else pair
        for m, pair in found["unet"].items()
    }
    tensors = made.in_kohya("sd2", {**found, "unet": as_conv}, PREFIXES["sd2"])
    file = made.write(tmp_path, "lora.safetensors", tensors)
    merge([file], bases("sd2")[0], out=tmp_path / "out")
    require_same(made.read_back(tmp_path / "out"), due)
    found = made.trained("sd1")
    flat = {
        m: tuple(t.flatten(1) if "proj_" in m else t for t in pair)
        for m, pair in found["unet"].items()
    }
    tensors = made.in_kohya("sd1", {**found, "unet": flat}, PREFIXES["sd1"])
    file = made.write(tmp_path, "lora.safetensors", tensors)
    merge([file], bases("sd1")[0], out=tmp_path / "out1")
    require_same(made.read_back(tmp_path / "out1"), truth("sd1", made.plain(made.trained("sd1"))))


def t5_pairs() -> made.Pairs:
    draw = torch.Generator().manual_seed(13)
    shape = {"layer.0.SelfAttention.q": (8, 20), "layer.1.DenseReluDense.wo": (20, 24)}
    return {
        f"encoder.block.{n}.{layer}": (
            torch.randn(RANK, into, generator=draw) * 0.08,
            torch.randn(out, RANK, generator=draw) * 0.08,
        )
        for n in range(2)
        for layer, (out, into) in shape.items()
    }


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_adapter_of_a_t5_is_what_peft_merges(name, bases, tmp_path):
    """kohya calls it te3 in both, OneTrainer te2 in Flux; diffusers loads none."""
    component = "text_encoder_3" if name == "sd3" else "text_encoder_2"
    pairs, encoder = t5_pairs(), getattr(made.pipeline(name), component)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["SelfAttention.q", "wo"])
    model = peft.get_peft_model(encoder, config)
    factors = {
        f"base_model.model.{m}.lora_{half}.weight": t
        for m, pair in pairs.items()
        for half, t in zip("AB", pair, strict=True)
    }
    peft.set_peft_model_state_dict(model, factors)
    due = model.merge_and_unload().state_dict()
    due.pop("encoder.embed_tokens.weight")
    pipe, single = bases(name)
    for prefix in ("lora_te3", "lora_te2") if name == "flux" else ("lora_te3",):
        tensors = made.mangled(pairs, prefix)
        if name == "flux":  # a T5 alone may be of any model
            tensors |= made.mangled(made.in_bfl(flux_pairs(with_mlp=True)), "lora_unet")
        file = made.write(tmp_path, f"{prefix}.safetensors", tensors)
        merge([file], pipe, out=tmp_path / prefix, only=[component])
        require_same({component: made.read_back(tmp_path / prefix)[component]}, {component: due})
        merge([file], single, out=tmp_path / f"{prefix}-out.safetensors", only=[component])
        got = load_file(tmp_path / f"{prefix}-out.safetensors")
        part = made.apart(name, got, made.pipeline(name))[component]
        require_same({component: part}, {component: due})


def test_a_projection_that_openclip_stores_the_other_way_round(bases, tmp_path):
    draw = torch.Generator().manual_seed(17)
    a, b = torch.randn(RANK, 16, generator=draw), torch.randn(16, RANK, generator=draw)
    pairs = {"text_encoder_2": {"text_projection": (a * 0.1, b * 0.1)}}
    file = made.write(tmp_path, "lora.safetensors", made.plain(pairs))
    pipe, single = bases("sdxl")
    merge([file], pipe, out=tmp_path / "out")
    merge([file], single, out=tmp_path / "out.safetensors")
    got = made.read_back(tmp_path / "out")
    require_same(
        made.apart("sdxl", load_file(tmp_path / "out.safetensors"), made.pipeline("sdxl")), got
    )
    before = made.pipeline("sdxl").text_encoder_2.text_projection.weight
    update = ALPHA / RANK * 0.01 * b @ a
    projection = got["text_encoder_2"]["text_projection.weight"]
    torch.testing.assert_close(projection, before + update, **CLOSE)


# ------------------------------------------------------------------------------- proofs


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_pipeline_that_diffusers_fused_and_saved_is_proved(name, bases, tmp_path):
    file = made.write(tmp_path, "lora.safetensors", made.plain(made.trained(name)))
    pipe = made.pipeline(name)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    fusing = [c for c in pipe._lora_loadable_modules if getattr(pipe, c, None) is not None]
    pipe.fuse_lora(components=fusing)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    base = bases(name)[0]
    proof = verify(tmp_path / "fused", base=base, adapters=[file])
    assert proof.ok, proof.mismatches[:3]
    wrong = verify(tmp_path / "fused", base=base, adapters=[file], weights=[0.5])
    assert not wrong.ok
    key = "x_embedder.weight" if name == "flux" else "conv_in.weight"
    component = pipe.components[made.denoiser_of(name)]
    with torch.no_grad():
        dict(component.named_parameters())[key].view(-1)[3] += 0.1
    pipe.save_pretrained(tmp_path / "changed")
    found = verify(tmp_path / "changed", base=base, adapters=[file]).mismatches
    assert [m.tensor for m in found if m.tensor] == [f"{made.denoiser_of(name)}.{key}"]


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_what_was_written_is_loaded_and_proves_itself(name, bases, tmp_path):
    file = spelt(name, "mangled", tmp_path)
    pipe, single = bases(name)
    for base, out in ((pipe, tmp_path / "out"), (single, tmp_path / "out.safetensors")):
        merge([file], base, out=out)
        proof = verify(out, base=base, adapters=[file], require="replay")
        assert (proof.ok, proof.proved) == (True, "replay")
        before, after = headers(base), headers(out)
        assert list(before.tensors) == list(after.tensors)
        for one, other in zip(before.shards, after.shards, strict=True):
            assert (one.metadata, one.digest) == (other.metadata, other.digest)
    kind = type(made.pipeline(name))
    more = {"tokenizer": None, "tokenizer_2": None}
    loaded = made.states(kind.from_pretrained(tmp_path / "out", **more))
    require_same(loaded, made.read_back(tmp_path / "out"))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_diffusers_loads_a_folded_single_file(name, bases, truth, tmp_path):
    kind = "SD3Transformer2DModel" if name == "sd3" else "UNet2DConditionModel"
    due = truth(name, made.plain(made.trained(name)))
    file = spelt(name, "without alpha", tmp_path)
    pipe, single = bases(name)
    merge([file], single, out=tmp_path / "out.safetensors")
    component = made.denoiser_of(name)
    loaded = getattr(made.diffusers, kind).from_single_file(
        str(tmp_path / "out.safetensors"), config=str(pipe), subfolder=component
    )
    require_same({component: dict(loaded.state_dict())}, due)
