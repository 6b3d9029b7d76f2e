"""What we write, PEFT loads and computes the same with; reading and writing loses nothing."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loratools import convert
from tests.oracle import models
from tests.oracle.cases import CASES, GROWN

BOTH = CASES | {f"grown-{name}": case for name, case in GROWN.items()}


def contents(folder):
    """Every tensor of an adapter by key, with its dtype, and its config."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors, json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("case", BOTH)
def test_what_is_read_and_written_is_the_same_adapter(case, base, adapter, tmp_path):
    name, options = BOTH[case]
    change = models.grown if case.startswith("grown") else models.nothing
    made = adapter(name, change=change, **options)
    [result] = convert(made, out=tmp_path / "written", hash="none")
    assert result.lossless, result.lost
    tensors, config = contents(result.output)
    source, said = contents(made)
    copies = {k for k in source if ".original_module." in k or ".modules_to_save." in k}
    assert tensors.keys() == source.keys() - copies
    for key, tensor in tensors.items():
        assert tensor.dtype == source[key].dtype
        assert torch.equal(tensor, source[key]), key
    assert config == said
    found = models.outputs(name, models.served(name, base(name), result.output, change))
    expected = models.outputs(name, models.served(name, base(name), made, change))
    assert torch.equal(found, expected)


def test_fields_that_nobody_knows_and_metadata_are_kept(base, adapter, tmp_path):
    made = shutil.copytree(adapter("llama", target_modules=["q_proj"]), tmp_path / "made")
    tensors, config = contents(made)
    more = {"use_newlora": None, "zzz": {"b": 1, "a": [1.5, None]}, "aaa": "é"}
    (made / "adapter_config.json").write_text(json.dumps(more | config))
    save_file(tensors, made / "adapter_model.safetensors", {"format": "pt", "trained_by": "me"})
    [result] = convert(made, out=tmp_path / "written", hash="none")
    assert list(contents(result.output)[1].items()) == list((more | config).items())
    with safe_open(result.output / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["trained_by"] == "me"


@pytest.mark.parametrize("case", ["embedding", "lora-bias", "head-saved", "net-attention"])
def test_a_lower_rank_loads_and_its_error_is_the_one_told(case, base, adapter, tmp_path):
    name, options = CASES[case]
    made = adapter(name, **options)
    [result] = convert(made, out=tmp_path / "written", rank=2, dtype="fp64", hash="none")
    models.served(name, base(name), result.output)
    before = models.updates(name, base(name), made)
    after = models.updates(name, base(name), result.output)
    matrices = {k for k, t in before.items() if t.ndim > 1}
    apart = models.distance({k: after[k] for k in matrices}, {k: before[k] for k in matrices})
    assert result.truncation_error == pytest.approx(apart, rel=1e-6)
    if "lm_head" not in options.get("modules_to_save", ()):
        assert result.difference == pytest.approx(models.distance(after, before), rel=1e-6)
