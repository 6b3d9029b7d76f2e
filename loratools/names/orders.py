"""How rows of image models' weights are ordered and divided, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loratools.errors import error

# `Rule.order` of a parameter that the whole stores (in, out); it is no order of rows.
TURNED = "turned"


def halves(rows: int, **facts: Any) -> list[int]:
    """The two halves swapped: scale and shift."""
    if rows % 2:
        raise error("shape_mismatch", f"{rows} rows have no halves; they hold a scale and a shift")
    return [*range(rows // 2, rows), *range(rows // 2)]


def final(rows: int, *, columns: int, **facts: Any) -> list[int]:
    """The halves swapped where there are only two vectors, as many rows as twice the columns.

    SD3's last block has them where its other blocks have six, which keep their order.
    """
    return halves(rows) if rows == 2 * columns else list(range(rows))


# By `Rule.order`: row i of the whole is row order[i] of the part; both undo themselves.
ORDERS: dict[str, Callable[..., list[int]]] = {"halves": halves, "final": final}


def equal(rows: int, columns: int, parts: int) -> list[int]:
    """Every part has as many rows."""
    if rows % parts:
        raise error("shape_mismatch", f"{rows} rows are not {parts} equal parts")
    return [rows // parts] * parts


def square(rows: int, columns: int, parts: int) -> list[int]:
    """Every part but the last has as many rows as there are columns, the last has the rest."""
    rest = rows - columns * (parts - 1)
    if rest < 1:
        said = f"{rows} rows are not {parts - 1} parts of {columns} and a rest"
        raise error("shape_mismatch", said)
    return [columns] * (parts - 1) + [rest]


def queries(rows: int, columns: int, parts: int) -> list[int]:
    """The first part has as many rows as there are columns, the others share the rest equally."""
    rest = rows - columns
    if rest < 1 or rest % (parts - 1):
        said = f"{rows} rows are not one part of {columns} and {parts - 1} equal ones"
        raise error("shape_mismatch", said)
    return [columns, *equal(rest, columns, parts - 1)]


# By `Rule.sizes`: how many rows each of n parts has in a whole of (rows, columns).
SIZES: dict[str, Callable[[int, int, int], list[int]]] = {
    "equal": equal,
    "square": square,
    "queries": queries,
}
