"""Files that Olive made (tests/data/olive/make.py), more of their sort, and PEFT's left alone."""

import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from loratools.containers import flatbuffer
from loratools.containers.bundle import local
from loratools.formats import olive, onnx_adapter
from loratools.formats import peft as peft_format

SPEC = Path(__file__).parents[2] / "specs" / "formats" / "olive.md"
MADE = Path(__file__).parents[1] / "data" / "olive"
SCALING = 7 / 3


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.ModuleDict(
            {"square": torch.nn.Linear(6, 6), "wide": torch.nn.Linear(6, 4)}
        )

    def forward(self, x):
        return self.model["wide"](self.model["square"](x))


def trained(folder, targets):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=targets, r=3, lora_alpha=7, init_lora_weights=False)
    model = peft.get_peft_model(Net(), config)
    model.save_pretrained(folder)
    layers = model.base_model.model.model
    return {f"model.{t}.weight": layers[t].get_delta_weight("default") for t in targets}


def converted(folder, path, change=lambda tensors: tensors):
    """An adapter of PEFT's as Olive converts it: the first test compares."""
    tensors = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        new = name.replace("base_model.model.model", "model")
        array = value.numpy().transpose().copy()
        tensors[new] = array * np.float32(SCALING) if "lora_B" in new else array
    tensors = change(tensors)
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    elif path.suffix == ".pt":
        torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, path)
    else:
        save_file(tensors, path)
    return path


def key_table():
    text = SPEC.read_text().partition("## Keys")[2].partition("##")[0]
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|", text, re.MULTILINE)


def test_olive_makes_the_same_arrays(tmp_path):
    theirs, ours = (
        np.load(path) for path in (MADE / "made.npz", converted(MADE / "peft", tmp_path / "x.npz"))
    )
    assert set(theirs) == set(ours)
    assert all(np.array_equal(theirs[key], ours[key]) for key in theirs)


FILES = {
    "made.npz": (olive, 1e-6),
    "made.safetensors": (olive, 1e-6),
    "made.pt": (olive, 1e-6),
    "made.onnx_adapter": (onnx_adapter, 1e-6),
    "half.onnx_adapter": (onnx_adapter, 2e-3),
}


@pytest.mark.parametrize("file", FILES)
def test_what_olive_made_is_the_adapter_of_peft(file, tmp_path):
    form, apart = FILES[file]
    bundle = local(MADE / file)
    assert [f.detect(bundle) for f in (olive, onnx_adapter)] == [form is olive, form is not olive]
    adapter = form.read(bundle, assume={})
    assert adapter.problems == ()
    source = peft_format.read(local(MADE / "peft"), assume={})
    assert adapter.deltas.keys() == source.deltas.keys()
    for key, before in source.deltas.items():
        after = adapter.deltas[key]
        updates = [d.scaling * (d.b.tensor().double() @ d.a.tensor().double())
                   for d in (after, before)]  # fmt: skip
        torch.testing.assert_close(updates[0], updates[1], atol=apart, rtol=apart)
    if form is onnx_adapter and apart < 1e-5:  # what we write is what Olive writes
        onnx_adapter.write(source, tmp_path / file)
        ours, theirs = (
            flatbuffer.read(b.open(file)).leaves for b in (local(tmp_path / file), bundle)
        )
        assert ours.keys() == theirs.keys()
        for name, leaf in theirs.items():
            torch.testing.assert_close(ours[name].tensor(), leaf.tensor(), rtol=1e-6, atol=0)


def test_what_olive_quantised_is_named():
    bundle = local(MADE / "int4.npz")
    assert olive.detect(bundle)
    problems = olive.read(bundle, assume={}).problems
    assert {p.code for p in problems} == {"unknown_type"}
    assert len(problems) == 12


@pytest.mark.parametrize("suffix", olive.SUFFIXES)
def test_the_update_is_the_one_of_the_adapter_it_was_made_of(suffix, tmp_path):
    expected = trained(tmp_path / "peft", ["square", "wide"])
    file = converted(tmp_path / "peft", tmp_path / f"made{suffix}")
    assert olive.detect(local(file))
    adapter = olive.read(local(file), assume={})
    assert adapter.problems == ()
    assert (adapter.format, adapter.vocabulary, adapter.files) == ("olive", "hf", (file.name,))
    assert adapter.deltas.keys() == expected.keys()
    for key, delta in adapter.deltas.items():
        assert (delta.scaling, delta.rank) == (1, 3)
        found = delta.b.tensor() @ delta.a.tensor()
        torch.testing.assert_close(found, expected[key], atol=1e-6, rtol=1e-5)


def test_the_reader_has_the_keys_of_the_specification(tmp_path):
    shapes = {"A": (6, 2), "B": (2, 4)}
    tensors = {
        re.sub(r"\bX\b", "model.layers.0.q_proj", key): np.ones(shapes[part], np.float32)
        for key, _, part in key_table()
    }
    assert [k.removeprefix("X") for k, _, _ in key_table()] == [olive.A, olive.B]
    save_file(tensors, tmp_path / "made.safetensors")
    adapter = olive.read(local(tmp_path / "made.safetensors"), assume={})
    assert set(adapter.deltas) == {"model.layers.0.q_proj.weight"}
    assert adapter.problems == ()


def test_peft_files_are_never_taken(tmp_path):
    for targets in (["square"], ["wide"], ["square", "wide"]):
        folder = tmp_path / "-".join(targets)
        trained(folder, targets)
        assert not olive.detect(local(folder))
        assert not olive.detect(local(folder / "adapter_model.safetensors"))
        assert peft_format.detect(local(folder))


def test_square_weights_alone_prove_nothing_outside_an_npz(tmp_path):
    trained(tmp_path / "peft", ["square"])
    for suffix, taken in ((".safetensors", False), (".pt", False), (".npz", True)):
        file = converted(tmp_path / "peft", tmp_path / f"made{suffix}")
        assert olive.detect(local(file)) is taken
    assert olive.detect(local(tmp_path / "made.npz"))


def test_a_folder_with_one_npz(tmp_path):
    trained(tmp_path / "peft", ["square", "wide"])
    (tmp_path / "made").mkdir()
    converted(tmp_path / "peft", tmp_path / "made" / "adapter_weights.npz")
    assert olive.detect(local(tmp_path / "made"))
    assert len(olive.read(local(tmp_path / "made"), assume={}).deltas) == 2
    (tmp_path / "made" / "other.pt").write_bytes(b"")
    assert not olive.detect(local(tmp_path / "made"))


def test_other_tensors_are_named_and_halves_missing(tmp_path):
    trained(tmp_path / "peft", ["square", "wide"])

    def change(tensors):
        tensors.pop("model.square.lora_B.weight")
        return tensors | {"model.embed.lora_embedding_A": np.ones((9, 3), np.float32)}

    file = converted(tmp_path / "peft", tmp_path / "made.npz", change)
    adapter = olive.read(local(file), assume={})
    assert {p.code: p.target for p in adapter.problems} == {
        "unexplained": "model.embed.lora_embedding_A",
        "missing": "model.square",
    }


def test_what_is_no_tensor_is_named(tmp_path):
    factors = {"q.lora_A.weight": torch.ones(6, 2), "q.lora_B.weight": torch.ones(2, 4)}
    torch.save({**factors, "steps": 12}, tmp_path / "made.pt")
    adapter = olive.read(local(tmp_path / "made.pt"), assume={})
    assert [(p.code, p.target) for p in adapter.problems] == [("unexplained", "steps")]
