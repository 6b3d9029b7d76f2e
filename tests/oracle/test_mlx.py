"""mlx-lm is the judge: what it trains and saves folds as it fuses, what we write it loads."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama, qwen2
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from safetensors.torch import save_file

from loratools.adapter import Adapter, Leaf, LowRank, Renormed, Replace
from loratools.algebra import materialise
from loratools.containers.bundle import local
from loratools.formats import mlx
from tests.oracle import folds

TEXT = {
    "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 40, "tie_word_embeddings": False,
}  # fmt: skip
IDS = mx.array([[3, 9, 1, 27, 14, 6]])
ALL = None  # every layer that mlx-lm knows how to adapt
EVERYWHERE = [
    "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "lm_head", "model.embed_tokens"
]  # fmt: skip


def fresh(name="llama"):
    """A model of mlx-lm with random weights, always the same."""
    mx.random.seed(0)
    module = {"llama": llama, "qwen2": qwen2}[name]
    model = module.Model(module.ModelArgs(model_type=name, **TEXT))
    shapes = [(k, mx.random.normal(v.shape) * 0.3) for k, v in tree_flatten(model.parameters())]
    model.update(tree_unflatten(shapes))
    return model


def base_of(model, folder):
    """The model's weights as a base on disk."""
    folder.mkdir()
    save_file(tensors_of(model), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **TEXT}))
    return folder


def tensors_of(model):
    return {k: torch.tensor(np.array(v)) for k, v in tree_flatten(model.parameters())}


