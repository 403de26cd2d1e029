"""Describe the columns of a table by aggregates over a bounded number of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvdrec.config.data_sections import TableFormat
from hvdrec.samples.engine import Engine
from hvdrec.samples.sql import literal, quoted

SEPARATOR_ROWS = 20_000
"""Number of rows in which separators are looked for."""
ROWS = 1_000_000
"""Number of rows that are looked at."""
FEW = 24
"""The profile of a column with at most this many distinct values lists all of them."""
SEPARATORS = ("|", ";", ",")
"""Characters that may separate the values of a list that is written as text."""


@dataclass(frozen=True)
class ColumnProfile:
    """What is known about a column.

    Attributes:
        name: Name of the column.
        kind: "integer", "float", "string", "boolean", "date", "timestamp", "list" or "other".
        nulls: Share of rows that are NULL.
        distinct: Number of distinct values, approximate above a few thousand.
        low: Smallest value, as float; None unless the column is a number.
        high: Largest value.
        median: Median.
        length: Mean length of the texts; 0 for other columns.
        values: Value -> number of rows, if there are few values; else empty.
        separator: Character that separates several values in one text; "" if there is none.
    """

    name: str
    kind: str
    nulls: float
    distinct: int
    low: float | None = None
    high: float | None = None
    median: float | None = None
    length: float = 0.0
    values: Mapping[Any, int] | None = None
    separator: str = ""

    @property
    def is_number(self) -> bool:
        """True for integers and floats."""
        return self.kind in ("integer", "float")


@dataclass(frozen=True)
class TableProfile:
    """What is known about a table.

    Attributes:
        path: Path relative to ``paths.raw``.
        view: Name of the table in the engine.
        rows: Number of rows that were looked at.
        columns: Its columns.
        format: Format to declare; None if the suffix says enough.
    """

    path: str
    view: str
    rows: int
    columns: tuple[ColumnProfile, ...]
    format: TableFormat | None = None

    def __getitem__(self, name: str) -> ColumnProfile:
        """Return a column by name; raise KeyError if there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [column.name for column in self.columns]

    @property
    def is_headerless(self) -> bool:
        """True if the file has no names of columns."""
        return self.format is not None and not self.format.header

    def renamed(self, names: Mapping[str, str]) -> TableProfile:
        """Return the table with new names for some columns."""
        columns = tuple(replace(c, name=names.get(c.name, c.name)) for c in self.columns)
        return replace(self, columns=columns)


def profile(
    engine: Engine, view: str, path: str, declared: TableFormat | None = None
) -> TableProfile:
    """Describe the columns of a table from its first million rows.

    Args:
        engine: The engine that holds the table.
        view: Name of the table in the engine.
        path: Path of the table relative to ``paths.raw``.
        declared: Format to declare for it.
    """
    connection = engine.connection
    table = connection.table(view)
    some = f"{view}_head"
    connection.execute(f"CREATE TEMP VIEW {some} AS SELECT * FROM {view} LIMIT {ROWS}")
    kinds = {n: kind_of(str(t)) for n, t in zip(table.columns, table.types, strict=True)}
    facts = ["count(*)"]
    for name, kind in kinds.items():
        column = quoted(name)
        number = f"CAST({column} AS DOUBLE)" if kind in ("integer", "float") else "NULL"
        length = f"avg(length({column}))" if kind == "string" else "0"
        facts += [
            f"count({column})",
            f"approx_count_distinct({column})",
            f"min({number})",
            f"max({number})",
            f"approx_quantile({number}, 0.5)" if number != "NULL" else "NULL",
            length,
        ]
    [row] = connection.sql(f"SELECT {', '.join(facts)} FROM {some}").fetchall()
    rows, width = int(row[0]), 6
    separators = _separators(engine, some, kinds)
    columns = []
    for i, (name, kind) in enumerate(kinds.items()):
        part = row[1 + i * width : 1 + (i + 1) * width]
        found = _column(engine, some, name, kind, rows, part)
        columns.append(replace(found, separator=separators.get(name, "")))
    return TableProfile(path, some, rows, tuple(columns), declared)


def _column(
    engine: Engine, view: str, name: str, kind: str, rows: int, facts: Sequence[Any]
) -> ColumnProfile:
    present, distinct, low, high, median, length = facts
    column = quoted(name)
    if kind != "list" and distinct < 10_000:
        query = f"SELECT count(DISTINCT {column}) FROM {view}"
        [(distinct,)] = engine.connection.sql(query).fetchall()
    values: dict[Any, int] = {}
    if kind != "list" and distinct <= FEW:
        query = f"SELECT {column}, count(*) FROM {view} WHERE {column} IS NOT NULL GROUP BY 1"
        values = dict(engine.connection.sql(f"{query} ORDER BY 2 DESC").fetchall())
    return ColumnProfile(
        name,
        kind,
        nulls=1 - present / rows if rows else 0.0,
        distinct=int(distinct),
        low=low,
        high=high,
        median=median,
        length=float(length or 0),
        values=values,
    )


def _separators(engine: Engine, view: str, kinds: Mapping[str, str]) -> dict[str, str]:
    """Return text column -> the character that separates several values in one text."""
    pairs = [
        (name, mark) for name, kind in kinds.items() if kind == "string" for mark in SEPARATORS
    ]
    if not pairs:
        return {}
    tests = ", ".join(_separated(quoted(name), mark) for name, mark in pairs)
    query = f"SELECT {tests} FROM (SELECT * FROM {view} LIMIT {SEPARATOR_ROWS})"
    [row] = engine.connection.sql(query).fetchall()
    found: dict[str, str] = {}
    for (name, mark), is_list in zip(pairs, row, strict=True):
        if is_list:
            found.setdefault(name, mark)
    return found


def _separated(column: str, mark: str) -> str:
    """Return SQL that is true if a text column holds lists with this separator.

    It holds lists if at least a fifth of the texts contain the separator, and there are at most
    half as many different entries as different texts.
    """
    entries = f"flatten(list(DISTINCT string_split({column}, {literal(mark)})))"
    some = f"avg(CAST(contains({column}, {literal(mark)}) AS INT)) >= 0.2"
    fewer = f"len(list_distinct({entries})) * 2 <= approx_count_distinct({column})"
    return f"coalesce({some} AND approx_count_distinct({column}) <= 100000 AND {fewer}, false)"


def kind_of(dtype: str) -> str:
    """Return the kind of a DuckDB type; see `ColumnProfile.kind`."""
    if dtype.endswith("[]"):
        return "list"
    if dtype in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"):
        return "integer"
    if dtype in ("UBIGINT", "HUGEINT"):
        return "integer"
    if dtype in ("FLOAT", "DOUBLE") or dtype.startswith("DECIMAL"):
        return "float"
    if dtype == "VARCHAR" or dtype.startswith("ENUM"):
        return "string"
    if dtype == "BOOLEAN":
        return "boolean"
    if dtype == "DATE":
        return "date"
    return "timestamp" if dtype.startswith("TIMESTAMP") else "other"
