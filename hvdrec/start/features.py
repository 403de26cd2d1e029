"""Guess features: the kind, type and side of every column that may help a model."""

from __future__ import annotations

from dataclasses import dataclass

from hvdrec.config.schema import ColumnKind, RawType, Side
from hvdrec.samples.sql import literal, written
from hvdrec.start.profile import ColumnProfile
from hvdrec.start.words import CODES, OUTCOME, says

LONG_TEXT = 60
"""Texts with a larger mean length are taken for descriptions or addresses, not categories."""
MANY = 0.6
"""If a larger share of the texts in a column differ, each is taken for an identifier of its row."""
FEW_NUMBERS = 32
"""Integers with at most this many values are categories."""
SKEWED = 20
"""If the largest value of a number is more than this many times its median, take the logarithm."""


@dataclass(frozen=True)
class FeatureGuess:
    """A feature to write, with its reason.

    Attributes:
        name: Name of the column and the feature.
        side: Side of the feature.
        kind: "categorical", "categorical_list", "sequence" or "numeric".
        dtype: Declared type.
        why: Reason, for a comment.
        derive: SQL expression of the column, if it is derived; else "".
        min_count: Values that occur less often share a code.
        transform: Transform of a number; "" for other kinds.
    """

    name: str
    side: Side
    kind: ColumnKind
    dtype: RawType
    why: str
    derive: str = ""
    min_count: int = 1
    transform: str = ""


@dataclass(frozen=True)
class Skipped:
    """A column that does not become a feature, with the reason."""

    name: str
    why: str


def guess_feature(column: ColumnProfile, side: Side, rows: int) -> FeatureGuess | Skipped:
    """Guess the feature of a column that is not a key, a time or a label.

    Args:
        column: The column.
        side: Side that the column describes.
        rows: Number of rows of its table.
    """
    name = column.name
    if column.distinct <= 1 and column.kind != "list":
        return Skipped(name, "it is empty" if column.nulls == 1 else "all rows have one value")
    if column.kind in ("timestamp", "date", "other"):
        return Skipped(name, "derive a number from it, such as the year, to use it")
    if column.kind == "list":
        return FeatureGuess(name, side, "categorical_list", "string", "a list")
    if column.separator:
        mark = literal(column.separator)
        sql = f"string_split({written(name)}, {mark})"
        why = f"several values, separated by {column.separator!r}"
        return FeatureGuess(name, side, "categorical_list", "string", why, sql)
    if column.kind == "string":
        return _text(column, side, rows)
    few = column.distinct <= FEW_NUMBERS or says(name, CODES)
    if column.kind in ("integer", "boolean") and few:
        why = f"{column.distinct} different integers"
        return FeatureGuess(name, side, "categorical", "int", why, min_count=_min_count(rows))
    return _number(column, side)


def _text(column: ColumnProfile, side: Side, rows: int) -> FeatureGuess | Skipped:
    if column.length > LONG_TEXT:
        return Skipped(column.name, f"texts of {column.length:.0f} characters on average")
    if column.distinct > max(MANY * rows * (1 - column.nulls), 20):
        return Skipped(column.name, f"nearly every row has its own value ({column.distinct})")
    why = f"{column.distinct} different texts"
    count = _min_count(rows) if column.distinct > FEW_NUMBERS else 1
    return FeatureGuess(column.name, side, "categorical", "string", why, min_count=count)


def _number(column: ColumnProfile, side: Side) -> FeatureGuess:
    low, high, median = column.low or 0.0, column.high or 0.0, column.median or 0.0
    skewed = low >= 0 and high > SKEWED * max(median, 1e-9)
    why = f"a number from {low:g} to {high:g}, median {median:g}"
    transform = "log" if skewed else "quantile"
    return FeatureGuess(column.name, side, "numeric", "float", why, transform=transform)


def _min_count(rows: int) -> int:
    return 1 if rows < 20_000 else 2


def is_outcome(column: ColumnProfile) -> bool:
    """Return True if the name says that the value is known only after the item was shown."""
    return says(column.name, OUTCOME)
