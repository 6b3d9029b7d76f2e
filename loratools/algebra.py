"""The algebra of deltas in float64: apply, add, transpose, slice, stack, truncate; no files.

Weights are matrices here: a tensor of shape (out, in, *kernel) is handled as (out, in * kernel).
Leaves widen to float64 where they enter, in `widen`; where tensors live and how results are
narrowed is decided by `loratools.folding`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, assert_never

import torch
from torch import Tensor

from loratools.adapter import Dense, Kind, Leaf, LowRank, Renormed, Replace
from loratools.errors import error

K = TypeVar("K", bound=Kind)
Additive = LowRank | Dense
Tiles = Callable[[], Iterable[tuple[int, Tensor]]]  # (first row, float64 rows of W0), in order


def widen(leaf: Leaf) -> Tensor:
    """A leaf's tensor in float64."""
    return leaf.tensor().to(torch.float64)


def held(tensor: Tensor, name: str = "") -> Leaf:
    """A leaf around a tensor."""
    return Leaf.of(name, tensor)


def matrix(tensor: Tensor) -> Tensor:
    """(out, in, *kernel) as (out, in * kernel); a vector (out,) as (out, 1)."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim else tensor.reshape(1, 1)


def map_leaves(delta: K, change: Callable[[Leaf], Leaf]) -> K:
    """The same delta with every leaf changed."""
    new: dict[str, Any] = {}
    for name in delta.__dataclass_fields__:
        value = getattr(delta, name)
        if isinstance(value, Leaf):
            new[name] = change(value)
        elif isinstance(value, Kind):
            new[name] = map_leaves(value, change)
    return replace(delta, **new)


def factors(delta: LowRank) -> tuple[Tensor, Tensor]:
    """B (out, rank), scaled, and A (rank, in * kernel), so that ΔW = B·A."""
    b, a = widen(delta.b), matrix(widen(delta.a))
    b = b.reshape(b.shape[0], delta.rank)
    return (b if delta.scaling == 1 else b * delta.scaling), a


def shape(delta: Kind) -> tuple[int, ...] | None:
    """(out, in, *kernel) of what the delta changes; None where it only names rows."""
    match delta:
        case LowRank(a=a, b=b):
            return (b.shape[0], *a.shape[1:])
        case Dense(diff=diff):
            return diff.shape
        case Renormed(delta=inner):
            return shape(inner)
        case Replace(value=value, rows=rows):
            return value.shape if rows is None else None
        case _:
            assert_never(delta)


# ------------------------------------------------------------------------------- applying


def reach(delta: Kind) -> Literal["rows", "pass"]:
    """What a tile of rows needs: only itself ("rows"), or a first pass over all of W0 ("pass")."""
    match delta:
        case Renormed(axis="in", norm=None):
            return "pass"
        case LowRank() | Dense() | Replace() | Renormed():
            return "rows"
        case _:
            assert_never(delta)


def prepare(delta: Kind, tiles: Tiles) -> Kind:
    """The delta ready for tiles: float64 factors with their scaling taken in, column norms found.

    The norms take a first pass over W0, in the order that `tiles` gives.
    """
    match delta:
        case LowRank():
            b, a = factors(delta)
            return LowRank(held(a), held(b), 1.0)
        case Dense(diff=diff, scaling=scaling):
            return Dense(held(matrix(widen(diff)) * scaling))
        case Replace(value=value, rows=rows, then=then):
            wide = matrix(widen(value))
            inner = tiles if rows is not None else lambda: [(0, wide)]
            return Replace(held(wide), rows, _inner(then, lambda d: prepare(d, inner)))
        case Renormed():
            ready = _additive(prepare(delta.delta, tiles))
            norm = None
            if delta.axis == "in":
                parts = (_plus(ready, w0, at).square().sum(dim=0) for at, w0 in tiles())
                norm = held(sum(parts, torch.zeros((), dtype=torch.float64)).sqrt())
            return replace(delta, delta=ready, norm=norm)
        case _:
            assert_never(delta)


def apply(delta: Kind, w0: Tensor, start: int = 0, out: Tensor | None = None) -> Tensor:
    """W for the rows `w0` (rows, in * kernel) of a base weight that begin at row `start`.

    `out`, where given, may be used for the result; `w0` is never changed.
    """
    match delta:
        case LowRank() | Dense():
            return _plus(delta, w0, start, out)
        case Renormed(delta=inner, magnitude=magnitude, axis=axis, norm=norm):
            w = _plus(inner, w0, start, out)
            m = widen(magnitude).reshape(-1)
            if axis == "out":
                scale = m[start : start + len(w)] / torch.linalg.vector_norm(w, dim=1)
                return w.mul_(scale[:, None])
            if norm is None:
                raise error("usage", "a column renormalisation needs algebra.prepare first")
            return w.mul_(m / widen(norm))
        case Replace(value=value, rows=rows, then=then):
            new = matrix(widen(value))
            if rows is None:
                w = new[start : start + len(w0)].clone()
            else:
                w = w0.clone()
                for i, row in enumerate(rows):
                    if start <= row < start + len(w):
                        w[row - start] = new[i]
            return w if then is None else apply(then, w, start)
        case _:
            assert_never(delta)


def _plus(delta: Additive, w0: Tensor, start: int, out: Tensor | None = None) -> Tensor:
    """W0 + ΔW for rows of W0; rows that lie beyond the delta's own stay as they are."""
    match delta:
        case LowRank():
            b, a = factors(delta)
            b = b[start : start + len(w0)]
            if len(b) == len(w0):
                return torch.addmm(w0, b, a, out=out)
            return torch.cat([torch.addmm(w0[: len(b)], b, a), w0[len(b) :]])
        case Dense(diff=diff, scaling=scaling):
            tile = matrix(widen(diff))[start : start + len(w0)]
            return torch.add(w0, tile, alpha=scaling, out=out)
        case _:
            assert_never(delta)


