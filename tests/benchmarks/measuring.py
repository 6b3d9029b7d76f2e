"""How figures are measured: in turn, medians of ratios, whole processes with their peak memory."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORK = Path(os.environ.get("LORATOOLS_BENCH", Path.home() / ".cache" / "loratools" / "bench"))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    figure: str
    ours: str
    against: str
    ratio: str
    wanted: str
    ok: bool | None = None


def in_turn(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int
) -> tuple[float, float, float]:
    """Medians of ours, of theirs, and of theirs/ours, measured A/B/A/B."""
    pairs = [(theirs(), ours()) for _ in range(rounds)]
    return (
        statistics.median(o for _, o in pairs),
        statistics.median(t for t, _ in pairs),
        statistics.median(t / o for t, o in pairs),
    )


def clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best(work: Callable[[], object], repeats: int) -> float:
    return min(clock(work) for _ in range(repeats))


def child(code: str, *arguments: object) -> dict[str, float]:
    """Run Python code in a process of its own; what it prints as JSON last, its time and peak."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    # Bytecode is there, as an installed package has it, whatever the machine's setting.
    environment["PYTHONPYCACHEPREFIX"] = str(WORK / "bytecode")
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    script = code + (
        "\nimport json, re\nfrom pathlib import Path\n"
        # not ru_maxrss, which begins with what the parent had
        "status = Path('/proc/self/status').read_text()\n"
        "peak = int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) / 1024\n"
        "print(json.dumps({**globals().get('RESULT', {}), 'peak_mib': peak}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    wall = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "wall": wall}


def copy_and_sync(source: Path, to: Path, prepare: Callable[[Path], None] | None = None) -> float:
    """`cp -r` of a folder followed by `sync`; the copy is removed again."""
    shutil.rmtree(to, ignore_errors=True)
    os.sync()
    (prepare or warm)(source)
    seconds = clock(
        lambda: subprocess.run(f"cp -r '{source}' '{to}' && sync", shell=True, check=True)
    )
    shutil.rmtree(to)
    return seconds


def warm(folder: Path) -> None:
    """Bring a folder's files into the page cache, so that both sides read from memory.

    Before each run: a host that wants its memory back takes files out of the cache meanwhile.
    """
    for path in folder.iterdir():
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass


def cold(folder: Path) -> None:
    """Take a folder's files out of the page cache, so that both sides read from the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def machine() -> str:
    """The machine in words, for the table's last line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"{platform.machine()}, {cores} cores, load {load:.1f}, Python {platform.python_version()}"
    )
