"""Rounding is checked number by number against a search among exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.desk import Desk
from loratools.narrowing import narrow
from tests.floats import FORMATS, Format, exact, patterns

SMALL = [f for f in FORMATS.values() if f.bits <= 16]
LARGEST = Fraction(np.finfo(np.float64).max)
each = pytest.mark.parametrize("form", FORMATS.values(), ids=lambda f: str(f.dtype)[6:])
each_small = pytest.mark.parametrize("form", SMALL, ids=lambda f: str(f.dtype)[6:])


def wanted(form: Format, values: list[float]) -> list[int]:
    """The patterns of numbers that are finite, by exact arithmetic."""
    return [form.nearest(Fraction(v), negative=math.copysign(1, v) < 0) for v in values]


def narrowed(form: Format, values: list[float]) -> list[int]:
    return patterns(narrow(torch.tensor(values, dtype=torch.float64), form.dtype)).tolist()


def by_torch(form: Format, values: list[float]) -> list[int]:
    """torch's own cast, by way of float32 as it goes for these."""
    return patterns(torch.tensor(values, dtype=torch.float64).to(form.dtype)).tolist()


def stepped(value: float, steps: int) -> float:
    """The float64 so many steps from another."""
    for _ in range(abs(steps)):
        value = math.nextafter(value, math.copysign(math.inf, steps))
    return value


@st.composite
def near_the_middle(draw: st.DrawFn, form: Format) -> float:
    """Numbers at, and barely beside, the middle of two neighbours of a format."""
    pattern = draw(
        st.one_of(
            st.integers(0, form.special - 1),
            st.integers(0, 2 << form.mantissa),  # subnormal, and where the normal ones begin
            st.integers(form.special - 3, form.special - 1),  # where infinity begins
            st.integers(1, (1 << form.exponent) - 2).map(lambda e: e << form.mantissa),
        )
    )
    middle = (form.value(pattern) + form.value(pattern + 1)) / 2
    value = float(min(middle, LARGEST))
    if draw(st.booleans()):
        value = stepped(value, draw(st.integers(-3, 3)))
    else:
        value *= 1 + draw(st.sampled_from([-1, 1])) * 2.0 ** draw(st.integers(-52, -8))
    value = min(value, float(LARGEST))
    return value if draw(st.booleans()) else -value