def trained(model, folder, kind="lora", layers=2, keys=ALL, rank=3, scale=5.0):
    """An adapter as mlx-lm leaves it after a training that moved every parameter."""
    said = {"rank": rank, "scale": scale, "dropout": 0.0, **({"keys": keys} if keys else {})}
    model.freeze()
    if kind == "full":
        for block in model.layers[-layers:]:
            block.unfreeze()
    else:
        linear_to_lora_layers(model, layers, said, use_dora=kind == "dora")
    mx.random.seed(1)
    moved = [
        (k, v * (1 + 0.1 * mx.random.normal(v.shape)) + 0.03 * mx.random.normal(v.shape))
        for k, v in tree_flatten(model.trainable_parameters())
    ]
    model.update(tree_unflatten(moved))
    folder.mkdir()
    adapters = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), adapters)
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": said}
    config |= {"model": "org/tiny-base", "config": None, "seed": 0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model


def fused(model):
    """The weights after mlx-lm's own fuse."""
    layers = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    if layers:
        model.update_modules(tree_unflatten(layers))
    return tensors_of(model)


def close(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)


CASES = {
    "lora": ("llama", {"kind": "lora"}),
    "lora of biased layers": ("qwen2", {"kind": "lora"}),
    "lora everywhere": ("llama", {"kind": "lora", "layers": 3, "keys": EVERYWHERE}),
    "dora": ("llama", {"kind": "dora"}),
    "dora everywhere": ("llama", {"kind": "dora", "layers": 3, "keys": EVERYWHERE}),
    "full": ("llama", {"kind": "full"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fold_is_what_mlx_fuses(case, tmp_path):
    name, options = CASES[case]
    base = base_of(fresh(name), tmp_path / "base")
    model = trained(fresh(name), tmp_path / "adapter", **options)
    bundle = local(tmp_path / "adapter")
    assert mlx.detect(bundle)
    adapter = mlx.read(bundle, assume={})
    assert adapter.problems == ()
    assert (adapter.format, adapter.vocabulary) == ("mlx", "hf")
    assert adapter.config["base_model_name_or_path"] == "org/tiny-base"
    close(folds.fold(adapter, base), fused(model))


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_mlx_loads_and_computes_the_same(case, tmp_path):
    name, options = CASES[case]
    model = trained(fresh(name), tmp_path / "adapter", **options)
    adapter = mlx.read(local(tmp_path / "adapter"), assume={})
    assert mlx.lost(adapter) == []
    (tmp_path / "out").mkdir()
    written = mlx.write(adapter, tmp_path / "out")
    assert sorted(written) == ["adapters.safetensors"]
    loaded = load_adapters(fresh(name), str(tmp_path / "out"))
    assert mx.allclose(loaded(IDS), model(IDS), atol=1e-6, rtol=1e-6)
    before, after = (
        mx.load(str(tmp_path / d / "adapters.safetensors")) for d in ("adapter", "out")
    )
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[k], after[k]) for k in before)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    same = {"model", "config", "seed", "fine_tune_type", "num_layers"}
    assert {k: config[k] for k in same} == {k: said[k] for k in same}


def made(seed, out, inside, rank, scaling, *, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    a = (torch.randn(rank, inside, generator=draw) * 0.1).to(dtype)
    b = (torch.randn(out, rank, generator=draw) * 0.1).to(dtype)
    return LowRank(Leaf.of("a", a), Leaf.of("b", b), scaling)


def another(folder, deltas, **fields):
    """An adapter of another format written as MLX's, and what of it is lost."""
    adapter = Adapter(deltas=deltas, **fields)
    lost = mlx.lost(adapter)
    folder.mkdir()
    mlx.write(adapter, folder)
    return adapter, [p.target for p in lost]


@pytest.mark.parametrize("blocks", [(0, 1, 2), (0, 2), (1,), (0,), ()])
def test_ranks_and_scalings_of_another_format_become_one(blocks, tmp_path):
    deltas = {
        f"model.layers.{i}.self_attn.q_proj.weight": made(i, 16, 16, 2 + i, 0.5 * (1 + i % 2))
        for i in blocks
    }
    deltas["model.layers.1.mlp.up_proj.weight"] = made(7, 24, 16, 5, 0.5)
    deltas["lm_head.weight"] = made(8, 40, 16, 1, 0.0)
    deltas["model.embed_tokens.weight"] = made(9, 16, 40, 2, 2.0)
    adapter, lost = another(
        tmp_path / "out", deltas, transposed=frozenset({"model.embed_tokens.weight"})
    )
    assert lost == []
    base = base_of(fresh(), tmp_path / "base")
    expected = folds.fold(adapter, base)
    loaded = load_adapters(fresh(), str(tmp_path / "out"))
    close(fused(loaded), expected)
    again = mlx.read(local(tmp_path / "out"), assume={})
    assert again.problems == ()
    assert again.transposed == adapter.transposed
    close(folds.fold(again, base), expected)


def test_the_sort_that_most_of_an_adapter_is_stays_and_the_rest_is_named(tmp_path):
    base, model = base_of(fresh(), tmp_path / "base"), fresh()
    norm = torch.tensor(np.array(model.layers[0].self_attn.q_proj.weight)).norm(dim=1) * 1.1
    q, k, v = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv")
    o = "model.layers.0.self_attn.o_proj.weight"
    head = "lm_head.weight"
    renormed = Renormed(made(1, 16, 16, 2, 1.0), Leaf.of("m", norm))
    deltas = {
        q: renormed, k: made(2, 8, 16, 2, 1.0), v: made(3, 8, 16, 2, 1.0),
        o: Renormed(made(4, 16, 16, 2, 1.0), Leaf.of("m", norm)),
        head: Replace(Leaf.of("w", torch.zeros(40, 16))),
    }  # fmt: skip
    _, lost = another(tmp_path / "dora", deltas)
    assert set(lost) == {k, v, head}
    left = Adapter(deltas={q: deltas[q], o: deltas[o]})
    loaded = load_adapters(fresh(), str(tmp_path / "dora"))
    close(fused(loaded), folds.fold(left, base))
    _, lost = another(tmp_path / "lora", {x: d for x, d in deltas.items() if x != o})
    assert set(lost) == {q, head}
    by_columns = Renormed(made(4, 16, 16, 2, 1.0), Leaf.of("m", norm), "in")
    _, lost = another(tmp_path / "columns", {q: by_columns})
    assert lost == [q]


def test_mlx_npz_of_old_is_the_same_adapter(tmp_path):
    """mx.savez writes arrays whose order is Fortran's where one extent is 1."""
    base = base_of(fresh(), tmp_path / "base")
    model = trained(fresh(), tmp_path / "adapter", rank=1)
    tensors = mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))
    (tmp_path / "adapter" / "adapters.safetensors").unlink()
    mx.savez(str(tmp_path / "adapter" / "adapters.npz"), **tensors)
    expected = fused(model)
    adapter = mlx.read(local(tmp_path / "adapter"), assume={})
    assert adapter.files[0] == "adapters.npz"
    close(folds.fold(adapter, base), expected)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    bundle = local(tmp_path / "adapter" / "adapters.npz")
    assert mlx.detect(bundle)
    [problem] = mlx.read(bundle, assume={}).problems
    assert problem.code == "alpha_missing"
    close(folds.fold(mlx.read(bundle, assume={"scale": "5"}), base), expected)


def test_half_precision_of_mlx_is_read_as_it_is(tmp_path):
    trained(fresh(), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapters.safetensors"
    for dtype, word in ((mx.bfloat16, "BF16"), (mx.float16, "F16")):
        tensors = {k: v.astype(dtype) for k, v in mx.load(str(file)).items()}
        mx.savez(str(tmp_path / "adapter" / "half.npz"), **tensors)
        found = mlx.read(local(tmp_path / "adapter" / "half.npz"), assume={})
        for key, delta in found.deltas.items():
            assert delta.a.dtype == word
            stem = key.removesuffix(".weight")
            expected = np.array(tensors[f"{stem}.lora_a"].astype(mx.float32)).T
            assert np.array_equal(delta.a.tensor().float().numpy(), expected)


def test_dtypes_stay_where_nothing_is_rewritten(tmp_path):
    q, k, v, o = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkvo")
    wide, tiny = torch.float64, torch.float8_e4m3fn
    deltas = {
        q: made(1, 16, 16, 2, 0.7, dtype=torch.bfloat16),
        k: made(2, 8, 16, 2, 0.5, dtype=torch.bfloat16),
        v: made(3, 8, 16, 2, 0.7, dtype=tiny),
        o: made(4, 16, 16, 2, 0.7, dtype=wide),
    }
    adapter, lost = another(tmp_path / "out", deltas)
    assert lost == [o]  # rounded
    found = mlx.read(local(tmp_path / "out"), assume={}).deltas
    dtypes = {key: (d.a.dtype, d.b.dtype) for key, d in found.items()}
    assert dtypes == {q: ("BF16",) * 2, k: ("BF16", "F32"), v: ("F32",) * 2, o: ("F32",) * 2}
    for key in (q, k, v):
        before, after = (
            d.scaling * (d.b.tensor().double() @ d.a.tensor().double())
            for d in (adapter.deltas[key], found[key])
        )
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-9)
    load_adapters(fresh(), str(tmp_path / "out"))


def test_layers_of_experts_are_read_as_mlx_fuses_them(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = SwitchLinear(16, 24, 4, bias=False)
            self.router = nn.Linear(16, 4)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Block(), Block()]

    model = Model()
    before = tensors_of(model)
    trained(model, tmp_path / "adapter", layers=1)
    adapter = mlx.read(local(tmp_path / "adapter"), assume={})
    assert not adapter.problems
    fused = tree_unflatten([(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")])
    model.update_modules(fused)
    for key, wanted in tensors_of(model).items():
        delta = adapter.deltas.get(key)
        found = before[key] if delta is None else before[key] + materialise(delta)
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=1e-5)
    assert set(adapter.deltas) == {"layers.1.router.weight", "layers.1.gate_proj.weight"}
