"""Embeddings, heads and their rows: what is one tensor stays one, and a vocabulary has one size."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from loratools.adapter import Adapter, Dense, Kind, Leaf, LowRank, Renormed, Replace
from loratools.bind import bind
from loratools.errors import Problem
from loratools.folding import fold_tensor
from loratools.plan import Plan
from tests.bases import adapter, base, lora, unread
from tests.floats import exact

EMBED, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"
Q = "model.layers.0.q_proj.weight"
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
ONE = base({EMBED: [10, 4], Q: [4, 4]}, TIED)  # both in one stored tensor
TWICE = base({EMBED: [10, 4], HEAD: [10, 4], Q: [4, 4]}, TIED)  # tied, and stored twice
TWO = base({EMBED: [10, 4], HEAD: [10, 4], Q: [4, 4]}, UNTIED)


def errors(plan: Plan) -> list[Problem]:
    return [p for p in plan.problems if p.severity == "error"]


def codes(plan: Plan) -> list[str]:
    return [p.code for p in errors(plan)]


def held(seed: int, *shape: int) -> Leaf:
    return Leaf.of("held", torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float())


def embedding_lora(seed: int, rows: int = 10) -> LowRank:
    """As PEFT has it for embeddings: the module is (dim, tokens)."""
    return LowRank(held(seed, 2, rows), held(seed + 1, 4, 2), 0.5)


def head_of(delta: LowRank) -> LowRank:
    """The same change for a head: its module is (tokens, dim)."""
    a, b = delta.b.tensor().T.contiguous(), delta.a.tensor().T.contiguous()
    return LowRank(Leaf.of("a", a), Leaf.of("b", b), delta.scaling)


def trained(deltas: dict[str, Kind]) -> Adapter:
    given = deltas.get(EMBED)
    upon = given.then if isinstance(given, Replace) else given
    turned = {EMBED} if isinstance(upon, LowRank | Renormed) else set()
    return replace(adapter(deltas), transposed=frozenset(turned))


# ------------------------------------------------------------------------------- tied


CHANGES: list[dict[str, Kind]] = [
    {HEAD: lora(10, 4)},
    {EMBED: lora(4, 10)},
    {HEAD: Replace(unread("v", 10, 4))},
    {EMBED: Replace(unread("v", 10, 4))},
    {EMBED: Replace(unread("v", 2, 4), rows=(1, 2), then=lora(4, 10))},
    {EMBED: Replace(unread("v", 2, 4), rows=(1, 2)), HEAD: lora(10, 4)},
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("there", [ONE, TWICE], ids=["one", "twice"])
def test_changing_one_side_of_a_tie_asks_which_is_meant(change, there):
    plan = bind([trained(change | {Q: lora(4, 4)})], there)
    [problem] = errors(plan)
    assert problem.code == "tied"
    assert problem.waivable
    assert HEAD in problem.message
    assert EMBED in problem.message
    assert "--tied" in problem.advice
    assert "--untie" in problem.advice


@pytest.mark.parametrize("change", CHANGES)
def test_tied_puts_both_into_the_one_stored_tensor(change):
    plan = bind([trained(change)], ONE, ties="tied")
    assert plan.problems == ()
    assert set(plan.targets) == {EMBED}
    assert [t.place.target for t in plan.targets[EMBED].terms] == [EMBED] * len(change)
    assert not plan.untied


@pytest.mark.parametrize("change", CHANGES)
def test_tied_keeps_two_stored_tensors_equal(change):
    plan = bind([trained(change)], TWICE, ties="tied")
    assert plan.problems == ()
    assert set(plan.targets) == {EMBED, HEAD}
    first, second = plan.targets[EMBED].terms, plan.targets[HEAD].terms
    assert [(t.delta, t.weight, t.place.transposed) for t in first] == [
        (t.delta, t.weight, t.place.transposed) for t in second
    ]
    assert {t.place.target for t in second} == {HEAD}


@pytest.mark.parametrize("change", CHANGES)
def test_untied_writes_both_and_changes_the_one_that_is_meant(change):
    plan = bind([trained(change)], ONE, ties="untied")
    assert plan.problems == ()
    assert plan.untied
    assert set(plan.targets) == {*change, HEAD}
    assert plan.new == (HEAD,)
    for name in change:
        assert [t.delta for t in plan.targets[name].terms] == [change[name]]
    for name in {EMBED, HEAD} & set(plan.targets) - set(change):
        assert plan.targets[name].terms == ()
    assert plan.targets[HEAD].base is ONE.tensors[EMBED]
    assert plan.targets[HEAD].shape == (10, 4)


@pytest.mark.parametrize("ties", [None, "tied", "untied"])
def test_a_tie_that_no_adapter_touches_matters_to_nobody(ties):
    plan = bind([adapter({Q: lora(4, 4)})], ONE, ties=ties)
    assert plan.problems == ()
    assert set(plan.targets) == {Q}
    assert not plan.untied


@pytest.mark.parametrize("ties", [None, "tied", "untied"])
def test_two_tensors_are_two(ties):
    plan = bind([trained({HEAD: lora(10, 4)})], TWO, ties=ties)
    assert plan.problems == ()
    assert set(plan.targets) == {HEAD}
    assert not plan.untied


@pytest.mark.parametrize("there", [ONE, TWICE], ids=["one", "twice"])
def test_trained_tokens_of_a_tie_serve_for_both(there):
    """PEFT: trainable_token_indices on a tied embedding."""
    tokens = Replace(unread("v", 2, 4), rows=(8, 9))
    plan = bind([adapter({EMBED: tokens})], there)
    assert plan.problems == ()
    assert set(plan.targets) == ({EMBED} if there is ONE else {EMBED, HEAD})


# ------------------------------------------------------------------------------- agreement


def agreeing(seed: int) -> list[dict[str, Kind]]:
    low, value, rows = embedding_lora(seed), held(seed + 5, 10, 4), held(seed + 6, 2, 4)
    return [
        {EMBED: Replace(value), HEAD: Replace(value)},
        {EMBED: low, HEAD: head_of(low)},
        {EMBED: Replace(rows, (1, 2)), HEAD: Replace(rows, (1, 2))},
        {EMBED: Replace(value, then=low), HEAD: Replace(value, then=head_of(low))},
    ]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("ties", [None, "tied"])
def test_sides_that_agree_need_no_word(number, ties):
    change = agreeing(1)[number]
    plan = bind(
        [trained(change), trained(agreeing(20)[number])], ONE, weights=[0.5, 2.0], ties=ties
    )
    assert plan.problems == ()
    assert set(plan.targets) == {EMBED}
    assert plan.targets[EMBED].terms[0].delta == change[EMBED]
    assert len(plan.targets[EMBED].terms) == 2
    twice = bind([trained(change)], TWICE, ties=ties)
    assert twice.problems == ()
    start = held(3, 10, 4).tensor()
    both = [fold_tensor(twice.targets[n], start, dtype=torch.float32)[0] for n in (EMBED, HEAD)]
    assert torch.equal(*both)


def disagreeing() -> list[dict[str, Kind]]:
    low, value, rows = embedding_lora(1), held(6, 10, 4), held(7, 2, 4)
    near = value.tensor().clone()
    near[9, 3] += 1e-6
    return [
        {EMBED: Replace(value), HEAD: Replace(Leaf.of("near", near))},
        {EMBED: Replace(value), HEAD: Replace(Leaf.of("half", value.tensor().half()))},
        {EMBED: low, HEAD: replace(head_of(low), scaling=1.0)},
        {EMBED: low, HEAD: head_of(embedding_lora(2))},
        {EMBED: Replace(rows, (1, 2)), HEAD: Replace(rows, (2, 1))},
        {EMBED: Replace(value, then=low), HEAD: Replace(value)},
        {EMBED: Replace(value), HEAD: head_of(low)},
        {EMBED: Renormed(low, held(8, 4)), HEAD: Renormed(head_of(low), held(8, 10))},
    ]


@pytest.mark.parametrize("number", range(8))
def test_sides_that_do_not_agree_are_asked_about(number):
    assert codes(bind([trained(disagreeing()[number])], ONE)) == ["tied"]


def test_the_same_numbers_of_different_weight_do_not_agree():
    both = agreeing(1)[0]
    sides = [trained({n: d}) for n, d in both.items()]
    assert codes(bind(sides, ONE, weights=[0.5, 0.5])) == []
    assert codes(bind(sides, ONE, weights=[0.5, 2.0])) == ["tied"]


def test_an_adapter_of_one_side_beside_one_of_both_is_asked_about():
    both, one = agreeing(1)[1], {EMBED: embedding_lora(9)}
    assert codes(bind([trained(both), trained(one)], ONE)) == ["tied"]


# ------------------------------------------------------------------------------- one vocabulary


def notes(plan: Plan) -> list[str]:
    return [p.message for p in plan.problems if p.severity == "note"]


@pytest.mark.parametrize("rows", [8, 12])
def test_embedding_and_head_change_their_rows_together(rows):
    both = {n: Replace(unread("v", rows, 4)) for n in (EMBED, HEAD)}
    plan = bind([adapter(both)], TWO)
    assert errors(plan) == []
    assert plan.resized == {EMBED: rows, HEAD: rows}
    assert [str(rows) in m for m in notes(plan)] == [True, True]
    for name in both:
        [problem] = errors(bind([adapter({name: both[name]})], TWO))
        assert problem.code == "vocabulary"
        assert f"{rows} rows" in problem.message
        assert "10" in problem.message
    other = {EMBED: both[EMBED], HEAD: Replace(unread("v", 11, 4))}
    assert codes(bind([adapter(other)], TWO)) == ["vocabulary"]


def test_a_bias_of_the_head_belongs_to_the_vocabulary():
    there = base({EMBED: [10, 4], HEAD: [10, 4], BIAS: [10]}, UNTIED)
    grown = {EMBED: Replace(unread("v", 12, 4)), HEAD: Replace(unread("v", 12, 4))}
    [problem] = errors(bind([adapter(grown)], there))
    assert problem.code == "vocabulary"
    assert BIAS in problem.message
    plan = bind([adapter(grown | {BIAS: Replace(unread("v", 12))})], there)
    assert errors(plan) == []


def test_a_tie_grows_as_one():
    plan = bind([adapter({EMBED: Replace(unread("v", 12, 4))})], ONE, ties="tied")
    assert errors(plan) == []
    assert plan.resized == {EMBED: 12}
    plan = bind([adapter({EMBED: Replace(unread("v", 12, 4))})], TWICE, ties="tied")
    assert plan.resized == {EMBED: 12, HEAD: 12}
    plan = bind([adapter({EMBED: Replace(unread("v", 12, 4))})], ONE, ties="untied")
    assert codes(plan) == ["vocabulary"]


def test_other_embeddings_keep_their_rows():
    positions = "model.embed_positions.weight"
    there = base(
        {EMBED: [10, 4], HEAD: [10, 4], positions: [10, 4], "proj_out.weight": [7, 4]}, UNTIED
    )
    both = {n: Replace(unread("v", 12, 4)) for n in (EMBED, HEAD)}
    assert errors(bind([adapter(both)], there)) == []


def test_adapters_of_two_sizes_are_refused():
    pairs = [adapter({n: Replace(unread("v", r, 4)) for n in (EMBED, HEAD)}) for r in (12, 14)]
    plan = bind(pairs, TWO, weights=[0.5, 0.5])
    assert codes(plan) == ["vocabulary", "vocabulary"]
    assert all("(12, 4) and (14, 4)" in p.message for p in errors(plan))


def test_fewer_rows_can_come_from_one_adapter_of_weight_1_only():
    def cut(*weights: float) -> Plan:
        deltas = {n: Replace(unread("v", 8, 4)) for n in (EMBED, HEAD)}
        return bind([adapter(deltas)] * len(weights), TWO, weights=weights)

    assert errors(cut(1.0)) == []
    for plan in (cut(0.5), cut(0.5, 0.5)):
        assert set(codes(plan)) == {"vocabulary"}
        assert "8 rows replace 10" in errors(plan)[0].message


@pytest.mark.parametrize(
    ("deltas", "beyond"),
    [
        ([Replace(unread("v", 2, 4), rows=(9, 3))], None),
        ([Replace(unread("v", 2, 4), rows=(10, 3))], 10),
        ([Replace(unread("v", 12, 4)), Replace(unread("v", 1, 4), rows=(11,))], None),
        ([Replace(unread("v", 12, 4)), Replace(unread("v", 1, 4), rows=(12,))], 12),
        ([Replace(unread("v", 12, 4), then=Replace(unread("v", 1, 4), rows=(11,)))], None),
        ([Replace(unread("v", 12, 4), then=Replace(unread("v", 1, 4), rows=(12,)))], 12),
        ([Replace(unread("v", 8, 4)), Replace(unread("v", 1, 4), rows=(9,))], 9),
    ],
)
def test_trained_tokens_must_be_rows_of_the_output(deltas, beyond):
    there = base({EMBED: [10, 4]}, UNTIED)
    plan = bind([adapter({EMBED: d}) for d in deltas], there)
    if beyond is None:
        assert errors(plan) == []
    else:
        assert f"token {beyond} is trained" in errors(plan)[0].message
        assert errors(plan)[0].code == "vocabulary"


def test_what_is_merged_is_what_the_shape_promises():
    """A token trained beside a grown vocabulary counts in the new rows too."""
    there = base({EMBED: [3, 2]}, UNTIED)
    grown, token = held(1, 5, 2), held(2, 1, 2)
    plan = bind(
        [adapter({EMBED: Replace(grown)}), adapter({EMBED: Replace(token, rows=(4,))})],
        there,
        weights=[1.0, 3.0],
    )
    start = held(3, 3, 2).tensor()
    target = replace(plan.targets[EMBED], base=Leaf.of("w", start))
    found, _ = fold_tensor(target, start, dtype=torch.float64)
    wanted = exact(grown.tensor())
    wanted[4] = (wanted[4] + 3 * exact(token.tensor())[0]) / 4
    assert np.allclose(found.numpy(), wanted, atol=1e-14)


@pytest.mark.parametrize("stored", [[], [0], [0, 4]])
def test_a_base_of_odd_shapes_does_no_harm(stored):
    there = base({EMBED: [10, 4], HEAD: stored, BIAS: []}, UNTIED)
    plan = bind([adapter({EMBED: Replace(unread("v", 12, 4)), Q: Dense(unread("d", 1))})], there)
    assert "unmatched" in codes(plan)