def many(form: Format) -> st.SearchStrategy[list[float]]:
    anything = st.floats(allow_nan=False, allow_infinity=False)
    usual = st.floats(-2, 2).map(lambda x: x * 2.0 ** -(form.bias // 2))
    return st.lists(st.one_of(near_the_middle(form), anything, usual), min_size=1, max_size=30)


@each
def test_every_number_becomes_its_nearest(form):
    @settings(max_examples=60)
    @given(values=many(form))
    def check(values: list[float]) -> None:
        assert narrowed(form, values) == wanted(form, values)

    check()


@each_small
def test_the_numbers_tried_are_such_that_torch_gets_them_wrong(form):
    wrong = tried = 0

    @settings(max_examples=60)
    @given(values=many(form))
    def count(values: list[float]) -> None:
        nonlocal wrong, tried
        pairs = zip(by_torch(form, values), wanted(form, values), strict=True)
        wrong += sum(a != b for a, b in pairs)
        tried += len(values)

    count()
    assert wrong > tried / 50


@each_small
def test_every_middle_and_its_neighbours(form):
    """All of them for eight bits, some thousand for sixteen."""
    step = 1 if form.bits == 8 else 37
    values = []
    for pattern in range(0, form.special, step):
        middle = float((form.value(pattern) + form.value(pattern + 1)) / 2)
        values += [stepped(middle, n) for n in (-1, 0, 1)]
    values += [-v for v in values]
    assert narrowed(form, values) == wanted(form, values)


@each_small
def test_every_number_of_a_format_is_itself(form):
    every = np.arange(form.special, dtype=np.int64)
    values = [float(form.value(int(p))) for p in every]
    assert narrowed(form, values) == every.tolist()


@pytest.mark.parametrize(
    ("value", "dtype", "result"),
    [
        (1 + 2**-8 + 2**-40, torch.bfloat16, 1.0078125),
        (1 + 2**-8 - 2**-40, torch.bfloat16, 1.0),
        (1 + 3 * 2**-8 - 2**-40, torch.bfloat16, 1.0078125),
        (1 + 2**-11 + 2**-40, torch.float16, 1 + 2**-10),
        (65519.999999999, torch.float16, 65504.0),
        (65520.0, torch.float16, torch.inf),
        (1 + 2**-4 + 2**-40, torch.float8_e4m3fn, 1.125),
        (463.99999999999, torch.float8_e4m3fn, 448.0),
        (464.0, torch.float8_e4m3fn, 448.0),
        (464.0000000001, torch.float8_e4m3fn, torch.nan),
        (61439.999999999, torch.float8_e5m2, 57344.0),
        (61440.0, torch.float8_e5m2, torch.inf),
        (2.0**-134, torch.bfloat16, 0.0),
        (2.0**-134 * (1 + 2**-50), torch.bfloat16, 2.0**-133),
        (2.0**-25 * (1 + 2**-50), torch.float16, 2.0**-24),
        (5e-324, torch.float16, 0.0),
        (1e308, torch.bfloat16, torch.inf),
        (3.4028235677973366e38, torch.float32, torch.inf),
        (1 + 2**-24 + 2**-52, torch.float32, 1 + 2**-23),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_known_to_go_wrong(value, dtype, result, sign):
    [found] = narrow(torch.tensor([sign * value], dtype=torch.float64), dtype).double().tolist()
    assert found == sign * result or (math.isnan(found) and math.isnan(result))


@each
def test_what_is_no_number_stays_what_it_is(form):
    nans = [0x7FF8000000000001, 0xFFF8000010000000, 0x7FF0000010000000, 0x7FFFFFFFFFFFFFFF]
    values = np.array([*np.array(nans, "<u8").view("<f8"), np.inf, -np.inf, 0.0, -0.0])
    found = narrow(torch.from_numpy(values), form.dtype)
    assert found[:4].double().isnan().all()
    if form.only_nan:
        assert found[4:6].double().isnan().all()
    else:
        assert found[4:6].double().tolist() == [math.inf, -math.inf]
    assert patterns(found[6:]).tolist() == [0, 1 << (form.bits - 1)]


# ------------------------------------------------------------------------------- memory


def doubtful(*shape: int) -> torch.Tensor:
    """Numbers half of which torch rounds wrongly."""
    rng = np.random.default_rng(0)
    values = 1 + rng.integers(0, 100, shape) * 2.0**-7 + 2.0**-8 + rng.choice([0, 2.0**-40], shape)
    return torch.from_numpy(values)


@each
def test_the_argument_is_not_changed_and_shares_nothing(form):
    values = doubtful(40)
    before = values.clone()
    found = narrow(values, form.dtype)
    kept = patterns(found).copy()
    assert torch.equal(values, before)
    values.zero_()
    assert np.array_equal(patterns(found), kept)


@each
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[:, ::2],
        lambda t: t[3],
        lambda t: t[3, 4],
        lambda t: t[:0],
        lambda t: t.reshape(4, 2, 5, 2).permute(3, 1, 0, 2),
        lambda t: t[:1].expand(3, -1),
    ],
    ids=["transposed", "every second", "row", "number", "empty", "permuted", "expanded"],
)
def test_any_shape_and_stride(form, view):
    values = view(doubtful(8, 10))
    found = narrow(values, form.dtype)
    assert found.shape == values.shape
    assert patterns(found).reshape(-1).tolist() == wanted(form, values.reshape(-1).tolist())


@each_small
def test_scratch_may_be_lent_and_used_again(form):
    room = Desk(torch.device("cpu")).room
    for values in (doubtful(8, 10), -doubtful(8, 10), doubtful(3, 2)):
        lent = narrow(values, form.dtype, room)
        assert np.array_equal(patterns(lent), patterns(narrow(values, form.dtype)))


# ------------------------------------------------------------------------------- the reference


@each_small
def test_the_reference_agrees_with_numpy_and_torch_about_what_patterns_mean(form):
    every = np.arange(form.special, dtype=f"<u{form.dtype.itemsize}")
    tensor = torch.from_numpy(every.view(np.uint8).copy()).view(form.dtype)
    assert exact(tensor).tolist() == tensor.double().tolist()
    assert [float(form.value(int(p))) for p in every[::7]] == tensor.double().tolist()[::7]


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_reference_rounds_float32_to_float16_as_numpy_does(value):
    with np.errstate(over="ignore"):
        theirs = int(np.float32(value).astype(np.float16).view(np.uint16))
    ours = FORMATS[torch.float16].nearest(Fraction(value), negative=math.copysign(1, value) < 0)
    assert ours == theirs


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_the_reference_rounds_float64_to_float32_as_numpy_does(value):
    with np.errstate(over="ignore"):
        theirs = int(np.float64(value).astype(np.float32).view(np.uint32))
    ours = FORMATS[torch.float32].nearest(Fraction(value), negative=math.copysign(1, value) < 0)
    assert ours == theirs
