"""Event histories of users: lists cut from one sorted array of events per history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvdrec.samples.columns import list_array

Array = NDArray[Any]


@dataclass(frozen=True)
class UserTimes:
    """User and time of each of n rows, combined into one sortable key.

    Attributes:
        user: User codes, int64 [n].
        key: user * times + rank of the time among all distinct times, int64 [n]. It sorts by user,
            then time, and is equal for equal times.
        times: Number of distinct times.
    """

    user: Array
    key: Array
    times: int

    @staticmethod
    def of(user: Array, time: Array) -> UserTimes:
        """Build the keys of user codes int64 [n] and sortable times [n]."""
        distinct, rank = np.unique(time, return_inverse=True)
        return UserTimes(user, user * len(distinct) + rank, len(distinct))


@dataclass(frozen=True)
class EventLog:
    """The e events of a history, sorted by user and time.

    Attributes:
        items: Item keys, or values of another column, [e].
        key: Keys of `UserTimes`, int64 [e], ascending.
        row: Row number of each event, int64 [e].
        same: Index of the next event of the same user and item, or e if there is none, int64 [e];
            None if lists keep repeated items.
    """

    items: pa.Array
    key: Array
    row: Array
    same: Array | None = None

    @staticmethod
    def of(
        items: pa.Array, times: UserTimes, chosen: Array, item_code: Array | None = None
    ) -> EventLog:
        """Sort the events among n rows; `chosen` marks them, bool [n].

        Events of one time keep their row order. With `item_code`, int64 [n], lists keep only the
        latest event of each item.
        """
        rows = np.flatnonzero(chosen)
        order = rows[np.argsort(times.key[rows], kind="stable")]
        same = None
        if item_code is not None:
            pair = times.user[order] * (item_code.max(initial=0) + 1) + item_code[order]
            same = _next_equal(pair)
        return EventLog(items.take(pa.array(order)), times.key[order], order, same)

    def before(self, times: UserTimes, rows: Array, length: int) -> pa.Array:
        """Return the last `length` events strictly before each row, oldest first."""
        return self._last(times.key[rows], times.user[rows] * times.times, length)

    def latest(self, users: int, times: int, length: int) -> pa.Array:
        """Return the last `length` events of each user 0 ... users - 1, oldest first."""
        start = np.arange(users) * times
        return self._last(start + times, start, length)

    def others(self, times: UserTimes, rows: Array, length: int) -> pa.Array:
        """Return the `length` other events of the user nearest to each row in time order.

        Half of them precede the row where there are enough. The row itself is left out.
        """
        start = times.user[rows] * times.times
        first, end = (np.searchsorted(self.key, bound) for bound in (start, start + times.times))
        own = np.full(len(times.key), -1, dtype=np.int64)
        own[self.row] = np.arange(len(self.row))
        own = own[rows]
        position = np.where(own >= 0, own, np.searchsorted(self.key, times.key[rows]))
        wanted = length + (own >= 0)
        low = np.clip(position - length // 2, first, np.maximum(first, end - wanted))
        lengths = np.minimum(end - low, wanted)
        positions = _ranges(low, lengths)
        kept = positions != np.repeat(own, lengths)
        return list_array(lengths - (own >= 0), self.items.take(pa.array(positions[kept])))

    def _last(self, key: Array, start: Array, length: int) -> pa.Array:
        """Return the last `length` events with start <= event key < key."""
        stop = np.searchsorted(self.key, key)
        first = np.searchsorted(self.key, start)
        if self.same is not None:
            return self._last_distinct(self.same, first, stop, length)
        first = np.maximum(first, stop - length)
        lengths = stop - first
        return list_array(lengths, self.items.take(pa.array(_ranges(first, lengths))))

    def _last_distinct(self, same: Array, first: Array, stop: Array, length: int) -> pa.Array:
        """Return the last `length` events of [first, stop), each item only at its latest time."""
        # Rows of one user and time share a list, which is built once.
        empty = first >= stop
        stops, which = np.unique(np.where(empty, -1, stop), return_inverse=True)
        firsts = np.zeros_like(stops)
        firsts[which] = np.where(empty, -1, first)
        lengths = stops - firsts
        positions = _ranges(firsts, lengths)
        latest = same[positions] >= np.repeat(stops, lengths)
        lists = np.repeat(np.arange(len(stops)), lengths)[latest]
        counts = np.bincount(lists, minlength=len(stops))
        kept = np.minimum(counts, length)
        ends = np.cumsum(counts)
        positions = positions[latest][_ranges(ends - kept, kept)]
        taken = _ranges((np.cumsum(kept) - kept)[which], kept[which])
        return list_array(kept[which], self.items.take(pa.array(positions[taken])))


def _ranges(first: Array, lengths: Array) -> Array:
    """Concatenate the ranges first[i] ... first[i] + lengths[i] - 1."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.asarray(np.arange(total) + np.repeat(first - (ends - lengths), lengths))


def _next_equal(values: Array) -> Array:
    """Return the index of the next equal value of each value, or n if there is none."""
    following = np.full(len(values), len(values), dtype=np.int64)
    order = np.argsort(values, kind="stable")
    is_equal = values[order[1:]] == values[order[:-1]]
    following[order[:-1][is_equal]] = order[1:][is_equal]
    return following
