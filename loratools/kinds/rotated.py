"""Weights rotated from one side: by blocks, reflections or pairs of rows, made of what was trained.

R is orthogonal, or nearly; what is trained with it scales the rows or columns of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.adapter import Leaf, LowRank, Rotated
from loratools.errors import error, shown
from loratools.kinds import lycoris_rotations

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Method:
    """What a rotation is made of and does; `extent` are the rows or columns that it turns.

    0 rows: any multiple of `block`.
    """

    extent: Callable[[Rotated], int]
    block: Callable[[Rotated], int]  # how many of these belong together; 0 for all of them
    ready: Callable[[Rotated], Rotated]
    turn: Callable[[Rotated, Tensor, int], Tensor]  # (made ready, (n, columns), first): R·x


def _method(delta: Rotated) -> Method:
    if delta.method not in METHODS:
        raise error("unknown_type", f"no rotation is called {shown(delta.method)}")
    return METHODS[delta.method]


def shape(delta: Rotated) -> tuple[int, ...] | None:
    """A rotation knows one side of the weight only."""
    return None


def fits(delta: Rotated, stored: tuple[int, ...]) -> str | None:
    """Why the rotation is not one of a weight of this module shape."""
    method = _method(delta)
    extent, side = method.extent(delta), "rows" if delta.side == "out" else "columns"
    wanted = stored[0] if delta.side == "out" else math.prod(stored[1:])
    if delta.settings.get("flat") and math.prod(stored[2:]) != 1:
        # fold(rotate(unfold(x))) adds overlapping patches up: a larger kernel (peft:tuners/oft).
        return f"PEFT's OFT of a convolution of {stored} has no weight of that shape"
    other, scale = "columns" if delta.side == "out" else "rows", delta.parts.get("scale")
    if scale is not None:
        there = stored[0] if delta.side == "in" else math.prod(stored[1:])
        if scale.numel != there:
            return f"adapter scales {scale.numel} {other}, base is {stored}"
    if extent == wanted or (extent == 0 and wanted % method.block(delta) == 0):
        return None
    many = f"blocks of {method.block(delta)}" if extent == 0 else str(extent)
    return f"adapter rotates {many} {side}, base is {stored}"


def ready(delta: Rotated) -> Rotated:
    """The rotation's blocks computed once, in float64."""
    found = _method(delta).ready(delta)
    scale = delta.parts.get("scale")
    if scale is None or found is delta:
        return found
    return replace(
        found, parts={**found.parts, "scale": Leaf.of(scale.name, _wide(scale).view(-1))}
    )


def block(delta: Rotated) -> int:
    """Rows that a rotation of rows mixes; a rotation of columns leaves rows to themselves."""
    return _method(delta).block(delta) if delta.side == "out" else 1


def apply(delta: Rotated, w0: Tensor, start: int) -> Tensor:
    """R·W0, or W0·Rᵀ; `scale` then multiplies the side that was not rotated."""
    if delta.method not in _MADE:
        delta = ready(delta)
    turn, scale = _method(delta).turn, delta.parts.get("scale")
    if delta.side == "out":
        w = turn(delta, w0, start)
        return w if scale is None else w * scale.tensor()
    w = turn(delta, w0.T, 0).T.contiguous()
    return w if scale is None else w * scale.tensor()[start : start + len(w), None]


def transposed(delta: Rotated) -> Rotated:
    """(R·W0)ᵀ = W0ᵀ·Rᵀ: the same rotation on the other side."""
    return replace(delta, side="in" if delta.side == "out" else "out")


def given(delta: Rotated, w0: Tensor) -> LowRank | None:
    """R·W0 - W0 as factors, exactly, for reflections: their number is the rank; else None.

    `w0` is the whole weight as a float64 matrix.
    """
    if delta.method not in ("householder", "reflected"):
        return None
    made = ready(delta) if delta.method == "householder" else delta
    left, right = made.parts["left"].tensor(), made.parts["right"].tensor()
    if delta.side == "in":  # W0·(I + left·rightᵀ)ᵀ
        return LowRank(Leaf.of("", left.T.contiguous()), Leaf.of("", w0 @ right), 1.0)
    return LowRank(Leaf.of("", right.T @ w0), Leaf.of("", left), 1.0)


def _wide(leaf: Leaf) -> Tensor:
    import torch

    return leaf.tensor().to(torch.float64)


def _made(delta: Rotated, method: str, **parts: Tensor) -> Rotated:
    held = {name: Leaf.of("", tensor) for name, tensor in parts.items()}
    return replace(delta, method=method, parts=held, settings={})


