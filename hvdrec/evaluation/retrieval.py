"""Retrieval over the whole catalogue, exact, and its metrics.

Metrics follow the usual full-ranking protocol (RecBole, Zhao et al., CIKM 2021): items the user has
seen are excluded, and means are over the users with at least one relevant item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.errors import UserError

Array = NDArray[Any]
NAMES = ("recall", "precision", "hit_rate", "ndcg", "mrr", "map")
BLOCK_SCORES = 2_000_000
"""Scores held at a time, some 30 bytes each."""
BLOCK_ITEMS = 65_536
LOW_HALF = np.uint64(2**32 - 1)

Columns = Callable[[int, int], Array]
"""(start, stop) -> scores of users [start, stop), a row each, by some of the items."""


@dataclass(frozen=True)
class Csr:
    """A set of items per user: those of row u are indices[indptr[u] : indptr[u + 1]], ascending."""

    indptr: Array
    indices: Array

    def pairs(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return (row - start, item) of all entries of rows [start, stop)."""
        counts = np.diff(self.indptr[start : stop + 1])
        rows = np.repeat(np.arange(stop - start), counts)
        return rows, self.indices[self.indptr[start] : self.indptr[stop]]


@dataclass(frozen=True)
class RetrievalSums:
    """Sums over users, to be added over ranks.

    values: float64 [len(ks), len(NAMES)]; users: float64 [1]; recommended: int64 [len(ks), items],
    in how many lists an item stands.
    """

    values: Array
    users: Array
    recommended: Array

    def reduced(self, add: Callable[[Array], Array]) -> RetrievalSums:
        """Return the sums added over ranks by a function."""
        return RetrievalSums(add(self.values), add(self.users), add(self.recommended))


def csr(rows: Array, columns: Array, count: int) -> Csr:
    """Return the distinct columns of each of `count` rows, from pairs in any order."""
    width = int(columns.max(initial=0)) + 1
    flat = np.unique(rows.astype(np.int64) * width + columns)
    indptr = np.searchsorted(flat, np.arange(count + 1) * width)
    return Csr(indptr, flat % width)


def rank_catalogue(users: Array, items: Array, seen: Csr, k: int) -> Array:
    """Return each user's k best items by inner product, best first, int64 [u, k].

    users: [u, d]; items: [i, d]; seen: items of each user that are left out. Products are summed in
    float64 and compared in float32, so that the order of summing, and with it the size of a block,
    does not show. As `rank_scores` otherwise. Raises UserError if a vector is not finite.
    """
    for side, vectors in (("user", users), ("item", items)):
        if not np.isfinite(vectors).all():
            raise UserError(
                f"{side} embeddings: some are NaN or infinite; the model has diverged: lower "
                "train.learning_rate or set train.clip_norm"
            )

    def of_items(first: int, last: int) -> Columns:
        columns = items[first:last].T.astype(np.float64)
        return lambda start, stop: users[start:stop].astype(np.float64) @ columns

    return rank_scores(of_items, len(users), len(items), seen, k)


