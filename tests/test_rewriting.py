"""Deltas rewritten for another layout change that layout's weight as the first did the first."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools import algebra, rewriting
from loratools.adapter import (
    Chained,
    Dense,
    Experts,
    Kind,
    LowRank,
    Relative,
    Renormed,
    Replace,
    Rotated,
)
from tests.examples_of_deltas import (
    EXAMPLES,
    NORMED,
    NORMED_IN,
    PAIR,
    SHAPE,
    diff,
    folded,
    leaf,
    lengths,
    numbers,
    pair,
)
from tests.refusing import refused

each = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max(initial=0) <= 1e-13 * max(1, np.abs(wanted).max(initial=0))


def same(one: Kind, other: Kind) -> bool:
    """Whether two deltas hold the same tensors bit for bit."""
    return repr_of(one) == repr_of(other)


def repr_of(delta: Kind | None) -> object:
    if delta is None:
        return None
    fields = {}
    for name in delta.__dataclass_fields__:
        value = getattr(delta, name)
        if hasattr(value, "held"):
            value = (value.dtype, value.shape, value.read())
        elif isinstance(value, Kind):
            value = repr_of(value)
        fields[name] = value
    return type(delta), fields


def by_rows(delta: Kind | None) -> bool:
    return isinstance(delta, Replace) and (delta.rows is not None or by_rows(delta.then))


def rows_mixed(delta: Kind) -> bool:
    """Whether some rows of the weight have no delta of their own."""
    if isinstance(delta, Rotated):
        return delta.side == "out"
    return isinstance(delta, Chained) or column_norm(delta)


def column_norm(delta: Kind | None) -> bool:
    if isinstance(delta, Replace):
        return column_norm(delta.then)
    return isinstance(delta, Renormed) and delta.axis == "in"


# ------------------------------------------------------------------------------- transposing


@each
def test_the_transposed_delta_changes_the_transposed_weight(example):
    if isinstance(example.delta, Experts):
        turned = rewriting.transpose(example.delta)
        close(folded(turned, example.w0.swapaxes(1, 2)), example.folded.swapaxes(1, 2))
        return
    if example.w0.ndim != 2 or by_rows(example.delta):
        if "flat on" not in example.name:
            refused("usage", rewriting.transpose, example.delta)
        return
    turned = rewriting.transpose(example.delta)
    if isinstance(turned, Relative):
        w0 = torch.from_numpy(example.w0.T.copy())
        ready = algebra.prepare(turned, lambda: [(0, w0)])
        close(algebra.apply(ready, w0).numpy(), example.folded.T)
    else:
        close(folded(turned, example.w0.T), example.folded.T)
    assert same(rewriting.transpose(turned), example.delta)


def of_the_module(then: Kind) -> Kind:
    """What is applied upon a stored tensor, the way a module with another orientation has it."""
    if not isinstance(then, Replace):
        return rewriting.transpose(then)
    return then if then.then is None else replace(then, then=of_the_module(then.then))


@each
def test_as_stored_turns_all_but_full_tensors(example):
    delta = example.delta
    full = isinstance(delta, Dense) or (isinstance(delta, Replace) and delta.then is None)
    if full:
        assert rewriting.as_stored(delta) == delta
    elif isinstance(delta, Replace):
        # What is applied upon a full tensor is given for the module, the tensor as it is stored.
        mirrored = replace(delta, then=of_the_module(delta.then))
        found = rewriting.as_stored(mirrored)
        close(folded(found, example.w0), example.folded)
    elif example.w0.ndim == 2:
        assert same(rewriting.as_stored(delta), rewriting.transpose(delta))


def test_a_transposed_delta_keeps_what_its_file_said():
    delta = replace(pair(1, scaling=2.0, alpha=4.0, dtype=torch.bfloat16))
    turned = rewriting.transpose(delta)
    assert (turned.scaling, turned.alpha, turned.a.dtype, turned.b.dtype) == (2, 4, "BF16", "BF16")


def test_a_column_norm_found_before_does_not_outlive_a_transposition():
    prepared = replace(NORMED_IN, norm=lengths(1, 5))
    assert rewriting.transpose(prepared).norm is None


# ------------------------------------------------------------------------------- rows


@each
@settings(max_examples=5)
@given(cut=st.lists(st.integers(0, 6), min_size=2, max_size=2))
def test_rows_of_a_delta_change_those_rows(example, cut):
    if by_rows(example.delta) or rows_mixed(example.delta) or not example.w0.ndim:
        refused("usage", rewriting.rows, example.delta, 0, 2)
        return
    start, stop = sorted(min(c, len(example.w0)) for c in cut)
    part = rewriting.rows(example.delta, start, stop)
    if "flat on" not in example.name:
        close(folded(part, example.w0[start:stop]), example.folded[start:stop])


@each
def test_a_permuted_delta_changes_the_permuted_weight(example):
    if by_rows(example.delta) or rows_mixed(example.delta) or not example.w0.ndim:
        refused("usage", rewriting.permute, example.delta, [1, 0])
        return
    order = np.random.default_rng(0).permutation(len(example.w0))
    mixed = rewriting.permute(example.delta, order.tolist())
    close(folded(mixed, example.w0[order]), example.folded[order])
    back = rewriting.permute(mixed, np.argsort(order).tolist())
    assert same(back, rewriting.rows(example.delta, 0, len(order)))


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 5, 6]])
def test_only_a_permutation_permutes(order):
    refused("usage", rewriting.permute, PAIR, order)


# ------------------------------------------------------------------------------- stacking

STACKS = {
    "low rank": [pair(1, (6, 5)), pair(3, (2, 5), rank=1, scaling=-2.0), pair(5, (3, 5), rank=4)],
    "low rank, conv": [pair(1, (6, 5, 3)), pair(3, (2, 5, 3), rank=1)],
    "one": [pair(1, scaling=3.0)],
    "dense": [diff(1, 6, 5), diff(2, 3, 5, scaling=2.0)],
    "bias": [diff(1, 6), diff(2, 3, scaling=2.0)],
    "renormed": [NORMED, Renormed(pair(4, (3, 5), scaling=2.0), lengths(5, 1, 3))],
    "renormed, dense": [Renormed(diff(4), lengths(5, 6)), Renormed(diff(6, 2, 5), lengths(7, 2))],
    "replace": [Replace(leaf(1, 6, 5)), Replace(leaf(2, 3, 5, dtype=torch.float16))],
    "replace, f8": [Replace(leaf(n, 2, 5, dtype=torch.float8_e4m3fn)) for n in (1, 2)],
}


def height(delta: Kind) -> int:
    match delta:
        case LowRank(b=b):
            return b.shape[0]
        case Dense(diff=whole) | Replace(value=whole):
            return whole.shape[0]
        case Renormed(delta=inner):
            return height(inner)


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_changes_every_part_as_its_own_delta_does(name):
    parts = STACKS[name]
    whole = rewriting.stack(parts)
    inner = {"low rank, conv": (5, 3), "bias": ()}.get(name, (5,))
    w0 = [numbers(50 + i, height(p), *inner) for i, p in enumerate(parts)]
    wanted = [folded(p, w) for p, w in zip(parts, w0, strict=True)]
    close(folded(whole, np.concatenate(w0)), np.concatenate(wanted))
    at = 0
    for base, result in zip(w0, wanted, strict=True):
        close(folded(rewriting.rows(whole, at, at + len(base)), base), result)
        at += len(base)
    if isinstance(whole, LowRank):
        assert whole.rank == sum(p.rank for p in parts)
        assert len(whole.b.shape) == len(whole.a.shape)


@pytest.mark.parametrize(
    "parts",
    [
        [PAIR, diff(1)],
        [diff(1), PAIR],
        [NORMED, PAIR],
        [NORMED, NORMED_IN],
        [NORMED_IN, NORMED_IN],
        [Replace(leaf(1, *SHAPE)), Replace(leaf(2, 2, 5), rows=(0, 1))],
        [Replace(leaf(1, *SHAPE), then=PAIR), Replace(leaf(1, *SHAPE))],
        [Replace(leaf(1, *SHAPE)), Replace(leaf(1, *SHAPE), then=PAIR)],
        [Replace(leaf(1, *SHAPE)), PAIR],
        [PAIR, pair(1, (6, 4))],
        [diff(1, 6, 5), diff(2, 6, 4)],
        [Replace(leaf(1, 6, 5)), Replace(leaf(2, 6, 4))],
        [],
    ],
)
def test_what_has_no_common_form_is_not_stacked(parts):
    refused("usage", rewriting.stack, parts)
