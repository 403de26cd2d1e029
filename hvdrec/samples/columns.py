"""Hold Arrow columns in memory, and cast them to the types that features declare.

This package calls a column *compact* if its strings, or the strings in its lists, are
dictionary-encoded: each distinct string is stored once, and each value takes four bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hvdrec.config.schema import RawType
from hvdrec.errors import choices, invalid_file
from hvdrec.samples.remedies import entries_remedy, list_remedy, range_remedy, type_remedy

Array = NDArray[Any]

ACCEPTED: dict[RawType, tuple[str, ...]] = {
    "string": ("string", "integer"),
    "int": ("integer", "boolean"),
    "float": ("float", "integer", "decimal"),
}
TARGETS: dict[RawType, pa.DataType] = {
    "string": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
}
END_OF_REASON = ("LINE ", "Possible", "Candidate", "  file =", "  delimiter")
"""Beginnings of the lines that follow the reason of an error in DuckDB's messages."""
LONGEST_LINE = 200


def compact(array: pa.Array) -> pa.Array:
    """Make an array compact: dictionary-encode its strings. Null lists become empty lists."""
    dtype = array.type
    if is_list(dtype):
        return _map_values(compact, array)
    if pa.types.is_dictionary(dtype):
        array, dtype = array.cast(dtype.value_type), dtype.value_type
    if pa.types.is_large_string(dtype):
        array, dtype = array.cast(pa.string()), pa.string()
    return array.dictionary_encode() if pa.types.is_string(dtype) else array


def concatenate(arrays: Sequence[pa.Array], dtype: pa.DataType) -> pa.Array:
    """Concatenate compact arrays of one type; if there are none, return an empty one of `dtype`."""
    if not arrays:
        return compact(pa.array([], dtype))
    if len(arrays) == 1:
        return arrays[0]
    if is_list(arrays[0].type):
        values = concatenate([a.flatten() for a in arrays], arrays[0].type.value_type)
        return list_array(np.concatenate([list_lengths(a) for a in arrays]), values)
    array = pa.chunked_array(arrays).unify_dictionaries().combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def list_lengths(array: pa.Array) -> Array:
    """Return the length of each of n lists, int32 [n]; 0 for a null list."""
    return np.asarray(pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False))


