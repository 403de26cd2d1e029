"""Decide which rank reads which rows in which order, from seed, epoch and world size alone.

The row groups of a split are put into a random order in each epoch. This sequence of rows is cut
into one contiguous part per rank. The lengths of the parts differ by at most one row. A cut may
therefore fall inside a row group; then two ranks read different rows of that group. A rank divides
its part into windows of a few row groups and shuffles the rows within each window. Batches are
taken from the windows one after the other. `Progress` entries record how much of an epoch was
delivered, so that any number of ranks can continue with the remaining rows.
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
"""Used as the rank in the random seed of a permutation that must be the same on all ranks."""


@dataclass(frozen=True)
class Progress:
    """A delivered part of an epoch: `steps` steps of `world_size` batches of `batch_size` rows."""

    world_size: int
    batch_size: int
    steps: int

    @property
    def shape(self) -> tuple[int, int]:
        """The world size (number of ranks) and the batch size."""
        return self.world_size, self.batch_size


@dataclass(frozen=True, slots=True)
class Fragment:
    """Some rows of one row group: its rows `start` to `stop`, or ``chosen[start:stop]``.

    Attributes:
        group: Index of the row group.
        start: First position in the row group, or in `chosen` if it is given.
        stop: End position, exclusive.
        chosen: Row numbers within the group, int64 and ascending; None for all rows.
    """

    group: int
    start: int
    stop: int
    chosen: Array | None = None

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.stop - self.start

    def positions(self) -> Array:
        """Return the numbers of the rows within the row group, int64 [rows]."""
        if self.chosen is None:
            return np.arange(self.start, self.stop)
        return self.chosen[self.start : self.stop]


Window = tuple[Fragment, ...]


@dataclass(frozen=True)
class EpochPlan:
    """The rows that one rank reads in an epoch, or in the rest of an epoch.

    Attributes:
        windows: The windows to read in order, without those that were completely delivered.
        first: The number of `windows[0]` within the epoch. A window's number is part of its
            shuffle's seed.
        skip: How many rows of `windows[0]`, in shuffled order, were already delivered.
        rows: How many rows this rank still has to deliver.
        steps: How many steps are left; it is the same on all ranks.
        key: The seed of the shuffles; empty for no shuffling.
    """

    windows: tuple[Window, ...]
    first: int
    skip: int
    rows: int
    steps: int
    key: tuple[int, ...]

    def order(self, number: int) -> Array:
        """Return the order in which to deliver the rows of `windows[number]`, int64 [rows]."""
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
) -> EpochPlan:
    """Plan the rows that a rank reads in an epoch, without the parts in `past` (already delivered).

    If world size and batch size are those of the last entry of `past`, the rank's batches continue
    exactly where they stopped. Otherwise the remaining rows are distributed again. `window_rows`,
    `seed` and `shuffle` must not change within an epoch.

    `group_rows` is the number of rows of each row group in file order. `batch_size` is the number
    of rows of one rank's batch. A shuffle window has at least `window_rows` rows.
    """
    finished, done = _merge(past, world_size, batch_size)
    left = [Fragment(group, 0, rows) for group, rows in enumerate(group_rows) if rows]
    for generation, progress in enumerate(finished):
        key = _key(seed, epoch, generation, progress.world_size, shuffle)
        left = _undelivered(left, progress, window_rows, key)
    key = _key(seed, epoch, len(finished), world_size, shuffle)
    part = _deal(left, world_size, key)[rank]
    part_rows = _rows(part)
    windows = _windows(part, window_rows)
    delivered = min(done * batch_size, part_rows)
    first, skip = _locate(windows, delivered)
    largest_part = -(-_rows(left) // world_size)
    return EpochPlan(
        windows=tuple(windows[first:]),
        first=first,
        skip=skip,
        rows=part_rows - delivered,
        steps=max(0, -(-largest_part // batch_size) - done),
        key=_rank_key(key, rank),
    )


def window_order(key: tuple[int, ...], window: int, rows: int) -> Array:
    """Return the order of a window's rows, int64 [rows]: random, or unchanged if `key` is empty."""
    if not key:
        return np.arange(rows)
    return np.random.default_rng((*key, window)).permutation(rows)


