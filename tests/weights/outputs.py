"""Outputs as the tests of publishing make and read them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import LoratoolsError
from loratools.weights.publishing import Output, publish

OLD = {"adapter_config.json": "old", "gone.safetensors": "old", "loratools.json": "old"}
NEW = {"adapter_config.json": "new", "loratools.json": "new", "unet/w.safetensors": "new" * 99}
PLAN = "9f3a"


def put(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def seen(folder: Path) -> dict[str, str] | None:
    """What a reader finds: every file's text, empty folders too; None where there is nothing."""
    if not folder.is_dir():
        return None
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir():
            found[name] = path.read_text()
        elif not any(path.iterdir()):
            found[name] = "empty"
    return found


def path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def within(name: str, files: dict[str, str]) -> dict[str, str]:
    """The same files, seen from one folder above."""
    return {f"{name}/{file}": text for file, text in files.items()}


def fill(output: Output) -> None:
    """Writes what is not finished yet, each file finished in turn."""
    for name, text in NEW.items():
        if name not in output.finished:
            put(output.folder, {name: text})
            output.finish(name, f"digest of {text}")


def make(out: Path, block: Callable[[Output], object] = fill, **options: Any) -> Output:
    """A whole run."""
    with publish(out, **options) as output:
        block(output)
    return output


def refused(out: Path, kind: type[LoratoolsError], code: str, **options: Any) -> str:
    """The message with which publishing is refused before the block runs."""
    with pytest.raises(kind) as caught:
        make(out, lambda _: pytest.fail("the block ran"), **options)
    assert caught.value.code == code
    assert "\n" not in caught.value.message
    return caught.value.message
