"""The test Hub with a home of its own: for the command line in a child, and for this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import WRITE, HubServer

ROOT = Path(__file__).parents[1]
PROGRAM = "import sys; from loratools.cli import main; sys.exit(main())"
UNSET = (
    "HF_OIDC_RESOURCE HUGGING_FACE_HUB_TOKEN HF_TOKEN_PATH HF_HUB_CACHE HUGGINGFACE_HUB_CACHE "
    "HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_XET_CACHE HF_ASSETS_CACHE "
    "HF_HUB_DISABLE_IMPLICIT_TOKEN HUGGINGFACE_CO_STAGING HF_HUB_ENABLE_HF_TRANSFER "
    "HF_STORED_TOKENS_PATH no_proxy"
).split()


@dataclass
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        table = json.loads(self.out)
        assert table["schema"] == 1
        return table


class Hub(HubServer):
    """The server, with the environment in which the real client finds it."""

    def __init__(self, home: Path, **options: Any) -> None:
        super().__init__(**options)
        self.home = home
        self.cache = home / "hub"

    def env(self, token: str | None = WRITE, **more: str | None) -> dict[str, str]:
        """The environment of a child; None takes a variable away."""
        said = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "80",
            **more,
        }
        kept = {k: v for k, v in os.environ.items() if k not in UNSET and k not in said}
        return kept | {k: v for k, v in said.items() if v is not None}

    def cli(
        self,
        *arguments: str | Path,
        token: str | None = WRITE,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        stdin: str | None = None,
        timeout: float = 120,
    ) -> Ended:
        """`loratools ...` in a child that knows this Hub; its output never shows a token."""
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            env=self.env(token, **(env or {})),
            cwd=cwd,
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        for known in self.tokens:
            assert known not in ended.stdout + ended.stderr, "the output shows a token"
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def start_cli(self, *arguments: str | Path, **env: str | None) -> subprocess.Popen[str]:
        """The same, and it is not waited for."""
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            env=self.env(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes this process use this Hub: sets anew what the client read when imported."""
        from huggingface_hub import constants

        unset(monkeypatch)
        for name, held in self.env().items():
            if name.startswith(("HF_", "NO_PROXY")):
                monkeypatch.setenv(name, held)
        point_to(self.url, monkeypatch)
        for name, held in {
            "HF_URL_HOSTS": constants.HF_URL_HOSTS | {"127.0.0.1"},
            "HF_HOME": str(self.home),
            "HF_HUB_CACHE": str(self.cache),
            "HF_XET_CACHE": str(self.home / "xet"),
            "HF_TOKEN_PATH": str(self.home / "token"),
            "HF_STORED_TOKENS_PATH": str(self.home / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(self.home / ".agent_harnesses.json"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(constants, name, held)


def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away what this machine, or another test module when it was imported, says of the Hub.

    The library read it once: offline mode stays on until its constant is set back.
    """
    from huggingface_hub import constants

    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process take this for the Hub."""
    from huggingface_hub import constants

    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextmanager
def running(home: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Hub]:
    """A Hub that this process and its children use until the end of the block."""
    from huggingface_hub import close_session

    with Hub(home, **options) as hub:
        hub.here(monkeypatch)
        close_session()  # its connections and its view of the proxies were another test's
        yield hub
    close_session()
