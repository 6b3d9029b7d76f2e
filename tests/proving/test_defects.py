"""What goes wrong with folds is found, and the tensor named: in PEFT's folds and in our own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.commands.merge import merge
from loratools.commands.verify import VerifyResult, verify

F32, BF16 = torch.float32, torch.bfloat16
SQUARE = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTER = {"target_modules": SQUARE}
Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
K0, NORM = "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"
LAYER1 = [f"model.layers.1.self_attn.{name}.weight" for name in SQUARE]
EVERY = [t.replace("layers.1", f"layers.{i}") for t in LAYER1 for i in (0, 1)]
Tensors = dict[str, Tensor]


def neighbour(tensor: Tensor, place: tuple[int, ...], steps: int) -> None:
    """Move one element by units in the last place."""
    bits = tensor.view(torch.int16 if tensor.dtype == BF16 else torch.int32)
    bits[place] += steps


def layer_not_folded(out: Tensors, before: Tensors) -> list[str]:
    out.update({name: before[name] for name in LAYER1})
    return LAYER1


def wrong_module(out: Tensors, before: Tensors) -> list[str]:
    delta = out[K0].double() - before[K0].double()
    out[Q0] = (before[Q0].double() + delta).to(out[Q0].dtype)
    return [Q0]


def transposed(out: Tensors, before: Tensors) -> list[str]:
    delta = out[Q0].double() - before[Q0].double()
    out[Q0] = (before[Q0].double() + delta.T).to(out[Q0].dtype)
    return [Q0]


def swapped(out: Tensors, before: Tensors) -> list[str]:
    deltas = [out[name].double() - before[name].double() for name in (Q0, Q1)]
    for name, delta in zip((Q0, Q1), reversed(deltas), strict=True):
        out[name] = (before[name].double() + delta).to(out[name].dtype)
    return [Q0, Q1]


def one_element(out: Tensors, before: Tensors) -> list[str]:
    neighbour(out[Q0], (11, 22), 2)
    return [Q0]


def one_element_of_a_dora(out: Tensors, before: Tensors) -> list[str]:
    neighbour(out[Q0], (11, 22), 16)  # a row's norm leaves some units in the last place open
    return [Q0]


def untouched_element(out: Tensors, before: Tensors) -> list[str]:
    neighbour(out[NORM], (5,), 1)
    return [NORM]


def missing(out: Tensors, before: Tensors) -> list[str]:
    del out[NORM]
    return [NORM]


def extra(out: Tensors, before: Tensors) -> list[str]:
    out["model.other.weight"] = torch.zeros(2)
    return ["model.other.weight"]


def reshaped(out: Tensors, before: Tensors) -> list[str]:
    out[NORM] = out[NORM][:-1].clone()
    return [NORM]


def not_a_number(out: Tensors, before: Tensors) -> list[str]:
    out[Q0][3, 4] = torch.nan
    return [Q0]


DAMAGES = [
    layer_not_folded,
    wrong_module,
    transposed,
    swapped,
    one_element,
    untouched_element,
    missing,
    extra,
    reshaped,
    not_a_number,
]


def damaged(source: Path, target: Path, base: Path, damage: Callable[..., list[str]]) -> list[str]:
    """A copy of a model after a defect; the tensors that the defect is in."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    named = damage(tensors, load_file(base / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return sorted(named)


def tensors_of(result: VerifyResult) -> list[str]:
    assert not result.ok
    assert result.as_json()["ok"] is False
    return sorted({m.tensor for m in result.mismatches if m.tensor is not None})


