"""Patterns of module names: equal to `re` and to PEFT's own functions, and linear."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loratools.errors import RefusedError
from loratools.names.patterns import compile_pattern, peft_targets, peft_value

ROOT = Path(__file__).parents[2]

# Letters of one alphabet in patterns and texts, so that matches happen: word and other
# characters, digits of both sorts (² is a digit and no decimal), both kinds of space.
LETTERS = "ab_.1-\n é²\u2003"


def joined(parts):
    return st.lists(parts, min_size=1, max_size=3).map("".join)


def members():
    single = st.sampled_from(
        [*"ab_.1é $", r"\w", r"\d", r"\S", r"\^", r"\-", r"\]", "a-b", ".-_", r"\.-a"]
    )
    return st.builds(
        "[{}{}{}]".format, st.sampled_from(["", "^"]), joined(single), st.sampled_from(["", "-"])
    )


def repeats(parts):
    marks = st.sampled_from(
        ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{1,2}", "{,2}", "{0,2}?", "{0}"]
    )
    groups = st.builds("{}{})".format, st.sampled_from(["(", "(?:", "(?P<n>"]), parts)
    return st.one_of(groups, st.builds("(?:{}){}".format, parts, marks))


def compositions(parts):
    choice = st.lists(st.one_of(parts, st.just("")), min_size=2, max_size=3).map("|".join)
    return st.one_of(joined(parts), choice.map("({})".format), repeats(parts))


ATOMS = st.one_of(
    st.sampled_from([re.escape(c) for c in LETTERS]),
    st.sampled_from(
        [".", r"\w", r"\d", r"\s", r"\W", r"\D", r"\S", "^", "$", r"\b", "{", "}", "{x}", "a*", "]"]
    ),
    members(),
)
PATTERNS = st.recursive(ATOMS, compositions, max_leaves=6).filter(lambda p: p.count("(?P<n>") < 2)
TEXTS = st.text(LETTERS, max_size=7)


@given(PATTERNS, st.lists(TEXTS, min_size=1, max_size=5))
@example("a$\n", ["a\n"])
@example("(a|ab)(c|bcd)*?", ["abcd", "ab"])
@example("(?:a{2,3}){2}", ["a" * n for n in range(8)])
@example("(^|a)*b", ["aab", "b"])
@example(r"[]\]-a^-]+", ["]^a-_"])
def test_a_pattern_matches_what_re_matches(pattern, texts):
    ours, theirs = compile_pattern(pattern), re.compile(pattern)
    for text in texts:
        assert ours.fullmatch(text) == bool(theirs.fullmatch(text)), (pattern, text)
        assert ours.match(text) == bool(theirs.match(text)), (pattern, text)


@given(st.text(r"ab-^$.|()[]{}*+?\wd,12", max_size=9), TEXTS)
def test_any_text_is_refused_or_matches_what_re_matches(pattern, text):
    try:
        ours = compile_pattern(pattern)
    except RefusedError as refused:
        assert refused.code == "unknown_config"  # noqa: PT017
        return
    assert ours.fullmatch(text) == bool(re.fullmatch(pattern, text))


def test_classes_hold_the_characters_that_they_hold_in_re():
    characters = [chr(c) for c in range(0x3100)] + ["\u4e00", "\U0001d7d8", "\U0010ffff"]
    for pattern in (".", r"\w", r"\d", r"\s", r"\W", r"\D", r"\S", r"[^\w.]", "[!-~]"):
        ours, theirs = compile_pattern(pattern), re.compile(pattern)
        wrong = [c for c in characters if ours.fullmatch(c) != bool(theirs.fullmatch(c))]
        assert wrong == [], pattern


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=a)", "(?!a)", "(?<=a)b", "(?<!a)b", "(?i)a", "(?i:a)", "(?>a)", "(?#x)",
        "(?P=n)", "(a)\\1", "(?P<1>a)", "(?P<a", "a++", "a*+", "a{2}+", "a**", "a{1}{2}",
        "*", "a|*", "(+)", "{2}", "^*", r"\b+", "(", ")", "a)", "(a", "[", "[]", "[a", "[b-a]",
        r"[\w-z]", r"[a-\d]", "\\", "a{3,2}",
        r"\x41", r"\A", r"\Z", r"\B", r"\n", r"\0", r"\q", r"[\b]",
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_with_advice(pattern):
    with pytest.raises(RefusedError, match="replace it by the module names") as refused:
        compile_pattern(pattern)
    assert refused.value.code == "unknown_config"
    assert "\n" not in refused.value.message


EVIL = [
    (r"(\w+\.?)+!", "a" * 5000),
    ("(a*)*b", "a" * 5000),
    ("(a|a)*b", "a" * 5000),
    ("(.*)(.*)(.*)(.*)(.*)b", "a" * 5000),
    ("(((a?){9}){9}){9}b", "a" * 700),
]
TOO_LARGE = [
    "a{10001}",
    "a{99999999999999999999}",
    "((a{100}){100}){100}",
    "(((){9999}){9999}){9999}" + "a" * 10_000,
    "(" + "()" * 5000 + "a){9999}b",
    "a" * 2_000_000,
    "()" * 2_000_000,
    "(?P<a>" * 200_000,
    "(" * 200_000,
    "a{" + "1" * 500_000,
]
CHILD = """
import json, resource, sys
from loratools.errors import RefusedError
from loratools.names.patterns import compile_pattern
patterns = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
found = []
for pattern, text in patterns:
    try:
        found.append(compile_pattern(pattern).fullmatch(text))
    except RefusedError as refused:
        found.append(refused.code if len(refused.message) < 300 else refused.message)
