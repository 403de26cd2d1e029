"""Exact retrieval: find the items with the largest inner product of item and user embedding."""

from __future__ import annotations

import numpy as np

from hvdrec.scoring.array_files import Array

BLOCK_ROWS = 4096
"""Number of rows converted to float32 at a time; few enough to fit a core's cache."""
GROUP_ROWS = 64
"""Number of rows in a group; `largest` first compares the maximum score of each group."""
SPARSE = 2
"""If at most one of every `SPARSE` rows is allowed, only the allowed rows are copied and scored;
otherwise all rows are scored."""


class ExactSearch:
    """Finds vectors by their inner product with a query, computed for all vectors."""

    def __init__(self, vectors: Array, scales: Array | None = None) -> None:
        """Hold the vectors to search.

        Args:
            vectors: float32, float16 or int8 [n, at least width], where width is the width of a
                query. Only the first ``width`` entries are used.
            scales: Factor of each row of int8 vectors, float32 [n]; None for other dtypes.
        """
        self.vectors, self.scales = vectors, scales

    def __len__(self) -> int:
        """Return the number of vectors."""
        return len(self.vectors)

    def search(
        self, query: Array, count: int, excluded: Array, allowed: Array | None = None
    ) -> tuple[Array, Array]:
        """Return the rows with the largest inner products with a query.

        Args:
            query: float32 [width].
            count: Largest number of rows to return.
            excluded: Rows to leave out; a row may occur more than once.
            allowed: True for each row that may be returned, bool [n]; None to allow all rows.

        Returns:
            The rows in ascending order, int64 [m], and their inner products, float32 [m]. m is less
            than ``count`` only if fewer rows are allowed and not excluded.
        """
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
        """Return the inner products of the vectors in ``rows`` with a query, float32 [rows]."""
        parts = [np.empty(0, dtype=np.float32)]
        for start in range(0, len(rows), BLOCK_ROWS):
            part = rows[start : start + BLOCK_ROWS]
            scales = None if self.scales is None else self.scales[part]
            parts.append(inner_products(self.vectors[part], query, scales))
        return parts[1] if len(parts) == 2 else np.concatenate(parts)


def remaining(allowed: Array, excluded: Array) -> Array:
    """Return True for each row that is allowed and not excluded, bool [n]."""
    if not excluded.size:
        return allowed
    kept = allowed.copy()
    kept[excluded] = False
    return kept


def inner_products(vectors: Array, query: Array, scales: Array | None = None) -> Array:
    """Return the inner product of a query with the first entries of each vector, float32 [n].

    Args:
        vectors: float32, float16 or int8 [n, at least width], finite.
        query: float32 [width], finite.
        scales: Factor of each row of int8 vectors, float32 [n]; None for other dtypes.
    """
    if len(query) < vectors.shape[1]:
        # Pad the query with zeros, which is cheap. A slice of the columns would be copied.
        query = np.pad(query, (0, vectors.shape[1] - len(query)))
    scores = np.empty(len(vectors), dtype=np.float32)
    if vectors.dtype == np.float32:
        np.dot(vectors, query, out=scores)
        return scores
    buffer = np.empty((min(BLOCK_ROWS, len(vectors)), len(query)), dtype=np.float32)
    is_half = vectors.dtype == np.float16
    if is_half:
        # _write_scaled multiplies the vectors by 2**-112; so the query is multiplied by the part of
        # 2**112 that does not overflow float32, and the scores by the rest.
        exponent = int(np.frexp(np.abs(query).max(initial=0.0))[1])
        query = np.ldexp(query, min(112, 120 - exponent))
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = vectors[start : start + BLOCK_ROWS]
        numbers = buffer[: len(block)]
        if is_half:
            _write_scaled(block, numbers)
        else:
            np.copyto(numbers, block)
        np.dot(numbers, query, out=scores[start : start + BLOCK_ROWS])
    if is_half and exponent > 8:
        np.ldexp(scores, exponent - 8, out=scores)
    if scales is not None:
        np.multiply(scores, scales, out=scores)
    return scores


def _write_scaled(halves: Array, out: Array) -> None:
    """Write float16 numbers times 2**-112 as float32, in a fifth of the time of a cast.

    Sign, exponent and fraction are shifted to their positions in float32. The exponent keeps its
    value, but float32 subtracts a bias that is larger by 112: this gives the factor.
    """
    bits = out.view(np.int32)
    np.copyto(bits, halves.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _HALF_BITS, out=bits)


_HALF_BITS = np.array(0x8FFFE000, dtype=np.uint32).view(np.int32)[()]


def largest(scores: Array, count: int, excluded: Array | None = None) -> Array:
    """Return the row numbers of the ``count`` largest scores, int64, sorted by row number.

    If rows with equal scores compete for the last places, the smallest row numbers are taken.

    Args:
        scores: float32 [n] without NaN; the scores of excluded rows are overwritten.
        count: Largest number of rows to return.
        excluded: Rows to leave out; a row may occur more than once.
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
    threshold = np.partition(contending, len(rows) - count)[len(rows) - count]
    taken = contending > threshold
    taken[np.flatnonzero(contending == threshold)[: count - int(taken.sum())]] = True
    kept: Array = rows[taken]
    return kept


def _contenders(scores: Array, count: int) -> Array:
    """Return a few ascending rows that include the rows of the ``count`` largest scores."""
    groups = len(scores) // GROUP_ROWS
    if groups <= count:
        return np.arange(len(scores))
    # Each of the ``count`` largest group maxima is a score, so at least ``count`` scores reach the
    # smallest of these maxima. The rows of a group are ``groups`` apart. So numpy computes the
    # maxima of whole vectors at once, and neighbouring rows, which may all have large scores, are
    # in different groups.
    maxima = scores[: groups * GROUP_ROWS].reshape(GROUP_ROWS, groups).max(axis=0)
    bound = np.partition(maxima, groups - count)[groups - count]
    return np.flatnonzero(scores >= bound)
