"""Guess the roles of a log's columns: keys, time and label. Pure functions of profiles."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from hvdrec.samples.sql import literal, written
from hvdrec.start.profile import ColumnProfile, TableProfile
from hvdrec.start.words import (
    ACTIONS,
    ATTENTION,
    ITEM,
    ITEM_FACTS,
    LABEL,
    RATING,
    TIME,
    USER,
    USER_FACTS,
    says,
    words,
)

EPOCHS = {"seconds": 1.0, "milliseconds": 1e3, "microseconds": 1e6}
FIRST_EPOCH, LAST_EPOCH = 3e8, 4.2e9
"""Seconds since 1970 of the years 1979 and 2103."""


@dataclass(frozen=True)
class Choice:
    """A guess and its reason; `is_sure` is False if the user should confirm the guess."""

    value: str
    why: str
    is_sure: bool = True


@dataclass(frozen=True)
class Link:
    """A column of a side table whose values are those of a column of the log.

    Attributes:
        table: Index of the side table.
        key: Column of the side table; its values are unique.
        column: Column of the log.
        score: Shared values as a share of all values of both columns, plus 0.5 for equal names.
    """

    table: int
    key: str
    column: str
    score: float


def guess_log(tables: Sequence[TableProfile]) -> int:
    """Return the index of the log: a table with a time and two repeated keys, or the longest."""

    def score(table: TableProfile) -> tuple[bool, int, int]:
        repeated = [
            c for c in table.columns if is_key_like(c) and 1 < c.distinct <= 0.9 * table.rows
        ]
        has_time = any(is_time(column) for column in table.columns)
        return has_time and len(repeated) >= 2, len(repeated) >= 2, table.rows

    return max(range(len(tables)), key=lambda i: score(tables[i]))


def guess_keys(
    log: TableProfile, links: Sequence[Link], sides: Sequence[TableProfile]
) -> tuple[Choice, Choice]:
    """Guess the columns of the user key and the item key from names and linked tables."""
    pool = [c for c in log.columns if is_key_like(c) and not is_time(c) and not is_label_like(c)]
    linked = {link.column: sides[link.table] for link in links}
    user = _told_key(pool, linked, USER, USER_FACTS)
    item = _told_key(
        [c for c in pool if not user or c.name != user.value], linked, ITEM, ITEM_FACTS
    )
    chosen = {choice.value for choice in (user, item) if choice}
    left = [column for column in pool if column.name not in chosen]
    left.sort(key=lambda c: (c.name not in linked, not _has_id(c)))
    if user is None:
        user = _first(left)
        left = [column for column in left if column.name != user.value]
    return user, item or _first(left)


def _told_key(
    columns: Sequence[ColumnProfile],
    linked: Mapping[str, TableProfile],
    vocabulary: Collection[str],
    facts: Collection[str],
) -> Choice | None:
    """Return the key column that names suggest; None if they suggest none.

    The name of the column may suggest it or, if a side table holds the keys of the column, the name
    of this table or the names of its columns.
    """
    if named := [column for column in columns if says(column.name, vocabulary)]:
        # session_id identifies visits: user_id is better if there are both.
        best = max(named, key=lambda c: ("session" not in words(c.name), _has_id(c)))
        return Choice(best.name, "by its name")
    for column in columns:
        table = linked.get(column.name)
        if table and (says(_stem(table.path), vocabulary) or _any_says(table, facts)):
            return Choice(column.name, f"its values are the keys of {table.path}")
    return None


def _first(columns: Sequence[ColumnProfile]) -> Choice:
    """Return the first column as a guess without evidence."""
    if not columns:
        return Choice("", "no column looks like a key", False)
    best = columns[0]
    return Choice(best.name, f"a column with {best.distinct} values that repeat", False)


def guess_time(log: TableProfile, taken: Collection[str]) -> Choice:
    """Guess the column of the time: a timestamp, a date, or seconds since 1970."""
    found = [c for c in log.columns if is_time(c) and c.name not in taken]
    if not found:
        return Choice("", "no column holds times; the split is random", False)
    rank = {"timestamp": 0, "integer": 1, "float": 1, "date": 2}
    best = min(found, key=lambda c: (rank[c.kind], not says(c.name, TIME)))
    unit = epoch_unit(best)
    why = f"{unit} since 1970" if unit else f"it holds {best.kind}s"
    return Choice(best.name, why, len(found) == 1 or says(best.name, TIME))


def guess_label(log: TableProfile, taken: Collection[str]) -> Choice:
    """Guess an SQL expression of the label from the columns that are not keys or times."""
    left = [c for c in log.columns if c.name not in taken]
    for column in left:
        if is_flag(column) and says(column.name, LABEL):
            rivals = [c.name for c in left if is_flag(c) and says(c.name, LABEL)]
            return Choice(
                written(column.name), "0 or 1, and its name is an outcome", len(rivals) == 1
            )
    for column in left:
        if choice := _label_of_actions(column):
            return choice
    for rated in (True, False):
        for column in left:
            if is_rating(column) and says(column.name, RATING) == rated:
                threshold, share = _threshold(column)
                why = f"{share:.0%} of the ratings are at least {threshold}"
                return Choice(f"{written(column.name)} >= {threshold}", why, False)
    for column in left:
        if column.is_number and says(column.name, ATTENTION) and column.median:
            why = "half of the rows have at least the median"
            return Choice(f"{written(column.name)} >= {column.median:g}", why, False)
    for column in left:
        if is_flag(column):
            return Choice(written(column.name), "the only column of 0 and 1", False)
    why = "no column tells what users did not want: every row counts as positive"
    return Choice("1", why, False)


def epoch_unit(column: ColumnProfile) -> str:
    """Return the unit in which a number counts time since 1970; "" if it does not look like one."""
    if not column.is_number or column.low is None or column.high is None:
        return ""
    for unit, factor in EPOCHS.items():
        if FIRST_EPOCH * factor <= column.low and column.high <= LAST_EPOCH * factor:
            return unit
    return ""


def is_time(column: ColumnProfile) -> bool:
    """Return True for timestamps, dates, and numbers that look like seconds since 1970."""
    if column.kind in ("timestamp", "date"):
        return True
    return bool(epoch_unit(column)) and (
        says(column.name, TIME) or column.name.startswith("column")
    )


def is_key_like(column: ColumnProfile) -> bool:
    """Return True if a column may be a key: texts or integers that are present and differ."""
    return (
        column.kind in ("integer", "string")
        and column.nulls < 0.5
        and column.distinct > 1
        and not column.separator
        and column.length < 64
    )


def is_label_like(column: ColumnProfile) -> bool:
    """Return True if a column holds flags, actions or ratings, or is named like one."""
    if is_flag(column) or _label_of_actions(column):
        return True
    named = says(column.name, LABEL | RATING | ATTENTION)
    return named or (is_rating(column) and column.distinct <= 11)


def is_flag(column: ColumnProfile) -> bool:
    """Return True if all values are 0 or 1, or booleans, and both occur."""
    values = set(column.values or ())
    return column.kind in ("boolean", "integer", "float") and values == {0, 1}


def is_rating(column: ColumnProfile) -> bool:
    """Return True for three to eleven different numbers between 0 and 10."""
    return (
        column.is_number
        and bool(column.values)
        and 3 <= column.distinct <= 11
        and column.low is not None
        and column.high is not None
        and column.low >= 0
        and column.high <= 10
    )


def _label_of_actions(column: ColumnProfile) -> Choice | None:
    """Return a label over a column with names of actions: the stronger ones are positive."""
    if column.kind != "string" or not column.values:
        return None
    ranks = {v: ACTIONS[str(v).lower()] for v in column.values if str(v).lower() in ACTIONS}
    if len(ranks) < 2 or len(set(ranks.values())) < 2:
        return None
    weakest = min(ranks.values())
    strong = sorted(str(v) for v, rank in ranks.items() if rank > max(weakest, 1)) or sorted(
        str(v) for v, rank in ranks.items() if rank > weakest
    )
    name = written(column.name)
    test = (
        f"{name} = {literal(strong[0])}"
        if len(strong) == 1
        else f"{name} IN ({', '.join(map(literal, strong))})"
    )
    counts: Mapping[object, int] = column.values
    shown = ", ".join(f"{value} {count}" for value, count in counts.items())
    return Choice(test, f"the actions are {shown}", False)


def _threshold(column: ColumnProfile) -> tuple[str, float]:
    """Return the rating that divides the rows most evenly, and the share of rows not below it."""
    values = {float(v): count for v, count in (column.values or {}).items()}
    total = sum(values.values())
    shares = {t: sum(n for v, n in values.items() if v >= t) / total for t in sorted(values)[1:]}
    best = min(shares, key=lambda t: abs(shares[t] - 0.5))
    return f"{best:g}", shares[best]


def _has_id(column: ColumnProfile) -> bool:
    return any(word.endswith("id") for word in words(column.name))


def _any_says(table: TableProfile, vocabulary: Collection[str]) -> bool:
    return any(says(name, vocabulary) for name in table.names)


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1]
