"""Convert raw columns to the arrays that the preprocessing graph takes as inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hvdrec.config.schema import MISSING_INT, Column

ARROW_TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64()}
"""Declared type of a feature -> Arrow type of its raw values."""
ARRAY_TYPES: dict[str, Any] = {"string": object, "int": np.int64, "float": np.float64}
"""Declared type of a feature -> numpy type of its input of the graph."""
FILL = {pa.string(): "", pa.int64(): MISSING_INT, pa.float64(): float("nan")}
"""Arrow type -> value that stands for a missing value in the graph."""


def arrow_type(column: Column) -> pa.DataType:
    """Return the Arrow type of a raw column."""
    scalar = ARROW_TYPES[column.dtype]
    return pa.list_(scalar) if column.is_list else scalar


def rows_to_inputs(columns: Iterable[Column], table: pa.Table) -> dict[str, NDArray[Any]]:
    """Convert raw columns to graph inputs.

    Args:
        columns: The columns to convert.
        table: n rows with these columns.

    Returns:
        Name of a column -> array of strings (dtype object), int64 or float64. The shape is [n], or
        [n, longest list] for lists. Lists are padded with missing values on the right, sequences on
        the left. Nulls become missing values.
    """
    return {column.name: _input(column, table[column.name]) for column in columns}


def _input(column: Column, values: pa.ChunkedArray) -> NDArray[Any]:
    if not column.is_list:
        return flat_to_input(values)
    array = one_chunk(values)
    lengths = list_lengths(array)
    longest = int(lengths.max(initial=0))
    out = np.full((len(lengths), longest), FILL[array.type.value_type], ARRAY_TYPES[column.dtype])
    places = np.arange(longest)
    if column.is_sequence:
        out[places >= longest - lengths[:, None]] = flat_to_input(array.flatten())
    else:
        out[places < lengths[:, None]] = flat_to_input(array.flatten())
    return out


def list_lengths(array: pa.ListArray) -> NDArray[Any]:
    """Return the length of each of n lists, int32 [n]; 0 for a null list."""
    lengths: NDArray[Any] = pc.fill_null(pc.list_value_length(array), 0).to_numpy(
        zero_copy_only=False
    )
    return lengths


def flat_to_input(values: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """Convert n values that are not lists to a graph input [n]; nulls become missing values."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    filled = pc.fill_null(values, FILL[values.type])
    array: NDArray[Any] = (
        filled.to_numpy()
        if isinstance(filled, pa.ChunkedArray)
        else filled.to_numpy(zero_copy_only=False)
    )
    return array


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one contiguous array."""
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
