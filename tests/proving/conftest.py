"""Bases, adapters and folds that the tests of proofs share, each made once."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.proving import models


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made(kind, **how)`: the folder of a base, an adapter or a fold of PEFT's, made only once."""
    root, count = tmp_path_factory.mktemp("made"), itertools.count()
    known: dict[str, Path] = {}

    def make(kind: Callable[..., Path], *args: Any, **options: Any) -> Path:
        key = repr((kind.__name__, args, sorted(options.items())))
        if key not in known:
            known[key] = root / f"{next(count)}"
            kind(*args, known[key], **options)
        return known[key]

    return make


@pytest.fixture(scope="session")
def base(made: Callable[..., Path]) -> Callable[..., Path]:
    def find(name: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> Path:
        return made(models.save_base, name, dtype=dtype, seed=seed)

    return find


@pytest.fixture(scope="session")
def adapter(made: Callable[..., Path], base: Callable[..., Path]) -> Callable[..., Path]:
    def find(name: str, **options: Any) -> Path:
        return made(models.train, name, base(name), **options)

    return find


@pytest.fixture(scope="session")
def folded(made: Callable[..., Path]) -> Callable[..., Path]:
    def find(name: str, over: Path, adapters: list[Path], **options: Any) -> Path:
        return made(models.fold, name, over, adapters, **options)

    return find
