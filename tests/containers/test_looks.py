"""What files are by their first bytes and by their tensors' names, told by the real programs."""

import io
import re
import time

import gguf
import numpy
import onnx
import pytest
import torch
from safetensors.torch import save_file

from loratools.containers.bundle import local
from loratools.containers.looks import (
    LOOKS,
    is_onnx,
    not_the_file,
    what_gguf,
    what_it_is,
    what_weights,
)
from loratools.errors import LoratoolsError
from loratools.formats.looking import looks_like

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def test_a_pointer_says_how_large_the_file_itself_is():
    assert not_the_file(POINTER) == (
        "is a git-lfs pointer, the file itself has 12345 bytes; run `git lfs pull`"
    )
    assert "elsewhere" in not_the_file(POINTER[:50])


@pytest.mark.parametrize("head", [b"<!DOCTYPE html><html>", b"\n <html>", b"<?xml version"])
def test_a_web_page_is_not_the_file(head):
    assert "web page" in not_the_file(head)


@pytest.mark.parametrize("head", [b"", b"PK\x03\x04", b"GGUF\x03", b"\x80\x02}q", b"{}"])
def test_other_bytes_may_be_the_file(head):
    assert not_the_file(head) is None


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x89PNG\r\n", "a PNG picture"),
        (b"\0" * 4 + b"TORT" + b"\0" * 8, "onnxruntime adapter"),
        (b"x" * 257 + b"ustar\x0000", "a tar archive"),
        (b"plain words", None),
    ],
)
def test_magic(head, words):
    found = what_it_is(head)
    assert found == words if words is None else words in found


# ------------------------------------------------------------------------------- by names


def keys_of_transformers(name):
    import transformers

    made = {
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=8,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
            )
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8)
        ),
        "bert": lambda: transformers.BertModel(
            transformers.BertConfig(
                vocab_size=8,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                intermediate_size=8,
            )
        ),
        "clip": lambda: transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                vocab_size=8,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                projection_dim=8,
            )
        ),
        "t5": lambda: transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=8, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1
            )
        ),
    }
    with torch.device("meta"):
        return made[name]().state_dict()


def keys_of_diffusers(name):
    import diffusers

    blocks = {"block_out_channels": (32,), "norm_num_groups": 4}
    unet = {
        "down_block_types": ("CrossAttnDownBlock2D",), "cross_attention_dim": 8, **blocks,
        "attention_head_dim": 8, "layers_per_block": 1,
    }  # fmt: skip
    dit = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
    made = {
        "unet": lambda: diffusers.UNet2DConditionModel(
            up_block_types=("CrossAttnUpBlock2D",), **unet
        ),
        "controlnet": lambda: diffusers.ControlNetModel(
            conditioning_embedding_out_channels=(4,), **unet
        ),
        "vae": lambda: diffusers.AutoencoderKL(
            block_out_channels=(32,), norm_num_groups=4, layers_per_block=1
        ),
        "flux": lambda: diffusers.FluxTransformer2DModel(
            num_attention_heads=1, joint_attention_dim=8, pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4), **dit,
        ),
        "t2i": lambda: diffusers.T2IAdapter(channels=(32,), num_res_blocks=1),
        "wan": lambda: diffusers.WanTransformer3DModel(
            num_layers=1, num_attention_heads=1, attention_head_dim=12, ffn_dim=8, text_dim=8
        ),
    }  # fmt: skip
    with torch.device("meta"):
        return made[name]().state_dict()


def shapes(tensors):
    return {name: tuple(t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama", "a base model"),
        ("gpt2", "a base model"),
        ("bert", "a base model"),
        ("clip", "a text encoder (CLIP"),
        ("t5", "a text encoder (T5)"),
    ],
)
def test_what_transformers_makes(name, words):
    assert what_weights(shapes(keys_of_transformers(name))).startswith(words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unet", "a diffusion U-Net"),
        ("controlnet", "a ControlNet"),
        ("vae", "a VAE"),
        ("flux", "a diffusion transformer"),
        ("wan", "a diffusion transformer"),
        ("t2i", "a T2I-Adapter"),
    ],
)
def test_what_diffusers_makes(name, words):
    assert what_weights(shapes(keys_of_diffusers(name))).startswith(words)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["clip_l", "clip_g"], "a textual-inversion embedding"),
        (["emb_params"], "a textual-inversion embedding"),
        (["bundle_emb.x.string_to_param.*"], "textual-inversion embeddings in a bundle"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight"], "a ControlNet-LLLite"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["ip_adapter.1.to_q_lora.down.weight"], "an IP-Adapter"),
        (["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"], "an upscaler"),
        (["conv_first.weight", "body.0.rdb1.conv1.weight"], "an upscaler"),
        (["state.0.exp_avg", "param_groups"], "optimizer state"),
        (["x.lora_Q.weight"], "tensors of an adapter in a layout that loratools does not know"),
        (["a.lokr_w3"], "tensors of an adapter in a layout that loratools does not know"),
        (["some", "thing"], "weights of an unknown sort (some [2, 3], thing [2, 3])"),
    ],
)
def test_names_of_the_field(names, words):
    assert what_weights(dict.fromkeys(names, (2, 3))).startswith(words)


