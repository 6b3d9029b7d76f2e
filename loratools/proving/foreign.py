"""Folds of other tools, without a receipt: which known rounding rule explains a touched tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loratools.adapter import Kind, Leaf, LowRank, Renormed, Replace
from loratools.algebra import matrix, widen
from loratools.folding import TILE, Cut, extents, fold_target, leaf_rows, torch_dtype
from loratools.narrowing import narrow
from loratools.plan import Target
from loratools.proving.differences import Difference, Mismatch
from loratools.proving.rules import EXACT, F64, Rule, Span, prepared, replayed, rules_for
from loratools.rewriting import as_stored, transpose
from loratools.sampling import sample_rows
from loratools.stored import scale_of

SIGMAS = 5
SMALLEST = 2e-4  # a deviation of the scaling below this is not spoken of
VISIBLE = 1e-3  # an alpha wrong by 0.1 % must show, or there is too little signal to tell
FEW = 0.01  # the share of odd elements up to which a tensor counts as right but for these
CLOSE = 0.01  # how near a scaling must come to 0 or 2 to be called "not folded" or "folded twice"


@dataclass(slots=True)
class Signal:
    """Sums over touched elements that measure the scaling really applied; D is the update."""

    update: float = 0.0  # <D, D>
    moved: float = 0.0  # <W − W0, D>
    square: float = 0.0  # <W − W0, W − W0>
    off: float = 0.0  # <W − W_rule, D> over the elements that the rule cannot have written
    noise: float = 0.0  # variance of the rounding of W, summed
    along: float = 0.0  # variance of the rounding of W along D, summed

    def add(self, other: Signal) -> None:
        """Pool with another tensor's."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def scaling(self) -> float | None:
        """<W − W0, D> / <W_rule − W0, D>: 1 where the rule holds, however little rounding kept."""
        due = self.moved - self.off
        return self.moved / due if due else None

    @property
    def error(self) -> float:
        """The standard error of `scaling` that the rounding of W and of W_rule could make."""
        due = abs(self.moved - self.off)
        return (2 * self.along) ** 0.5 / due if due else float("inf")

    @property
    def is_clear(self) -> bool:
        """Whether an update of another size would show."""
        return SIGMAS * self.error <= VISIBLE

    @property
    def is_off(self) -> bool:
        """Whether the update has another size than it should."""
        scaling = self.scaling
        return scaling is not None and abs(scaling - 1) > max(SIGMAS * self.error, SMALLEST)

    @property
    def is_multiple(self) -> bool:
        """Whether W − W0 is a multiple of D but for rounding, as under a wrong scaling."""
        best = self.moved / self.update if self.update else 0.0
        return self.square - best * self.moved <= max(4 * self.noise, 4e-4 * self.square)


@dataclass(slots=True)
class Judged:
    """One tensor under one rule."""

    rule: Rule
    difference: Difference = field(default_factory=Difference)
    signal: Signal = field(default_factory=Signal)


def judge_target(target: Target, written: Leaf) -> Judged:
    """The rule that explains a touched tensor, or the nearest one and the elements that defy it.

    Rules are compared on a few rows; those that fit best there are tried on the whole tensor.
    """
    views, rules = _views_and_rules(target, written)
    misses = []
    for rule in rules:
        view = views[0] if rule == EXACT else views[1]
        assert view is not None
        rows = sample_rows(view.height)
        misses.append(_walk(target, views, rule, rows).difference.elements)
    best: Judged | None = None
    for rule, missed in zip(rules, misses, strict=True):
        if missed > min(misses):
            continue
        judged = _walk(target, views, rule, None)
        if best is None or judged.difference.elements < best.difference.elements:
            best = judged
        if not judged.difference.elements:
            break
    assert best is not None
    return best


