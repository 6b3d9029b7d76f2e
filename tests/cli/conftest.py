"""A folder with two adapters and their base, and a way to call the command line."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loratools.cli import main
from tests.tiny import write_adapter, write_base


@dataclass
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        table = json.loads(self.out)
        assert next(iter(table)) == "schema"
        assert table["schema"] == 1
        return table


Run = Callable[..., Ended]


@pytest.fixture
def run(capsys, monkeypatch) -> Run:
    """The command line, called in this process on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str) -> Ended:
        capsys.readouterr()
        status = main(list(arguments))
        said = capsys.readouterr()
        return Ended(status, said.out, said.err)

    return call


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working folder: adapters a and b, and their base."""
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "a", 1)
    write_adapter(tmp_path / "b", 2)
    write_base(tmp_path / "base")
    return tmp_path
