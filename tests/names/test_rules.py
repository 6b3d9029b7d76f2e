"""Rules as tuples: written as a table, asked from both sides, for modules and for parameters."""

from loratools.names.rules import Names, Rule, asked, table

TEXT = """
attn.to_[q,k].weight attn.qk order=halves sizes=square

norm
out.{n}.weight last.{n}.scale
"""


def test_a_table_is_its_rules():
    assert table(TEXT, first="a.", second="b.") == (
        Rule(("a.attn.to_q.weight", "a.attn.to_k.weight"), "b.attn.qk", "halves", "square"),
        Rule(("a.norm",), "b.norm"),
        Rule(("a.out.{n}.weight",), "b.last.{n}.scale"),
    )
    assert table("  \n") == ()


def test_a_key_is_asked_for_whole_and_then_by_its_module():
    names = Names(table(TEXT))
    found, rest = asked(names.of_part, "out.3.weight")
    assert (found.whole, rest) == ("last.3.scale", "")
    found, rest = asked(names.of_part, "norm.bias")
    assert (found.whole, rest) == ("norm", ".bias")
    assert asked(names.of_part, "norm") == (names.of_part("norm"), "")
    for key in ("out.3.bias", "norms.bias", "bias", "", "out.123456.weight"):
        assert asked(names.of_part, key) is None
    found, _ = asked(names.of_part, "attn.to_k.weight")
    assert found.part == 1
    assert names.of_whole("attn.qk").parts == found.parts