def combine(
    terms: Sequence[tuple[float, Kind]], w0: Tensor, start: int = 0, out: Tensor | None = None
) -> Tensor:
    """W0 + Σ w_i (apply_i(W0) − W0); one term of weight 1 is apply(W0) itself, bit for bit."""
    if len(terms) == 1 and terms[0][0] == 1:
        return apply(terms[0][1], w0, start, out)
    w = w0.clone()
    for weight, delta in terms:
        if isinstance(delta, Additive):
            w = _plus(scaled(delta, weight), w, start)
        else:
            w += weight * (apply(delta, w0, start) - w0)
    return w


def grown(terms: Sequence[tuple[float, Kind]], like: Tensor, start: int) -> Tensor:
    """Rows that W0 does not have (a new head, a longer vocabulary): Σ w_i V_i / Σ w_i.

    `like` gives shape and device; additive terms that reach these rows are added.
    """
    here = [(w, d) for w, d in terms if isinstance(d, Replace) and d.rows is None]
    total = sum(w for w, d in here if d.value.shape[0] >= start + len(like))
    if not total:
        raise error("head_conflict", f"the weights of what is new in rows {start}... sum to 0")
    w = torch.zeros_like(like)
    for weight, new in here:
        if new.value.shape[0] >= start + len(like):
            w += (weight / total) * apply(new, like, start)
    for weight, delta in terms:
        if isinstance(delta, Additive):
            w = _plus(scaled(delta, weight), w, start)
    return w


def condense(terms: Sequence[tuple[float, Kind]]) -> list[tuple[float, Kind]]:
    """The same sum in fewer terms: all weighted low-rank deltas become one of their total rank."""
    low = [scaled(d, w) for w, d in terms if isinstance(d, LowRank)]
    rest: list[tuple[float, Kind]] = [(w, d) for w, d in terms if not isinstance(d, LowRank)]
    return [(1.0, add(low)), *rest] if low else rest


def materialise(delta: Kind, w0: Tensor | None = None) -> Tensor:
    """ΔW (out, in, *kernel) as a dense float64 tensor; kinds that depend on W0 need it."""
    match delta:
        case LowRank():
            b, a = factors(delta)
            return (b @ a).reshape(b.shape[0], *delta.a.shape[1:])
        case Dense(diff=diff, scaling=scaling):
            return widen(diff) * scaling
        case Renormed() | Replace():
            if w0 is None:
                raise error("needs_base", f"{type(delta).__name__} has no ΔW without its base")
            wide = matrix(w0.to(torch.float64))
            ready = prepare(delta, lambda: [(0, wide)])
            return (apply(ready, wide) - wide).reshape(w0.shape)
        case _:
            assert_never(delta)


# ------------------------------------------------------------------------------- rewriting


def scaled(delta: Additive, weight: float) -> Additive:
    """weight · ΔW; weight 1 keeps the stored alpha. Other kinds interpolate, in `combine`."""
    if weight == 1:
        return delta
    match delta:
        case LowRank():
            return replace(delta, scaling=delta.scaling * weight, alpha=None)
        case Dense():
            return replace(delta, scaling=delta.scaling * weight)
        case Renormed() | Replace():
            raise error("needs_base", f"{type(delta).__name__} cannot be scaled without its base")
        case _:
            assert_never(delta)


