"""The adapters that the tests against PEFT go through: a base, and the options of PEFT's config."""

import peft
import torch

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
QV = ["q_proj", "v_proj"]
PATTERNS = {
    # Keys are regexes; the first that matches decides, so the last of each never does. PEFT sorts
    # them when it saves (test_write.py has an order that this loses).
    "rank_pattern": {
        "^model.layers.0.self_attn.v_proj": 1,
        "layers.0.self_attn.q_proj": 2,
        r"layers\.(0|1)\.mlp\.(up|gate)_proj": 3,
        "q_proj": 6,
        "self_attn.q_proj": 5,
    },
    "alpha_pattern": {
        r".*\.1\..*_proj": 24,
        "layers.0.self_attn.v_proj": 3,
        "self_attn.v_proj": 1000,
    },
}
NET = ["tokens", "line", "image", "point", "volume", "square", "plain", "head"]

CASES = {
    "linear": ("llama", {"target_modules": QV, "r": 4, "lora_alpha": 8}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "regex": ("llama", {"target_modules": r"model\.layers\.1\.(self_attn\.[qk]|mlp\.up)_proj"}),
    "layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "excluded": ("llama", {"target_modules": ATTENTION, "exclude_modules": r".*\.0\..*v_proj"}),
    "gaussian": ("llama", {"target_modules": QV, "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": QV, "init_lora_weights": "orthogonal"}),
    "alpha-float": ("llama", {"target_modules": QV, "r": 3, "lora_alpha": 0.7}),
    "alpha-negative": ("llama", {"target_modules": QV, "r": 3, "lora_alpha": -2}),
    "rslora": ("llama", {"target_modules": QV, "r": 4, "lora_alpha": 8, "use_rslora": True}),
    "patterns": ("llama", {"target_modules": "all-linear", "r": 4, **PATTERNS}),
    "patterns-rslora": (
        "llama",
        {"target_modules": "all-linear", "r": 4, "use_rslora": True, **PATTERNS},
    ),
    "half": ("llama", {"target_modules": QV, "dtype": torch.float16}),
    "bfloat16": ("llama", {"target_modules": QV, "dtype": torch.bfloat16}),
    "lora-bias": ("llama-biases", {"target_modules": [*ATTENTION, "up_proj"], "lora_bias": True}),
    "bias-lora-only": ("llama-biases", {"target_modules": QV, "bias": "lora_only"}),
    "bias-all": ("llama-biases", {"target_modules": QV, "bias": "all"}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True, "r": 4}),
    "dora-rslora-patterns": (
        "llama",
        {"target_modules": "all-linear", "use_dora": True, "use_rslora": True, **PATTERNS},
    ),
    "dora-biases": ("llama-biases", {"target_modules": ATTENTION, "use_dora": True, "bias": "all"}),
    "head-saved": ("llama", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "norms-saved": ("llama", {"target_modules": QV, "modules_to_save": ["norm", "embed_tokens"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "r": 4}),
    "embedding-dora": ("llama", {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True}),
    "tokens-list": ("llama", {"target_modules": QV, "trainable_token_indices": [3, 9, 4]}),
    "tokens-dict": (
        "llama",
        {
            "target_modules": QV,
            "trainable_token_indices": {"embed_tokens": [40, 2], "lm_head": [7, 1, 8]},
        },
    ),
    "tokens-type": (
        "llama",
        {"kind": peft.TrainableTokensConfig, "token_indices": [5, 0], "target_modules": None},
    ),
    "tokens-tied": ("llama-tied", {"target_modules": QV, "trainable_token_indices": [3, 9, 4]}),
    "tied": ("llama-tied", {"target_modules": "all-linear"}),
    "bare": ("llama-bare", {"target_modules": "all-linear"}),
    "qwen3": ("qwen3", {"target_modules": "all-linear", "r": 4}),
    "qwen3-norms": ("qwen3", {"target_modules": QV, "modules_to_save": ["q_norm", "k_norm"]}),
    "gpt2": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "r": 4},
    ),
    "gpt2-flag-unset": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "gpt2-lora-bias": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "lora_bias": True},
    ),
    "gpt2-dora": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "gpt2-bias-all": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
    ),
    "gpt2-saved": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["c_fc", "wpe"]},
    ),
    "gpt2-positions": (
        "gpt2",
        {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True},
    ),
    "bert": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert-pooler": (
        "bert",
        {
            "target_modules": ["query", "value"],
            "task_type": "SEQ_CLS",
            "modules_to_save": ["pooler", "classifier"],
        },
    ),
    "bert-mlm": (
        "bert-mlm",
        {
            "target_modules": ["query", "dense"],
            "exclude_modules": ["pooler.dense"],
            "task_type": "SEQ_CLS",
            "modules_to_save": ["pooler", "classifier"],
        },
    ),
    "bert-tokens": (
        "bert-tokens",
        {"target_modules": ["query", "value"], "task_type": "TOKEN_CLS"},
    ),
    "bert-embeddings": (
        "bert",
        {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"},
    ),
    "bert-answers": ("bert-answers", {"target_modules": ["key"], "task_type": "QUESTION_ANS"}),
    "distilbert": ("distilbert", {"target_modules": ["q_lin", "lin1"], "task_type": "SEQ_CLS"}),
    "llama-classes": ("llama-classes", {"target_modules": QV, "task_type": "SEQ_CLS"}),
    "roberta": (
        "roberta",
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "use_dora": True},
    ),
    "roberta-mlm": (
        "roberta-mlm",
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "all"},
    ),
    "t5": ("t5", {"target_modules": ["q", "v", "wi", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "t5-dora": ("t5", {"target_modules": "all-linear", "use_dora": True}),
    "vit": (
        "vit",
        {"target_modules": ["q_proj", "v_proj", "projection"], "modules_to_save": ["classifier"]},
    ),
    "vit-bare": (
        "vit-bare",
        {"target_modules": ["q_proj", "fc1", "projection"], "modules_to_save": ["classifier"]},
    ),
    "vit-dora": (
        "vit",
        {"target_modules": ["q_proj", "o_proj", "projection"], "use_dora": True},
    ),
    "whisper": ("whisper", {"target_modules": [*QV, "out_proj", "fc1"]}),
    "whisper-dora": ("whisper", {"target_modules": [*QV, "fc2"], "use_dora": True}),
    "net": ("net", {"target_modules": NET, "r": 3}),
    "net-rslora": ("net", {"target_modules": NET, "r": 3, "use_rslora": True}),
    "net-dora": ("net", {"target_modules": NET, "r": 3, "use_dora": True}),
    "net-bias": ("net", {"target_modules": NET, "r": 3, "bias": "all"}),
    "net-lora-bias": ("net", {"target_modules": ["line", "image", "square"], "lora_bias": True}),
    "net-attention": ("net", {"target_modules": ["attention", "square"], "r": 3}),
    "net-saved": ("net", {"target_modules": ["square"], "modules_to_save": ["image", "head"]}),
}

# Trained with five tokens more than the base has.
Q = {"target_modules": ["q_proj"]}
GROWN = {
    "lora": ("llama", Q),
    "modules": ("llama", {**Q, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tokens": ("llama", {**Q, "trainable_token_indices": [48, 52, 3]}),
    "qwen3": ("qwen3", {**Q, "use_dora": True}),
    "tied": ("llama-tied", Q),
    "tied-modules": (
        "llama-tied",
        {**Q, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "tied-tokens": ("llama-tied", {**Q, "trainable_token_indices": [48, 52, 3]}),
    "tied-tokens-dict": (
        "llama-tied", {**Q, "trainable_token_indices": {"embed_tokens": [50, 2]}}
    ),
    "tied-tokens-type": (
        "llama-tied", {"kind": peft.TrainableTokensConfig, "token_indices": [49, 0]}
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "t5": ("t5", {"target_modules": ["q"]}),
}  # fmt: skip