def test_a_lone_matrix_named_after_its_token_is_an_embedding():
    assert what_weights({"my-style": (4, 768)}) == "a textual-inversion embedding"
    assert "unknown" in what_weights({"my-style": (4, 700)})
    assert what_weights({}) == "an empty set of tensors"


def test_hostile_names_take_no_longer_and_are_escaped():
    names = {"a" * 4000 + "_" * 4000 + str(i): (1,) for i in range(500)}
    began = time.process_time()  # of this process: others may keep it waiting
    what_weights(names)
    assert time.process_time() - began < 30
    assert "\x1b" not in what_weights({"\x1b[2Jx": (1, 2), "y": (1,)})
    for _, patterns in LOOKS:
        for pattern in patterns:
            re.compile(pattern)


# ------------------------------------------------------------------------------- containers


def gguf_at(path, kind=None, arch="llama"):
    writer = gguf.GGUFWriter(path, arch)
    if kind:
        writer.add_type(kind)
    writer.add_array("general.tags", [1, 2, 3])
    writer.add_tensor("blk.0.attn_q.weight", numpy.zeros((2, 2), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_by_its_type_and_architecture_and_how_much_of_it_is_missing(tmp_path):
    model = gguf_at(tmp_path / "m.gguf")
    assert looks_like(local(model)) == "a base model (GGUF, llama), not an adapter"
    adapter = gguf_at(tmp_path / "a.gguf", "adapter", "qwen2")
    assert "a GGUF adapter, qwen2" in looks_like(local(adapter))
    model.write_bytes(model.read_bytes()[:-40])
    with pytest.raises(LoratoolsError, match=r"bytes are missing") as caught:
        looks_like(local(model))
    assert caught.value.code == "truncated"
    assert what_gguf("mmproj", 7) == "a multimodal projector (GGUF)"
    assert "imatrix" not in what_gguf("imatrix", None)


def onnx_at(path):
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    out = onnx.helper.make_tensor_value_info("y", 1, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value], [out])
    onnx.save(onnx.helper.make_model(graph, producer_name="me"), path)
    return path


def test_onnx_by_its_fields_and_how_much_of_it_is_missing(tmp_path):
    path = onnx_at(tmp_path / "m.onnx")
    whole = path.read_bytes()
    assert is_onnx(whole)
    assert looks_like(local(path)) == "an ONNX graph (made by me), not an adapter"
    (tmp_path / "nameless").write_bytes(whole)
    assert looks_like(local(tmp_path / "nameless")).startswith("an ONNX graph")
    path.write_bytes(whole[:-5])
    with pytest.raises(LoratoolsError, match=r"\d+ bytes are missing") as caught:
        looks_like(local(path))
    assert caught.value.code == "truncated"
    path.write_bytes(b"no graph at all")
    assert "its bytes do not" in looks_like(local(path))


def looks(path):
    return looks_like(local(path))


def test_torch_files(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"activation_func": "relu", "layer_structure": [1, 2, 1]}, path)
    assert looks(path) == "a hypernetwork"
    torch.save(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).state_dict(), path)
    assert looks(path).startswith("optimizer state")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 8)}}, path)
    assert looks(path) == "a textual-inversion embedding"
    torch.save([torch.zeros(2)], path)
    assert looks(path).startswith("a torch file that holds no weights by name")


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (POINTER, "not_weights"),
        (b"<!doctype html>", "not_weights"),
        (b"", "truncated"),
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.gguf", "x.onnx", "x.txt"])
def test_what_is_not_the_file_is_malformed(tmp_path, name, raw, code):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(LoratoolsError) as caught:
        looks(tmp_path / name)
    assert (caught.value.code, caught.value.exit) == (code, 3)


def test_a_download_that_has_not_ended(tmp_path):
    (tmp_path / "x.safetensors.crdownload").write_bytes(b"\0" * 100)
    with pytest.raises(LoratoolsError, match="not ended"):
        looks(tmp_path / "x.safetensors.crdownload")
    made = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.zeros(10)}, made)
    made.write_bytes(made.read_bytes()[:-7])
    with pytest.raises(LoratoolsError, match="7 bytes are missing"):
        looks(made)


# ------------------------------------------------------------------------------- folders


def test_folders(tmp_path):
    assert looks(tmp_path) == "an empty folder"
    (tmp_path / "readme.md").write_text("x")
    assert looks(tmp_path) == "no adapter among 1 files"
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert looks(tmp_path) == "a config.json, LlamaForCausalLM without any weights"
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    expected = "a base model (config.json and weights, LlamaForCausalLM), not an adapter"
    assert looks(tmp_path) == expected
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert looks(tmp_path) == "a base model (config.json and weights), not an adapter"
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert looks(tmp_path) == "a base model (diffusers pipeline, FluxPipeline), not an adapter"
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(LoratoolsError, match="git-lfs pointer, the file itself has 12345 bytes"):
        looks(tmp_path)


def test_what_a_training_leaves(tmp_path):
    stream = io.BytesIO()
    torch.save({"state": {}, "param_groups": []}, stream)
    (tmp_path / "optimizer.pt").write_bytes(stream.getvalue())
    assert "to go on from" in looks(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "optimizer.pt").unlink()
    assert looks(tmp_path) == "an adapter_config.json without the weights file beside it"
