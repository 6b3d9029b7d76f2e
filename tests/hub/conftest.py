"""An adapter to publish, and the command line in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest

from loratools.cli import main
from tests.hub_fixture import Ended
from tests.tiny import write_adapter


@pytest.fixture
def adapter(tmp_path) -> Path:
    write_adapter(tmp_path / "lora", 1)
    return tmp_path / "lora"


@pytest.fixture
def run(capsys, hub) -> Callable[..., Ended]:
    """The command line, called in this process; its output never shows a token."""

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        said = capsys.readouterr()
        for known in hub.tokens:
            assert known not in said.out + said.err
        return Ended(status, said.out, said.err)

    return call
