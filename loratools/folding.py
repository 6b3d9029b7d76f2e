"""The one loop that carries out a plan over base weights; the only place that chooses devices.

Each target is read once and written once, in tiles of whole rows on a fixed grid, computed in
float64 and rounded once. Threads take targets; what a tile's bytes are never depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from loratools.adapter import Experts, Kind, Leaf, LowRank
from loratools.algebra import (
    block,
    combine,
    condense,
    grown,
    held,
    map_leaves,
    matrix,
    prepare,
)
from loratools.errors import error, shown
from loratools.narrowing import narrow, not_finite
from loratools.plan import Plan, Target
from loratools.rewriting import as_stored
from loratools.stored import Rows as Rows
from loratools.stored import extents as extents
from loratools.stored import fitting_scale, scale_of, times
from loratools.stored import leaf_rows as leaf_rows
from loratools.stored import torch_dtype as torch_dtype
from loratools.truncating import truncate, truncate_stack

# Elements of a CPU tile: few enough for the caches of a core, enough that Python's share is small.
TILE = 1 << 19
# Of a large tensor every so many rows are measured for `update_kept`: looking at all of them would
# take a third of a fold's time.
COUNTED = 16
SMALL = 1 << 16  # elements of a tensor all of whose rows are measured
DEVICE_TILE = 1 << 24  # a GPU wants work in larger portions
ARITHMETIC_BOUND = 256  # total rank above which a GPU gains more than the bus costs

Emit = Callable[[int, Tensor], None]  # (start, rows in the output dtype, on the CPU)


@dataclass(frozen=True, slots=True)
class Cut:
    """Truncation of the merged additive update before it is folded."""

    rank: int | None = None
    energy: float | None = None


@dataclass(slots=True)
class Tally:
    """Sums over every `COUNTED`th row of one target, in float64, in the order of its tiles."""

    kept: float = 0.0  # <W - W0, ΔW>, W as written
    update: float = 0.0  # <ΔW, ΔW>
    base: float = 0.0  # <W0, W0>, of a sample only
    along: float = 0.0  # <W0, ΔW>, of a sample only
    elements: int = 0
    residual: float = 0.0  # squared norm of what a truncation cut away
    whole: float = 0.0  # squared norm of the update before it
    digest: str = ""
    scale: float | None = None  # of a weight of 8-bit floats which no longer fits its base's

    @property
    def update_kept(self) -> float | None:
        """<W-W0, ΔW> / <ΔW, ΔW>: 1 when the whole update survives the output's dtype."""
        return self.kept / self.update if self.update else None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Desk:
    """What one thread works on: its device and its reused buffers."""

    device: torch.device
    buffers: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)
    stream: torch.cuda.Stream | None = None

    def room(self, use: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A buffer of the shape of `like`; it is the same memory at every call."""
        flat = self.buffers.get((use, dtype))
        if flat is None or flat.numel() < like.numel():
            flat = torch.empty(like.numel(), dtype=dtype, device=self.device)
            self.buffers[use, dtype] = flat
        return flat[: like.numel()].view(like.shape)

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
        with torch.inference_mode():
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
def one_thread() -> Iterator[None]:
    """One BLAS thread for each of ours: more of them fight over the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
        torch.backends.cuda.matmul.allow_tf32 = matmul


def tiles(
    rows: int, columns: int, known: int, device: torch.device, together: int = 1
) -> Iterator[tuple[int, int]]:
    """The fixed grid: blocks of whole rows, with an edge where the base's own rows end.

    Each tile holds a multiple of `together` rows; 0 wants all of them in one.
    """
    size = TILE if device.type == "cpu" else DEVICE_TILE
    step = max(1, size // max(columns, 1))
    step = max(1, rows) if not together else -(-step // together) * together
    for begin, end in ((0, min(known, rows)), (known, rows)):
        for start in range(begin, end, step):
            yield start, min(start + step, end)


def fold_target(
    target: Target,
    rows: Rows | None,
    emit: Emit,
    *,
    dtype: torch.dtype,
    desk: Desk | None = None,
    cut: Cut | None = None,
    only_rows: Sequence[int] | None = None,
) -> Tally:
    """Fold one target: W0 comes from `rows` in tiles (None: the base has none), W goes to `emit`.

    With `only_rows` just these rows are computed (a sample). Raises `overflow` and
    `nonfinite` with the target's name.
    """
    desk = desk or Desk(torch.device("cpu"))
    tally = Tally()
    height, width = extents(target.shape)
    known = 0 if target.base is None or rows is None else extents(target.base.shape)[0]

    def wide(start: int, stop: int, use: str = "w0") -> Tensor:
        assert rows is not None
        raw = rows(start, stop).to(desk.device, non_blocking=True)
        return desk.room(use, raw, torch.float64).copy_(raw)

    def first_pass() -> Iterator[tuple[int, Tensor]]:
        for start, stop in tiles(known, width, known, desk.device):
            yield start, wide(start, stop)
            desk.wait()  # the next read goes into the same pinned memory

    terms = _ready(target, first_pass, desk.device, cut, tally)
    together = [block(d) for _, d in terms]
    grid = tiles(height, width, known, desk.device, 0 if 0 in together else math.lcm(*together))
    sample = only_rows is not None
    chosen = grid if only_rows is None else _around(only_rows, together, height)
    step = 1 if sample or height * width <= SMALL else COUNTED

    # What the output's numbers are multiplied with: in the base's dtype they keep its scale.
    unit, base = 1.0, target.base
    if base is not None and base.scale is not None and dtype == torch_dtype(base.dtype):
        chosen = list(chosen)
        peak = max((_peak(terms, wide, a, b, known) for a, b in chosen), default=0.0)
        unit = fitting_scale(base, peak, dtype)
        tally.scale = None if unit == scale_of(base) else unit
    for start, stop in chosen:
        if start >= known:
            like = torch.empty(stop - start, width, dtype=torch.float64, device=desk.device)
            w = grown(terms, like, start)
            out = narrow(w if unit == 1 else w / unit, dtype)
            _explain(target, {"update": w}, out)
            emit(start, desk.home(out))
            tally.elements += w.numel()
            continue
        w0 = wide(start, stop)
        counted = slice(-start % step, None, step)
        before = w0[counted].clone()
        w = combine(terms, w0, start, w0)
        out = narrow(w if unit == 1 else w / unit, dtype, desk.room)
        tally.elements += out.numel()
        _count(tally, before, w[counted], out[counted], unit, sample=sample)
        if not _is_finite(out):
            w0 = wide(start, stop, "again")
            _explain(target, {"base": w0, "update": w - w0}, out)
        emit(start, desk.home(out))
    return tally


def _peak(
    terms: Sequence[tuple[float, Kind]],
    wide: Callable[[int, int], Tensor],
    start: int,
    stop: int,
    known: int,
) -> float:
    """The largest absolute number of one folded tile; 0 for rows that the base lacks."""
    if start >= known:
        return 0.0
    w0 = wide(start, stop)
    return float(combine(terms, w0, start, w0).abs().max()) if w0.numel() else 0.0


def _around(rows: Sequence[int], together: Sequence[int], height: int) -> list[tuple[int, int]]:
    """The blocks in which single rows lie, each once."""
    if 0 in together:
        return [(0, height)]
    size = math.lcm(*together)
    starts = dict.fromkeys(row // size * size for row in rows)
    return [(start, min(start + size, height)) for start in starts]


def _ready(
    target: Target,
    first_pass: Callable[[], Iterator[tuple[int, Tensor]]],
    device: torch.device,
    cut: Cut | None,
    tally: Tally,
) -> list[tuple[float, Kind]]:
    """A target's terms in stored orientation, on the device, in float64, as few as can be."""
    weighted: list[tuple[float, Kind]] = []
    for term in target.terms:
        delta = as_stored(term.delta) if term.place.transposed else term.delta
        weighted.append((term.weight, map_leaves(delta, lambda leaf: _moved(leaf, device))))
    weighted = condense(weighted)
    if cut is not None:
        weighted = [(w, _cut(d, cut, tally)) for w, d in weighted]
    return [(w, prepare(d, first_pass)) for w, d in weighted]


def _moved(leaf: Leaf, device: torch.device) -> Leaf:
    return held(leaf.tensor().to(device), leaf.name)


def _cut(delta: Kind, cut: Cut, tally: Tally) -> Kind:
    if isinstance(delta, Experts):
        stack, residual, whole = truncate_stack(delta, rank=cut.rank, energy=cut.energy)
        tally.residual += residual
        tally.whole += whole
        return stack
    if not isinstance(delta, LowRank):
        return delta
    short = truncate(delta, rank=cut.rank, energy=cut.energy)
    tally.residual += short.residual
    tally.whole += short.total
    return short.delta


def _count(
    tally: Tally, before: Tensor, w: Tensor, out: Tensor, unit: float, *, sample: bool
) -> None:
    d = (w - before).view(-1)
    changed = (out.to(before.dtype) * unit - before).view(-1)
    tally.kept += float(torch.dot(changed, d))
    tally.update += float(torch.dot(d, d))
    if sample:
        flat = before.view(-1)
        tally.base += float(torch.dot(flat, flat))
        tally.along += float(torch.dot(flat, d))


def _is_finite(out: Tensor) -> bool:
    if out.dtype.itemsize == 1:  # which torch does not compare in all 8-bit floats
        return not not_finite(out)
    return all(bool(x.isfinite()) for x in torch.aminmax(out)) if out.numel() else True


def _explain(target: Target, parts: dict[str, Tensor], out: Tensor) -> None:
    name = shown(target.name)
    for what, values in parts.items():
        bad = not_finite(values)
        if bad:
            raise error("nonfinite", f"{name}: the {what} has {bad} NaN or infinite values")
    lost = not_finite(out)
    dtype = str(out.dtype).removeprefix("torch.")
    if lost:
        raise error("overflow", f"{name}: {lost} values do not fit {dtype}; try --dtype fp32")


# ------------------------------------------------------------------------------- in memory


def fold_tensor(
    target: Target, tensor: Tensor | None, *, dtype: torch.dtype, cut: Cut | None = None
) -> tuple[Tensor, Tally]:
    """One folded weight in memory; `tensor` is the base weight in stored layout, on any device."""
    device = tensor.device if tensor is not None else torch.device("cpu")
    parts: list[Tensor] = []
    stored = None if tensor is None else matrix(tensor.detach())
    unit = 1.0 if target.base is None else scale_of(target.base)
    rows = None if stored is None else times(lambda start, stop: stored[start:stop], unit)
    with one_thread():
        tally = fold_target(
            target,
            rows,
            lambda _, tile: parts.append(tile.clone()),
            dtype=dtype,
            desk=Desk(device),
            cut=cut,
        )
    whole = torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
    return whole.reshape(target.shape).to(device), tally


def sample_rows(height: int, count: int = 8) -> list[int]:
    """`count` rows spread evenly over a tensor."""
    return sorted({(2 * i + 1) * height // (2 * count) for i in range(count)}) if height else []


def fold_sample(target: Target, *, dtype: torch.dtype, cut: Cut | None = None) -> Tally:
    """The tally of a few rows of one target, read from the base: what a fold would keep.

    For several threads at once, within `one_thread`.
    """
    leaf, desk = target.base, Desk(torch.device("cpu"))
    assert leaf is not None
    rows = sample_rows(min(extents(leaf.shape)[0], extents(target.shape)[0]))
    with desk.at_work():
        return fold_target(
            target,
            leaf_rows(leaf),
            lambda *_: None,
            dtype=dtype,
            desk=desk,
            cut=cut,
            only_rows=rows,
        )
