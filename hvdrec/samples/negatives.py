"""Draw negatives: items of the same context that the user did not interact with.

The context is the combination of values in the columns ``samples.negatives.within``. Rows with the
same context form a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ROUNDS = 20
"""Number of rounds of rejection sampling; after them, all candidates of a row are listed."""
ENUMERATED = 4_000_000
"""Number of candidates that are listed at a time, to bound memory."""


@dataclass(frozen=True)
class _Candidates:
    """The distinct items of each group, and those that each pair of group and user has taken.

    Attributes:
        item: Item codes of all groups, one group after the other, int64.
        start: Index in `item` at which each group begins, int64 [groups + 1].
        taken: Sorted numbers ``pair * items + item``, one for each item that a pair has taken.
        items: Number of item codes.
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
    """Draw negatives for positive rows.

    The candidates of a row are the distinct items of its group, without the items that the row's
    user has in this group. From them, `per_positive` different items are drawn with equal
    probability; if there are fewer, all are taken. The result depends only on the arguments.

    Args:
        group: Group of each of the n interactions, int64 [n].
        user: User code of each interaction, int64 [n].
        item: Item code of each interaction, int64 [n].
        positive: Numbers of the p interactions to draw negatives for, int64 [p].
        per_positive: Number of negatives for each of them.
        seed: Seed of the random numbers.

    Returns:
        For each negative, the index of its row in `positive` and its item code; sorted by both.
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
    # If candidates are few, list them all. If they are many, draw any items and reject taken ones.
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
    """Draw items of the group and reject those that are taken.

    Returns the items, int64 [rows, width], -1 for none; and the rows that still lack items.
    """
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
        # If a row draws the same item twice in one round, only the first draw is kept.
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
    """List all candidates of some rows and shuffle them; return (row, item) of each draw."""
    sizes = candidates.sizes(group[rows])
    # Process consecutive rows together, up to a bounded number of candidates.
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
