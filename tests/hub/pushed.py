"""What the tests of `push` share: an adapter, the call, and what the Hub holds afterwards."""

from pathlib import Path

import pytest

import loratools
from loratools.errors import LoratoolsError

NAMES = {"adapter_config.json", "adapter_model.safetensors"}
PLAIN = ("--card", "none")


def push(path, repo="me/style", **options):
    return loratools.push(path, repo, **{"card": "none", **options})


def refused(code: str, *arguments, **options) -> LoratoolsError:
    with pytest.raises(LoratoolsError) as caught:
        push(*arguments, **options)
    assert caught.value.code == code, caught.value.message
    return caught.value


def held(hub, repo="me/style", revision="main") -> dict[str, bytes]:
    files = hub.repos[repo].at(revision).files
    return {name: blob.content for name, blob in files.items() if name != ".gitattributes"}


def commits(hub, repo="me/style") -> int:
    """Those after the one that a repository begins with."""
    return len(hub.repos[repo].commits) - 1


def local(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def changes(hub) -> list[str]:
    """The requests that were to change something."""
    return [a.url for a in hub.asked("PUT|POST|DELETE") if "validate-yaml" not in a.url]


def downloaded(hub, folder: Path, repo="me/style") -> Path:
    for name, content in held(hub, repo).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
