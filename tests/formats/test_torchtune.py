"""torchtune's container: keys, configs, refusals; torchtune itself is in tests/oracle."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.adapter import Adapter, Dense, Leaf, LowRank, Renormed, Replace
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.formats import torchtune
from loratools.formats.evening import evened

SPEC = Path(__file__).parents[2] / "specs" / "formats" / "torchtune.md"
Q, W2 = "layers.0.attn.q_proj", "layers.0.mlp.w2"
CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA"}
PAIR = {f"{Q}.lora_a.weight": (2, 6), f"{Q}.lora_b.weight": (4, 2)}
HEADINGS = "Files Recognise Keys Shapes Scaling Kinds Cannot-say Variants Sources".split()


def key_table():
    text = SPEC.read_text().partition("## Keys")[2].partition("##")[0]
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|", text, re.MULTILINE)


@pytest.mark.parametrize(("key", "module", "part"), key_table())
@pytest.mark.parametrize("front", ["", "base_model.model.", "module.", "_orig_mod."])
@pytest.mark.parametrize("path", [Q, W2, "output", "decoder.layers.3.fusion_layer.attn.k_proj"])
def test_the_reader_has_the_keys_of_the_specification(key, module, part, front, path):
    assert torchtune.part_of(front + key.replace("X", path)) == (path, part)


def test_the_specification_has_every_part():
    assert {part for _, _, part in key_table()} == set(torchtune.PARTS.values())
    headings = re.findall(r"^## (.+)$", SPEC.read_text(), re.MULTILINE)
    assert [h.replace(" ", "-") for h in headings] == HEADINGS


@pytest.mark.parametrize(
    "key", ["lora_a.weight", ".magnitude", f"{Q}.lora_A.weight", f"{Q}.weight"]
)
def test_other_keys_are_none(key):
    assert torchtune.part_of(key) is None


def write(folder, shapes=PAIR, config=CONFIG, name="adapter_model.pt", **beside):
    folder.mkdir(exist_ok=True)
    torch.save({k: torch.ones(s) for k, s in shapes.items()}, folder / name)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    for file, text in beside.items():
        stem, _, suffix = file.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(text)
    return folder


RECIPE = """
model:
  _component_: torchtune.models.llama3.lora_llama3_8b
  lora_rank: 2
  lora_alpha: 4
