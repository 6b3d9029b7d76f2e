"""Every healthy fold by PEFT is proved, by the rule that PEFT followed, without a complaint."""

import pytest
import torch

from loratools.commands.verify import verify

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
QV = ["q_proj", "v_proj"]
ALL = {"target_modules": "all-linear"}
SOME = {"target_modules": QV, "seed": 5}
DORA = {"target_modules": QV, "use_dora": True}
DORA2 = DORA | {"seed": 6}
HEAD = {"target_modules": QV, "modules_to_save": ["lm_head", "norm"]}
GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"]}
BERT = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}

ONCE = "once from float32"
FIRST = "delta rounded to {} first"
FACTORS = "factors in {}"
UNMERGED = "once from float32, norms from the unmerged base"


def said(rule: str, dtype: torch.dtype) -> str:
    return rule.format(str(dtype).removeprefix("torch."))


# Model, adapters, options of the fold, the rule (where one alone can be named).
CASES = {
    "one": ("llama", [ALL], {}, ONCE),
    "safe": ("llama", [ALL], {"safe": True}, FIRST),
    "factors": ("llama", [ALL], {"cast": False}, FACTORS),
    "in-sequence": ("llama", [ALL, SOME], {}, ONCE),
    "in-sequence-safe": ("llama", [ALL, SOME], {"safe": True}, FIRST),
    "one-call": ("llama", [ALL, SOME], {"together": True}, ONCE),
    "dora": ("llama", [DORA], {}, ONCE),
    "dora-safe": ("llama", [DORA], {"safe": True}, ONCE),
    "dora-factors": ("llama", [DORA], {"cast": False}, FACTORS),
    "doras-in-sequence": ("llama", [DORA, DORA2], {}, ONCE),
    "doras-in-one-call": ("llama", [DORA, DORA2], {"together": True}, UNMERGED),
    "lora-then-dora": ("llama", [SOME, DORA], {"together": True}, UNMERGED),
    "dora-then-lora-safe": ("llama", [DORA, SOME], {"together": True, "safe": True}, FIRST),
    "head": ("llama", [HEAD], {}, ONCE),
    "heads": ("llama", [HEAD, HEAD | {"seed": 7}], {}, ONCE),
    "biases": ("llama", [{"target_modules": QV, "lora_bias": True, "bias": "none"}], {}, ONCE),
    "all-biases": ("llama", [{"target_modules": QV, "bias": "all"}], {}, ONCE),
    "embedding": ("llama", [{"target_modules": ["q_proj", "embed_tokens"]}], {}, ONCE),
    "embedding-dora": (
        "llama",
        [{"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}],
        {},
        None,
    ),
    "more-words": (
        "llama",
        [{"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"], "words": 99}],
        {"words": 99},
        ONCE,
    ),
    "more-words-and-lora": (
        "llama",
        [{"target_modules": ["q_proj", "embed_tokens", "lm_head"], "words": 99}],
        {"words": 99},
        ONCE,
    ),
    "tokens": ("llama", [ALL | {"trainable_token_indices": [3, 40]}], {}, ONCE),
    "rslora": ("llama", [ALL | {"use_rslora": True, "lora_alpha": -3.3}], {}, ONCE),
    "tied": ("tied", [{"target_modules": ["q_proj", "lm_head"]}], {}, ONCE),
    "tied-head-saved": ("tied", [ALL | {"modules_to_save": ["lm_head"]}], {}, ONCE),
    "gpt2": ("gpt2", [GPT2], {}, ONCE),
    "gpt2-safe": ("gpt2", [GPT2], {"safe": True}, FIRST),
    "gpt2-dora": (
        "gpt2",
        [{"target_modules": ["c_attn", "c_proj", "wte"], "use_dora": True}],
        {},
        ONCE,
    ),
    "bert": ("bert", [BERT], {}, ONCE),
    "other-layers": (
        "net",
        [{"target_modules": ["attention", "line", "image", "words"], "modules_to_save": ["norm"]}],
        {},
        None,
    ),
    "other-layers-safe": (
        "net",
        [{"target_modules": ["attention", "image"]}],
        {"safe": True},
        None,
    ),
    "other-layers-dora": (
        "net",
        [{"target_modules": ["line", "image", "words"], "use_dora": True}],
        {},
        None,
    ),
    "tiny-update": ("llama", [SOME | {"update": 1e-4}], {}, None),
    "16-bit-adapter": ("llama", [ALL | {"stored": BF16}], {}, ONCE),
    "16-bit-adapter-as-it-is": ("llama", [ALL | {"stored": F16}], {"cast": False}, None),
    "shards": ("llama", [ALL], {"max_shard_size": "40KB"}, ONCE),
    "widened": ("llama", [SOME], {"dtype": F32}, ONCE),
}
# In float32 a delta is rounded as the weight is, and in float64 by no other rule than ours.
DTYPES = {
    F32: set(CASES),
    BF16: set(CASES),
    F16: {"one", "safe", "dora", "factors"},
    F64: {"one", "doras-in-sequence"},
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for dtype, cases in DTYPES.items() for case in CASES if case in cases],
    ids=str,
)
def test_a_fold_by_peft_is_proved(case, dtype, base, adapter, folded):
    name, options, how, rule = CASES[case]
    over = base(name, dtype)
    adapters = [adapter(name, **o) for o in options]
    result = verify(folded(name, over, adapters, **how), base=over, adapters=adapters)
    assert result.mismatches == ()
    assert result.ok
    assert result.proved == "replay"
    if dtype == F64:
        assert result.rule == "once from float64"
    elif rule in (FIRST, FACTORS):
        assert result.rule == (ONCE if dtype == F32 else said(rule, dtype))
    elif rule is not None:  # of few numbers in 16 bits, float64's may all be the same
        assert rule.replace("float32", "float") in result.rule.replace("64", "").replace("32", "")
    if isinstance(result.strength, tuple):
        scaling, error = result.strength
        assert scaling == 1
        assert error < 1e-3 / 5


def test_all_tensors_are_compared(base, adapter, folded):
    over, made = base("llama"), adapter("llama", **ALL)
    out = folded("llama", over, [made])
    assert verify(out, base=over, adapters=[made]).checked == 29
    assert verify(out, base=over, adapters=[made], only=["*"]).checked == 29


def test_a_fold_onto_a_narrower_copy_of_the_base_is_proved(base, adapter, folded):
    over, made = base("llama"), adapter("llama", **ALL)
    for safe, rule in ((False, ONCE), (True, "delta rounded to bfloat16 first")):
        out = folded("llama", over, [made], dtype=BF16, safe=safe)
        result = verify(out, base=over, adapters=[made])
        assert result.mismatches == ()
        assert result.rule == rule
        assert result.notes == ("15 untouched tensors are the base's in another dtype",)


def test_signal_is_not_claimed_where_rounding_swallows_it(base, adapter, folded):
    over, made = base("llama", BF16), adapter("llama", target_modules=QV, update=1e-4)
    result = verify(folded("llama", over, [made]), base=over, adapters=[made])
    assert result.ok
    assert result.strength == "too little signal to tell"


def test_weights_are_peft_scales(base, adapter, tmp_path):
    import peft

    from tests.proving import models

    over, made = base("llama", BF16), adapter("llama", **DORA)
    wrapped = peft.PeftModel.from_pretrained(models.load("llama", over), made)
    for module in wrapped.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.4)
    wrapped.merge_and_unload().save_pretrained(tmp_path)
    assert verify(tmp_path, base=over, adapters=[made], weights=[0.4]).mismatches == ()
    assert not verify(tmp_path, base=over, adapters=[made]).ok
