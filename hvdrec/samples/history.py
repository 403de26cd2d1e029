"""Histories: for each sample, the list of items that its user acted on before.

An event is a row of the log that counts for a history. All events of a history are in one array,
sorted by user and time. Each list is a slice of it.
"""

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
    """User and time of each of n rows, combined into one number that sorts by user, then time.

    Attributes:
        user: User codes, int64 [n].
        key: user * times + rank of the row's time among all distinct times, int64 [n].
        times: Number of distinct times.
    """

    user: Array
    key: Array
    times: int

    @staticmethod
    def of(user: Array, time: Array) -> UserTimes:
        """Combine user codes, int64 [n], and times [n], which may be any numbers."""
        distinct, rank = np.unique(time, return_inverse=True)
        return UserTimes(user, user * len(distinct) + rank, len(distinct))


@dataclass(frozen=True)
class EventLog:
    """The e events of a history, sorted by user and time.

    Attributes:
        items: Entry that each event adds to a list: the item's key or another column's value [e].
        key: `UserTimes.key` of each event, int64 [e], ascending.
        row: Number of the row that each event comes from, int64 [e].
        same: Index of the next event with the same user and item, int64 [e]; e if there is none.
            None if a list may contain an item more than once.
    """

    items: pa.Array
    key: Array
    row: Array
    same: Array | None = None

    @staticmethod
    def of(
        items: pa.Array, times: UserTimes, chosen: Array, item_code: Array | None = None
    ) -> EventLog:
        """Collect the events among n rows and sort them.

        Args:
            items: Entry that each row adds to a list [n].
            times: Users and times of the rows.
            chosen: True for each row that is an event, bool [n].
            item_code: Number of each row's item, int64 [n], if a list may contain an item only
                once, at its latest event; otherwise None.
        """
        rows = np.flatnonzero(chosen)
        order = rows[np.argsort(times.key[rows], kind="stable")]
        same = None
        if item_code is not None:
            pair = times.user[order] * (item_code.max(initial=0) + 1) + item_code[order]
            same = _next_equal(pair)
        return EventLog(items.take(pa.array(order)), times.key[order], order, same)

    def before(self, times: UserTimes, rows: Array, length: int) -> pa.Array:
        """Return, for each of `rows`, the user's last `length` events before it, oldest first.

        Only events at an earlier time count.
        """
        return self._last(times.key[rows], times.user[rows] * times.times, length)

    def latest(self, users: int, times: int, length: int) -> pa.Array:
        """Return the last `length` events of each user, oldest first.

        `users` is the number of users, `times` the number of distinct times.
        """
        start = np.arange(users) * times
        return self._last(start + times, start, length)

    def others(self, times: UserTimes, rows: Array, length: int) -> pa.Array:
        """Return, for each of `rows`, `length` other events of its user that are closest to it.

        Distance is counted in the sorted list of the user's events: half of the returned events
        come before the row and half after it, if there are enough on both sides. The row itself is
        left out.
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
        """Return the last `length` events with start[i] <= event key < key[i], for each i."""
        stop = np.searchsorted(self.key, key)
        first = np.searchsorted(self.key, start)
        if self.same is not None:
            return self._last_distinct(self.same, first, stop, length)
        first = np.maximum(first, stop - length)
        lengths = stop - first
        return list_array(lengths, self.items.take(pa.array(_ranges(first, lengths))))

    def _last_distinct(self, same: Array, first: Array, stop: Array, length: int) -> pa.Array:
        """Return the last `length` events in each [first, stop); of each item only the last."""
        # Rows with the same user and time have the same list, so build it once.
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
    """Concatenate the ranges from first[i] to first[i] + lengths[i] - 1, for all i."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.asarray(np.arange(total) + np.repeat(first - (ends - lengths), lengths))


def _next_equal(values: Array) -> Array:
    """Return, for each of n values, the index of the next equal value; n if there is none."""
    following = np.full(len(values), len(values), dtype=np.int64)
    order = np.argsort(values, kind="stable")
    is_equal = values[order[1:]] == values[order[:-1]]
    following[order[:-1][is_equal]] = order[1:][is_equal]
    return following
