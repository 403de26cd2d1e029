"""Small text tables for people."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

LONGEST_CELL = 60


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return rows under headers, in aligned columns; columns of numbers are right-aligned.

    Cells wider than 60 columns of a terminal are cut, with an ellipsis; in the last column none
    is. Line breaks and control characters become spaces; None is empty.
    """
    plain = [[_plain(cell) for cell in row] for row in rows]
    cells = [[*(_cut(cell) for cell in row[:-1]), *row[-1:]] for row in plain]
    widths = [
        max([_width(header), *(_width(row[i]) for row in cells)])
        for i, header in enumerate(headers)
    ]
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
    lines = [[*headers], ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            _pad(cell, width, right)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


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
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _cut(text: str) -> str:
    if _width(text) <= LONGEST_CELL:
        return text
    kept, width = "", 0
    for character in text:
        if width + _columns(character) > LONGEST_CELL - 1:
            break
        kept += character
        width += _columns(character)
    return kept + "…"


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space
