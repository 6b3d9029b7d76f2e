"""`verify` as a command: what it asks for, where it looks for inputs, what it says."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.commands.merge import merge
from loratools.commands.verify import verify
from loratools.errors import LoratoolsError, ProofError

SIZES = "has {} bytes, the receipt says {}"
LAYERS = ["model.layers.0.q_proj", "model.layers.1.q_proj"]
CONFIG = {"model_type": "llama", "vocab_size": 12, "tie_word_embeddings": False}


def base_at(folder, *, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    names = {f"{layer}.weight": (16, 16) for layer in LAYERS}
    names |= {"model.embed_tokens.weight": (12, 16), "lm_head.weight": (12, 16)}
    folder.mkdir(parents=True)
    tensors = {n: torch.randn(s, generator=draw).to(dtype) for n, s in names.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def adapter_at(folder, *, seed=1, layers=LAYERS, **config):
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        stem = f"base_model.model.{layer}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, 16, generator=draw)
        tensors[f"{stem}.lora_B.weight"] = 0.05 * torch.randn(16, 4, generator=draw)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    table = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(table | config))
    return folder


@pytest.fixture
def made(tmp_path):
    """A base, an adapter, and the fold of both, all in one folder."""
    base, adapter = base_at(tmp_path / "base"), adapter_at(tmp_path / "adapter")
    merge([adapter], base, out=tmp_path / "out")
    return base, adapter, tmp_path / "out"


def refused(code, *args, **options):
    with pytest.raises(LoratoolsError) as caught:
        verify(*args, **options)
    assert caught.value.code == code
    return str(caught.value)


def rewrite(path, **change):
    table = json.loads(path.read_text())
    table.update(change)
    path.write_text(json.dumps(table))


# ------------------------------------------------------------------------------- the call


def test_without_receipt_base_and_adapters_are_asked_for(made):
    base, adapter, out = made
    (out / "loratools.json").unlink()
    for given in ({}, {"base": base}, {"adapters": [adapter]}):
        assert "--base" in refused("usage", out, **given)
    assert verify(out, base=base, adapters=[adapter]).ok


def test_a_receipt_leaves_no_choice(made):
    out = made[2]
    for option in ({"weights": [0.5]}, {"only": ["*"]}, {"tied": True}, {"allow": ["tied"]}):
        assert "says how it was made" in refused("usage", out, **option)


def test_unknown_requirements_are_refused(made):
    assert "hashes or replay" in refused("usage", made[2], require="magic")


def test_nothing_there(tmp_path, made):
    base, adapter, _ = made
    refused("not_found", tmp_path / "nowhere", base=base, adapters=[adapter])


def test_json_has_its_keys(made):
    base, adapter, out = made
    own = verify(out, base=base, adapters=[adapter]).as_json()
    assert own == {
        "ok": True,
        "proved": "replay",
        "checked": 4,
        "mismatches": [],
        "rule": None,
        "strength": None,
        "notes": [],
        "signed": None,
        "unit": "tensors",
    }
    tensors = load_file(out / "model.safetensors")
    tensors[f"{LAYERS[0]}.weight"][3, 4] = torch.inf
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "loratools.json").unlink()
    foreign = verify(out, base=base, adapters=[adapter]).as_json()
    json.dumps(foreign, allow_nan=False)
    assert foreign["mismatches"] == [
        {
            "tensor": f"{LAYERS[0]}.weight",
            "file": "model.safetensors",
            "what": "elements",
            "elements": 1,
            "first": [3, 4],
            "worst": None,
        }
    ]
    assert foreign["strength"].keys() == {"scaling", "standard_error"}


def test_progress_ends_at_the_whole(made):
    base, adapter, out = made
    calls = []
    verify(out, base=base, adapters=[adapter], progress=lambda *at: calls.append(at))
    assert (
        calls[-1][0]
        == calls[-1][1]
        == sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    )


# ------------------------------------------------------------------------------- the inputs


def test_inputs_are_found_beside_the_output(made, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    assert verify(made[2], require="replay").ok


def test_inputs_are_found_in_the_working_folder(made, tmp_path, monkeypatch):
    moved = shutil.move(made[2], tmp_path / "far" / "away" / "out")
    with pytest.raises(ProofError, match=r"base.*was not found"):
        verify(moved, require="replay")
    monkeypatch.chdir(tmp_path)
    assert verify(moved, require="replay").ok


def test_inputs_are_found_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base_at(tmp_path / "b" / "base")
    adapter_at(tmp_path / "a" / "adapter")
    merge(["a/adapter"], "b/base", out="o/p/out")
    assert verify("o/p/out", require="replay").ok
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    assert verify("../o/p/out").proved == "hashes"


def test_inputs_are_found_in_folders_given(made, tmp_path, monkeypatch):
    base, adapter, out = made
    new = tmp_path / "new"
    moved = shutil.move(out, tmp_path / "far" / "out")
    shutil.move(base, new / "renamed")
    shutil.move(adapter, new / "adapter")
    monkeypatch.chdir(new.parent.parent)
    assert verify(moved).proved == "hashes"
    assert verify(moved, inputs=[new, new / "renamed"], require="replay").ok
    assert verify(moved, base=new / "renamed", inputs=[new], require="replay").ok


def test_only_the_fingerprint_counts(made, tmp_path):
    _, adapter, out = made
    shutil.rmtree(adapter)
    adapter_at(adapter, seed=2)
    result = verify(out)
    assert (result.ok, result.proved) == (True, "hashes")
    assert "adapter" in result.notes[0]
    with pytest.raises(ProofError) as caught:
        verify(out, require="replay")
    assert caught.value.exit == 8
    assert "none of the adapters" in refused("input_changed", out, adapters=[adapter])
    other = base_at(tmp_path / "other", seed=5)
    assert "not the base" in refused("input_changed", out, base=other)


def test_what_cannot_be_read_is_no_input(made):
    _, adapter, out = made
    (adapter / "adapter_config.json").write_text("{")
    assert verify(out).proved == "hashes"
    refused("malformed", out, adapters=[adapter])


# ------------------------------------------------------------------------------- the hashes


def test_files_are_checked_without_any_input(made, tmp_path):
    out = made[2]
    alone = shutil.move(out, tmp_path / "far" / "out")
    assert verify(alone).checked == 4
    sizes = [(alone / "config.json").stat().st_size]
    rewrite(alone / "config.json", vocab_size=130)
    sizes.insert(0, (alone / "config.json").stat().st_size)
    (alone / "generation_config.json").write_text("{}")
    (alone / "README.md").write_text("a card")
    (alone / "pytorch_model.bin").write_bytes(b"")
    assert {(m.file, m.what) for m in verify(alone).mismatches} == {
        ("config.json", SIZES.format(*sizes)),
        ("generation_config.json", "not in the receipt"),
        ("pytorch_model.bin", "not in the receipt"),
    }


def test_a_flipped_bit_names_its_file_and_tensor(made, tmp_path):
    alone = shutil.move(made[2], tmp_path / "far" / "out")
    weights = alone / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    tensors = sorted(load_file(weights))
    raw[-1] ^= 1  # safetensors orders by dtype and name: the last byte is the last tensor's
    weights.write_bytes(raw)
    result = verify(alone)
    assert not result.ok
    assert {m.file for m in result.mismatches} == {"model.safetensors"}
    assert {m.tensor for m in result.mismatches} - {None} <= {tensors[-1]}


def test_touched_tensors_have_digests_where_files_have_none(tmp_path):
    base, adapter = base_at(tmp_path / "base"), adapter_at(tmp_path / "adapter")
    out = tmp_path / "far" / "out"
    merge([adapter], base, out=out, hash="none")
    assert verify(out).checked == 2
    tensors = load_file(out / "model.safetensors")
    tensors[f"{LAYERS[1]}.weight"][0, 0] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (one,) = [m for m in verify(out).mismatches if m.tensor]
    assert (one.tensor, one.what) == (f"{LAYERS[1]}.weight", "has another sha256")


def test_a_damaged_file_is_a_mismatch_and_no_error(made, tmp_path):
    alone = shutil.move(made[2], tmp_path / "far" / "out")
    weights = alone / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = verify(alone)
    assert [m.file for m in result.mismatches] == ["model.safetensors"]
    weights.unlink()
    assert [m.what for m in verify(alone).mismatches] == ["missing"]


def test_the_config_is_a_part_of_the_replay(made):
    base, adapter, out = made
    rewrite(out / "config.json", vocab_size=13)
    found = [m for m in verify(out).mismatches if m.file == "config.json"]
    assert [m.what for m in found][1:] == ["vocab_size is 13, expected 12"]
    (out / "loratools.json").unlink()
    (one,) = verify(out, base=base, adapters=[adapter]).mismatches
    assert (one.file, one.what) == ("config.json", "vocab_size is 13, expected 12")


# ------------------------------------------------------------------------------- hostile receipts


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"schema": 2}, "malformed"),
        ({"outputs": []}, "malformed"),
        ({"outputs": {"../base/model.safetensors": {"size": 1}}}, "hostile"),
        ({"outputs": {"/etc/passwd": {"size": 1}}}, "hostile"),
        ({"outputs": {"a\\..\\b": {"size": 1}}}, "hostile"),
        ({"targets": None}, "malformed"),
        ({"arithmetic": 5}, "malformed"),
        ({"recipe": 5}, "malformed"),
        ({"recipe": {"base": {}, "adapters": 5}}, "malformed"),
        ({"recipe": {"base": {}, "adapters": [5]}}, "malformed"),
    ],
)
def test_a_hostile_receipt_is_refused(change, code, made):
    rewrite(made[2] / "loratools.json", **change)
    refused(code, made[2])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rank", "4"),
        ("rank", 0),
        ("energy", 7),
        ("dtype", "F4"),
        ("dtype", []),
        ("ties", "loose"),
        ("only", "attention"),
        ("skip", [5]),
    ],
)
def test_options_that_no_fold_had_are_refused(option, value, made):
    path = made[2] / "loratools.json"
    recipe = json.loads(path.read_text())["recipe"]
    rewrite(path, recipe=recipe | {option: value})
    assert option in refused("malformed", made[2])


@pytest.mark.parametrize("weight", [None, "1", [], True])
def test_a_weight_that_is_no_number_is_refused(weight, made):
    path = made[2] / "loratools.json"
    recipe = json.loads(path.read_text())["recipe"]
    recipe["adapters"][0]["weight"] = weight
    rewrite(path, recipe=recipe)
    refused("malformed", made[2])


def test_a_receipt_leads_to_no_absolute_path(made, tmp_path):
    base, _, out = made
    hidden = shutil.move(base, tmp_path / "hidden" / "x")
    path = out / "loratools.json"
    recipe = json.loads(path.read_text())["recipe"]
    recipe["base"]["source"] = os.path.abspath(hidden)
    rewrite(path, recipe=recipe)
    assert verify(out).proved == "hashes"


# ------------------------------------------------------------------------------- other tools


def test_names_and_layout_of_another_tool_are_fine(made, tmp_path):
    base, adapter, out = made
    tensors = load_file(out / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(out / "config.json", other)
    renamed = {f"base_model.{n}": t for n, t in tensors.items()}
    save_file(
        renamed | {"base_model.model.rotary.inv_freq": torch.ones(3)}, other / "m.safetensors"
    )
    result = verify(other, base=base, adapters=[adapter])
    assert result.mismatches == ()
    assert result.notes == ('names: add prefix "base_model."',)


def test_missing_tensors_can_be_let_through_by_name(made, tmp_path):
    base, adapter, out = made
    tensors = load_file(out / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "loratools.json").unlink()
    (one,) = verify(out, base=base, adapters=[adapter]).mismatches
    assert (one.tensor, one.what) == ("lm_head.weight", "missing")
    result = verify(out, base=base, adapters=[adapter], allow=["missing:lm_head.*"])
    assert result.ok
    assert result.notes == ("lm_head.weight is not in the model",)
    refused("usage", out, base=base, adapters=[adapter], allow=["missing:other.*"])


def test_what_does_not_fit_is_raised(made, tmp_path):
    base, _, out = made
    (out / "loratools.json").unlink()
    lost = adapter_at(tmp_path / "lost", layers=["model.layers.7.q_proj"])
    refused("unmatched", out, base=base, adapters=[lost])
    broken = adapter_at(tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors", {"format": "pt"})
    refused("nonfinite", out, base=base, adapters=[broken])


def test_weights_stand_behind_paths_too(made, tmp_path):
    base, adapter, _ = made
    merge([adapter], base, weights=[0.5], out=tmp_path / "half")
    (tmp_path / "half" / "loratools.json").unlink()
    assert verify(tmp_path / "half", base=base, adapters=[f"{adapter}:0.5"]).ok
    whole = verify(tmp_path / "half", base=base, adapters=[adapter])
    assert {m.what for m in whole.mismatches if m.tensor} == {
        "folded with 0.5000 times its scaling"
    }
