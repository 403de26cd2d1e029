"""Convert the raw values of requests to the arrays that the ONNX graphs take.

A missing value is None or NaN in a request. In an array it is "" for strings, -2**63 for integers
and NaN for floats. Short lists are filled up with missing values on the right, short sequences on
the left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from hvdrec.scoring.array_files import Array
from hvdrec.scoring.bundle import Field
from hvdrec.scoring.errors import invalid_request, shown, type_words, unknown_field

MISSING: Mapping[str, Any] = {"string": "", "int": -(2**63), "float": math.nan}
NUMPY: Mapping[str, Any] = {"string": object, "int": np.int64, "float": np.float64}
PLAIN: Mapping[str, frozenset[type]] = {
    "string": frozenset({str}),
    "int": frozenset({int}),
    "float": frozenset({float, int}),
}
"""Type of a field -> Python types whose values need no conversion."""
DESCRIPTIONS: Mapping[str, str] = {"string": "a string", "int": "an integer", "float": "a number"}
"""Type of a field -> its description in error messages."""


def rows_to_inputs(fields: Sequence[Field], rows: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """Convert n rows of raw values to one array per field; see `column`.

    If a row omits a field, the field's array has the missing value in this row.
    """
    return {field.name: column(field, [row.get(field.name) for row in rows]) for field in fields}


def column(field: Field, values: Sequence[Any]) -> Array:
    """Convert n raw values of one field to an array; lists are cut to ``max_length``.

    Returns:
        An array [n], or [n, longest list] if the field is a list. The dtype is object for strings,
        else int64 or float64.

    Raises:
        RequestError: A value has the wrong type.
    """
    if not field.is_list:
        return np.array(_converted(field, values), dtype=NUMPY[field.dtype])
    lists = [_entries(field, value) for value in values]
    width = max(1, max(map(len, lists), default=1))
    padded = np.full((len(lists), width), MISSING[field.dtype], dtype=NUMPY[field.dtype])
    for row, entries in enumerate(lists):
        if entries:
            part = slice(-len(entries), None) if field.pads_left else slice(len(entries))
            padded[row, part] = entries
    return padded


def check_count(name: str, value: Any) -> None:
    """Raise RequestError if a value is not an integer of at least 1."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise invalid_request(name, value, "must be an integer of at least 1")


def check_share(name: str, value: Any) -> None:
    """Raise RequestError if a value is not a number in [0, 1)."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1:
        raise invalid_request(name, value, "must be a number in [0, 1)")


def as_list(values: Any, name: str) -> Sequence[Any]:
    """Return a caller's sequence as a list; values of a numpy array become Python values.

    Raises RequestError, which names the argument ``name``, for a string, a mapping, a set or any
    other value that is not a sequence.
    """
    if isinstance(values, list | tuple):
        return values
    if isinstance(values, np.ndarray) and values.ndim == 1:
        # tolist() would turn times into plain integers.
        plain: list[Any] = list(values) if values.dtype.kind in "mM" else values.tolist()
        return plain
    if isinstance(values, Sequence) and not isinstance(values, str | bytes | bytearray):
        return list(values)
    raise invalid_request(name, values, f"must be a list, not {type_words(values)}")


def check_names(values: Any, known: Collection[str], name: str) -> None:
    """Raise RequestError if ``values`` is not a mapping or has a key that is not in ``known``."""
    if not isinstance(values, Mapping):
        problem = f"must be a mapping of fields to values, not {type_words(values)}"
        raise invalid_request(name, values, problem)
    for field in values:
        if field not in known:
            raise unknown_field(f"{name}.{field}", known)


def key_value(key: Any, dtype: str, name: str, key_name: str = "the key") -> str | int | None:
    """Return the key of a user or an item as a string or an integer.

    Args:
        key: The value that a caller passed as the key.
        dtype: Type of the keys in the bundle, "string" or "int".
        name: Argument or field of the request that holds the key, for the error message.
        key_name: Name of the key's column, for the error message.

    Returns:
        The key; None if the value is None or NaN.

    Raises:
        RequestError: The value has another type.
    """
    if is_missing(key):
        return None
    if dtype == "string":
        if isinstance(key, str):
            return _valid_text(str(key), name)
        problem = f"{key_name} is a string, not {type_words(key)}"
        raise invalid_request(name, _plain(key), problem, _quoted(key))
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return _int64(int(key), name)
    is_digits = isinstance(key, str) and key.isascii() and key.removeprefix("-").isdigit()
    problem = f"{key_name} is an integer, not {type_words(key)}"
    raise invalid_request(name, key, problem, f"pass {key}" if is_digits else "")


def is_missing(value: Any) -> bool:
    """Return True for None and NaN."""
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value))


def _converted(field: Field, values: Sequence[Any]) -> Sequence[Any]:
    """Convert values to the type of their field; None and NaN become the missing value."""
    dtype = field.dtype
    if set(map(type, values)) <= PLAIN[dtype] and _is_in_range(dtype, values):
        return values
    return [_scalar(field, value) for value in values]


def _is_in_range(dtype: str, values: Sequence[Any]) -> bool:
    """Return True if all values, which are of `PLAIN` types, are valid as inputs of a graph."""
    if dtype == "string":
        return all(map(str.isascii, values)) or all(map(_is_unicode, values))
    return not values or (min(values) >= -(2**63) and max(values) < 2**63)


def _scalar(field: Field, value: Any) -> Any:
    """Convert one value to the type of its field; None and NaN become the missing value."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if is_missing(value):
        return MISSING[field.dtype]
    if field.dtype == "string":
        if isinstance(value, str):
            return _valid_text(str(value), field.path)
    elif isinstance(value, bool | np.bool_):
        pass
    elif isinstance(value, int | np.integer):
        convert = _float64 if field.dtype == "float" else _int64
        return convert(int(value), field.path)
    elif field.dtype == "float" and isinstance(value, float | np.floating):
        return float(value)
    remedy = _quoted(value) if field.dtype == "string" else ""
    problem = f"must be {DESCRIPTIONS[field.dtype]}, not {type_words(value)}"
    raise invalid_request(field.path, _plain(value), problem, remedy)


def _int64(value: int, name: str) -> int:
    if -(2**63) <= value < 2**63:
        return value
    raise invalid_request(name, value, "does not fit 64 bits")


def _float64(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise invalid_request(name, value, "is too large for a 64-bit number") from None


def _entries(field: Field, value: Any) -> Sequence[Any]:
    """Return the entries of a list, cut to the field's ``max_length``."""
    if is_missing(value):
        return []
    entries = as_list(value, field.path)
    kept = entries[-field.max_length :] if field.pads_left else entries[: field.max_length]
    return _converted(field, kept)


def _valid_text(text: str, name: str) -> str:
    if not _is_unicode(text):
        raise invalid_request(name, text, "is not valid Unicode text")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()  # fails for a lone surrogate
    except UnicodeEncodeError:
        return False
    return True


def _quoted(value: Any) -> str:
    """Return the remedy for a number where a string is expected; "" for other values."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return f'pass "{shown(_plain(value))}"' if is_number else ""


def _plain(value: Any) -> Any:
    """Convert a numpy scalar to a Python value, which is easier to read in a message."""
    return value.item() if isinstance(value, np.generic) else value
