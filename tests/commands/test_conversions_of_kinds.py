"""What is no plain pair, from format to format: kept and given back, or refused by its name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import formats
from loratools.adapter import Adapter, leaves
from loratools.commands.convert import convert
from loratools.errors import LoratoolsError
from tests.commands.adapter_files import BASE, HIDDEN, VOCABULARY, Llama
from tests.commands.image_files import SD1
from tests.commands.test_conversions import suffixed, verdicts
from tests.refusing import refused as refusal

# L: the same deltas, number for number, when they are back; L*: to the rounding of float32; X:
# refused, and named (formats.md §17); L>: the way back is refused, since of a kohya file only
# ComfyUI reads a whole weight.
LANGUAGE = """
          gguf mlx torchtune litgpt adapterhub onnx_adapter kohya diffusers
dora      X    L   L         X      L*         X            X     X
bias      X    X   X         X      X          X            X     X
whole     X    X   X         X      X          X            X     X
rows      X    X   X         X      X          X            X     X
embedding L    L   X         X      X          X            X     X
"""
FROM_PEFT = """
      kohya diffusers onnx_adapter
dora  L     L         X
bias  L     L         X
whole X     X         X
conv  L     L         X
"""
FROM_KOHYA = """
            peft diffusers onnx_adapter
dora        L    L         X
columns     X    X         X
difference  X    X         X
norm        X    X         X
bias        L    L         X
bias_alone  X    X         X
set         L>   X         X
conv        L    L         X
"""
EMPTY = {("dora", "litgpt"), ("dora", "onnx_adapter")}
NO_NAMES = ("kohya", "diffusers")  # of a language model
Q, V = (f"model.layers.0.self_attn.{x}_proj" for x in "qv")
BASES = Llama(2)
SQUARE, CONV = next(iter(SD1)), "unet.down_blocks.0.resnets.0.conv1"
TEXT = SQUARE.replace("attn1.to_q", "attn2.to_k")
TABLES = {"language": LANGUAGE, "peft": FROM_PEFT, "kohya": FROM_KOHYA}


def rows_of(table: str, verdict: str):
    return [pytest.param(*pair, id="-".join(pair)) for pair, said in verdicts(TABLES[table]).items()
            if said[0] == verdict]  # fmt: skip


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def peft(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{k}": t for k, t in tensors.items()},
              folder / "adapter_model.safetensors", {"format": "pt"})  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": BASE, "target_modules": "all-linear", **config})
    )
    return folder


def factors(module: str, seed: int, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    out, into, *kernel = shape
    return {f"{module}.lora_A.weight": numbers(seed, 2, into, *kernel),
            f"{module}.lora_B.weight": numbers(seed + 1, out, 2, *[1] * len(kernel))}  # fmt: skip


def llama(kind: str, folder: Path) -> Path:
    """An adapter of a plain pair and of something of this kind, as PEFT saves it."""
    tensors = factors(V, 1, BASES.shape(V)) | factors(Q, 3, BASES.shape(Q))
    match kind:
        case "dora":
            tensors |= {f"{m}.lora_magnitude_vector": numbers(7, BASES.shape(m)[0]).abs()
                        for m in (Q, V)}  # fmt: skip
            return peft(folder, tensors, use_dora=True)
        case "bias":
            tensors |= {f"{m}.lora_B.bias": numbers(7, BASES.shape(m)[0]) for m in (Q, V)}
            return peft(folder, tensors, lora_bias=True)
        case "whole":
            tensors["lm_head.weight"] = numbers(7, VOCABULARY, HIDDEN)
            return peft(folder, tensors, modules_to_save=["lm_head"])
        case "rows":
            name = "model.embed_tokens.token_adapter.trainable_tokens_delta"
            tensors[name] = numbers(7, 2, HIDDEN)
            return peft(folder, tensors, trainable_token_indices={"embed_tokens": [3, 11]})
        case _:
            tensors["model.embed_tokens.lora_embedding_A"] = numbers(7, 2, VOCABULARY)
            tensors["model.embed_tokens.lora_embedding_B"] = numbers(8, HIDDEN, 2)
            return peft(folder, tensors, target_modules=["q_proj", "v_proj", "embed_tokens"])


def unet(kind: str, folder: Path) -> Path:
    """The same of a U-Net."""
    modules = {m.removeprefix("unet."): SD1[m] for m in (SQUARE, TEXT)}
    tensors = {
        k: t for i, (m, s) in enumerate(modules.items()) for k, t in factors(m, i, s).items()
    }
    match kind:
        case "dora":
            tensors |= {f"{m}.lora_magnitude_vector": numbers(7, s[0]).abs()
                        for m, s in modules.items()}  # fmt: skip
            return peft(folder, tensors, use_dora=True)
        case "bias":
            tensors |= {f"{m}.lora_B.bias": numbers(7, s[0]) for m, s in modules.items()}
            return peft(folder, tensors, lora_bias=True)
        case "whole":
            tensors["conv_in.weight"] = numbers(7, 8, 4, 3, 3)
            return peft(folder, tensors, modules_to_save=["conv_in"])
        case _:
            tensors |= factors(CONV.removeprefix("unet."), 9, SD1[CONV])
            return peft(folder, tensors)


def kohya(kind: str, path: Path) -> Path:
    """What LyCORIS and ComfyUI have beside pairs."""
    path = path.with_suffix(".safetensors")
    square, conv = (
        f"lora_unet_{m.removeprefix('unet.').replace('.', '_')}" for m in (SQUARE, CONV)
    )
    norm = square.replace("attn1_to_q", "norm1")
    down, up = numbers(1, 2, 768), numbers(2, 8, 2)
    plain = square.replace("attn1_to_q", "attn2_to_k")
    tensors = {f"{plain}.lora_down.weight": down, f"{plain}.lora_up.weight": up,
               f"{plain}.alpha": torch.tensor(3.0)}  # fmt: skip
    pair = {f"{square}.lora_down.weight": numbers(3, 2, 8), f"{square}.lora_up.weight":
            numbers(4, 8, 2), f"{square}.alpha": torch.tensor(3.0)}  # fmt: skip
    match kind:
        case "dora":
            tensors |= pair | {f"{square}.dora_scale": numbers(7, 8, 1).abs()}
            tensors[f"{plain}.dora_scale"] = numbers(8, 8, 1).abs()
        case "columns":
            tensors |= pair | {f"{square}.dora_scale": numbers(7, 1, 8).abs()}
        case "difference":
            tensors[f"{square}.diff"] = numbers(7, 8, 8)
        case "norm":
            tensors |= {f"{norm}.w_norm": numbers(7, 8), f"{norm}.b_norm": numbers(8, 8)}
        case "bias":
            tensors |= pair | {f"{square}.diff_b": numbers(7, 8)}
            tensors[f"{plain}.diff_b"] = numbers(8, 8)
        case "bias_alone":
            tensors[f"{square}.diff_b"] = numbers(7, 8)
        case "set":
            tensors[f"{square}.set_weight"] = numbers(7, 8, 8)
        case _:
            tensors |= {f"{conv}.lora_down.weight": numbers(3, 2, 8, 3, 3),
                        f"{conv}.lora_up.weight": numbers(4, 8, 2, 1, 1),
                        f"{conv}.alpha": torch.tensor(0.75)}  # fmt: skip
    save_file(tensors, path, {"ss_network_module": "lycoris.kohya"})
    return path


def made(table: str, kind: str, folder: Path) -> tuple[Path, str, dict[str, Path]]:
    """The adapter, its format, and the base to convert it with."""
    if table == "language":
        return llama(kind, folder / "x"), "peft", {"base": BASES.write(folder / "base")}
    if table == "peft":
        return unet(kind, folder / "x"), "peft", {}
    return kohya(kind, folder / "x"), "kohya", {}


def same(old: Adapter, new: Adapter) -> None:
    """The same deltas, kind by kind, number by number; biases that are zero may be new."""
    zeros = {k for k, d in new.deltas.items() if k.endswith(".bias") and not any(
        leaf.tensor().any() for leaf in leaves(d))}  # fmt: skip
    assert new.deltas.keys() - zeros == old.deltas.keys()
    assert new.transposed == old.transposed
    for key, delta in old.deltas.items():
        now = new.deltas[key]
        assert type(now) is type(delta)
        assert getattr(now, "axis", None) == getattr(delta, "axis", None)
        pairs = list(zip(leaves(delta), leaves(now), strict=True))
        scale = [getattr(getattr(d, "delta", d), "scaling", 1.0) for d in (delta, now)]
        if key.endswith(".bias"):  # which are stored with the pair's scaling, or without
            a, b = (s * leaf.tensor().double() for s, leaf in zip(scale, pairs[0], strict=True))
            torch.testing.assert_close(a, b, rtol=2e-7, atol=0)
            continue
        if scale[0] != scale[1]:  # L*: the scaling went into B
            ups = [(s * p.b.tensor().double()) for s, p in zip(scale, (delta.delta, now.delta),
                                                               strict=True)]  # fmt: skip
            torch.testing.assert_close(*ups, rtol=2e-7, atol=0)
            pairs = [(delta.delta.a, now.delta.a), (delta.magnitude, now.magnitude)]
        for one, other in pairs:
            assert torch.equal(one.tensor().flatten(), other.tensor().flatten()), key


@pytest.mark.parametrize(
    ("table", "kind", "y"), [pytest.param(t, *p.values, id=f"{t}-{p.id}") for t in TABLES
                             for p in rows_of(t, "L")]
)  # fmt: skip
def test_what_has_a_place_is_given_back(table, kind, y, tmp_path):
    source, x, options = made(table, kind, tmp_path)
    (result,) = convert(source, to=y, out=suffixed(tmp_path / "y", y), **options)
    assert result.lost == ()
    read = formats.read(result.output)
    assert [p for p in read.problems if p.severity == "error"] == []
    assert sorted(type(d).__name__ for d in read.deltas.values()) >= sorted(
        type(d).__name__ for d in formats.read(source).deltas.values()
    )
    if verdicts(TABLES[table])[kind, y] == "L>":
        refusal("loss", convert, result.output, to=x, out=suffixed(tmp_path / "z", x), **options)
        return
    (back,) = convert(result.output, to=x, out=suffixed(tmp_path / "z", x), **options)
    same(formats.read(source), formats.read(back.output))


@pytest.mark.parametrize(
    ("table", "kind", "y"), [pytest.param(t, *p.values, id=f"{t}-{p.id}") for t in TABLES
                             for p in rows_of(t, "X")]
)  # fmt: skip
def test_what_has_no_place_is_named_and_left_out_only_when_allowed(table, kind, y, tmp_path):
    source, _, options = made(table, kind, tmp_path)
    out = suffixed(tmp_path / "y", y)
    message = refusal("loss", convert, source, to=y, out=out, **options)
    assert not out.exists()
    if table == "language" and y in NO_NAMES:
        assert "image models only" in message
        return
    with pytest.raises(LoratoolsError) as caught:
        convert(source, to=y, out=out, **options)
    named = {p.target for p in caught.value.problems}
    assert named
    if (kind, y) in EMPTY:  # no delta has a place there, and nothing is written
        refusal("no_effect", convert, source, to=y, out=out, allow=["loss"], **options)
        assert not out.exists()
        return
    (result,) = convert(source, to=y, out=out, allow=["loss"], **options)
    assert len(result.lost) == len(named)
    receipt = (
        out.with_name(f"{out.name}.loratools.json") if out.is_file() else out / "loratools.json"
    )
    waived = json.loads(receipt.read_text())["waived"]
    assert {w["target"] for w in waived} == named
    assert {w["code"] for w in waived} == {"loss"}
    kept = formats.read(out)
    assert [p for p in kept.problems if p.severity == "error"] == []
    assert kept.deltas


def test_a_pair_of_an_embedding_in_every_formats_own_layout(tmp_path):
    source, _, options = made("language", "embedding", tmp_path)
    tensors = load_file(source / "adapter_model.safetensors")
    down = tensors["base_model.model.model.embed_tokens.lora_embedding_A"]
    convert(source, to="mlx", out=tmp_path / "m", **options)
    found = load_file(tmp_path / "m" / "adapters.safetensors")
    assert torch.equal(found["model.embed_tokens.lora_a"], down.t())
