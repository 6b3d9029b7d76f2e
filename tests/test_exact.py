"""Folds of low-rank updates against the exact sum: every element correctly rounded, in any order.

The oracle adds fractions and rounds them by whole-number arithmetic. The tiles are built so that
float64 alone gets some of them wrong, which the tests assert too.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import exact
from loratools.adapter import Dense, Leaf, LowRank
from loratools.exact import LowRankSum, TileSum
from loratools.folding import Desk, fold_tensor
from loratools.narrowing import narrow, settle
from tests.floats import FORMATS, Format, patterns
from tests.small_models import raw, target

ROUNDED = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", ROUNDED, ids=["f32", "bf16", "f16"])
Term = tuple[float, LowRank]  # (weight, delta)
Matrix = np.ndarray
TINY = 2.0**-60

# ------------------------------------------------------------------------------- the oracle


def pattern(value: Fraction, form: Format) -> int:
    """The bits of a number rounded to nearest, ties to even; what is too large is infinity."""
    top, bottom = abs(value.numerator), value.denominator
    sign = (value < 0) << (form.bits - 1)
    if not top:
        return 0
    power = top.bit_length() - bottom.bit_length()  # 2^(power-1) < |value| < 2^(power+1)
    power -= top << max(-power, 0) < bottom << max(power, 0)
    least = 1 - form.bias - form.mantissa  # the exponent of the smallest number
    step = max(power - form.mantissa, least)
    whole, rest = divmod(top << max(-step, 0), bottom << max(step, 0))
    twice, one = 2 * rest, bottom << max(step, 0)
    whole += twice > one or (twice == one and whole % 2 == 1)
    return min(((step - least) << form.mantissa) + whole, form.infinity) | sign


def exactly(w0: Matrix, terms: Sequence[Term]) -> Matrix:
    """W0 + Σ s·B·A as fractions; s is the float64 that scaling and weight give."""
    total = np.array([Fraction(x) for x in w0.reshape(-1).tolist()], object).reshape(w0.shape)
    for s, b, a in parts(terms):
        up = [[(k, Fraction(x)) for k, x in enumerate(row) if x] for row in b.tolist()]
        down = [[Fraction(x) for x in column] for column in a.T.tolist()]
        for i, j in np.ndindex(*w0.shape):
            total[i, j] += Fraction(s) * sum((x * down[j][k] for k, x in up[i]), Fraction(0))
    return total


def parts(terms: Sequence[Term]) -> Iterator[tuple[float, Matrix, Matrix]]:
    for weight, delta in terms:
        b, a = (x.tensor().double().numpy() for x in (delta.b, delta.a))
        yield delta.scaling * weight, b, a


def wanted(sums: Matrix, dtype: torch.dtype) -> list[int]:
    return [pattern(x, FORMATS[dtype]) for x in sums.reshape(-1)]


@pytest.mark.parametrize("form", [FORMATS[d] for d in ROUNDED], ids=["f32", "bf16", "f16"])
def test_the_oracle_agrees_with_a_search_among_all_numbers(form):
    rng = np.random.default_rng(0)
    sizes = [0, 1, 2, form.special - 1, form.special - 2, 1 << form.mantissa]
    for size in [*sizes, *rng.integers(0, form.special, 100).tolist()]:
        low, step = form.value(size), form.value(size + 1) - form.value(size)
        for part in (0, Fraction(1, 3), Fraction(1, 2), Fraction(1, 2) - Fraction(1, 2**70)):
            for value in (low + part * step, -low - part * step, low + (1 - part) * step):
                assert pattern(value, form) == form.nearest(value)


# ------------------------------------------------------------------------------- tiles


@dataclass(frozen=True)
class Tile:
    """W0 and the updates upon it, whose exact sums are known."""

    w0: Matrix
    terms: list[Term]
    sums: Matrix

    @classmethod
    def of(cls, w0: Matrix, terms: list[Term]) -> "Tile":
        return cls(w0, terms, exactly(w0, terms))

    @cached_property
    def whole(self) -> LowRankSum:
        found = LowRankSum.of(self.terms, self.w0.shape)
        assert found is not None
        return found

    @property
    def transposed(self) -> "Tile":
        terms = [(w, turned(d)) for w, d in self.terms]
        return Tile(np.ascontiguousarray(self.w0.T), terms, self.sums.T)

    def rounded(
        self, values: Matrix, dtype: torch.dtype, rows: slice = slice(None), **options
    ) -> list[int]:
        """What `narrow` makes of rows, of which float64 made `values`."""
        base = torch.from_numpy(self.w0[rows].copy())
        sums = TileSum(self.whole, rows.start or 0, base.clone)
        computed = torch.from_numpy(np.ascontiguousarray(values))
        return patterns(narrow(computed, dtype, sums=sums, **options)).reshape(-1).tolist()

    def alone(self, values: Matrix, dtype: torch.dtype) -> list[int]:
        """What float64 alone gives."""
        return patterns(narrow(torch.from_numpy(values.copy()), dtype)).reshape(-1).tolist()

    def wanted(self, dtype: torch.dtype) -> list[int]:
        return wanted(self.sums, dtype)


def turned(delta: LowRank) -> LowRank:
    a, b = (Leaf.of("", x.tensor().T.contiguous()) for x in (delta.b, delta.a))
    return LowRank(a, b, delta.scaling)


def low_rank(b: Matrix, a: Matrix, scaling: float = 1.0, dtype=torch.float64) -> LowRank:
    down, up = (torch.from_numpy(np.array(x)).to(dtype) for x in (a, b))
    return LowRank(Leaf.of("a", down), Leaf.of("b", up), scaling)


def orders(tile: Tile) -> dict[str, Matrix]:
    """Float64's sums of a tile, its numbers added in many orders."""
    steps = [(s * b[:, k : k + 1], a[k]) for s, b, a in parts(tile.terms) for k in range(len(a))]

    def added(chosen: Sequence[int], first: Matrix) -> Matrix:
        for k in chosen:
            first = first + steps[k][0] * steps[k][1]
        return first

    many, none = range(len(steps)), np.zeros_like(tile.w0)
    found = {
        "W0 first": added(many, tile.w0),
        "W0 last": added(many, none) + tile.w0,
        "from the end": added(many[::-1], tile.w0),
        "from the end, W0 last": added(many[::-1], none) + tile.w0,
        "in two halves": added(many[::2], tile.w0) + added(many[1::2], none),
    }
    rng = np.random.default_rng(3)
    for n in range(3):
        found[f"mixed {n}"] = added(rng.permutation(len(steps)).tolist(), tile.w0)
    w0, b, a = (torch.from_numpy(np.ascontiguousarray(x)) for x in (
        tile.w0, np.hstack([s[0] for s in steps]), np.vstack([s[1] for s in steps])))  # fmt: skip
    found["BLAS"] = torch.addmm(w0, b, a).numpy()
    found["BLAS, transposed"] = torch.addmm(w0.T, a.T, b.T).T.contiguous().numpy()
    # Anything as near as float64's error allows: of an element, not of the whole tile.
    size = sum(abs(s) * (np.abs(b) @ np.abs(a)) for s, b, a in parts(tile.terms))
    near = tile.sums.astype(np.float64)
    reach = tile.whole.roundings * 2.0**-53 * (np.abs(near) + 2 * size) * 0.9
    reach[size == 0] = 0
    for n in range(3):
        share = rng.choice([-1, 1, rng.uniform(-1, 1)], near.shape)
        found[f"noise {n}"] = near + reach * share
    found["noise of some ulp"] = near + np.spacing(near) * rng.integers(-4, 5, near.shape) * (
        size != 0
    )
    return found


