"""Raw columns as the arrays that the preprocessing graph takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hvdrec.config.schema import MISSING_INT, Feature

FILL = {pa.string(): "", pa.int64(): MISSING_INT, pa.float64(): float("nan")}
"""How a missing value enters the graph."""


def rows_to_inputs(features: Sequence[Feature], table: pa.Table) -> dict[str, NDArray[Any]]:
    """Return the graph's inputs for rows of raw columns.

    Each is an object array of strings, int64 or float64: [N], or [N, longest list] padded with
    missing values, lists on the right, sequences on the left. Nulls become missing values.
    """
    return {feature.name: column_to_input(feature, table[feature.name]) for feature in features}


def column_to_input(feature: Feature, column: pa.ChunkedArray) -> NDArray[Any]:
    """Return one raw column as the graph's input; see `rows_to_inputs`."""
    if not feature.is_list:
        return flat_to_input(column)
    array = one_chunk(column)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    flat = flat_to_input(array.flatten())
    return padded(flat, lengths, FILL[array.type.value_type], left=feature.kind == "sequence")


def flat_to_input(values: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """Return scalars as the graph's input, missing values in place of nulls."""
    filled = pc.fill_null(values, FILL[values.type])
    array: NDArray[Any] = (
        filled.to_numpy()
        if isinstance(filled, pa.ChunkedArray)
        else filled.to_numpy(zero_copy_only=False)
    )
    return array


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array."""
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def padded(
    flat: NDArray[Any], lengths: NDArray[Any], fill: Any, *, left: bool, width: int | None = None
) -> NDArray[Any]:
    """Return ragged rows, given flat with their lengths [N], as a matrix [N, width].

    width: the longest row's length unless given, which no row may exceed; left: pad on the left.
    """
    longest = int(lengths.max(initial=0)) if width is None else width
    out = np.full((len(lengths), longest), fill, dtype=flat.dtype)
    columns = np.arange(longest)
    if left:
        out[columns >= longest - lengths[:, None]] = flat
    else:
        out[columns < lengths[:, None]] = flat
    return out