json.dump(found, sys.stdout)
"""


def test_hostile_patterns_cost_little_time_and_memory():
    patterns = [*EVIL, ("a" * 9000, "a" * 9000), *((pattern, "") for pattern in TOO_LARGE)]
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(patterns),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )
    assert child.returncode == 0, child.stderr
    refused = ["unknown_config"] * len(TOO_LARGE)
    assert json.loads(child.stdout) == [False] * len(EVIL) + [True, *refused]


# Paths and keys over one alphabet: plain names, as adapters have them, and patterns.
NAMES = st.lists(st.sampled_from(["a", "b", "ab", "1"]), min_size=1, max_size=4).map(".".join)
ANCHORED = NAMES.map(
    lambda name: "^" + name.replace(".", r"\.")
)  # as PEFT patterns are written here
KEYS = st.one_of(NAMES, ANCHORED, st.text("ab.1", max_size=4), PATTERNS)


@given(st.lists(KEYS, max_size=4, unique=True), st.one_of(NAMES, TEXTS))
@example(["proj"], "q_proj")
@example(["layers.1", "q"], "layers.1.q")
@example(["q", "layers.1.q"], "layers.1.q")
@example(["^q"], "x.q")
@example([r"^x\.q"], "x.q")
@example([r"^x\.q"], "xaq")
@example([r"x\.q"], "y.x.q")
@example(["^"], "")
@example(["xaq"], "x.q")
@example(["x.q"], "xaq")
@example(["q"], "q\n")
@example(["q"], "a\n.q")
@example(["a+b"], "a+b")
@example([""], "a.")
def test_peft_value_is_what_peft_looks_up(keys, module):
    patterns = {key: place for place, key in enumerate(keys)}
    key = get_pattern_key(patterns.keys(), module)
    assert peft_value(patterns, module, -1) == (
        patterns.get(key, -1),
        key if key in patterns else None,
    )


@given(
    st.one_of(KEYS.filter(bool), st.lists(KEYS.filter(bool), min_size=1)), st.one_of(NAMES, TEXTS)
)
def test_peft_targets_are_the_modules_that_peft_adapts(target_modules, module):
    config = LoraConfig(target_modules=target_modules)
    assert peft_targets(target_modules, module) == bool(check_target_module_exists(config, module))


def test_plain_names_are_compared_and_not_compiled():
    """Files name every module in patterns, and every module is looked up in all of them."""
    names = [f"down_blocks.{i}.attn.to_q" for i in range(400)]
    plain = {"^" + name.replace(".", r"\."): i for i, name in enumerate(names)}
    before = compile_pattern.cache_info().misses
    for patterns in (plain, {f"^{name}": i for i, name in enumerate(names)}):
        assert [peft_value(patterns, name, -1)[0] for name in names] == list(range(400))
    assert compile_pattern.cache_info().misses == before


def test_a_refused_pattern_is_not_passed_over():
    with pytest.raises(RefusedError, match="lookaround"):
        peft_value({"(?!a)b": 4, "b": 8}, "b", 16)
