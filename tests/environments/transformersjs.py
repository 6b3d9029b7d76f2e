"""transformers.js in Node, from npm; `bin/python` is the interpreter that starts it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = "@huggingface/transformers@4.3.1"


def build(folder: Path) -> None:
    """`node_modules/`; none of the packages' own scripts is run."""
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("there is no npm")
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)]
    subprocess.run([npm, "install", *options, PACKAGE], check=True, **quiet)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
