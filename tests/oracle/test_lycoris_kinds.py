"""LyCORIS as judge of its methods beyond LoRA: its forward pass is what we fold and write."""

import copy
import json
import logging
import math

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris_from_weights
from lycoris.config import PRESET
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file
from torch import nn

from loratools import algebra, kinds
from loratools.adapter import Chained, Hadamard, Kronecker, Renormed, Rotated, Scaled
from loratools.containers.bundle import local
from loratools.formats import kohya

LAYERS = ("line", "wide", "square", "wave", "image", "group", "even", "point")
COLUMNS = {"weight_decompose": True, "wd_on_out": False}
FACTORED = {"factor": 4, "lora_dim": 1, "conv_lora_dim": 1, "decompose_both": True}
# What LyCORIS trains; the layers that the method (as LyCORIS has it) does not work on; and whether
# its own loader of files can load it.
CASES = {
    "loha": ({"alpha": 1}, (), True),
    "loha, rank 3, tucker": ({"use_tucker": True, "conv_lora_dim": 3}, (), True),
    "loha, scalar": ({"use_scalar": True}, (), True),
    "loha, rslora": ({"rs_lora": True, "alpha": 3}, (), True),
    "loha, dora": ({"weight_decompose": True}, (), True),
    "loha, dora by columns": (COLUMNS, (), False),
    "lokr": ({"factor": 2, "lora_dim": 1}, (), False),
    "lokr, whole": ({"factor": 2, "full_matrix": True, "alpha": 7}, (), False),
    "lokr, both in factors": (FACTORED, (), False),
    "lokr, tucker": ({"factor": 2, "use_tucker": True, "conv_lora_dim": 1}, (), False),
    "lokr, unbalanced": ({"unbalanced_factorization": True, "lora_dim": 1}, (), False),
    "lokr, scalar": ({"use_scalar": True, "lora_dim": 1}, (), False),
    "lokr, dora": ({"weight_decompose": True, "factor": 2, "lora_dim": 1}, (), False),
    "lokr, dora by columns": ({**COLUMNS, "factor": 2}, (), False),
    "glora": ({"alpha": 1}, ("group",), True),
    "glora, tucker": ({"use_tucker": True}, ("group",), True),
    "glora, scalar": ({"use_scalar": True}, ("group",), True),
    "ia3": ({}, (), False),
    "ia3, input": ({"train_on_input": True}, ("group",), False),
    "diag-oft": ({}, (), False),
    "diag-oft, constraint": ({"constraint": 0.03}, (), False),
    "diag-oft, constraint not met": ({"constraint": 9.0}, (), False),
    "diag-oft, rescale": ({"rescaled": True}, (), False),
    "boft": ({}, (), False),
    "boft, constraint": ({"constraint": 0.03}, (), False),
    "boft, rescale": ({"rescaled": True}, (), False),
    "tlora": ({"alpha": 3}, ("wave", "image", "group", "even"), True),
}
KINDS = {"loha": Hadamard, "lokr": Kronecker, "glora": Chained, "tlora": Chained, "ia3": Scaled,
         "diag-oft": Rotated, "boft": Rotated}  # fmt: skip


def layer(name):
    """One of the layers that LyCORIS trains, with its input; `group` has two groups."""
    torch.manual_seed(1)
    match name:
        case "line":
            return nn.Linear(6, 16), torch.randn(3, 6)
        case "wide":
            return nn.Linear(24, 8), torch.randn(3, 24)
        case "square":
            return nn.Linear(8, 8, bias=False), torch.randn(3, 8)
        case "wave":
            return nn.Conv1d(6, 8, 3, padding=1), torch.randn(2, 6, 9)
        case "image":
            return nn.Conv2d(6, 8, 3, stride=2, padding=1), torch.randn(2, 6, 7, 7)
        case "group":
            return nn.Conv2d(8, 16, 3, groups=2), torch.randn(2, 8, 5, 5)
        case "even":
            return nn.Conv2d(8, 8, (1, 3)), torch.randn(2, 8, 5, 5)
        case "point":
            return nn.Conv2d(6, 8, 1), torch.randn(2, 6, 5, 5)


