"""State dicts of loralib: keys as the specification has them, what is asked, what is refused."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.adapter import Dense, LowRank, Replace
from loratools.containers.bundle import local
from loratools.errors import LoratoolsError
from loratools.formats import loralib

SPEC = Path(__file__).parents[2] / "specs" / "formats" / "loralib.md"
X = "model.layers.0.query"


def keyed(path, shapes, **extras):
    torch.manual_seed(0)
    torch.save({key: torch.randn(shape) for key, shape in shapes.items()} | extras, path)
    return local(path)


PAIR = {f"{X}.lora_A": (2, 6), f"{X}.lora_B": (4, 2)}


def key_table():
    """(key, address, kind) of every row under "Keys"."""
    text = SPEC.read_text().partition("## Keys")[2].partition("##")[0]
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|", text, re.MULTILINE)


@pytest.mark.parametrize("front", ["", "module.", "_orig_mod.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize(("key", "address", "kind"), key_table())
def test_the_reader_has_the_keys_of_the_specification(front, key, address, kind, tmp_path):
    given = re.sub(r"\bX\b", X, key).replace("Y", "classifier").replace("P", "weight")
    target = re.sub(r"\bX\b", X, address).replace("Y", "classifier").replace("P", "weight")
    inside = {f"{X}.conv.weight": (4, 2, 3, 3), f"{X}.lora_A": (6, 6), f"{X}.lora_B": (12, 6)}
    shapes = dict(inside if ".conv." in key else PAIR)
    shapes.setdefault(given, (4,))
    bundle = keyed(tmp_path / "x.pt", {front + k: s for k, s in shapes.items()})
    assert loralib.detect(bundle)
    adapter = loralib.read(bundle, assume={"alpha": "4", "merged": "false"})
    assert [p for p in adapter.problems if p.severity == "error"] == []
    delta = adapter.deltas[target]
    if kind == "Dense":
        assert isinstance(delta, Replace)
        delta = delta.then
    assert type(delta).__name__ == kind
    assert {"LowRank": 2.0, "Dense": 2.0}.get(kind, 0) == getattr(delta, "scaling", 0)


def test_the_specification_has_both_factors():
    described = " ".join(key for key, _, _ in key_table())
    assert all(part in described for part in loralib.PARTS)


# What is wrong or unsaid, the assumptions, the code, and what message and remedy name.
ROWS = {
    "no alpha": (PAIR, {}, "alpha_missing", "--assume alpha=16"),
    "no B": ({f"{X}.lora_A": (2, 6)}, {"alpha": "1"}, "missing", "lora_A without lora_B"),
    "no A": ({f"{X}.lora_B": (4, 2)}, {"alpha": "1"}, "missing", "lora_B without lora_A"),
    "no common rank": (
        PAIR | {f"{X}.lora_B": (4, 5)}, {"alpha": "1"}, "shape_factors", r"\(4, 5\)"
    ),
    "empty": (PAIR | {f"{X}.lora_B": (4, 0)}, {"alpha": "1"}, "shape_factors", "sharded"),
    "flat": (PAIR | {f"{X}.lora_A": (12,)}, {"alpha": "1"}, "shape_factors", "sharded"),
    "two groups of three": (
        {f"{X}.lora_A": (4, 6), f"{X}.lora_B": (8, 2)},
        {"alpha": "1"}, "missing", "--assume enable_lora=true,false,true",
    ),
    "another count of groups": (
        {f"{X}.lora_A": (4, 6), f"{X}.lora_B": (8, 2)},
        {"alpha": "1", "enable_lora": "true,true,true"}, "config_conflict", "2 groups",
    ),
    "unequal groups": (
        {f"{X}.lora_A": (6, 6), f"{X}.lora_B": (8, 2)},
        {"alpha": "1"}, "shape_factors", "no 3 equal groups",
    ),
    "a convolution of unknown kernel": (
        {f"{X}.lora_A": (6, 6), f"{X}.lora_B": (12, 6), f"{X}.conv.bias": (4,)},
        {"alpha": "1"}, "missing", "--assume conv=",
    ),
    "a kernel that does not fit": (
        {f"{X}.lora_A": (6, 6), f"{X}.lora_B": (12, 6)},
        {"alpha": "1", "conv": f"{X}:5"}, "shape_factors", "no update of a convolution",
    ),
    "a weight merged or not": (
        PAIR | {f"{X}.weight": (4, 6)}, {"alpha": "1"}, "already_merged", "merged=true"
    ),
    "another leaf of lora": (
        PAIR | {f"{X}.lora_E": (2, 1)}, {"alpha": "1"}, "unexplained", "lora_E"
    ),
    "alpha 0": (PAIR, {"alpha": "0"}, "no_effect", "every alpha"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_what_is_wrong_or_unsaid_is_found(row, tmp_path):
    shapes, assume, code, text = ROWS[row]
    adapter = loralib.read(keyed(tmp_path / "x.bin", shapes), assume=assume)
    found = [p for p in adapter.problems if p.severity == "error"]
    assert [p.code for p in found] == [code]
    assert re.search(text, found[0].message + found[0].advice)


@pytest.mark.parametrize(
    "assume",
    [
        {"alpha": "many"}, {"alpha": "inf"}, {"enable_lora": "yes"}, {"enable_lora": "false,false"},
        {"fan_in_fan_out": "1"}, {"merged": "true,true"}, {"conv": f"{X}:0"}, {"conv": f"{X}:a"},
        {"conv": f"{X}:1:2:3"}, {"conv": X},
    ],
    ids=str,
)  # fmt: skip
def test_an_assumption_that_says_nothing_is_a_usage_error(assume, tmp_path):
    with pytest.raises(LoratoolsError) as caught:
        loralib.read(keyed(tmp_path / "x.bin", PAIR), assume={"alpha": "1"} | assume)
    assert caught.value.exit == 2


def test_a_key_twice_without_its_wrapper_is_malformed(tmp_path):
    bundle = keyed(tmp_path / "x.bin", PAIR | {f"module.{X}.lora_A": (2, 6)})
    with pytest.raises(LoratoolsError) as caught:
        loralib.read(bundle, assume={"alpha": "1"})
    assert caught.value.code == "duplicate"


def test_integers_are_no_factors(tmp_path):
    state = {f"{X}.lora_A": torch.ones(2, 6, dtype=torch.int32), f"{X}.lora_B": torch.ones(4, 2)}
    torch.save(state, tmp_path / "x.bin")
    with pytest.raises(LoratoolsError) as caught:
        loralib.read(local(tmp_path / "x.bin"), assume={"alpha": "1"})
    assert caught.value.code == "dtype_unusable"


def test_what_is_no_tensor_is_a_note(tmp_path):
    adapter = loralib.read(
        keyed(tmp_path / "x.bin", PAIR, epoch=3, args={"lr": 1e-4}), assume={"alpha": "1"}
    )
    assert [(p.code, p.severity, p.target) for p in adapter.problems] == [
        ("unexplained", "note", "epoch"), ("unexplained", "note", "args")
    ]  # fmt: skip
    assert adapter.kinds == {"LowRank": 1}


def test_a_name_that_no_module_has_is_refused(tmp_path):
    shapes = {"a\nb.lora_A": (2, 6), "a\nb.lora_B": (4, 2)}
    adapter = loralib.read(keyed(tmp_path / "x.bin", shapes), assume={"alpha": "1"})
    assert [p.code for p in adapter.problems] == ["malformed"]


@pytest.mark.parametrize(
    "keys",
    [
        ["base_model.model.x.lora_A", "base_model.model.x.lora_B"],
        ["x.lora_A", "x.lora_B", "x.lora_E"],
        ["x.loras.task.lora_A", "x.loras.task.lora_B"],
        ["x.parametrizations.weight.0.lora_A", "x.parametrizations.weight.0.lora_B"],
        ["transformer.h.0.attn.qkv.lora_A", "transformer.h.0.attn.qkv.lora_B"],
        ["x.lora_A.weight", "x.lora_B.weight"],
        ["lora_A", "lora_B"],
        ["x.weight"],
    ],
    ids=lambda keys: keys[-1],
)
def test_the_files_of_others_are_left_to_them(keys, tmp_path):
    assert not loralib.detect(keyed(tmp_path / "x.bin", dict.fromkeys(keys, (2, 2))))


def test_a_folder_is_read_by_its_only_file_of_weights(tmp_path):
    keyed(tmp_path / "lora.bin", PAIR)
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    assert loralib.detect(local(tmp_path))
    assert loralib.read(local(tmp_path), assume={"alpha": "1"}).files == ("lora.bin",)
    keyed(tmp_path / "other.bin", PAIR)
    assert not loralib.detect(local(tmp_path))


def test_safetensors_win_and_the_other_is_mentioned(tmp_path):
    bundle = keyed(tmp_path / "lora.bin", PAIR)
    save_file(torch.load(tmp_path / "lora.bin"), tmp_path / "lora.safetensors")
    adapter = loralib.read(local(tmp_path), assume={"alpha": "1"})
    assert adapter.files == ("lora.safetensors",)
    assert [(p.code, p.severity) for p in adapter.problems] == [("unexplained", "note")]
    assert loralib.read(bundle, assume={"alpha": "1"}).problems == ()


def test_what_cannot_be_read_is_not_taken(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"PK\3\4 and no more")
    assert not loralib.detect(local(tmp_path / "x.bin"))
    (tmp_path / "x.txt").write_bytes(b"")
    assert not loralib.detect(local(tmp_path / "x.txt"))


def test_groups_are_lowered_to_one_pair_of_the_same_numbers(tmp_path):
    shapes = {f"{X}.lora_A": (4, 6), f"{X}.lora_B": (8, 2)}
    bundle = keyed(tmp_path / "x.bin", shapes)
    said = {"alpha": "3", "enable_lora": "false,true,true"}
    pair = loralib.read(bundle, assume=said).deltas[f"{X}.weight"]
    assert isinstance(pair, LowRank)
    assert (pair.rank, pair.scaling, pair.b.shape) == (4, 1.5, (12, 4))
    state = torch.load(tmp_path / "x.bin")
    b = pair.b.tensor()
    assert torch.equal(b[4:8, :2], state[f"{X}.lora_B"][:4])
    assert torch.equal(b[8:, 2:], state[f"{X}.lora_B"][4:])
    assert b.count_nonzero() == 16
    assert torch.equal(pair.a.tensor(), state[f"{X}.lora_A"])


def test_an_embedding_is_stored_the_other_way_round(tmp_path):
    shapes = {"model.embed_tokens.lora_A": (2, 9), "model.embed_tokens.lora_B": (4, 2)}
    adapter = loralib.read(keyed(tmp_path / "x.bin", shapes), assume={"alpha": "1"})
    assert adapter.transposed == {"model.embed_tokens.weight"}
    assert isinstance(adapter.deltas["model.embed_tokens.weight"], LowRank)


def test_a_convolution_is_a_full_difference(tmp_path):
    shapes = {f"{X}.lora_A": (6, 6), f"{X}.lora_B": (12, 6), f"{X}.conv.bias": (4,)}
    bundle = keyed(tmp_path / "x.bin", shapes)
    adapter = loralib.read(bundle, assume={"alpha": "3", "conv": "*.query:3"})
    assert adapter.problems == ()
    delta = adapter.deltas[f"{X}.weight"]
    assert isinstance(delta, Dense)
    assert (delta.diff.shape, delta.scaling) == ((4, 2, 3, 3), 1.5)
    assert isinstance(adapter.deltas[f"{X}.bias"], Replace)
