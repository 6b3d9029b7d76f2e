"""Environments of programs whose pins contradict ours, one file each; built by `make oracles`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent
TORCH = "torch==2.13.0"


def folder() -> Path:
    """Where the environments stand."""
    said = os.environ.get("LORATOOLS_ORACLES")
    return Path(said) if said else Path.home() / ".cache" / "loratools" / "oracles"


def python(name: str) -> Path | None:
    """The interpreter of an environment; None where it was not built."""
    there = folder() / name / "bin" / "python"
    return there if there.exists() else None


def names() -> tuple[str, ...]:
    """The environments that this package can build."""
    return tuple(sorted(p.stem for p in ROOT.glob("*.py") if not p.stem.startswith("_")))


def venv(target: Path, *requirements: str) -> None:
    """A virtual environment with these packages, by the pip settings of the machine."""
    subprocess.run([sys.executable, "-m", "venv", str(target)], check=True)
    pip = [str(target / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *requirements], check=True)


def run(name: str, script: str, *arguments: str | Path) -> None:
    """Run a script by an environment's own Python; what it says is shown where it fails."""
    there = python(name)
    assert there is not None, f"no environment {name}: run `make oracles`"
    settings = {"HOME", "PATH", "TMPDIR", "LANG", "SYSTEMROOT"}
    kept = {key: value for key, value in os.environ.items() if key in settings}
    done = subprocess.run(
        [str(there), "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, f"{name}:\n{done.stdout}\n{done.stderr}"
