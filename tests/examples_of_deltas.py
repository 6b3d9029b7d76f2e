"""One delta of every kind and variant, and what each makes of a weight, from first principles."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from loratools.adapter import (
    Additive,
    Chained,
    Dense,
    Experts,
    Hadamard,
    Kind,
    Kronecker,
    Leaf,
    LowRank,
    Renormed,
    Replace,
    Rotated,
    Scaled,
    Sparse,
    Spectral,
)
from tests.floats import exact
from tests.kinds import formulas

SHAPE = (6, 5)  # of most weights here, so that their deltas can be mixed
Matrix = np.ndarray


@dataclass(frozen=True)
class Example:
    """A delta, and the weight (float64, in the shape it is stored) that it changes."""

    name: str
    delta: Kind = field(repr=False)
    w0: Matrix = field(repr=False)

    @property
    def is_additive(self) -> bool:
        return isinstance(self.delta, Additive)

    @property
    def folded(self) -> Matrix:
        return folded(self.delta, self.w0)

    @property
    def update(self) -> Matrix:
        return self.folded - self.w0


def folded(delta: Kind, w0: Matrix) -> Matrix:
    """W as the papers write it, in numpy's longest floats, rounded to float64."""
    return np.asarray(_folded(delta, w0.astype(np.longdouble)), dtype=np.float64)


