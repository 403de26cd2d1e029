"""Histories: for each sample, the list of items that its user acted on before.

An event is a row of the log that counts for a history. Events are numbered from 0 in the order of
the sorted rows, which is by user, then time. Each list is a range of events. The entries of all
events are in a file of codes, which is mapped into memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
GATHERED = 524_288
"""Number of events that are examined at a time, to bound memory."""
WIDER = 4
"""Factor by which the range of a list without repeats grows until the list is full."""


@dataclass(frozen=True)
class Events:
    """The e events of a history, sorted by user and time.

    Attributes:
        code: Code of the entry that each event adds to a list, int32 [e].
        starts: Number of the first event of each user, followed by e, int64 [users + 1].
        same: Number of the next event with the same user and code, int64 [e]; e if there is none.
            None if a list may contain an entry more than once.
        time: Time of each event [e], if lists leave out old events (`within`); otherwise None.
    """

    code: Array
    starts: Array
    same: Array | None = None
    time: Array | None = None

    def last(self, first: Array, stop: Array, length: int) -> tuple[Array, Array]:
        """Return the last `length` events of n ranges from first[i] to stop[i] - 1, oldest first.

        Returns:
            The length of each list, int64 [n], and the codes of all lists, int32.
        """
        if self.same is not None:
            return self._last_distinct(self.same, first, stop, length)
        first = np.maximum(first, stop - length)
        lengths = np.maximum(stop - first, 0)
        return lengths, self._gather(first, lengths)

    def others(self, user: Array, position: Array, own: Array, length: int) -> tuple[Array, Array]:
        """Return, for each row, the `length` other events of its user that are closest to the row.

        Distance is counted in the sorted list of the user's events: half of the returned events
        come before the row and half after it, if there are enough on both sides. The row itself is
        left out.

        Args:
            user: User code of each row, int64 [n].
            position: Number of the row's own event; if it has none, the number of the first event
                that is not before the row, int64 [n].
            own: True if the row has an event, bool [n].
            length: Largest length of a list.

        Returns:
            The length of each list, int64 [n], and the codes of all lists, int32.
        """
        first, end = self.starts[user], self.starts[user + 1]
        wanted = length + own
        low = np.clip(position - length // 2, first, np.maximum(first, end - wanted))
        lengths = np.minimum(end - low, wanted)
        positions = _ranges(low, lengths)
        kept = positions != np.repeat(np.where(own, position, -1), lengths)
        return lengths - own, self.code[positions[kept]]

    def _gather(self, first: Array, lengths: Array) -> Array:
        """Return the codes of the ranges from first[i] to first[i] + lengths[i] - 1, for all i."""
        codes = np.empty(int(lengths.sum()), dtype=np.int32)
        done = 0
        for part in _parts(lengths):
            positions = _ranges(first[part], lengths[part])
            np.take(self.code, positions, out=codes[done : done + len(positions)], mode="clip")
            done += len(positions)
        return codes

    def since(self, first: Array, stop: Array, oldest: Array) -> Array:
        """Return the number of the first event in each range whose time is at least oldest[i]."""
        assert self.time is not None
        return first_since(self.time, first, stop, oldest)

    def _last_distinct(
        self, same: Array, first: Array, stop: Array, length: int
    ) -> tuple[Array, Array]:
        """Return the last `length` different entries of each range, each at its last event."""
        lists, chosen = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        width, left = 2 * length, np.arange(len(stop))
        while len(left):
            low = np.maximum(first[left], stop[left] - width)
            full = np.zeros(len(left), dtype=bool)
            for part in _parts(np.maximum(stop[left] - low, 0)):
                which, end = left[part], stop[left[part]]
                lengths = np.maximum(end - low[part], 0)
                positions = _ranges(low[part], lengths)
                latest = same[positions] >= np.repeat(end, lengths)
                listed = np.repeat(np.arange(len(which)), lengths)[latest]
                counts = np.bincount(listed, minlength=len(which))
                full[part] = (counts >= length) | (low[part] <= first[which])
                kept = np.where(full[part], np.minimum(counts, length), 0)
                ends = np.cumsum(counts)
                chosen.append(positions[latest][_ranges(ends - kept, kept)])
                lists.append(np.repeat(which, kept))
            left, width = left[~full], width * WIDER
        number, positions = np.concatenate(lists), np.concatenate(chosen)
        order = np.argsort(number, kind="stable")
        return np.bincount(number, minlength=len(stop)), self.code[positions[order]]


@dataclass
class Positions:
    """Numbers the events among rows that arrive in batches, sorted by user and time."""

    count: int = 0
    _row: tuple[Any, Any] | None = None
    _start: int = 0
    _stop: int = 0

    def advance(self, user: Array, time: Array, chosen: Array) -> tuple[Array, Array, Array]:
        """Read the next n rows.

        Args:
            user: User code of each row, int64 [n].
            time: Time of each row [n].
            chosen: True for each row that is an event, bool [n].

        Returns:
            Three arrays, int64 [n], with one entry per row: the number of the first event of its
            user; the number of the user's first event that is not before the row's time; the
            number that the row's own event has, or would have if the row were an event.
        """
        number = self.count + np.cumsum(chosen) - chosen
        same_user, same_time = np.ones((2, len(user)), dtype=bool)
        same_user[1:] = user[1:] == user[:-1]
        same_user[0] = self._row is not None and self._row[0] == user[0]
        same_time[1:] = time[1:] == time[:-1]
        same_time[0] = self._row is not None and self._row[1] == time[0]
        start = _at_last_change(same_user, number, self._start)
        stop = _at_last_change(same_user & same_time, number, self._stop)
        self.count += int(chosen.sum())
        self._row, self._start, self._stop = (user[-1], time[-1]), int(start[-1]), int(stop[-1])
        return start, stop, number


@dataclass
class EventFile:
    """Writes the events of a history to files, then reads them.

    Attributes:
        path: Path of the files, without suffix.
        rows: Number of events of each user, int64 [users].
        dtype: Type of the times; None if lists do not leave out old events.
    """

    path: Path
    rows: Array
    dtype: Any = None
    _count: int = field(default=0)

    def append(self, user: Array, code: Array, time: Array) -> None:
        """Append m events with their users, int64 [m], codes [m] and times [m]."""
        with self.path.with_suffix(".code").open("ab") as file:
            file.write(np.ascontiguousarray(code, dtype=np.int32).data)
        if self.dtype is not None:
            with self.path.with_suffix(".time").open("ab") as file:
                file.write(np.ascontiguousarray(time, dtype=self.dtype).data)
        np.add.at(self.rows, user, 1)
        self._count += len(code)

    def times(self) -> Array:
        """Return the times of the events so far."""
        return _mapped(self.path.with_suffix(".time"), self.dtype, self._count)

    def read(self, *, distinct: bool) -> Events:
        """Return all events; `distinct` prepares lists without repeats."""
        starts = np.concatenate([[0], np.cumsum(self.rows)])
        code = _mapped(self.path.with_suffix(".code"), np.int32, self._count)
        time = None if self.dtype is None else self.times()
        same = None
        if distinct:
            file = self.path.with_suffix(".same")
            with file.open("wb") as opened:
                for part in _user_blocks(starts):
                    opened.write(_next_equal(code, starts, part).data)
            same = _mapped(file, np.int64, self._count)
        return Events(code, starts, same, time)


def first_since(time: Array, first: Array, stop: Array, oldest: Array) -> Array:
    """Return, for n ranges of ascending times, the first index with time >= oldest[i], int64 [n].

    If there is none, it is stop[i].
    """
    low, high = first.copy(), np.maximum(first, stop)
    while (is_open := low < high).any():
        middle = (low + high) // 2
        later = np.zeros(len(low), dtype=bool)
        later[is_open] = time[middle[is_open]] >= oldest[is_open]
        high = np.where(is_open & later, middle, high)
        low = np.where(is_open & ~later, middle + 1, low)
    return low


def _at_last_change(same: Array, values: Array, before: int) -> Array:
    """Return, for each of n rows, the value at the latest row up to this one that is not `same`.

    If there is no such row, it is `before`.
    """
    index = np.maximum.accumulate(np.where(same, -1, np.arange(len(same))))
    return np.where(index < 0, before, values[index])


def _ranges(first: Array, lengths: Array) -> Array:
    """Concatenate the ranges from first[i] to first[i] + lengths[i] - 1, for all i."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.asarray(np.arange(total) + np.repeat(first - (ends - lengths), lengths))


