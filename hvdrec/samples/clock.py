"""Convert columns of times to microseconds, and keys to a common type, as Ibis expressions."""

from __future__ import annotations

import datetime
from contextlib import suppress
from decimal import ROUND_HALF_UP, Decimal

import ibis
from ibis.expr.types import Column, IntegerColumn, Table

from hvdrec.config.label_join import TimeUnit
from hvdrec.errors import choices, invalid_file, invalid_value
from hvdrec.samples.sql import derivation, written
from hvdrec.storage.urls import Location

TIMES = ("integer", "float", "date", "timestamp")
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
SECONDS_A_YEAR = 31_556_952
LATEST_TIME = 1e11
"""Latest plausible time in seconds since 1970 (the year 5138). If a number exceeds it, the
configured unit must be wrong."""
MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}
"""Unit of a numeric time -> microseconds."""


def clock(column: Column, unit: TimeUnit) -> IntegerColumn:
    """Convert a column of times to microseconds since 1970; numbers count from their own zero.

    Args:
        column: Numbers, dates (midnight UTC) or timestamps (UTC if they have no time zone).
            Fractions of a microsecond are rounded.
        unit: Unit of numbers.
    """
    dtype, size = column.type(), MICROSECONDS[unit]
    if dtype.is_integer():
        return column.cast("int64") * size
    if dtype.is_numeric():
        return (column.cast("float64") * size).round().cast("int64")
    if dtype.is_date():
        return column.delta(ibis.date("1970-01-01"), unit="day").cast("int64") * 86_400_000_000
    zone = dtype.timezone and "UTC"
    moment = column.cast(ibis.dtype(f"timestamp('{zone}')" if zone else "timestamp"))
    start = ibis.timestamp("1970-01-01 00:00:00", timezone=zone)
    return moment.delta(start, unit="microsecond").cast("int64")


def is_time(column: Column) -> bool:
    """Return True if `clock` accepts a column of this type."""
    dtype = column.type()
    return bool(dtype.is_numeric() or dtype.is_date() or dtype.is_timestamp())


def require_time(table: Table, column: str, key: str, file: Location, name: str = "") -> None:
    """Raise UserError if a column cannot hold times (see `is_time`).

    Args:
        table: The table.
        column: Name of the column.
        key: Configuration key that names the column, for the error message.
        file: Location of the table, for the error message.
        name: Name of the column in the error message; if empty, `column`.
    """
    if is_time(table[column]):
        return
    dtype, column = table[column].type(), name or column
    problem = f"column '{column}' ({key}) is {dtype}, a time is {choices(TIMES)}"
    if dtype.is_string() and key == "samples.time":
        sql = f"CAST({written(column)} AS TIMESTAMP)"
        remedy = f"derive it: {derivation('shown_at', sql)}, and set samples.time = 'shown_at'"
    else:
        remedy = f"write {key} = 'CAST({written(column)} AS TIMESTAMP)'"
    raise invalid_file(file, problem, remedy)


def microseconds_of(number: float | Decimal, unit: TimeUnit, key: str) -> int:
    """Convert a numeric time to microseconds, as `clock` does for a column.

    Raises:
        UserError: The number is so large that its unit must be wrong. `key` is the configuration
            key of the unit.
    """
    exact, size = Decimal(str(number)), MICROSECONDS[unit]
    seconds = float(exact) * size / MICROSECONDS["s"]
    if seconds > LATEST_TIME:
        latest = int(LATEST_TIME) * MICROSECONDS["s"]
        fitting = [each for each in MICROSECONDS if exact * MICROSECONDS[each] <= latest]
        problem = f"times reach {number}, which is the year {1970 + seconds / SECONDS_A_YEAR:.0f}"
        raise invalid_value(key, unit, problem, f"set it to one of {choices(fitting)}")
    return int((exact * size).to_integral_value(ROUND_HALF_UP))


def instant(text: str, unit: TimeUnit, key: str) -> int:
    """Convert a time in the configuration, a number or a date and time, to microseconds.

    Raises:
        UserError: The text is neither a number nor a date and time; `key` names the field.
    """
    with suppress(ValueError):
        return round(float(text) * MICROSECONDS[unit])
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        problem = "must be a number or a date and time"
        raise invalid_value(key, text, problem, "write for example '2024-05-01 00:00'") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    return (moment - EPOCH) // datetime.timedelta(microseconds=1)


def key_family(dtype: ibis.DataType) -> str:
    """Return the group of types that can be compared: "string", "integer" or the type itself."""
    if dtype.is_string():
        return "string"
    return "integer" if dtype.is_integer() else str(dtype.copy(nullable=True))


def comparable(left: Column, right: Column) -> tuple[Column, Column] | None:
    """Convert two key columns to one type; return None if they cannot be compared.

    If one column has strings and the other integers, the integers become strings.
    """
    families = {key_family(left.type()), key_family(right.type())}
    if families == {"string", "integer"}:
        return left.cast("string"), right.cast("string")
    return (left, right) if len(families) == 1 else None