@pytest.fixture(scope="module")
def own(base, adapter, tmp_path_factory):
    def find(dtype: torch.dtype) -> Path:
        out = tmp_path_factory.getbasetemp() / f"own-{dtype}"
        if not out.exists():
            merge([adapter("llama", **ADAPTER)], base("llama", dtype), out=out)
        return out

    return find


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_defect_in_a_fold_by_peft_is_found(damage, dtype, base, adapter, folded, tmp_path):
    over, made = base("llama", dtype), adapter("llama", **ADAPTER)
    out = folded("llama", over, [made])
    named = damaged(out, tmp_path / "out", over, damage)
    result = verify(tmp_path / "out", base=over, adapters=[made])
    assert tensors_of(result) == named
    if damage in (one_element, not_a_number, untouched_element):
        (one,) = result.mismatches
        place = {one_element: (11, 22), not_a_number: (3, 4), untouched_element: (5,)}[damage]
        assert (one.elements, one.first) == (1, place)
    if damage is layer_not_folded:
        assert {m.what for m in result.mismatches if m.tensor} == {"not folded"}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_defect_in_our_own_fold_is_found(damage, dtype, base, adapter, own, tmp_path):
    over, made = base("llama", dtype), adapter("llama", **ADAPTER)
    named = damaged(own(dtype), tmp_path / "out", over, damage)
    result = verify(tmp_path / "out", base=over, adapters=[made], require="replay")
    assert tensors_of(result) == named
    assert [m.file for m in result.mismatches if m.tensor is None] == ["model.safetensors"]
    by_hash = verify(tmp_path / "out")
    assert not by_hash.ok
    assert by_hash.proved == "hashes"


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_alpha_wrong_by_a_thousandth_is_found(dtype, base, adapter, folded, tmp_path):
    over, right = base("llama", dtype), adapter("llama", **ADAPTER)
    wrong = shutil.copytree(right, tmp_path / "wrong")
    config = json.loads((wrong / "adapter_config.json").read_text())
    config["lora_alpha"] *= 1.001
    (wrong / "adapter_config.json").write_text(json.dumps(config))
    result = verify(folded("llama", over, [wrong]), base=over, adapters=[right])
    assert tensors_of(result) == sorted(EVERY)
    if dtype == F32:
        scaling, error = result.strength
        assert scaling == pytest.approx(1.001, abs=5 * error)
        assert "alpha" in next(m.what for m in result.mismatches if m.tensor is None)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_double_merge_is_found(dtype, base, adapter, folded):
    over, made = base("llama", dtype), adapter("llama", **ADAPTER)
    twice = folded("llama", folded("llama", over, [made]), [made])
    result = verify(twice, base=over, adapters=[made])
    assert tensors_of(result) == sorted(EVERY)
    assert {m.what for m in result.mismatches if m.tensor} == {"folded twice"}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_another_base_is_found(dtype, base, adapter, folded):
    over, other, made = base("llama", dtype), base("llama", dtype, 2), adapter("llama", **ADAPTER)
    result = verify(folded("llama", other, [made]), base=over, adapters=[made])
    assert tensors_of(result) == sorted(load_file(over / "model.safetensors"))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_shard_of_an_older_run_is_found(dtype, base, adapter, folded, tmp_path):
    over, made = base("llama", dtype), adapter("llama", **ADAPTER)
    older = adapter("llama", **ADAPTER, seed=8)
    size = {"max_shard_size": "60KB"}
    out = shutil.copytree(folded("llama", over, [made], **size), tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    shard = index[Q1]
    shutil.copy(folded("llama", over, [older], **size) / shard, out / shard)
    result = verify(out, base=over, adapters=[made])
    assert tensors_of(result) == sorted(n for n in EVERY if index[n] == shard)
    assert {m.file for m in result.mismatches if m.tensor} == {shard}


def test_a_tensor_missing_from_its_shard_is_found(base, adapter, folded, tmp_path):
    over, made = base("llama"), adapter("llama", **ADAPTER)
    out = shutil.copytree(folded("llama", over, [made], max_shard_size="60KB"), tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(out / index[Q1])
    del tensors[Q1]
    save_file(tensors, out / index[Q1], {"format": "pt"})
    result = verify(out, base=over, adapters=[made])
    assert tensors_of(result) == [Q1]
    assert "lists" in result.mismatches[0].what


def test_swapped_order_of_adapters_is_found(base, adapter, folded):
    over = base("llama", BF16)
    first, second = (adapter("llama", **ADAPTER, seed=s) for s in (3, 8))
    out = folded("llama", over, [first, second])
    assert verify(out, base=over, adapters=[first, second]).ok
    assert not verify(out, base=over, adapters=[second, first]).ok


def test_a_defect_under_a_dora_is_found(base, adapter, folded, tmp_path):
    for dtype in (F32, BF16):
        over = base("llama", dtype)
        made = adapter("llama", **ADAPTER, use_dora=True)
        out = folded("llama", over, [made])
        for damage in (transposed, one_element_of_a_dora):
            copy = tmp_path / f"{damage.__name__}-{dtype}"
            named = damaged(out, copy, over, damage)
            assert tensors_of(verify(copy, base=over, adapters=[made])) == named
