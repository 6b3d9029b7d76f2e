"""AdapterHub's folders: keys as the specification has them, methods and contradictions by name."""

import json
import re
from pathlib import Path

import pytest
import torch

from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.formats import adapterhub
from loratools.formats.adapterhub_keys import GROUPS, LEGACY, PARTS, Part, is_faulty, part_of

SPEC = Path(__file__).parents[2] / "specs" / "formats" / "adapterhub.md"
Q = "bert.encoder.layer.0.attention.self.query"
PAIR = {f"{Q}.loras.task.lora_A": (2, 6), f"{Q}.loras.task.lora_B": (4, 2)}
LORA = {"architecture": "lora", "r": 2, "alpha": 8, "attn_matrices": ["q", "v"]}


def write(folder, shapes, config, version="adapters.1.3.0", **more):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    torch.save({k: torch.randn(s) for k, s in shapes.items()}, folder / "pytorch_adapter.bin")
    if config is not None:
        table = {"config": config, "version": version, "name": "task", "model_type": "bert", **more}
        (folder / "adapter_config.json").write_text(json.dumps(table))
    return local(folder)


def key_table():
    """(key, module, group, leaf) of every row under "Keys"."""
    text = SPEC.read_text().partition("## Keys")[2].partition("##")[0]
    row = r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \| `(.+?)` \|"
    return re.findall(row, text, re.MULTILINE)


def filled(text):
    named = re.sub(r"\bN\b", "task", re.sub(r"\bX\b", Q, text))
    return re.sub(r"\bR\b", "some.0.weight", named)


@pytest.mark.parametrize(("key", "module", "group", "leaf"), key_table())
def test_the_reader_has_the_keys_of_the_specification(key, module, group, leaf):
    part = part_of(filled(key))
    assert (part.module, part.group, part.name, part.leaf) == (
        filled(module), group, "task", filled(leaf)
    )  # fmt: skip


def test_the_specification_has_every_group():
    table = key_table()
    assert {group for _, _, group, _ in table} == {*GROUPS, "heads"}
    assert set(PARTS) <= {leaf for _, _, _, leaf in table}
    assert {LEGACY[w] for key, *_ in table for w in key.split(".") if w in LEGACY} == {
        *LEGACY.values()
    }


@pytest.mark.parametrize(
    ("key", "group", "leaf"),
    [
        ("invertible_adapters.task.F.0.weight", "invertible_adapters", "F.0.weight"),
        ("invertible_lang_adapters.task.G.2.bias", "invertible_adapters", "G.2.bias"),
        ("loras.task.lora_A", "loras", "lora_A"),
        ("shared_parameters.task.phm_rule", "shared_parameters", "phm_rule"),
    ],
)
def test_a_bare_model_has_nothing_in_front(key, group, leaf):
    assert part_of(key) == Part("", group, "task", leaf)


@pytest.mark.parametrize(
    "key",
    ["", "loras", "loras.x", "model.layers.0.q_proj.weight", "a.b.c", "heads.x", "x.adapters"],
)
def test_other_keys_are_none_of_it(key):
    assert part_of(key) is None


# ------------------------------------------------------------------------------- reading


def test_the_fronts_of_wrappers_are_taken_away(tmp_path):
    shapes = {f"module._orig_mod.{key}": shape for key, shape in PAIR.items()}
    adapter = adapterhub.read(write(tmp_path / "a", shapes, LORA), assume={})
    assert adapter.problems == ()
    assert list(adapter.deltas) == [f"{Q}.weight"]
    assert adapter.config["method"] == {"name": "LoRA", "r": 2, "alpha": 8}


@pytest.mark.parametrize(
    ("version", "scaling"),
    [
        ("adapters.1.1.0", 4), ("adapters.1.3.0", 4), ("adapters.2.0", 4), ("3.2.1", 4), (None, 4),
        ("0.9", 4), ("adapters.x", 4), ("adapters.10.0.0", 4), (17, 4),
        ("adapters.1.0.1", 1), ("adapters.0.2.2", 1), ("adapters.1.0", 1),
        ("adapters.1.1.0.dev0", 1), ("adapters.1.1.0rc1", 1),
    ],
)  # fmt: skip
def test_the_version_decides_on_the_scaling(version, scaling, tmp_path):
    adapter = adapterhub.read(write(tmp_path / "a", PAIR, LORA, version), assume={})
    assert adapter.deltas[f"{Q}.weight"].scaling == scaling
    assert is_faulty(version) == (scaling == 1)
    assert [(p.code, p.severity) for p in adapter.problems] == (
        [("scaling_unusual", "note")] if scaling == 1 else []
    )


