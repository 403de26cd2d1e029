"""Which rank reads which rows when: pure functions of (seed, epoch, world size).

The row groups of a split, permuted anew in each epoch, form one long sequence. It is cut into one
contiguous part per rank, equal to within one row, so a row group may be divided between two ranks.
A rank groups its part into windows of some row groups, shuffles the rows of a window, and cuts
batches across windows. How far an epoch has come is told by a few `Progress` entries; from them the
rest of the epoch can be dealt out anew to any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Progress:
    """A stretch of an epoch: `steps` steps of `world_size` ranks with `batch_size` rows each."""

    world_size: int
    batch_size: int
    steps: int


@dataclass(frozen=True)
class Fragment:
    """Rows of one row group: positions [start, stop) of it, or of `chosen`, if that is given.

    group: index of the row group; chosen: ascending int64 row positions within it.
    """

    group: int
    start: int
    stop: int
    chosen: Array | None = None

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return self.stop - self.start

    def positions(self) -> Array:
        """Return the row positions within the row group, int64 [rows]."""
        if self.chosen is None:
            return np.arange(self.start, self.stop)
        return self.chosen[self.start : self.stop]


Window = tuple[Fragment, ...]


@dataclass(frozen=True)
class Plan:
    """What one rank reads in (the rest of) an epoch.

    windows: in order; first: number of the first window, for its shuffle; skip: rows of the first
    window's shuffled order that were delivered before; rows: that are left to deliver; steps: that
    are left, the same on all ranks.
    """

    windows: tuple[Window, ...]
    first: int
    skip: int
    rows: int
    steps: int
    key: tuple[int, ...]

    def order(self, number: int) -> Array:
        """Return in which order the rows of window `number` (counted from 0 here) are delivered."""
        rows = sum(fragment.rows for fragment in self.windows[number])
        return window_order(self.key, self.first + number, rows)


def plan_epoch(
    group_rows: Sequence[int],
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    window_rows: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    past: Sequence[Progress] = (),
) -> Plan:
    """Return what a rank reads in an epoch, after what the epoch's past has delivered.

    group_rows: rows of every row group, in the canonical order. With the world and batch size of the
    last entry of `past` this continues its sequence of batches exactly; with others the remaining
    rows are dealt out anew.
    """
    settled, done = _settled(past, world_size, batch_size)
    left = _initial(group_rows)
    for generation, progress in enumerate(settled):
        key = _key(seed, epoch, generation, progress.world_size, shuffle)
        left = [
            fragment
            for part_rank, part in enumerate(_deal(left, progress.world_size, key))
            for fragment in _undelivered(
                part, progress.steps * progress.batch_size, window_rows, (*key, part_rank)
            )
        ]
    key = _key(seed, epoch, len(settled), world_size, shuffle)
    total = sum(fragment.rows for fragment in left)
    part = _deal(left, world_size, key)[rank]
    windows = _windows(part, window_rows)
    delivered = min(done * batch_size, sum(fragment.rows for fragment in part))
    first, skip = _locate(windows, delivered)
    return Plan(
        windows=tuple(windows[first:]),
        first=first,
        skip=skip,
        rows=sum(fragment.rows for fragment in part) - delivered,
        steps=max(0, -(-_largest_part(total, world_size) // batch_size) - done),
        key=(*key, rank) if key else (),
    )


def window_order(key: tuple[int, ...], window: int, rows: int) -> Array:
    """Return the permutation int64 [rows] of a window; the identity for the empty key."""
    if not key:
        return np.arange(rows)
    return np.random.default_rng((*key, window)).permutation(rows)


def _settled(
    past: Sequence[Progress], world_size: int, batch_size: int
) -> tuple[list[Progress], int]:
    """Merge neighbours of one shape; take off the last, if its shape goes on, as steps done."""
    merged: list[Progress] = []
    for progress in past:
        last = merged[-1] if merged else None
        if last and (last.world_size, last.batch_size) == (
            progress.world_size,
            progress.batch_size,
        ):
            steps = last.steps + progress.steps
            merged[-1] = Progress(last.world_size, last.batch_size, steps)
        elif progress.steps:
            merged.append(progress)
    if merged and (merged[-1].world_size, merged[-1].batch_size) == (world_size, batch_size):
        return merged[:-1], merged[-1].steps
    return merged, 0


def _key(seed: int, epoch: int, generation: int, world_size: int, shuffle: bool) -> tuple[int, ...]:
    return (seed, epoch, generation, world_size) if shuffle else ()


def _initial(group_rows: Sequence[int]) -> list[Fragment]:
    return [Fragment(group, 0, rows) for group, rows in enumerate(group_rows) if rows]


def _largest_part(total: int, world_size: int) -> int:
    return -(-total // world_size)


def _deal(fragments: list[Fragment], world_size: int, key: tuple[int, ...]) -> list[list[Fragment]]:
    """Permute fragments and cut their sequence into equal contiguous parts, one per rank."""
    if key:
        # The rank is not part of this key: all ranks must come to the same order.
        order = np.random.default_rng((*key, 2**32 - 1)).permutation(len(fragments))
        fragments = [fragments[i] for i in order]
    total = sum(fragment.rows for fragment in fragments)
    bounds = [-(-total * rank // world_size) for rank in range(world_size + 1)]
    parts: list[list[Fragment]] = [[] for _ in range(world_size)]
    rank, position = 0, 0
    for fragment in fragments:
        start = fragment.start
        while start < fragment.stop:
            while position >= bounds[rank + 1]:
                rank += 1
            stop = min(fragment.stop, start + bounds[rank + 1] - position)
            parts[rank].append(Fragment(fragment.group, start, stop, fragment.chosen))
            position += stop - start
            start = stop
    return parts


def _windows(part: list[Fragment], window_rows: int) -> list[Window]:
    """Group a part into windows of at least `window_rows` rows; the last one may have fewer."""
    windows: list[Window] = []
    current: list[Fragment] = []
    rows = 0
    for fragment in part:
        current.append(fragment)
        rows += fragment.rows
        if rows >= window_rows:
            windows.append(tuple(current))
            current, rows = [], 0
    if current:
        windows.append(tuple(current))
    return windows


def _locate(windows: list[Window], delivered: int) -> tuple[int, int]:
    """Return the first window that is not wholly delivered, and how many of its rows are."""
    for number, window in enumerate(windows):
        rows = sum(fragment.rows for fragment in window)
        if delivered < rows:
            return number, delivered
        delivered -= rows
    return len(windows), 0


def _undelivered(
    part: list[Fragment], delivered: int, window_rows: int, key: tuple[int, ...]
) -> list[Fragment]:
    """Return what is left of a rank's part after its first `delivered` rows."""
    windows = _windows(part, window_rows)
    first, skip = _locate(windows, delivered)
    if first == len(windows):
        return []
    if skip == 0:
        return [fragment for window in windows[first:] for fragment in window]
    window = windows[first]
    shuffled = key if len(key) > 1 else ()
    order = window_order(shuffled, first, sum(fragment.rows for fragment in window))
    left = np.sort(order[skip:])
    rest: list[Fragment] = []
    offset = 0
    for fragment in window:
        inside = left[(left >= offset) & (left < offset + fragment.rows)] - offset
        offset += fragment.rows
        if len(inside):
            rest.append(Fragment(fragment.group, 0, len(inside), fragment.positions()[inside]))
    return [*rest, *(fragment for window in windows[first + 1 :] for fragment in window)]
