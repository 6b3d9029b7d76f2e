"""Which opset and which IR version each onnxruntime release reads: one row for each minor release.

Measured with the wheels themselves (the newest patch release of each, CPU, Python 3.11): a graph
of one `Add` at every opset and IR version, the highest of each that a session still opens.
tests/exporting/test_runtimes_table.py measures rows again where `make oracles` built old runtimes.
"""

from __future__ import annotations

import re
from typing import Final

from loratools.errors import error, shown

# (major, minor) → (opset, IR); sorted, oldest first
TABLE: Final[dict[tuple[int, int], tuple[int, int]]] = {
    (1, 15): (19, 9),
    (1, 16): (19, 9),
    (1, 17): (20, 9),
    (1, 18): (21, 10),
    (1, 19): (21, 10),
    (1, 20): (21, 10),
    (1, 21): (22, 10),
    (1, 22): (22, 10),
    (1, 23): (23, 11),
    (1, 24): (25, 13),
    (1, 25): (26, 13),
    (1, 26): (26, 13),
    (1, 27): (26, 13),
    (1, 28): (26, 13),
    (1, 29): (26, 13),
    (1, 30): (26, 13),
    (1, 31): (26, 13),
}
OLDEST: Final = next(iter(TABLE))
NEWEST: Final = next(reversed(TABLE))
DEFAULT: Final = (20, 10)  # read by every release since 1.18; devices lag behind
OPSET_OF_INT4: Final = 21  # as a type of tensors
FUSES: Final = (1, 21)  # GroupQueryAttention takes positions and a bias from here on


def for_ort(version: str) -> tuple[int, int]:
    """The newest (opset, IR version) that an onnxruntime release reads.

    A release newer than the table reads at least what the newest row says; one older than the
    table is refused.
    """
    return TABLE[min(release(version), NEWEST)]


def release(version: str) -> tuple[int, int]:
    """The (major, minor) that a version names; UsageError for none and for those before OLDEST."""
    found = re.fullmatch(
        r"v?(\d{1,4})\.(\d{1,4})(?:\.\d{1,6})?(?:[.+-]?[0-9A-Za-z.]{1,20})?", version
    )
    if found is None:
        raise error("usage", f"{shown(version)} is no onnxruntime version; for example 1.20")
    made = int(found[1]), int(found[2])
    if made < OLDEST:
        raise error(
            "usage",
            f"onnxruntime {shown(version)}: the oldest that graphs are made for is "
            f"{OLDEST[0]}.{OLDEST[1]}",
        )
    return made


def chosen(
    version: str | None, *, opset: int | None = None, ir: int | None = None, newest_opset: int = 23
) -> tuple[int, int]:
    """The (opset, IR version) to write, from what was asked for.

    Without an asked-for runtime the defaults hold; with one, the newest that it reads, but no
    opset above `newest_opset` (what the exporters write) and no IR above 10 unless asked for.
    What the runtime would refuse to open is refused here.
    """
    if version is None:
        return opset or DEFAULT[0], ir or (DEFAULT[1] if (opset or 0) < 23 else max(DEFAULT[1], 11))
    reads_opset, reads_ir = for_ort(version)
    for word, asked, reads in (("opset", opset, reads_opset), ("IR version", ir, reads_ir)):
        if asked is not None and asked > reads:
            raise error("usage", f"onnxruntime {shown(version)} reads {word} {reads}, not {asked}")
    return opset or min(reads_opset, newest_opset), ir or min(reads_ir, DEFAULT[1])