def _parts(lengths: Array) -> Iterator[slice]:
    """Divide lists into consecutive parts of about `GATHERED` entries."""
    run = np.cumsum(lengths) // GATHERED
    edges = [0, *(np.flatnonzero(np.diff(run)) + 1), len(lengths)]
    yield from (slice(a, b) for a, b in itertools.pairwise(edges) if a < b)


def _user_blocks(starts: Array) -> Iterator[slice]:
    """Divide users into consecutive blocks with about `GATHERED` events."""
    yield from _parts(np.diff(starts))


def _next_equal(code: Array, starts: Array, users: slice) -> Array:
    """Return the number of the next event with the same user and code, for a block of users."""
    low, high = int(starts[users.start]), int(starts[users.stop])
    counts = np.diff(starts[users.start : users.stop + 1])
    user = np.repeat(np.arange(len(counts)), counts)
    values = user * (int(code[low:high].max(initial=0)) + 1) + code[low:high]
    following = np.full(high - low, len(code), dtype=np.int64)
    order = np.argsort(values, kind="stable")
    is_equal = values[order[1:]] == values[order[:-1]]
    following[order[:-1][is_equal]] = low + order[1:][is_equal]
    return following


def _mapped(file: Path, dtype: Any, count: int) -> Array:
    """Map a file of numbers into memory."""
    if not count:
        return np.zeros(0, dtype=dtype)
    return np.asarray(np.memmap(file, dtype=dtype, mode="r", shape=(count,)))
