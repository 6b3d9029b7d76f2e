"""Embeddings and heads: tied ones, grown and cut vocabularies, trained tokens."""

import json
import shutil

import pytest
import torch

from loratools import LoratoolsError, merge
from tests.oracle import models
from tests.oracle.cases import GROWN, Q


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


def test_rows_that_only_the_embedding_has_are_refused(base, adapter, tmp_path):
    """PEFT saves a targeted, resized embedding and leaves the resized head out."""
    options = {"target_modules": ["q_proj", "embed_tokens"]}
    made = adapter("llama", change=models.grown, **options)
    with pytest.raises(LoratoolsError, match="would have 53 rows") as refused:
        merge([made], base("llama"), out=tmp_path / "out")
    assert refused.value.code == "vocabulary"
    assert not (tmp_path / "out").exists()


TIED = {
    "embedding": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding-dora": ("llama-tied", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding-module": ("llama-tied", {**Q, "modules_to_save": ["embed_tokens"]}),
    "gpt2": ("gpt2", {"target_modules": ["wte"]}),
    "whisper": ("whisper", {"target_modules": ["q_proj", "proj_out"]}),
    "t5": ("t5", {"target_modules": ["q", "lm_head"]}),
}


@pytest.mark.parametrize("case", TIED)
def test_one_side_of_a_tied_pair_has_to_be_asked_about(case, base, adapter, valid, tmp_path):
    name, options = TIED[case]
    where, made = base(name), adapter(name, **options)
    with pytest.raises(LoratoolsError, match="one tensor in the base") as refused:
        merge([made], where, out=tmp_path / "out")
    assert refused.value.code == "tied"
    assert refused.value.exit == 5
    assert "--untie" in refused.value.problems[0].advice
    if "modules_to_save" not in options:  # PEFT leaves such a copy to the embedding alone
        both = models.load_folded(name, valid([made], where, tied=True).output)
        models.same_tensors(both.state_dict(), models.merged(name, where, made))
    apart = valid([made], where, untie=True).output
    assert not json.loads((apart / "config.json").read_text())["tie_word_embeddings"]
    found = models.outputs(name, models.load_folded(name, apart))
    expected = models.outputs(name, models.served(name, where, made))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - models.outputs(name, models.load(name, where))).abs().max() > 1e-3


def test_a_tied_pair_trained_as_one_needs_no_word(base, adapter, valid):
    options = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    where, made = base("llama-tied"), adapter("llama-tied", **options)
    folded = models.load_folded("llama-tied", valid([made], where).output)
    expected = models.outputs("llama-tied", models.served("llama-tied", where, made))
    torch.testing.assert_close(models.outputs("llama-tied", folded), expected, atol=1e-5, rtol=1e-5)


def test_an_untied_t5_still_scales_as_its_old_config_meant(base, adapter, valid, tmp_path):
    """Before transformers 5 no config said so; tie_word_embeddings stood for it."""
    old = shutil.copytree(base("t5"), tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["scale_decoder_outputs"], config["tie_word_embeddings"]
    (old / "config.json").write_text(json.dumps(config))
    made = adapter("t5", target_modules=["q", "lm_head"])
    folded = models.load_folded("t5", valid([made], old, untie=True).output)
    expected = models.outputs("t5", models.served("t5", old, made))
    torch.testing.assert_close(models.outputs("t5", folded), expected, atol=1e-5, rtol=1e-5)
