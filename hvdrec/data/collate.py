"""Convert encoded Parquet columns to NumPy arrays, or to blocks: one matrix for each dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvdrec.config.schema import MISSING, Feature, Schema

Array = NDArray[Any]
Columns = dict[str, Array]
"""Column name -> array [rows], or [rows, max_length] for a list."""
Blocks = dict[tuple[str, ...], Array]
"""Names of some columns of one dtype -> matrix [rows, columns]. One indexing operation takes rows
of all these columns."""
CodeType = type[np.int32] | type[np.int64]


@dataclass(frozen=True)
class BlockLayout:
    """The assignment of columns to blocks. A block is a matrix of one dtype.

    Attributes:
        dtypes: Names of the columns of each block -> dtype of the block.
        lists: Name of each list column -> its maximum length; such a column has its own block.
    """

    dtypes: Mapping[tuple[str, ...], type[np.generic]]
    lists: Mapping[str, int]

    @classmethod
    def of(cls, schema: Schema, tasks: Sequence[str]) -> BlockLayout:
        """Lay out the columns of features (codes as int32), user and item numbers, and labels."""
        features, rows = schema.features, schema.row_columns
        scalars = [f for f in features if not f.is_list]
        dtypes: dict[tuple[str, ...], type[np.generic]] = {
            **{(f.name,): _dtype(f, np.int32) for f in features if f.is_list},
            tuple(f.name for f in scalars if f.is_embedded): np.int32,
            tuple(f.name for f in scalars if not f.is_embedded): np.float32,
            rows[:2]: np.int64,
            (*rows[2:], *tasks): np.float32,
        }
        dtypes.pop((), None)  # remove a block that has no columns
        return cls(dtypes, {f.name: f.max_length for f in features if f.is_list})

    def allocate(self, rows: int) -> Blocks:
        """Return uninitialized blocks of `rows` rows."""
        return {
            names: np.empty((rows, self.lists.get(names[0], len(names))), dtype)
            for names, dtype in self.dtypes.items()
        }

    def columns(self, blocks: Blocks) -> Columns:
        """Return the columns of the blocks as views, without a copy."""
        columns: Columns = {}
        for names, block in blocks.items():
            if names[0] in self.lists:
                columns[names[0]] = block
            else:
                columns.update(zip(names, block.T, strict=True))
        return columns


def table_arrays(
    table: pa.Table, features: Sequence[Feature], code_type: CodeType = np.int64
) -> Columns:
    """Convert the encoded feature columns of a table with n rows to arrays.

    Lists are cut to their first max_length codes and padded with 0 on the right. Sequences (lists
    in time order) are cut to their last max_length codes and padded on the left.

    Returns:
        Feature name -> codes [n] or [n, max_length] of dtype `code_type`, or numbers, float32 [n].
    """
    rows = table.num_rows
    columns: Columns = {
        feature.name: np.empty(
            (rows, feature.max_length) if feature.is_list else rows, _dtype(feature, code_type)
        )
        for feature in features
    }
    fill(columns, table, features)
    return columns


def _dtype(feature: Feature, code_type: CodeType) -> type[np.generic]:
    return code_type if feature.is_embedded else np.float32


def fill(columns: Mapping[str, Array], table: pa.Table, features: Sequence[Feature]) -> None:
    """Write a table's columns into arrays of as many rows; cut and pad as `table_arrays` does."""
    sequences = {feature.name for feature in features if feature.is_sequence}
    for name, column in columns.items():
        start = 0
        for chunk in table[name].chunks:
            stop = start + len(chunk)
            if column.ndim == 1:
                column[start:stop] = chunk.to_numpy()
            else:
                _pad(column[start:stop], chunk, left=name in sequences)
            start = stop


def _pad(out: Array, lists: pa.ListArray, *, left: bool) -> None:
    """Write lists into the rows of `out`, [lists, width], with zeros on the left or the right."""
    width = out.shape[1]
    offsets = lists.offsets.to_numpy()
    values = lists.values.to_numpy()
    lengths = np.diff(offsets)
    if lengths.max(initial=0) > width:
        lengths = np.minimum(lengths, width)
        starts = offsets[1:] - lengths if left else offsets[:-1]
        before = np.cumsum(lengths) - lengths
        values = values[np.repeat(starts - before, lengths) + np.arange(lengths.sum())]
    else:
        values = values[offsets[0] : offsets[-1]]
    columns = np.arange(width, dtype=np.int32)
    is_value = columns >= (width - lengths)[:, None] if left else columns < lengths[:, None]
    out[...] = MISSING
    # Assignment by a mask fills `out` row by row; `values` has the same order.
    out[is_value] = values
