"""MLX adapters as bytes: keys as the specification has them, scales, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.adapter import Adapter, Leaf, LowRank, Renormed, Replace, leaves
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.formats import mlx, onnx_adapter, peft
from tests.tiny import numbers, safetensors, write_adapter

SPEC = Path(__file__).parents[2] / "specs" / "formats" / "mlx.md"
Q, E = "model.layers.3.self_attn.q_proj", "model.embed_tokens"
SAID = {"rank": 2, "scale": 10.0, "dropout": 0.0}
CONFIG = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": SAID}
PAIR = {f"{Q}.lora_a": [6, 2], f"{Q}.lora_b": [2, 4]}
OLD = {"lora_layers": 4, "lora_parameters": SAID | {"alpha": 8.0}}


def write(folder, shapes, config=CONFIG, name="adapters.safetensors"):
    folder.mkdir(exist_ok=True)
    drawn = {}
    for i, (key, shape) in enumerate(shapes.items()):
        drawn[key] = (shape, numbers(int(np.prod(shape)), i, 1.0))
    if name.endswith(".npz"):
        arrays = {k: np.frombuffer(raw, "<f4").reshape(s) for k, (s, raw) in drawn.items()}
        np.savez(folder / name, **arrays)
    else:
        (folder / name).write_bytes(safetensors(drawn))
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def read(folder, **assume):
    return mlx.read(local(folder), assume=assume)


def codes(adapter):
    return [(p.code, p.severity) for p in adapter.problems]


def key_table():
    text = SPEC.read_text().partition("## Keys")[2].partition("##")[0]
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|", text, re.MULTILINE)


def test_the_reader_has_the_keys_of_the_specification(tmp_path):
    table = {part: (key, module) for key, module, part in key_table()}
    assert set(table) == {*mlx.PARTS, "value"}
    named = {part: re.sub(r"\bX\b", Q, key) for part, (key, _) in table.items()}
    shapes = {named["lora_a"]: [6, 2], named["lora_b"]: [2, 4], named["m"]: [4]}
    adapter = read(write(tmp_path / "dora", shapes, CONFIG | {"fine_tune_type": "dora"}))
    assert adapter.problems == ()
    [(key, delta)] = adapter.deltas.items()
    assert key == f"{Q}.weight"
    assert isinstance(delta, Renormed)
    assert [leaf.shape for leaf in leaves(delta)] == [(2, 6), (4, 2), (4,)]
    assert [leaf.name for leaf in leaves(delta)] == [named[p] for p in mlx.PARTS]
    full = {re.sub(r"\bP\b", p, named["value"]): [4] for p in ("weight", "bias")}
    adapter = read(write(tmp_path / "full", full, CONFIG | {"fine_tune_type": "full"}))
    assert adapter.problems == ()
    assert set(adapter.deltas) == set(full)
    assert all(isinstance(d, Replace) for d in adapter.deltas.values())


def test_factors_are_seen_turned_and_read_as_they_lie(tmp_path):
    adapter = read(write(tmp_path / "made", PAIR))
    [delta] = adapter.deltas.values()
    assert (delta.a.shape, delta.b.shape, delta.rank, delta.scaling) == ((2, 6), (4, 2), 2, 10)
    stored = np.frombuffer(numbers(12, 0, 1.0), "<f4").reshape(6, 2)
    assert np.array_equal(delta.a.tensor().numpy(), stored.T)


def test_an_embedding_is_stored_the_other_way_round(tmp_path):
    shapes = {f"{E}.lora_a": [9, 2], f"{E}.lora_b": [2, 4], f"{E}.m": [9], **PAIR, f"{Q}.m": [4]}
    shapes |= {"embed_out.lora_a": [4, 2], "embed_out.lora_b": [2, 9], "embed_out.m": [9]}
    adapter = read(write(tmp_path / "made", shapes, CONFIG | {"fine_tune_type": "dora"}))
    assert adapter.problems == ()
    assert adapter.transposed == {f"{E}.weight"}
    axes = {k: d.axis for k, d in adapter.deltas.items()}
    assert axes == {f"{E}.weight": "in", f"{Q}.weight": "out", "embed_out.weight": "out"}


# Config, assumptions, the scaling, the problems.
SCALES = {
    "today": (CONFIG, {}, 10, []),
    "with the alpha of old defaults": (
        CONFIG | {"lora_parameters": SAID | {"alpha": 16}}, {}, 10, [("config_conflict", "note")]
    ),
    "before 0.14": (OLD, {}, 40, [("config_conflict", "note")]),
    "before 0.14, alpha is the rank": (
        OLD | {"lora_parameters": SAID | {"alpha": 2.0}}, {}, 10, [("config_conflict", "note")]
    ),
    "0.14 to 0.18": (OLD | {"use_dora": False}, {}, 10, [("config_conflict", "warning")]),
    "0.14.0, said": (OLD | {"use_dora": False}, {"scale": "40"}, 40, []),
    "0.14.2, said": (OLD | {"use_dora": False}, {"scale": "10"}, 10, []),
    "no scale": ({**CONFIG, "lora_parameters": {"rank": 2, "alpha": 16}}, {}, 1,
                 [("alpha_missing", "error")]),
    "no scale, said": ({**CONFIG, "lora_parameters": {"rank": 2, "alpha": 16}},
                       {"scale": "8"}, 8, []),
    "no config": (None, {}, 1, [("alpha_missing", "error")]),
    "no config, said": (None, {"scale": "20"}, 20, []),
    "full by name": (
        CONFIG | {"fine_tune_type": "full"}, {}, 10, [("config_conflict", "warning")]
    ),
    "nothing": ({**CONFIG, "lora_parameters": SAID | {"scale": 0.0}}, {}, 0,
                [("no_effect", "warning"), ("no_effect", "error")]),
}  # fmt: skip


@pytest.mark.parametrize("row", SCALES)
def test_which_arithmetic_the_scale_belongs_to(row, tmp_path):
    config, assume, scaling, problems = SCALES[row]
    folder = write(tmp_path / "made", PAIR, config)
    source = folder / "adapters.safetensors"
    assert mlx.detect(local(source))
    adapter = mlx.read(local(source), assume=assume)
    assert [d.scaling for d in adapter.deltas.values()] == [scaling]
    assert codes(adapter) == problems


def test_an_assumed_scale_may_not_contradict_the_file(tmp_path):
    folder = write(tmp_path / "made", PAIR)
    for config, said in ((CONFIG, "20"), (OLD, "20"), (CONFIG, "x"), (CONFIG, "nan")):
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(LoratoolsError) as refused:
            read(folder, scale=said)
        assert refused.value.exit == 2


ROWS = {
    "no lora_b": ({f"{Q}.lora_a": [6, 2]}, CONFIG, "missing", "lora_a without lora_b"),
    "no lora_a": ({f"{Q}.lora_b": [2, 4]}, CONFIG, "missing", "lora_b without lora_a"),
    "ranks": ({f"{Q}.lora_a": [6, 2], f"{Q}.lora_b": [3, 4]}, CONFIG, "shape_factors", "q_proj"),
    "flat": ({f"{Q}.lora_a": [12], f"{Q}.lora_b": [2, 4]}, CONFIG, "shape_factors", "12"),
    "rank": (
        PAIR, CONFIG | {"lora_parameters": SAID | {"rank": 8}}, "config_conflict", "lora_a has 2"
    ),
    "magnitudes unannounced": (PAIR | {f"{Q}.m": [4]}, CONFIG, "config_conflict", "says lora"),
    "no magnitudes": (PAIR, CONFIG | {"fine_tune_type": "dora"}, "missing", "magnitudes"),
    "magnitudes of old": (PAIR, OLD | {"use_dora": True}, "missing", "magnitudes"),
    "magnitudes of others": (
        PAIR | {f"{Q}.m": [6]}, CONFIG | {"fine_tune_type": "dora"}, "shape_factors", "6 magnitudes"
    ),
    "experts of two sizes": (
        {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": [3, 2, 6],
         "model.layers.0.mlp.switch_mlp.up_proj.lora_b": [4, 4, 2], **PAIR},
        CONFIG, "shape_factors", "experts, rank, in",
    ),
    "experts, flat, of two ranks": (
        {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": [9, 6],
         "model.layers.0.mlp.switch_mlp.up_proj.lora_b": [3, 4, 2], **PAIR},
        CONFIG, "shape_factors", "experts, rank, in",
    ),
    "experts of another rank": (
        {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": [3, 4, 6],
         "model.layers.0.mlp.switch_mlp.up_proj.lora_b": [3, 4, 4], **PAIR},
        CONFIG, "config_conflict", "lora_a has 4",
    ),
    "a full parameter": (PAIR | {f"{Q}.weight": [4, 6]}, CONFIG, "unexplained", "q_proj.weight"),
    "a lone m": (PAIR | {"model.m": [4]}, CONFIG, "unexplained", "model.m"),
    "no module": (PAIR | {"lora_a": [6, 2]}, CONFIG, "unexplained", "lora_a"),
    "nothing": ({}, CONFIG, "no_effect", "no adapter tensors"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["adapters.safetensors", "adapters.npz"])
def test_what_config_and_tensors_contradict_is_found(name, row, tmp_path):
    shapes, config, code, text = ROWS[row]
    folder = write(tmp_path / "made", shapes, config, name)
    if name.endswith(".npz") and not shapes:
        return  # an empty zip is no .npz, numpy writes an end record alone
    assert mlx.detect(local(folder))
    adapter = read(folder)
    found = [p for p in adapter.problems if p.severity == "error"]
    assert code in [p.code for p in found]
    assert any(text in p.message for p in found if p.code == code)


RAISED = {
    "scale as text": CONFIG | {"lora_parameters": SAID | {"scale": "10"}},
    "scale as a flag": CONFIG | {"lora_parameters": SAID | {"scale": True}},
    "parameters as a list": CONFIG | {"lora_parameters": [1]},
    "a sort that is none": CONFIG | {"fine_tune_type": 1},
}


@pytest.mark.parametrize("row", RAISED)
def test_a_config_of_odd_values_is_malformed(row, tmp_path):
    folder = write(tmp_path / "made", PAIR, RAISED[row])
    assert mlx.detect(local(folder))
    with pytest.raises(LoratoolsError) as refused:
        read(folder)
    assert refused.value.exit == 3


@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    scalings=st.lists(st.sampled_from([0.5, 2.0, 0.3, -1.0]), min_size=4, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    form=st.sampled_from([mlx, onnx_adapter]),
)
def test_there_and_back_is_the_same_update(ranks, scalings, dtype, form, tmp_path_factory):
    """And the same factors where neither rank nor scaling had to be rewritten."""
    folder = tmp_path_factory.mktemp("out")
    draw = torch.Generator().manual_seed(len(ranks))
    deltas = {}
    for i, rank in enumerate(ranks):
        a, b = (torch.randn(n, generator=draw).to(dtype) for n in ((rank, 6), (5, rank)))
        pair = LowRank(Leaf.of("", a), Leaf.of("", b), scalings[i])
        deltas[f"model.layers.{i}.mlp.up_proj.weight"] = pair
    adapter = Adapter(deltas=deltas)
    assert form.lost(adapter) == []
    out = folder if form.SUFFIX is None else folder / f"x{form.SUFFIX}"
    form.write(adapter, out)
    again = form.read(local(out), assume={})
    assert [p for p in again.problems if p.severity != "note"] == []
    assert again.deltas.keys() == deltas.keys()
    for key, before in deltas.items():
        after = again.deltas[key]
        updates = [d.scaling * (d.b.tensor().double() @ d.a.tensor().double())
                   for d in (before, after)]  # fmt: skip
        torch.testing.assert_close(updates[1], updates[0], rtol=1e-5, atol=1e-6)
        if after.scaling == before.scaling and after.rank == before.rank:
            assert torch.equal(after.a.tensor(), before.a.tensor().to(after.a.tensor().dtype))
            assert torch.equal(after.b.tensor(), before.b.tensor().to(after.b.tensor().dtype))
            assert form is not mlx or after.b.dtype == before.b.dtype


def test_snapshots_beside_the_last_are_a_note_and_alone_the_last_is_read(tmp_path):
    folder = write(tmp_path / "made", PAIR)
    for name in ("0000100_adapters.safetensors", "0001000_adapters.safetensors"):
        shutil.copy(folder / "adapters.safetensors", folder / name)
    adapter = read(folder)
    assert adapter.files == ("adapters.safetensors", "adapter_config.json")
    assert codes(adapter) == [("unexplained", "note")]
    assert "0000100_adapters.safetensors" in adapter.problems[0].message
    (folder / "adapters.safetensors").unlink()
    assert mlx.detect(local(folder))
    assert read(folder).files[0] == "0001000_adapters.safetensors"
    chosen = local(folder / "0000100_adapters.safetensors")
    assert mlx.detect(chosen)
    assert mlx.read(chosen, assume={}).files[0] == "0000100_adapters.safetensors"


def test_what_others_write_is_not_taken(tmp_path):
    write_adapter(tmp_path / "peft")
    assert not mlx.detect(local(tmp_path / "peft"))
    assert not mlx.detect(local(tmp_path / "peft" / "adapter_model.safetensors"))
    tune = write(tmp_path / "tune", {"layers.0.attn.q_proj.lora_a.weight": [2, 6]}, None)
    assert not mlx.detect(local(tune))
    hub = {"config": {"architecture": "lora"}, "version": "adapters.1.2", "num_layers": 2}
    assert not mlx.detect(local(write(tmp_path / "hub", {"a.weight": [2]}, hub)))
    base = write(tmp_path / "base", {"model.norm.weight": [4]}, None, "model.safetensors")
    (base / "config.json").write_text(json.dumps({"num_layers": 4}))
    assert not mlx.detect(local(base))
    (tmp_path / "empty").mkdir()
    assert not mlx.detect(local(tmp_path / "empty"))
    for name in ("x.npz", "x.safetensors", "adapters.npz", "adapters.safetensors"):
        for raw in (b"", b"PK\3\4", b"\x93NUMPY", b"version https://git-lfs"):
            (tmp_path / "empty" / name).write_bytes(raw)
            assert not mlx.detect(local(tmp_path / "empty" / name))
    assert not peft.detect(local(write(tmp_path / "ours", PAIR)))


def test_a_broken_file_of_an_mlx_folder_is_refused_for_what_it_is(tmp_path):
    folder = write(tmp_path / "made", PAIR)
    raw = (folder / "adapters.safetensors").read_bytes()
    (folder / "adapters.safetensors").write_bytes(raw[:-4])
    assert mlx.detect(local(folder))
    with pytest.raises(LoratoolsError) as refused:
        read(folder)
    assert refused.value.code == "truncated"


def test_the_base_is_the_one_that_the_config_names(tmp_path):
    config = CONFIG | {"model": "mlx-community/tiny-4bit", "config": None, "seed": 1}
    adapter = read(write(tmp_path / "made", PAIR, config))
    assert adapter.config == config | {"base_model_name_or_path": "mlx-community/tiny-4bit"}
    (tmp_path / "out").mkdir()
    mlx.write(adapter, tmp_path / "out")
    again = read(tmp_path / "out").config
    keys = {"keys": ["self_attn.q_proj"]}
    assert again == adapter.config | {"lora_parameters": SAID | keys}
