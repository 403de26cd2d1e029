"""Sampled negatives: items of the same context that the user did not interact with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ROUNDS = 20
"""Rounds of rejection sampling before the candidates of a row are enumerated."""
ENUMERATED = 4_000_000
"""Candidates enumerated at a time."""


@dataclass(frozen=True)
class _Candidates:
    """The distinct items of each group, and those that each (group, user) pair has taken.

    item: int64, sorted by group; start: int64 [groups + 1] into it; taken: sorted pair * items +
    item; items: number of item codes.
    """

    item: Array
    start: Array
    taken: Array
    items: int

    def is_taken(self, pair: Array, item: Array) -> Array:
        key = pair * self.items + item
        index = np.minimum(np.searchsorted(self.taken, key), len(self.taken) - 1)
        return np.asarray(self.taken[index] == key)

    def taken_items(self, pair: Array) -> Array:
        """Return the number of items that each pair has taken."""
        ends = np.searchsorted(self.taken, (pair + 1) * self.items)
        return np.asarray(ends - np.searchsorted(self.taken, pair * self.items))

    def sizes(self, group: Array) -> Array:
        """Return the number of items of each group."""
        return np.asarray(self.start[group + 1] - self.start[group])


def draw_negatives(
    group: Array, user: Array, item: Array, positive: Array, per_positive: int, seed: int
) -> tuple[Array, Array]:
    """Draw negatives for positive rows; a pure function of its arguments.

    The candidates of a row are the distinct items of its group without those that its user has in
    that group. `per_positive` distinct candidates are drawn uniformly, or all if there are fewer.

    Args:
        group: Context codes of all n interactions, int64 [n].
        user: User codes, int64 [n].
        item: Item codes, int64 [n].
        positive: Numbers of the p rows to draw for, int64 [p].
        per_positive: Negatives per positive row.
        seed: Seed of the draw.

    Returns:
        Index into `positive` and item code of each negative, sorted.
    """
    if not len(positive):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    items = int(item.max()) + 1
    pair = np.unique(group * (int(user.max()) + 1) + user, return_inverse=True)[1]
    in_group = np.unique(group * items + item)
    starts = np.searchsorted(in_group, np.arange(int(group.max()) + 2) * items)
    candidates = _Candidates(in_group % items, starts, np.unique(pair * items + item), items)
    random = np.random.default_rng(seed)

    group, pair = group[positive], pair[positive]
    size = candidates.sizes(group)
    free = size - candidates.taken_items(pair)
    wanted = np.minimum(per_positive, free)
    # Few candidates are enumerated; among many, rejected draws are repeated.
    is_few = (wanted > 0) & ((wanted * 4 > free) | (free * 4 < size))
    chosen, left = _reject(
        candidates, group, pair, np.where(is_few, 0, wanted), per_positive, random
    )
    enumerated = np.union1d(np.flatnonzero(is_few), left)
    chosen[enumerated] = -1
    row, drawn = _enumerate(candidates, group, pair, wanted, enumerated, random)
    other, column = np.nonzero(chosen >= 0)
    row = np.concatenate([row, other])
    drawn = np.concatenate([drawn, chosen[other, column]])
    order = np.lexsort((drawn, row))
    return row[order], drawn[order]


def _reject(
    candidates: _Candidates,
    group: Array,
    pair: Array,
    wanted: Array,
    width: int,
    random: np.random.Generator,
) -> tuple[Array, Array]:
    """Draw by rejection; return items [rows, width] (-1: none) and the rows still incomplete."""
    chosen = np.full((len(group), width), -1, dtype=np.int64)
    row, column = np.nonzero(np.arange(width) < wanted[:, None])
    for _ in range(ROUNDS):
        if not len(row):
            break
        drawn = candidates.item[
            candidates.start[group[row]] + random.integers(0, candidates.sizes(group[row]))
        ]
        rejected = candidates.is_taken(pair[row], drawn)
        rejected |= (chosen[row] == drawn[:, None]).any(axis=1)
        # If two columns of a row draw the same item in one round, the first keeps it.
        order = np.lexsort((column, drawn, row))
        rejected[order[1:]] |= (np.diff(row[order]) == 0) & (np.diff(drawn[order]) == 0)
        chosen[row[~rejected], column[~rejected]] = drawn[~rejected]
        row, column = row[rejected], column[rejected]
    return chosen, np.unique(row)


def _enumerate(
    candidates: _Candidates,
    group: Array,
    pair: Array,
    wanted: Array,
    rows: Array,
    random: np.random.Generator,
) -> tuple[Array, Array]:
    """Draw for some rows by shuffling all their candidates; return (row, item) of each draw."""
    sizes = candidates.sizes(group[rows])
    # Consecutive rows are processed together up to a bounded number of candidates.
    run = np.cumsum(sizes) // ENUMERATED
    all_rows, drawn = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(run)) + 1):
        size = sizes[part]
        row = np.repeat(rows[part], size)
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        item = candidates.item[candidates.start[group[row]] + within]
        is_free = ~candidates.is_taken(pair[row], item)
        row, item = row[is_free], item[is_free]
        order = np.lexsort((random.random(len(row)), row))
        row, item = row[order], item[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        kept = rank < wanted[row]
        all_rows.append(row[kept])
        drawn.append(item[kept])
    return np.concatenate(all_rows), np.concatenate(drawn)
