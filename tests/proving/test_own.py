"""Our own outputs, made again: all pass, and another machine's arithmetic may differ as it may."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import formats, receipt
from loratools.adapter import Dense, Leaf, LowRank
from loratools.commands.convert import convert
from loratools.commands.merge import merge
from loratools.commands.verify import verify
from loratools.containers.bundle import Bundle
from loratools.plan import Place, Plan, Target, Term
from loratools.proving.own import replay_fold, replay_merge
from loratools.weights.base import Base, Shard
from loratools.weights.layout import plan_shards
from tests.proving import models

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
QV = ["q_proj", "v_proj"]
ALL, SOME = {"target_modules": "all-linear"}, {"target_modules": QV, "seed": 5}
DORA = {"target_modules": QV, "use_dora": True}
HEAD = {"target_modules": ["q_proj", "lm_head"]}
WORDS = {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"], "words": 99}
BERT = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
GPT2 = {"target_modules": ["c_attn", "c_proj", "wte"], "use_dora": True}

FOLDS = {
    "one": ("llama", F32, [ALL], {}),
    "bfloat16": ("llama", BF16, [ALL], {}),
    "float64": ("llama", torch.float64, [ALL], {}),
    "weights": ("llama", F16, [ALL, SOME], {"weights": [0.7, -0.3]}),
    "mixed-kinds": ("llama", BF16, [DORA, SOME], {"weights": [0.7, 0.3]}),
    "rank": ("llama", F32, [ALL, SOME], {"weights": [1, 1], "rank": 4}),
    "energy": ("llama", BF16, [ALL], {"energy": 0.5}),
    "narrower": ("llama", F32, [ALL], {"dtype": "bf16"}),
    "wider": ("llama", BF16, [ALL], {"dtype": "fp32"}),
    "only": ("llama", F32, [ALL], {"only": ["attention"], "skip": ["*.0.*"]}),
    "tied": ("tied", F32, [HEAD], {"tied": True}),
    "untied": ("tied", BF16, [HEAD], {"untie": True}),
    "words": ("llama", F32, [WORDS], {}),
    "head": ("bert", F32, [BERT], {}),
    "conv1d": ("gpt2", F32, [GPT2], {"tied": True}),
    "threads": ("llama", F32, [ALL], {"threads": 1}),
    "without-hashes": ("llama", BF16, [ALL], {"hash": "none"}),
}


@pytest.mark.parametrize("case", FOLDS)
def test_a_fold_of_ours_is_proved_with_and_without_its_receipt(case, base, adapter, tmp_path):
    name, dtype, options, how = FOLDS[case]
    over, adapters = base(name, dtype), [adapter(name, **o) for o in options]
    out = tmp_path / "out"
    merge(adapters, over, out=out, **how)
    result = verify(out, base=over, adapters=adapters, require="replay")
    assert result.mismatches == ()
    assert (result.ok, result.proved, result.notes) == (True, "replay", ())
    assert result.checked == len(load_file(out / "model.safetensors"))
    hashes = verify(out)
    assert (hashes.ok, hashes.proved) == (True, "hashes")
    if not how.keys() & {"rank", "energy", "dtype", "hash", "threads"}:
        (out / receipt.NAME).unlink()
        judged = verify(out, base=over, adapters=adapters, **how)
        assert judged.mismatches == ()
        assert judged.rule == "once from float64"


def test_a_continued_fold_is_proved(adapter, made, tmp_path):
    whole, over = made(models.save_base, "llama"), tmp_path / "base"
    models.load("llama", whole).save_pretrained(over, max_shard_size="60KB")
    source, out = adapter("llama", **ALL), tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([source], over, out=out, threads=1, progress=stop)
    assert merge([source], over, out=out, threads=1).continued
    assert verify(out, base=over, adapters=[source], require="replay").ok


def test_a_single_file_is_proved_with_its_receipt(base, adapter, tmp_path):
    over, source = base("llama") / "model.safetensors", adapter("llama", **ALL)
    out = tmp_path / "model.safetensors"
    merge([source], over, out=out)
    (tmp_path / "other.safetensors").write_bytes(b"of somebody else")
    assert verify(out, base=over, adapters=[source], require="replay").ok


MERGES = {
    "sum": ([ALL, SOME], {"weights": [0.7, 0.3]}),
    "rank": ([ALL, SOME], {"weights": [0.7, 0.3], "rank": 5}),
    "narrow": ([ALL, SOME], {"weights": [0.7, 0.3], "rank": 5, "dtype": "bf16"}),
    "weighted": ([ALL], {"weights": [0.3]}),
    "head": ([WORDS, WORDS | {"seed": 6}], {"weights": [0.5, 0.5]}),
}


@pytest.mark.parametrize("case", MERGES)
def test_a_merged_adapter_is_proved(case, adapter, tmp_path):
    options, how = MERGES[case]
    adapters, out = [adapter("llama", **o) for o in options], tmp_path / "out"
    merge(adapters, out=out, **how)
    result = verify(out, adapters=adapters, require="replay")
    assert result.mismatches == ()
    assert result.proved == "replay"
    assert result.checked == (14 if ALL in options else 6)
    table = json.loads((out / receipt.NAME).read_text())
    table["arithmetic"]["torch"] = "1.0"
    (out / receipt.NAME).write_text(json.dumps(table))
    elsewhere = verify(out, adapters=adapters, require="replay")
    assert elsewhere.ok
    assert "another arithmetic" in elsewhere.notes[0]


@pytest.mark.parametrize("same_class", [True, False])
def test_a_defect_in_a_merged_adapter_is_found(same_class, adapter, tmp_path):
    adapters, out = [adapter("llama", **o) for o in (ALL, SOME)], tmp_path / "out"
    merge(adapters, out=out, weights=[0.7, 0.3], rank=5)
    if not same_class:
        table = json.loads((out / receipt.NAME).read_text())
        table["arithmetic"]["machine"] = "another"
        (out / receipt.NAME).write_text(json.dumps(table))
    weights = out / "adapter_model.safetensors"
    tensors, key = load_file(weights), "model.layers.0.mlp.up_proj"
    tensors[f"base_model.model.{key}.lora_A.weight"][2, 3] *= 1.001
    save_file(tensors, weights, {"format": "pt"})
    result = verify(out, adapters=adapters, require="replay")
    assert {m.tensor for m in result.mismatches} == {None, f"{key}.weight"}
    assert result.mismatches[0].file == "adapter_model.safetensors"


@pytest.mark.parametrize("same_class", [True, False])
def test_a_changed_scaling_of_a_merged_adapter_is_found(same_class, adapter, tmp_path):
    adapters, out = [adapter("llama", **o) for o in (ALL, SOME)], tmp_path / "out"
    merge(adapters, out=out, weights=[0.7, 0.3])
    changes = {"adapter_config.json": {"lora_alpha": 17}}
    if not same_class:
        changes[receipt.NAME] = {"arithmetic": {"device": "cuda"}}
    for file, change in changes.items():
        table = json.loads((out / file).read_text()) | change
        (out / file).write_text(json.dumps(table))
    result = verify(out, adapters=adapters, require="replay")
    assert len({m.tensor for m in result.mismatches}) > 1
    assert "adapter_config.json" in {m.file for m in result.mismatches}


def test_a_converted_adapter_is_proved(adapter, tmp_path):
    for number, (options, how) in enumerate(
        [(ALL, {"rank": 3}), (DORA, {}), (ALL, {"dtype": "bf16"})]
    ):
        source, out = adapter("llama", **options), tmp_path / str(number)
        convert(source, out=out, **how)
        assert verify(out, adapters=[source], require="replay").mismatches == ()


# ------------------------------------------------------------------------------- arithmetic


def fold_of(written: float, w0: float, delta: float) -> tuple[Plan, Base]:
    """A plan over one 1x1 weight, and a model that holds `written`."""
    leaf = Leaf.of("a.weight", torch.tensor([[w0]], dtype=F32))
    out = Leaf.of("a.weight", torch.tensor([[written]], dtype=F32))
    pair = LowRank(
        Leaf.of("A", torch.tensor([[delta]], dtype=torch.float64)),
        Leaf.of("B", torch.tensor([[1.0]], dtype=torch.float64)),
        1.0,
    )
    bases = []
    for one in (leaf, out):
        bundle = Bundle("memory", (), lambda name: pytest.fail(name))
        bases.append(
            Base(
                bundle, (Shard("m.safetensors", {"a.weight": one}, {}, ""),), {"a.weight": one}, {}
            )
        )
    target = Target("a.weight", (1, 1), leaf, (Term(0, "a.weight", pair, Place("a.weight")),))
    return Plan(bases[0], (), {"a.weight": target}, (), (1,), (1,), ()), bases[1]


def compared(written: float, w0: float, delta: float, tolerance: int = 0) -> tuple[int, int]:
    plan, out = fold_of(written, w0, delta)
    shards = plan_shards(plan.base, {"a.weight": (1, 1)})
    replayed = replay_fold(plan, shards, out, tolerance=tolerance)
    assert replayed.checked == 1
    return sum(m.elements for m in replayed.mismatches), replayed.near


STEP = 2.0**-23  # of float32 above 1


@pytest.mark.parametrize(
    ("written", "delta", "expected"),
    [
        (1.0, STEP / 2, (0, 0)),  # the middle, and 1 is even
        (1 + STEP, STEP / 2, (0, 1)),  # a sum larger by an ulp of float64 is rounded up
        (1 + 2 * STEP, STEP / 2, (1, 0)),
        (1 - STEP / 2, STEP / 2, (1, 0)),
        (1 + STEP, STEP / 2 + 1e-12, (0, 0)),
        (1.0, STEP / 2 + 1e-12, (1, 0)),  # too far from the middle for float64
    ],
)
def test_only_the_last_bits_of_float64_are_left_open(written, delta, expected):
    assert compared(written, 1.0, delta) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [(1 + STEP, (0, 1)), (1 - STEP / 2, (0, 1)), (1 + 2 * STEP, (1, 0)), (1.0, (0, 0))],
)
def test_another_class_may_differ_by_one_unit_in_the_last_place(written, expected):
    assert compared(written, 1.0, STEP / 8, tolerance=1) == expected


def test_one_unit_is_one_across_zero_and_powers_of_two():
    tiny = 2.0**-149
    for first, second in ((0.0, tiny), (-0.0, tiny), (tiny, 0.0), (2.0, 2 - STEP)):
        assert compared(second, first, 0.0, tolerance=1)[0] == 0
    assert compared(tiny, -tiny, 0.0, tolerance=1)[0] == 1
    assert compared(-1.0, 1.0, 0.0, tolerance=1)[0] == 1


def test_kinds_are_told_apart(adapter):
    one = formats.read(adapter("llama", **ALL))
    key = next(iter(one.deltas))
    other = dict(one.deltas) | {key: Dense(Leaf.of("d", torch.ones(64, 64)))}
    without = {k: d for k, d in one.deltas.items() if k != key}
    assert replay_merge(one, one).mismatches == []
    assert [m.tensor for m in replay_merge(one, replace(one, deltas=other)).mismatches] == [key]
    assert replay_merge(one, replace(one, deltas=without)).mismatches[0].what == "missing"
    assert replay_merge(replace(one, deltas=without), one).mismatches[0].what == "not in the merge"
