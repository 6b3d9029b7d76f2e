"""The page specs/readers.md, made from the rules: `python -m loratools.cli.readers_page`."""

from __future__ import annotations

import sys

from loratools.commands.readers import document

if __name__ == "__main__":
    sys.stdout.write(document())
