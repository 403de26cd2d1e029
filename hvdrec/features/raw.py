"""Raw columns as input arrays of the preprocessing graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hvdrec.config.schema import MISSING_INT, Column

ARROW_TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64()}
"""Arrow types of raw values."""
ARRAY_TYPES: dict[str, Any] = {"string": object, "int": np.int64, "float": np.float64}
"""numpy types of the graph's inputs."""
FILL = {pa.string(): "", pa.int64(): MISSING_INT, pa.float64(): float("nan")}
"""What stands for a missing value in the graph, by Arrow type."""


def arrow_type(column: Column) -> pa.DataType:
    """Return the Arrow type of a raw column."""
    scalar = ARROW_TYPES[column.dtype]
    return pa.list_(scalar) if column.is_list else scalar


def rows_to_inputs(columns: Iterable[Column], table: pa.Table) -> dict[str, NDArray[Any]]:
    """Convert raw columns to graph inputs.

    Args:
        columns: The columns to convert.
        table: N rows that have them.

    Returns:
        Name -> object array of strings, int64 or float64; [N], or for lists [N, longest list],
        padded with missing values on the right (sequences: on the left). Nulls become missing
        values.
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
    """Return the number of entries of each list, int32 [N]; a null list has none."""
    lengths: NDArray[Any] = pc.fill_null(pc.list_value_length(array), 0).to_numpy(
        zero_copy_only=False
    )
    return lengths


def flat_to_input(values: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """Convert scalars to a graph input [N]; nulls become missing values."""
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