def _merge(
    past: Sequence[Progress], world_size: int, batch_size: int
) -> tuple[list[Progress], int]:
    """Merge adjacent parts of an epoch that were read with the same world size and batch size.

    Returns:
        A pair. If the last merged part has this job's world size and batch size: the parts before
        it, and its number of steps. Otherwise: all merged parts, and 0.
    """
    merged: list[Progress] = []
    for progress in past:
        if merged and merged[-1].shape == progress.shape:
            merged[-1] = replace(progress, steps=merged[-1].steps + progress.steps)
        elif progress.steps:
            merged.append(progress)
    if merged and merged[-1].shape == (world_size, batch_size):
        return merged[:-1], merged[-1].steps
    return merged, 0


def _key(seed: int, epoch: int, generation: int, world_size: int, shuffle: bool) -> tuple[int, ...]:
    # NumPy refuses negative seeds.
    return (seed % 2**64, epoch, generation, world_size) if shuffle else ()


def _rank_key(key: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (*key, rank) if key else ()


def _rows(fragments: Sequence[Fragment]) -> int:
    return sum(fragment.stop - fragment.start for fragment in fragments)


def _deal(fragments: list[Fragment], world_size: int, key: tuple[int, ...]) -> list[list[Fragment]]:
    """Permute the fragments and cut them into contiguous parts of equal size, one per rank."""
    if key:
        # All ranks must compute the same permutation, so its seed does not contain the rank.
        order = np.random.default_rng(_rank_key(key, NO_RANK)).permutation(len(fragments))
        fragments = [fragments[i] for i in order.tolist()]
    ends = np.cumsum([fragment.rows for fragment in fragments], dtype=np.int64)
    total = int(ends[-1]) if fragments else 0
    bounds = [-(-total * rank // world_size) for rank in range(world_size + 1)]
    return [_cut(fragments, ends, start, stop) for start, stop in pairwise(bounds)]


def _cut(fragments: list[Fragment], ends: Array, start: int, stop: int) -> list[Fragment]:
    """Return rows `start` to `stop` of the joined fragments; fragment i ends at row `ends[i]`."""
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
    """Divide a rank's part into windows of at least `window_rows` rows; the last may be smaller."""
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
    """Return the number of the first window that is not completely delivered.

    The second result says how many of its rows were delivered.
    """
    for number, window in enumerate(windows):
        rows = _rows(window)
        if delivered < rows:
            return number, delivered
        delivered -= rows
    return len(windows), 0


def _undelivered(
    fragments: list[Fragment], progress: Progress, window_rows: int, key: tuple[int, ...]
) -> list[Fragment]:
    """Return the rows of the fragments that the ranks of `progress` did not deliver."""
    delivered = progress.steps * progress.batch_size
    left: list[Fragment] = []
    for rank, part in enumerate(_deal(fragments, progress.world_size, key)):
        windows = _windows(part, window_rows)
        first, skip = _locate(windows, delivered)
        for number, window in enumerate(windows[first:], start=first):
            if number == first and skip:
                order = window_order(_rank_key(key, rank), number, _rows(window))
                left += _select(window, np.sort(order[skip:]))
            else:
                left += window
    return left


def _select(window: Window, rows: Array) -> list[Fragment]:
    """Return fragments of exactly the given rows of a window; row numbers must be ascending."""
    ends = np.cumsum([fragment.rows for fragment in window])
    inside = np.split(rows, np.searchsorted(rows, ends[:-1]))
    chosen: list[Fragment] = []
    for fragment, end, here in zip(window, ends.tolist(), inside, strict=True):
        if len(here):
            positions = fragment.positions()[here - (end - fragment.rows)]
            chosen.append(Fragment(fragment.group, 0, len(positions), positions))
    return chosen