class Net(nn.Module):
    """One layer under the name x."""

    def __init__(self, inner):
        super().__init__()
        self.x = inner

    def forward(self, x):
        return self.x(x)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def network_of(net, options):
    """LyCORIS's network for `net`; its create_lycoris leaves some options out in silence."""
    LycorisNetwork.apply_preset(PRESET["full"])
    chosen = {"lora_dim": 2, "conv_lora_dim": 2, "alpha": 1, **options}
    return LycorisNetwork(net, conv_alpha=chosen["alpha"], **chosen)


def options_of(case):
    return {"network_module": case.split(",")[0], **CASES[case][0]}


def train(net, path, options, metadata=None):
    """Adapt `net` in place with random numbers; saved to `path`."""
    network = network_of(net, options)
    network.apply_to()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter) * 0.3
    network.save_weights(path, torch.float32, metadata or {})
    return network.eval()


def fold(weight, delta):
    """The weight changed in tiles as small as the delta allows, in float64."""
    rows = algebra.matrix(weight.detach().double())
    step = algebra.block(delta) or len(rows)
    tiles = [(at, rows[at : at + step]) for at in range(0, len(rows), step)]
    ready = algebra.prepare(delta, lambda: iter(tiles))
    return torch.cat([algebra.apply(ready, w0, at) for at, w0 in tiles]).reshape(weight.shape)


def folded(net, adapter):
    """A copy of `net` with the adapter in its weight."""
    new = copy.deepcopy(net)
    (delta,) = (d for k, d in adapter.deltas.items() if k.endswith(".weight"))
    with torch.no_grad():
        new.x.weight.copy_(fold(new.x.weight, delta))
    return new


def close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def layers(case):
    """The layers that LyCORIS itself runs with these options."""
    return [name for name in LAYERS if name not in CASES[case][1]]


RUNS = [(case, name) for case in CASES for name in layers(case)]
FAILS = [(case, name) for case in CASES for name in CASES[case][1]]


def trained(case, name, path):
    """An untrained layer, its input, and what LyCORIS's own gives."""
    inner, x = layer(name)
    net = Net(inner).eval()
    adapted = copy.deepcopy(net)
    train(adapted, path, options_of(case))
    with torch.no_grad():
        return net, x, adapted(x)


def read(path, **assume):
    bundle = local(path)
    assert kohya.detect(bundle)
    return kohya.read(bundle, assume=assume)


@pytest.mark.parametrize(("case", "name"), RUNS)
def test_what_is_folded_gives_its_forward_pass(case, name, tmp_path):
    path = tmp_path / "x.safetensors"
    net, x, expected = trained(case, name, path)
    assert (expected - net(x)).abs().max() > 1e-3
    adapter = read(path)
    assert not adapter.problems
    assert adapter.format == "lycoris"
    (delta,) = adapter.deltas.values()
    inner = delta.delta if isinstance(delta, Renormed) else delta
    assert isinstance(inner, KINDS[case.split(",")[0]])
    close(folded(net, adapter)(x), expected)
    # What is written is the same file again, whatever alpha's dtype was.
    assert kohya.lost(adapter) == []
    kohya.write(adapter, tmp_path / "ours.safetensors")
    theirs, ours = load_file(path), load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], theirs[key].to(ours[key].dtype)) for key in theirs)
    if CASES[case][2]:
        again = copy.deepcopy(net)
        network, _ = create_lycoris_from_weights(1.0, tmp_path / "ours.safetensors", again)
        network.apply_to()
        assert len(network.loras) == 1
        with torch.no_grad():
            close(again(x), expected)


@pytest.mark.parametrize(("case", "name"), FAILS)
def test_where_lycoris_itself_fails(case, name, tmp_path):
    """Kernels that T-LoRA leaves out; input channels that groups do not have."""
    with pytest.raises(RuntimeError):
        trained(case, name, tmp_path / "x.safetensors")


@pytest.mark.parametrize("module", [LohaModule, LokrModule])
def test_its_own_merge_scales_twice(module):
    """Why its forward pass is the judge: at a scale of 1/2 its merge gives half of it."""
    torch.manual_seed(2)
    line = nn.Linear(8, 8, bias=False)
    made = module("x", line, lora_dim=1, alpha=0.5, factor=2).requires_grad_(False)
    for parameter in made.parameters():
        parameter += torch.randn_like(parameter)
    merged = made.get_merged_weight()[0] - made.org_weight
    close(merged, made.get_weight((8, 8)) / 2)