def _folded(delta: Kind, w0: Matrix) -> Matrix:
    match delta:
        case LowRank(a=a, b=b, scaling=scaling):
            down, up = values(a), values(b).reshape(b.shape[:2])
            update = np.einsum("or,r...->o...", up, down)
            return w0 + np.longdouble(scaling) * update.reshape(w0.shape)
        case Dense(diff=diff, scaling=scaling):
            return w0 + np.longdouble(scaling) * values(diff)
        case Hadamard(w1_a=a1, w1_b=b1, w2_a=a2, w2_b=b2, t1=None, scaling=scaling):
            update = (values(a1) @ values(b1)) * (values(a2) @ values(b2))
            return w0 + np.longdouble(scaling) * update.reshape(w0.shape)
        case Kronecker(w1=Leaf() as w1, w2=Leaf() as w2, scaling=scaling):
            return w0 + np.longdouble(scaling) * np.kron(values(w1), values(w2))
        case Experts(a=a, b=b, scaling=scaling):
            update = np.einsum("eor,eri->eoi", values(b), values(a))
            return w0 + np.longdouble(scaling) * update
        case Chained(method="pissa" | "olora" as method, parts=parts, scaling=scaling):
            a, b = values(parts["a"]), values(parts["b"])
            q = orthonormal(w0[:, : len(a)])
            if method == "pissa":  # to the leading directions, by multiplying again and again
                q = np.linalg.svd(w0.astype(np.float64))[0][:, : len(a)].astype(np.longdouble)
                for _ in range(20):
                    q = orthonormal(w0 @ (w0.T @ q))
            taken = q @ (q.T @ w0) * (scaling if method == "olora" else 1)
            return w0 - taken + np.longdouble(scaling) * (b @ a)
        case Scaled(by="elements", factor=LowRank() as factor, offset=offset):
            return w0 * (offset + _folded(factor, np.zeros_like(w0)))
        case Scaled(by=by, factor=Leaf() as factor, offset=offset):
            flat = values(factor).reshape(-1) + np.longdouble(offset)
            shape = (-1, 1) if by == "rows" else (1, -1)
            return w0 * flat.reshape(*shape, *[1 for _ in w0.shape[2:]])
        case Chained(method="miss", parts=parts):
            block = values(parts["block"])
            w = w0.copy()
            for o, i in np.ndindex(*w.shape):
                w[o, i] += block[i % block.shape[0], o % block.shape[1]]
            return w
        case Chained(method="miss bat", parts=parts):
            block, w = values(parts["block"]), w0.copy()
            r = block.shape[1]
            for o, i in np.ndindex(w.shape[0] // r, w.shape[1] // r):
                at = slice(o * r, (o + 1) * r), slice(i * r, (i + 1) * r)
                w[at] += w0[at] @ block[o] + block[o]
            return w
        case Rotated() | Sparse() | Spectral() | Chained():
            return formulas.folded(delta, w0)
        case Renormed(delta=inner, magnitude=magnitude, axis=axis):
            v, m = _folded(inner, w0), values(magnitude).reshape(-1)
            w = np.empty_like(v)
            for i in range(len(m)):
                at = (i,) if axis == "out" else (slice(None), i)
                w[at] = m[i] * v[at] / np.sqrt(np.sum(v[at] * v[at]))
            return w
        case Replace(value=value, rows=rows, then=then):
            w = values(value).copy() if rows is None else w0.copy()
            for i, row in enumerate(rows or ()):
                w[row] = values(value)[i]
            return w if then is None else _folded(then, w)
    raise AssertionError(delta)


def orthonormal(columns: Matrix) -> Matrix:
    """An orthonormal basis of the same columns, by Gram and Schmidt, twice over."""
    q = columns.copy()
    for i in [*range(q.shape[1])] * 2:
        q[:, i] -= q[:, :i] @ (q[:, :i].T @ q[:, i])
        q[:, i] /= np.sqrt(q[:, i] @ q[:, i])
    return q


def values(leaf: Leaf) -> Matrix:
    """A leaf's numbers, decoded from its bits."""
    return exact(leaf.tensor()).astype(np.longdouble)


# -------------------------------------------------------------------------------- making them


@dataclass(frozen=True)
class Bytes:
    """A source in memory."""

    raw: bytes
    name: str = "bytes"

    @property
    def size(self) -> int:
        return len(self.raw)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        return self.raw[offset : offset + length]


def numbers(seed: int, *shape: int) -> Matrix:
    return np.random.default_rng(seed).normal(size=shape)


def leaf(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Leaf:
    return Leaf.of(f"leaf {seed}", torch.from_numpy(numbers(seed, *shape)).to(dtype))


def pair(
    seed: int,
    shape: tuple[int, ...] = SHAPE,
    rank: int = 2,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
    alpha: float | None = None,
) -> LowRank:
    """A low-rank delta for a weight of this shape, its factors as PEFT shapes them."""
    a = leaf(seed, rank, *shape[1:], dtype=dtype)
    b = leaf(seed + 1, shape[0], rank, *[1 for _ in shape[2:]], dtype=dtype)
    return LowRank(a, b, scaling, alpha)


def diff(seed: int, *shape: int, scaling: float = 1.0) -> Dense:
    return Dense(leaf(seed, *(shape or SHAPE)), scaling)


def places(*axes: list[int]) -> Leaf:
    """Flat places, or rows and columns."""
    return Leaf.of("places", torch.tensor(axes if len(axes) > 1 else axes[0], dtype=torch.int32))


def lengths(seed: int, *shape: int) -> Leaf:
    """Positive magnitudes."""
    return Leaf.of("magnitude", torch.from_numpy(abs(numbers(seed, *shape)) + 0.5).float())


def from_bytes(found: Leaf) -> Leaf:
    """The same leaf behind a source, somewhere inside it."""
    return replace(found, source=Bytes(b"12345678" + found.read()), offset=8, held=None)


def from_columns(found: Leaf) -> Leaf:
    """The same matrix behind a source that stores it column by column, as torch files may."""
    columns = Leaf.of("columns", found.tensor().T.contiguous())
    rows = found.shape[0]
    return replace(
        found, source=Bytes(b"1234" + columns.read()), offset=4, strides=(1, rows), held=None
    )


PAIR = pair(1)
NORMED = Renormed(pair(2), lengths(3, 6))
NORMED_IN = Renormed(pair(4), lengths(5, 5), "in")

_DELTAS: dict[str, Kind] = {
    "low rank": PAIR,
    "low rank, rank 1": pair(6, rank=1),
    "low rank, rank beyond both sides": pair(7, rank=8),
    "low rank, alpha kept": pair(8, scaling=2.0, alpha=4.0),
    "low rank, negative scaling": pair(9, scaling=-0.75),
    "low rank, large scaling": pair(10, scaling=2000.0),
    "low rank, small scaling": pair(11, scaling=1 / 3000),
    "low rank, bf16": pair(12, dtype=torch.bfloat16, scaling=0.5),
    "low rank, f16": pair(13, dtype=torch.float16),
    "low rank, f64": pair(14, dtype=torch.float64, scaling=1 / 3),
    "low rank, f8 e4m3": pair(15, dtype=torch.float8_e4m3fn),
    "low rank, f8 e5m2": pair(16, dtype=torch.float8_e5m2, scaling=3.0),
    "low rank, two dtypes": replace(PAIR, b=leaf(17, 6, 2, dtype=torch.float16)),
    "low rank, from bytes": LowRank(from_bytes(PAIR.a), from_bytes(PAIR.b), 2.0),
    "low rank, from columns": LowRank(from_columns(PAIR.a), from_columns(PAIR.b), 2.0),
    "low rank, zero": replace(PAIR, b=Leaf.of("zero", torch.zeros(6, 2))),
    "low rank, tall": pair(18, (40, 3), rank=3),
    "low rank, wide": pair(19, (3, 40), rank=3),
    "low rank, square": pair(20, (5, 5), scaling=2.0),
    "low rank, embedding": LowRank(leaf(21, 2, 11), leaf(22, 4, 2), 2.0),  # (dim, vocabulary)
    "low rank, conv1d": pair(23, (6, 4, 3)),
    "low rank, conv2d": pair(24, (6, 4, 3, 2), scaling=0.5),
    "low rank, conv3d": pair(25, (4, 3, 2, 1, 2)),
    "low rank, conv 1x1": pair(26, (6, 5, 1, 1)),
    "low rank, flat on conv 1x1": pair(27),
    "dense": diff(30),
    "dense, scaled": diff(31, scaling=-0.5),
    "dense, bf16": Dense(leaf(32, *SHAPE, dtype=torch.bfloat16)),
    "dense, f8": Dense(leaf(33, *SHAPE, dtype=torch.float8_e4m3fn), 0.5),
    "dense, square": diff(34, 5, 5),
    "dense, conv2d": diff(35, 3, 2, 2, 2),
    "dense, bias": diff(36, 7, scaling=2.0),
    "renormed": NORMED,
    "renormed, scaled": Renormed(pair(40, scaling=-3.0), lengths(41, 6)),
    "renormed, dense": Renormed(diff(42), lengths(43, 6)),
    "renormed, conv2d": Renormed(pair(44, (6, 4, 3, 2)), lengths(45, 1, 6, 1, 1)),
    "renormed, bf16": Renormed(
        pair(46, dtype=torch.bfloat16), Leaf.of("m", torch.tensor([0.5, 1, 2, 3, 4, 5]).bfloat16())
    ),
    "renormed, square": Renormed(pair(47, (5, 5)), lengths(48, 5)),
    "renormed in": NORMED_IN,
    "renormed in, dense": Renormed(diff(49), lengths(50, 5), "in"),
    "renormed in, embedding": Renormed(pair(51, (11, 4)), lengths(52, 4, 1), "in"),
    "loha": Hadamard(
        leaf(150, 6, 2), leaf(151, 2, 5), leaf(152, 6, 2), leaf(153, 2, 5), SHAPE, 0.5
    ),
    "loha, rank 1": Hadamard(
        leaf(154, 6, 1), leaf(155, 1, 5), leaf(156, 6, 1), leaf(157, 1, 5), SHAPE, -2.0
    ),
    "lokr": Kronecker(SHAPE, 0.5, w1=leaf(158, 2, 1), w2=leaf(159, 3, 5)),
    "lokr, square": Kronecker((6, 6), 1.0, w1=leaf(160, 2, 2), w2=leaf(161, 3, 3)),
    "replace": Replace(leaf(60, *SHAPE)),
    "replace, f16": Replace(leaf(61, *SHAPE, dtype=torch.float16)),
    "replace, f8": Replace(leaf(62, *SHAPE, dtype=torch.float8_e5m2)),
    "replace, bias": Replace(leaf(63, 7)),
    "replace, number": Replace(leaf(64)),
    "replace, conv2d": Replace(leaf(65, 3, 2, 2, 2)),
    "replace, then low rank": Replace(leaf(66, *SHAPE), then=PAIR),
    "replace, then renormed": Replace(leaf(67, *SHAPE), then=NORMED),
    "replace, then renormed in": Replace(leaf(68, *SHAPE), then=NORMED_IN),
    "replace, then rows": Replace(leaf(80, *SHAPE), then=Replace(leaf(81, 1, 5), rows=(3,))),
    "replace, then rows, then renormed in": Replace(
        leaf(82, *SHAPE), then=Replace(leaf(83, 2, 5), rows=(3, 0), then=NORMED_IN)
    ),
    "replace rows": Replace(leaf(69, 3, 5), rows=(4, 0, 2)),
    "replace rows, none": Replace(leaf(70, 0, 5), rows=()),
    "replace rows, bias": Replace(leaf(71, 2), rows=(6, 1)),
    "replace rows, then low rank": Replace(leaf(72, 2, 5), rows=(5, 1), then=PAIR),
    "replace rows, then renormed": Replace(leaf(73, 2, 5), rows=(0, 3), then=NORMED),
    "replace rows, then renormed in": Replace(leaf(74, 2, 5), rows=(0, 3), then=NORMED_IN),
    "experts": Experts(leaf(250, 3, 2, 5), leaf(251, 3, 4, 2), 0.5),
    "experts, square, bf16": Experts(
        leaf(252, 2, 2, 4, dtype=torch.bfloat16), leaf(253, 2, 4, 2, dtype=torch.bfloat16), -1.5
    ),
    "experts, high": Experts(leaf(254, 2, 1, 3), leaf(255, 2, 9, 1), 2.0, 2.0),
    "pissa": Chained("pissa", {"a": leaf(256, 2, 5), "b": leaf(257, 6, 2)}, 0.5),
    "olora": Chained("olora", {"a": leaf(258, 2, 5), "b": leaf(259, 6, 2)}, 0.5),
    "scaled rows": Scaled("rows", leaf(400, 6, 1)),
    "scaled rows, offset": Scaled("rows", leaf(401, 6), 1.0),
    "scaled columns": Scaled("columns", leaf(402, 1, 5)),
    "scaled columns, offset": Scaled("columns", leaf(403, 5, dtype=torch.bfloat16), 1.0),
    "scaled columns, conv2d": Scaled("columns", leaf(404, 1, 4, 1, 1)),
    "scaled elements": Scaled("elements", pair(405), 1.0),
    "scaled elements, scaled": Scaled("elements", pair(407, scaling=-0.5)),
    "scaled elements, conv2d": Scaled("elements", pair(409, (6, 4, 3, 2)), 1.0),
    "miss": Chained("miss", {"block": leaf(411, 2, 6)}),
    "miss, again along the rows": Chained("miss", {"block": leaf(412, 3, 3)}, 1.0, {"mini": True}),
    "miss bat": Chained("miss bat", {"block": leaf(413, 6, 1, 1)}),
    "miss bat, blocks": Chained("miss bat", {"block": leaf(414, 2, 3, 3)}),
    "oft": Rotated("oft", "in", {"vectors": leaf(300, 1, 10)}, {"size": 5, "share": False}),
    "oft, rows": Rotated("oft", "out", {"vectors": leaf(301, 2, 3)}, {"size": 3, "share": False}),
    "oft, shared": Rotated("oft", "out", {"vectors": leaf(302, 1, 1)}, {"size": 2, "share": True}),
    "boft": Rotated("boft", "in", {"blocks": leaf(303, 1, 1, 5, 5), "scale": leaf(304, 6)}),
    "boft, stages": Rotated("boft", "in", {"blocks": leaf(305, 2, 4, 2, 2)}),
    "hra": Rotated("householder", "in", {"u": leaf(306, 5, 2)}),
    "hra, orthogonal": Rotated("householder", "out", {"u": leaf(307, 6, 3)}, {"orthogonal": True}),
    "road": Rotated(
        "road", "out", {"theta": leaf(308, 6), "alpha": leaf(309, 6)},
        {"variant": "road_2", "group": 2},
    ),
    "sparse": Sparse(leaf(310, 3), places([5, 0, 5], [4, 1, 4]), SHAPE, -0.5),
    "fourier": Spectral("fourier", {"spectrum": leaf(311, 9)}, SHAPE, 15.0, {"seed": 3}),
    "fourier, of any base": Chained("fourier", {"spectrum": leaf(312, 9)}, 15.0, {"seed": 3}),
    "circulant": Spectral("circulant", {"kernel": leaf(313, 3, 2, 2)}, (6, 4), 0.25),
    "supra": Spectral(
        "supra",
        {"values": leaf(314, 2), "indices": places([29, 0]), "a": leaf(315, 2, 5),
         "b": leaf(316, 6, 2)},
        SHAPE, 1.0, {"pair": 0.5},
    ),
    "places of any base": Chained("places", {"values": leaf(317, 2), "indices": places([7, 28])}),
    "glora of peft": Chained(
        "glora of peft",
        {"A.Xd": leaf(318, 6, 2), "A.Xu": leaf(319, 2, 5), "B.X": leaf(320, 6, 1)},
    ),
    "deft": Chained(
        "deft", {"P": leaf(321, 6, 2), "R": leaf(322, 2, 5)}, 1.5, {"decomposition": "relu"}
    ),
    "peanut": Chained(
        "peanut", {"A": leaf(323, 2, 6), "B": leaf(324, 6, 2)}, 0.5, {"act": "relu", "depth": 0}
    ),
}  # fmt: skip

# Weights of another shape than the rest, where the delta alone does not tell it.
_SHAPES: dict[str, tuple[int, ...]] = {
    "low rank, flat on conv 1x1": (6, 5, 1, 1),
    "replace rows, bias": (7,),
    "boft, stages": (6, 8),
    "scaled columns, conv2d": (6, 4, 3, 2),
    "scaled elements, conv2d": (6, 4, 3, 2),
    "miss bat, blocks": (6, 9),
}


def _weight(name: str, delta: Kind) -> Matrix:
    match delta:
        case LowRank(a=a, b=b) | Renormed(delta=LowRank(a=a, b=b)):
            shape: tuple[int, ...] = (b.shape[0], *a.shape[1:])
        case (
            Dense(diff=whole) | Renormed(delta=Dense(diff=whole)) | Replace(value=whole, rows=None)
        ):
            shape = whole.shape
        case Hadamard() | Kronecker() | Experts() | Sparse() | Spectral():
            shape = delta.shape
        case _:
            shape = SHAPE
    # A seed of the name: another example in the list moves no other's numbers.
    return numbers(zlib.crc32(name.encode()), *_SHAPES.get(name, shape))


EXAMPLES = [Example(name, delta, _weight(name, delta)) for name, delta in _DELTAS.items()]


def chosen(wanted: Callable[[Example], bool]) -> list[Example]:
    return [e for e in EXAMPLES if wanted(e)]


ADDITIVE = chosen(lambda e: e.is_additive)
MIXABLE = chosen(lambda e: e.w0.shape == SHAPE)
