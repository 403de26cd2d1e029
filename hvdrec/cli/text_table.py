"""Format tables as text, without a library: the slim install for scoring has none."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

MAX_CELL_WIDTH = 60


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format rows under headers in aligned columns; numbers are aligned on the right.

    Cells wider than 60 terminal columns are cut, except in the last column. Line breaks and control
    characters become spaces. None becomes an empty cell.
    """
    plain = [[_plain(cell) for cell in row] for row in rows]
    cells = [[*(_cut(cell) for cell in row[:-1]), *row[-1:]] for row in plain]
    widths = [
        max(_width(row[column]) for row in ([*headers], *cells)) for column in range(len(headers))
    ]
    is_numeric = [
        bool(rows) and all(_is_number(row[column]) for row in rows)
        for column in range(len(headers))
    ]
    lines = [[*headers], ["-" * width for width in widths], *cells]
    return "\n".join("  ".join(map(_pad, line, widths, is_numeric)).rstrip() for line in lines)


def _is_number(cell: object) -> bool:
    if cell is None or isinstance(cell, int | float):
        return True
    try:
        float(str(cell))
    except ValueError:
        return str(cell) in ("n/a", "")
    return True


def _plain(cell: object) -> str:
    text = "" if cell is None else str(cell)
    return "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def _width(text: str) -> int:
    """Return how many columns a text takes on a terminal.

    A wide character takes 2 columns, a combining one 0.
    """
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def _cut(text: str) -> str:
    if _width(text) <= MAX_CELL_WIDTH:
        return text
    while _width(text) >= MAX_CELL_WIDTH:
        text = text[:-1]
    return text + "…"


def _pad(text: str, width: int, is_right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if is_right else text + space
