"""Pairs of several ranks and scalings as formats with one rank and one alpha for all hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.adapter import TORCH_NAMES, Leaf, LowRank
from loratools.views import later, padded, scaled

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Even:
    """Factors by module, all of `rank` and meant with the scaling alpha/rank."""

    factors: dict[str, tuple[Leaf, Leaf]]
    rank: int
    alpha: float

    def zeros(self, name: str, into: int, out: int, dtype: str) -> tuple[Leaf, Leaf]:
        """A pair that changes nothing."""
        return nothing(name, (self.rank, into), dtype), nothing(name, (out, self.rank), dtype)


def evened(pairs: Mapping[str, LowRank], rank: int = 0) -> Even:
    """Pairs of matrices with the largest rank and the commonest scaling.

    Smaller ranks are padded with zeros; another scaling goes into B, in float32 or wider.
    """
    rank = max([rank, *(p.rank for p in pairs.values())], default=1) or 1
    stored = Counter(p.alpha if _says(p, rank) else p.scaling * rank for p in pairs.values())
    alpha = next((a for a, _ in stored.most_common() if a), 0.0) or 0.0
    factors = {}
    for module, pair in pairs.items():
        more = rank - pair.rank
        same = pair.scaling == alpha / rank
        b = pair.b if same else scaled(pair.b, pair.scaling * rank / alpha if alpha else 0.0)
        factors[module] = padded(pair.a, 0, more), padded(b, 0, more, axis=1)
    return Even(factors, rank, float(alpha))


def _says(pair: LowRank, rank: int) -> bool:
    """Whether the alpha that was stored says this scaling at this rank too."""
    return pair.alpha is not None and pair.alpha / rank == pair.scaling


def nothing(name: str, shape: tuple[int, ...], dtype: str) -> Leaf:
    """A leaf of zeros."""

    def make() -> torch.Tensor:
        import torch

        return torch.zeros(shape, dtype=getattr(torch, TORCH_NAMES[dtype]))

    return later(name, dtype, shape, make)
