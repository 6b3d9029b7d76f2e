"""What all readers share: what is no tensor is said by name, and so is the same adapter beside."""

import json

import pytest
import torch
from safetensors.torch import save_file

from loratools import check, formats, inspect
from loratools.formats.reading import unwrapped

KEY = "model.layers.0.self_attn.q_proj"
PEFT = ("base_model.model." + KEY + ".lora_A.weight", "base_model.model." + KEY + ".lora_B.weight")
UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLUX = "diffusion_model.double_blocks.0.img_attn.proj"
CONFIGS = {
    "peft": {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]},
    "adapterhub": {
        "version": "adapters.1.0.0", "model_class": "LlamaModel", "name": "x",
        "config": {"architecture": "lora", "alpha": 2, "r": 2, "attn_matrices": ["q"]},
    },
    "mlx": {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 1.0}},
    "torchtune": {"r": 2, "lora_alpha": 2},
}  # fmt: skip
# Format → the file of safetensors, the file of torch, and the keys of A and B in them.
FOLDERS = {
    "peft": ("adapter_model.safetensors", "adapter_model.bin", *PEFT),
    "adapterhub": ("adapter.safetensors", "pytorch_adapter.bin",
                   f"{KEY}.loras.x.lora_A", f"{KEY}.loras.x.lora_B"),
    "diffusers": ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin",
                  f"{UNET}.lora_A.weight", f"{UNET}.lora_B.weight"),
    "kohya": ("x.safetensors", "x.pt", "lora_unet_down_blocks_0_attn.lora_down.weight",
              "lora_unet_down_blocks_0_attn.lora_up.weight"),
    "comfy": ("x.safetensors", "x.ckpt", f"{FLUX}.lora_A.weight", f"{FLUX}.lora_B.weight"),
    "xlabs": ("x.safetensors", "x.bin", "double_blocks.0.processor.proj_lora1.down.weight",
              "double_blocks.0.processor.proj_lora1.up.weight"),
    "bfl": ("x.safetensors", "x.bin", "double_blocks.0.img_attn.proj.lora_A.weight",
            "double_blocks.0.img_attn.proj.lora_B.weight"),
    "loralib": ("x.safetensors", "x.bin", f"{KEY}.lora_A", f"{KEY}.lora_B"),
    "raw": ("x.safetensors", "x.bin", f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"),
}  # fmt: skip
TORCH_ALONE = {
    **{name: (torch_file, a, b) for name, (_, torch_file, a, b) in FOLDERS.items()},
    "torchtune": ("adapter_model.pt", "layers.0.attn.q_proj.lora_a.weight",
                  "layers.0.attn.q_proj.lora_b.weight"),
    "litgpt": ("lit_model.pth.lora", "transformer.h.0.mlp.proj.lora_A",
               "transformer.h.0.mlp.proj.lora_B"),
    "nemo": ("x.ckpt", "decoder.layers.0.mlp.linear_fc1.adapter.linear_in.weight",
             "decoder.layers.0.mlp.linear_fc1.adapter.linear_out.weight"),
}  # fmt: skip


def tensors(a, b):
    torch.manual_seed(0)
    return {a: torch.randn(2, 8), b: torch.randn(8, 2)}


def folder(path, form, *, differing=False):
    """A folder of a format with both files."""
    safe, other, a, b = FOLDERS[form]
    path.mkdir()
    save_file(tensors(a, b), path / safe)
    torch.save(tensors(a, b) | ({"more.bias": torch.ones(1)} if differing else {}), path / other)
    if form in CONFIGS:
        (path / "adapter_config.json").write_text(json.dumps(CONFIGS[form]))
    return path


def beside(problems, name):
    return [(p.severity, p.message) for p in problems if f"{name} lies beside" in p.message]


@pytest.mark.parametrize("form", FOLDERS)
def test_safetensors_wins_and_the_same_in_torch_is_mentioned(form, tmp_path):
    safe, other, *_ = FOLDERS[form]
    adapter = formats.read(folder(tmp_path / "a", form))
    assert (adapter.format, adapter.files[0]) == (form, safe)
    assert beside(adapter.problems, other) == [
        ("note", f"{other} lies beside {safe} and was not read")
    ]
    named = formats.read(tmp_path / "a" / safe)  # who names a file knows which
    assert beside(named.problems, other) == []


@pytest.mark.parametrize("form", FOLDERS)
def test_a_warning_where_their_keys_differ(form, tmp_path):
    safe, other, *_ = FOLDERS[form]
    adapter = formats.read(folder(tmp_path / "a", form, differing=True))
    assert beside(adapter.problems, other) == [
        (
            "warning",
            f"{other} lies beside {safe} and was not read: their keys differ "
            f"(1 only in {other}, such as more.bias)",
        )
    ]


