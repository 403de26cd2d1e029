"""Exact retrieval: the items whose embeddings have the largest inner product with the user's."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BLOCK_ROWS = 4096
"""Rows that are converted at a time: as float32 they stay within a core's cache."""
GROUP_ROWS = 64
"""Scores of which the largest is kept when the border of the best is looked for."""
SPARSE = 2
"""Up to a share of 1 in so many, allowed rows are gathered; above, all rows are gone through."""


class ItemSearch(Protocol):
    """Finds the items nearest to a user."""

    @property
    def is_exact(self) -> bool:
        """Return whether what it finds is certain to be the best."""

    def search(
        self, query: Array, count: int, excluded: Array, allowed: Array | None = None
    ) -> tuple[Array, Array]:
        """Return rows int64 [m], ascending, and their inner products with the query, float32 [m].

        query: float32 [width]; excluded: rows to leave out, any number of times; allowed: None or
        bool [n], whether a row may be found. m is ``count``, or the number of rows left.
        """

    def open(self) -> None:
        """Open what the first search would wait for."""


class ExactSearch:
    """Goes through all vectors, as they are stored: float32, float16, or int8 with row scales."""

    is_exact = True

    def __init__(self, vectors: Array, scales: Array | None = None) -> None:
        """Take vectors [n, >= width]: the first entries count, as many as a query has."""
        self.vectors, self.scales = vectors, scales

    def __len__(self) -> int:
        return len(self.vectors)

    def search(
        self, query: Array, count: int, excluded: Array, allowed: Array | None = None
    ) -> tuple[Array, Array]:
        """Return the rows of the ``count`` largest inner products; see `ItemSearch.search`."""
        if allowed is None:
            scores = self.products(query)
            rows = largest(scores, count, excluded)
            return rows, scores[rows]
        kept = remaining(allowed, excluded)
        rows = np.flatnonzero(kept)
        is_sparse = SPARSE * len(rows) <= len(kept)
        scores = self.products_of(rows, query) if is_sparse else self.products(query)[rows]
        best = largest(scores, count)
        return rows[best], scores[best]

    def products(self, query: Array) -> Array:
        """Return the inner products of all vectors with a query [width], float32 [n]."""
        return inner_products(self.vectors, query, self.scales)

    def products_of(self, rows: Array, query: Array) -> Array:
        """Return the inner products of some rows' vectors with a query, float32 [len(rows)]."""
        parts = [np.empty(0, dtype=np.float32)]
        for start in range(0, len(rows), BLOCK_ROWS):
            part = rows[start : start + BLOCK_ROWS]
            scales = None if self.scales is None else self.scales[part]
            parts.append(inner_products(self.vectors[part], query, scales))
        return parts[1] if len(parts) == 2 else np.concatenate(parts)

    def open(self) -> None:
        """Do nothing: the vectors are mapped already."""


def remaining(allowed: Array, excluded: Array) -> Array:
    """Return which rows are allowed and not excluded, bool [n]."""
    if not excluded.size:
        return allowed
    kept = allowed.copy()
    kept[excluded] = False
    return kept


def inner_products(vectors: Array, query: Array, scales: Array | None = None) -> Array:
    """Return the inner product of each vector's first entries with a query, float32 [n].

    vectors: [n, >= width], finite, of float32, float16, or int8 with float32 ``scales`` [n];
    query: float32 [width], finite.
    """
    if len(query) < vectors.shape[1]:
        # Of a part of the columns, numpy would make a copy first.
        query = np.pad(query, (0, vectors.shape[1] - len(query)))
    scores = np.empty(len(vectors), dtype=np.float32)
    if vectors.dtype == np.float32:
        np.dot(vectors, query, out=scores)
        return scores
    as_number = np.empty((min(BLOCK_ROWS, len(vectors)), len(query)), dtype=np.float32)
    is_half = vectors.dtype == np.float16
    if is_half:
        # See _as_shrunk: what it takes from the vectors is given to the query, as far as it fits.
        exponent = int(np.frexp(np.abs(query).max(initial=0.0))[1])
        query = np.ldexp(query, min(112, 120 - exponent))
    for start in range(0, len(vectors), BLOCK_ROWS):
        part = vectors[start : start + BLOCK_ROWS]
        numbers = as_number[: len(part)]
        if is_half:
            _as_shrunk(part, numbers)
        else:
            np.copyto(numbers, part)
        np.dot(numbers, query, out=scores[start : start + BLOCK_ROWS])
    if is_half and exponent > 8:
        np.ldexp(scores, exponent - 8, out=scores)
    if scales is not None:
        np.multiply(scores, scales, out=scores)
    return scores


def _as_shrunk(halves: Array, out: Array) -> None:
    """Write float16 numbers times 2^-112 as float32, a fifth of the time that a cast takes.

    Sign, exponent and fraction move to where float32 has them; float32's exponent means 112 less.
    """
    bits = out.view(np.int32)
    np.copyto(bits, halves.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _HALF_BITS, out=bits)


_HALF_BITS = np.array(0x8FFFE000, dtype=np.uint32).view(np.int32)[()]


def largest(scores: Array, count: int, excluded: Array | None = None) -> Array:
    """Return the rows, ascending, of the ``count`` largest scores [n] that are not excluded.

    Of equal scores at the border the first rows are taken. scores: float32 without NaN, in which
    those of excluded rows are overwritten; excluded: rows, any number of times.
    """
    left = len(scores)
    if excluded is not None and excluded.size:
        scores[excluded] = -np.inf
        left -= len(np.unique(excluded))
    count = min(count, left)
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
    # At least ``count`` scores reach the count-th largest of the groups' maxima. A group's rows
    # lie far apart: so maxima are taken of whole vectors, and neighbours do not hide each other.
    maxima = scores[: groups * GROUP_ROWS].reshape(GROUP_ROWS, groups).max(axis=0)
    bound = np.partition(maxima, groups - count)[groups - count]
    return np.flatnonzero(scores >= bound)
