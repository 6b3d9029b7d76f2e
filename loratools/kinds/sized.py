"""Updates that are low rank once the weight's sizes are known: MiSS, VeRA, (IA)³ of groups.

Their tensors do not say how wide the weight is, or slice what all layers share. `settled` is given
the shapes of the weights and makes them plain deltas; MiSS that multiplies W0 ("bat") stays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratools import views
from loratools.adapter import Chained, Kind, Leaf, LowRank, Replace, Scaled
from loratools.errors import error
from loratools.kinds.glora import WHOLE, Functions
from loratools.kinds.spectral import turned

if TYPE_CHECKING:
    from torch import Tensor

SHARD, SHARED, BAT = "miss", "vera", "miss bat"


def unsettled(delta: Kind | None) -> bool:
    """Whether the shape of its weight would make it another, plainer delta."""
    match delta:
        case Replace(then=then):
            return unsettled(then)
        case Chained(method=method):
            return method in (SHARD, SHARED)
        case Scaled(by="columns", factor=Leaf()):
            return True
        case _:
            return False


def settled(
    deltas: Mapping[str, Kind], shape_of: Callable[[str], tuple[int, ...] | None]
) -> Mapping[str, Kind]:
    """The deltas with those whose weight's shape (out, in, *kernel) is known made plain.

    Projections that all layers slice are as wide and as high as the largest of these needs them
    (peft:tuners/vera/model.py, _find_dim).
    """
    asked = {k: shape_of(k) for k, d in deltas.items() if unsettled(d)}
    shapes = {k: s for k, s in asked.items() if s is not None}
    if not shapes:
        return deltas
    shared = [k for k, d in deltas.items() if _shared(d) is not None]
    known = [shapes[k][:2] for k in shared if len(shapes.get(k, ())) > 1]
    largest = None
    if shared and len(known) == len(shared):
        largest = max(s[0] for s in known), max(s[1] for s in known)
    return {k: _settled(d, shapes.get(k), largest) for k, d in deltas.items()}


def _shared(delta: Kind | None) -> Chained | None:
    match delta:
        case Replace(then=then):
            return _shared(then)
        case Chained(method="vera"):
            return delta
        case _:
            return None


def _settled(delta: Kind, shape: tuple[int, ...] | None, largest: tuple[int, int] | None) -> Kind:
    match delta:
        case Replace(then=then) if then is not None:
            return replace(delta, then=_settled(then, shape, largest))
        case Chained(method="miss", settings={"turned": True}):
            return delta
        case Chained(method="miss") if shape is not None and _why_not(delta, shape) is None:
            return _of_shards(delta, shape)
        case Chained(method="vera") if shape is not None and _why_not(delta, shape) is None:
            given = {**delta.settings, "largest": largest}
            return _of_shared(replace(delta, settings=given), shape) or delta
        case Scaled(by="columns", factor=Leaf() as factor) if shape is not None:
            return _of_groups(delta, factor, shape)
        case _:
            return delta


# ------------------------------------------------------------------------------- MiSS


def _of_shards(delta: Chained, shape: tuple[int, ...]) -> LowRank:
    """W0 + tiled Mᵀ as B·A, A (r, in) the identity again and again (arXiv 2409.15371)."""
    block, (out, width) = delta.parts["block"], shape
    r, each = block.shape

    def a() -> Tensor:
        import torch

        return torch.eye(r, dtype=torch.float64).repeat(1, -(-width // r))[:, :width].contiguous()

    def b() -> Tensor:
        return block.tensor().T.repeat(out // each, 1).contiguous()

    up = views.turned(block) if each == out else views.later(block.name, block.dtype, (out, r), b)
    return LowRank(
        views.later(f"{block.name} (tiles)", "F32", (r, width), lambda: a().float()), up, 1.0
    )


def _turned(delta: Chained) -> Chained:
    """The same upon the transposed weight, all of it at once."""
    return replace(delta, settings=turned(delta.settings))


def _shard_rows(delta: Chained, w0: Tensor, start: int) -> Tensor:
    """W0 + the block's rows, again and again along the columns."""
    import torch

    if delta.settings.get("turned"):
        return _shard_rows(_turned(delta), w0.T, 0).T.contiguous()
    block = delta.parts["block"].tensor().to(torch.float64)
    at = torch.arange(start, start + len(w0)) % block.shape[1]
    times = -(-w0.shape[1] // len(block))
    return w0 + block.T[at].repeat(1, times)[:, : w0.shape[1]]


def _bat_rows(delta: Chained, w0: Tensor, start: int) -> Tensor:
    """W0 + W0·M + M, by blocks of (r, r): those of one block of rows have one M."""
    import torch

    if delta.settings.get("turned"):
        return _bat_rows(_turned(delta), w0.T, 0).T.contiguous()
    block = delta.parts["block"].tensor().to(torch.float64)
    r, w = block.shape[1], w0.clone()
    for at in range(start // r, -(-(start + len(w0)) // r)):
        low, high = max(at * r, start), min((at + 1) * r, start + len(w0))
        rows = slice(low - start, high - start)
        m, parts = block[at], w0[rows].reshape(high - low, -1, r)
        change = parts @ m + m[low - at * r : high - at * r, None, :]
        w[rows] += change.reshape(high - low, -1)
    return w


# ------------------------------------------------------------------------------- VeRA


def _of_shared(delta: Chained, shape: tuple[int, ...]) -> LowRank | None:
    """diag(b)·B[:out]·diag(d)·A[:, :in] as factors (arXiv 2310.11454); None where A is unknown."""
    d, b = delta.parts["lambda_d"], delta.parts["lambda_b"]
    rank, (out, width) = whole(delta, "rank"), shape
    sizes = _sizes(delta)
    if sizes is None or out > sizes[0] or width > sizes[1]:
        return None

    def down() -> Tensor:
        import torch

        wide = projections(delta)[0][:rank, :width].to(torch.float64)
        return wide * d.tensor().to(torch.float64).reshape(-1)[:rank, None]

    def up() -> Tensor:
        import torch

        high = projections(delta)[1][:out].to(torch.float64)
        return high * b.tensor().to(torch.float64).reshape(-1)[:, None]

    return LowRank(
        views.later(d.name, "F64", (rank, width), down),
        views.later(b.name, "F64", (out, rank), up),
        1.0,
    )


def _sizes(delta: Chained) -> tuple[int, int] | None:
    """The height of B and the width of A."""
    if "B" in delta.parts and "A" in delta.parts:
        return delta.parts["B"].shape[0], delta.parts["A"].shape[1]
    found: tuple[int, int] | None = delta.settings.get("largest")
    return found


def projections(delta: Chained) -> tuple[Tensor, Tensor]:
    """A (rows, widest) and B (highest, rank), as stored or as their seed makes them."""
    if "A" in delta.parts and "B" in delta.parts:
        return delta.parts["A"].tensor(), delta.parts["B"].tensor()
    height, width = delta.settings["largest"]
    seed, rows = whole(delta, "seed"), whole(delta, "rows")
    return _seeded(seed, rows, whole(delta, "rank"), height, width)


@functools.lru_cache(maxsize=2)
def _seeded(seed: int, rows: int, rank: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Uniform numbers of torch's CPU generator, A first, bounded as by Kaiming's rule."""
    import torch

    source = torch.Generator(device="cpu").manual_seed(seed)
    made = []
    for shape in ((rows, width), (height, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        made.append(torch.empty(shape).uniform_(-bound, bound, generator=source))
    return made[0], made[1]


def whole(delta: Chained, name: str) -> int:
    """A whole number among the settings."""
    value: Any = delta.settings[name]
    return int(value)


# ------------------------------------------------------------------------------- (IA)³


def _of_groups(delta: Scaled, factor: Leaf, shape: tuple[int, ...]) -> Scaled:
    """A factor of all input channels on a grouped convolution: by elements, of rank `groups`."""
    groups, rest = divmod(factor.numel, shape[1]) if len(shape) > 2 and shape[1] else (1, 0)
    if groups < 2 or rest or shape[0] % groups:
        return delta
    kernel = shape[2:]

    def down() -> Tensor:
        import torch

        flat = factor.tensor().to(torch.float64).reshape(groups, shape[1], *[1 for _ in kernel])
        return flat.expand(groups, *shape[1:]).contiguous()

    def up() -> Tensor:
        import torch

        one = torch.eye(groups, dtype=torch.float64).repeat_interleave(shape[0] // groups, 0)
        return one.reshape(shape[0], groups, *[1 for _ in kernel])

    a = views.later(factor.name, "F64", (groups, *shape[1:]), down)
    b = views.later(factor.name, "F64", (shape[0], groups, *[1 for _ in kernel]), up)
    return Scaled("elements", LowRank(a, b, 1.0), delta.offset)


# ------------------------------------------------------------------------------- their table


def fits(delta: Chained, stored: tuple[int, ...]) -> str | None:
    """Why the parts are not those of a weight of this module shape."""
    return _why_not(delta, stored)


def _why_not(delta: Chained, stored: tuple[int, ...]) -> str | None:
    if len(stored) != 2:
        return f"adapter is of a matrix, base is {stored}"
    if delta.settings.get("turned"):
        stored = stored[::-1]
    if delta.method == SHARED:
        height = delta.parts["lambda_b"].numel
        return None if height == stored[0] else f"adapter has {height} outputs, base is {stored}"
    block = delta.parts["block"].shape
    if delta.method == BAT:
        good = stored[0] == block[0] * block[1] and stored[1] % block[1] == 0
        return None if good else f"adapter is {block} of blocks, base is {stored}"
    good = block[0] <= stored[1] and stored[0] % block[1] == 0
    if delta.settings.get("mini") is not True:
        good = good and stored[0] == block[1]
    return None if good else f"adapter is a block of {block}, base is {stored}"


def _unsized(delta: Chained, w0: Tensor, start: int) -> Tensor:
    raise error(
        "needs_base",
        f"{delta.parts['lambda_b'].name}: how wide the shared projections are is known from the "
        "shapes of all targeted layers only",
    )


def _none(delta: Chained) -> tuple[int, ...] | None:
    return None


def _rows(delta: Chained) -> int:
    return WHOLE if delta.settings.get("turned") else 1


def _same(delta: Chained) -> Chained:
    return delta


METHODS = {
    SHARD: Functions(_none, _rows, _same, _shard_rows, _turned),
    BAT: Functions(_none, _rows, _same, _bat_rows, _turned),
    SHARED: Functions(_none, _rows, _same, _unsized),
}
