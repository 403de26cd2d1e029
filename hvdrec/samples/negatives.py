"""Sampled negatives: items of the same context that the user did not take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ROUNDS = 20
LISTED = 4_000_000


@dataclass(frozen=True)
class _Pool:
    """The distinct items of each group, and which of them each (group, user) pair took.

    item: int64, by group; start: int64 [groups + 1] into it; taken: sorted pair * items + item.
    """

    item: Array
    start: Array
    taken: Array
    items: int

    def is_taken(self, pair: Array, item: Array) -> Array:
        wanted = pair * self.items + item
        place = np.minimum(np.searchsorted(self.taken, wanted), len(self.taken) - 1)
        return np.asarray(self.taken[place] == wanted)


def draw(
    group: Array, user: Array, item: Array, positive: Array, per_positive: int, seed: int
) -> tuple[Array, Array]:
    """Draw negatives for positive rows.

    group, user, item: int64 codes [n] of all interactions; positive: row numbers [p] to draw for.
    Candidates of a row are the distinct items of its group without those that its user has in that
    group; `per_positive` different ones are drawn uniformly, or all, where there are fewer.
    Returns (place in `positive`, item code) of each negative, ascending. The draw is a pure
    function of its arguments.
    """
    if not len(positive):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    items = int(item.max()) + 1
    pair = np.unique(group * (int(user.max()) + 1) + user, return_inverse=True)[1]
    in_group = np.unique(group * items + item)
    starts = np.searchsorted(in_group, np.arange(int(group.max()) + 2) * items)
    pool = _Pool(in_group % items, starts, np.unique(pair * items + item), items)
    random = np.random.default_rng(seed)

    group, pair = group[positive], pair[positive]
    size = pool.start[group + 1] - pool.start[group]
    own = np.searchsorted(pool.taken, (pair + 1) * items) - np.searchsorted(
        pool.taken, pair * items
    )
    free = size - own
    wanted = np.minimum(per_positive, free)
    # Few candidates are listed; among many, a draw that was taken or came twice is drawn again.
    is_listed = (wanted > 0) & ((wanted * 4 > free) | (free * 4 < size))
    chosen, left = _redrawn(pool, group, pair, np.where(is_listed, 0, wanted), per_positive, random)
    listed = np.union1d(np.flatnonzero(is_listed), left)
    chosen[listed] = -1
    place, drawn = _listed(pool, group, pair, wanted, listed, random)
    again, column = np.nonzero(chosen >= 0)
    place = np.concatenate([place, again])
    drawn = np.concatenate([drawn, chosen[again, column]])
    order = np.lexsort((drawn, place))
    return place[order], drawn[order]


def _redrawn(
    pool: _Pool, group: Array, pair: Array, wanted: Array, width: int, random: np.random.Generator
) -> tuple[Array, Array]:
    """Return items [rows, width] (-1 for none) and the rows that are still not full at the end."""
    chosen = np.full((len(group), width), -1, dtype=np.int64)
    row, column = np.nonzero(np.arange(width) < wanted[:, None])
    for _ in range(ROUNDS):
        if not len(row):
            break
        start = pool.start[group[row]]
        drawn = pool.item[start + random.integers(0, pool.start[group[row] + 1] - start)]
        refused = pool.is_taken(pair[row], drawn) | (chosen[row] == drawn[:, None]).any(axis=1)
        # Two places of one row that draw the same item in one round: the first keeps it.
        order = np.lexsort((column, drawn, row))
        refused[order[1:]] |= (np.diff(row[order]) == 0) & (np.diff(drawn[order]) == 0)
        chosen[row[~refused], column[~refused]] = drawn[~refused]
        row, column = row[refused], column[refused]
    return chosen, np.unique(row)


def _listed(
    pool: _Pool,
    group: Array,
    pair: Array,
    wanted: Array,
    rows: Array,
    random: np.random.Generator,
) -> tuple[Array, Array]:
    """Return (row, item) of draws for rows whose candidates are all listed and shuffled."""
    sizes = pool.start[group[rows] + 1] - pool.start[group[rows]]
    # Rows are cut into runs of a bounded number of listed candidates.
    run = np.cumsum(sizes) // LISTED
    places, drawn = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(run)) + 1):
        size = sizes[part]
        row = np.repeat(rows[part], size)
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        item = pool.item[pool.start[group[row]] + within]
        is_free = ~pool.is_taken(pair[row], item)
        row, item = row[is_free], item[is_free]
        order = np.lexsort((random.random(len(row)), row))
        row, item = row[order], item[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        kept = rank < wanted[row]
        places.append(row[kept])
        drawn.append(item[kept])
    return np.concatenate(places), np.concatenate(drawn)