def rank_scores(
    scores_of: Callable[[int, int], Columns], users: int, items: int, seen: Csr, k: int
) -> Array:
    """Return each user's k best items by any scores, best first, int64 [users, k].

    scores_of: (first, last) -> the scores of items [first, last), which are then asked for by
    blocks of users, [stop - start, last - first], and compared in float32; seen: items of each user
    that are left out. Equal scores are told apart by item index; -1 fills up where fewer than k
    items are left.
    """
    best = np.zeros((users, k), dtype=np.uint64)
    width = max(1, min(items, BLOCK_ITEMS, BLOCK_SCORES))
    height = max(1, BLOCK_SCORES // width)
    for first in range(0, items, width):
        columns = scores_of(first, min(first + width, items))
        for start in range(0, users, height):
            stop = min(start + height, users)
            keys = _keys(columns(start, stop).astype(np.float32, copy=False), first)
            rows, known = seen.pairs(start, stop)
            inside = (known >= first) & (known < first + width)
            keys[rows[inside], known[inside] - first] = 0
            best[start:stop] = _largest(np.concatenate([best[start:stop], keys], axis=1), k)
    return np.where(best == 0, -1, (LOW_HALF - (best & LOW_HALF)).astype(np.int64))


def retrieval_sums(top: Array, relevant: Csr, ks: Sequence[int], items: int) -> RetrievalSums:
    """Return the sums of all metrics over users, at each cut-off.

    top: int64 [u, K], best first, K >= max(ks); relevant: relevant items per user. With hits h_j at
    places j = 1..k and R relevant items:

    recall = sum h / R; precision = sum h / k; hit_rate = [sum h > 0];
    ndcg = sum h_j / log2(j + 1) over the same sum for min(R, k) hits in front (Järvelin and
    Kekäläinen, 2002); mrr = 1 / place of the first hit; map = sum over hits of precision at their
    place, over min(R, k).
    """
    sizes = np.diff(relevant.indptr)
    has = sizes > 0
    width = max(items, 1) + 1
    flat = np.repeat(np.arange(len(sizes)), sizes) * width + relevant.indices
    asked = np.arange(len(top))[:, None] * width + np.where(top < 0, width - 1, top)
    hit = np.isin(asked, flat)[has].astype(np.float64)
    sizes, top = sizes[has], top[has]
    values = np.zeros((len(ks), len(NAMES)))
    recommended = np.zeros((len(ks), items), dtype=np.int64)
    for row, k in enumerate(ks):
        h = hit[:, :k]
        places = np.arange(1, h.shape[1] + 1)
        discount = 1 / np.log2(places + 1)
        ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])
        best = np.minimum(sizes, k)
        hits = h.sum(axis=1)
        first = np.where(hits > 0, h.argmax(axis=1) + 1, np.inf)
        values[row] = [
            (hits / sizes).sum(),
            (hits / k).sum(),
            (hits > 0).sum(),
            ((h * discount).sum(axis=1) / ideal[best]).sum(),
            (1 / first).sum(),
            ((h * np.cumsum(h, axis=1) / places).sum(axis=1) / best).sum(),
        ]
        shown = top[:, :k]
        recommended[row] = np.bincount(shown[shown >= 0], minlength=items)
    return RetrievalSums(values, np.array([float(len(sizes))]), recommended)


def retrieval_metrics(sums: RetrievalSums, ks: Sequence[int]) -> dict[str, float]:
    """Return ``name@k`` for every metric and cut-off, coverage@k (the share of the catalogue that
    stands in some list) and the number of users."""
    users = float(sums.users[0])
    metrics: dict[str, float] = {}
    for row, k in enumerate(ks):
        for column, name in enumerate(NAMES):
            mean = float(sums.values[row, column]) / users if users else float("nan")
            metrics[f"{name}@{k}"] = mean
        metrics[f"coverage@{k}"] = float((sums.recommended[row] > 0).mean())
    return {**metrics, "users": int(users)}


def _keys(scores: Array, first: int) -> Array:
    """Return uint64 keys that sort as (score, then the smaller item index first); none is 0.

    A float32's bits sort as integers once those of negative numbers are inverted and the others
    have the sign bit set. In the low half stands the item's index, counted down.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # adding 0 makes -0.0 equal to 0.0
    sign = np.uint32(1 << 31)
    keys = np.where(bits >= sign, ~bits, bits | sign).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= LOW_HALF - np.arange(first, first + scores.shape[1], dtype=np.uint64)
    return keys


def _largest(keys: Array, k: int) -> Array:
    """Return the k largest keys of each row, falling; reorders the keys in place."""
    keys.partition(keys.shape[1] - k, axis=1)
    return np.sort(keys[:, -k:], axis=1)[:, ::-1]
