"""Names of GGUF: gguf's own table is the judge, over the names of real classes of transformers."""

import gguf
import pytest
import torch
import transformers
from safetensors import safe_open

from loratools.names.gguf import EXPERTS, architecture_of, rules_for
from loratools.names.rules import Names, filled, pattern

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
MOE = SIZES | {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
CLASSES = {
    "llama": ("LlamaForCausalLM", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", SIZES),
    "mixtral": ("MixtralForCausalLM", SIZES | {"num_local_experts": 4}),
    "granite": ("GraniteForCausalLM", SIZES),
    "smollm3": ("SmolLM3ForCausalLM", SIZES),
    "qwen2": ("Qwen2ForCausalLM", SIZES),
    "qwen2_moe": ("Qwen2MoeForCausalLM", MOE | {"shared_expert_intermediate_size": 8}),
    "qwen3": ("Qwen3ForCausalLM", SIZES),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE),
    "gemma": ("GemmaForCausalLM", SIZES | {"head_dim": 4}),
    "gemma2": ("Gemma2ForCausalLM", SIZES | {"head_dim": 4}),
    "gemma3_text": ("Gemma3ForCausalLM", SIZES | {"head_dim": 4}),
    "olmo": ("OlmoForCausalLM", SIZES),
    "olmo2": ("Olmo2ForCausalLM", SIZES),
    "olmo3": ("Olmo3ForCausalLM", SIZES),
    "phi3": ("Phi3ForCausalLM", SIZES),
    "phi": ("PhiForCausalLM", SIZES),
    "starcoder2": ("Starcoder2ForCausalLM", SIZES),
    "cohere": ("CohereForCausalLM", SIZES | {"use_qk_norm": True}),
    "cohere2": ("Cohere2ForCausalLM", SIZES),
    "stablelm": ("StableLmForCausalLM", SIZES),
    "seed_oss": ("SeedOssForCausalLM", SIZES),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40}),
}
ARCHITECTURES = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}


def table(kind: str):
    """gguf's own map, as its converters ask it: a name of Hugging Face, or None."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture_of(kind)], 2)
    return lambda name: names.get_name(name, (".weight", ".bias"))


def saved_keys(kind: str, folder) -> list[str]:
    """The keys that a model of this class has on disk."""
    made_by = getattr(transformers, CLASSES[kind][0])
    with torch.device("meta"):
        model = made_by(made_by.config_class(**CLASSES[kind][1]))
    model.to_empty(device="cpu").save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("kind", CLASSES)
def test_names_are_gguf_s_own_both_ways(kind, tmp_path):
    rules, theirs = Names(rules_for(kind)), table(kind)
    experts = [pattern(old) for old, _ in EXPERTS.get(kind, ())]
    wholes: dict[str, str] = {}
    modules = {key.rpartition(".")[0] for key in saved_keys(kind, tmp_path)}
    for module in sorted(modules):
        if any(e.fullmatch(module) for e in experts):
            continue
        found = rules.of_part(module)
        expected = theirs(module)
        if expected is None:  # gguf's table of an architecture that shares its embedding
            assert (found, module) == (None, "lm_head")
            continue
        assert found is not None, module
        assert found.whole == expected
        assert wholes.setdefault(found.whole, module) == module
        back = rules.of_whole(found.whole)
        assert (back.parts, back.whole) == ((module,), found.whole)
    assert len(wholes) >= 10


@pytest.mark.parametrize("kind", CLASSES)
def test_every_rule_has_a_name_that_gguf_knows(kind):
    tensors = gguf.MODEL_TENSORS[ARCHITECTURES[architecture_of(kind)]]
    known = {gguf.TENSOR_NAMES[t].replace("{bid}", "{n}") for t in tensors}
    assert {rule.whole for rule in rules_for(kind)} <= known | {"blk.{n}.ffn_gate_inp"}
    for _, whole in EXPERTS.get(kind, ()):
        assert whole in known


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_by_name(kind, tmp_path):
    """Each expert of a checkpoint is a row of the stack that the converter makes of them."""
    stacked = {"w1": "gate", "w2": "down", "w3": "up"}
    theirs = table(kind)
    keys = [k.rpartition(".")[0] for k in saved_keys(kind, tmp_path) if ".experts." in k]
    assert keys
    for module in keys:
        (hit,) = [
            (found, whole)
            for old, whole in EXPERTS[kind]
            if (found := pattern(old).fullmatch(module))
        ]
        numbers = {k[1:]: v for k, v in hit[0].groupdict().items()}
        leaf = module.rpartition(".")[2]
        # The converters stack under these names, which are no longer those of a checkpoint.
        if kind == "mixtral":
            merged = f"layers.{numbers['n']}.feed_forward.experts.{leaf}"
        else:
            merged = f"model.layers.{numbers['n']}.mlp.experts.{leaf}"
        assert filled(hit[1], numbers) == theirs(merged)
        assert stacked.get(leaf, leaf.removesuffix("_proj")) in hit[1]


TOWERS = {
    "gemma3": ("Gemma3ForConditionalGeneration", {"head_dim": 4}, "gemma3_text"),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {}, "qwen2"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", {}, "qwen2"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", {"head_dim": 4}, "qwen3"),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_the_language_part_of_a_model_with_a_tower(kind):
    """As it is called in memory, by PEFT too; the converters take the front away."""
    made_by, more, plain = getattr(transformers, TOWERS[kind][0]), TOWERS[kind][1], TOWERS[kind][2]
    config = made_by.config_class(text_config=SIZES | more)
    with torch.device("meta"):
        model = made_by(config)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    theirs, rules = table(kind), Names(rules_for(kind))
    inside = [n for n in names if n.startswith("model.language_model.")]
    assert len(inside) == 14
    for name in inside:
        found = rules.of_part(name)
        assert found.whole == theirs(name.replace("language_model.", ""))
    assert {r.whole for r in rules_for(plain)} == {r.whole for r in rules_for(kind)}


@pytest.mark.parametrize("front", ["model.language_model.", "language_model.model."])
def test_a_language_model_beside_a_tower(front):
    rules = Names(rules_for("gemma3"))
    found = rules.of_part(f"{front}layers.3.self_attn.q_proj")
    assert found.whole == "blk.3.attn_q"
    assert rules.of_whole("blk.3.attn_q").parts == ("model.layers.3.self_attn.q_proj",)


def test_rows_are_reordered_for_these_and_no_others():
    """As llama.cpp:conversion/ does where a class has undo_permute; tests/oracle runs it."""
    rotated = {
        kind: {rule.whole for rule in rules_for(kind) if rule.order == "rope"} for kind in CLASSES
    }
    both = {"blk.{n}.attn_q", "blk.{n}.attn_k"}
    llamas = {"llama", "mistral", "mixtral", "granite", "smollm3", "olmo"}
    assert rotated == {kind: both if kind in llamas else set() for kind in CLASSES}


@pytest.mark.parametrize("kind", CLASSES)
def test_by_gguf_s_architecture_too(kind):
    found = {r.whole: r.order for r in rules_for(architecture_of(kind))}
    assert found == {r.whole: r.order for r in rules_for(kind)}


def test_what_is_not_known():
    assert rules_for("nothing") is None
    assert rules_for(None) is None
    assert architecture_of("nothing") is None
