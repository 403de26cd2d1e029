"""What a user did strictly before a sample, as slices of one sorted array per history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvdrec.samples.columns import list_array

Array = NDArray[Any]


@dataclass(frozen=True)
class Moments:
    """Users and times as numbers: key = user * times + the time's rank among the `times` different
    ones, so that keys sort by user, then time, and are equal for equal times.

    user: int64 codes [n]; key: int64 [n].
    """

    user: Array
    key: Array
    times: int

    @staticmethod
    def of(user: Array, time: Array) -> Moments:
        """Number rows. user: int64 codes [n]; time: sortable values [n]."""
        distinct, rank = np.unique(time, return_inverse=True)
        return Moments(user, user * len(distinct) + rank, len(distinct))


@dataclass(frozen=True)
class Events:
    """The events that a history is made of, by user and time.

    items: item keys [n]; key: int64 [n], ascending.
    """

    items: pa.Array
    key: Array

    @staticmethod
    def of(items: pa.Array, moments: Moments, chosen: Array) -> Events:
        """Sort the chosen rows' items; those of one time keep their order. chosen: bool [n]."""
        rows = np.flatnonzero(chosen)
        order = rows[np.argsort(moments.key[rows], kind="stable")]
        return Events(items.take(pa.array(order)), moments.key[order])

    def before(self, moments: Moments, rows: Array, length: int) -> pa.Array:
        """Return lists of the last `length` events strictly before each row, oldest first."""
        return self._last(moments.key[rows], moments.user[rows] * moments.times, length)

    def latest(self, users: int, times: int, length: int) -> pa.Array:
        """Return lists of the last `length` events of each of the users 0 … `users` - 1."""
        start = np.arange(users) * times
        return self._last(start + times, start, length)

    def _last(self, key: Array, start: Array, length: int) -> pa.Array:
        """Return the last `length` events of those with start <= their key < key."""
        stop = np.searchsorted(self.key, key)
        first = np.maximum(np.searchsorted(self.key, start), stop - length)
        lengths = stop - first
        ends = np.cumsum(lengths)
        positions = np.arange(lengths.sum()) + np.repeat(first - (ends - lengths), lengths)
        return list_array(lengths, self.items.take(pa.array(positions)))
