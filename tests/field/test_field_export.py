"""A model that was trained: its story comes out of onnxruntime word for word."""

import json

import numpy as np
import onnxruntime
import pytest

import loratools
from tests.exporting.parity_table import PROVEN, REAL
from tests.exporting.three_ways import three_ways


def test_stories260k_tells_its_story(field_data, tmp_path):
    folder = field_data / "adapters_and_models" / "stories260k-hf"
    due = json.loads((folder / "greedy_expected.json").read_bytes())
    result = loratools.export(folder, out=tmp_path / "o", exporter="legacy")
    assert result.parity["ok"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        tmp_path / "o" / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    past = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_key_values")
    }
    names = [o.name for o in session.get_outputs()]
    tokens = list(due["prompt_ids"])
    new = np.array([tokens])
    while len(tokens) < len(due["greedy_ids"]):
        feeds = {
            "input_ids": new, "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens))[None, -new.shape[1] :],
        }  # fmt: skip
        found = dict(zip(names, session.run(None, {**feeds, **past}), strict=True))
        past = {n: found[n.replace("past_key_values", "present")] for n in past}
        new = found["logits"][:, -1:].argmax(-1)
        tokens.append(int(new[0, 0]))
    assert tokens == due["greedy_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("exporter", PROVEN["stories260k"])
def test_stories260k_folded_and_folded_in_the_graph(exporter, field_data, tmp_path):
    folder = field_data / "adapters_and_models" / "stories260k-hf"
    three_ways("stories260k", folder, REAL["stories260k"], exporter, tmp_path)