def explain(target: Target, written: Leaf, judged: Judged, file: str | None) -> Mismatch | None:
    """What is wrong with a judged tensor, in words; None where its rule explains it."""
    found = judged.difference
    if not found.elements:
        return None
    scaling = judged.signal.scaling
    what = "values"
    if found.elements <= max(1, FEW * written.numel):
        what = "elements"
    elif scaling is not None and judged.signal.is_off and judged.signal.is_multiple:
        what = f"folded with {scaling:.4f} times its scaling"
        if abs(scaling) < CLOSE:
            what = "not folded"
        elif abs(scaling - 2) < CLOSE:
            what = "folded twice"
    return found.mismatch(what, target.name, written, file)


# ------------------------------------------------------------------------------- tiles


@dataclass(frozen=True, slots=True)
class _View:
    """A target with rows that every rule can go through by itself.

    A DoRA on a weight stored (in, out) has its norms in columns: such a tensor is held whole, and
    seen transposed.
    """

    terms: Sequence[tuple[float, Kind]]
    base: Callable[[int, int], Tensor] | None
    written: Callable[[int, int], Tensor]
    known: int  # rows that the base has
    height: int
    width: int
    dtype: torch.dtype  # of what was written
    unit: float = 1.0  # its scale, where 8-bit floats have one
    turned: bool = False

    def grid(self, rows: Sequence[int] | None) -> Iterator[tuple[int, int]]:
        """Tiles of whole rows, with an edge where the base's own rows end; or single `rows`."""
        if rows is not None:
            yield from ((r, r + 1) for r in rows)
            return
        step = max(1, TILE // max(self.width, 1))
        for begin, end in ((0, min(self.known, self.height)), (self.known, self.height)):
            for start in range(begin, end, step):
                yield start, min(start + step, end)

    def stored(self, values: Tensor) -> Tensor:
        """The numbers of the written tensor's dtype, and scale, nearest to these."""
        return narrow(values / self.unit, self.dtype).to(F64) * self.unit

    def w0(self, start: int, stop: int) -> Tensor | None:
        """Rows of the base in float64, if it has them."""
        known = self.base is not None and start < self.known
        return self.base(start, stop).to(F64) if known and self.base is not None else None


def _views(target: Target, written: Leaf) -> tuple[_View, _View | None]:
    """The target as stored, and as the rules walk it (None: rows replaced under a turned DoRA)."""
    base = target.base
    terms = [
        (t.weight, as_stored(t.delta) if t.place.transposed else t.delta) for t in target.terms
    ]
    stored = _View(
        terms,
        None if base is None else leaf_rows(base),
        leaf_rows(written),
        0 if base is None else extents(base.shape)[0],
        *extents(written.shape),
        torch_dtype(written.dtype),
        scale_of(written),
    )
    inner = [d.then if isinstance(d, Replace) else d for _, d in terms]
    if not any(isinstance(d, Renormed) and d.axis == "in" for d in inner):
        return stored, stored
    if any(isinstance(d, Replace) and d.rows is not None for _, d in terms):
        return stored, None
    after = matrix(written.tensor()).T
    resized = base is None or base.shape != written.shape  # all of it is replaced then
    before = None if base is None or resized else matrix(base.tensor()).T
    turned = _View(
        [(w, transpose(d)) for w, d in terms],
        None if before is None else lambda start, stop: before[start:stop],
        lambda start, stop: after[start:stop],
        0 if before is None else len(before),
        len(after),
        after.shape[1],
        after.dtype,
        turned=True,
    )
    return stored, turned


def _views_and_rules(
    target: Target, written: Leaf
) -> tuple[tuple[_View, _View | None], list[Rule]]:
    views, dtype = _views(target, written), torch_dtype(written.dtype)
    base = dtype if target.base is None else torch_dtype(target.base.dtype)
    if views[1] is None or not dtype.is_floating_point or written.scale is not None:
        return views, [EXACT]
    halved = target.name.endswith("out_proj.weight")
    return views, rules_for(dtype, base, views[1].terms, halved=halved)


def _walk(
    target: Target, views: tuple[_View, _View | None], rule: Rule, rows: Sequence[int] | None
) -> Judged:
    judged = Judged(rule)
    if rule == EXACT:
        _exact(target, views[0], rows, judged)
        return judged
    view = views[1]
    assert view is not None
    deltas = prepared(view.terms, rule)
    for start, stop in view.grid(rows):
        w0, seen = view.w0(start, stop), view.written(start, stop)
        span = replayed(deltas, w0, start, rule, seen)
        _judge(judged, seen, w0, span, view.dtype, start * view.width)
    if view.turned and judged.difference.first is not None:
        row, column = divmod(judged.difference.first, view.width)
        judged.difference.first = column * view.height + row
    return judged


def is_explained(target: Target, written: Leaf, rule: Rule) -> bool:
    """Whether a rule, if it may have made this tensor at all, explains every element of it."""
    views, rules = _views_and_rules(target, written)
    return rule in rules and not _walk(target, views, rule, None).difference.elements


def judge_exactly(target: Target, written: Leaf, cut: Cut | None = None) -> Judged:
    """A touched tensor under our own rule alone: the float64 sum, rounded once.

    Where the sum lies within the last bits of float64 beside the middle of two values, either may
    stand: another processor adds in another order.
    """
    judged = Judged(EXACT)
    _exact(target, _views(target, written)[0], None, judged, cut)
    return judged


def _exact(
    target: Target,
    view: _View,
    rows: Sequence[int] | None,
    judged: Judged,
    cut: Cut | None = None,
) -> None:
    pairs = [pair for _, delta in view.terms if (pair := _pair(delta)) is not None]
    size = sum(abs(p.scaling) * _longest(p.b, 1) * _longest(p.a, 0) for p in pairs)
    unit = 2.0**-52 * (view.width + 8 + sum(p.rank for p in pairs))

    def emit(start: int, tile: Tensor) -> None:
        stop = start + len(tile)
        w0, seen = view.w0(start, stop), view.written(start, stop)
        noise = (tile.abs() + size + (0 if w0 is None else w0.abs())) * unit
        span = Span(view.stored(tile - noise), view.stored(tile + noise), tile)
        _judge(judged, seen, w0, span, view.dtype, start * view.width)

    fold_target(target, view.base, emit, dtype=F64, cut=cut, only_rows=rows)


def _pair(delta: Kind) -> LowRank | None:
    match delta:
        case LowRank():
            return delta
        case Renormed(delta=inner):
            return _pair(inner)
        case Replace(then=then):
            return None if then is None else _pair(then)
        case _:
            return None


def _longest(factor: Leaf, rank_axis: int) -> float:
    return float(matrix(widen(factor)).norm(dim=rank_axis).max())


def _judge(
    judged: Judged,
    seen: Tensor,
    w0: Tensor | None,
    span: Span | None,
    dtype: torch.dtype,
    at: int,
) -> None:
    """Take one tile of the written weight into the judgement."""
    wide = seen.to(F64)
    if span is None:
        every = torch.ones_like(wide, dtype=torch.bool)
        judged.difference.add(every, torch.full_like(wide, torch.inf), at)
        return
    bad = ~((wide >= span.low) & (wide <= span.high))
    judged.difference.add(bad, (wide - span.exact).abs(), at)
    if w0 is None or not dtype.is_floating_point or not bool(wide.isfinite().all()):
        return
    update, moved = (span.exact - w0).reshape(-1), (wide - w0).reshape(-1)
    off = (wide - (span.low + span.high) / 2).mul_(bad).reshape(-1)
    rounding = (wide.reshape(-1) * torch.finfo(dtype).eps).square_().div_(12)
    signal = judged.signal
    signal.update += float(update.dot(update))
    signal.moved += float(moved.dot(update))
    signal.square += float(moved.dot(moved))
    signal.off += float(off.dot(update))
    signal.noise += float(rounding.sum())
    signal.along += float(rounding.dot(update.square_()))
