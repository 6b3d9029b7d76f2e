"""`python -m tests.environments FOLDER [NAME...]`: builds the environments that are absent."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.environments import names


def build(folder: Path, name: str) -> str:
    """Build one environment unless it stands; the line that says what happened."""
    target = folder / name
    if target.exists():
        return f"{name}: kept {target}"
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
    try:
        importlib.import_module(f"tests.environments.{name}").build(beside)
        beside.chmod(0o755)
        beside.rename(target)
    except (OSError, subprocess.CalledProcessError) as problem:
        return f"{name}: failed, {problem}"
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return f"{name}: built {target}"


def main(arguments: list[str]) -> int:
    """Build what was asked for, all without names; the number of failures is the exit status."""
    if not arguments:
        print("usage: python -m tests.environments FOLDER [NAME...]")
        return 2
    folder, wanted = Path(arguments[0]).expanduser().absolute(), arguments[1:] or list(names())
    unknown = [name for name in wanted if name not in names()]
    if unknown:
        print(f"no environment named {', '.join(unknown)}; there are {', '.join(names())}")
        return 2
    failures = 0
    for name in wanted:
        line = build(folder, name)
        print(line, flush=True)
        failures += ": failed" in line
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
