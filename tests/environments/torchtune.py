"""torchtune, which needs a torchao older than ours."""

from __future__ import annotations

from pathlib import Path

from tests.environments import TORCH, venv


def build(folder: Path) -> None:
    """torchtune 0.6.1 with torch 2.13."""
    venv(folder, TORCH, "torchtune==0.6.1", "torchao<0.10", "safetensors==0.8.0")
