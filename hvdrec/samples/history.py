"""What a user did beside a sample, as slices of one sorted array per history."""

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

    items: item keys, or values of another column [n]; key: int64 [n], ascending; row: int64 [n],
    the row that each stands for; same: int64 [n], the next event of the same user and item, or n.
    It is None where repeated items stay.
    """

    items: pa.Array
    key: Array
    row: Array
    same: Array | None = None

    @staticmethod
    def of(
        items: pa.Array, moments: Moments, chosen: Array, item_code: Array | None = None
    ) -> Events:
        """Sort the chosen rows' items; those of one time keep their order.

        chosen: bool [n]; item_code: int64 [n], to keep of a user's events with one item (or value)
        only the latest in each list.
        """
        rows = np.flatnonzero(chosen)
        order = rows[np.argsort(moments.key[rows], kind="stable")]
        same = None
        if item_code is not None:
            pair = moments.user[order] * (item_code.max(initial=0) + 1) + item_code[order]
            same = _next_of_same(pair)
        return Events(items.take(pa.array(order)), moments.key[order], order, same)

    def before(self, moments: Moments, rows: Array, length: int) -> pa.Array:
        """Return lists of the last `length` events strictly before each row, oldest first."""
        return self._last(moments.key[rows], moments.user[rows] * moments.times, length)

    def latest(self, users: int, times: int, length: int) -> pa.Array:
        """Return lists of the last `length` events of each of the users 0 … `users` - 1."""
        start = np.arange(users) * times
        return self._last(start + times, start, length)

    def others(self, moments: Moments, rows: Array, length: int) -> pa.Array:
        """Return lists of the `length` events nearest to each row in their order by time, half of
        them before it where there are enough, without the row itself, oldest first."""
        start = moments.user[rows] * moments.times
        first, end = (
            np.searchsorted(self.key, start),
            np.searchsorted(self.key, start + moments.times),
        )
        own = np.full(len(moments.key), -1, dtype=np.int64)
        own[self.row] = np.arange(len(self.row))
        own = own[rows]
        place = np.where(own >= 0, own, np.searchsorted(self.key, moments.key[rows]))
        wanted = length + (own >= 0)
        low = np.clip(place - length // 2, first, np.maximum(first, end - wanted))
        lengths = np.minimum(end - low, wanted)
        positions = _ranges(low, lengths)
        kept = positions != np.repeat(own, lengths)
        return list_array(lengths - (own >= 0), self.items.take(pa.array(positions[kept])))

    def _last(self, key: Array, start: Array, length: int) -> pa.Array:
        """Return the last `length` events of those with start <= their key < key."""
        stop = np.searchsorted(self.key, key)
        first = np.searchsorted(self.key, start)
        if self.same is not None:
            return self._last_distinct(first, stop, length)
        first = np.maximum(first, stop - length)
        lengths = stop - first
        return list_array(lengths, self.items.take(pa.array(_ranges(first, lengths))))

    def _last_distinct(self, first: Array, stop: Array, length: int) -> pa.Array:
        """Return the last `length` events of [first, stop), each item at its latest time only."""
        assert self.same is not None
        # Rows of one user and time have one list: it is made once.
        empty = first >= stop
        stops, which = np.unique(np.where(empty, -1, stop), return_inverse=True)
        firsts = np.zeros_like(stops)
        firsts[which] = np.where(empty, -1, first)
        lengths = stops - firsts
        positions = _ranges(firsts, lengths)
        latest = self.same[positions] >= np.repeat(stops, lengths)
        lists = np.repeat(np.arange(len(stops)), lengths)[latest]
        counts = np.bincount(lists, minlength=len(stops))
        kept = np.minimum(counts, length)
        ends = np.cumsum(counts)
        positions = positions[latest][_ranges(ends - kept, kept)]
        taken = _ranges((np.cumsum(kept) - kept)[which], kept[which])
        return list_array(kept[which], self.items.take(pa.array(positions[taken])))


def _ranges(first: Array, lengths: Array) -> Array:
    """Return first[i], first[i] + 1, … of each length, one behind the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.asarray(np.arange(total) + np.repeat(first - (ends - lengths), lengths))


def _next_of_same(pair: Array) -> Array:
    """Return for each entry the place of the next equal one, or their number."""
    following = np.full(len(pair), len(pair), dtype=np.int64)
    order = np.argsort(pair, kind="stable")
    again = pair[order[1:]] == pair[order[:-1]]
    following[order[:-1][again]] = order[1:][again]
    return following