def add(deltas: Sequence[Additive]) -> Additive:
    """The exact sum, of scaling 1: low-rank deltas concatenated (rank adds up), others dense."""
    if len(deltas) == 1 and deltas[0].scaling == 1:
        return deltas[0]
    low = [d for d in deltas if isinstance(d, LowRank)]
    if len(low) == len(deltas):
        pairs = [factors(d) for d in low]
        b, a = torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs], 0)
        kernel = low[0].a.shape[2:]
        a, b = a.reshape(len(a), *low[0].a.shape[1:]), b.reshape(*b.shape, *[1 for _ in kernel])
        return LowRank(held(a), held(b), 1.0)
    total = materialise(deltas[0])
    for delta in deltas[1:]:
        total = total + materialise(delta)
    return Dense(held(total))


def transpose(delta: Kind) -> Kind:
    """The delta of the transposed matrix (2-D only)."""
    match delta:
        case LowRank(a=a, b=b):
            _flat(a, b)
            new_a, new_b = a.tensor().T.contiguous(), b.tensor().T.contiguous()
            return replace(delta, a=held(new_b, b.name), b=held(new_a, a.name))
        case Dense(diff=diff):
            _flat(diff)
            return replace(delta, diff=held(diff.tensor().T.contiguous(), diff.name))
        case Renormed(delta=inner, axis=axis):
            turned = _additive(transpose(inner))
            return replace(delta, delta=turned, axis="in" if axis == "out" else "out", norm=None)
        case Replace(value=value, rows=None, then=then):
            _flat(value)
            new = held(value.tensor().T.contiguous(), value.name)
            return replace(delta, value=new, then=_inner(then, transpose))
        case Replace():
            raise error("usage", "rows of a stored tensor have no transposed form")
        case _:
            assert_never(delta)


def as_stored(delta: Kind) -> Kind:
    """The delta for a weight stored (in, out); full tensors are on disk as stored already."""
    match delta:
        case LowRank() | Renormed():
            return transpose(delta)
        case Replace(then=then):
            return replace(delta, then=_inner(then, transpose))
        case Dense():
            return delta
        case _:
            assert_never(delta)


def rows(delta: Kind, start: int, stop: int) -> Kind:
    """The delta of rows start:stop of `out`, as in taking q out of a fused qkv."""
    return _on_rows(delta, lambda t: t[start:stop])


def permute(delta: Kind, order: Sequence[int]) -> Kind:
    """The delta whose row i is row order[i] of this one."""
    return _on_rows(delta, lambda t: t[torch.as_tensor(order)])


def _inner(
    then: LowRank | Renormed | None, change: Callable[[Kind], Kind]
) -> LowRank | Renormed | None:
    if then is None:
        return None
    changed = change(then)
    assert isinstance(changed, LowRank | Renormed)
    return changed


def _on_rows(delta: Kind, pick: Callable[[Tensor], Tensor]) -> Kind:
    def picked(leaf: Leaf) -> Leaf:
        return held(pick(leaf.tensor()).contiguous(), leaf.name)

    match delta:
        case LowRank():
            return replace(delta, b=picked(delta.b))
        case Dense():
            return replace(delta, diff=picked(delta.diff))
        case Renormed(axis="out", delta=inner):
            part = _additive(_on_rows(inner, pick))
            m = pick(delta.magnitude.tensor().reshape(-1)).contiguous()
            return replace(delta, delta=part, magnitude=held(m, delta.magnitude.name))
        case Renormed():
            raise error("usage", "a column norm runs over all rows: it has no rows of its own")
        case Replace(rows=None, then=then):
            inner_rows = _inner(then, lambda d: _on_rows(d, pick))
            return replace(delta, value=picked(delta.value), then=inner_rows)
        case Replace():
            raise error("usage", "rows of rows: replace by rows names stored rows already")
        case _:
            assert_never(delta)


def stack(deltas: Sequence[Kind]) -> Kind:
    """One delta over the stacked rows of all, as in fusing q, k, v: B block-diagonal, A stacked."""
    first = deltas[0]
    match first:
        case LowRank():
            low = [d for d in deltas if isinstance(d, LowRank)]
            if len(low) == len(deltas):
                pairs = [factors(d) for d in low]
                b: Tensor = torch.block_diag(*[b for b, _ in pairs])  # type: ignore[no-untyped-call]
                a = torch.cat([a for _, a in pairs])
                return LowRank(held(a.reshape(len(a), *first.a.shape[1:])), held(b), 1.0)
        case Dense():
            dense = [d for d in deltas if isinstance(d, Dense)]
            if len(dense) == len(deltas):
                return Dense(held(torch.cat([widen(d.diff) * d.scaling for d in dense])))
        case Renormed(axis="out"):
            normed = [d for d in deltas if isinstance(d, Renormed) and d.axis == "out"]
            if len(normed) == len(deltas):
                inner = _additive(stack([d.delta for d in normed]))
                m = torch.cat([widen(d.magnitude).reshape(-1) for d in normed])
                return Renormed(inner, held(m))
        case Replace(rows=None, then=None):
            whole = [d for d in deltas if isinstance(d, Replace) and not (d.rows or d.then)]
            if len(whole) == len(deltas):
                return Replace(held(torch.cat([d.value.tensor() for d in whole])))
        case Renormed() | Replace():
            pass
        case _:
            assert_never(first)
    names = ", ".join(type(d).__name__ for d in deltas)
    raise error("usage", f"these deltas have no common stacked form: {names}")


