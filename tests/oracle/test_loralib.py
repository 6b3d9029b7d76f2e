"""loralib's own layers: what their state dicts say, folded, is the weight that they merge."""

import loralib
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loratools.containers.bundle import local
from loratools.formats import loralib as ours
from tests.oracle.folds import fold

FRONT = "encoder.layer.0"


class Net(nn.Module):
    """One layer of each sort under the names that real ones have."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([nn.ModuleDict(layers)])})
        self.classifier = nn.Linear(4, 3)


def trained(**layers):
    """The net with random numbers where loralib begins with zeros, in training: not merged."""
    torch.manual_seed(0)
    net = Net(**layers).train()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return net


def base_of(net):
    """The weights that the layers replaced, by the names of the plain net."""
    return {
        key.replace(".conv.", "."): tensor.detach().clone().contiguous()
        for key, tensor in net.state_dict().items()
        if "lora_" not in key
    }


def folded(net, tmp_path, **assume):
    """What we fold from the file of `loralib.lora_state_dict`, and what loralib merges."""
    torch.save(loralib.lora_state_dict(net), tmp_path / "net_lora.bin")
    save_file(base_of(net), tmp_path / "base.safetensors")
    assert ours.detect(local(tmp_path / "net_lora.bin"))
    adapter = ours.read(local(tmp_path / "net_lora.bin"), assume=assume)
    assert [p.message for p in adapter.problems] == []
    return fold(adapter, tmp_path / "base.safetensors"), base_of(net.eval())


LAYERS = {
    "linear": ({"query": lambda: loralib.Linear(6, 4, r=2, lora_alpha=3)}, {}),
    "square, stored (in, out)": (
        {"c_fc": lambda: loralib.Linear(6, 6, r=2, lora_alpha=3, fan_in_fan_out=True)},
        {"fan_in_fan_out": "true"},
    ),
    "embedding": ({"wpe": lambda: loralib.Embedding(9, 4, r=2, lora_alpha=3)}, {}),
    "square embedding": (
        {"lookup": lambda: loralib.Embedding(5, 5, r=2, lora_alpha=3)},
        {"embedding": "*.lookup"},
    ),
    "query and value": (
        {
            "qkv": lambda: loralib.MergedLinear(
                6, 12, r=2, lora_alpha=3, enable_lora=[True, False, True]
            )
        },
        {"enable_lora": "true,false,true"},
    ),
    "key alone": (
        {
            "qkv": lambda: loralib.MergedLinear(
                6, 12, r=2, lora_alpha=3, enable_lora=[False, True, False]
            ),
            "proj": lambda: loralib.Linear(6, 4, r=2, lora_alpha=3),
        },
        {"enable_lora": "false,true,false"},
    ),
    "all three, unsaid": (
        {"qkv": lambda: loralib.MergedLinear(6, 12, r=2, lora_alpha=3, enable_lora=[True] * 3)},
        {},
    ),
    "fused, stored (in, out)": (
        {
            "c_attn": lambda: loralib.MergedLinear(
                6, 12, r=2, lora_alpha=3, enable_lora=[True, False, True], fan_in_fan_out=True
            )
        },
        {"enable_lora": "true,false,true", "fan_in_fan_out": "true"},
    ),
    "convolution": (
        {"conv1": lambda: loralib.Conv2d(4, 6, 3, r=2, lora_alpha=3)},
        {"conv": "*.conv1:3"},
    ),
    "convolution in groups": (
        {"conv1": lambda: loralib.Conv2d(4, 6, 3, r=1, lora_alpha=3, groups=2)},
        {"conv": "*.conv1:3:2"},
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_fold_is_what_loralib_merges(case, tmp_path):
    layers, assume = LAYERS[case]
    net = trained(**{name: make() for name, make in layers.items()})
    before = base_of(net)
    found, expected = folded(net, tmp_path, alpha="3", **assume)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)
    assert found.keys() == expected.keys()
    changed = {key for key in found if not torch.equal(found[key], before[key])}
    assert changed == {f"{FRONT}.{name}.weight" for name in layers}


def test_the_forward_of_a_fold_is_that_of_the_layer_in_training(tmp_path):
    net = trained(query=loralib.Linear(6, 4, r=2, lora_alpha=3))
    x = torch.randn(5, 6)
    layer = net.encoder["layer"][0]["query"]
    expected = layer(x)
    assert not layer.merged
    found, _ = folded(net, tmp_path, alpha="3")
    forward = nn.functional.linear(x, found[f"{FRONT}.query.weight"], found[f"{FRONT}.query.bias"])
    torch.testing.assert_close(forward, expected, atol=1e-5, rtol=1e-5)


def test_biases_and_a_head_come_along(tmp_path):
    net = trained(query=loralib.Linear(6, 4, r=2, lora_alpha=3))
    before = base_of(net)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" not in name and ("bias" in name or "classifier" in name):
                parameter.add_(1)
    state = loralib.lora_state_dict(net, bias="all")
    state["classifier.weight"] = net.classifier.weight.detach()
    torch.save(state, tmp_path / "net.pt")
    save_file(before, tmp_path / "base.safetensors")
    adapter = ours.read(local(tmp_path / "net.pt"), assume={"alpha": "3"})
    assert adapter.problems == ()
    assert adapter.kinds == {"LowRank": 1, "Replace": 3}
    found = fold(adapter, tmp_path / "base.safetensors")
    for key, tensor in base_of(net.eval()).items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("sort", ["linear", "convolution"])
def test_a_whole_state_dict_is_taken_as_the_user_says(mode, sort, tmp_path):
    layers, _ = LAYERS[sort]
    net = trained(**{name: make() for name, make in layers.items()})
    base = base_of(net)
    getattr(net, mode)()
    torch.save(net.state_dict(), tmp_path / "whole.pt")
    unsaid = ours.read(local(tmp_path / "whole.pt"), assume={"alpha": "3"})
    assert [p.code for p in unsaid.problems] == ["already_merged"]
    said = {"alpha": "3", "merged": "true" if mode == "eval" else "false"}
    adapter = ours.read(local(tmp_path / "whole.pt"), assume=said)
    assert adapter.problems == ()
    save_file(base, tmp_path / "base.safetensors")
    found = fold(adapter, tmp_path / "base.safetensors")
    for key, tensor in base_of(net.eval()).items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)
