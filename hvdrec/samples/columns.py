"""Columns in memory, and their cast to the types that features declare.

Strings are held dictionary-encoded, on their own and as the values of lists: four bytes a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hvdrec.config.schema import RawType
from hvdrec.errors import UserError, choices

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
REMEDIES: dict[RawType, str] = {"string": "VARCHAR", "int": "BIGINT", "float": "DOUBLE"}


def compact(array: pa.Array) -> pa.Array:
    """Return an array with its strings, or the strings in its lists, dictionary-encoded.

    A null list becomes an empty one.
    """
    kind = array.type
    if is_list(kind):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        return list_array(lengths, compact(array.flatten()))
    if pa.types.is_dictionary(kind):
        array, kind = array.cast(kind.value_type), kind.value_type
    if pa.types.is_large_string(kind):
        array, kind = array.cast(pa.string()), pa.string()
    return array.dictionary_encode() if pa.types.is_string(kind) else array


def concatenated(arrays: Sequence[pa.Array], kind: pa.DataType) -> pa.Array:
    """Return compact arrays of one type as one; `kind` is that of an empty result."""
    if not arrays:
        return compact(pa.array([], kind))
    if len(arrays) == 1:
        return arrays[0]
    if is_list(arrays[0].type):
        lengths = [pc.list_value_length(a).to_numpy(zero_copy_only=False) for a in arrays]
        values = concatenated([a.flatten() for a in arrays], arrays[0].type.value_type)
        return list_array(np.concatenate(lengths), values)
    return one(pa.chunked_array(arrays).unify_dictionaries())


def one(column: pa.ChunkedArray) -> pa.Array:
    """Return a chunked column as one array."""
    array = column.combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def list_array(lengths: Array, values: pa.Array) -> pa.Array:
    """Return lists of the given lengths [n] over flat values."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def plain(array: pa.Array) -> pa.Array:
    """Return a compact array with its strings written out."""
    if is_list(array.type):
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        return list_array(lengths, plain(array.flatten()))
    return array.cast(array.type.value_type) if pa.types.is_dictionary(array.type) else array


def canonical(array: pa.Array) -> pa.Array:
    """Return a compact array with its dictionary sorted, so that equal values give equal files."""
    if is_list(array.type):
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        return list_array(lengths, canonical(array.flatten()))
    if not pa.types.is_dictionary(array.type):
        return array
    order = pc.sort_indices(array.dictionary)
    rank = np.empty(len(order), dtype=np.int32)
    rank[order.to_numpy()] = np.arange(len(order))
    return pa.DictionaryArray.from_arrays(
        pa.array(rank).take(array.indices), array.dictionary.take(order)
    )


def codes(array: pa.Array) -> tuple[Array, pa.Array]:
    """Return the rank of each key among the distinct keys, int64 [n], and those keys, ascending.

    array: compact, of strings (sorted by their bytes) or integers, without nulls.
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


def groups(arrays: Sequence[pa.Array], rows: int) -> Array:
    """Return int64 [rows], equal where rows are equal in all columns (null equals null)."""
    found = np.zeros(rows, dtype=np.int64)
    for array in arrays:
        if pa.types.is_dictionary(array.type):
            index = pc.fill_null(array.indices, -1).to_numpy(zero_copy_only=False)
        else:
            encoded = array.dictionary_encode(null_encoding="encode")
            index = encoded.indices.to_numpy(zero_copy_only=False)
        index = index.astype(np.int64) + 1
        found = np.unique(found * (index.max(initial=0) + 1) + index, return_inverse=True)[1]
    return found


def cast(
    array: pa.Array, dtype: RawType, *, where: str, name: str, purpose: str, lists: bool = False
) -> pa.Array:
    """Return a compact column in a declared type: string, int64 or double, or lists of it.

    Integers become decimal strings where strings are declared; floats never do, since '1.0' is no
    key. where, name, purpose: the file, the column and what it is for, to name in the UserError
    that any other type raises.
    """
    kind = array.type
    shown = type_name(kind)
    if lists and not is_list(kind):
        raise UserError(
            f"{where}: column '{name}' is {shown}, {purpose} needs a list; derive it, for example "
            f"samples.derive.{name} = \"string_split({name}, '|')\""
        )
    if is_list(kind) and not lists:
        raise UserError(
            f"{where}: column '{name}' is {shown}, {purpose} takes one value; "
            "declare kind = 'categorical_list'"
        )
    if family(kind.value_type if lists else kind) not in ACCEPTED[dtype]:
        target = REMEDIES[dtype] + ("[]" if lists else "")
        example = f'samples.derive.{name} = "CAST({name} AS {target})"'
        if dtype == "string" and family(kind) == "float":
            example = f'samples.derive.{name} = "CAST({name} AS BIGINT)"'
        raise UserError(
            f"{where}: column '{name}' is {shown}, {purpose} of dtype '{dtype}' takes "
            f"{choices(ACCEPTED[dtype])}; derive it, for example {example}"
        )
    try:
        if lists:
            lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
            return list_array(lengths, _cast_scalars(array.flatten(), dtype))
        return _cast_scalars(array, dtype)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{where}: column '{name}' ({shown}) does not fit dtype '{dtype}' of {purpose}: "
            f"{str(error).splitlines()[0]}; declare another dtype"
        ) from None


def family(kind: pa.DataType) -> str:
    """Return the sort of type that the messages speak of."""
    if pa.types.is_dictionary(kind):
        return family(kind.value_type)
    if pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale <= 0):
        return "integer"
    for name, belongs in (
        ("boolean", pa.types.is_boolean),
        ("float", pa.types.is_floating),
        ("string", pa.types.is_string),
        ("string", pa.types.is_large_string),
        ("decimal", pa.types.is_decimal),
        ("timestamp", pa.types.is_timestamp),
        ("date", pa.types.is_date),
    ):
        if belongs(kind):
            return name
    return str(kind)


def type_name(kind: pa.DataType) -> str:
    """Return a compact column's type as the user knows it."""
    return f"a list of {type_name(kind.value_type)}" if is_list(kind) else family(kind)


def is_list(kind: pa.DataType) -> bool:
    """Return whether values are lists of any sort."""
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _cast_scalars(array: pa.Array, dtype: RawType) -> pa.Array:
    if dtype != "string":
        return array.cast(TARGETS[dtype])
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.int64())
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    return pa.DictionaryArray.from_arrays(encoded.indices, encoded.dictionary.cast(pa.string()))
