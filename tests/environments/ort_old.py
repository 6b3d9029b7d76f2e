"""Old onnxruntimes, one folder each beside one interpreter: what the table of runtimes says."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.environments import venv

# Folder → release; together they have every row of opset 19 to 23.
RELEASES = {
    "1.16": "1.16.3",
    "1.17": "1.17.3",
    "1.20": "1.20.1",
    "1.22": "1.22.1",
    "1.23": "1.23.2",
}
# numpy 1.26 serves them all: those before 1.19 were built against numpy 1
PACKAGES = ("numpy==1.26.4", "protobuf<5", "flatbuffers", "packaging", "coloredlogs", "sympy")


def build(folder: Path) -> None:
    """One venv, and `runtimes/<release>/` with each wheel alone."""
    venv(folder, *PACKAGES)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps"]
    for name, release in RELEASES.items():
        target = folder / "runtimes" / name
        wheel = f"onnxruntime=={release}"
        subprocess.run([*pip, "--target", str(target), wheel], check=True)
