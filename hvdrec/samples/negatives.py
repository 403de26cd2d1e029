"""Draw negatives: items of the same context that the user did not interact with.

The context is the combination of values in the columns ``samples.negatives.within``. Rows with the
same context form a group. Every draw is a hash of the seed, the row's number and the number of the
draw, so it does not depend on how rows are divided into blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.samples.split import hash64

Array = NDArray[Any]
ROUNDS = 20
"""Number of rounds of rejection sampling; after them, all candidates of a row are listed."""
ENUMERATED = 2_097_152
"""Number of candidates that are listed at a time, to bound memory."""
LISTED = 2**32
"""Draws with this number or a larger one order listed candidates; smaller numbers are for rejection
sampling."""


@dataclass(frozen=True)
class Candidates:
    """The distinct items of each group.

    Attributes:
        item: Item codes of all groups, one group after the other, ascending within each group,
            int32 or int64.
        start: Index in `item` at which each group begins, then the length, int64 [groups + 1].
    """

    item: Array
    start: Array

    def sizes(self, group: Array) -> Array:
        """Return the number of items of each group."""
        return np.asarray(self.start[group + 1] - self.start[group])


@dataclass(frozen=True)
class Block:
    """All rows of some pairs of group and user, in any order.

    Attributes:
        number: Number of each row, int64 [n].
        group: Group of each row, int64 [n].
        user: User code of each row, int64 [n].
        item: Item code of each row, int64 [n].
        positive: True for the rows to draw negatives for, bool [n].
    """

    number: Array
    group: Array
    user: Array
    item: Array
    positive: Array


@dataclass(frozen=True)
class _Draws:
    """The p positive rows of a block, and the items that they may draw.

    A group is the rows with the same values in the columns ``samples.negatives.within``. An item is
    *taken* for a group and a user if a row of the group holds this user and this item.

    Attributes:
        candidates: The items that may be drawn, for one group after the other.
        group: Index of each row's group, int64 [p].
        pair: Index of each row's pair of group and user, int64 [p].
        number: Position of each row in the whole log, from which its draws are computed, int64 [p].
        taken: Sorted numbers ``pair * items + item``, one for each item taken for a pair.
        items: A number above all item codes.
        seed: Seed of the draws.
    """

    candidates: Candidates
    group: Array
    pair: Array
    number: Array
    taken: Array
    items: int
    seed: int

    def hash(self, row: Array, draw: Array) -> Array:
        """Return a random number for each draw of a row, uint64."""
        return hash64(hash64(self.number[row], self.seed) + draw.astype(np.uint64), 0)

    def is_taken(self, row: Array, item: Array) -> Array:
        key = self.pair[row] * self.items + item
        index = np.minimum(np.searchsorted(self.taken, key), len(self.taken) - 1)
        return np.asarray(self.taken[index] == key)

    def taken_items(self) -> Array:
        """Return, for each row, the number of items taken for its pair."""
        ends = np.searchsorted(self.taken, (self.pair + 1) * self.items)
        return np.asarray(ends - np.searchsorted(self.taken, self.pair * self.items))


def draw_negatives(
    candidates: Candidates, block: Block, per_positive: int, seed: int
) -> tuple[Array, Array]:
    """Draw negatives for the positive rows of a block.

    The candidates of a row are the distinct items of its group, without the items that the row's
    user has in this group. From them, `per_positive` different items are drawn with equal
    probability; if there are fewer, all are taken.

    Args:
        candidates: The items of all groups.
        block: The rows.
        per_positive: Number of negatives for each positive row.
        seed: Seed of the random numbers.

    Returns:
        Two arrays with one entry per negative: the index of its positive row in the block, and its
        item code. They are sorted by index, then by code.
    """
    positive = np.flatnonzero(block.positive)
    if not len(positive):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    items = int(candidates.item.max()) + 1
    pair = np.unique(block.group * (int(block.user.max()) + 1) + block.user, return_inverse=True)[1]
    draws = _Draws(
        candidates,
        block.group[positive],
        pair[positive],
        block.number[positive],
        np.unique(pair * items + block.item),
        items,
        seed,
    )
    size = candidates.sizes(draws.group)
    free = size - draws.taken_items()
    wanted = np.minimum(per_positive, free)
    # If candidates are few, list them all. If they are many, draw any items and reject taken ones.
    is_few = (wanted > 0) & ((wanted * 4 > free) | (free * 4 < size))
    chosen, left = _reject(draws, np.where(is_few, 0, wanted), per_positive)
    listed = np.union1d(np.flatnonzero(is_few), left)
    chosen[listed] = -1
    row, drawn = _enumerate(draws, wanted, listed)
    other, column = np.nonzero(chosen >= 0)
    row = np.concatenate([row, other])
    drawn = np.concatenate([drawn, chosen[other, column]])
    order = np.lexsort((drawn, row))
    return positive[row[order]], drawn[order]


def _reject(draws: _Draws, wanted: Array, width: int) -> tuple[Array, Array]:
    """Draw items of the group and reject those that are taken.

    Returns the items, int64 [rows, width], -1 for none; and the rows that still lack items.
    """
    candidates, group = draws.candidates, draws.group
    chosen = np.full((len(group), width), -1, dtype=np.int64)
    row, column = np.nonzero(np.arange(width) < wanted[:, None])
    for round_number in range(ROUNDS):
        if not len(row):
            break
        random = draws.hash(row, round_number * width + column)
        # Scale the upper 32 bits to the number of candidates.
        size = candidates.sizes(group[row]).astype(np.uint64)
        offset = (((random >> np.uint64(32)) * size) >> np.uint64(32)).astype(np.int64)
        drawn = candidates.item[candidates.start[group[row]] + offset].astype(np.int64)
        rejected = draws.is_taken(row, drawn)
        rejected |= (chosen[row] == drawn[:, None]).any(axis=1)
        # If a row draws the same item twice in one round, only the first draw is kept.
        order = np.lexsort((column, drawn, row))
        rejected[order[1:]] |= (np.diff(row[order]) == 0) & (np.diff(drawn[order]) == 0)
        chosen[row[~rejected], column[~rejected]] = drawn[~rejected]
        row, column = row[rejected], column[rejected]
    return chosen, np.unique(row)


def _enumerate(draws: _Draws, wanted: Array, rows: Array) -> tuple[Array, Array]:
    """List all candidates of some rows and shuffle them; return (row, item) of each draw."""
    candidates, group = draws.candidates, draws.group
    sizes = candidates.sizes(group[rows])
    # Process consecutive rows together, up to a bounded number of candidates.
    run = np.cumsum(sizes) // ENUMERATED
    all_rows, drawn = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(run)) + 1):
        size = sizes[part]
        row = np.repeat(rows[part], size)
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        item = candidates.item[candidates.start[group[row]] + within].astype(np.int64)
        is_free = ~draws.is_taken(row, item)
        row, item = row[is_free], item[is_free]
        order = np.lexsort((draws.hash(row, LISTED + item), row))
        row, item = row[order], item[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        kept = rank < wanted[row]
        all_rows.append(row[kept])
        drawn.append(item[kept])
    return np.concatenate(all_rows), np.concatenate(drawn)
