"""Which rank reads which rows when: pure functions of (seed, epoch, world size).

The row groups of a split, permuted anew in each epoch, form one long sequence. It is cut into one
contiguous part per rank, equal to within one row, so a row group may be divided between two ranks.
A rank groups its part into windows of some row groups, shuffles the rows of a window, and cuts
batches across windows. How far an epoch has come is told by a few `Progress` entries; from them the
rest of the epoch can be dealt out anew to any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NO_RANK = 2**32 - 1
"""Stands where a rank stands in a key, for what all ranks have in common."""


@dataclass(frozen=True)
class Progress:
    """A stretch of an epoch: `steps` steps of `world_size` ranks with `batch_size` rows each."""

    world_size: int
    batch_size: int
    steps: int


@dataclass(frozen=True, slots=True)
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

    windows: in order, without those that were delivered whole; first: number of the first of them,
    for its shuffle; skip: how many rows at the head of the first window's shuffled order were
    delivered before; rows: left to deliver; steps: left, the same on all ranks; key: what seeds the
    shuffles, empty for none.
    """

    windows: tuple[Window, ...]
    first: int
    skip: int
    rows: int
    steps: int
    key: tuple[int, ...]

    def order(self, number: int) -> Array:
        """Return in which order the rows of window `number` (counted from 0 here) are delivered."""
        return window_order(self.key, self.first + number, _rows(self.windows[number]))


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

    group_rows: rows of every row group, in the canonical order; batch_size: rows of one rank's
    batch. With the world and batch size of the last entry of `past` this continues its sequence of
    batches exactly; with others the remaining rows are dealt out anew. `past` holds for the
    window_rows, seed and shuffle it was made with: they must be the same here.
    """
    settled, done = _settled(past, world_size, batch_size)
    left = [Fragment(group, 0, rows) for group, rows in enumerate(group_rows) if rows]
    for generation, progress in enumerate(settled):
        key = _key(seed, epoch, generation, progress.world_size, shuffle)
        left = _left(left, progress, window_rows, key)
    key = _key(seed, epoch, len(settled), world_size, shuffle)
    part = _deal(left, world_size, key)[rank]
    part_rows = _rows(part)
    windows = _windows(part, window_rows)
    delivered = min(done * batch_size, part_rows)
    first, skip = _locate(windows, delivered)
    largest_part = -(-_rows(left) // world_size)
    return Plan(
        windows=tuple(windows[first:]),
        first=first,
        skip=skip,
        rows=part_rows - delivered,
        steps=max(0, -(-largest_part // batch_size) - done),
        key=_rank_key(key, rank),
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
    # numpy seeds are not negative.
    return (seed % 2**64, epoch, generation, world_size) if shuffle else ()


def _rank_key(key: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (*key, rank) if key else ()


def _rows(fragments: Sequence[Fragment]) -> int:
    return sum(fragment.stop - fragment.start for fragment in fragments)


def _deal(fragments: list[Fragment], world_size: int, key: tuple[int, ...]) -> list[list[Fragment]]:
    """Permute fragments and cut their sequence into equal contiguous parts, one per rank."""
    if key:
        # The rank is not part of this key: all ranks must come to the same order.
        order = np.random.default_rng(_rank_key(key, NO_RANK)).permutation(len(fragments))
        fragments = [fragments[i] for i in order.tolist()]
    ends = np.cumsum([fragment.rows for fragment in fragments], dtype=np.int64)
    total = int(ends[-1]) if fragments else 0
    bounds = [-(-total * rank // world_size) for rank in range(world_size + 1)]
    return [_cut(fragments, ends, start, stop) for start, stop in pairwise(bounds)]


def _cut(fragments: list[Fragment], ends: Array, start: int, stop: int) -> list[Fragment]:
    """Return rows [start, stop) of the sequence of fragments; ends: where each ends in it."""
    if start == stop:
        return []
    first = int(np.searchsorted(ends, start, side="right"))
    last = int(np.searchsorted(ends, stop, side="left"))
    part = fragments[first : last + 1]
    part[-1] = replace(part[-1], stop=part[-1].stop - (int(ends[last]) - stop))
    skipped = start - (int(ends[first]) - fragments[first].rows)
    part[0] = replace(part[0], start=part[0].start + skipped)
    return part


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
        rows = _rows(window)
        if delivered < rows:
            return number, delivered
        delivered -= rows
    return len(windows), 0


def _left(
    fragments: list[Fragment], progress: Progress, window_rows: int, key: tuple[int, ...]
) -> list[Fragment]:
    """Return what the ranks of a stretch, that was dealt these fragments, have not delivered."""
    delivered = progress.steps * progress.batch_size
    left: list[Fragment] = []
    for rank, part in enumerate(_deal(fragments, progress.world_size, key)):
        windows = _windows(part, window_rows)
        first, skip = _locate(windows, delivered)
        for number, window in enumerate(windows[first:], start=first):
            if number == first and skip:
                order = window_order(_rank_key(key, rank), number, _rows(window))
                left += _chosen(window, np.sort(order[skip:]))
            else:
                left += window
    return left


def _chosen(window: Window, places: Array) -> list[Fragment]:
    """Return the rows at ascending places of a window (counted through its fragments)."""
    ends = np.cumsum([fragment.rows for fragment in window])
    inside = np.split(places, np.searchsorted(places, ends[:-1]))
    chosen: list[Fragment] = []
    for fragment, end, here in zip(window, ends.tolist(), inside, strict=True):
        if len(here):
            positions = fragment.positions()[here - (end - fragment.rows)]
            chosen.append(Fragment(fragment.group, 0, len(positions), positions))
    return chosen
