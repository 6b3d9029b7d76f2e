"""Deltas whose file lacks the weight's shape, or more of the base: what they become upon it.

Until a base is there they are functions of W0 like any other, and see all of it at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools import views
from loratools.adapter import Chained, Kind, Leaf, LowRank, Made, Replace, Sparse, Spectral
from loratools.errors import error, shown
from loratools.kinds import sparse, spectral
from loratools.kinds.glora import WHOLE, Functions

if TYPE_CHECKING:
    from torch import Tensor


def _no_others() -> Sequence[tuple[int, ...]]:
    return ()


def _no_weight(key: str) -> Leaf | None:
    return None


@dataclass(frozen=True, slots=True)
class Ground:
    """The weight under a delta, in its module's shape (out, in, *kernel), and what lies around.

    `others` are the shapes of all weights that the adapter changes, this one's too; `weight` finds
    one by the adapter's key, as its module has it.
    """

    shape: tuple[int, ...]
    others: Callable[[], Sequence[tuple[int, ...]]] = _no_others
    weight: Callable[[str], Leaf | None] = _no_weight


# ------------------------------------------------------------------------------- one method each


def _fourier(delta: Chained, ground: Ground) -> Made:
    return Spectral(delta.method, delta.parts, ground.shape, delta.scaling, delta.settings)


def _places(delta: Chained, ground: Ground) -> Made:
    """Values at (row, column) pairs (2, n), or at places in the flattened weight (n,)."""
    indices = delta.parts["indices"]
    if len(indices.shape) == 1:
        indices = spectral.pairs(indices, ground.shape[1])
    return Sparse(delta.parts["values"], indices, ground.shape, delta.scaling)


def _randlora(delta: Chained, ground: Ground) -> LowRank:
    """ΔW = s·Σ B_i·diag(λ_i)·A·diag(γ_i), or its transpose (peft:tuners/randlora/layer.py).

    A and B are cut to the weight; its smaller side is A's, the narrower of the two.
    """
    lam, gamma = delta.parts["lambda"], delta.parts["gamma"]
    rank, count = lam.shape
    small, large = min(ground.shape), max(ground.shape)
    stored = delta.parts.get("A"), delta.parts.get("B")
    others = ground.others() if None in stored else ()

    def projections() -> tuple[Tensor, Tensor]:
        import torch

        if stored[0] is not None and stored[1] is not None:
            a, b = stored[0].tensor(), stored[1].tensor()
        else:
            a, b = _projections(delta, others)
        return a.to(torch.float64), b.to(torch.float64)

    def narrow() -> Tensor:
        import torch

        a, (weights, scales) = (
            projections()[0],
            (x.tensor().to(torch.float64) for x in (lam, gamma)),
        )
        # (r, 1, small) for all bases, or (r, bases, small)
        whole = weights[:, :, None] * a[:, :count, :small] * scales[None]
        return whole.reshape(rank * count, small)

    def wide() -> Tensor:
        b = projections()[1][:large, :count]
        return b.reshape(large, -1)

    # B's columns are base by base, A's rows rank by rank: PEFT flattens each as it lies.
    one = views.later(lam.name, "F64", (rank * count, small), narrow)
    other = views.later(gamma.name, "F64", (large, rank * count), wide)
    if ground.shape[1] == small:
        return LowRank(one, other, delta.scaling)
    return LowRank(views.turned(other), views.turned(one), delta.scaling)


def _projections(delta: Chained, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """A (r, 1, small) and B (large, bases, r) from the seed (peft:tuners/randlora/model.py)."""
    import torch

    rank, density = delta.parts["lambda"].shape[0], str(delta.settings["density"])
    widest = [max(shape[i] for shape in shapes) for i in (0, 1)]
    small, large = min(widest), max(widest)
    count = -(-small // rank)
    generator = torch.Generator().manual_seed(int(delta.settings["seed"]))
    if density == "dense":

        def drawn(*shape: int) -> Tensor:
            # PEFT draws in bfloat16, wherever the machine has it.
            empty = torch.empty(shape, dtype=torch.bfloat16)
            return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

        a = drawn(rank, 1, small)
        b = torch.cat([drawn(large, 1, rank) for _ in range(count)], 1)
        return a / a.std(), b / b.std()
    a = torch.rand((rank, 1, small), generator=generator)
    b = torch.rand((large, count, rank), generator=generator)
    share = 1 / (2 * (math.sqrt(small) if density == "very sparse" else 3))
    signs = [(t > 1 - share).float() - (t < share).float() for t in (a, b)]
    return signs[0] / signs[0].std(), signs[1] / signs[1].std()


def _bias(delta: Chained, ground: Ground) -> Chained:
    """The bias of GLoRA, which also takes W0·C."""
    weight = ground.weight(str(delta.settings.get("of", "")))
    if weight is None or not any(part.startswith("C.") for part in delta.parts):
        return delta
    return replace(delta, parts={**delta.parts, "weight": weight})


SETTLED: dict[str, Callable[[Chained, Ground], Made | LowRank | Chained]] = {
    "fourier": _fourier,
    "wavelet": _fourier,
    "places": _places,
    "randlora": _randlora,
    "glora bias of peft": _bias,
}


# ------------------------------------------------------------------------------- as a kind


def fits(delta: Chained, stored: tuple[int, ...]) -> str | None:
    """Why a weight of this module shape cannot be the one that the delta was made for."""
    if len(stored) != 2:
        return f"a {delta.method} update is of a matrix, base is {stored}"
    numel = math.prod(stored)
    match delta.method:
        case "fourier" | "wavelet" if delta.parts["spectrum"].numel > numel:
            return f"adapter has {delta.parts['spectrum'].numel} coefficients, base is {stored}"
        case "randlora":
            return _random_fits(delta, stored)
        case _:
            return None


def _random_fits(delta: Chained, stored: tuple[int, ...]) -> str | None:
    small, large = min(stored), max(stored)
    count, width = delta.parts["gamma"].shape
    if width != small:
        return f"adapter's smaller side is {width}, base is {stored}"
    a, b = delta.parts.get("A"), delta.parts.get("B")
    if a is not None and a.shape[2] < small:
        return f"{shown(a.name)} is {a.shape}, too narrow for a base of {stored}"
    if b is not None and (b.shape[0] < large or b.shape[1] < count):
        return f"{shown(b.name)} is {b.shape}, too small for a base of {stored}"
    return None


def settled(
    deltas: Mapping[str, Kind],
    shapes: Mapping[str, tuple[int, ...]],
    weight: Callable[[str], Leaf | None] = _no_weight,
) -> dict[str, Kind]:
    """The deltas, those made plain whose weight's shape (out, in, *kernel) is known.

    `weight` finds a weight of the base by the adapter's key, as its module has it.
    """

    def others() -> Sequence[tuple[int, ...]]:
        same = [key for key, delta in deltas.items() if _of_method(delta, "randlora")]
        known = [shapes[key] for key in same if key in shapes]
        return known if len(known) == len(same) else ()

    return {
        key: _settled(delta, Ground(shapes[key], others, weight)) if key in shapes else delta
        for key, delta in deltas.items()
    }


def unsettled(delta: Kind | None) -> bool:
    """Whether the base would make it another, plainer delta."""
    return any(_of_method(delta, method) for method in SETTLED)


def _of_method(delta: Kind | None, method: str) -> bool:
    if isinstance(delta, Replace):
        return _of_method(delta.then, method)
    return isinstance(delta, Chained) and delta.method == method


def _settled(delta: Kind, ground: Ground) -> Kind:
    """What a delta is upon a weight that is known; itself where that makes no difference."""
    if isinstance(delta, Replace) and delta.then is not None:
        return replace(delta, then=_settled(delta.then, ground))
    settle = SETTLED.get(delta.method) if isinstance(delta, Chained) else None
    if settle is None or not isinstance(delta, Chained):
        return delta
    if delta.method in METHODS and fits(delta, ground.shape) is not None:
        return delta  # binding says why
    if delta.method == "randlora" and "A" not in delta.parts and not ground.others():
        return delta
    return settle(delta, ground)


def _shape(delta: Chained) -> tuple[int, ...] | None:
    return None


def _ready(delta: Chained) -> Chained:
    return delta


def _apply(delta: Chained, w0: Tensor, start: int) -> Tensor:
    turned = bool(delta.settings.get("turned"))
    weight = w0.T if turned else w0
    delta = _transposed(delta) if turned else delta  # as its module has it
    rows, columns = weight.shape
    made = _settled(delta, Ground((rows, columns)))
    match made:
        case LowRank():
            b, a = (x.tensor().double() for x in (made.b, made.a))
            update = (b * made.scaling) @ a
        case Sparse():
            update = sparse.rows(sparse.ready(made), 0, rows)
        case Spectral():
            update = spectral.rows(made, 0, rows)
        case _:
            raise error(
                "needs_base",
                f"{shown(next(iter(delta.parts.values())).name)}: how large the shared projections "
                "are is known from the shapes of all targeted layers only",
            )
    return w0 + (update.T if turned else update)


def _transposed(delta: Chained) -> Chained:
    """Marked: the update is made in the shape of the module's weight."""
    return replace(delta, settings=spectral.turned(delta.settings))


METHODS = {
    name: Functions(_shape, lambda _: WHOLE, _ready, _apply, _transposed)
    for name in ("fourier", "wavelet", "places", "randlora")
}
