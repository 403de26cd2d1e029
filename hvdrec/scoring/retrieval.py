"""Exact retrieval: the items whose embeddings have the largest inner product with the user's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BLOCK_ROWS = 262_144


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
    border = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > border)
    at_border = np.flatnonzero(scores == border)[: count - len(above)]
    return np.sort(np.concatenate([above, at_border]))
