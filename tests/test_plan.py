"""Whatever binding lets through can be folded, and gives what the deltas say."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter import Dense, Kind, Leaf, LowRank, Renormed, Replace
from loratools.bind import bind
from loratools.containers.bundle import Bundle
from loratools.folding import fold_tensor
from loratools.plan import Plan
from loratools.weights.base import Base, Shard
from tests.bases import adapter
from tests.examples_of_deltas import folded
from tests.floats import exact

SIZES = st.sampled_from([1, 2, 3])
NAMES = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    "h.0.attn.c_proj.weight",
    "h.0.q.weight",
    "h.0.q.bias",
    "score.weight",
    "scale",
]
SHAPES = st.one_of(
    st.tuples(SIZES, SIZES),
    st.tuples(SIZES, SIZES),
    st.tuples(SIZES),
    st.just(()),
    st.tuples(SIZES, SIZES, SIZES),
    st.tuples(SIZES, SIZES, st.just(1), st.just(1)),
)
Shape = tuple[int, ...]


def some(shape: Shape) -> Leaf:
    values = np.random.default_rng(sum(shape)).uniform(0.5, 2, shape).astype("f4")
    return Leaf.of("some", torch.from_numpy(np.asarray(values)))


@st.composite
def deltas_for(draw: st.DrawFn, shape: Shape, depth: int = 0) -> Kind:
    """A delta that fits a weight of this shape, in most cases."""
    if draw(st.integers(0, 19)) == 0:
        shape = draw(SHAPES)
    sort = draw(st.sampled_from(["low rank", "dense", "renormed", "replace", "rows"]))
    if sort in ("low rank", "renormed") and len(shape) >= 2:
        pair = LowRank(some((2, *shape[1:])), some((shape[0], 2, *[1] * len(shape[2:]))), 0.5)
        return pair if sort == "low rank" else Renormed(pair, some(shape[:1]))
    if sort == "dense":
        return Dense(some(shape))
    then = None
    if depth < 2 and draw(st.booleans()):
        inner = draw(deltas_for(shape, depth=depth + 1))
        pointless = isinstance(inner, Replace) and inner.rows is None
        then = None if isinstance(inner, Dense) or pointless else inner
    if sort != "rows" or not shape:
        grown = (shape[0] + draw(st.integers(0, 1)), *shape[1:]) if shape else ()
        return Replace(some(grown), None, then)
    most = shape[0] if draw(st.booleans()) else shape[0] - 1
    rows = draw(st.lists(st.integers(0, max(most, 0)), max_size=3, unique=True))
    return Replace(some((len(rows), *shape[1:])), tuple(rows), then)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[dict[str, Kind]], dict[str, Shape]]:
    """Some adapters, and the shapes of a base that most of their deltas fit."""
    shapes = {n: draw(SHAPES) for n in NAMES}
    there = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    names = st.lists(st.sampled_from([*there * 4, *NAMES]), min_size=1, max_size=3)
    adapters = [
        {n: draw(deltas_for(shapes[n])) for n in draw(names)}
        for _ in range(draw(st.integers(1, 3)))
    ]
    return adapters, {n: shapes[n] for n in there}


def in_memory(tensors: dict[str, Shape], config: dict[str, object]) -> Base:
    held = {n: some(s) for n, s in tensors.items()}
    none = Bundle("memory", (), lambda name: pytest.fail(name))
    return Base(none, (Shard("s", held, {}, ""),), held, config)


def carried_out(plan: Plan, *, waived: bool) -> Counter[str]:
    """Folds all targets of a plan, if it may be; the codes that stop it."""
    stopped = Counter(
        p.code for p in plan.problems if p.severity == "error" and not (waived and p.waivable)
    )
    for name, target in plan.targets.items() if not stopped else ():
        if not target.terms:
            continue
        start = None if target.base is None else target.base.tensor()
        found, _ = fold_tensor(target, start, dtype=torch.float64)
        assert found.shape == target.shape, name
        if waived or target.base is None or target.shape != target.base.shape:
            continue
        if not any(t.place.transposed for t in target.terms):
            w0 = exact(target.base.tensor())
            updates = [t.weight * (folded(t.delta, w0) - w0) for t in target.terms]
            assert np.allclose(found.numpy(), w0 + sum(updates), atol=1e-11)
    return stopped or Counter(["fits"])


def test_a_plan_without_errors_can_be_carried_out():
    """Binding never fails itself, and folding never meets a shape that binding let through."""
    seen: Counter[str] = Counter()

    @settings(max_examples=500)
    @given(
        world=worlds(),
        config=st.sampled_from(
            [
                {"tie_word_embeddings": False},
                {"tie_word_embeddings": True},
                {},
                {"model_type": "gpt2"},
            ]
        ),
        ties=st.sampled_from([None, "tied", "untied"]),
        turned=st.booleans(),
    )
    def check(world, config, ties, turned):
        given_, tensors = world
        names = frozenset({"model.embed_tokens.weight"} if turned else ())
        adapters = [replace(adapter(d), transposed=names) for d in given_]
        weights = [0.5 + i for i in range(len(adapters))]
        plan = bind(adapters, in_memory(tensors, config), weights=weights, ties=ties)
        seen.update(carried_out(plan, waived=False))
        carried_out(plan, waived=True)

    check()
    # Worth something only if many plans are carried out and many are refused.
    assert seen["fits"] > 50
    assert {"shape_mismatch", "unmatched", "vocabulary"} <= set(seen)
