"""specs/cli.md is what the commands say."""

from pathlib import Path

from loratools.cli.app import COMMANDS
from loratools.cli.document import EXITS, document
from loratools.errors import CODES

PAGE = Path(__file__).parents[2] / "specs" / "cli.md"


def test_the_page_is_up_to_date():
    made = "python -m loratools.cli.document > specs/cli.md"
    assert PAGE.read_text(encoding="utf-8") == document(), f"stale; run: {made}"


def test_the_page_has_every_command_code_and_exit_status():
    page = document()
    assert all(f"\n## loratools {name}\n" in page for name in COMMANDS)
    assert all(f"\n| `{code}` | " in page for code in CODES)
    assert {code.exit for code in CODES.values()} <= EXITS.keys()
