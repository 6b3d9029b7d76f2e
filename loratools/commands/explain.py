"""`explain`: what a problem code means, an example, the remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from loratools.errors import CODES, error, shown


@dataclass(frozen=True, slots=True)
class Explanation:
    """One entry of the table of codes."""

    code: str
    exit: int
    waivable: bool
    meaning: str
    example: str
    remedy: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def explain(code: str) -> Explanation:
    """The meaning of a problem code; UsageError with the nearest ones for an unknown code."""
    known = CODES.get(code)
    if known is None:
        near = get_close_matches(code, CODES, 3) or sorted(CODES)
        raise error("usage", f"{shown(code)} is no problem code; perhaps {', '.join(near)}")
    return Explanation(code, known.exit, known.waivable, known.meaning, known.example, known.remedy)
