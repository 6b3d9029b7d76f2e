"""The span of a rule holds what torch really computes under it, and little else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter import Dense, Leaf, LowRank, Renormed, Replace
from loratools.proving.rules import (
    EXACT,
    Rule,
    Span,
    point,
    prepared,
    replayed,
    rules_for,
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def pair(b, a, scaling):
    return LowRank(Leaf.of("A", a), Leaf.of("B", b), scaling)


def span_of(rule, deltas, w0, seen):
    terms = [d if isinstance(d, tuple) else (1.0, d) for d in deltas]
    span = replayed(prepared(terms, rule), w0, 0, rule, seen)
    assert span is not None
    return span


def holds(span, seen):
    return bool(((span.low <= seen.double()) & (seen.double() <= span.high)).all())


# How a tool computes the weight, in torch's own words, and the rule that must hold the outcome.
def at_once(w0, b, a, s):
    return (w0.float() + (b @ a) * s).to(w0.dtype)


def in_place(w0, b, a, s):
    w0 = w0.clone()
    w0 += (b @ a) * s
    return w0


def scaled_first(w0, b, a, s):
    return (w0.float() + (s * b) @ a).to(w0.dtype)


def other_order(w0, b, a, s):
    total = torch.zeros(len(b), a.shape[1])
    for r in reversed(range(len(a))):
        total += b[:, r : r + 1] * a[r]
    return (w0.float() + total * s).to(w0.dtype)


def delta_first(w0, b, a, s):
    return w0 + ((b @ a) * s).to(w0.dtype)


def factors(w0, b, a, s):
    b, a = b.to(w0.dtype).float(), a.to(w0.dtype).float()
    return w0 + ((b @ a) * s).to(w0.dtype)


def product(w0, b, a, s):
    return w0 + (b.to(w0.dtype) @ a.to(w0.dtype)) * s


WAYS = [
    (at_once, {}),
    (in_place, {}),
    (scaled_first, {}),
    (other_order, {}),
    (delta_first, {"delta_first": True}),
    (factors, {"factors": True}),
    (product, {"factors": True, "product_first": True}),
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("way", "how"), WAYS)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 70)),
    size=st.sampled_from([1e-6, 1e-3, 0.05, 1.0, 30.0]),
    scaling=st.sampled_from([1.0, 2.0, 1.5, -0.3, 0.1]),
)
def test_what_torch_computes_lies_in_the_span(way, how, dtype, seed, shape, size, scaling):
    draw = torch.Generator().manual_seed(seed)
    height, rank, width = shape
    b = torch.randn(height, rank, generator=draw) * size
    a = torch.randn(rank, width, generator=draw)
    w0 = torch.randn(height, width, generator=draw).to(dtype)
    multiplied = dtype if how.get("factors") else F32
    rule = Rule(dtype, multiplied, how.get("delta_first", False), how.get("product_first", False))
    written = way(w0, b, a, scaling)
    span = span_of(rule, [pair(b, a, scaling)], w0, written)
    assert holds(span, written)
    assert bool((span.low <= span.high).all())


@pytest.mark.parametrize(("way", "how"), WAYS)
def test_a_span_leaves_little_open(way, how):
    how = dict(how)
    draw = torch.Generator().manual_seed(1)
    b, a = torch.randn(128, 16, generator=draw) * 0.01, torch.randn(16, 128, generator=draw)
    w0 = torch.randn(128, 128, generator=draw).to(BF16)
    rule = Rule(BF16, BF16 if how.pop("factors", False) else F32, **how)
    span = span_of(rule, [pair(b, a, 1.5)], w0, w0)
    assert (span.low == span.high).double().mean() > 0.999
    wide = w0.float()
    span = span_of(Rule(F32, F32), [pair(b, a, 1.5)], wide, wide)
    # An alpha that is wrong by a thousandth moves elements fifty times as far.
    update = (span.exact - wide.double()).square().mean().sqrt()
    assert ((span.high - span.low) <= 2e-5 * update).double().mean() > 0.999


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 30), st.integers(1, 8), st.integers(1, 300)),
    multiplied=st.booleans(),
)
def test_a_dora_lies_in_the_span(dtype, seed, shape, multiplied):
    draw = torch.Generator().manual_seed(seed)
    height, rank, width = shape
    used = dtype if multiplied else F32
    b = (torch.randn(height, rank, generator=draw) * 0.05).to(used)
    a = torch.randn(rank, width, generator=draw).to(used)
    m = (torch.randn(height, generator=draw)).to(used)
    w0 = torch.randn(height, width, generator=draw).to(dtype)
    delta = ((b.float() @ a.float()) * 1.5).to(used)
    whole = w0 + delta
    factor = (m / torch.linalg.norm(whole, dim=1).to(whole.dtype)).view(-1, 1)
    written = (factor * whole).to(dtype)
    renormed = Renormed(pair(b, a, 1.5), Leaf.of("m", m))
    assert holds(span_of(Rule(dtype, used), [renormed], w0, written), written)


def test_a_span_follows_one_adapter_after_another():
    draw = torch.Generator().manual_seed(2)
    pairs = [(torch.randn(64, 4, generator=draw) * 0.1, torch.randn(4, 64, generator=draw))
             for _ in range(3)]  # fmt: skip
    w0 = torch.randn(64, 64, generator=draw).to(BF16)
    written = w0
    for b, a in pairs:
        written = in_place(written, b, a, 1.0)
    deltas = [pair(b, a, 1.0) for b, a in pairs]
    assert holds(span_of(Rule(BF16, F32), deltas, w0, written), written)
    assert not holds(span_of(Rule(BF16, F32, order="summed"), deltas, w0, written), written)
    b, a = torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs])
    summed = in_place(w0, b, a, 1.0)
    assert holds(span_of(Rule(BF16, F32, order="summed"), deltas, w0, summed), summed)


def test_weights_scale_deltas_but_not_what_is_replaced():
    w0, new = torch.zeros(3, 2), torch.ones(3, 2)
    dense, whole = Dense(Leaf.of("d", new), 2.0), Replace(Leaf.of("v", new))
    assert span_of(Rule(F32, F32), [(0.5, dense)], w0, w0).exact.tolist() == new.tolist()
    assert span_of(Rule(F32, F32), [(0.5, whole)], w0, w0).exact.tolist() == new.tolist()
    rows = Replace(Leaf.of("v", torch.full((1, 2), 7.0)), (1,))
    assert span_of(Rule(BF16, F32), [rows], w0, w0).low.tolist() == [[0, 0], [7, 7], [0, 0]]


def test_rows_that_the_base_lacks_come_from_what_replaces_them():
    whole = Replace(Leaf.of("v", torch.ones(3, 2)))
    seen = torch.ones(3, 2)
    terms = prepared([(1.0, whole)], Rule(F32, F32))
    assert holds(replayed(terms, None, 0, Rule(F32, F32), seen), seen)
    lone = prepared([(1.0, Dense(Leaf.of("d", torch.ones(3, 2))))], Rule(F32, F32))
    assert replayed(lone, None, 0, Rule(F32, F32), seen) is None


def test_rules_that_cannot_differ_are_tried_once():
    b, a = torch.zeros(4, 2), torch.zeros(2, 4)
    one = [(1.0, pair(b, a, 1.0))]
    assert rules_for(F32, F32, one) == [EXACT, Rule(F32, F32)]
    narrow = rules_for(BF16, BF16, one)
    assert len(narrow) == len(set(narrow)) == 6
    assert rules_for(F64, F64, one) == [EXACT, Rule(F64, F64), Rule(F32, F32)]
    both = rules_for(F32, F32, one * 2)
    assert {r.order for r in both} == {"chained", "summed"}
    names = [str(r) for r in rules_for(F16, BF16, [*one, (1.0, pair(b.half(), a.half(), 1.0))])]
    assert "factors and their product in float16, adapters summed first" not in names[:2]
    assert names[:2] == ["once from float64", "once from float32"]


@given(st.lists(st.floats(-9, 9), min_size=4, max_size=4), st.floats(-3, 3))
def test_spans_hold_every_product(numbers, scaling):
    one, two = (Span(*(torch.tensor([n], dtype=F64) for n in (min(p), max(p), p[0])))
                for p in (numbers[:2], numbers[2:]))  # fmt: skip
    for x in one[:2]:
        for y in two[:2]:
            assert one.times(two).low <= x * y <= one.times(two).high
            assert one.plus(two).low <= x + y <= one.plus(two).high
            assert one.minus(two).low <= x - y <= one.minus(two).high
    assert one.scaled(scaling).low <= one.exact * scaling <= one.scaled(scaling).high
    assert one.times(point(torch.tensor([2.0], dtype=F64))).low == 2 * one.low
