"""One delta of every kind and variant, and what each makes of a weight, from first principles."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from loratools.adapter import Dense, Kind, Leaf, LowRank, Renormed, Replace
from tests.floats import exact

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
        return isinstance(self.delta, LowRank | Dense)

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
}

# Weights of another shape than the rest, where the delta alone does not tell it.
_SHAPES: dict[str, tuple[int, ...]] = {
    "low rank, flat on conv 1x1": (6, 5, 1, 1),
    "replace rows, bias": (7,),
}


def _weight(name: str, delta: Kind) -> Matrix:
    match delta:
        case LowRank(a=a, b=b) | Renormed(delta=LowRank(a=a, b=b)):
            shape: tuple[int, ...] = (b.shape[0], *a.shape[1:])
        case (
            Dense(diff=whole) | Renormed(delta=Dense(diff=whole)) | Replace(value=whole, rows=None)
        ):
            shape = whole.shape
        case _:
            shape = SHAPE
    # A seed of the name: another example in the list moves no other's numbers.
    return numbers(zlib.crc32(name.encode()), *_SHAPES.get(name, shape))


EXAMPLES = [Example(name, delta, _weight(name, delta)) for name, delta in _DELTAS.items()]


def chosen(wanted: Callable[[Example], bool]) -> list[Example]:
    return [e for e in EXAMPLES if wanted(e)]


ADDITIVE = chosen(lambda e: e.is_additive)
MIXABLE = chosen(lambda e: e.w0.shape == SHAPE)
