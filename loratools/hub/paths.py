"""Which paths in a repository every system can hold."""

from __future__ import annotations

import re
from collections.abc import Iterable

_RESERVED = re.compile(r"(?i)(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?")


def is_portable(path: str) -> bool:
    """Whether Windows, too, has files of this name: no CON, no `a:b`, no dot at the end."""
    if any(c in path for c in ':*?"<>|'):
        return False
    return not any(_RESERVED.fullmatch(p) or p.endswith((".", " ")) for p in path.split("/"))


def clash(paths: Iterable[str]) -> tuple[str, str] | None:
    """The first two paths that are one where case does not count."""
    folded: dict[str, str] = {}
    for path in paths:
        other = folded.setdefault(path.lower(), path)
        if other != path:
            return other, path
    return None
