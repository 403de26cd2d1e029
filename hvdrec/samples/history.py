"""What a user did strictly before a sample, as slices of one sorted array per history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Events:
    """The events that a history is made of, sorted by user and time.

    items: Arrow array of item keys [n]; key: int64 [n], ascending, user and time rank in one.
    """

    items: pa.Array
    key: Array

    def before(self, key: Array, user_start: Array, length: int) -> tuple[Array, Array]:
        """Return, per row, [start, stop) of its last `length` events with a smaller key.

        key: int64 [rows] of the samples; user_start: int64 [rows], the smallest key of their users.
        """
        stop = np.searchsorted(self.key, key, side="left")
        first = np.searchsorted(self.key, user_start, side="left")
        return np.maximum(first, stop - length), stop


def combined_keys(user: Array, time: Array) -> tuple[Array, Array]:
    """Return keys int64 [n] that sort by user and then time, equal for equal times, and the
    smallest key of each row's user.

    user: int64 codes [n]; time: any sortable values [n].
    """
    distinct, rank = np.unique(time, return_inverse=True)
    base = user.astype(np.int64) * len(distinct)
    return base + rank, base


def sort_events(items: pa.Array, key: Array, chosen: Array) -> Events:
    """Return the chosen rows' events, sorted by key and, within one time, by row.

    chosen: bool [n].
    """
    rows = np.flatnonzero(chosen)
    order = rows[np.argsort(key[rows], kind="stable")]
    return Events(items.take(pa.array(order)), key[order])


def slices(items: pa.Array, start: Array, stop: Array) -> pa.Array:
    """Return a list array with the items of [start, stop) for each row, oldest first."""
    lengths = stop - start
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    positions = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(pa.array(offsets), items.take(pa.array(positions)))