"""
ROWS = {
    "no config": (PAIR, None, {}, "alpha_missing", "--assume alpha="),
    "rank": (PAIR, CONFIG | {"r": 8}, {}, "config_conflict", "r=8, lora_a has 2 rows"),
    "no b": ({f"{Q}.lora_a.weight": (2, 6)}, CONFIG, {}, "missing", "lora_a without lora_b"),
    "shapes": (PAIR | {f"{Q}.lora_b.weight": (4, 3)}, CONFIG, {}, "shape_factors", r"\(4, 3\)"),
    "a stranger": (PAIR | {"layers.0.sa_norm.scale": (4,)}, CONFIG, {}, "unexplained", "sa_norm"),
    "magnitudes": (PAIR | {f"{Q}.magnitude": (5,)}, CONFIG, {}, "shape_factors", "5 magnitudes"),
    "a recipe that says otherwise": (
        PAIR, CONFIG, {"torchtune_config_yaml": RECIPE.replace("alpha: 4", "alpha: 8")},
        "config_conflict", "lora_alpha=4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_contradictions_are_named(row, tmp_path):
    shapes, config, beside, code, message = ROWS[row]
    adapter = torchtune.read(local(write(tmp_path, shapes, config, **beside)), assume={})
    found = [p for p in adapter.problems if p.code == code and p.severity == "error"]
    assert found
    assert re.search(message, found[0].message)


def test_alpha_comes_from_the_recipe_where_there_is_no_config(tmp_path):
    write(tmp_path, config=None, torchtune_config_yaml=RECIPE)
    adapter = torchtune.read(local(tmp_path), assume={})
    assert adapter.problems == ()
    assert adapter.deltas[f"{Q}.weight"].scaling == 2
    assert adapter.files == ("adapter_model.pt", "torchtune_config.yaml")


def test_alpha_is_assumed_where_nothing_says_it(tmp_path):
    adapter = torchtune.read(local(write(tmp_path, config=None)), assume={"alpha": "6"})
    assert (adapter.problems, adapter.deltas[f"{Q}.weight"].scaling) == ((), 3)
    write(tmp_path)
    with pytest.raises(LoratoolsError, match="says 4"):
        torchtune.read(local(tmp_path), assume={"alpha": "6"})


def test_the_bases_counts_are_kept(tmp_path):
    base = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 16}
    adapter = torchtune.read(local(write(tmp_path, config_json=json.dumps(base))), assume={})
    assert adapter.config["base_config"]["head_dim"] == 4


def test_the_last_epoch_of_an_old_folder_is_read(tmp_path):
    for name in ("adapter_2.pt", "adapter_10.pt", "adapter_x.pt"):
        write(tmp_path, name=name)
    assert torchtune.detect(local(tmp_path))
    assert torchtune.read(local(tmp_path), assume={}).files[0] == "adapter_10.pt"


def test_two_spellings_of_one_key_are_refused(tmp_path):
    write(tmp_path, PAIR | {f"base_model.model.{Q}.lora_a.weight": (2, 6)})
    with pytest.raises(LoratoolsError) as refused:
        torchtune.read(local(tmp_path), assume={})
    assert refused.value.code == "duplicate"


@pytest.mark.parametrize("text", ["<html>", "", "PK", "version https://git-lfs"])
def test_what_is_no_torch_file_is_not_ours(text, tmp_path):
    (tmp_path / "adapter_model.pt").write_text(text)
    assert not torchtune.detect(local(tmp_path))
    assert not torchtune.detect(local(tmp_path / "adapter_model.pt"))


def test_pefts_keys_are_not_ours(tmp_path):
    peft = {f"base_model.model.{Q}.lora_A.weight": (2, 6)}
    assert not torchtune.detect(local(write(tmp_path, peft)))


# ------------------------------------------------------------------------------- writing


def leaf(*shape):
    return Leaf.of("x", torch.randn(*shape))


def lora(scaling=2.0, into=6, out=4, rank=2):
    return LowRank(leaf(rank, into), leaf(out, rank), scaling)


LOST = {
    "a bias": ({f"{Q}.bias": Dense(leaf(4))}, "Dense"),
    "a full tensor": ({f"{Q}.weight": Replace(leaf(4, 6))}, "Replace"),
    "an embedding": ({"tok_embeddings.weight": lora()}, "adapts q_proj"),
    "a norm": ({"layers.0.sa_norm.weight": lora()}, "adapts q_proj"),
    "a convolution": ({f"{Q}.weight": LowRank(leaf(2, 6, 3), leaf(4, 2, 1), 1.0)}, "convolution"),
    "dora by columns": ({f"{Q}.weight": Renormed(lora(), leaf(6), "in")}, "of columns"),
    "some dora": (
        {f"{Q}.weight": Renormed(lora(), leaf(4)), f"{W2}.weight": lora()}, "no magnitude"
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", LOST)
def test_what_cannot_be_held_is_named(row, tmp_path):
    deltas, message = LOST[row]
    adapter = Adapter({**deltas, "layers.0.attn.v_proj.weight": Renormed(lora(), leaf(4))}
                      if "dora" in row else {**deltas, "layers.0.attn.v_proj.weight": lora()},
                      vocabulary="torchtune")  # fmt: skip
    problems = torchtune.lost(adapter)
    assert [p.code for p in problems] == ["loss"]
    assert message in problems[0].message
    assert problems[0].target in deltas
    torchtune.write(adapter, tmp_path)
    kept = torchtune.read(local(tmp_path), assume={}).deltas
    assert set(kept) == set(adapter.deltas) - {problems[0].target}


def test_magnitudes_are_written(tmp_path):
    adapter = Adapter({f"{Q}.weight": Renormed(lora(), leaf(4))}, config=CONFIG)
    torchtune.write(adapter, tmp_path)
    again = torchtune.read(local(tmp_path), assume={})
    assert again.problems == ()
    old, new = (a.deltas[f"{Q}.weight"] for a in (adapter, again))
    assert torch.equal(old.magnitude.tensor(), new.magnitude.tensor())
    assert again.config["use_dora"] is True


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.floats(0.01, 60.0), st.booleans()), min_size=1, max_size=5
    )
)
def test_every_update_is_the_same_at_one_rank_and_alpha(rows):
    torch.manual_seed(1)
    pairs = {}
    for i, (rank, scaling, whole) in enumerate(rows):
        alpha = float(round(scaling * rank)) or 1.0
        said = alpha / rank if whole else scaling
        pairs[str(i)] = LowRank(leaf(rank, 3), leaf(2, rank), said, alpha if whole else None)
    even = evened(pairs)
    assert even.rank == max(rank for rank, _, _ in rows)
    for name, pair in pairs.items():
        a, b = even.factors[name]
        ours = even.alpha / even.rank * b.tensor().double() @ a.tensor().double()
        theirs = pair.scaling * pair.b.tensor().double() @ pair.a.tensor().double()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_pairs_that_agree_keep_their_factors():
    pairs = {str(i): LowRank(leaf(4, 3), leaf(2, 4), 0.3 / 4, 0.3) for i in range(3)}
    even = evened(pairs)
    assert (even.rank, even.alpha) == (4, 0.3)
    assert all(even.factors[name] == (p.a, p.b) for name, p in pairs.items())


def test_an_update_of_scaling_zero_stays_nothing():
    even = evened({"x": LowRank(leaf(2, 3), leaf(2, 2), 0.0, 0.0), "y": lora(0.5)})
    assert not even.factors["x"][1].tensor().any()
    assert even.alpha == 1.0
    assert evened({"x": LowRank(leaf(2, 3), leaf(2, 2), 0.0, 0.0)}).alpha == 0.0
