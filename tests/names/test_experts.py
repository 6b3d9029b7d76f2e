"""Names of experts' weights, against those that transformers and mlx-lm give them."""

import importlib
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from safetensors import safe_open

from loratools.names.experts import IN_OUT, IN_TURN, ORDER, ROLES, expert_of, otherwise

SIZES = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 3,
    "num_experts": 3, "n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
}  # fmt: skip
CLASSES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
}


def made(kind):
    cls = getattr(transformers, CLASSES[kind])
    known = set(cls.config_class().to_dict()) | {"num_local_experts", "num_experts"}
    config = cls.config_class(**{k: v for k, v in SIZES.items() if k in known})
    with torch.device("meta"):
        return cls(config)


@pytest.mark.parametrize("kind", CLASSES)
def test_all_experts_of_a_model_and_of_its_checkpoint_are_known(kind, tmp_path):
    model = made(kind)
    memory = [name for name, _ in model.named_parameters()]
    model.to_empty(device="cpu").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        disk = list(file.keys())
    for names in (memory, disk):
        found = {name: expert for name in names if (expert := expert_of(name))}
        wanted = {n for n in names if ".experts." in n and not n.endswith("bias")}
        assert set(found) == wanted
        assert found
        layers = {expert.layer for expert in found.values()}
        assert layers == {"layers.0", "layers.1"}
        for name, expert in found.items():
            assert expert.front + expert.layer + "." + expert.rest == name
        single = {expert.number for expert in found.values()}
        assert single in ({None}, {0, 1, 2})
        halves = {expert.role for expert in found.values()}
        assert halves in ({"gate", "up", "down"}, {"gate_up", "down"})


@pytest.mark.parametrize("kind", CLASSES)
def test_how_a_class_stores_its_stacks(kind):
    model = made(kind)
    stacks = {n: p.shape for n, p in model.named_parameters() if expert_of(n) is not None}
    hidden = model.config.hidden_size
    for name, shape in stacks.items():
        inner = shape[1] if kind in IN_OUT else shape[2]
        is_input = expert_of(name).role == "gate_up"
        assert (inner == hidden) == is_input, name
    experts = next(m for n, m in model.named_modules() if n.endswith(".experts"))
    assert (getattr(experts, "is_concatenated", True) is False) == (kind in IN_TURN)
    order = [n for n, _ in experts.named_parameters() if n in ROLES]
    assert order == sorted(order, key=ORDER.index)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "llama4"])
def test_mlx_has_stacks_under_names_that_are_known(name):
    source = importlib.import_module(f"mlx_lm.models.{name}").__file__
    with open(source) as file:
        text = file.read()
    container = "switch_mlp" if "self.switch_mlp = SwitchGLU" in text else "experts"
    assert f"self.{container} = SwitchGLU" in text
    for role in ("gate", "up", "down"):
        found = expert_of(f"model.layers.3.mlp.{container}.{role}_proj.weight")
        assert (found.role, found.number, found.layer) == (role, None, "layers.3")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.shared_experts.gate_proj.weight",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.mlp.experts.gate_up_proj_bias",
        "model.layers.0.mlp.experts.3.w4.weight",
        "model.layers.0.mlp.experts.x.w1.weight",
        "model.layers.0.mlp.experts",
        "experts.0.w1",
        "",
    ],
)
def test_what_is_no_experts_weight(name):
    assert expert_of(name) is None


def test_other_words_for_a_layers_feed_forward():
    assert otherwise("mlp.gate.weight") == [
        "block_sparse_moe.gate.weight", "feed_forward.gate.weight"
    ]  # fmt: skip
    assert otherwise("self_attn.q_proj.weight") == []
