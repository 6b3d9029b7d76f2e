"""specs/matrix.md is what readers and writers do."""

from pathlib import Path

from loratools import formats
from tests.matrix import COLUMNS, READ, page

PAGE = Path(__file__).parents[1] / "specs" / "matrix.md"


def test_the_page_is_up_to_date():
    made = "python -m tests.matrix > specs/matrix.md"
    assert PAGE.read_text(encoding="utf-8") == page(), f"stale; run: {made}"


def test_every_format_is_there_and_holds_pairs():
    text = PAGE.read_text(encoding="utf-8").partition("## From format")[0]
    for name in formats.NAMES:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert row.split("|")[2].strip() in ("read, written", "read")
    assert READ.keys() == set(formats.NAMES) - set(formats.WRITERS)
    assert all(columns.keys() <= set(COLUMNS) for columns in READ.values())
