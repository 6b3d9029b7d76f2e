"""The one loop that carries out a plan over base weights.

Each target is read once and written once, in tiles of whole rows on a fixed grid, computed in
float64 and rounded once. Threads take targets; what a tile's bytes are never depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loratools import kernels
from loratools.adapter import DTYPE_BITS, Experts, Kind, Leaf, LowRank
from loratools.algebra import (
    block,
    combine,
    condense,
    factors,
    grown,
    held,
    map_leaves,
    matrix,
    prepare,
)
from loratools.desk import Desk, one_thread
from loratools.errors import error, shown
from loratools.exact import LowRankSum, TileSum
from loratools.narrowing import narrow, not_finite, settle_open
from loratools.plan import Target
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
COUNTED = 64
APART = 4  # tiles of which one is looked at, in so many times the rows: a look has its fixed price
SMALL = 1 << 16  # elements of a tensor all of whose rows are measured
DEVICE_TILE = 1 << 24  # a GPU wants work in larger portions

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

    moved = weighted(target, desk.device)
    in_any_order = cut is None and only_rows is None  # a truncation's factors are not
    exact = LowRankSum.of(moved, (height, width)) if in_any_order else None
    terms = _ready(moved, first_pass, cut, tally)
    low = None
    if exact is not None and desk.device.type == "cpu" and _in_c(target, dtype):
        low = _for_kernels(terms, dtype)
    together = [block(d) for _, d in terms]
    grid = tiles(height, width, known, desk.device, 0 if 0 in together else math.lcm(*together))
    sample = only_rows is not None
    chosen = grid if only_rows is None else _around(only_rows, together, height)
    step = 1 if sample or height * width <= SMALL else COUNTED
    apart = APART if step % APART == 0 else 1

    # What the output's numbers are multiplied with: in the base's dtype they keep its scale.
    unit, base = 1.0, target.base
    if base is not None and base.scale is not None and dtype == torch_dtype(base.dtype):
        chosen = list(chosen)
        peak = max((_peak(terms, wide, a, b, known) for a, b in chosen), default=0.0)
        unit = fitting_scale(base, peak, dtype)
        tally.scale = None if unit == scale_of(base) else unit
    for number, (start, stop) in enumerate(chosen):
        if start >= known:
            like = torch.empty(stop - start, width, dtype=torch.float64, device=desk.device)
            w = grown(terms, like, start)
            out = narrow(w if unit == 1 else w / unit, dtype)
            _explain(target, {"update": w}, out)
            emit(start, desk.home(out))
            tally.elements += w.numel()
            continue
        again = partial(wide, start, stop, "again")
        watched, counted = number % apart == 0, slice(-start % (step // apart), None, step // apart)
        done = None
        if low is not None and rows is not None and exact is not None:
            done = _at_once(desk, exact, low, start, rows(start, stop), dtype)
        if done is not None and low is not None:
            out, raw = done
            if watched:
                before = raw[counted].to(torch.float64)
                d = low.b[start:stop][counted] @ low.a
        else:
            w0 = wide(start, stop)
            before = w0[counted].clone()
            w = combine(terms, w0, start, w0)
            sums = TileSum(exact, start, again) if exact is not None else None
            out = narrow(w if unit == 1 else w / unit, dtype, desk.room, sums)
            d = w[counted] - before
            if not _is_finite(out):
                w0 = again()
                _explain(target, {"base": w0, "update": w - w0}, out)
        tally.elements += out.numel()
        if watched:
            _count(tally, before, d, out[counted], unit, sample=sample)
        emit(start, desk.home(out))
    return tally


def _in_c(target: Target, dtype: torch.dtype) -> bool:
    """Whether there are kernels for a target: else each tile would be read for them in vain."""
    leaf = target.base
    if leaf is None or not exactly_rounded(target) or not kernels.available():
        return False
    return kernels.serves(torch_dtype(leaf.dtype), dtype)


def _for_kernels(terms: Sequence[tuple[float, Kind]], dtype: torch.dtype) -> kernels.Product:
    [(_, low)] = terms  # of low-rank terms one is made
    assert isinstance(low, LowRank)
    return kernels.Product(*factors(low), dtype)


def _at_once(
    desk: Desk,
    exact: LowRankSum,
    low: kernels.Product,
    start: int,
    raw: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """W of a tile by compiled kernels, and W0 as stored; None where the kernels do not serve."""
    sums = TileSum(exact, start, lambda: raw)
    out = desk.room("out", raw, dtype)
    found = kernels.fold(raw, low, start, out, sums)
    if found is None:
        return None
    settle_open(sums, out, *found)
    return out, raw


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
    """The blocks in which single rows lie, each once; neighbours are one."""
    if 0 in together:
        return [(0, height)]
    size, found = math.lcm(*together), list[tuple[int, int]]()
    for start in dict.fromkeys(row // size * size for row in rows):
        stop = min(start + size, height)
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return found


def exactly_rounded(target: Target) -> bool:
    """Whether a fold without truncation writes the exact sum, rounded: in any order the same."""
    leaf = target.base
    return (
        leaf is not None
        and DTYPE_BITS[leaf.dtype] in (16, 32)
        and all(isinstance(t.delta, LowRank) for t in target.terms)
    )


def weighted(target: Target, device: torch.device) -> list[tuple[float, Kind]]:
    """A target's weighted terms in stored orientation, on the device."""
    return [
        (
            term.weight,
            map_leaves(
                as_stored(term.delta) if term.place.transposed else term.delta,
                lambda leaf: _moved(leaf, device),
            ),
        )
        for term in target.terms
    ]


def _ready(
    weighted: list[tuple[float, Kind]],
    first_pass: Callable[[], Iterator[tuple[int, Tensor]]],
    cut: Cut | None,
    tally: Tally,
) -> list[tuple[float, Kind]]:
    """Terms in float64, as few as can be."""
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
    tally: Tally, before: Tensor, change: Tensor, out: Tensor, unit: float, *, sample: bool
) -> None:
    d, flat = change.reshape(-1), before.reshape(-1)
    changed = out.reshape(-1).to(flat.dtype) * unit - flat
    tally.kept += float(torch.dot(changed, d))
    tally.update += float(torch.dot(d, d))
    if sample:
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