def require_exact(tile: Tile, dtype: torch.dtype) -> dict[str, list[int]]:
    """That all orders give the exact sums, rounded, stored either way; what float64 alone gives."""
    goal = tile.wanted(dtype)
    there, sums = tile.transposed, orders(tile)
    for name, values in sums.items():
        assert tile.rounded(values, dtype) == goal, name
    for name in ("BLAS", "mixed 1", "noise 1"):
        found = np.array(there.rounded(sums[name].T, dtype)).reshape(there.w0.shape)
        assert found.T.reshape(-1).tolist() == goal, f"{name}, transposed"
    return {name: tile.alone(values, dtype) for name, values in sums.items()}


def random_tile(seed: int, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> Tile:
    rng = np.random.default_rng(seed)
    b, a = rng.normal(size=(shape[0], rank)) / rank, rng.normal(size=(rank, shape[1]))
    w0 = torch.from_numpy(rng.normal(size=shape)).to(dtype).double().numpy()
    return Tile.of(w0, [(0.7, low_rank(b, a, 1 / 3, torch.float32))])


@each_dtype
@pytest.mark.parametrize("shape", [(17, 9), (1, 8), (8, 1), (3, 40)])
def test_random_sums(dtype, shape):
    require_exact(random_tile(1, shape, 5, dtype), dtype)


# What the slots of an element hold, so that with W0 they make a middle `m` and something beside.
# (v, m, sign, rng) -> W0, pairs whose products are added, and one pair each for 0.1 and for 1/3.
Pair = tuple[float, float]
Slots = tuple[float, list[Pair], Pair, Pair]
Case = Callable[[float, float, int, np.random.Generator], Slots]
NONE = (0.0, 0.0)


def beside(v: float, m: float, sign: int, rng: np.random.Generator) -> Slots:
    """W0 is the middle itself, the update less than float64 can add to it."""
    return m, [(sign * m, TINY)], NONE, NONE


def half_a_step(v: float, m: float, sign: int, rng: np.random.Generator) -> Slots:
    """The update is half a step of the dtype, and barely more or less."""
    return v, [(m - v, 1.0), (sign * m, TINY)], NONE, NONE


def split(v: float, m: float, sign: int, rng: np.random.Generator) -> Slots:
    """Half a step in parts of which the last ones are lost one by one."""
    h = m - v
    lost = [(sign * h, 2.0**-54), (sign * h, 2.0**-55), (-sign * h, 2.0**-57)]
    return v, [(h / 4, 3.0), (h / 4, 1.0), *lost], NONE, NONE


def inexact(v: float, m: float, sign: int, rng: np.random.Generator) -> Slots:
    """A product that needs more than 53 bits: 1 - x², where float64 has 1."""
    x = 2.0 ** -rng.integers(28, 40)
    if not sign:
        return v, [(m - v, 1.0)], NONE, NONE
    if sign < 0:
        return v, [((m - v) * (1 + x), 1 - x)], NONE, NONE
    return v, [((m - v) * (1 + x), 1 + x), (v - m, 2 * x)], NONE, NONE  # 1 + x²


def a_tenth(v: float, m: float, sign: int, rng: np.random.Generator) -> Slots:
    """Ten tenths: the float64 0.1 is more than a tenth, which 10 · 0.1 does not show."""
    return v, [NONE], (10 * (m - v), 1.0), NONE


def a_third(v: float, m: float, sign: int, rng: np.random.Generator) -> Slots:
    """Three thirds: the float64 1/3 is less than a third, which 3 · (1/3) does not show."""
    return v, [NONE], NONE, (3 * (m - v), 1.0)


def cancelling(v: float, m: float, sign: int, rng: np.random.Generator) -> Slots:
    """All that matters is lost beside two large products that cancel."""
    large = v * 2.0 ** rng.integers(50, 70)
    return v, [(large, 1.5), (m - v, 1.0), (sign * m, TINY), (-1.5, large)], NONE, NONE


def cancelling_w0(v: float, m: float, sign: int, rng: np.random.Generator) -> Slots:
    """W0 is large and cancels with a product; the rest is small."""
    large = v * 2.0 ** rng.integers(20, 54)
    return -large, [(m, 1.0), (large, 1.0), (sign * m, TINY)], NONE, NONE


def cancelling_products(v: float, m: float, sign: int, rng: np.random.Generator) -> Slots:
    """Large products that all but cancel: what is left of them is what float64 cut off."""
    x, large = 2.0**-30, sign * m * 2.0**6
    return m, [(large * (1 + x), 1 + x), (-large, 1.0), (-large * x, 2.0)], NONE, NONE


MILD = [beside, half_a_step, split, inexact, a_tenth, a_third]
HARD = [cancelling, cancelling_w0, cancelling_products]
HEIGHT, WIDTH = 4, 3


def built(dtype: torch.dtype, kinds: Sequence[Case], powers: tuple[int, int], seed: int) -> Tile:
    """A tile of cases: every element has rows of A and columns of B of its own.

    Of the numbers of the dtype those from 2^powers[0] to 2^powers[1] are taken.
    """
    rng, form = np.random.default_rng(seed), FORMATS[dtype]
    first, last = (pattern(Fraction(2.0**p), form) for p in powers)
    w0, slots = np.zeros((HEIGHT, WIDTH)), {1.0: 5, 0.1: 1, 1 / 3: 1}
    up = {s: np.zeros((HEIGHT, WIDTH, HEIGHT * WIDTH, n)) for s, n in slots.items()}
    down = {s: np.zeros_like(x) for s, x in up.items()}
    for own, (i, j) in enumerate(np.ndindex(HEIGHT, WIDTH)):
        size = int(rng.integers(first, min(last, form.special)))
        v, above = float(form.value(size)), float(form.value(size + 1))
        case, sign, flip = (
            kinds[(own + seed) % len(kinds)],
            int(rng.integers(-1, 2)),
            rng.choice([-1.0, 1.0]),
        )
        start, pairs, tenth, third = case(v, (v + above) / 2, sign, rng)
        w0[i, j] = flip * start
        for s, held in ((1.0, pairs), (0.1, [tenth]), (1 / 3, [third])):
            for k, (x, y) in enumerate(held):
                up[s][i, :, own, k], down[s][:, j, own, k] = flip * x, y
    terms = []
    for weight, scaling in ((1.0, 1.0), (0.1, 1.0), (1.0, 1 / 3)):
        b, a = up[weight * scaling][:, 0], down[weight * scaling][0]
        b, a = b.reshape(HEIGHT, -1), a.reshape(WIDTH, -1).T
        used = b.any(0) & a.any(1)
        if used.any():
            terms.append((weight, low_rank(b[:, used], a[used], scaling)))
    return Tile.of(w0, terms)


# Powers of two between which the numbers lie; the last are subnormal, the first overflow.
RANGES = {
    torch.float32: [(-2, 3), (-60, 60), (126, 128), (-149, -124)],
    torch.bfloat16: [(-2, 3), (-60, 60), (126, 128), (-133, -124)],
    torch.float16: [(-2, 3), (-12, 12), (14, 16), (-24, -12)],
}
ranges = [(d, p) for d in ROUNDED for p in RANGES[d]]
each_range = pytest.mark.parametrize(
    ("dtype", "powers"), ranges, ids=[f"{str(d)[6:]}-{a}:{b}" for d, (a, b) in ranges]
)


@each_range
@pytest.mark.parametrize("kinds", [MILD, HARD], ids=["mild", "hard"])
def test_sums_in_the_middle_and_barely_beside_it(dtype, powers, kinds):
    lost: Counter[str] = Counter()
    apart = 0
    for seed in range(2):
        tile = built(dtype, kinds, powers, seed)
        goal = np.array(tile.wanted(dtype))
        alone = require_exact(tile, dtype)
        lost += Counter({name: int(np.sum(goal != found)) for name, found in alone.items()})
        apart += len(set(map(tuple, alone.values()))) > 1
    # Float64 alone gets many wrong in every order, and they are not the same ones.
    assert len(lost) == len(alone)
    assert min(lost.values()) >= 2, lost
    assert apart


@each_dtype
@pytest.mark.parametrize("case", MILD + HARD, ids=lambda c: c.__name__)
def test_every_case_is_one_that_float64_alone_gets_wrong(dtype, case):
    tiles = [built(dtype, [case], (-2, 3), seed) for seed in range(3)]
    assert any(
        tile.alone(orders(tile)[name], dtype) != tile.wanted(dtype)
        for tile in tiles
        for name in ("W0 first", "W0 last", "from the end", "BLAS")
    )
    middle = [x for tile in tiles for x in tile.sums.reshape(-1) if is_middle(x, dtype)]
    assert middle or case in (a_tenth, a_third)


def is_middle(value: Fraction, dtype: torch.dtype) -> bool:
    """Whether a number is as far from the one below as from the one above it."""
    form = FORMATS[dtype]
    here = pattern(abs(value), form)
    steps = [abs(form.value(p) - abs(value)) for p in (here - 1, here, here + 1)]
    return steps[1] in (steps[0], steps[2])


# ------------------------------------------------------------------------------- edges


def of_floats(value: Matrix, dtype: torch.dtype) -> Matrix:
    """Numbers rounded to a dtype, in float64, without negative zeros."""
    return torch.from_numpy(value).to(dtype).double().numpy() + 0.0


@each_dtype
@pytest.mark.parametrize("size", [1.0, 2.0**-14, 2.0**-24, 2.0**-70, 2.0**-147])
def test_w0_takes_the_update_away(dtype, size):
    """W0 = -round(ΔW): what is left is rounding alone, or nothing, or below all numbers."""
    rng = np.random.default_rng(5)
    b, a = rng.normal(size=(9, 3)), rng.normal(size=(3, 7))
    b[2], b[4] = 0, [1, 0, 0]  # a row of W0 itself, a row of A itself
    a[:, 5] = 0
    b[6], a[:, 3] = [0.5, -0.5, 0], 1  # ΔW is 0 there, its products are not
    terms = [(size, low_rank(b, a, 0.3, torch.bfloat16))]
    update = exactly(np.zeros((9, 7)), terms).astype(np.float64)
    w0 = -of_floats(update, dtype)
    w0[1], w0[7, 2] = 0, -0.0
    tile = Tile.of(w0, terms)
    goal = tile.wanted(dtype)
    assert goal.count(0) >= 7
    require_exact(tile, dtype)


@each_dtype
def test_a_sum_of_nothing_has_no_sign_and_one_that_is_too_small_keeps_its_own(dtype):
    """Also where float64's error is far more than what is left."""
    b = np.array([[1.0, 1, 1], [1, 1, -1], [1, 1, 0], [0, 0, 1], [0, 0, -1], [0, 0, 0]])
    a = np.array([[2.0**40, 3], [-(2.0**40), -3], [2.0**-200, 2.0**-160]])
    tile = Tile.of(np.zeros((6, 2)), [(1.0, low_rank(b, a))])
    tile.w0[5, 1] = -0.0
    minus = 1 << (FORMATS[dtype].bits - 1)
    assert tile.wanted(dtype) == [0, 0, minus, minus, 0, 0, 0, 0, minus, minus, 0, 0]
    require_exact(tile, dtype)
    noise = np.array([[2.0**-30, -(2.0**-52)]]) * (b[:, :1] != 0)
    for values in (noise, -noise, -noise * 0):
        kept = b[:, :1] == 0
        there = np.where(kept, tile.sums.astype(np.float64), values)
        assert tile.rounded(there, dtype) == tile.wanted(dtype)


@each_dtype
def test_rows_that_are_not_touched_and_weights_that_are_zero(dtype):
    for seed, what in enumerate(["rows of B", "columns of A", "W0"]):
        tile = random_tile(seed, (8, 6), 3, dtype)
        weight, delta = tile.terms[0]
        w0, b, a = tile.w0.copy(), delta.b.tensor().clone(), delta.a.tensor().clone()
        match what:
            case "rows of B":
                b[::2] = 0
            case "columns of A":
                a[:, ::2] = 0
            case _:
                w0[::2] = 0
        require_exact(Tile.of(w0, [(weight, low_rank(b.numpy(), a.numpy(), 0.1))]), dtype)


@each_dtype
def test_what_is_too_large_is_infinite_and_what_is_barely_not_is_the_largest_number(dtype):
    form = FORMATS[dtype]
    end = float(form.value(form.special))
    middle = (end + float(form.value(form.special - 1))) / 2
    w0 = np.array([[middle] * 3, [-middle] * 3, [end, -end, 0.75 * end]])
    b = np.array([[1.0], [-1.0], [1.0]])
    tile = Tile.of(w0, [(1.0, low_rank(b, np.array([[0.0, middle * TINY, -middle * TINY]])))])
    top, infinity, minus = form.special - 1, form.infinity, 1 << (form.bits - 1)
    found = tile.wanted(dtype)
    assert found[:3] == [infinity, infinity, top]
    assert found[3:6] == [infinity | minus, infinity | minus, top | minus]
    assert tile.alone(tile.sums.astype(np.float64), dtype) != found
    require_exact(tile, dtype)


@each_dtype
@pytest.mark.parametrize("size", [1.0, 2.0**60, 2.0**200])
def test_what_is_no_number_stays_and_raises_nothing(dtype, size):
    """Even where float64's error is more than all numbers of the dtype."""
    tile = random_tile(1, (5, 6), 2, dtype)
    _, delta = tile.terms[0]
    b, a = delta.b.tensor().double().numpy(), delta.a.tensor().double().numpy() * size
    b[0] = 0
    tile = Tile.of(tile.w0, [(1.0, low_rank(b, a))])
    goal = np.array(tile.wanted(dtype)).reshape(5, 6)
    values = orders(tile)["BLAS"]
    odd = {(0, 0): np.nan, (1, 2): np.inf, (2, 3): -np.inf, (4, 5): -np.nan, (0, 5): np.inf}
    for at, value in odd.items():
        tile.w0[at] = values[at] = value
    found = np.array(tile.rounded(values, dtype)).reshape(5, 6)
    special, sign = FORMATS[dtype].infinity, 1 << (FORMATS[dtype].bits - 1)
    for at, value in odd.items():
        if np.isnan(value):
            assert found[at] & ~sign > special
        else:
            assert found[at] == special | (sign if value < 0 else 0)
        goal[at] = found[at]
    assert found.tolist() == goal.tolist()


@each_dtype
def test_the_largest_numbers_of_float64_raise_nothing(dtype):
    w0 = np.array([[np.finfo(np.float64).max, -np.finfo(np.float64).max, 1e300, 1.0]])
    tile = Tile.of(w0, [(1.0, low_rank(np.ones((1, 1)), np.full((1, 4), 1e140)))])
    assert tile.rounded(w0 + 1e140, dtype) == tile.wanted(dtype)


# ------------------------------------------------------------------------------- portions


@each_dtype
@pytest.mark.parametrize("at_once", [64, 1 << 20])
def test_a_large_rank_in_any_portions(dtype, at_once, monkeypatch):
    monkeypatch.setattr(exact, "AT_ONCE", at_once)
    rng = np.random.default_rng(2)
    b = rng.integers(-8, 9, (4, 300)) / 16.0
    a = rng.integers(-8, 9, (300, 5)) / 2.0**9
    b[:, 299], a[299] = [0, 1, -1, 1], TINY
    w0 = of_floats(rng.normal(size=(4, 5)), dtype)
    sums = exactly(w0, [(1.0, low_rank(b, a))])
    for at in np.ndindex(4, 5):  # W0 moves every sum to the middle of two numbers
        form = FORMATS[dtype]
        size = pattern(abs(sums[at]), form)
        middle = (form.value(size) + form.value(size + 1)) / 2
        w0[at] += float((middle if sums[at] > 0 else -middle) - sums[at])
    tile = Tile.of(w0, [(1.0, low_rank(b, a))])
    goal, sums = tile.wanted(dtype), orders(tile)
    assert tile.alone(sums["BLAS"], dtype) != goal
    for name in ("BLAS", "from the end", "mixed 0", "noise 1"):
        assert tile.rounded(sums[name], dtype) == goal


@each_dtype
@pytest.mark.parametrize("kinds", [MILD, HARD], ids=["mild", "hard"])
def test_rows_of_a_tile_and_lent_memory(dtype, kinds):
    room = Desk(torch.device("cpu")).room
    for seed in range(3):
        tile = built(dtype, kinds, (-2, 3), seed)
        goal, values = tile.wanted(dtype), orders(tile)["mixed 0"]
        for start, stop in ((0, 4), (1, 2), (2, 4)):
            rows = slice(start, stop)
            found = tile.rounded(values[rows], dtype, rows, room=room)
            assert found == goal[start * WIDTH : stop * WIDTH]


@each_dtype
def test_some_elements_are_settled_and_the_others_left_alone(dtype):
    tile = built(dtype, MILD, (-2, 3), 1)
    values = torch.from_numpy(orders(tile)["W0 last"])
    sums = TileSum(tile.whole, 0, lambda: torch.from_numpy(tile.w0))
    out = torch.full(values.shape, 7.0, dtype=dtype)
    at = torch.tensor([11, 3, 4, 3])
    settle(sums, out, at[:0], values.view(-1)[at[:0]])
    assert bool((out == 7).all())
    settle(sums, out, at, values.view(-1)[at])
    goal, untouched = tile.wanted(dtype), patterns(torch.tensor(7.0, dtype=dtype)).item()
    found = patterns(out).reshape(-1).tolist()
    assert found == [goal[i] if i in (3, 4, 11) else untouched for i in range(12)]


def test_w0_is_asked_for_only_where_a_sum_is_added_exactly():
    asked = []
    tile = random_tile(1, (6, 5), 2, torch.float32)
    sums = TileSum(tile.whole, 0, lambda: asked.append(1) or torch.from_numpy(tile.w0))
    values = torch.from_numpy(orders(tile)["BLAS"])
    narrow(values, torch.bfloat16, sums=sums)
    assert not asked
    near = built(torch.bfloat16, [beside], (-2, 3), 0)
    sums = TileSum(near.whole, 0, lambda: asked.append(1) or torch.from_numpy(near.w0))
    narrow(torch.from_numpy(near.w0), torch.bfloat16, sums=sums)
    assert asked


# ------------------------------------------------------------------------------- no such sum


def some(*shape: int) -> Leaf:
    return Leaf.of("x", torch.ones(shape))


PAIR = LowRank(some(2, 5), some(4, 2), 1.0)
BAD = {
    "nothing": [],
    "not low-rank": [(1.0, PAIR), (1.0, Dense(some(4, 5)))],
    "fewer rows": [(1.0, PAIR), (1.0, LowRank(some(2, 5), some(3, 2), 1.0))],
    "more columns": [(1.0, LowRank(some(2, 6), some(4, 2), 1.0))],
    "B of zeros": [(1.0, LowRank(some(2, 5), Leaf.of("b", torch.zeros(4, 2)), 1.0))],
    "A of zeros": [(1.0, LowRank(Leaf.of("a", torch.zeros(2, 5)), some(4, 2), 1.0))],
    "weight 0": [(0.0, PAIR)],
    "scaling 0": [(1.0, LowRank(some(2, 5), some(4, 2), 0.0))],
    "rank 0": [(1.0, LowRank(some(0, 5), some(4, 0), 1.0))],
}
for bad in (np.nan, np.inf, -np.inf):
    BAD |= {
        f"B with {bad}": [(1.0, PAIR), (1.0, LowRank(
            some(2, 5), Leaf.of("b", torch.tensor([[1, 1], [1, bad], [1, 1], [0, 0]])), 1.0))],
        f"A with {bad}": [(1.0, LowRank(
            Leaf.of("a", torch.tensor([[1, 1, 1, 1, bad]])), some(4, 1), 1.0)), (1.0, PAIR)],
        f"scaling {bad}": [(1.0, LowRank(some(2, 5), some(4, 2), bad))],
        f"weight {bad}": [(bad, PAIR)],
    }  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_no_sum_of_low_rank_updates(name):
    assert LowRankSum.of([(1.0, PAIR)], (4, 5)) is not None
    assert LowRankSum.of(BAD[name], (4, 5)) is None


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_no_sum_of_no_elements(shape):
    delta = LowRank(some(2, shape[1]), some(shape[0], 2), 1.0)
    assert LowRankSum.of([(1.0, delta)], shape) is None


def test_no_product_of_an_element_is_more_than_the_most():
    tile = built(torch.float32, MILD + HARD, (-2, 3), 0)
    size = sum(abs(s) * (np.abs(b) @ np.abs(a)) for s, b, a in parts(tile.terms))
    assert size.max() <= tile.whole.most * (1 + 1e-12)
    rank = sum(d.rank for _, d in tile.terms)
    assert tile.whole.roundings >= rank + 2  # B's scaling, its products and sums, W0


# ------------------------------------------------------------------------------- whole folds


FACTORS = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@st.composite
def folds(draw: st.DrawFn) -> tuple[torch.Tensor, list[Term]]:
    """A weight and low-rank terms, many of whose sums are in the middle, zero or tiny."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    coarse = draw(st.booleans())

    def numbers(*shape: int) -> Matrix:
        return rng.integers(-4, 5, shape) / 4 if coarse else rng.normal(size=shape)

    terms = []
    for _ in range(draw(st.integers(1, 3))):
        rank, dtype = draw(st.integers(1, 4)), draw(st.sampled_from(FACTORS))
        size = 2.0 ** draw(st.sampled_from([0, -3, -8]))
        b, a = numbers(height, rank), numbers(rank, width) * size
        for rows in (b, a.T):
            rows[rng.random(len(rows)) < draw(st.sampled_from([0, 0.4]))] = 0
        scaling = draw(st.sampled_from([1.0, 0.5, 1 / 3, 0.1, 2.0]))
        terms.append((draw(st.sampled_from([1.0, -0.7, 0.25])), low_rank(b, a, scaling, dtype)))
    update = exactly(np.zeros((height, width)), terms).astype(np.float64)
    start = {
        "any": lambda: numbers(height, width),
        "zero": lambda: np.zeros((height, width)),
        "taken away": lambda: -update,
        # With the update, the middle of two numbers of bfloat16 or float16, if W0 can say so.
        "to a middle": lambda: 1 + (2.0 ** draw(st.sampled_from([-8, -11, -24]))) - update,
    }[draw(st.sampled_from(["any", "zero", "taken away", "to a middle"]))]()
    base = torch.from_numpy(start + 0.0).to(draw(st.sampled_from([*ROUNDED, torch.float64])))
    return torch.where(base == 0, 0, base), terms


def fold(base: torch.Tensor, terms: Sequence[Term], dtype: torch.dtype) -> torch.Tensor:
    one = target("w", Leaf.of("w", base), base.shape, *terms)
    return fold_tensor(one, base, dtype=dtype)[0]


@each_dtype
def test_a_fold_is_exact_and_the_same_transposed(dtype):
    wrong = 0

    @settings(max_examples=60)
    @given(case=folds())
    def check(case: tuple[torch.Tensor, list[Term]]) -> None:
        nonlocal wrong
        base, terms = case
        found = fold(base, terms, dtype)
        turned_terms = [(weight, turned(delta)) for weight, delta in terms]
        there = fold(base.T.contiguous(), turned_terms, dtype)
        assert raw(there.T) == raw(found)
        again = fold(base, terms[::-1], dtype)
        assert raw(again) == raw(found)
        tile = Tile.of(base.double().numpy(), terms)
        assert patterns(found).reshape(-1).tolist() == tile.wanted(dtype)
        by_float64 = orders_plain(tile)
        wrong += any(tile.alone(v, dtype) != tile.wanted(dtype) for v in by_float64)

    check()
    assert wrong >= 3


def orders_plain(tile: Tile) -> list[Matrix]:
    """The sum as numpy makes it, W0 first and last."""
    first, last = tile.w0, np.zeros_like(tile.w0)
    for s, b, a in parts(tile.terms):
        first, last = first + (s * b) @ a, last + (s * b) @ a
    return [first, last + tile.w0]


@each_dtype
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_convolution_is_folded_as_its_matrix(dtype, stored):
    rng = np.random.default_rng(4)
    b, a = rng.normal(size=(6, 3)), rng.normal(size=(3, 36))
    flat = low_rank(b, a, 1 / 3, stored)
    kernel = LowRank(
        Leaf.of("a", flat.a.tensor().view(3, 4, 3, 3)),
        Leaf.of("b", flat.b.tensor().view(6, 3, 1, 1)),
        1 / 3,
    )
    base = torch.from_numpy(-of_floats((b @ a) / 3, dtype)).to(dtype).view(6, 4, 3, 3)
    one = target("w", Leaf.of("w", base), base.shape, (1.0, kernel))
    found, _ = fold_tensor(one, base, dtype=dtype)
    tile = Tile.of(base.view(6, 36).double().numpy(), [(1.0, flat)])
    assert patterns(found).reshape(-1).tolist() == tile.wanted(dtype)
