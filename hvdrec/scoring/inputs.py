"""Raw values of requests as the arrays that the graphs take.

A missing value is None or NaN and enters a graph as "" among strings, -2**63 among integers, NaN
among floats. Lists are padded with it, on the right; sequences on the left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import Field
from hvdrec.scoring.errors import RequestError, choices

Array = NDArray[Any]
MISSING: dict[str, Any] = {"string": "", "int": -(2**63), "float": math.nan}
NUMPY: dict[str, Any] = {"string": object, "int": np.int64, "float": np.float64}


def rows_to_inputs(fields: Sequence[Field], rows: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """Return the inputs for N rows of raw values: [N], or [N, L] for lists.

    A field that a row leaves out is missing, as None is. Raises RequestError for a wrong type.
    """
    return {field.name: column(field, [row.get(field.name) for row in rows]) for field in fields}


def column(field: Field, values: Sequence[Any]) -> Array:
    """Return one field's values as an array [N], or [N, L] for lists."""
    if not field.is_list:
        converted = [_scalar(field, value) for value in values]
        return np.array(converted, dtype=NUMPY[field.dtype])
    lists = [_list(field, value) for value in values]
    width = max(1, max(map(len, lists), default=1))
    out = np.full((len(lists), width), MISSING[field.dtype], dtype=NUMPY[field.dtype])
    for row, entries in enumerate(lists):
        if not entries:
            continue
        if field.pads_left:
            out[row, -len(entries) :] = entries
        else:
            out[row, : len(entries)] = entries
    return out


def check_names(given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Raise RequestError for a name that is no field."""
    for name in given:
        if name not in known:
            raise RequestError(f"{what} field '{name}' does not exist; known: {choices(known)}")


def key_value(key: Any, dtype: str, name: str) -> str | int:
    """Return a user or item key in its type; RequestError for another type."""
    if dtype == "int":
        if isinstance(key, int | np.integer) and not isinstance(key, bool | np.bool_):
            return int(key)
        raise RequestError(f"{name} = {key!r}: the key is an integer, not {_kind(key)}")
    if isinstance(key, str):
        return str(key)
    hint = f'; pass "{key}"' if isinstance(key, int | np.integer) else ""
    raise RequestError(f"{name} = {key!r}: the key is a string, not {_kind(key)}{hint}")


def _scalar(field: Field, value: Any) -> Any:
    """Return one value in its field's type, or the missing value of that type."""
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return MISSING[field.dtype]
    if field.dtype == "string":
        if isinstance(value, str):
            return value
    elif isinstance(value, bool | np.bool_):
        pass
    elif isinstance(value, int | np.integer):
        if field.dtype == "float" or -(2**63) <= int(value) < 2**63:
            return value
        raise RequestError(f"{field.name} = {value!r}: does not fit 64 bits")
    elif field.dtype == "float" and isinstance(value, float | np.floating):
        return value
    wanted = {"string": "a string", "int": "an integer", "float": "a number"}[field.dtype]
    hint = f'; pass "{value}"' if field.dtype == "string" and not isinstance(value, bool) else ""
    raise RequestError(f"{field.name} = {value!r}: must be {wanted}, not {_kind(value)}{hint}")


def _list(field: Field, value: Any) -> list[Any]:
    """Return a list value, cut to what the graph would keep, without copying long histories."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        raise RequestError(
            f"{field.name} = {value!r}: must be a list of values, not {_kind(value)}"
        )
    kept = value[-field.max_length :] if field.pads_left else value[: field.max_length]
    return [_scalar(field, entry) for entry in kept]


def _kind(value: Any) -> str:
    return type(value).__name__
