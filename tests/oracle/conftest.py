"""What the tests against PEFT share: bases and adapters, made once, and a count of refusals."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn

from loratools import LoratoolsError, merge
from loratools.commands.merge import MergeResult
from tests.oracle import models


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a base by its name in MODELS."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("bases")

    def find(name: str) -> Path:
        if name not in made:
            made[name] = models.save_base(name, root / name)
        return made[name]

    return find


@pytest.fixture(scope="session")
def adapter(
    base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The folder of an adapter that PEFT saved: LoraConfig's options, trained on a base."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("adapters")
    count = itertools.count()

    def find(
        name: str,
        *,
        seed: int = 0,
        change: Callable[[nn.Module], Any] = models.nothing,
        kind: type[peft.PeftConfig] = peft.LoraConfig,
        dtype: Any = None,
        **options: Any,
    ) -> Path:
        key = repr((name, seed, change, kind, dtype, sorted(options.items())))
        if key not in made:
            config = kind(**options)
            model = models.trained(name, base(name), config, seed=seed, change=change)
            if dtype is not None:
                model.to(dtype)
            made[key] = root / f"{next(count)}-{name}"
            model.save_pretrained(made[key])
        return made[key]

    return find


@dataclass
class Counted:
    """Valid folds and merges of the session, and those that loratools refused."""

    done: int = 0
    refused: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def counted():
    """Asserts at the end that no valid input was refused; none of them had an `allow`."""
    count = Counted()
    yield count
    assert count.refused == []


@pytest.fixture
def valid(counted: Counted, tmp_path: Path) -> Callable[..., MergeResult]:
    """`merge` of valid input into a new folder: it must need no waiver and raise no warning."""
    number = itertools.count()

    def run(adapters: list[Path], base: Path | None = None, **options: Any) -> MergeResult:
        assert "allow" not in options
        out = tmp_path / f"out{next(number)}"
        try:
            result = merge(adapters, base, **{"out": out, "hash": "none"} | options)
        except LoratoolsError as error:
            counted.refused.append(str(error))
            raise
        counted.done += 1
        assert [p.message for p in result.problems if p.severity != "note"] == []
        return result

    return run