def test_fused_projections_of_old_files_are_warned_of(tmp_path):
    shapes = {
        "h.0.attn.c_attn.loras.task.lora_A": (4, 6),
        "h.0.attn.c_attn.loras.task.lora_B": (8, 2),
    }
    adapter = adapterhub.read(write(tmp_path / "a", shapes, LORA, "adapters.1.0.1"), assume={})
    assert [p.severity for p in adapter.problems] == ["note", "warning"]
    assert adapter.deltas["h.0.attn.c_attn.weight"].scaling == 1


C = "h.0.attn.c_attn.loras.task."
V = "bert.encoder.layer.0.attention.self.value.loras.other."
ROWS = {
    "no config": (PAIR, None, {}, "alpha_missing", "--assume alpha=8"),
    "no alpha": (PAIR, {"architecture": "lora"}, {}, "alpha_missing", "--assume alpha=8"),
    "rank": (PAIR, LORA | {"r": 3}, {}, "config_conflict", "r=3"),
    "no B": ({f"{Q}.loras.task.lora_A": (2, 6)}, LORA, {}, "missing", "without lora_B"),
    "factors": (PAIR | {f"{Q}.loras.task.lora_A": (3, 6)}, LORA, {}, "shape_factors", r"\(3, 6\)"),
    "groups": (
        {f"{C}lora_A": (2, 6), f"{C}lora_B": (4, 2)}, LORA, {}, "config_conflict", "2 of q, k, v"
    ),
    "groups unsaid": (
        {f"{C}lora_A": (4, 6), f"{C}lora_B": (8, 2)}, {"architecture": "lora", "alpha": 2}, {},
        "missing", "enable_lora=",
    ),
    "unequal groups": (
        {f"{C}lora_A": (4, 6), f"{C}lora_B": (7, 2)}, LORA, {}, "shape_factors", "2 equal groups"
    ),
    "two adapters": (
        PAIR | {f"{V}lora_A": (2, 6), f"{V}lora_B": (4, 2)}, LORA, {}, "unexplained", "other, task"
    ),
    "another key": (PAIR | {"bert.pooler.dense.weight": (6, 6)}, LORA, {}, "unexplained", "pooler"),
    "another leaf": (PAIR | {f"{Q}.loras.task.extra": (6,)}, LORA, {}, "unexplained", "extra"),
    "no magnitude": (
        PAIR, LORA | {"use_dora": True, "alpha": 2}, {}, "missing", "no m.weight"
    ),
    "magnitudes": (
        PAIR | {f"{Q}.loras.task.m.weight": (3, 1)}, LORA | {"use_dora": True, "alpha": 2}, {},
        "shape_factors", "3 magnitudes for",
    ),
    "DoRA with a scaling": (
        PAIR | {f"{Q}.loras.task.m.weight": (4, 1)}, LORA | {"use_dora": True}, {},
        "not_foldable", "alpha 8 and r 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_what_config_and_tensors_contradict_is_found(row, tmp_path):
    shapes, config, assume, code, text = ROWS[row]
    adapter = adapterhub.read(write(tmp_path / "a", shapes, config), assume=assume)
    found = [p for p in adapter.problems if p.severity == "error"]
    assert [p.code for p in found] == [code]
    assert re.search(text, found[0].message + found[0].advice)


@pytest.mark.parametrize(
    ("config", "assume", "code"),
    [
        (LORA, {"alpha": "4"}, "usage"),
        (LORA | {"alpha": "8"}, {}, "malformed"),
        (LORA | {"alpha": True}, {}, "malformed"),
    ],
)
def test_an_alpha_that_is_none_is_an_error(config, assume, code, tmp_path):
    with pytest.raises(LoratoolsError) as caught:
        adapterhub.read(write(tmp_path / "a", PAIR, config), assume=assume)
    assert caught.value.code == code


LAYER = "bert.encoder.layer.0"
DOWN, UP = "adapter_down.0.weight", "adapter_up.weight"
# Config, shapes, the method's name, its numbers, and whether a weight can take it in.
METHODS = {
    "IA3": ({"architecture": "lora", "composition_mode": "scale", "r": 1, "alpha": 1},
            {f"{Q}.loras.task.lora_B": (6, 1)}, "IA3", {}, True),
    "VeRA": (LORA | {"vera_d": 0.1, "vera_b": 0.0},
             {f"{Q}.loras.task.vera_D": (2, 2), f"{Q}.loras.task.vera_B": (4, 4),
              "bert.shared_parameters.task.lora_A": (2, 6),
              "bert.shared_parameters.task.lora_B": (4, 2)}, "VeRA", {"r": 2}, True),
    "MTL-LoRA": (LORA | {"architecture": "mtl_lora", "n_up_projection": 3,
                         "weights_sharpness": 0.05},
                 {f"{Q}.loras.task.lora_A": (2, 6), f"{Q}.loras.task.lora_B": (3, 4, 2),
                  f"{Q}.loras.task.weights": (3,), f"{Q}.loras.task.task_specific.values": (2,)},
                 "MTL-LoRA", {"n_up_projection": 3}, True),
    "gated": (LORA | {"use_gating": True}, PAIR | {f"{Q}.loras.task.gate.weight": (1, 6)},
              "gated LoRA", {"r": 2}, False),
    "bottleneck": ({"reduction_factor": 16, "mh_adapter": True},
                   {f"{LAYER}.output.adapters.task.{DOWN}": (3, 6),
                    f"{LAYER}.attention.output.adapters.task.{DOWN}": (3, 6),
                    f"{LAYER}.output.adapters.task.{UP}": (6, 3)},
                   "bottleneck", {"width": 3, "places": 2}, False),
    "legacy": ({"reduction_factor": 16},
               {f"{LAYER}.layer_text_task_adapters.task.{DOWN}": (3, 6)},
               "bottleneck", {"width": 3}, False),
    "Compacter": ({"phm_layer": True, "phm_dim": 4},
                  {f"{LAYER}.output.adapters.task.adapter_down.0.W_left": (4, 2, 1)},
                  "Compacter", {"phm_dim": 4}, False),
    "prefix": ({"architecture": "prefix_tuning", "prefix_length": 30},
               {"bert.prefix_tuning.prefix_tunings.task.self_prefix.wte.weight": (30, 6)},
               "prefix tuning", {"prefix_length": 30}, False),
    "prompt": ({"architecture": "prompt_tuning", "prompt_length": 10},
               {"bert.prompt_tuning.prompt_tunings.task.prompt_embedding.weight": (10, 6)},
               "prompt tuning", {"prompt_length": 10}, False),
    "ReFT": ({"architecture": "reft", "r": 1},
             {f"{LAYER}.reft_layer.refts.task.units.0.learned_source.weight": (1, 6)},
             "ReFT", {"r": 1}, False),
    "UniPELT": ({"architecture": "union", "configs": [LORA | {"use_gating": True},
                                                      {"architecture": "prefix_tuning"}]},
                PAIR, "union", {"of": "gated LoRA + prefix tuning"}, False),
    "of the future": ({"architecture": "newtuner"}, {f"{LAYER}.adapters.task.x": (1,)},
                      "architecture newtuner", {}, True),
}  # fmt: skip


@pytest.mark.parametrize("row", METHODS)
def test_other_methods_are_named_with_their_numbers(row, tmp_path):
    config, shapes, name, numbers, foldable = METHODS[row]
    bundle = write(tmp_path / "a", shapes, config)
    assert adapterhub.detect(bundle)
    adapter = adapterhub.read(bundle, assume={})
    assert adapter.config["method"]["name"] == name
    assert numbers.items() <= adapter.config["method"].items()
    refused = [p for p in adapter.problems if p.code in ("unknown_type", "not_foldable")]
    assert [p.code for p in refused] == (
        ["unknown_type"] if "future" in row else [] if foldable else ["not_foldable"]
    )
    assert all(name in p.message for p in refused)
    assert bool(adapter.deltas) == (foldable and "future" not in row)
    assert (adapter.runtime is None) == foldable


def test_a_fusion_is_named(tmp_path):
    key = f"{LAYER}.output.adapter_fusion_layer.a,b.query.weight"
    torch.save({key: torch.ones(2, 2)}, tmp_path / "pytorch_model_adapter_fusion.bin")
    table = {"config": {"query": True}, "version": "adapters.1.3.0", "name": "a,b"}
    (tmp_path / "adapter_fusion_config.json").write_text(json.dumps(table))
    assert adapterhub.detect(local(tmp_path))
    adapter = adapterhub.read(local(tmp_path), assume={})
    assert adapter.config["method"] == {"name": "AdapterFusion", "layers": 1}
    assert [p.code for p in adapter.problems] == ["not_foldable"]


def head(folder, shapes):
    torch.save({k: torch.ones(s) for k, s in shapes.items()}, folder / "pytorch_model_head.bin")
    table = {"config": {"head_type": "classification"}, "name": "task", "version": "adapters.1.3.0"}
    (folder / "head_config.json").write_text(json.dumps(table))


def test_a_head_comes_with_the_folder_and_is_written_again(tmp_path):
    bundle = write(tmp_path / "a", PAIR, LORA, model_name="org/base")
    head(tmp_path / "a", {"heads.task.1.weight": (3, 6), "heads.task.1.bias": (3,)})
    adapter = adapterhub.read(local(tmp_path / "a"), assume={})
    assert adapter.kinds == {"LowRank": 1, "Replace": 2}
    assert adapter.config["base_model_name_or_path"] == "org/base"
    assert [p.severity for p in adapter.problems] == ["note"]
    assert adapterhub.lost(adapter) == []
    (tmp_path / "b").mkdir()
    adapterhub.write(adapter, tmp_path / "b")
    for name, kept in (("head_config.json", {}), ("adapter_config.json", {"config": {}})):
        before, after = (json.loads((tmp_path / f / name).read_text()) for f in "ab")
        assert before | kept == after | kept
    again = adapterhub.read(local(tmp_path / "b"), assume={})
    assert again.deltas.keys() == adapter.deltas.keys()
    alone = adapterhub.read(local(tmp_path / "a" / "pytorch_adapter.bin"), assume={})
    assert alone.kinds == {"LowRank": 1}
    assert [p.severity for p in alone.problems] == ["note"]
    assert bundle.chosen is None


def test_a_head_alone_is_read(tmp_path):
    head(tmp_path, {"classifier.weight": (3, 6)})
    assert adapterhub.detect(local(tmp_path))
    adapter = adapterhub.read(local(tmp_path), assume={})
    assert adapter.kinds == {"Replace": 1}
    assert adapter.problems == ()


# ------------------------------------------------------------------------------- recognising


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        ({"config": LORA, "version": "adapters.1.3.0"}, True),
        ({"config": {}, "model_class": "BertAdapterModel"}, True),
        ({"config": LORA, "version": "1", "peft_type": "LORA"}, False),
        ({"peft_type": "LORA", "r": 2}, False),
        ({"lora_parameters": {"rank": 8}, "num_layers": 4}, False),
        ({}, False),
    ],
)
def test_the_configs_fields_decide(config, ours, tmp_path):
    write(tmp_path / "a", PAIR, None)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    assert adapterhub.detect(local(tmp_path / "a")) == ours


