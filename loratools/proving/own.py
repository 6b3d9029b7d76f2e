"""Our own folds and merges made again in memory, and compared with what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isclose
from typing import assert_never

import torch
from torch import Tensor

from loratools.adapter import (
    Adapter,
    Chained,
    Dense,
    Experts,
    Hadamard,
    Kind,
    Kronecker,
    LowRank,
    Renormed,
    Replace,
    Rotated,
    Scaled,
    Sparse,
    Spectral,
    leaves,
)  # fmt: skip
from loratools.algebra import factors
from loratools.desk import Desk
from loratools.exporting.requantised import compare_codes, fold_codes, source_of
from loratools.folding import Cut, fold_target, leaf_rows, torch_dtype
from loratools.plan import Plan, Target
from loratools.proving.differences import (
    CHANGED,
    TILE,
    UNKNOWN,
    Difference,
    Mismatch,
    Progress,
    Rows,
    compare_leaves,
    each,
)
from loratools.proving.foreign import judge_exactly
from loratools.stored import stored_scale
from loratools.weights.base import Base
from loratools.weights.layout import OutputShard, Piece


@dataclass(slots=True)
class Replayed:
    """The outcome for all tensors of an output."""

    checked: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    near: int = 0  # elements that differ by what another arithmetic may


def replay_fold(
    plan: Plan,
    shards: Sequence[OutputShard],
    written: Base,
    *,
    cut: Cut | None = None,
    device: torch.device | None = None,
    tolerance: int = 0,
    progress: Progress | None = None,
) -> Replayed:
    """Fold every touched tensor again and compare it, and all others with the base.

    `shards` is what the fold writes, by the plan; `tolerance` the units in the last place by
    which touched elements may differ.
    """
    pieces = {piece.name: piece for shard in shards for piece in shard.pieces}
    files = {name: shard.name for shard in written.shards for name in shard.leaves}
    replayed = Replayed()
    for name in pieces:
        if name not in written.tensors:
            replayed.mismatches.append(Mismatch("missing", name))
    for name in written.tensors:
        if name not in pieces:
            replayed.mismatches.append(Mismatch(UNKNOWN, name, files[name]))
    desk_at = device or torch.device("cpu")

    def work(piece: Piece) -> tuple[Mismatch | None, int]:
        leaf, file = written.tensors[piece.name], files[piece.name]
        is_as = leaf.dtype, leaf.shape
        if is_as != (piece.dtype, piece.shape):
            what = f"is {leaf.dtype} {leaf.shape}, expected {piece.dtype} {piece.shape}"
            return Mismatch(what, piece.name, file), 0
        target = _target(plan, piece)
        if target is None:
            assert piece.base is not None
            difference, near = compare_leaves(piece.base, leaf), 0
            what = CHANGED
        elif (codes := source_of(target)) is not None:
            rows = Rows(leaf, tolerance)
            weight, _ = fold_codes(target, desk=Desk(desk_at), cut=cut)
            compare_codes(codes, weight, rows.compare)
            difference, near, what = rows.found, rows.near, "folded again it differs"
        else:
            dtype = torch_dtype(leaf.dtype)
            rows = Rows(leaf, tolerance if dtype.is_floating_point else 0)
            before = None if target.base is None else leaf_rows(target.base)
            tally = fold_target(
                target, before, rows.compare, dtype=dtype, desk=Desk(desk_at), cut=cut
            )
            scale = None if target.base is None else stored_scale(target.base, tally.scale)
            if leaf.scale is not None and leaf.scale.read() != scale:
                return Mismatch("its scale differs", piece.name, file), 0
            difference, near, what = rows.found, rows.near, "folded again it differs"
            exact = leaf.scale is None and difference.elements
            if exact and not judge_exactly(target, leaf, cut).difference.elements:
                difference, near = Difference(), near + difference.elements
        return difference.mismatch(what, piece.name, leaf, file), near

    found = {name: leaf for name, leaf in written.tensors.items() if name in pieces}
    # A scale is compared with its weight, for which it may have been found anew.
    scales = {
        (leaf.scale.source, leaf.scale.offset)
        for name, leaf in found.items()
        if leaf.scale is not None and _target(plan, pieces[name])
    }
    there = [pieces[n] for n, leaf in found.items() if (leaf.source, leaf.offset) not in scales]
    for mismatch, near in each(work, there, sizes=[p.nbytes for p in there], progress=progress):
        replayed.checked += 1
        replayed.near += near
        if mismatch is not None:
            replayed.mismatches.append(mismatch)
    return replayed


def _target(plan: Plan, piece: Piece) -> Target | None:
    """What is folded into a piece; the output's name may have a prefix that the base's lacks."""
    target = plan.targets.get(piece.name)
    if target is None and piece.base is not None:
        target = plan.targets.get(piece.base.name)
    return target if target is not None and target.terms else None


# ------------------------------------------------------------------------------- adapters


def replay_merge(
    expected: Adapter, written: Adapter, *, file: str | None = None, same_class: bool = True
) -> Replayed:
    """Compare a merged adapter with the same merge made again, delta by delta.

    In another arithmetic class the factors of a truncation may differ, and the products decide.
    """
    replayed = Replayed()
    for key in expected.deltas.keys() | written.deltas.keys():
        mine, its = expected.deltas.get(key), written.deltas.get(key)
        if mine is None or its is None:
            what = "missing" if its is None else "not in the merge"
            replayed.mismatches.append(Mismatch(what, key, file))
            continue
        replayed.checked += 1
        replayed.mismatches += _delta(key, mine, its, file, same_class)
    due, there = ({} if a.runtime is None else a.runtime.tensors for a in (expected, written))
    for key in due.keys() | there.keys():
        if key not in due or key not in there:
            what = "missing" if key in due else "not in the merge"
            replayed.mismatches.append(Mismatch(what, key, file))
            continue
        replayed.checked += 1
        replayed.mismatches += _delta(key, Dense(due[key]), Dense(there[key]), file, same_class)
    replayed.mismatches.sort(key=lambda m: m.tensor or "")
    return replayed


def _delta(key: str, mine: Kind, its: Kind, file: str | None, same_class: bool) -> list[Mismatch]:
    if not same_class and isinstance(mine, LowRank) and isinstance(its, LowRank):
        return _products(key, mine, its, file)
    if _form(mine) != _form(its):
        return [Mismatch("is of another kind", key, file)]
    pairs = list(zip(leaves(mine), leaves(its), strict=True))
    for a, b in pairs:
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            what = f"has {b.dtype} {b.shape}, expected {a.dtype} {a.shape}"
            return [Mismatch(what, key, file)]
    for due, there in zip(_scalings(mine), _scalings(its), strict=True):
        if not isclose(due, there, rel_tol=1e-12):
            return [Mismatch(f"has scaling {there:g}, expected {due:g}", key, file)]
    found = [
        compare_leaves(a, b).mismatch("merged again it differs", key, b, file) for a, b in pairs
    ]
    return [m for m in found if m is not None]


def _form(delta: Kind) -> tuple[object, ...]:
    """What a delta is, apart from its numbers."""
    match delta:
        case LowRank() | Dense() | Hadamard() | Kronecker() | Sparse() | Experts():
            return (type(delta),)
        case Spectral(method=method) | Rotated(method=method) | Chained(method=method):
            return (type(delta), method, *delta.parts)
        case Scaled(by=by, offset=offset):
            return (Scaled, by, offset)
        case Renormed(delta=inner, axis=axis):
            return (Renormed, axis, *_form(inner))
        case Replace(rows=rows, then=then):
            return (Replace, rows, *(() if then is None else _form(then)))
        case _:
            assert_never(delta)


def _scalings(delta: Kind) -> list[float]:
    match delta:
        case (
            LowRank()
            | Dense()
            | Hadamard()
            | Kronecker()
            | Sparse()
            | Spectral()
            | Experts()
            | Chained()
        ):
            return [delta.scaling]
        case Scaled() | Rotated():
            return []
        case Renormed(delta=inner):
            return _scalings(inner)
        case Replace(then=then):
            return [] if then is None else _scalings(then)
        case _:
            assert_never(delta)


def _products(key: str, mine: LowRank, its: LowRank, file: str | None) -> list[Mismatch]:
    """Whether two pairs hold one ΔW to 1e-12 of its norm, or to the rounding of their factors."""
    (b, a), (d, c) = factors(mine), factors(its)
    if (len(b), a.shape[1]) != (len(d), c.shape[1]):
        return [Mismatch("has another shape", key, file)]
    eps = max(torch.finfo(torch_dtype(leaf.dtype)).eps for leaf in (its.a, its.b))
    off = size = 0.0
    step = max(1, TILE // a.shape[1])
    for start in range(0, len(b), step):
        whole: Tensor = b[start : start + step] @ a
        size += float(whole.square().sum())
        off += float((whole - d[start : start + step] @ c).square().sum())
    if off**0.5 <= max(1e-12, 4 * eps) * size**0.5:
        return []
    return [Mismatch("merged again its product differs", key, file, worst=off**0.5)]
