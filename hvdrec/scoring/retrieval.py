"""Exact retrieval: the items whose embeddings have the largest inner product with the user's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BLOCK_ROWS = 262_144
GROUP_ROWS = 64


def inner_products(vectors: Array, query: Array) -> Array:
    """Return float32 [n], for vectors [n, >= width] and a query [width] on their first entries."""
    scores = np.empty(len(vectors), dtype=np.float32)
    for start in range(0, len(vectors), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        np.dot(vectors[part, : len(query)], query, out=scores[part])
    return scores


def largest(scores: Array, count: int, excluded: Array) -> Array:
    """Return the rows, ascending, of the ``count`` largest scores [n] that are not excluded.

    Of equal scores at the border the first rows are taken. scores: float32 without NaN, which this
    function may change; excluded: rows, any number of times.
    """
    scores[excluded] = -np.inf
    count = min(count, len(scores) - len(np.unique(excluded)))
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    rows = _contenders(scores, count)
    contending = scores[rows]
    border = np.partition(contending, len(rows) - count)[len(rows) - count]
    taken = contending > border
    taken[np.flatnonzero(contending == border)[: count - int(taken.sum())]] = True
    kept: Array = rows[taken]
    return kept


def _contenders(scores: Array, count: int) -> Array:
    """Return rows, ascending, among which the ``count`` largest scores are."""
    groups = len(scores) // GROUP_ROWS
    if groups <= count:
        return np.arange(len(scores))
    # At least ``count`` scores reach the count-th largest of the groups' maxima.
    maxima = scores[: groups * GROUP_ROWS].reshape(groups, GROUP_ROWS).max(axis=1)
    bound = np.partition(maxima, groups - count)[groups - count]
    return np.flatnonzero(scores >= bound)
