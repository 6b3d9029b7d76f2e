"""YAML of configs: as PyYAML reads it where that is plain, and bounded."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loratools.containers import plain_yaml
from loratools.errors import LoratoolsError

TEXT = """
checkpoint_dir: checkpoints/org/name   # a comment
precision: null
empty:
lora_r: 32
hex: 0x1F
octal: 017
grouped: 1_000
negative: -3
lora_dropout: 0.05
tiny: 1.0e-05
text_that_looks_like_a_number: 1e5
quoted: "16"
single: 'on'
yes_or_no: [yes, No, ON, false]
infinite: [.inf, -.inf]
nested: {a: [1, {b: c}], "d": ~}
block: |
  two
  lines
shared: &id001 [0.9, 0.95]
again: *id001
"""


def test_it_reads_what_pyyaml_reads():
    assert plain_yaml.parse(TEXT.encode(), "x") == yaml.safe_load(TEXT)


def test_what_is_not_plain_stays_text():
    found = plain_yaml.parse(b"day: 2024-01-31\ntime: 12:30:45\nown: !thing 5\n1: x\n", "x")
    assert found == {"day": "2024-01-31", "time": "12:30:45", "own": "5", "1": "x"}
    assert math.isnan(plain_yaml.parse(b"- .nan", "x")[0])
    assert plain_yaml.parse(b"", "x") is None


TEXTS = st.text(max_size=6)
ONE = (
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | TEXTS | st.floats(allow_nan=False)
)
PLAIN = st.recursive(
    ONE, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner), max_leaves=8
)


@given(st.dictionaries(st.text(max_size=6), PLAIN, max_size=4))
def test_what_is_dumped_is_read_again(values):
    assert plain_yaml.parse(plain_yaml.dump(values).encode(), "x") == values


LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
ODD = {
    "laughs": (LAUGHS, "hostile"),
    "itself": ("a: &a [*a]", "hostile"),
    "deep": ("[" * 200 + "]" * 200, "hostile"),
    "deeper": ("[" * 20_000, "hostile"),
    "twice": ("a: 1\na: 2", "duplicate"),
    "a list as a key": ("? [1]\n: 2", "malformed"),
    "no yaml": ("a: [", "malformed"),
    "two documents": ("a: 1\n---\nb: 2", "malformed"),
    "long": ("a: " + "x" * plain_yaml.LIMIT, "malformed"),
    "unknown anchor": ("a: *b", "malformed"),
}


@pytest.mark.parametrize("row", ODD)
def test_other_texts_are_refused(row):
    text, code = ODD[row]
    with pytest.raises(LoratoolsError) as refused:
        plain_yaml.parse(text.encode(), "x")
    assert refused.value.code == code


def test_only_utf_8_is_read():
    with pytest.raises(LoratoolsError, match="not UTF-8"):
        plain_yaml.parse("ä".encode("latin-1"), "x")


def test_no_tag_makes_an_object():
    text = b"a: !!python/object/apply:os.system ['true']\nb: !!int 'x'\nc: !!bool maybe"
    assert plain_yaml.parse(text, "x") == {"a": ["true"], "b": "x", "c": "maybe"}
