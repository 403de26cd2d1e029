"""Durations as text, such as "30m", and in microseconds."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

UNITS = {
    "us": 1,
    "ms": 1_000,
    "s": 1_000_000,
    "m": 60_000_000,
    "h": 3_600_000_000,
    "d": 86_400_000_000,
    "w": 604_800_000_000,
}
"""Unit of a duration -> microseconds."""
_FORM = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})")
_ROUNDED = 0.02
"""`rounded_up` changes a duration by at most this fraction."""


def microseconds(text: str) -> int:
    """Return a duration in microseconds.

    >>> microseconds("1.5h") // 1_000_000
    5400

    Raises:
        ValueError: The text is not a number and a unit.
    """
    match = _FORM.fullmatch(text.strip())
    if not match:
        known = ", ".join(UNITS)
        raise ValueError(f"must be a number and a unit of [{known}], such as '30m' or '1d'")
    return round(float(match[1]) * UNITS[match[2]])


def duration_text(duration: float) -> str:
    """Format microseconds with the largest unit that gives at least 1, to three digits.

    >>> duration_text(5_400_000_000)
    '1.5h'
    """
    unit = max((u for u in UNITS if UNITS[u] <= abs(duration)), key=UNITS.__getitem__, default="us")
    return f"{round(duration / UNITS[unit], 2 if abs(duration) < 10 * UNITS[unit] else 1):g}{unit}"


def rounded_up(duration: float) -> str:
    """Round microseconds up to whole units, of the largest unit with which this adds at most 2 %.

    >>> rounded_up(1_734_000_000)
    '29m'
    """
    for unit, size in reversed(UNITS.items()):
        number = -int(-duration // size)
        if number * size <= duration * (1 + _ROUNDED):
            return f"{number}{unit}"
    return f"{max(1, -int(-duration // 1))}us"


def _checked(text: str) -> str:
    microseconds(text)
    return text


Duration = Annotated[str, AfterValidator(_checked)]
"""The type of a configuration field that holds a duration."""
OptionalDuration = Annotated[str, AfterValidator(lambda text: _checked(text) if text else text)]
"""As `Duration`, but the text may be empty."""
