"""Adapters of mixtures of experts: PEFT's target_parameters and mlx-lm's switch layers.

Forward passes of transformers' own classes, with PEFT upon them, against our folds.
"""

import copy
import json
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loratools import LoratoolsError, convert, load, merge, save
from loratools.adapter import Experts
from loratools.algebra import materialise
from tests.oracle.folds import fold

transformers.logging.disable_progress_bar()

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-square": (
        "MixtralConfig",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 16},
    ),
    "mixtral-wide": (  # gate and up together are as wide as the hidden size
        "MixtralConfig",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 8},
    ),
    "qwen3": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 4},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 4, "intermediate_size": 12},
    ),
    "gpt-oss-square": (
        "GptOssConfig",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 4, "intermediate_size": 16},
    ),
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.tensor([[3, 7, 1, 22, 9, 4, 15, 30]])


def made(name):
    kind, options = MODELS[name]
    config = getattr(transformers, kind)(**{**SMALL, **options})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def output(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(model, folder, *, seed=1, **options):
    """An adapter after two steps of PEFT's own training, saved by it; the model's answer."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": [], **options})
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    taught(wrapped)
    wrapped.save_pretrained(folder)
    return output(wrapped.eval())


def taught(wrapped):
    ours = [p for p in wrapped.parameters() if p.requires_grad]
    steps = torch.optim.SGD(ours, lr=0.5)
    for _ in range(2):
        steps.zero_grad()
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        steps.step()
    assert all(float(p.abs().max()) > 0 for p in ours)


@pytest.fixture
def base(tmp_path):
    """A tiny mixture of experts as transformers saves it (single experts, where it has them)."""

    def make(name):
        model = made(name)
        model.save_pretrained(tmp_path / "base")
        return model, tmp_path / "base"

    return make


def in_memory(model, folder):
    """The same weights as a file in the layout of memory: stacks."""
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()},
              folder / "model.safetensors")  # fmt: skip
    (folder / "config.json").write_text(model.config.to_json_string())
    return folder


def close(found, wanted, before):
    assert float((found - wanted).abs().max()) < 1e-5
    assert float((wanted - before).abs().max()) > 1e-3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "up", "down"])
def test_a_fold_is_pefts_forward(name, parameters, base, tmp_path):
    model, folder = base(name)
    wanted = trained(model, tmp_path / "a", target_parameters=parameters)
    assume = []
    if name == "gpt-oss-square" and parameters == BOTH[1:]:
        with pytest.raises(LoratoolsError, match="experts=in"):
            merge([tmp_path / "a"], base=folder, out=tmp_path / "out")
        assume = ["experts=in"]
    merge([tmp_path / "a"], base=folder, out=tmp_path / "out", assume=assume)
    found = output(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    close(found, wanted, output(model))
    # The same in the layout of memory.
    stacks = in_memory(model, tmp_path / "stacks")
    folded = fold(load(tmp_path / "a", assume=dict(a.split("=") for a in assume)), stacks)
    again = made(name)
    again.load_state_dict(folded)
    close(output(again), wanted, output(model))


def loaded(model, folder):
    """PEFT's own reading of an adapter, upon a fresh copy of the model."""
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    return output(wrapped.eval())


def test_with_linear_layers_the_router_and_a_bias(base, tmp_path):
    model, folder = base("gpt-oss")
    wanted = trained(
        model, tmp_path / "a", target_modules=["q_proj"], use_rslora=True,
        target_parameters=[*BOTH, "mlp.experts.down_proj_bias", "router.weight"],
        rank_pattern={r".*\.gate_up_proj": 5}, alpha_pattern={"mlp.experts.down_proj": 7},
    )  # fmt: skip
    merge([tmp_path / "a"], base=folder, out=tmp_path / "out")
    found = output(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    close(found, wanted, output(model))


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_what_is_written_again_is_pefts_file(name, base, tmp_path):
    model, _ = base(name)
    wanted = trained(model, tmp_path / "a", target_parameters=BOTH)
    save(load(tmp_path / "a"), tmp_path / "b")
    before, after = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    close(loaded(model, tmp_path / "b"), wanted, output(model))


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_merge_without_a_base_adds_up_ranks(name, base, tmp_path):
    model, folder = base(name)
    for i, parameters in enumerate([BOTH, BOTH[:1]]):
        trained(model, tmp_path / str(i), seed=i, r=2 + i, target_parameters=parameters)
    adapters = [tmp_path / "0", tmp_path / "1"]
    merge(adapters, weights=[0.5, -0.7], out=tmp_path / "sum")
    merge(adapters, weights=[0.5, -0.7], base=folder, out=tmp_path / "out")
    wanted = output(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    close(loaded(model, tmp_path / "sum"), wanted, output(model))
    stack = load(tmp_path / "sum").deltas["model.layers.0.mlp.experts.gate_up_proj"]
    assert isinstance(stack, Experts)
    assert stack.rank == 5


@pytest.mark.parametrize(
    ("name", "block", "leaves"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
@pytest.mark.parametrize("router", [False, True])
def test_pairs_of_single_experts_from_transformers_4(name, block, leaves, router, base, tmp_path):
    """PEFT converts them when it loads them onto stacks; folded, they are the same."""
    model, folder = base(name)
    state = load_file(folder / "model.safetensors")
    torch.manual_seed(3)
    tensors = {}
    for key, weight in state.items():
        module = key.removesuffix(".weight")
        *_, last = module.split(".")
        if last in leaves or (router and module.endswith(f"{block}.gate")):
            out, inner = weight.shape
            stem = f"base_model.model.{module}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(2, inner) * 0.1
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 2)
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    modules = [*leaves, *(["gate"] if router else [])]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": modules,
              "task_type": "CAUSAL_LM"}  # fmt: skip
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    wanted = loaded(model, tmp_path / "a")
    merge([tmp_path / "a"], base=folder, out=tmp_path / "out")
    found = output(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    close(found, wanted, output(model))
    folded = fold(load(tmp_path / "a"), in_memory(model, tmp_path / "stacks"))
    again = made(name)
    again.load_state_dict(folded)
    close(output(again), wanted, output(model))


def test_experts_that_were_not_trained_stay(base, tmp_path):
    """Only some experts, only their up projection: the rest of a stack is as it was."""
    model, _ = base("mixtral")
    stem = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w3"
    torch.manual_seed(4)
    a, b = torch.randn(2, 16), torch.randn(12, 2)
    (tmp_path / "a").mkdir()
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b},
              tmp_path / "a" / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w3"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    stacks = in_memory(model, tmp_path / "stacks")
    before = load_file(stacks / "model.safetensors")
    folded = fold(load(tmp_path / "a"), stacks)
    due = before["model.layers.1.mlp.experts.gate_up_proj"].clone()
    due[2, 12:] += b @ a
    for key, tensor in folded.items():
        wanted = due if key == "model.layers.1.mlp.experts.gate_up_proj" else before[key]
        assert torch.allclose(tensor, wanted, rtol=0, atol=1e-6), key


# ------------------------------------------------------------------------ older versions of PEFT

DATA = Path(__file__).parent.parent / "data"
VERSIONS = ("0_18_1", "0_19_0")
OLD = ("plain", "square-down", "square-up", "turned", "turned-square", "up", "square")


def older(version, case, folder, **changes):
    """An adapter of an older PEFT as a folder, its base, and what that PEFT made of both."""
    with safe_open(DATA / f"peft_experts_{version}.safetensors", "pt") as file:
        config = json.loads(file.metadata()[case]) | changes
        parts = {"adapter": {}, "base": {}, "merged": {}}
        for key in file.keys():  # noqa: SIM118
            name, part, inner = key.split("|")
            if name == case:
                parts[part][inner] = file.get_tensor(key)
    for part in ("adapter", "base"):
        (folder / part).mkdir(parents=True)
    save_file(parts["adapter"], folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file(parts["base"], folder / "base" / "model.safetensors")
    kind = "gpt_oss" if case.startswith("turned") else "mixtral"
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder / "adapter", folder / "base", parts["merged"]


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, rtol=1e-5, atol=1e-5), key


@pytest.mark.parametrize("case", OLD)
@pytest.mark.parametrize("version", VERSIONS)
def test_older_layouts_fold_as_their_peft_merged_them(version, case, tmp_path):
    adapter, base, wanted = older(version, case, tmp_path)
    same(fold(load(adapter), base), wanted)


@pytest.mark.parametrize("case", OLD[:-1])
@pytest.mark.parametrize("version", VERSIONS)
def test_shapes_tell_the_layout_without_a_version(version, case, tmp_path):
    for said in (None, "0.19.1", "0.18.0", "0.20.0.dev0"):
        where = tmp_path / str(said)
        adapter, base, wanted = older(version, case, where, peft_version=said)
        same(fold(load(adapter), base), wanted)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_square_stack_without_a_version_is_refused_until_the_user_says_it(version, tmp_path):
    adapter, base, wanted = older(version, "square", tmp_path, peft_version=None)
    with pytest.raises(LoratoolsError, match="experts=out") as refused:
        fold(load(adapter), base)
    assert refused.value.code == "orientation"
    same(fold(load(adapter, assume={"experts": "out"}), base), wanted)
    other = fold(load(adapter, assume={"experts": "in"}), base)
    assert not torch.allclose(other["layers.0.experts.down_proj"], wanted[
        "layers.0.experts.down_proj"])  # fmt: skip


def test_what_is_assumed_must_not_contradict_the_shapes(tmp_path):
    adapter, _, _ = older("0_18_1", "plain", tmp_path)
    with pytest.raises(LoratoolsError, match="the shapes say experts=out"):
        load(adapter, assume={"experts": "in"})
    with pytest.raises(LoratoolsError, match="expected in, out"):
        load(adapter, assume={"experts": "first"})


@pytest.mark.parametrize("case", OLD)
@pytest.mark.parametrize("version", VERSIONS)
def test_older_files_are_written_again_as_they_were(version, case, tmp_path):
    adapter, base, wanted = older(version, case, tmp_path)
    save(load(adapter), tmp_path / "b")
    same(fold(load(tmp_path / "b"), base), wanted)


# ------------------------------------------------------------------------ mlx-lm's switch layers

MLX = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3": (
        "qwen3_moe",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 4,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 4, "sliding_window": 128},
    ),
}  # fmt: skip


