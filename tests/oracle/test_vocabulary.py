"""Embeddings and heads: tied ones, grown and cut vocabularies, trained tokens."""

import json

import peft
import pytest
import torch

from loratools import LoratoolsError, merge
from tests.oracle import models

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


@pytest.mark.parametrize("case", GROWN)
def test_a_grown_vocabulary_is_folded_and_the_config_follows(case, base, adapter, valid):
    name, options = GROWN[case]
    where, made = base(name), adapter(name, change=models.grown, **options)
    result = valid([made], where)
    config = json.loads((result.output / "config.json").read_text())
    assert config["vocab_size"] == models.VOCABULARY + 5
    folded = models.load_folded(name, result.output)
    models.same_tensors(folded.state_dict(), models.merged(name, where, made, models.grown))
    expected = models.outputs(name, models.served(name, where, made, models.grown))
    torch.testing.assert_close(models.outputs(name, folded), expected, atol=1e-5, rtol=1e-5)
