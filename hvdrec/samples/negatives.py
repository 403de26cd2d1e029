"""Sampled negatives: items of the same context that the user did not take."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ROUNDS = 20


def draw(
    group: Array, user: Array, item: Array, positive: Array, per_positive: int, seed: int
) -> tuple[Array, Array]:
    """Draw negatives for positive rows.

    group, user, item: int64 codes [n] of all interactions; positive: row numbers [p] to draw for.
    Candidates of a row are the distinct items of its group that its user does not have in that
    group; per_positive different ones are drawn uniformly, or all, where there are fewer.
    Returns (position in `positive`, item code) of each negative, sorted by position.
    """
    items, groups, users = (int(codes.max(initial=0)) + 1 for codes in (item, group, user))
    assert groups * users * items < 2**62
    pool = np.unique(group * items + item)
    pool_start = np.searchsorted(pool, np.arange(groups + 1) * items)
    pool_item = pool % items
    pair = group * users + user
    taken = np.unique(pair * items + item)
    random = np.random.default_rng(seed)

    row_group, row_pair = group[positive], pair[positive]
    start = pool_start[row_group]
    size = pool_start[row_group + 1] - start
    own = np.searchsorted(taken, (row_pair + 1) * items) - np.searchsorted(taken, row_pair * items)
    wanted = np.minimum(per_positive, size - own)
    chosen = np.full((len(positive), per_positive), -1, dtype=np.int64)
    # Few candidates: list them all. Many: draw, and draw again what was taken or came twice.
    exact = wanted * 4 > size - own
    open_row, open_column = np.nonzero(
        (np.arange(per_positive) < wanted[:, None]) & ~exact[:, None]
    )
    for _ in range(ROUNDS):
        if not len(open_row):
            break
        drawn = pool_item[start[open_row] + random.integers(0, size[open_row])]
        is_taken = _contains(taken, row_pair[open_row] * items + drawn)
        repeats = (chosen[open_row] == drawn[:, None]).any(axis=1)
        # Two places of one row that draw the same item in one round: the first keeps it.
        order = np.lexsort((open_column, drawn, open_row))
        twin = np.zeros(len(drawn), dtype=bool)
        twin[order[1:]] = (np.diff(open_row[order]) == 0) & (np.diff(drawn[order]) == 0)
        good = ~(is_taken | repeats | twin)
        chosen[open_row[good], open_column[good]] = drawn[good]
        open_row, open_column = open_row[~good], open_column[~good]
    for row in np.unique(np.concatenate([np.flatnonzero(exact & (wanted > 0)), open_row])):
        candidates = pool_item[start[row] : start[row] + size[row]]
        free = candidates[~_contains(taken, row_pair[row] * items + candidates)]
        chosen[row] = -1
        chosen[row, : wanted[row]] = random.permutation(free)[: wanted[row]]
    position, column = np.nonzero(chosen >= 0)
    return position, chosen[position, column]


def _contains(sorted_values: Array, values: Array) -> Array:
    place = np.searchsorted(sorted_values, values)
    place[place == len(sorted_values)] = 0
    return np.asarray(sorted_values[place] == values)
