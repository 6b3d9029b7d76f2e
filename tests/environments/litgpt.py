"""litgpt, which needs a numpy older than ours."""

from __future__ import annotations

from pathlib import Path

from tests.environments import TORCH, venv


def build(folder: Path) -> None:
    """litgpt 0.5.9 with torch 2.13."""
    venv(folder, TORCH, "litgpt==0.5.9", "safetensors==0.8.0")