def _additive(delta: Kind) -> Additive:
    assert isinstance(delta, Additive)
    return delta


def _flat(*leaves: Leaf) -> None:
    for leaf in leaves:
        if len(leaf.shape) != 2:
            raise error("usage", f"{leaf.name} is {leaf.shape}: only matrices can be transposed")


# ------------------------------------------------------------------------------- low rank


@dataclass(frozen=True, slots=True)
class Truncated:
    """A low-rank delta, with the squared norms of what was cut away and of the whole."""

    delta: LowRank
    residual: float
    total: float


def norm_squared(delta: LowRank) -> float:
    """‖ΔW‖², from the factors alone (absolute accuracy of float64 on ‖B‖²‖A‖²)."""
    b, a = factors(delta)
    return float(((b.T @ b) * (a @ a.T)).sum())


def singular_values(delta: LowRank) -> Tensor:
    """The singular values of ΔW, largest first, at most `rank` of them."""
    return _svd(delta)[1]


def _svd(delta: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, R), S (R), Vᵀ (R, in * kernel) of ΔW, by QR of both factors and a core SVD.

    ΔW = B·A = Q_B R_B (Q_A R_A)ᵀ, and R_B R_Aᵀ is at most R × R. All in float64 from the start:
    a float64 core behind float32 QRs would keep their error.
    """
    b, a = factors(delta)
    for name, tensor in ((delta.b.name, b), (delta.a.name, a)):
        if not bool(torch.isfinite(tensor).all()):
            raise error("nonfinite", f"{name or 'a factor'} holds NaN or infinite values")
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    u, vt = q_b @ u, vt @ q_a.T
    # The sign of a singular pair is free: fix it, so that equal inputs give equal bytes.
    peak = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()
    peak[peak == 0] = 1
    return u * peak, s, vt * peak.T


def kept_rank(s: Tensor, *, rank: int | None, energy: float | None) -> int:
    """How many singular values to keep: at most `rank`, at least the share `energy` of Σσ²."""
    if not len(s) or float(s[0]) == 0:
        return min(1, len(s))
    keep = int((s > s[0] * len(s) * torch.finfo(torch.float64).eps).sum())
    if energy is not None:
        share = s.square().cumsum(0) / s.square().sum()
        keep = min(keep, int((share < energy - 1e-15).sum()) + 1)
    return max(1, keep if rank is None else min(rank, keep))


def truncate(delta: LowRank, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """The best approximation of rank ≤ `rank`, or of `energy` (Eckart–Young), split √S·√S."""
    return _cut(*_svd(delta), delta.a.shape[1:], rank=rank, energy=energy)


def _cut(
    u: Tensor,
    s: Tensor,
    vt: Tensor,
    inner: tuple[int, ...],
    *,
    rank: int | None,
    energy: float | None,
) -> Truncated:
    k = kept_rank(s, rank=rank, energy=energy)
    root = s[:k].sqrt()
    a = (root[:, None] * vt[:k]).reshape(k, *inner)
    b = (u[:, :k] * root).reshape(len(u), k, *[1 for _ in inner[1:]])
    residual, total = float(s[k:].square().sum()), float(s.square().sum())
    return Truncated(LowRank(held(a), held(b), 1.0), residual, total)


def to_low_rank(
    delta: Kind,
    *,
    rank: int | None = None,
    energy: float | None = None,
    w0: Tensor | None = None,
) -> Truncated:
    """Any foldable delta as a low-rank one: itself, or the best of its task vector."""
    if isinstance(delta, LowRank) and rank is None and energy is None:
        return Truncated(delta, 0.0, norm_squared(delta))
    if isinstance(delta, LowRank):
        return truncate(delta, rank=rank, energy=energy)
    dense = materialise(delta, w0)
    if dense.ndim < 2:
        raise error("usage", "a vector has no low-rank form")
    u, sigma, vt = torch.linalg.svd(matrix(dense), full_matrices=False)
    return _cut(u, sigma, vt, tuple(dense.shape[1:]), rank=rank, energy=energy)