RANK_STABLE = {
    "glora": {"network_module": "glora", "alpha": 1},
    "lokr, whole": {"network_module": "lokr", "full_matrix": True, "factor": 2, "lora_dim": 3},
}


@pytest.mark.parametrize("case", RANK_STABLE)
def test_where_rank_stable_training_has_another_scale_than_reading(case, tmp_path):
    """GLoRA stores its plain alpha; a LoKr of two whole factors is read at a scale of 1."""
    inner, x = layer("line")
    net = Net(inner).eval()
    mine, path = copy.deepcopy(net), tmp_path / "x.safetensors"
    said = {"ss_network_args": json.dumps({"rs_lora": "True"})}
    train(mine, path, {"rs_lora": True, **RANK_STABLE[case]}, said)
    (note,) = read(path).problems
    assert (note.code, note.severity) == ("scaling_unusual", "note")
    fixed = read(path, lycoris_rs_lora="fix")
    assert not fixed.problems
    with torch.no_grad():
        close(folded(net, fixed)(x), mine(x))
    if case == "glora":  # the LoKr loader does not know which factor is which
        again = copy.deepcopy(net)
        create_lycoris_from_weights(1.0, path, again)[0].apply_to()
        with torch.no_grad():
            close(folded(net, read(path))(x), again(x))


@pytest.mark.parametrize("name", ["line", "wide"])
def test_rank_stable_lokr_stores_an_alpha_that_fits(name, tmp_path):
    inner, x = layer(name)
    net = Net(inner).eval()
    mine, path = copy.deepcopy(net), tmp_path / "x.safetensors"
    train(mine, path, {"network_module": "lokr", "rs_lora": True, "factor": 2, "alpha": 3})
    adapter = read(path)
    (delta,) = adapter.deltas.values()
    assert delta.scaling == pytest.approx(3 / math.sqrt(2))
    with torch.no_grad():
        close(folded(net, adapter)(x), mine(x))


def test_tlora_of_random_matrices_is_refused(tmp_path):
    inner, _ = layer("line")
    said = {"ss_network_args": json.dumps({"use_data_init": "False"})}
    options = {"network_module": "tlora", "use_data_init": False}
    train(Net(inner), tmp_path / "x.safetensors", options, said)
    (problem,) = read(tmp_path / "x.safetensors").problems
    assert problem.code == "residual_base"


@pytest.mark.parametrize("start", ["principal", "last", "middle"])
def test_tlora_from_any_singular_values(start, tmp_path):
    inner, x = layer("wide")
    net = Net(inner).eval()
    mine = copy.deepcopy(net)
    said = {"ss_network_args": json.dumps({"sig_type": start})}
    train(mine, tmp_path / "x.safetensors", {"network_module": "tlora", "sig_type": start}, said)
    adapter = read(tmp_path / "x.safetensors")
    with torch.no_grad():
        close(folded(net, adapter)(x), mine(x))


EXACT = ["loha", "loha, rank 3, tucker", "lokr", "lokr, both in factors", "lokr, tucker",
         "lokr, unbalanced"]  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_factors_are_exact(case, tmp_path):
    """The low-rank form against the dense update in float64, and LyCORIS's own."""
    torch.manual_seed(0)
    seen = 0
    for inner in (nn.Linear(36, 24), nn.Conv2d(24, 36, 3), nn.Conv1d(24, 30, 3)):
        network = network_of(Net(inner), options_of(case))
        network.apply_to()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += torch.randn_like(parameter)
        network.save_weights(tmp_path / "x.safetensors", torch.float32, {})
        (delta,) = read(tmp_path / "x.safetensors").deltas.values()
        (module,) = network.loras
        theirs = module.double().get_weight(module.shape).detach()
        dense = algebra.materialise(delta).reshape(theirs.shape)
        torch.testing.assert_close(dense, theirs, rtol=1e-6, atol=1e-6)
        pair = kinds.low_rank(delta)
        if pair is None:
            continue
        seen += 1
        assert pair.rank < min(dense.shape[0], math.prod(dense.shape[1:]))
        assert (algebra.materialise(pair).reshape(dense.shape) - dense).abs().max() < 1e-12
    assert seen
