"""Encoded columns of shards as arrays, one by one or side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvdrec.config.schema import KEY_COLUMNS, MISSING, Feature

Array = NDArray[Any]
Columns = dict[str, Array]
"""By name: [rows], or [rows, max_length] of a list."""
Blocks = dict[tuple[str, ...], Array]
"""Columns of one type side by side, by their names: a row is gathered from all of them at once."""
CodeType = type[np.int32] | type[np.int64]
ROW_KEYS, LABELS = KEY_COLUMNS[:2], KEY_COLUMNS[2:]


@dataclass(frozen=True)
class Layout:
    """Which columns of rows lie side by side.

    kinds: the type of each block; lists: name -> max_length of columns that are a block by
    themselves.
    """

    kinds: Mapping[tuple[str, ...], type[np.generic]]
    lists: Mapping[str, int]

    @classmethod
    def of(cls, features: Sequence[Feature], tasks: Sequence[str]) -> Layout:
        """Lay out features, the keys of rows, their labels, and those of tasks; codes are int32."""
        single = [f for f in features if not f.is_list]
        kinds: dict[tuple[str, ...], type[np.generic]] = {
            **{(f.name,): _kind(f, np.int32) for f in features if f.is_list},
            tuple(f.name for f in single if f.is_embedded): np.int32,
            tuple(f.name for f in single if not f.is_embedded): np.float32,
            ROW_KEYS: np.int64,
            (*LABELS, *tasks): np.float32,
        }
        kinds.pop((), None)  # no block without columns
        return cls(kinds, {f.name: f.max_length for f in features if f.is_list})

    def allocated(self, rows: int) -> Blocks:
        """Return blocks of so many rows, not yet filled."""
        return {
            names: np.empty((rows, self.lists.get(names[0], len(names))), kind)
            for names, kind in self.kinds.items()
        }

    def columns(self, blocks: Blocks) -> Columns:
        """Return views of the columns of blocks."""
        found: Columns = {}
        for names, block in blocks.items():
            if names[0] in self.lists:
                found[names[0]] = block
            else:
                found.update(zip(names, block.T, strict=True))
        return found


def table_arrays(
    table: pa.Table, features: Sequence[Feature], code_type: CodeType = np.int64
) -> Columns:
    """Return a table's encoded columns as arrays: codes [N] or [N, max_length], or float32 [N].

    Lists are padded with 0 on the right, sequences on the left; of a longer list the first, of a
    longer sequence the last max_length codes stay.
    """
    rows = table.num_rows
    columns: Columns = {
        feature.name: np.empty(
            (rows, feature.max_length) if feature.is_list else rows, _kind(feature, code_type)
        )
        for feature in features
    }
    fill(columns, table, features)
    return columns


def _kind(feature: Feature, code_type: CodeType) -> type[np.generic]:
    return code_type if feature.is_embedded else np.float32


def fill(columns: Mapping[str, Array], table: pa.Table, features: Sequence[Feature]) -> None:
    """Write a table's columns into arrays of as many rows."""
    sequences = {feature.name for feature in features if feature.kind == "sequence"}
    for name, column in columns.items():
        start = 0
        for chunk in table[name].chunks:
            stop = start + len(chunk)
            if column.ndim == 1:
                column[start:stop] = chunk.to_numpy()
            else:
                _pad(column[start:stop], chunk, at_end=name in sequences)
            start = stop


def _pad(out: Array, lists: pa.ListArray, *, at_end: bool) -> None:
    """Write lists into the rows of `out` [N, width], at their start or their end, zeros around."""
    width = out.shape[1]
    offsets = lists.offsets.to_numpy()
    values = lists.values.to_numpy()
    lengths = np.diff(offsets)
    if lengths.max(initial=0) > width:
        lengths = np.minimum(lengths, width)
        starts = offsets[1:] - lengths if at_end else offsets[:-1]
        before = np.cumsum(lengths) - lengths
        values = values[np.repeat(starts - before, lengths) + np.arange(lengths.sum())]
    else:
        values = values[offsets[0] : offsets[-1]]
    places = np.arange(width, dtype=np.int32)
    # A mask meets the values in the order in which they lie.
    taken = places >= (width - lengths)[:, None] if at_end else places < lengths[:, None]
    out[...] = MISSING
    out[taken] = values
