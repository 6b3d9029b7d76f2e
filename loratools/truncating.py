"""Low-rank forms: singular values of a product by its factors, optimal truncation, norms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratools.adapter import Experts, Kind, LowRank
from loratools.algebra import factors, materialise, matrix, product
from loratools.errors import error
from loratools.kinds import experts


@dataclass(frozen=True, slots=True)
class Truncated:
    """A low-rank delta, with the squared norms of what was cut away and of the whole."""

    delta: LowRank
    residual: float
    total: float


def norm_squared(delta: LowRank) -> float:
    """‖ΔW‖², from the factors alone (absolute accuracy of float64 on ‖B‖²‖A‖²)."""
    b, a = factors(delta)
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def singular_values(delta: LowRank) -> Tensor:
    """The singular values of ΔW, largest first, at most `rank` of them."""
    return _core(delta)[1]


def _core(delta: LowRank) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor]]:
    """(Q_B, U), S, (Q_A, V) with ΔW = Q_B U S (Q_A V)ᵀ, by QR of both factors and a core SVD.

    ΔW = B·A = Q_B R_B (Q_A R_A)ᵀ, and R_B R_Aᵀ is at most R × R. All in float64 from the start:
    a float64 core behind float32 QRs would keep their error. Raises `nonfinite`.
    """
    b, a = factors(delta)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    core = r_b @ r_a.T
    if not bool(torch.isfinite(core).all()):  # a NaN or infinity in a factor is one here as well
        for name, tensor in ((delta.b.name, b), (delta.a.name, a)):
            if not bool(torch.isfinite(tensor).all()):
                raise error("nonfinite", f"{name or 'a factor'} holds NaN or infinite values")
        raise error("nonfinite", f"{delta.b.name or 'a product'}: B·A is beyond float64")
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    return (q_b, u), s, (q_a, vt.T)


def _signed(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors with the largest entry of each of U positive.

    The sign of a pair is free: fixed, equal inputs give equal bytes.
    """
    low, high = torch.aminmax(u, dim=0)
    sign = torch.where(-low > high, -1.0, 1.0)
    return u * sign, v * sign


def kept_rank(s: Tensor, *, rank: int | None, energy: float | None) -> int:
    """How many singular values to keep: at most `rank`, at least the share `energy` of Σσ²."""
    if not len(s) or float(s[0]) == 0:
        return min(1, len(s))
    keep = int((s > s[0] * len(s) * torch.finfo(torch.float64).eps).sum())
    if energy is not None:
        squares = (s / s[0]).square()  # of very small or large numbers none would be left
        share = squares.cumsum(0) / squares.sum()
        keep = min(keep, int((share < energy - 1e-15).sum()) + 1)
    return max(1, keep if rank is None else min(rank, keep))


def truncate(delta: LowRank, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """The best approximation of rank ≤ `rank`, or of `energy` (Eckart–Young), split √S·√S."""
    (q_b, u), s, (q_a, v) = _core(delta)
    k = kept_rank(s, rank=rank, energy=energy)
    return _split(q_b @ u[:, :k], s, q_a @ v[:, :k], delta.a.shape[1:])


def truncate_stack(
    delta: Experts, *, rank: int | None = None, energy: float | None = None
) -> tuple[Experts, float, float]:
    """Every expert's best approximation, and the squared norms of what was cut and of all."""
    cut = [
        truncate(experts.single(delta, e), rank=rank, energy=energy)
        for e in range(delta.a.shape[0])
    ]
    stack = replace(experts.stacked([c.delta for c in cut]), over=delta.over)
    return stack, sum(c.residual for c in cut), sum(c.total for c in cut)


def _split(u: Tensor, s: Tensor, v: Tensor, inner: tuple[int, ...]) -> Truncated:
    """U (out, k) and V (in, k) with the first k of all singular values, as factors."""
    k, squares = u.shape[1], s.square()
    u, v = _signed(u, v)
    root = s[:k].sqrt()
    short = product(u * root, (v * root).T, inner)
    return Truncated(short, float(squares[k:].sum()), float(squares.sum()))


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
    k = kept_rank(sigma, rank=rank, energy=energy)
    return _split(u[:, :k], sigma, vt[:k].T, tuple(dense.shape[1:]))
