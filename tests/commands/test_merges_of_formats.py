"""Adapters of several formats merged: exact weighted sums, one output, metadata true of it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from loratools import formats
from loratools.commands.merge import merge
from tests.commands import adapter_files, image_files
from tests.commands.adapter_files import Llama, Pair, Pairs
from tests.commands.image_files import CLIP, FLUX, OWN, SD1
from tests.commands.test_conversions import few, pairs_of, suffixed, updates
from tests.refusing import refused

UNET = {m: s for m, s in SD1.items() if m.startswith("unet.")}
TRAINED = "ss_training_comment"  # what the fixtures of kohya's say of their own training


def same_sum(out: Path, terms: list[tuple[float, Pairs]], to: str, config=None) -> None:
    """Every ΔW is Σ wᵢ ΔWᵢ in float64, to the rounding of each term's factors to float32."""
    found = updates(formats.read(out), to, config or {})
    assert found.keys() == {m for _, pairs in terms for m in pairs}
    for module, delta in found.items():
        mine = [(w, pairs[module]) for w, pairs in terms if module in pairs]
        wanted = np.sum([w * p.update for w, p in mine], axis=0)
        bound = np.sum([abs(w) * p.bound for w, p in mine], axis=0)
        assert (abs(delta.reshape(wanted.shape) - wanted) <= bound).all(), module


