"""llama.cpp itself: its converters, its own fold of adapters, and its runtime as a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from tests.environments import TORCH, venv

SOURCE = "llama-cpp-python==0.3.36"  # its source package carries the tree of llama.cpp
PROGRAM = "llama-export-lora"
PACKAGES = (
    TORCH,
    "transformers==4.57.6",  # what the converters ask for
    "sentencepiece",
    "protobuf",
    "pyyaml",
    "xllamacpp==2026.10.11549",
    "cmake<5",
    "ninja",
)
# The program runs on matrices of some kilobytes: what counts is that it is built soon.
OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "CMAKE_C_FLAGS_RELEASE=-O1",
    "CMAKE_CXX_FLAGS_RELEASE=-O0",
    "BUILD_SHARED_LIBS=OFF",
    "GGML_NATIVE=OFF",
    "GGML_OPENMP=OFF",
    "LLAMA_OPENSSL=OFF",
    "LLAMA_BUILD_APP=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_SERVER=OFF",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_UI=OFF",
    "LLAMA_USE_PREBUILT_UI=OFF",
)


def build(folder: Path) -> None:
    """A venv, with `llama.cpp/` (the tree, for its converters) and `bin/llama-export-lora`."""
    venv(folder, *PACKAGES)
    unpack(folder)
    built = folder / "built"
    compile_program(folder, built)
    (built / "bin" / PROGRAM).rename(folder / "bin" / PROGRAM)
    shutil.rmtree(built)


def unpack(folder: Path) -> None:
    """The tree of llama.cpp out of the source package."""
    sdist = folder / "sdist"
    wanted = ("--no-binary", "llama-cpp-python", "--no-deps", "--dest", sdist)
    run(folder / "bin" / "python", "-m", "pip", "download", "--quiet", *wanted, SOURCE)
    (archive,) = sdist.glob("*.tar.gz")
    front = archive.name.removesuffix(".tar.gz") + "/vendor/"
    with tarfile.open(archive) as file:
        members = [m for m in file.getmembers() if m.name.startswith(front + "llama.cpp/")]
        for member in members:
            member.name = member.name.removeprefix(front)
        file.extractall(folder, members, filter="data")
    shutil.rmtree(sdist)


def compile_program(folder: Path, built: Path) -> None:
    """The one program that is not in any wheel: six minutes on one core."""
    cmake, ninja = folder / "bin" / "cmake", folder / "bin" / "ninja"
    flags = [f"-D{option}" for option in (*OPTIONS, f"CMAKE_MAKE_PROGRAM={ninja}")]
    run(cmake, "-S", folder / "llama.cpp", "-B", built, "-G", "Ninja", *flags)
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2")
    run(cmake, "--build", built, "--target", PROGRAM, "--parallel", jobs)


def run(*command: str | Path) -> None:
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    subprocess.run([str(c) for c in command], check=True, **quiet)