def list_array(lengths: Array, values: pa.Array) -> pa.Array:
    """Divide flat values into n lists of the given lengths [n]."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _map_values(function: Callable[[pa.Array], pa.Array], array: pa.Array) -> pa.Array:
    """Apply a function to the flat values of a list array."""
    return list_array(list_lengths(array), function(array.flatten()))


def plain(array: pa.Array) -> pa.Array:
    """Decode the dictionaries of a compact array."""
    if is_list(array.type):
        return _map_values(plain, array)
    return array.cast(array.type.value_type) if pa.types.is_dictionary(array.type) else array


def canonical(array: pa.Array) -> pa.Array:
    """Sort the dictionary of a compact array, so that equal values give identical files."""
    if is_list(array.type):
        return _map_values(canonical, array)
    if not pa.types.is_dictionary(array.type):
        return array
    order = pc.sort_indices(array.dictionary)
    rank = np.empty(len(order), dtype=np.int32)
    rank[order.to_numpy()] = np.arange(len(order))
    return pa.DictionaryArray.from_arrays(
        pa.array(rank).take(array.indices), array.dictionary.take(order)
    )


def encode_keys(array: pa.Array) -> tuple[Array, pa.Array]:
    """Number the distinct keys of a compact column of strings or integers without nulls.

    Returns:
        The index of each row's key among the distinct keys, int64 [n], and the distinct keys in
        ascending order (strings by their bytes).
    """
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    index = encoded.indices.to_numpy(zero_copy_only=False)
    # A dictionary may contain values that no row has.
    used, index = np.unique(index, return_inverse=True)
    values = encoded.dictionary.take(pa.array(used))
    order = pc.sort_indices(values).to_numpy().astype(np.int64)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank[index], values.take(pa.array(order))


def group_ids(arrays: Sequence[pa.Array], rows: int) -> Array:
    """Number the distinct rows of a table; return each row's number, int64 [rows].

    Two rows get the same number if they are equal in all columns. Null equals null.
    """
    group = np.zeros(rows, dtype=np.int64)
    for array in arrays:
        if pa.types.is_dictionary(array.type):
            index = pc.fill_null(array.indices, -1).to_numpy(zero_copy_only=False)
        else:
            encoded = array.dictionary_encode(null_encoding="encode")
            index = encoded.indices.to_numpy(zero_copy_only=False)
        index = index.astype(np.int64) + 1
        group = np.unique(group * (index.max(initial=0) + 1) + index, return_inverse=True)[1]
    return group


def cast(
    array: pa.Array,
    dtype: RawType,
    *,
    where: str,
    name: str,
    purpose: str,
    lists: bool = False,
    remedy: str = "",
) -> pa.Array:
    """Cast a compact column to the type that a feature declares.

    If strings are declared, integers become decimal strings. Floats are not converted to strings,
    since "1.0" would not match the key "1".

    Args:
        array: The column.
        dtype: The declared type, "string", "int" (int64) or "float" (float64).
        where: The file or configuration key that the column comes from, for error messages.
        name: Name of the column, for error messages.
        purpose: What the column is needed for, for error messages.
        lists: True to cast to lists of the declared type.
        remedy: Remedy for error messages; if empty, they suggest one for `hvdrec samples`.

    Raises:
        UserError: The column has another type, or a value cannot be converted exactly.
    """
    actual = array.type
    if pa.types.is_null(actual):
        return pa.nulls(len(array), pa.list_(TARGETS[dtype]) if lists else TARGETS[dtype])
    kind = type_name(actual)
    column = f"column '{name}' is {kind}, {purpose}"
    if lists and not is_list(actual):
        advice = remedy or list_remedy(name, kind, dtype)
        raise invalid_file(where, f"{column} needs a list", advice)
    if is_list(actual) and not lists:
        advice = remedy or "declare kind = 'categorical_list'"
        raise invalid_file(where, f"{column} takes one value", advice)
    if family(actual.value_type if lists else actual) not in ACCEPTED[dtype]:
        problem = f"{column} of dtype '{dtype}' takes {choices(ACCEPTED[dtype])}"
        advice = entries_remedy(name, dtype) if lists else type_remedy(name, array, kind, dtype)
        raise invalid_file(where, problem, remedy or advice)
    try:
        if lists:
            return _map_values(lambda values: _cast_scalars(values, dtype), array)
        return _cast_scalars(array, dtype)
    except pa.ArrowInvalid as error:
        problem = f"column '{name}' ({kind}) does not fit dtype '{dtype}' of {purpose}"
        advice = remedy or range_remedy(name, array)
        raise invalid_file(where, f"{problem}: {reason(error)}", advice) from None


def family(dtype: pa.DataType) -> str:
    """Return the group that a type belongs to, such as "integer", as error messages name it."""
    if pa.types.is_dictionary(dtype):
        return family(dtype.value_type)
    if pa.types.is_integer(dtype) or (pa.types.is_decimal(dtype) and dtype.scale <= 0):
        return "integer"
    for name, is_member in (
        ("boolean", pa.types.is_boolean),
        ("float", pa.types.is_floating),
        ("string", pa.types.is_string),
        ("string", pa.types.is_large_string),
        ("binary", is_binary),
        ("decimal", pa.types.is_decimal),
        ("timestamp", pa.types.is_timestamp),
        ("date", pa.types.is_date),
    ):
        if is_member(dtype):
            return name
    return str(dtype)


def type_name(dtype: pa.DataType) -> str:
    """Return the name of a column type for error messages."""
    return f"a list of {type_name(dtype.value_type)}" if is_list(dtype) else family(dtype)


def is_binary(dtype: pa.DataType) -> bool:
    """Return True if a type holds bytes."""
    types = pa.types
    return bool(
        types.is_binary(dtype) or types.is_large_binary(dtype) or types.is_fixed_size_binary(dtype)
    )


def is_list(dtype: pa.DataType) -> bool:
    """Return True if a type is a list type."""
    types = pa.types
    return bool(
        types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype)
    )


def reason(error: Exception) -> str:
    """Return an error of Arrow or DuckDB as one line, without the advice for programmers."""
    kept = []
    for line in str(error).strip().splitlines():
        if line.startswith(END_OF_REASON):
            break
        if text := line.strip().rstrip("."):
            kept.append(text if len(text) <= LONGEST_LINE else text[: LONGEST_LINE - 3] + "...")
    return "; ".join(kept)


def _cast_scalars(array: pa.Array, dtype: RawType) -> pa.Array:
    if dtype != "string":
        return array.cast(TARGETS[dtype])
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    values = encoded.dictionary
    if pa.types.is_decimal(values.type):
        values = pa.array([str(int(value)) for value in values.to_pylist()], pa.string())
    return pa.DictionaryArray.from_arrays(encoded.indices, values.cast(pa.string()))
