"""Runtime adapters from headers: what a file contradicts is said, and no valid one is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from loratools import LoratoolsError, check, convert, formats, merge
from loratools.adapter import Leaf
from loratools.cli import main
from loratools.runtime import described, layer_of, torn, turned

AT = "bert.encoder.layer.0.output.adapters.task"
DOWN, UP = f"{AT}.adapter_down.0.weight", f"{AT}.adapter_up.weight"
PLAIN = {DOWN: (2, 6), UP: (6, 2)}
BOTTLENECK = {"reduction_factor": 3, "non_linearity": "relu"}
PHM = {"phm_layer": True, "phm_dim": 2, "reduction_factor": 3}
COMPACT = {
    f"{AT}.adapter_down.0.W": (2, 3, 1), f"{AT}.adapter_up.W": (2, 1, 3),
    "bert.shared_parameters.task.phm_rule": (2, 2, 2),
}  # fmt: skip
P = "model.prefix_tuning.prefix_tunings.task.self_prefix"
FLAT = {"architecture": "prefix_tuning", "flat": True, "prefix_length": 2}
CHAIN = {
    f"{P}.wte.weight": (2, 6), f"{P}.control_trans.0.weight": (3, 6),
    f"{P}.control_trans.0.bias": (3,), f"{P}.control_trans.2.weight": (8, 3),
    f"{P}.control_trans.2.bias": (8,),
}  # fmt: skip
DEEP = {"architecture": "prefix_tuning", "prefix_length": 2, "non_linearity": "tanh"}
PROMPT = "bert.prompt_tuning.prompt_tunings.task.prompt_embedding.weight"
REFT = "m.layers.0.reft_layer.refts.task.units.0"
L = "m.layers.0.q_proj.loras.task"
IA3 = {"architecture": "lora", "composition_mode": "scale", "alpha": 1, "r": 1}
VERA = {"architecture": "lora", "alpha": 2, "r": 2, "vera_d": 0.1, "vera_b": 0.1}
SHARED = {"m.shared_parameters.task.lora_A": (2, 6), "m.shared_parameters.task.lora_B": (4, 2)}
DIAGONALS = {f"{L}.vera_D": (2, 2), f"{L}.vera_B": (4, 4)}
MTL = {"architecture": "mtl_lora", "alpha": 2, "r": 2, "weights_sharpness": 0.1}
TASK = {
    f"{L}.lora_A": (2, 6), f"{L}.lora_B": (3, 4, 2), f"{L}.weights": (3,),
    f"{L}.task_specific.values": (2,),
}  # fmt: skip
FUSED = "h.0.attn.c_attn.loras.task"


def adapterhub(folder, shapes, config, **more):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    torch.save({k: torch.randn(s) for k, s in shapes.items()}, folder / "pytorch_adapter.bin")
    table = {"config": config, "version": "adapters.1.3.0", "name": "task", "model_type": "bert"}
    (folder / "adapter_config.json").write_text(json.dumps(table | more))
    return folder


def without(shapes, *keys):
    return {k: v for k, v in shapes.items() if k not in keys}


ROWS = {
    "no up": (without(PLAIN, UP), BOTTLENECK, "missing", "adapter_down without adapter_up"),
    "no down": (without(PLAIN, DOWN), BOTTLENECK, "missing", "adapter_up without adapter_down"),
    "unlike": (PLAIN | {UP: (5, 2)}, BOTTLENECK, "shape_factors", r"down is \(2, 6\)"),
    "factor": (PLAIN, {"reduction_factor": 2}, "config_conflict", "reduced by 2 is 3"),
    "another leaf": (PLAIN | {f"{AT}.extra": (1,)}, BOTTLENECK, "unexplained", "extra"),
    "another key": (PLAIN | {"bert.pooler.weight": (6, 6)}, BOTTLENECK, "unexplained", "pooler"),
    "no rule": (
        without(COMPACT, "bert.shared_parameters.task.phm_rule"), PHM, "missing", "no weights or no"
    ),
    "rule": (
        COMPACT | {"bert.shared_parameters.task.phm_rule": (3, 3, 3)}, PHM, "missing", "of its own"
    ),
    "no length": ({f"{P}.control_trans": (16,)}, FLAT | {"prefix_length": None},
                  "config_conflict", "no .* virtual tokens"),
    "length": ({f"{P}.control_trans": (15,)}, FLAT, "config_conflict", "15 numbers are no 2"),
    "no layer": (without(CHAIN, f"{P}.control_trans.2.bias"), DEEP, "missing", "2.bias"),
    "chain": (CHAIN | {f"{P}.control_trans.2.weight": (8, 4)}, DEEP, "shape_factors", "no chain"),
    "rows": (CHAIN, DEEP | {"prefix_length": 5}, "config_conflict", "prefix_length=5"),
    "prompt": ({PROMPT: (3, 6)}, {"architecture": "prompt_tuning", "prompt_length": 4},
               "config_conflict", "prompt_length=4"),
    "flat prompt": ({PROMPT: (18,)}, {"architecture": "prompt_tuning"}, "shape_factors", "18"),
    "ReFT": ({f"{REFT}.learned_source.weight": (2, 6)}, {"architecture": "reft", "r": 1},
             "config_conflict", "r=1"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_what_a_runtime_adapter_contradicts_is_found(row, tmp_path):
    shapes, config, code, text = ROWS[row]
    adapter = formats.read(adapterhub(tmp_path / "a", shapes, config))
    found = [p for p in adapter.problems if p.severity == "error" and p.code != "not_foldable"]
    assert {p.code for p in found} == {code}
    assert re.search(text, found[0].message)


FOLDED = {
    "IA3": ({f"{L}.lora_B": (4, 2)}, IA3, {}, "shape_factors", r"expected \(out, 1\)"),
    "IA3, fused": ({f"{FUSED}.lora_B": (8, 1)}, IA3, {}, "config_conflict", "no equal groups"),
    "VeRA, alone": (DIAGONALS, VERA, {}, "missing", "shared matrices"),
    "VeRA, half": (SHARED | {f"{L}.vera_D": (2, 2)}, VERA, {}, "missing", "no vera_B"),
    "VeRA, unlike": (
        SHARED | DIAGONALS | {f"{L}.vera_B": (3, 3)}, VERA, {}, "shape_factors", "do not multiply"
    ),
    "VeRA, fused": (
        SHARED | {f"{FUSED}.vera_D": (2, 2), f"{FUSED}.vera_B": (4, 4)}, VERA, {}, "unknown_type",
        "cannot run VeRA",
    ),
    "VeRA, no alpha": (SHARED | DIAGONALS, VERA | {"alpha": None}, {}, "alpha_missing", "alpha="),
    "MTL, no weights": (without(TASK, f"{L}.weights"), MTL, {}, "missing", "no weights"),
    "MTL, unlike": (TASK | {f"{L}.weights": (2,)}, MTL, {}, "shape_factors", "do not multiply"),
    "MTL, no sharpness": (
        TASK, MTL | {"weights_sharpness": None}, {}, "missing", "weights_sharpness=0.05"
    ),
    "MTL, gated": (TASK | {f"{L}.gate.weight": (1, 6)}, MTL, {}, "not_foldable", "gate"),
    "MTL, tasks": (
        TASK | {k.replace(".task.", ".other."): s for k, s in TASK.items()}, MTL, {}, "missing",
        "assume task=other",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", FOLDED)
def test_what_relatives_of_lora_contradict_is_found(row, tmp_path):
    shapes, config, assume, code, text = FOLDED[row]
    adapter = formats.read(adapterhub(tmp_path / "a", shapes, config), assume=assume)
    found = [p for p in adapter.problems if p.severity == "error"]
    assert [p.code for p in found] == [code]
    assert re.search(text, found[0].message + found[0].advice)


def test_a_config_may_name_all_heads_of_a_prefix_of_some(tmp_path):
    said = {"num_layers": 2, "token_dim": 12, "num_attention_heads": 4, "num_virtual_tokens": 2}
    config = {"peft_type": "PREFIX_TUNING", **said}
    for width, fine in ((2 * 2 * 12, True), (2 * 2 * 3, True), (2 * 2 * 6, True), (20, False)):
        adapter = formats.read(of_peft(tmp_path / str(width), {E: (2, width)}, config))
        assert [p.code for p in adapter.problems] == ["config_conflict"] * (not fine) + [
            "not_foldable"
        ]


def test_one_task_of_several_is_chosen(tmp_path):
    both = TASK | {k.replace(".task.", ".other."): s for k, s in TASK.items()}
    folder = adapterhub(tmp_path / "a", both, MTL)
    adapters = [formats.read(folder, assume={"task": task}) for task in ("task", "other")]
    one, other = (a.deltas["m.layers.0.q_proj.weight"].a.tensor() for a in adapters)
    assert not torch.equal(one, other)
    assert [p for a in adapters for p in a.problems] == []
    with pytest.raises(LoratoolsError, match="the file has other, task"):
        formats.read(folder, assume={"task": "third"})


def test_a_file_of_a_bottleneck_alone_is_read(tmp_path):
    save_file({k: torch.ones(s) for k, s in PLAIN.items()}, tmp_path / "some.safetensors")
    adapter = formats.read(tmp_path / "some.safetensors")
    assert described(adapter.runtime) == {
        "method": "bottleneck", "variant": "Pfeiffer", "layers": 1, "places": 1, "width": 2,
        "reduction_factor": 3.0, "parameters": 24,
    }  # fmt: skip


def test_integers_are_no_numbers_of_a_runtime_adapter(tmp_path):
    folder = adapterhub(tmp_path / "a", PLAIN, BOTTLENECK)
    torch.save({k: torch.ones(s, dtype=torch.int32) for k, s in PLAIN.items()},
               folder / "pytorch_adapter.bin")  # fmt: skip
    with pytest.raises(LoratoolsError) as caught:
        formats.read(folder)
    assert caught.value.code == "dtype_unusable"


# ------------------------------------------------------------------------------- PEFT's files


def of_peft(folder, shapes, config):
    folder.mkdir(exist_ok=True)
    save_file({k: torch.ones(s) for k, s in shapes.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


E = "prompt_embeddings"
A = "base_model.model.model.layers.0.self_attn"
CPT = {"peft_type": "CPT", "cpt_token_ids": [1, 2]}
MPT = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 2}
GATED = {f"{A}.adaption_prompt": (1, 4, 6), f"{A}.adaption_gate": (1,)}
PEFT = {
    "tokens": ({E: (3, 6)}, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
               "config_conflict", "num_virtual_tokens=4"),
    "width": ({E: (3, 6)}, {"peft_type": "PROMPT_TUNING", "token_dim": 8}, "config_conflict",
              "token_dim=8"),
    "shape": ({E: (18,)}, {"peft_type": "P_TUNING"}, "shape_factors", "18"),
    "layers": ({E: (3, 24)}, {"peft_type": "PREFIX_TUNING", "num_layers": 3, "token_dim": 6},
               "config_conflict", "which is 36 wide"),
    "ids": ({E: (3, 6)}, CPT, "config_conflict", "names 2 tokens"),
    "no rows": ({E: (3, 6), "prefix_task_cols": (2, 3, 1)}, MPT, "missing", "prefix_task_rows"),
    "rows": ({E: (3, 6), "prefix_task_cols": (2, 3, 1), "prefix_task_rows": (2, 2, 6)}, MPT,
             "shape_factors", "do not multiply"),
    "tasks": ({E: (3, 6), "prefix_task_cols": (3, 3, 1), "prefix_task_rows": (3, 1, 6)}, MPT,
              "config_conflict", "num_tasks=2"),
    "gate": (without(GATED, f"{A}.adaption_gate"), {"peft_type": "ADAPTION_PROMPT"}, "missing",
             "adaption_gate"),
    "adapter_len": (GATED, {"peft_type": "ADAPTION_PROMPT", "adapter_len": 3}, "config_conflict",
                    "adapter_len=3"),
    "another": ({E: (3, 6), "base_model.some.weight": (1,)}, {"peft_type": "PROMPT_TUNING"},
                "unexplained", "some.weight"),
}  # fmt: skip


@pytest.mark.parametrize("row", PEFT)
def test_what_pefts_files_contradict_is_found(row, tmp_path):
    shapes, config, code, text = PEFT[row]
    adapter = formats.read(of_peft(tmp_path / "a", shapes, config))
    found = [p for p in adapter.problems if p.code != "not_foldable"]
    assert [p.code for p in found] == [code]
    assert re.search(text, found[0].message)


# ------------------------------------------------------------------------------- commands


def test_copies_of_a_prefix_that_differ_are_refused(tmp_path):
    shapes = {f"{P}.control_trans": (16,), f"m.layers.0.self_attn.{P[6:]}.control_trans": (16,)}
    folder = adapterhub(tmp_path / "a", shapes, FLAT)
    adapter = formats.read(folder)
    assert torn(adapter.runtime.tensors) is not None
    with pytest.raises(LoratoolsError, match="and differs from it"):
        convert([folder], out=tmp_path / "out")


def test_bottlenecks_of_other_settings_have_no_average(tmp_path):
    some = [
        adapterhub(tmp_path / "a", PLAIN, BOTTLENECK),
        adapterhub(tmp_path / "b", PLAIN, BOTTLENECK | {"non_linearity": "gelu"}),
        adapterhub(tmp_path / "c", {DOWN: (3, 6), UP: (6, 3)}, {"non_linearity": "relu"}),
        adapterhub(tmp_path / "d", PLAIN, {"non_linearity": "relu"}),
    ]
    with pytest.raises(LoratoolsError, match="differ in non_linearity: relu, gelu"):
        merge(some[:2], weights="mean", out=tmp_path / "out")
    with pytest.raises(LoratoolsError, match="an average needs equal shapes"):
        merge(some[2:], weights="mean", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_compacters_are_averaged_as_the_bottlenecks_that_they_are(tmp_path):
    some = [adapterhub(tmp_path / "a", COMPACT, PHM)] * 2
    result = merge(some, weights=[0.5, 0.5], out=tmp_path / "out")
    assert len(result.notes) == 2
    expected = formats.read(some[0]).runtime.plain
    found = formats.read(tmp_path / "out").runtime.tensors
    assert expected.keys() == found.keys()
    for key, leaf in expected.items():
        torch.testing.assert_close(found[key].tensor(), leaf.tensor())


def test_a_number_that_is_none_is_found(tmp_path):
    folder = adapterhub(tmp_path / "a", PLAIN, BOTTLENECK)
    torch.save({k: torch.full(s, torch.nan) for k, s in PLAIN.items()},
               folder / "pytorch_adapter.bin")  # fmt: skip
    result = check([folder], data=True)
    assert {p.code for p in result.problems} == {"nonfinite"}
    assert check([folder]).ok


def test_turning_keys_back_is_turning_them_by_as_much_the_other_way():
    torch.manual_seed(0)
    rows = torch.randn(3, 2 * 2 * 2 * 4, dtype=torch.float64)
    there = turned(Leaf.of("", rows), 2, 4, 10000.0, 5).tensor()
    assert (there - rows).abs().max() > 0.1
    assert torch.equal(there.view(3, 2, 2, 8)[:, :, 1], rows.view(3, 2, 2, 8)[:, :, 1])
    back = turned(Leaf.of("", there), 2, 4, 10000.0, -5).tensor()
    torch.testing.assert_close(back, rows, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("module", "layer"),
    [("bert.encoder.layer.0.output", "bert.encoder.layer.0"), ("h.11", "h.11"), ("0.x", "0"),
     ("model.embed", None), ("a." * 100 + "1", None)],
)  # fmt: skip
def test_layers_are_seen_in_paths(module, layer):
    assert layer_of(module) == layer


def test_it_is_said_on_the_screen(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["inspect", str(adapterhub(tmp_path / "a", PLAIN, BOTTLENECK))])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "runtime bottleneck: variant Pfeiffer, layers 1, places 1, width 2, reduction factor 3, "
        "non linearity relu kinds none"
    ) in said
    assert "foldable no" in said
