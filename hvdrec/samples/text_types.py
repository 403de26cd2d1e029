"""Find the SQL types of columns that are read as text, such as those of CSV files.

A column gets a type only if all its values have the form of this type, so that no value is rounded,
cut or dropped. Dates and times must be in ISO 8601. 03/04/2024 remains text, since either number
may be the month.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import duckdb

from hvdrec.config.schema import RawType
from hvdrec.samples.sql import literal, quoted

SAMPLE_ROWS = 2048
"""Number of rows on which all types are tested first. Types that fail there need no test on all
rows."""
MOSTLY = 0.9
"""If at least this share of a text column is numbers, it is reported: the other values are probably
mistakes."""
EXACT = 2**53
"""A float holds every integer below this number exactly."""

DIGITS = r"\s*[+-]?[0-9]+\s*"
INTEGER = r"\s*[+-]?(0|[1-9][0-9]*)\s*"
NUMBER = r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*"
WHOLE = r"\s*[+-]?[0-9]+(\.0*)?\s*"
PADDED = r"\s*[+-]?0[0-9]+.*"
NOT_FINITE = r"\s*(nan|[+-]?inf(inity)?)\s*"
DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
TIME = r"[ T][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?"
TIME_NS = r"[ T][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,9})?)?"
OFFSET = r" ?(Z|UTC|[+-][0-9]{2}(:?[0-9]{2})?)"


@dataclass(frozen=True)
class TextTypes:
    """The types of text columns, and the columns that look wrong.

    Attributes:
        types: Column -> its SQL type.
        odd: Column without a declared type, in which most values are numbers -> a value that is
            not a number.
        mixed: Column with floats and with integers that a float cannot hold exactly -> an example
            of each.
    """

    types: Mapping[str, str]
    odd: Mapping[str, str] = field(default_factory=dict)
    mixed: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def _form(pattern: str) -> str:
    return f"regexp_full_match({{v}}, {literal(pattern)})"


def _typed(pattern: str, dtype: str) -> str:
    return f"({_form(pattern)} AND TRY_CAST({{v}} AS {dtype}) IS NOT NULL)"


NAN = "lower(trim({v})) = 'nan'"
IS_FLOAT = f"({_form(NUMBER)} AND isfinite(TRY_CAST({{v}} AS DOUBLE)))"
HOLDS = f"(NOT {_form(DIGITS)} OR abs(TRY_CAST({{v}} AS DOUBLE)) < {EXACT})"
ANY_NUMBER = f"({_form(NUMBER)} OR regexp_full_match(lower({{v}}), {literal(NOT_FINITE)}))"
FLOAT = f"(({IS_FLOAT} AND {HOLDS}) OR regexp_full_match(lower({{v}}), {literal(NOT_FINITE)}))"
UNDECLARED = {
    "BIGINT": f"({_typed(INTEGER, 'BIGINT')} OR {NAN})",
    "DOUBLE": f"({FLOAT} AND NOT {_form(PADDED)})",
    "DATE": _typed(DATE, "DATE"),
    "TIMESTAMP": _typed(f"{DATE}({TIME})?", "TIMESTAMP"),
    "TIMESTAMP_NS": _typed(f"{DATE}({TIME_NS})?", "TIMESTAMP_NS"),
    "TIMESTAMPTZ": _typed(DATE + TIME + OFFSET, "TIMESTAMPTZ"),
    "BOOLEAN": _form("(?i)true|false"),
}
"""SQL type -> SQL condition that all values of a column must meet, in the order in which types are
tried. A column that meets none of the conditions is text."""
DECLARED: dict[RawType, dict[str, str]] = {
    # A program may have written integer keys as floats. As text, '7.0' would not match the key '7'.
    "string": {"VARCHAR": _form(DIGITS), "DOUBLE": f"({_form(WHOLE)} AND {HOLDS})"},
    "int": {**UNDECLARED, "BIGINT": f"({_typed(DIGITS, 'BIGINT')} OR {NAN})"},
    "float": {**UNDECLARED, "BIGINT": f"({_typed(DIGITS, 'BIGINT')} OR {NAN})", "DOUBLE": FLOAT},
}
"""Declared type -> such conditions for the columns of features and keys. Here, a number may have
leading zeros."""
MAYBE_NUMBER = ""
"""Stands for a type: all values are numbers, but they may have no common type."""


def find_types(
    connection: duckdb.DuckDBPyConnection,
    view: str,
    columns: Iterable[str],
    declared: Mapping[str, RawType],
) -> TextTypes:
    """Find the types of text columns from all their values.

    Args:
        connection: The DuckDB connection.
        view: Name of a table or view whose columns are text.
        columns: Names of the columns to examine.
        declared: Column -> type, for the columns of features and keys.
    """
    tests = {name: _tests(declared.get(name)) for name in columns}
    sample = f"(SELECT * FROM {view} LIMIT {SAMPLE_ROWS})"
    likely = _passed(connection, sample, tests)
    first = _first_passed(connection, view, likely)
    types, odd, mixed = {}, {}, {}
    for name, dtype in first.items():
        types[name] = dtype or "VARCHAR"
        if dtype or MAYBE_NUMBER not in likely[name]:
            continue
        value, share, big, decimal = _numbers(connection, view, name)
        if value is None and big is not None and decimal is not None:
            mixed[name] = (big, decimal)
        elif value is not None and share >= MOSTLY and name not in declared:
            odd[name] = value
    return TextTypes(types, odd, mixed)


def converted(column: str, dtype: str) -> str:
    """Return the SQL that converts a text column to the type that `find_types` found."""
    name = quoted(column)
    if dtype == "VARCHAR":
        return name
    value = f"CASE WHEN {NAN.format(v=name)} THEN NULL ELSE {name} END"
    return f"CAST({value} AS {dtype}) AS {name}"


def _tests(declared: RawType | None) -> dict[str, str]:
    return {**(DECLARED[declared] if declared else UNDECLARED), MAYBE_NUMBER: ANY_NUMBER}


def _first_passed(
    connection: duckdb.DuckDBPyConnection, source: str, tests: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """Return column -> the first type whose test all its values pass; MAYBE_NUMBER if none."""
    first = dict.fromkeys(tests, MAYBE_NUMBER)
    left = {name: [t for t in types if t != MAYBE_NUMBER] for name, types in tests.items()}
    while left := {name: types for name, types in left.items() if types}:
        # Most columns pass their first test, so one scan of the table is usually enough.
        tried = {name: {types[0]: tests[name][types[0]]} for name, types in left.items()}
        passed = _passed(connection, source, tried)
        first |= {name: dtype for name, types in passed.items() for dtype in types}
        left = {name: types[1:] for name, types in left.items() if not passed[name]}
    return first


def _passed(
    connection: duckdb.DuckDBPyConnection, source: str, tests: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """Return column -> the tests that all its values pass."""
    pairs = [(name, dtype) for name, of_column in tests.items() for dtype in of_column]
    passed: dict[str, dict[str, str]] = {name: {} for name in tests}
    if not pairs:
        return passed
    checks = []
    for name, dtype in pairs:
        value = quoted(name)
        test = tests[name][dtype].replace("{v}", value)
        checks.append(f"bool_and({test}) FILTER ({value} IS NOT NULL)")
    [row] = connection.sql(f"SELECT {', '.join(checks)} FROM {source}").fetchall()
    for (name, dtype), result in zip(pairs, row, strict=True):
        # The result is None for a column without values, which may have any type.
        if result is not False:
            passed[name][dtype] = tests[name][dtype]
    return passed


def _numbers(
    connection: duckdb.DuckDBPyConnection, view: str, column: str
) -> tuple[str | None, float, str | None, str | None]:
    """Examine a text column of numbers.

    Returns:
        An example of a value that is not a number, the fraction of values that are numbers, an
        example of an integer that a float cannot hold exactly, and an example of a number with a
        decimal point. An example is None if the column has no such value.
    """
    value = quoted(column)
    number, digits, holds = (t.replace("{v}", value) for t in (ANY_NUMBER, _form(DIGITS), HOLDS))
    [row] = connection.sql(
        f"SELECT min({value}) FILTER (NOT {number}), avg(CAST({number} AS INT)), "
        f"min({value}) FILTER ({digits} AND NOT {holds}), "
        f"min({value}) FILTER ({number} AND NOT {digits}) FROM {view}"
    ).fetchall()
    return row[0], float(row[1] or 0), row[2], row[3]
