"""Raw values of requests as the arrays that the graphs take.

A missing value is None or NaN and enters a graph as "" among strings, -2**63 among integers, NaN
among floats. RowLists are padded with it, on the right; sequences on the left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import Field
from hvdrec.scoring.errors import invalid_request, shown, unknown_field

Array = NDArray[Any]
MISSING: Mapping[str, Any] = {"string": "", "int": -(2**63), "float": math.nan}
NUMPY: Mapping[str, Any] = {"string": object, "int": np.int64, "float": np.float64}
PLAIN: Mapping[str, frozenset[type]] = {
    "string": frozenset({str}),
    "int": frozenset({int}),
    "float": frozenset({float, int}),
}
"""Python types whose values enter an array as they are."""
WANTED: Mapping[str, str] = {"string": "a string", "int": "an integer", "float": "a number"}


def rows_to_inputs(fields: Sequence[Field], rows: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """Return the inputs for N rows of raw values: [N], or [N, L] for lists.

    A field that a row leaves out is missing, as None is. Raises RequestError for a wrong type.
    """
    return {field.name: column(field, [row.get(field.name) for row in rows]) for field in fields}


def column(field: Field, values: Sequence[Any]) -> Array:
    """Return one field's values as an array [N], or [N, L] for lists.

    Strings come as an object array, integers as int64, floats as float64. RowLists are cut to what
    counts. Raises RequestError for a value of the wrong type.
    """
    if not field.is_list:
        return np.array(_converted(field, values), dtype=NUMPY[field.dtype])
    lists = [_entries(field, value) for value in values]
    width = max(1, max(map(len, lists), default=1))
    out = np.full((len(lists), width), MISSING[field.dtype], dtype=NUMPY[field.dtype])
    for row, entries in enumerate(lists):
        if entries:
            part = slice(-len(entries), None) if field.pads_left else slice(len(entries))
            out[row, part] = entries
    return out


def check_count(name: str, value: Any) -> None:
    """Raise RequestError unless a value is a whole number from 1."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise invalid_request(name, value, "must be an integer of at least 1")


def check_share(name: str, value: Any) -> None:
    """Raise RequestError unless a value is a number in [0, 1)."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1:
        raise invalid_request(name, value, "must be a number in [0, 1)")


def listed(values: Any, what: str) -> Sequence[Any]:
    """Return what a caller gave as a list; a numpy array's values become Python's own.

    Raises RequestError for text, a mapping, a set or anything else that is no list.
    """
    if isinstance(values, list | tuple):
        return values
    if isinstance(values, np.ndarray) and values.ndim == 1:
        # tolist() would turn times into plain integers.
        plain: list[Any] = list(values) if values.dtype.kind in "mM" else values.tolist()
        return plain
    if isinstance(values, Sequence) and not isinstance(values, str | bytes | bytearray):
        return list(values)
    raise invalid_request(what, values, f"must be a list, not {_kind(values)}")


def check_names(given: Any, known: Collection[str], what: str) -> None:
    """Raise RequestError for something that is no mapping, or for a name that is no field."""
    if not isinstance(given, Mapping):
        problem = f"must be a mapping of fields to values, not {_kind(given)}"
        raise invalid_request(what, given, problem)
    for name in given:
        if name not in known:
            raise unknown_field(f"{what}.{name}", known)


def key_value(key: Any, dtype: str, name: str, key_name: str = "the key") -> str | int | None:
    """Convert the key of a user or an item to its type.

    Args:
        key: What a caller passed as the key.
        dtype: Type of the side's keys, "string" or "int".
        name: Where the key stands in the request, for the error.
        key_name: Name of the key's column, for the error.

    Returns:
        The key; None if it is None or NaN.

    Raises:
        RequestError: The key has another type.
    """
    if is_missing(key):
        return None
    if dtype == "string":
        if isinstance(key, str):
            return _text(str(key), name)
        problem = f"{key_name} is a string, not {_kind(key)}"
        raise invalid_request(name, _plain(key), problem, _quoted(key))
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return _int64(int(key), name)
    remedy = f"pass {key}" if isinstance(key, str) and _is_integer(key) else ""
    raise invalid_request(name, key, f"{key_name} is an integer, not {_kind(key)}", remedy)


def is_missing(value: Any) -> bool:
    """Return whether a value is None or NaN."""
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value))


def _converted(field: Field, values: Sequence[Any]) -> Sequence[Any]:
    """Return values in their field's type, missing values in place of None and NaN."""
    dtype = field.dtype
    if set(map(type, values)) <= PLAIN[dtype] and _fits(dtype, values):
        return values
    return [_scalar(field, value) for value in values]


def _fits(dtype: str, values: Sequence[Any]) -> bool:
    """Return whether plain values are also within what a graph takes."""
    if dtype == "string":
        # Half a surrogate pair is no text that a graph could take.
        return all(map(str.isascii, values)) or not any(map(_is_broken, values))
    return not values or (min(values) >= -(2**63) and max(values) < 2**63)


def _scalar(field: Field, value: Any) -> Any:
    """Return one value in its field's type, or the missing value of that type."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if is_missing(value):
        return MISSING[field.dtype]
    if field.dtype == "string":
        if isinstance(value, str):
            return _text(str(value), field.path)
    elif isinstance(value, bool | np.bool_):
        pass
    elif isinstance(value, int | np.integer):
        convert = _float64 if field.dtype == "float" else _int64
        return convert(int(value), field.path)
    elif field.dtype == "float" and isinstance(value, float | np.floating):
        return float(value)
    remedy = _quoted(value) if field.dtype == "string" else ""
    problem = f"must be {WANTED[field.dtype]}, not {_kind(value)}"
    raise invalid_request(field.path, _plain(value), problem, remedy)


def _int64(value: int, name: str) -> int:
    if -(2**63) <= value < 2**63:
        return value
    raise invalid_request(name, value, "does not fit 64 bits")


def _float64(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise invalid_request(name, value, "is too large for a float") from None


def _entries(field: Field, value: Any) -> Sequence[Any]:
    """Return a list's entries, cut to those that count."""
    if is_missing(value):
        return []
    entries = listed(value, field.path)
    kept = entries[-field.max_length :] if field.pads_left else entries[: field.max_length]
    return _converted(field, kept)


def _text(text: str, name: str) -> str:
    if _is_broken(text):
        raise invalid_request(name, text, "is not valid Unicode text")
    return text


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_integer(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit()


def _quoted(value: Any) -> str:
    """Return the hint for a number that stands where a string belongs."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return f'pass "{shown(_plain(value))}"' if is_number else ""


def _plain(value: Any) -> Any:
    """Return a numpy scalar as Python's own, which reads better."""
    return value.item() if isinstance(value, np.generic) else value


def _kind(value: Any) -> str:
    return type(value).__name__
