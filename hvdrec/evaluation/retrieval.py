"""Exact retrieval over the whole catalogue, and its metrics.

For each user, all items that the user has not seen are ranked. The metrics are means over the users
with at least one relevant item. This is the usual protocol of full ranking (RecBole, Zhao et al.,
CIKM 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from hvdrec.errors import UserError

Array = NDArray[Any]
NAMES = ("recall", "precision", "hit_rate", "ndcg", "mrr", "map")
BLOCK_SCORES = 2_000_000
"""Number of scores in memory at a time; each takes about 30 bytes."""
BLOCK_ITEMS = 65_536
LOW_HALF = np.uint64(2**32 - 1)

ScoreUsers = Callable[[int, int], Array]
"""Function of start and stop that returns the scores of the users from start to stop - 1 for a
block of items, [stop - start, items]."""
ScoreItems = Callable[[int, int], ScoreUsers]
"""Function of first and last that returns a `ScoreUsers` for the items from first to last - 1."""


def user_item_matrix(user: Array, item: Array, users: int, items: int) -> Any:
    """Return a sparse CSR matrix with 1 for each pair of user and item, float32 [users, items].

    Args:
        user: Index of each pair's user [n].
        item: Index of each pair's item [n]; a pair may occur more than once.
        users: Number of users.
        items: Number of items.
    """
    ones = np.ones(len(user), dtype=np.float32)
    matrix = sparse.csr_matrix((ones, (user, item)), shape=(users, items))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def rank_catalogue(users: Array, items: Array, seen: Any, k: int) -> Array:
    """Return, for each user, the k items with the largest inner products, best first.

    Products are summed in float64 and compared in float32, so the result does not depend on the
    order of summation or the block size.

    Args:
        users: Vector of each user [users, width].
        items: Vector of each item [items, width].
        seen: Items to exclude for each user, a matrix from `user_item_matrix`.
        k: Number of items for each user.

    Returns:
        Item indices, int64 [users, k]; see `rank_scores`.

    Raises:
        UserError: A vector is not finite.
    """
    for side, vectors in (("user", users), ("item", items)):
        if not np.isfinite(vectors).all():
            raise UserError(
                f"{side} embeddings: some are NaN or infinite; the model has diverged: lower "
                "train.learning_rate or set train.clip_norm",
                field=f"{side} embeddings",
            )

    def score_items(first: int, last: int) -> ScoreUsers:
        block = items[first:last].T.astype(np.float64)
        return lambda start, stop: users[start:stop].astype(np.float64) @ block

    return rank_scores(score_items, len(users), len(items), seen, k)


def rank_scores(score_items: ScoreItems, users: int, items: int, seen: Any, k: int) -> Array:
    """Return, for each user, the k items with the highest scores, best first.

    Args:
        score_items: Computes the scores block by block; they are compared in float32.
        users: Number of users.
        items: Number of items.
        seen: Items to exclude for each user, a matrix from `user_item_matrix`.
        k: Number of items for each user.

    Returns:
        Item indices, int64 [users, k]. Of items with equal scores, the one with the smaller index
        comes first. If fewer than k items are left for a user, the row ends with -1.
    """
    best = np.zeros((users, k), dtype=np.uint64)
    width = max(1, min(items, BLOCK_ITEMS, BLOCK_SCORES))
    height = max(1, BLOCK_SCORES // width)
    for first in range(0, items, width):
        score_users = score_items(first, min(first + width, items))
        for start in range(0, users, height):
            stop = min(start + height, users)
            keys = _sort_keys(score_users(start, stop).astype(np.float32, copy=False), first)
            rows, known = seen[start:stop].nonzero()
            inside = (known >= first) & (known < first + width)
            keys[rows[inside], known[inside] - first] = 0
            best[start:stop] = _largest(np.concatenate([best[start:stop], keys], axis=1), k)
    return np.where(best == 0, -1, (LOW_HALF - (best & LOW_HALF)).astype(np.int64))


def retrieval_sums(top: Array, relevant: Any, ks: Sequence[int], items: int) -> Array:
    """Return sums of metrics over users. Add them up over the ranks, then call `retrieval_metrics`.

    For a user with R relevant items and a cut-off k, let h_j be 1 if the item at rank j is relevant
    (a hit), else 0, and sum over j = 1..k. Then recall = sum h_j / R; precision = sum h_j / k;
    hit_rate = 1 if there is a hit, else 0; ndcg = sum h_j / log2(j + 1), divided by the value of
    this sum for hits at ranks 1 to min(R, k) (Järvelin and Kekäläinen, 2002); mrr = 1 / rank of the
    first hit; map = sum of the precision at the rank of each hit, divided by min(R, k).

    Args:
        top: Item indices of each user, best first, int64 [users, at least max(ks)].
        relevant: Relevant items of each user, a matrix from `user_item_matrix`.
        ks: Cut-offs.
        items: Number of items.

    Returns:
        One row for each cut-off, float64 [len(ks), len(NAMES) + 1 + items]: the sums of the
        metrics, the number of users with a relevant item, and, for each item, the number of users
        whose list contains it.
    """
    sizes = np.diff(relevant.indptr)
    has = sizes > 0
    width = max(items, 1) + 1
    flat = np.repeat(np.arange(len(sizes)), sizes) * width + relevant.indices
    listed = np.arange(len(top))[:, None] * width + np.where(top < 0, width - 1, top)
    hit = np.isin(listed, flat)[has].astype(np.float64)
    sizes, top = sizes[has], top[has]
    sums = np.zeros((len(ks), len(NAMES) + 1 + items))
    for row, k in enumerate(ks):
        h = hit[:, :k]
        ranks = np.arange(1, h.shape[1] + 1)
        discount = 1 / np.log2(ranks + 1)
        ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])
        best = np.minimum(sizes, k)
        hits = h.sum(axis=1)
        first = np.where(hits > 0, h.argmax(axis=1) + 1, np.inf)
        metrics = [
            (hits / sizes).sum(),
            (hits / k).sum(),
            (hits > 0).sum(),
            ((h * discount).sum(axis=1) / ideal[best]).sum(),
            (1 / first).sum(),
            ((h * np.cumsum(h, axis=1) / ranks).sum(axis=1) / best).sum(),
        ]
        shown = top[:, :k]
        counts = np.bincount(shown[shown >= 0], minlength=items)
        sums[row] = np.concatenate([metrics, [len(sizes)], counts])
    return sums


def retrieval_metrics(sums: Array, ks: Sequence[int]) -> dict[str, float]:
    """Return ``name@k`` -> value for every metric and cut-off, and the number of users.

    ``coverage@k`` is the share of all items that are in the list of at least one user.
    """
    users = float(sums[0, len(NAMES)])
    metrics: dict[str, float] = {}
    for row, k in zip(sums, ks, strict=True):
        for name, total in zip(NAMES, row.tolist(), strict=False):
            metrics[f"{name}@{k}"] = total / users if users else float("nan")
        metrics[f"coverage@{k}"] = float((row[len(NAMES) + 1 :] > 0).mean())
    return {**metrics, "users": int(users)}


def _sort_keys(scores: Array, first: int) -> Array:
    """Return a sort key above 0 for each score, uint64.

    A higher score has a larger key. Among equal scores, a smaller item index has a larger key. The
    high half of a key is the score: the bits of a float32, read as an integer, sort like the
    numbers if all bits of a negative number are inverted and the sign bit of other numbers is set.
    The low half is 2**32 - 1 minus the item index.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # adding 0 makes -0.0 equal to 0.0
    sign = np.uint32(1 << 31)
    keys = np.where(bits >= sign, ~bits, bits | sign).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= LOW_HALF - np.arange(first, first + scores.shape[1], dtype=np.uint64)
    return keys


def _largest(keys: Array, k: int) -> Array:
    """Return the k largest keys of each row in descending order; `keys` is reordered in place."""
    keys.partition(keys.shape[1] - k, axis=1)
    return np.sort(keys[:, -k:], axis=1)[:, ::-1]
