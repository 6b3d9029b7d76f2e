"""The environments of `make oracles`: each appears whole or not at all, and is built once."""

import subprocess
import sys
import types

import pytest

from tests.environments import __main__ as command
from tests.environments import names


@pytest.fixture
def built(monkeypatch):
    """A stand-in environment `torchtune` that counts how often it is built."""
    times = []

    def build(folder):
        times.append(folder)
        (folder / "bin").mkdir()
        if len(times) == 1:
            raise subprocess.CalledProcessError(1, ["pip"])

    module = types.SimpleNamespace(build=build)
    monkeypatch.setitem(sys.modules, "tests.environments.torchtune", module)
    return times


def test_a_failed_one_leaves_nothing_and_a_built_one_is_kept(built, tmp_path, capsys):
    there = tmp_path / "oracles"
    for status in (1, 0, 0):
        assert command.main([str(there), "torchtune"]) == status
        assert [p.name for p in there.iterdir()] == ["torchtune"] * (status == 0)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said] == [
        ["torchtune:", "failed,"], ["torchtune:", "built"], ["torchtune:", "kept"],
    ]  # fmt: skip
    assert len(built) == 2


def test_what_it_is_asked_for(tmp_path, capsys):
    assert command.main([]) == 2
    assert command.main([str(tmp_path), "nothing"]) == 2
    assert "no environment named nothing" in capsys.readouterr().out
    assert {"adapters", "litgpt", "torchtune"} <= set(names())
