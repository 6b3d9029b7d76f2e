"""What a conversion says and carries along: metadata that stays true, receipts, assumptions."""

import json

import numpy as np
import torch

from loratools import formats
from loratools.commands.convert import convert
from tests.commands import image_files
from tests.commands.adapter_files import BASE, Pair
from tests.commands.image_files import SD1
from tests.commands.test_conversions import refused, suffixed, updates


def test_the_receipt_of_a_conversion_says_from_what(tmp_path):
    pairs = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k": Pair(
        torch.ones(2, 12), torch.ones(12, 2), 2.0)}  # fmt: skip
    source = image_files.peft(tmp_path / "x", pairs)
    convert(source, to="kohya", out=tmp_path / "y.safetensors")
    said = json.loads((tmp_path / "y.safetensors.loratools.json").read_text())
    assert [a["format"] for a in said["recipe"]["adapters"]] == ["peft"]
    assert said["recipe"]["to"] == "kohya"


def test_what_a_file_cannot_say_is_assumed(tmp_path):
    """Which parts of a fused projection have groups, and which way round square factors lie."""
    torch.manual_seed(4)
    a, b = torch.randn(4, 6), torch.randn(12, 2)
    torch.save({"h.0.attn.c_attn.lora_A": a, "h.0.attn.c_attn.lora_B": b}, tmp_path / "x.pt")
    options = {"to": "peft", "out": tmp_path / "y"}
    assert refused(tmp_path / "x.pt", "peft", tmp_path / "y", assume=["alpha=3"]).code == "missing"
    convert(tmp_path / "x.pt", assume=["alpha=3", "enable_lora=true,false,true"], **options)
    (delta,) = updates(formats.read(tmp_path / "y"), "hf", {}).values()
    whole = torch.cat([b[:6] @ a[:2], torch.zeros(6, 6), b[6:] @ a[2:]]).double() * 1.5
    assert np.allclose(delta, whole.numpy(), atol=1e-5)
    error = refused(tmp_path / "x.pt", "peft", tmp_path / "z", assume=["beta=3"])
    assert (error.code, "enable_lora" in error.message) == ("usage", True)


def test_only_what_stays_true_is_carried(tmp_path):
    """From kohya to other containers: no hash of tensors, no rank that is no longer there."""
    pairs = {m: Pair(torch.randn(4, *s[1:]), torch.randn(s[0], 4), 2.0)
             for m, s in SD1.items() if m.startswith("unet.") and len(s) == 2}  # fmt: skip
    image_files.kohya(tmp_path / "x", pairs)
    convert(tmp_path / "x.safetensors", out=tmp_path / "a.safetensors")
    assert formats.read(tmp_path / "a.safetensors").metadata["ss_network_dim"] == "4"
    for to in ("diffusers", "peft"):
        convert(tmp_path / "a.safetensors", to=to, out=suffixed(tmp_path / to, to))
        said = formats.read(suffixed(tmp_path / to, to)).metadata
        assert (said["ss_network_dim"], said["ss_training_comment"]) == ("4", "by Ada")
        assert not [k for k in said if "hash" in k]
        out = suffixed(tmp_path / f"{to}-cut", to)
        convert(tmp_path / "a.safetensors", to=to, out=out, rank=2)
        said = formats.read(out).metadata
        assert "ss_network_dim" not in said
        assert said["ss_training_comment"] == "by Ada"
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE
    known = {"peft_type", "task_type", "inference_mode", "r", "lora_alpha", "use_rslora", "bias",
             "rank_pattern", "alpha_pattern", "target_modules",
             "base_model_name_or_path"}  # fmt: skip
    assert config.keys() <= known
