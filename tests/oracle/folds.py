"""An adapter that a test has read itself, folded: a plan of it alone, tensor by tensor."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from loratools import fold_tensors
from loratools.adapter import Adapter
from loratools.bind import bind
from loratools.errors import refusal
from loratools.weights.base import headers


def fold(adapter: Adapter, base: Path) -> dict[str, torch.Tensor]:
    """All tensors of a base with one adapter folded in; what the plan refuses is raised."""
    plan = bind([adapter], headers(base))
    refused = refusal(plan.problems)
    if refused is not None:
        raise refused
    file = base / "model.safetensors" if base.is_dir() else base
    whole = load_file(file)

    class Tensors:
        def keys(self):
            return whole.keys()

        def get_tensor(self, name):
            return whole[name]

    return dict(fold_tensors(Tensors(), plan))