@pytest.mark.parametrize("form", FOLDERS)
def test_a_warning_where_the_other_cannot_be_read(form, tmp_path):
    _, other, *_ = FOLDERS[form]
    path = folder(tmp_path / "a", form)
    (path / other).write_bytes((path / other).read_bytes()[:100])
    adapter = formats.read(path)
    assert adapter.files[0].endswith(".safetensors")
    [(severity, message)] = beside(adapter.problems, other)
    assert severity == "warning"
    assert "nor could it be: " in message
    assert adapter.deltas


def test_the_heads_of_adapterhub_too(tmp_path):
    path = folder(tmp_path / "a", "adapterhub")
    save_file({"heads.x.1.weight": torch.ones(2, 8)}, path / "model_head.safetensors")
    torch.save({"heads.x.2.weight": torch.ones(2, 8)}, path / "pytorch_model_head.bin")
    (path / "head_config.json").write_text(json.dumps({"head_type": "x"}))
    [(severity, message)] = beside(formats.read(path).problems, "pytorch_model_head.bin")
    assert severity == "warning"
    assert "1 only in pytorch_model_head.bin, such as heads.x.2.weight; 1 only in" in message


def test_mlx_beside_its_old_npz(tmp_path):
    np = pytest.importorskip("numpy")
    pair = {f"{KEY}.lora_a": torch.ones(8, 2), f"{KEY}.lora_b": torch.ones(2, 8)}
    save_file(pair, tmp_path / "adapters.safetensors")
    np.savez(tmp_path / "adapters.npz", **{k: v.numpy() for k, v in pair.items()})
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIGS["mlx"]))
    said = beside(formats.read(tmp_path).problems, "adapters.npz")
    assert [severity for severity, _ in said] == ["note"]
    np.savez(tmp_path / "adapters.npz", x=np.ones(2))
    said = beside(formats.read(tmp_path).problems, "adapters.npz")
    assert [severity for severity, _ in said] == ["warning"]


def test_two_exports_of_torchtune(tmp_path):
    _, a, b = TORCH_ALONE["torchtune"]
    save_file(tensors(a, b), tmp_path / "adapter_model.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIGS["torchtune"]))
    adapter = formats.read(tmp_path)
    assert adapter.format == "torchtune"
    assert [s for s, _ in beside(adapter.problems, "adapter_model.bin")] == ["warning"]
    # Beside its own file an export has other names always: a note, unless it cannot be read.
    torch.save(tensors(a, b), tmp_path / "adapter_model.pt")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    adapter = formats.read(tmp_path)
    assert adapter.files[0] == "adapter_model.pt"
    assert [s for s, _ in beside(adapter.problems, "adapter_model.bin")] == ["note"]
    assert [s for s, _ in beside(adapter.problems, "adapter_model.safetensors")] == ["warning"]


@pytest.mark.parametrize("form", TORCH_ALONE)
def test_what_is_no_tensor_is_a_note_by_name(form, tmp_path):
    file, a, b = TORCH_ALONE[form]
    torch.save({**tensors(a, b), "step\n": 7, "optimizer": {"lr": 0.1}}, tmp_path / file)
    if form in CONFIGS:
        (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIGS[form]))
    [found] = inspect(tmp_path / file, assume=["alpha=2"] if form not in CONFIGS else [])
    assert found.format == form
    said = {p.target: p.severity for p in found.problems if "is no tensor and was not" in p.message}
    assert said == {r"step\n": "note", "optimizer": "note"}
    assert not [p for p in found.problems if p.severity == "error"]
    assert set(found.kinds) == {"LowRank"}


def test_check_reads_the_keys_of_a_torch_file_with_extras(tmp_path):
    """`check --for` looks at the file's own names."""
    path = tmp_path / "a"
    path.mkdir()
    torch.save({**tensors(*PEFT), "step": 7}, path / "adapter_model.bin")
    (path / "adapter_config.json").write_text(json.dumps(CONFIGS["peft"]))
    assert check([path], for_="peft").ok


@pytest.mark.parametrize(
    ("key", "bare"),
    [
        ("module.a.b", "a.b"),
        ("a._fsdp_wrapped_module.b", "a.b"),
        ("module._orig_mod.a._checkpoint_wrapped_module.b", "a.b"),
        ("a.my_orig_mod.b", "a.my_orig_mod.b"),
        ("model.module.b", "model.module.b"),
    ],
)
def test_wrappers(key, bare):
    assert unwrapped(key) == bare
