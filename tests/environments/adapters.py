"""AdapterHub's adapters, which pins its transformers."""

from __future__ import annotations

from pathlib import Path

from tests.environments import TORCH, venv


def build(folder: Path) -> None:
    """adapters 1.3.0 with transformers 4.57 and torch 2.13."""
    venv(folder, TORCH, "adapters==1.3.0", "transformers==4.57.6", "safetensors==0.8.0")
