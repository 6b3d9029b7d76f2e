"""Folding one adapter gives PEFT's merged model, tensor for tensor, and loads where it belongs."""

import pytest
import torch
import transformers

from tests.oracle import models
from tests.oracle.cases import CASES


@pytest.mark.parametrize("case", CASES)
def test_a_fold_is_what_peft_merges(case, base, adapter, valid):
    name, options = CASES[case]
    where, made = base(name), adapter(name, **options)
    result = valid([made], where)
    expected = models.merged(name, where, made)
    folded = models.load_folded(name, result.output)
    models.same_tensors(folded.state_dict(), expected)
    logits = models.outputs(name, models.served(name, where, made))
    assert (logits - models.outputs(name, models.load(name, where))).abs().max() > 1e-3
    torch.testing.assert_close(models.outputs(name, folded), logits, atol=1e-5, rtol=1e-5)
    assert result.update_kept == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "case", [c for c, (_, o) in CASES.items() if o.get("task_type") == "SEQ_CLS"]
)
def test_a_folded_classifier_loads_by_its_config_alone(case, base, adapter, valid):
    name, options = CASES[case]
    where, made = base(name), adapter(name, **options)
    auto = transformers.AutoModelForSequenceClassification
    folded = auto.from_pretrained(valid([made], where).output).eval()
    assert folded.config.num_labels == models.MODELS[name].labels
    expected = models.outputs(name, models.served(name, where, made))
    torch.testing.assert_close(models.outputs(name, folded), expected, atol=1e-5, rtol=1e-5)
