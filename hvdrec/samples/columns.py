"""Arrow columns in memory, and casts to the types that features declare.

A column is compact if its strings, or the strings in its lists, are dictionary-encoded: each value
then takes four bytes.
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
"""Starts of lines that follow the reason of an error of DuckDB."""
LONGEST_LINE = 200


def compact(array: pa.Array) -> pa.Array:
    """Dictionary-encode the strings of an array or of its lists; null lists become empty."""
    dtype = array.type
    if is_list(dtype):
        return _map_values(compact, array)
    if pa.types.is_dictionary(dtype):
        array, dtype = array.cast(dtype.value_type), dtype.value_type
    if pa.types.is_large_string(dtype):
        array, dtype = array.cast(pa.string()), pa.string()
    return array.dictionary_encode() if pa.types.is_string(dtype) else array


def concatenate(arrays: Sequence[pa.Array], dtype: pa.DataType) -> pa.Array:
    """Concatenate compact arrays of one type; without arrays, return an empty one of `dtype`."""
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
    """Return the length of each list, int32 [n]; 0 for a null list."""
    return np.asarray(pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False))


def list_array(lengths: Array, values: pa.Array) -> pa.Array:
    """Build lists of the given lengths [n] over flat values."""
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
        The rank of each row's key, int64 [n], and the distinct keys, ascending (strings by bytes).
    """
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    index = encoded.indices.to_numpy(zero_copy_only=False)
    # A dictionary may hold values that no row has.
    used, index = np.unique(index, return_inverse=True)
    values = encoded.dictionary.take(pa.array(used))
    order = pc.sort_indices(values).to_numpy().astype(np.int64)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank[index], values.take(pa.array(order))


def group_ids(arrays: Sequence[pa.Array], rows: int) -> Array:
    """Return int64 [rows], equal where rows are equal in all columns (null equals null)."""
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
    array: pa.Array, dtype: RawType, *, where: str, name: str, purpose: str, lists: bool = False
) -> pa.Array:
    """Cast a compact column to a declared type: string, int64 or float64, or lists of it.

    Integers become decimal strings if strings are declared. Floats do not: '1.0' is not a key.
    Errors name the column, its purpose, and `where` it comes from, a file or configuration key.

    Raises:
        UserError: The type of the column or one of its values does not fit.
    """
    actual = array.type
    kind = type_name(actual)
    column = f"column '{name}' is {kind}, {purpose}"
    if lists and not is_list(actual):
        remedy = list_remedy(name, kind, dtype)
        raise invalid_file(where, f"{column} needs a list", remedy)
    if is_list(actual) and not lists:
        raise invalid_file(where, f"{column} takes one value", "declare kind = 'categorical_list'")
    if family(actual.value_type if lists else actual) not in ACCEPTED[dtype]:
        problem = f"{column} of dtype '{dtype}' takes {choices(ACCEPTED[dtype])}"
        remedy = entries_remedy(name, dtype) if lists else type_remedy(name, array, kind, dtype)
        raise invalid_file(where, problem, remedy)
    try:
        if lists:
            return _map_values(lambda values: _cast_scalars(values, dtype), array)
        return _cast_scalars(array, dtype)
    except pa.ArrowInvalid as error:
        problem = f"column '{name}' ({kind}) does not fit dtype '{dtype}' of {purpose}"
        raise invalid_file(
            where, f"{problem}: {reason(error)}", range_remedy(name, array)
        ) from None


def family(dtype: pa.DataType) -> str:
    """Return the family of a type, as error messages name it, such as "integer"."""
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
    """True for every type of bytes."""
    types = pa.types
    return bool(
        types.is_binary(dtype) or types.is_large_binary(dtype) or types.is_fixed_size_binary(dtype)
    )


def is_list(dtype: pa.DataType) -> bool:
    """True for every list type."""
    types = pa.types
    return bool(
        types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype)
    )


def reason(error: Exception) -> str:
    """Return the text of an error of Arrow or DuckDB on one line, without advice about its API."""
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