def in_mlx(name, folder):
    """A checkpoint in mlx-lm, whose own rules put the weights into stacks."""
    import importlib

    import mlx.core as mx

    module = importlib.import_module(f"mlx_lm.models.{MLX[name][0]}")
    config = json.loads((folder / "config.json").read_text()) | MLX[name][1]
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    twin = module.Model(module.ModelArgs.from_dict(config))
    state = load_file(folder / "model.safetensors")
    if name == "gpt-oss":  # as in the published checkpoint: (experts, out, in)
        stacks = {k for k in state if k.endswith("_proj") and state[k].ndim == 3}
        state = {
            f"{k}.weight" if k in stacks else k: v.transpose(1, 2) if k in stacks else v
            for k, v in state.items()
        }
    weights = twin.sanitize({k: mx.array(v.contiguous().numpy()) for k, v in state.items()})
    twin.load_weights(list(weights.items()))
    return twin, mx


def mlx_adapter(twin, mx, folder, keys, *, flat=False):
    """An adapter as mlx-lm leaves it after a training that moved every parameter."""
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    twin.freeze()
    said = {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(twin, -1, said)
    mx.random.seed(5)
    moved = [(k, mx.random.normal(v.shape) * 0.2)
             for k, v in tree_flatten(twin.trainable_parameters())]  # fmt: skip
    twin.update(tree_unflatten(moved))
    folder.mkdir()
    kept = dict(tree_flatten(twin.trainable_parameters()))
    if flat:  # mlx-lm before 0.20 stacked A by rows
        kept = {k: v.reshape(-1, v.shape[-1]) if k.endswith("lora_a") and v.ndim == 3 else v
                for k, v in kept.items()}  # fmt: skip
    mx.save_safetensors(str(folder / "adapters.safetensors"), kept)
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": said}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return kept


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", MLX)
def test_switch_layers_fold_as_mlx_runs_them(name, flat, base, tmp_path):
    import numpy as np

    model, folder = base(name)
    twin, mx = in_mlx(name, folder)
    ids = mx.array(IDS.numpy())
    before = np.array(twin(ids))
    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    container, router = ("experts", "router") if name == "gpt-oss" else ("switch_mlp", "gate")
    keys = [f"{block}.{container}.{leaf}_proj" for leaf in ("gate", "up", "down")]
    more = ["self_attn.q_proj", f"{block}.{router}"]
    mlx_adapter(twin, mx, tmp_path / "a", [*more, *keys], flat=flat)
    wanted = np.array(twin(ids))
    assert abs(wanted - before).max() > 1e-2
    merge([tmp_path / "a"], base=folder, out=tmp_path / "out")
    again, _ = in_mlx(name, tmp_path / "out")
    assert abs(np.array(again(ids)) - wanted).max() < 1e-4
    found = output(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    if name != "gpt-oss":  # mlx-lm's own differs from transformers' on so small a model
        assert abs(found.numpy() - wanted).max() < 1e-4
    stacks = made(name)
    stacks.load_state_dict(fold(load(tmp_path / "a"), in_memory(model, tmp_path / "stacks")))
    assert torch.allclose(output(stacks), found, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------ stacks in GGUF

NAMES = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}
PARTS = {"w1": "gate", "w3": "up", "w2": "down"} | {f"{role}_proj": role for role in NAMES}


@pytest.mark.parametrize(("name", "architecture"), [("mixtral", "llama"), ("qwen3", "qwen3moe")])
def test_stacks_of_gguf_fold_into_the_experts_of_a_checkpoint(name, architecture, base, tmp_path):
    """llama.cpp: W[e] + alpha / rank · B[e]·A[e], by the gguf package's names and writer."""
    model, folder = base(name)
    state = load_file(folder / "model.safetensors")
    due = {key: tensor.double() for key, tensor in state.items()}
    torch.manual_seed(2)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 6.0)
    table = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], 2
    )
    stacks = {}
    for key in state:
        pieces = key.removesuffix(".weight").split(".")
        if "experts" in pieces:
            stacks.setdefault((pieces[2], PARTS[pieces[-1]]), {})[int(pieces[-2])] = key
    for (layer, role), keys in stacks.items():
        out, inner = state[keys[0]].shape
        a, b = torch.randn(len(keys), 3, inner) * 0.1, torch.randn(len(keys), out, 3)
        stem = f"blk.{layer}.{NAMES[role]}"
        assert stem in table.mapping.values() or stem in {v[1] for v in table.mapping.values()}
        writer.add_tensor(f"{stem}.weight.lora_a", a.numpy())
        writer.add_tensor(f"{stem}.weight.lora_b", b.numpy())
        for expert, key in keys.items():
            due[key] += 2.0 * b[expert].double() @ a[expert].double()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folded = fold(load(tmp_path / "a.gguf"), folder)
    for key, tensor in folded.items():
        assert torch.allclose(tensor.double(), due[key], rtol=1e-6, atol=1e-6), key
    again = made(name)
    again.load_state_dict(fold(load(tmp_path / "a.gguf"), in_memory(model, tmp_path / "stacks")))
    again.save_pretrained(tmp_path / "again")
    for key, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.allclose(tensor, folded[key], rtol=0, atol=1e-6), key


