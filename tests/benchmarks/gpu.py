"""The figures for a machine with a CUDA device: the fold there, against the CPU and the bus."""

from __future__ import annotations

import os
import shutil

from tests.benchmarks.figures import _adapter, _base
from tests.benchmarks.latency import onnx
from tests.benchmarks.measuring import WORK, Row, best, child, warm

FOLD = (
    "import sys, time, torch, numpy, loratools\n"
    "from loratools.commands import merge, folded, numbers\n"
    "if sys.argv[4] == 'cuda':\n    torch.zeros(1, device='cuda')\n"
    "t = time.perf_counter()\n"
    "loratools.merge([sys.argv[1]], sys.argv[2], out=sys.argv[3], device=sys.argv[4])\n"
    "RESULT = {'seconds': time.perf_counter() - t}"
)


def fold() -> list[Row]:
    """The fold of the main job with --device cuda and --device cpu, and whether they agree."""
    import torch

    base, adapter = _base(), _adapter()
    warm(base)
    seconds = {}
    for device in ("cpu", "cuda"):
        out = WORK / f"folded-{device}"
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        seconds[device] = child(FOLD, adapter, base, out, device)["seconds"]
    worst = _ulps(WORK / "folded-cpu", WORK / "folded-cuda")
    for device in seconds:
        shutil.rmtree(WORK / f"folded-{device}")
    name = torch.cuda.get_device_name()
    return [
        Row(
            "fold on a GPU",
            f"{seconds['cuda']:.1f} s on {name}",
            f"CPU: {seconds['cpu']:.1f} s; largest difference {worst} ulp",
            f"{seconds['cpu'] / seconds['cuda']:.2f} x",
            "0 ulp",
            worst == 0,
        )
    ]


def bus() -> list[Row]:
    """What the bus carries both ways at once from pinned memory: the limit of any GPU fold."""
    import torch

    size = 1 << 28
    there = torch.empty(size, dtype=torch.uint8, device="cuda")
    here = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    back = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            there.copy_(here, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            back.copy_(there, non_blocking=True)
        torch.cuda.synchronize()

    seconds = best(both, 10)
    rate = size / seconds / 1e9
    base = sum(p.stat().st_size for p in _base().glob("*.safetensors"))
    return [
        Row(
            "bus",
            f"{rate:.1f} GB/s each way",
            f"the fold's {base / 1e9:.1f} GB at that rate: {base / rate / 1e9:.2f} s",
            "-",
            "-",
        )
    ]


def _ulps(first: object, second: object) -> int:
    """The largest distance of two folders' bfloat16 tensors, in units of the last place."""
    from pathlib import Path

    import torch
    from safetensors import safe_open

    worst = 0
    for path in sorted(Path(str(first)).glob("*.safetensors")):
        with (
            safe_open(path, "pt") as a,
            safe_open(Path(str(second)) / path.name, "pt") as b,
        ):
            for key in a.keys():  # noqa: SIM118 - safe_open is no mapping
                x, y = (t.get_tensor(key).view(torch.int16).int() for t in (a, b))
                # Order the patterns as the numbers are ordered: negative ones run backwards.
                x, y = (torch.where(v < 0, -32768 - v, v) for v in (x, y))
                worst = max(worst, int((x - y).abs().max()))
    return worst


FIGURES = {"fold": fold, "bus": bus, "onnx": onnx}
