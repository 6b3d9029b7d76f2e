"""LyCORIS as judge: its files read and folded, and ours run by it, give its own forward pass."""

import copy
import logging

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from safetensors.torch import load_file
from torch import nn

from loratools import algebra
from loratools.adapter import LowRank
from loratools.containers.bundle import local
from loratools.formats import kohya

# What LyCORIS trains, and whether its own loader of files can load it: it takes every dora_scale
# for one per output.
CASES = {
    "lora": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 2}, True),
    "rank and alpha of convolutions": (
        {"algo": "locon", "linear_alpha": 1, "conv_dim": 5, "conv_alpha": 0.7}, True
    ),
    "tucker": ({"algo": "lora", "use_tucker": True, "conv_dim": 3}, True),
    "rslora": ({"algo": "lora", "rs_lora": True, "linear_alpha": 3}, True),
    "scalar": ({"algo": "lora", "use_scalar": True}, True),
    "dora": ({"algo": "lora", "dora_wd": True, "linear_alpha": 2}, True),
    "dora of tucker": ({"algo": "lora", "dora_wd": True, "use_tucker": True}, True),
    "dora by columns": ({"algo": "lora", "dora_wd": True, "wd_on_output": False}, False),
    "norm": ({"algo": "lora", "train_norm": True}, True),
    "full": ({"algo": "full"}, True),
    "full and norm": ({"algo": "full", "train_norm": True}, True),
}  # fmt: skip


class Net(nn.Module):
    """Every sort of layer that LyCORIS trains; square, tall and wide ones."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(6, 5)
        self.square = nn.Linear(5, 5, bias=False)
        self.norm = nn.LayerNorm(5)
        self.signal = nn.Conv1d(5, 4, 3, padding=1)
        self.image = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.even = nn.Conv2d(6, 6, (1, 3))
        self.point = nn.Conv2d(6, 6, 1)
        self.group = nn.GroupNorm(2, 6)

    def forward(self, x):
        line = self.norm(self.square(self.line(x)))
        wave = self.signal(line.transpose(1, 2))
        image = wave[:, :, :, None] * wave[:, :, None, :]
        return self.group(self.point(self.even(self.image(image))))


def close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


@pytest.fixture
def net():
    torch.manual_seed(3)
    return Net().eval()


@pytest.fixture
def inputs():
    torch.manual_seed(4)
    return torch.randn(2, 9, 6)


def train(net, path, options):
    """Adapt `net` in place with random numbers, save it to `path`; LyCORIS's network."""
    network = create_lycoris(net, 1.0, **options)
    network.apply_to()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter) * 0.3
    network.save_weights(path, torch.float32, {})
    return network.eval()


def fold(net, adapter):
    """A copy of `net` with the adapter's updates in its weights."""
    folded = copy.deepcopy(net)
    weights = {f"lycoris_{n.replace('.', '_', n.count('.') - 1)}": p
               for n, p in folded.named_parameters()}  # fmt: skip
    with torch.no_grad():
        for key, delta in adapter.deltas.items():
            weights[key] += algebra.materialise(delta, weights[key])
    return folded


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_lycoris_folds_to_its_forward_pass(name, net, inputs, tmp_path):
    options, _ = CASES[name]
    trained = copy.deepcopy(net)
    train(trained, tmp_path / "x.safetensors", options)
    expected = trained(inputs)
    assert (expected - net(inputs)).abs().max() > 0.01
    bundle = local(tmp_path / "x.safetensors")
    assert kohya.detect(bundle)
    adapter = kohya.read(bundle, assume={})
    assert not adapter.problems
    assert adapter.format == "lycoris"
    close(fold(net, adapter)(inputs), expected)


@pytest.mark.parametrize("name", CASES)
def test_lycoris_runs_what_we_write(name, net, inputs, tmp_path):
    options, loads = CASES[name]
    trained = copy.deepcopy(net)
    train(trained, tmp_path / "x.safetensors", options)
    adapter = kohya.read(local(tmp_path / "x.safetensors"), assume={})
    assert kohya.lost(adapter) == []
    kohya.write(adapter, tmp_path / "ours.safetensors")
    again = copy.deepcopy(net)
    if loads:
        network, _ = create_lycoris_from_weights(1.0, tmp_path / "ours.safetensors", again)
        network.apply_to()
    else:
        network = create_lycoris(again, 1.0, **options)
        network.apply_to()
        result = network.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=False)
        assert not result.unexpected_keys
    assert isinstance(network, LycorisNetwork)
    assert len(network.loras) >= 6
    close(again.eval()(inputs), trained(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_come_back_with_their_bytes(dtype, net, tmp_path):
    network = train(net, tmp_path / "x.safetensors", CASES["lora"][0])
    network.save_weights(tmp_path / "x.safetensors", dtype, {})
    kohya.write(
        kohya.read(local(tmp_path / "x.safetensors"), assume={}), tmp_path / "ours.safetensors"
    )
    theirs, ours = (load_file(tmp_path / n) for n in ("x.safetensors", "ours.safetensors"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        same = tensor.to(torch.float32) if key.endswith(".alpha") else tensor
        assert torch.equal(ours[key], same)
        assert ours[key].dtype == same.dtype


def test_a_tucker_module_is_written_as_a_pair_of_its_rank(net, tmp_path):
    train(net, tmp_path / "x.safetensors", CASES["tucker"][0])
    adapter = kohya.read(local(tmp_path / "x.safetensors"), assume={})
    pair = adapter.deltas["lycoris_image.weight"]
    assert isinstance(pair, LowRank)
    assert pair.a.shape == (3, 4, 3, 3)
    assert pair.rank == 3


def test_column_norms_are_found_tile_by_tile(net, tmp_path):
    """One magnitude per input of a convolution, over out and kernel, in tiles of two rows."""
    train(copy.deepcopy(net), tmp_path / "x.safetensors", CASES["dora by columns"][0])
    adapter = kohya.read(local(tmp_path / "x.safetensors"), assume={})
    delta = adapter.deltas["lycoris_image.weight"]
    whole = net.image.weight.detach().double()
    rows = algebra.matrix(whole)
    tiles = [(at, rows[at : at + 2]) for at in range(0, len(rows), 2)]
    ready = algebra.prepare(delta, lambda: iter(tiles))
    folded = torch.cat([algebra.apply(ready, w0, at) for at, w0 in tiles])
    torch.testing.assert_close(folded.reshape(whole.shape) - whole,
                               algebra.materialise(delta, whole))  # fmt: skip
