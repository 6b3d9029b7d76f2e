"""Text made safe, columns, shares, problems in groups."""

import json

import pytest

from loratools.cli.screen import columns, counted, problem_lines, safe, say_json, share, typed
from loratools.errors import CODES, Problem


@pytest.mark.parametrize("code", [*range(0x20), 0x7F, *range(0x80, 0xA0), 0x202E, 0x2066, 0xDC80])
def test_no_control_or_direction_character_gets_through(code):
    if chr(code) != "\n":
        assert safe(f"a{chr(code)}b").isascii()
        assert typed(f"a{chr(code)}b").isascii()
    assert "\n" not in typed(f"a{chr(code)}b")


def test_plain_text_stays_as_it_is():
    assert safe("é x\ny" * 100) == "é x\ny" * 100
    assert typed("a b") == "'a b'"
    assert typed("a/" * 100) == "a/" * 100


def test_columns_are_aligned(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    text = columns([("name", "n"), ("long-long-long-long-long-long-name", "10")], right=(1,), cut=0)
    assert text.splitlines() == ["  name                       n", "  ...g-long-long-long-name  10"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0.00 %"), (1.0, "100.00 %"), (0.031, "3.10 %"), (1e-7, "1e-05 %")],
)
def test_shares(value, text):
    assert share(value) == text


def test_problems_are_grouped_and_cut():
    many = [Problem("unmatched", f"target {i}") for i in range(33)]
    warning = Problem("loss", "a little", "warning", remedy="use fp32")
    lines = problem_lines([warning, *many])
    assert lines[0] == "\x1b[31m\x1b[1merror[unmatched]\x1b[0m: target 0"
    assert lines[20:22] == [
        "  ... and 13 more of unmatched",
        f"  -> {CODES['unmatched'].remedy}",
    ]
    assert lines[-1] == "  -> use fp32"
    assert counted([warning, *many]) == "33 errors, 1 warning"


def test_the_adapter_is_named_where_the_message_does_not():
    lines = problem_lines([Problem("loss", "x", adapter="a"), Problem("tied", "a: y", adapter="a")])
    assert lines[0].endswith(": a: x")
    assert lines[2].endswith(": a: y")


def test_json_has_no_numbers_that_json_lacks(capsys):
    say_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": "\ud800\x1b"}})
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text) == {
        "schema": 1,
        "a": None,
        "b": [None, 1.5],
        "c": {"d": "\ud800\x1b"},
    }
