"""Where a fold is computed: the only place that chooses devices, and the memory that it reuses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loratools.adapter import Kind, LowRank
from loratools.errors import error, shown
from loratools.plan import Plan

ARITHMETIC_BOUND = 256  # total rank above which a GPU gains more than the bus costs


@dataclass(slots=True)
class Desk:
    """What one thread works on: its device and its reused buffers."""

    device: torch.device
    buffers: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)
    views: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)  # the last of each
    stream: torch.cuda.Stream | None = None

    def room(self, use: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A buffer of the shape of `like`; it is the same memory at every call."""
        key = (use, dtype)
        view = self.views.get(key)
        if view is None or view.shape != like.shape:
            flat = self.buffers.get(key)
            if flat is None or flat.numel() < like.numel():
                flat = torch.empty(like.numel(), dtype=dtype, device=self.device)
                self.buffers[key] = flat
            view = self.views[key] = flat[: like.numel()].view(like.shape)
        return view

    def raw(self, nbytes: int) -> Tensor:
        """Memory on the CPU into which bytes are read, the same at every call; pinned for a GPU."""
        key = ("read", torch.uint8)
        held = self.buffers.get(key)
        if held is None or held.numel() < nbytes:
            pinned = self.device.type == "cuda"
            held = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
            self.buffers[key] = held
        return held[:nbytes]

    def home(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU; from a GPU through pinned memory that the next call reuses."""
        if self.device.type == "cpu":
            return tensor
        key = ("home", tensor.dtype)
        host = self.buffers.get(key)
        if host is None or host.numel() < tensor.numel():
            host = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)
            self.buffers[key] = host
        there = host[: tensor.numel()].view(tensor.shape)
        there.copy_(tensor, non_blocking=True)
        self.wait()
        return there

    def wait(self) -> None:
        """Returns when a GPU has done what it was given so far."""
        if self.device.type != "cpu":
            torch.cuda.current_stream(self.device).synchronize()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Without autograd, and on a GPU in a stream of this desk, so that threads overlap."""
        with torch.inference_mode(), _gradual():
            if self.device.type == "cpu":
                yield
                return
            if self.stream is None:
                self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self.stream):
                yield


def choose_device(name: str, plan: Plan) -> torch.device:
    """The device for `--device auto|cpu|cuda[:N]`.

    A low-rank fold moves 4 bytes for every 2·rank flops: below a total rank of some hundreds the
    disk or the bus bounds it, and `auto` stays on the CPU.
    """
    if name == "auto":
        ranks = [sum(_rank(t.delta) for t in target.terms) for target in plan.targets.values()]
        heavy = max(ranks, default=0) >= ARITHMETIC_BOUND
        return torch.device("cuda" if heavy and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise error("usage", f"--device {shown(name)}: expected auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise error("usage", f"--device {shown(name)}: float64 sums need cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise error("usage", f"--device {shown(name)}: this machine has no usable CUDA device")
    return device


def _rank(delta: Kind) -> int:
    return delta.rank if isinstance(delta, LowRank) else 0


@contextmanager
def _gradual() -> Iterator[None]:
    """With the numbers below the normal range, which a process may have turned off in its threads
    (`torch.set_flush_denormal`): small weights of float16 are such numbers on their way.
    """
    least = sys.float_info.min
    flushed = least * 0.5 == 0
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(True)


@contextmanager
def one_thread() -> Iterator[None]:
    """One BLAS thread for each of ours: more of them fight over the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.inference_mode(), _gradual():
            yield
    finally:
        torch.set_num_threads(before)
        torch.backends.cuda.matmul.allow_tf32 = matmul