# ------------------------------------------------------------------------ truncation, other orders


def test_a_truncated_merge_is_the_best_of_every_expert(base, tmp_path):
    model, _ = base("mixtral")
    trained(model, tmp_path / "a", r=4, target_parameters=BOTH)
    merge([tmp_path / "a"], rank=2, out=tmp_path / "cut")
    before, after = load(tmp_path / "a").deltas, load(tmp_path / "cut").deltas
    for key, delta in before.items():
        for whole, short in zip(materialise(delta), materialise(after[key]), strict=True):
            u, s, v = torch.linalg.svd(whole, full_matrices=False)
            assert torch.allclose(short, (u[:, :2] * s[:2]) @ v[:2], rtol=0, atol=1e-6)
    # In a checkpoint of single experts gate and up would be cut apart from each other.
    stacks = in_memory(model, tmp_path / "stacks")
    merge([tmp_path / "a"], rank=2, base=stacks, out=tmp_path / "out")
    again = made("mixtral")
    again.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    close(output(again), loaded(model, tmp_path / "cut"), output(model))


def test_columns_expert_by_expert_when_the_user_says_so(base, tmp_path):
    """Megatron-Bridge's order of lora_B, made of PEFT's; no file shows which of them it has."""
    model, folder = base("mixtral")
    wanted = trained(model, tmp_path / "a", target_parameters=BOTH)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, tensor in tensors.items():
        if "lora_B" in key:
            packed = tensor.reshape(len(tensor), 3, 4).transpose(1, 2)
            tensors[key] = packed.reshape(len(tensor), 12).contiguous()
    save_file(tensors, file)
    merge([tmp_path / "a"], base=folder, out=tmp_path / "out", assume=["experts=megatron"])
    found = output(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    close(found, wanted, output(model))


# ------------------------------------------------------------------------ other formats


def converted(adapter, out, to, base):
    convert([adapter], to=to, out=out, base=base)
    return out


@pytest.mark.parametrize(  # gpt-oss has no single experts anywhere
    ("name", "single"),
    [("mixtral", False), ("mixtral", True), ("qwen3", False), ("qwen3", True), ("gpt-oss", False)],
)
def test_mlx_runs_what_is_written_for_it(name, single, base, tmp_path):
    import numpy as np
    from mlx_lm.tuner.utils import load_adapters

    model, folder = base(name)
    trained(model, tmp_path / "a", target_parameters=BOTH, target_modules=["q_proj"])
    merge([tmp_path / "a"], base=folder, out=tmp_path / "out")
    source = tmp_path / "a"
    if single:  # through the names of a checkpoint
        convert([tmp_path / "a"], to="mlx", out=tmp_path / "m", base=folder)
        source = converted(tmp_path / "m", tmp_path / "p", "peft", folder)
        assert any(".experts.0." in key for key in load(source).deltas)
    converted(source, tmp_path / "mlx", "mlx", folder)
    twin, mx = in_mlx(name, folder)
    ids = mx.array(IDS.numpy())
    before = np.array(twin(ids))
    load_adapters(twin, str(tmp_path / "mlx"))
    after, due = np.array(twin(ids)), np.array(in_mlx(name, tmp_path / "out")[0](ids))
    assert abs(due - before).max() > 1e-3
    assert abs(after - due).max() < 1e-4


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_gguf_and_back(name, base, tmp_path):
    model, folder = base(name)
    wanted = trained(model, tmp_path / "a", target_parameters=BOTH, target_modules=["q_proj"])
    converted(tmp_path / "a", tmp_path / "a.gguf", "gguf", folder)
    tensors = {t.name: tuple(int(n) for n in t.shape)
               for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}  # fmt: skip
    out, inner = (12, 16)
    count = 4
    assert tensors["blk.0.ffn_gate_exps.weight.lora_a"] == (inner, 3, count)  # ggml: last first
    assert tensors["blk.0.ffn_up_exps.weight.lora_b"] == (3, out, count)
    merge([tmp_path / "a.gguf"], base=folder, out=tmp_path / "out")
    found = output(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    close(found, wanted, output(model))
    stacks = in_memory(model, tmp_path / "stacks")
    converted(tmp_path / "a.gguf", tmp_path / "p", "peft", stacks)
    close(loaded(model, tmp_path / "p"), wanted, output(model))


def test_without_a_base_the_layout_of_another_format_is_not_guessed(base, tmp_path):
    model, _ = base("mixtral")
    trained(model, tmp_path / "a", target_parameters=BOTH)
    with pytest.raises(LoratoolsError) as refused:
        convert([tmp_path / "a"], to="mlx", out=tmp_path / "mlx")
    assert refused.value.code == "needs_base"
