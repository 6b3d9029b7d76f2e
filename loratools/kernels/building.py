"""Builds the kernels while loratools is installed; without a compiler the installation goes on."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MACHINES = ("x86_64", "amd64", "aarch64", "arm64")  # where a double is neither more nor less
FLAGS = ("-O3", "-ffp-contract=fast", "-fPIC", "-shared")
WAYS = ((), ("-DONE_MACHINE",))  # older compilers cannot build for several machines at once


def build(folder: Path) -> Path:
    """Compile `fold.c` in its folder, under a name that says of which text it is.

    Raises RuntimeError with the compiler's last words, or that there is none.
    """
    source = folder / "fold.c"
    made = folder / f"fold-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    here = platform.machine().lower()
    if os.name != "posix" or sys.byteorder != "little" or here not in MACHINES:
        raise RuntimeError(f"not for {sys.platform} on {here}")
    if compiler is None:
        raise RuntimeError("no C compiler: cc, gcc or clang")
    said = ""
    for way in WAYS:
        fresh = made.with_suffix(f".{os.getpid()}")
        command = [*compiler.split(), *FLAGS, *way, "-o", str(fresh), str(source), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stderr.strip()[-500:]
        try:
            if done.returncode == 0:
                ctypes.CDLL(str(fresh))
                for old in folder.glob("fold-*.so"):
                    old.unlink()
                fresh.rename(made)
                return made
        except OSError as problem:
            said = str(problem)
        finally:
            fresh.unlink(missing_ok=True)
    raise RuntimeError(said or f"{compiler} made nothing")


class Hook(BuildHookInterface):  # type: ignore[type-arg]
    """What hatchling calls before it makes a wheel, or an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if os.environ.get("LORATOOLS_PURE"):  # a wheel for every machine
            return
        try:
            build(Path(self.root) / "loratools" / "kernels")
        except (OSError, RuntimeError) as problem:
            self.app.display_warning(f"no compiled folds, torch does them slower: {problem}")
            return
        build_data["artifacts"].append("loratools/kernels/fold-*.so")
        build_data["pure_python"] = False
        here = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{here}"
