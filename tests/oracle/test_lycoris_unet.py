"""A whole U-Net trained by LyCORIS: folded, and its LoHa and LoKr as diffusers' plain LoRA."""

import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from lycoris import LycorisNetwork
from lycoris.config import PRESET
from peft import PeftModel
from safetensors.torch import load_file

import loratools
from tests.oracle.image_models import judged, make, outputs
from tests.refusing import refused

METHODS = {
    "loha": {"lora_dim": 2, "conv_lora_dim": 2},
    "lokr": {"lora_dim": 1, "conv_lora_dim": 1, "factor": 2},
    "lokr, both whole": {"full_matrix": True, "factor": 2, "alpha": 3},
    "loha, tucker": {"lora_dim": 2, "conv_lora_dim": 2, "use_tucker": True},
    "loha, dora": {"lora_dim": 2, "conv_lora_dim": 2, "weight_decompose": True},
    "glora": {"lora_dim": 2, "conv_lora_dim": 2},
    "ia3": {},
    "diag-oft": {"lora_dim": 2, "conv_lora_dim": 2},
    "boft": {"lora_dim": 2, "conv_lora_dim": 2},
}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def trained(method, path):
    """A U-Net with a method of LyCORIS on all of its attention and convolutions; its file."""
    model = make("sd1")
    LycorisNetwork.apply_preset({**PRESET["full"], "target_name": [".*attn.*", ".*conv1", ".*ff.*"],
                                 "target_module": []})  # fmt: skip
    network = LycorisNetwork(
        model,
        network_module=method.split(",")[0],
        **{"alpha": 1, "conv_alpha": 1} | METHODS[method],
    )
    network.apply_to()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    network.eval().save_weights(path, torch.float32, {})
    return model, len(network.loras)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    make("sd1").save_pretrained(folder)
    return folder


def close(x, y):
    torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_folded_gives_its_forward_pass(method, base, tmp_path):
    model, count = trained(method, tmp_path / "x.safetensors")
    assert count > 10
    result = loratools.merge([tmp_path / "x.safetensors"], base, out=tmp_path / "folded")
    assert not [p for p in result.problems if p.severity == "error"]
    folded = UNet2DConditionModel.from_pretrained(tmp_path / "folded").eval()
    expected = outputs("sd1", model)
    assert (expected - outputs("sd1", make("sd1"))).abs().max() > 1e-3
    close(outputs("sd1", folded), expected)


@pytest.mark.parametrize("method", ["loha", "lokr", "lokr, both whole", "loha, tucker"])
def test_as_peft_s_own(method, tmp_path):
    """The same tensors: PEFT has both methods, and divides by r where LyCORIS does not."""
    model, count = trained(method, tmp_path / "x.safetensors")
    (result,) = loratools.convert(tmp_path / "x.safetensors", to="peft", out=tmp_path / "y")
    assert not result.lost
    theirs, ours = load_file(tmp_path / "x.safetensors"), load_file(
        tmp_path / "y" / "adapter_model.safetensors")  # fmt: skip
    assert len(ours) == len([k for k in theirs if not k.endswith(".alpha")])
    again = PeftModel.from_pretrained(make("sd1"), tmp_path / "y").eval()
    close(outputs("sd1", again), outputs("sd1", model))
    assert count == result.targets


@pytest.mark.parametrize("method", ["loha", "lokr", "loha, tucker", "loha, dora"])
def test_as_diffusers_lora(method, base, tmp_path):
    model, count = trained(method, tmp_path / "x.safetensors")
    (result,) = loratools.convert(
        tmp_path / "x.safetensors", to="diffusers", out=tmp_path / "y.safetensors", base=base
    )
    name = "LoHa" if method.startswith("loha") else "LoKr"
    assert any(n.startswith(f"{name} -> LoRA, exact, rank ") for n in result.notes)
    assert sum(k.endswith("lora_A.weight") for k in load_file(tmp_path / "y.safetensors")) == count
    again = make("sd1")
    judged("sd1", again).load_lora_weights(tmp_path, weight_name="y.safetensors")
    close(outputs("sd1", again), outputs("sd1", model))


def test_a_kernel_that_the_file_does_not_say_needs_the_base(tmp_path):
    trained("loha", tmp_path / "x.safetensors")
    message = refused(
        "loss", loratools.convert, tmp_path / "x.safetensors", to="diffusers",
        out=tmp_path / "y.safetensors",
    )  # fmt: skip
    assert "conv1" in message
