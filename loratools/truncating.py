"""Low-rank forms: singular values of a product by its factors, optimal truncation, norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.adapter import Kind, LowRank
from loratools.algebra import factors, materialise, matrix, product
from loratools.errors import error


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
        squares = (s / s[0]).square()  # of very small or large numbers none would be left
        share = squares.cumsum(0) / squares.sum()
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
    short = product(u[:, :k] * root, root[:, None] * vt[:k], inner)
    return Truncated(short, float(s[k:].square().sum()), float(s.square().sum()))


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