# ------------------------------------------------------------------------------- blocks


def _skew(delta: Rotated) -> Tensor:
    """Q (n, b, b) of the upper triangles that PEFT stores, clipped where it was constrained."""
    import torch

    vectors, size = _wide(delta.parts["vectors"]), delta.settings["size"]
    q = vectors.new_zeros(len(vectors), size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    q[:, rows, columns] = vectors
    q = q - q.transpose(1, 2)
    eps = delta.settings.get("eps")
    if eps is not None:
        bound = eps / math.sqrt(len(q))
        norm = torch.linalg.matrix_norm(q)[:, None, None]
        q = torch.where(norm <= bound, q, q * (bound / norm))
    return q


def cayley(q: Tensor) -> Tensor:
    """(I - Q)·(I + Q)⁻¹ of skew matrices (n, b, b)."""
    import torch

    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    found: Tensor = torch.linalg.solve(eye + q, eye - q, left=False)
    return found


def neumann(q: Tensor, terms: int, *, old: bool = False) -> Tensor:
    """I + 2Q + 2Q² + ..., the last power once (peft:tuners/oft/layer.py), before 0.18 twice.

    It approaches (I + Q)·(I - Q)⁻¹, which is the transpose of `cayley`.
    """
    import torch

    r = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).repeat(len(q), 1, 1)
    if terms < 2:
        return r
    r, power = r + 2 * q, q
    highest = terms - 1 if old or terms == 2 else max(3, terms - 1)
    for n in range(2, highest + 1):
        power = power @ q
        r = r + (1 if n == highest and not old else 2) * power
    return r


def _oft(delta: Rotated) -> Rotated:
    q, terms = _skew(delta), delta.settings.get("terms")
    r = cayley(q) if terms is None else neumann(q, terms, old=bool(delta.settings.get("old")))
    if delta.settings.get("turned"):
        r = r.transpose(1, 2).contiguous()
    return _made(delta, "blocks", blocks=r)


def _oft_extent(delta: Rotated) -> int:
    if delta.settings.get("share"):
        return 0
    return delta.parts["vectors"].shape[0] * int(delta.settings["size"])