def header(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@few
@given(pairs_of(SD1), pairs_of(UNET), st.sampled_from([(0.5, 0.5), (1.0, -0.3), (2.0, 0.125)]))
def test_kohya_and_diffusers_into_one_file(tmp_path_factory, first, second, weights):
    folder = tmp_path_factory.mktemp("both")
    paths = [image_files.kohya(folder / "a", first), image_files.diffusers(folder / "b", second)]
    out = folder / "both.safetensors"
    result = merge(paths, out=out, weights=weights)
    terms = list(zip(weights, (first, second), strict=True))
    same_sum(out, terms, "diffusers")
    said, tensors = header(out)
    assert formats.read(out).format == "kohya"
    assert all(key.startswith(("lora_unet_", "lora_te_")) for key in tensors)
    assert "kohya adapter" in result.makes
    true_of_itself(said, tensors)
    assert said["modelspec.merged_from"] == "a, b"
    assert said["modelspec.title"] == "both"
    assert said["ss_base_model_version"] == "sd_v1"
    receipt = json.loads((folder / "both.safetensors.loratools.json").read_text())
    assert [a["format"] for a in receipt["recipe"]["adapters"]] == ["kohya", "diffusers"]
    # The other way round the first one's format is the output's, --to says another.
    merge(paths[::-1], out=folder / "turned.safetensors", weights=weights[::-1])
    assert formats.read(folder / "turned.safetensors").format == "diffusers"
    same_sum(folder / "turned.safetensors", terms, "diffusers")


def true_of_itself(said: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    """What kohya's metadata says of a file, against that file."""
    ranks = {t.shape[0] for key, t in tensors.items() if "lora_down" in key}
    alphas = {float(t) for key, t in tensors.items() if key.endswith(".alpha")}
    assert said["ss_network_dim"] == (str(ranks.pop()) if len(ranks) == 1 else "Dynamic")
    alone = f"{next(iter(alphas)):.8g}"
    assert said["ss_network_alpha"] == (alone if len(alphas) == 1 else "Dynamic")
    assert said["ss_network_module"].startswith("networks.lora")
    assert TRAINED not in said
    assert "ss_learning_rate" not in said
    assert said["modelspec.hash_sha256"] == f"0x{said['sshs_model_hash']}"


@pytest.mark.parametrize("other", ["org/tiny", "org/another", None])
def test_the_base_is_named_where_all_that_name_one_agree(other, tmp_path):
    pairs = {next(iter(UNET)): Pair(torch.ones(2, 8), torch.ones(8, 2), 3.0)}
    first = image_files.kohya(tmp_path / "a", pairs)
    second = image_files.peft(tmp_path / "b", pairs)
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": other})
    )
    for i, order in enumerate(([first, second], [second, first])):
        out = tmp_path / f"{i}.safetensors"
        merge(order, out=out, weights=[0.5, 0.5], to="kohya")
        said, _ = header(out)
        wanted = None if other == "org/another" else "org/tiny"
        assert said.get("ss_sd_model_name") == wanted
    merge([first], out=tmp_path / "half.safetensors", weights=[0.5])
    assert header(tmp_path / "half.safetensors")[0]["modelspec.merged_from"] == "a"


def test_the_hash_of_a_merged_file_is_the_one_that_civitai_computes(tmp_path):
    pairs = {m: Pair(torch.ones(2, 8), torch.ones(8, 2), 3.0) for m in [next(iter(UNET))]}
    paths = [image_files.kohya(tmp_path / name, pairs) for name in "ab"]
    merge(paths, out=tmp_path / "c.safetensors", weights=[0.5, 0.5])
    raw = (tmp_path / "c.safetensors").read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    said, _ = header(tmp_path / "c.safetensors")
    assert said["sshs_model_hash"] == hashlib.sha256(data).hexdigest()


def theirs(pairs: list[tuple[float, Pair]]) -> np.ndarray:
    """kohya's own merge of one module (networks/merge_lora.py), from its description.

    Each factor is multiplied by the ratio and the factors are added up, each with the square root
    of its scaling; alpha and rank of the result are the first one's.
    """
    first = pairs[0][1]
    up = sum(w * p.b.double() * (p.scaling / first.scaling) ** 0.5 for w, p in pairs)
    down = sum(w * p.a.double() * (p.scaling / first.scaling) ** 0.5 for w, p in pairs)
    return (first.scaling * up @ down).numpy()


def test_what_kohyas_own_merge_gets_wrong_is_right_here(tmp_path):
    """Half of one adapter is half of it, not a quarter; sums have no cross terms; alpha counts."""
    module = next(iter(UNET))
    torch.manual_seed(0)
    one = Pair(torch.randn(2, 8), torch.randn(8, 2), 2.0)
    two = Pair(torch.randn(2, 8), torch.randn(8, 2), 0.5)
    a, b = (image_files.kohya(tmp_path / n, {module: p}) for n, p in (("a", one), ("b", two)))
    merge([a], out=tmp_path / "half.safetensors", weights=[0.5])
    same_sum(tmp_path / "half.safetensors", [(0.5, {module: one})], "diffusers")
    assert np.allclose(theirs([(0.5, one)]), 0.25 * one.update)
    merge([a, b], out=tmp_path / "sum.safetensors", weights=[1, 1])
    same_sum(tmp_path / "sum.safetensors", [(1, {module: one}), (1, {module: two})], "diffusers")
    wrong = theirs([(1, one), (1, two)]) - one.update - two.update
    assert np.abs(wrong).max() > 0.1
    # Concatenated, ranks add up: with the first file's alpha the effect would be halved.
    said, tensors = header(tmp_path / "sum.safetensors")
    (rank,) = {t.shape[0] for k, t in tensors.items() if "lora_down" in k}
    assert (rank, said["ss_network_dim"]) == (4, "4")
    assert said["ss_network_alpha"] == "4"


@few
@given(pairs_of(FLUX), pairs_of(FLUX, wholes=list(OWN.values())))
def test_peft_and_kohya_of_flux(tmp_path_factory, first, second):
    """Split projections on one side, fused ones on the other."""
    folder = tmp_path_factory.mktemp("flux")
    paths = [image_files.peft(folder / "a", first), image_files.kohya(folder / "b", second)]
    for to in ("peft", "kohya", "diffusers"):
        out = suffixed(folder / f"to-{to}", to)
        merge(paths, out=out, weights=[0.75, -2.0], to=to)
        assert formats.read(out).format == to
        same_sum(out, [(0.75, first), (-2.0, second)], "diffusers")
    merge(paths, out=folder / "plain", weights="mean")
    assert formats.read(folder / "plain").format == "peft"


def small(base: Llama, alpha: float = 3.0) -> Pairs:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    return {m: Pair(torch.randn(2, base.shape(m)[1]), torch.randn(base.shape(m)[0], 2), alpha)
            for m in names}  # fmt: skip


@pytest.mark.parametrize("x", ["gguf", "mlx", "torchtune", "adapterhub", "onnx_adapter"])
def test_two_of_one_language_format(x, tmp_path):
    torch.manual_seed(1)
    base = Llama(2)
    first, second = small(base), small(base, -0.75)
    paths = [adapter_files.WRITERS[x](tmp_path / n, p, base)
             for n, p in (("a", first), ("b", second))]  # fmt: skip
    out = suffixed(tmp_path / "out", x)
    merge(paths, out=out, weights=[0.5, 2.0])
    assert formats.read(out).format == x
    found = updates(formats.read(out), "hf", base.config)
    some = {m for m in found if found[m].any()}
    assert some == first.keys()
    for module in some:
        wanted = 0.5 * first[module].update + 2 * second[module].update
        bound = 0.5 * first[module].bound + 2 * second[module].bound
        assert (abs(found[module] - wanted) <= bound).all()


def test_mixed_language_formats_become_peft_where_names_are_known(tmp_path):
    torch.manual_seed(2)
    base = Llama(2)
    first, second = small(base), small(base, 5.5)
    a = adapter_files.peft(tmp_path / "a", first, base)
    b = adapter_files.mlx(tmp_path / "b", second, base)
    merge([a, b], out=tmp_path / "out", weights=[1, 1])
    same_sum(tmp_path / "out", [(1, first), (1, second)], "hf", base.config)
    # The rows of a GGUF's q and k depend on heads, which neither adapter says.
    c = adapter_files.gguf(tmp_path / "c", second, base)
    message = refused("needs_base", merge, [a, c], out=tmp_path / "no", weights=[1, 1])
    assert "head_dim" in message
    assert not (tmp_path / "no").exists()


def test_models_that_share_no_name_are_not_merged(tmp_path):
    base = Llama(2)
    torch.manual_seed(3)
    language = adapter_files.gguf(tmp_path / "a", small(base), base)
    image = image_files.kohya(tmp_path / "b", {f"{CLIP}.1.mlp.fc1": Pair(
        torch.ones(2, 10), torch.ones(40, 2), 2.0)})  # fmt: skip
    for order in ([language, image], [image, language]):
        for to in ("kohya", "gguf"):
            out = suffixed(tmp_path / "out", to)
            refused("loss", merge, order, out=out, weights=[1, 1], to=to)
            assert not out.exists()