def test_odd_folders_are_not_taken(tmp_path):
    assert not adapterhub.detect(local(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"")
    assert not adapterhub.detect(local(tmp_path))
    assert not adapterhub.detect(local(tmp_path / "adapter_config.json"))


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        (f"{Q}.loras.task.lora_A", True),
        (f"{LAYER}.output.adapters.task.{DOWN}", True),
        ("unet.adapters.0.weight.scale", False),
        ("model.layers.0.q_proj.lora_A", False),
        ("heads.task.1.weight", False),
    ],
)
def test_one_file_is_known_by_its_keys(key, ours, tmp_path):
    torch.save({key: torch.ones(2, 2)}, tmp_path / "some.bin")
    assert adapterhub.detect(local(tmp_path / "some.bin")) == ours


def test_safetensors_win_and_the_other_is_mentioned(tmp_path):
    from safetensors.torch import save_file

    write(tmp_path / "a", PAIR, LORA)
    save_file({k: torch.ones(s) for k, s in PAIR.items()}, tmp_path / "a" / "adapter.safetensors")
    adapter = adapterhub.read(local(tmp_path / "a"), assume={})
    assert adapter.files[0] == "adapter.safetensors"
    assert [(p.code, p.severity) for p in adapter.problems] == [("unexplained", "note")]
    torch.save({"x.weight": torch.ones(2)}, tmp_path / "a" / "pytorch_adapter.bin")
    adapter = adapterhub.read(local(tmp_path / "a"), assume={})
    assert [(p.code, p.severity) for p in adapter.problems] == [("unexplained", "warning")]
    (tmp_path / "a" / "pytorch_adapter.bin").write_bytes(b"")
    adapter = adapterhub.read(local(tmp_path / "a"), assume={})
    assert [p.severity for p in adapter.problems] == ["warning"]
