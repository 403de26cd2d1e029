"""Suggest remedies for columns whose type is not the declared one.

A suggestion depends on the values of the column. No suggestion rounds values, cuts them off, or
makes different values equal.
"""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hvdrec.config.schema import RawType
from hvdrec.errors import shown
from hvdrec.samples.sql import derivation, literal, written

EXACT = 2**53
"""A float holds every integer below this number exactly."""
SQL_TYPES: dict[RawType, str] = {"string": "VARCHAR", "int": "BIGINT", "float": "DOUBLE"}
DAYS = (
    "%Y/%m/%d",
    "%Y.%m.%d",
    "%Y%m%d",
    "%d/%m/%Y",
    "%d.%m.%Y",
    "%d-%m-%Y",
    "%m/%d/%Y",
    "%m-%d-%Y",
)
TIMES = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
TESTED_TIMES = 1000
"""Largest number of distinct texts that are tried with each format."""
ISO_TIME = r"^\d{4}-\d{2}-\d{2}"
OFFSET = r"\d{2}:\d{2}.*(Z|UTC|[+-]\d{2}(:?\d{2})?)$"
NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
INTEGER = r"^\s*[+-]?\d{1,18}\s*$"
AS_INTEGERS = "write the column as integers or text: floats do not hold all integers above 2**53"


def type_remedy(name: str, array: pa.Array, kind: str, dtype: RawType) -> str:
    """Return how to convert a column to its declared type.

    Args:
        name: Name of the column.
        array: Its values, one per row; they may be dictionary-encoded.
        kind: Family of its type; see `hvdrec.samples.columns.family`.
        dtype: The declared type.
    """
    column = written(name)
    if kind == "binary":
        other = "" if dtype == "string" else ", and declare dtype = 'string'"
        return _derive(name, f"hex({column})") + other
    if dtype == "string":
        if kind != "float" or not _is_whole(array):
            return _derive(name, f"CAST({column} AS VARCHAR)")
        return _derive(name, f"CAST({column} AS BIGINT)") if _is_exact(array) else AS_INTEGERS
    if kind in ("date", "timestamp"):
        function = "epoch_us" if dtype == "int" else "epoch"
        return _derive(name, f"{function}({column})")
    if kind == "string":
        return _text_remedy(name, array, dtype)
    if dtype == "int" and kind in ("float", "decimal"):
        if not _is_whole(array):
            as_text = derivation(name, f"CAST({column} AS VARCHAR)")
            return f"declare dtype = 'float', or dtype = 'string' and {as_text}"
        return _derive(name, f"CAST({column} AS BIGINT)") if _is_exact(array) else AS_INTEGERS
    if kind in ("boolean", "integer"):
        return _derive(name, f"CAST({column} AS {SQL_TYPES[dtype]})")
    return "name a column of another type"


def list_remedy(name: str, kind: str, dtype: RawType) -> str:
    """Return how to convert a column with one value per row to lists."""
    column = written(name)
    split = f"string_split({column}, '|')" if kind == "string" else f"[{column}]"
    needs_cast = (kind == "string") != (dtype == "string")
    return _derive(name, f"CAST({split} AS {SQL_TYPES[dtype]}[])" if needs_cast else split)


def entries_remedy(name: str, dtype: RawType) -> str:
    """Return how to convert the entries of a column of lists to the declared type."""
    return _derive(name, f"CAST({written(name)} AS {SQL_TYPES[dtype]}[])")


def range_remedy(name: str, array: pa.Array) -> str:
    """Return how to convert integers that do not fit int64, so that all values stay different."""
    column = written(name)
    values = array.drop_null().to_pylist()
    if not values or max(values) >= 2**64 or min(values) < 0:
        return f"declare dtype = 'string' and {_derive(name, f'CAST({column} AS VARCHAR)')}"
    wrapped = f"CAST({column} AS HUGEINT) - 18446744073709551616"
    signed = f"CASE WHEN {column} > 9223372036854775807 THEN {wrapped} ELSE {column} END"
    return _derive(name, f"CAST({signed} AS BIGINT)")


def time_remedy(name: str, array: pa.Array, kind: str) -> str:
    """Return how to convert a column of another type to times."""
    column = written(name)
    if kind != "string":
        return "name a column of one of these types"
    texts = _texts(array)
    if pc.all(pc.match_substring_regex(texts, NUMBER)).as_py():
        return _derive(name, f"CAST({column} AS DOUBLE)")
    if pc.all(pc.match_substring_regex(texts, ISO_TIME)).as_py():
        has_offset = pc.any(pc.match_substring_regex(texts, OFFSET)).as_py()
        return _derive(name, f"CAST({column} AS TIMESTAMP{'TZ' if has_offset else ''})")
    sample = texts.slice(0, TESTED_TIMES).to_pylist()
    formats = [day + time for day in DAYS for time in TIMES if _all_match(sample, day + time)]
    if not formats:
        return f"derive it with a format that fits: {derivation(name, _strptime(column, DAYS[3]))}"
    first, *others = (derivation(name, _strptime(column, form)) for form in formats)
    also = f", or {others[0]} if the month is first" if others else ""
    return f"derive it with its format, for example {first}{also}"


def _strptime(column: str, form: str) -> str:
    return f"strptime({column}, {literal(form)})"


def _all_match(texts: list[str], form: str) -> bool:
    try:
        for text in texts:
            datetime.datetime.strptime(text, form)
    except ValueError:
        return False
    return True


def _text_remedy(name: str, array: pa.Array, dtype: RawType) -> str:
    """Return the remedy for a column of text whose declared type is a number."""
    column, texts = written(name), _texts(array)
    target = SQL_TYPES[dtype]
    is_number = pc.match_substring_regex(texts, NUMBER)
    fits = pc.match_substring_regex(texts, INTEGER) if dtype == "int" else is_number
    if pc.all(fits).as_py():
        return _derive(name, f"CAST({column} AS {target})")
    odd = texts.filter(pc.invert(fits))[0].as_py()
    if pc.any(pc.and_(is_number, pc.invert(fits))).as_py() or not pc.any(fits).as_py():
        wanted = "an integer" if dtype == "int" else "a number"
        return f"declare dtype = 'string': {shown(odd)} is not {wanted}"
    with_nulls = derivation(name, f"TRY_CAST({column} AS {target})")
    return f"correct values such as {shown(odd)}, or turn them into nulls with {with_nulls}"


def _derive(name: str, expression: str) -> str:
    return f"derive it, for example {derivation(name, expression)}"


def _texts(array: pa.Array) -> pa.Array:
    """Return the distinct values of a column of text, without null."""
    return pc.unique(array.drop_null().cast(pa.string()))


def _numbers(array: pa.Array) -> np.ndarray[Any, Any]:
    return np.asarray(array.drop_null().cast(pa.float64()).to_numpy(zero_copy_only=False))


def _is_whole(array: pa.Array) -> bool:
    values = _numbers(array)
    return bool((values == np.floor(values)).all())


def _is_exact(array: pa.Array) -> bool:
    return bool((np.abs(_numbers(array)) < EXACT).all())