def _turn_blocks(delta: Rotated, x: Tensor, first: int) -> Tensor:
    r = delta.parts["blocks"].tensor()
    size = r.shape[-1]
    if len(r) > 1:
        r = r[first // size : first // size + len(x) // size]
    return (r @ x.reshape(-1, size, x.shape[1])).reshape(x.shape)


def butterfly(extent: int, size: int, stage: int, stages: int) -> list[int]:
    """Where row i of a stage comes from (BOFT, peft:tuners/boft/layer.py).

    In each run of 2^stage blocks, the halves of blocks at even places stand before the others.
    """
    if stages == 1:
        return list(range(extent))
    half, run = size // 2, size << stage
    halves = [*range(0, run // half, 2), *range(1, run // half, 2)]
    within = [half * h + i for h in halves for i in range(half)]
    return [at + i for at in range(0, extent, run) for i in within]


def _boft(delta: Rotated) -> Rotated:
    blocks = _wide(delta.parts["blocks"])
    stages, count, size, _ = blocks.shape
    q = 0.5 * (blocks - blocks.transpose(2, 3))
    r = cayley(q.reshape(-1, size, size)).reshape(blocks.shape)
    if stages == 1:
        return _made(delta, "blocks", blocks=r[0])
    import torch

    orders = [butterfly(count * size, size, stage, stages) for stage in range(stages)]
    return _made(delta, "butterfly", blocks=r, orders=torch.tensor(orders, device=blocks.device))


def _turn_butterfly(delta: Rotated, x: Tensor, first: int) -> Tensor:
    import torch

    for r, order in zip(
        delta.parts["blocks"].tensor(), delta.parts["orders"].tensor(), strict=True
    ):
        back, size = torch.argsort(order), r.shape[-1]
        x = (r @ x[back].reshape(-1, size, x.shape[1])).reshape(x.shape)[order]
    return x


# ------------------------------------------------------------------------------- reflections


def _householder(delta: Rotated) -> Rotated:
    """W0·Π(I - 2uuᵀ) = W0·(I + P·Uᵀ), so that R = I + U·Pᵀ (HRA, peft:tuners/hra/layer.py)."""
    import torch

    u = _wide(delta.parts["u"])
    columns: list[Tensor] = []
    products: list[Tensor] = []
    for i in range(u.shape[1]):
        v = u[:, i]
        for w in columns if delta.settings.get("orthogonal") else ():
            v = v - (w @ v) * w
        v = v / torch.linalg.vector_norm(v)
        p = v.clone()
        for w, before in zip(columns, products, strict=True):
            # Orthogonal by the method's own words: what rounding leaves is not multiplied out.
            p = p if delta.settings.get("orthogonal") else p + before * (w @ v)
        columns.append(v)
        products.append(-2 * p)
    right = torch.stack(products, 1)
    return _made(delta, "reflected", left=torch.stack(columns, 1), right=right)


def _turn_reflected(delta: Rotated, x: Tensor, first: int) -> Tensor:
    left, right = delta.parts["left"].tensor(), delta.parts["right"].tensor()
    return x + left @ (right.T @ x)


# ------------------------------------------------------------------------------- pairs of rows

_PER_ROW = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}


def _road_extent(delta: Rotated) -> int:
    return int(delta.parts["theta"].numel / _PER_ROW[delta.settings["variant"]])


def _road(delta: Rotated) -> Rotated:
    """The cosines and sines by row, scaled (RoAd, peft:tuners/road/layer.py)."""
    theta, alpha = _wide(delta.parts["theta"]), _wide(delta.parts["alpha"])
    group = delta.settings["group"]
    match delta.settings["variant"]:
        case "road_1":  # both halves of a group share theirs
            theta, alpha = (
                t.reshape(-1, 1, group // 2).expand(-1, 2, -1).reshape(-1) for t in (theta, alpha)
            )
            pairs = (theta, theta), (alpha, alpha)
        case "road_2":
            pairs = (theta, theta), (alpha, alpha)
        case _:
            both = [t.reshape(-1, 2, group) for t in (theta, alpha)]
            pairs = tuple((t[:, 0].reshape(-1), t[:, 1].reshape(-1)) for t in both)  # type: ignore[assignment]
    (near, far), (first, second) = pairs
    sizes = delta.parts["theta"].tensor().new_tensor([group]).long()
    return _made(delta, "paired", along=first * near.cos(), across=second * far.sin(), group=sizes)


def _turn_paired(delta: Rotated, x: Tensor, first: int) -> Tensor:
    import torch

    group = int(delta.parts["group"].tensor())
    at = slice(first, first + len(x))
    along, across = (delta.parts[n].tensor()[at, None] for n in ("along", "across"))
    halves = x.reshape(-1, 2, group // 2, x.shape[1])
    other = torch.stack((-halves[:, 1], halves[:, 0]), 1).reshape(x.shape)
    return x * along + other * across


# ------------------------------------------------------------------------------- all


def _ready_already(delta: Rotated) -> Rotated:
    return delta


def _size(part: str, axis: int) -> Callable[[Rotated], int]:
    return lambda delta: delta.parts[part].shape[axis]


def _blocks_extent(delta: Rotated) -> int:
    count, size, _ = delta.parts["blocks"].shape
    return 0 if count == 1 else count * size


def _many(delta: Rotated) -> int:
    _, count, size, _ = delta.parts["blocks"].shape
    return count * size


def _together(delta: Rotated) -> int:
    stages, _, size, _ = delta.parts["blocks"].shape
    return 0 if stages > 1 else size


def _said(setting: str) -> Callable[[Rotated], int]:
    return lambda delta: int(delta.settings[setting])


def _all_rows(delta: Rotated) -> int:
    return 0


METHODS: dict[str, Method] = {
    **{name: Method(*made) for name, made in lycoris_rotations.METHODS.items()},
    # As read:
    "oft": Method(_oft_extent, _said("size"), _oft, _turn_blocks),
    "boft": Method(_many, _together, _boft, _turn_butterfly),
    "householder": Method(_size("u", 0), _all_rows, _householder, _turn_reflected),
    "road": Method(_road_extent, _said("group"), _road, _turn_paired),
    # As made ready:
    "blocks": Method(_blocks_extent, _size("blocks", -1), _ready_already, _turn_blocks),
    "butterfly": Method(_many, _all_rows, _ready_already, _turn_butterfly),
    "reflected": Method(_size("left", 0), _all_rows, _ready_already, _turn_reflected),
    "paired": Method(
        _size("along", 0), lambda d: int(d.parts["group"].tensor()), _ready_already, _turn_paired
    ),
    **{name: Method(*made) for name, made in lycoris_rotations.METHODS.items()},
}
_MADE = frozenset(("blocks", "butterfly", "reflected", "paired"))
