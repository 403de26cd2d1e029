"""Baselines that judge an item by the items that a user took: co-occurrence and EASE.

Both score user u and item i by sum_j taken[u, j] * weights[j, i]. `taken` [users, items] holds 1
for the positives of the training rows, `weights` [items, items] has a diagonal of zeros: an item
says nothing for itself. So a row's own interaction adds nothing to the row's score, even if it is
one of training. Each of them has one setting, to be chosen on validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from hvdrec.evaluation.retrieval import LOW_HALF, Columns

Array = NDArray[Any]
NEIGHBOURS = (20, 50, 100, 200)
"""How many of the most similar items count."""
L2 = (20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)
"""EASE's penalties."""
LARGEST_CATALOGUE = 10_000
"""Items up to which EASE is fitted."""
BYTES_PER_PAIR = 16
"""Memory that fitting EASE takes: counts and weights in float32, an inverse in float64."""
BLOCK = 8_000_000
"""Products, or pairs of items, held at a time."""
MIRRORED = 1024


@dataclass(frozen=True)
class ItemItem:
    """An item-item model.

    taken: sparse float32 [users, items], by rows; weights: [items, items] float32, dense, or sparse
    by columns.
    """

    taken: Any
    weights: Any

    def scores_of(self, users: Array) -> Callable[[int, int], Columns]:
        """Return the scores of users by items, block by block, as `rank_scores` takes them."""
        chosen = self.taken[users]

        def of_items(first: int, last: int) -> Columns:
            weights = self.weights[:, first:last]

            def of_users(start: int, stop: int) -> Array:
                found = chosen[start:stop] @ weights
                return np.asarray(found.toarray() if sparse.issparse(found) else found)

            return of_users

        return of_items

    def scores(self, user: Array, item: Array) -> Array:
        """Return the scores of rows of user and item indices, float64 [n]; no probabilities."""
        sizes = np.diff(self.taken.indptr)[user]
        found = np.zeros(len(user))
        by_item = self.weights.T.tocsr() if sparse.issparse(self.weights) else None
        for run in runs(sizes, BLOCK):
            theirs = self.taken[user[run]]
            if by_item is not None:
                sums = theirs.multiply(by_item[item[run]]).sum(axis=1)
                found[run] = np.asarray(sums, dtype=np.float64).reshape(-1)
            else:
                row = np.repeat(np.arange(len(item[run])), sizes[run])
                each = self.weights[theirs.indices, item[run][row]]
                found[run] = np.bincount(row, each, minlength=len(item[run]))
        return found


Measure = Callable[[ItemItem], Mapping[str, float]]
"""Gives a model's metrics by name."""


@dataclass(frozen=True)
class Family:
    """Models with one setting.

    setting: its name; values: those to choose from; fit: gives the model of a value.
    """

    name: str
    setting: str
    values: tuple[float, ...]
    fit: Callable[[float], ItemItem]


def taken_items(user: Array, item: Array, users: int, items: int) -> Any:
    """Return 1 where a user took an item, sparse float32 [users, items]; pairs may recur."""
    ones = np.ones(len(user), dtype=np.float32)
    found = sparse.csr_matrix((ones, (user, item)), shape=(users, items))
    found.sum_duplicates()
    found.data[:] = 1
    return found


def cooccurrence(taken: Any, values: Sequence[int] = NEIGHBOURS) -> Family:
    """Return co-occurrence: cosines between items, of the k most similar ones.

    The cosine of items i and j is the number of users who took both, over the root of the product
    of the numbers of users who took each (Sarwar et al., "Item-based collaborative filtering
    recommendation algorithms", WWW 2001; sums over sets of items as in Deshpande and Karypis,
    "Item-based top-N recommendation algorithms", TOIS 2004). An item's score is the sum of its
    cosines with those of its k most similar items that the user took. Equal cosines are told apart
    by item index.
    """
    row, column, cosine, place = _neighbours(taken, max(values))

    def fit(k: float) -> ItemItem:
        near = place < k
        shape = (taken.shape[1], taken.shape[1])
        return ItemItem(
            taken, sparse.csc_matrix((cosine[near], (row[near], column[near])), shape=shape)
        )

    return Family("cooccurrence", "neighbours", tuple(values), fit)


def ease(taken: Any, values: Sequence[float] = L2) -> Family:
    """Return EASE: the linear model of a user's items by the user's other items, in closed form.

    weights minimize ||taken - taken @ weights||^2 + l2 ||weights||^2 under a diagonal of zeros:
    with P = (taken' taken + l2 I)^-1, weights[j, i] = -P[j, i] / P[i, i] for j != i (Steck,
    "Embarrassingly shallow autoencoders for sparse data", WWW 2019). Time grows with items^3,
    memory with items^2: `ease_bytes`.
    """
    both = (taken.T @ taken).toarray()

    def fit(l2: float) -> ItemItem:
        return ItemItem(taken, linear_weights(both, l2))

    return Family("ease", "l2", tuple(values), fit)


def linear_weights(both: Array, penalty: float | Array) -> Array:
    """Return float32 [items, items]: -P / diag(P) off the diagonal, 0 on it.

    P = (both + diag(penalty))^-1; both: [items, items], how often two items were taken together,
    weighed or not; penalty: of all items, or float64 [items].
    """
    inverse = both.astype(np.float64, order="F")
    inverse[np.diag_indices_from(inverse)] += penalty
    _invert(inverse)
    weights = np.empty(inverse.shape, dtype=np.float32)
    np.divide(inverse, -np.diag(inverse), out=weights, casting="same_kind")
    np.fill_diagonal(weights, 0)
    return weights


def ease_bytes(items: int) -> int:
    """Return the memory that fitting EASE takes."""
    return BYTES_PER_PAIR * items**2


def choose(
    family: Family, by: Mapping[str, str], measures: Mapping[str, Measure]
) -> dict[str, dict[str, float]]:
    """Return the best setting for each kind: {kind: {setting: its value, metric: its value}}.

    by: kind -> the metric that decides, higher is better; measures: kind -> what gives its metrics.
    NaN is worse than any number; of equal ones the first is taken.
    """
    tried = [_tried(family.fit(value), by, measures) for value in family.values]
    chosen = {}
    for kind, metric in by.items():
        qualities = np.array([found[kind] for found in tried])
        at = int(np.argmax(np.where(np.isnan(qualities), -np.inf, qualities)))
        chosen[kind] = {family.setting: family.values[at], metric: float(qualities[at])}
    return chosen


def runs(sizes: Array, most: int) -> Iterator[slice]:
    """Cut a sequence into runs: the sizes of each, but for its first, sum to less than `most`."""
    total = np.cumsum(sizes)
    ends = np.flatnonzero(np.diff(total // most, append=-1)) + 1
    start = 0
    for end in ends.tolist():
        yield slice(start, end)
        start = end


def _tried(
    model: ItemItem, by: Mapping[str, str], measures: Mapping[str, Measure]
) -> dict[str, float]:
    return {kind: float(measures[kind](model)[metric]) for kind, metric in by.items()}


def _neighbours(taken: Any, most: int) -> tuple[Array, Array, Array, Array]:
    """Return each item's most similar items: (neighbour, item, cosine, place from 0), four [n]."""
    by_item = taken.tocsc()
    scale = np.sqrt(np.maximum(np.diff(by_item.indptr), 1))
    others = taken.T.tocsr()
    # Each user who took an item brings all of the user's items: no column can hold more.
    sizes = np.minimum(others @ np.diff(taken.indptr).astype(np.float64), taken.shape[1])
    empty = np.empty(0, dtype=np.int64)
    found: list[tuple[Array, ...]] = [(empty, empty, empty.astype(np.float32), empty)]
    for run in runs(sizes, BLOCK):
        pairs = (others @ by_item[:, run]).tocsc()
        pairs.sort_indices()
        column = np.repeat(np.arange(run.start, run.stop), np.diff(pairs.indptr))
        row, apart = pairs.indices, pairs.indices != column
        row, column, both = row[apart], column[apart], pairs.data[apart]
        cosine = (both / (scale[row] * scale[column])).astype(np.float32)
        # The bits of numbers above zero sort as the numbers do; rows ascend already.
        keys = (column.astype(np.uint64) << np.uint64(32)) | (LOW_HALF - cosine.view(np.uint32))
        order = np.argsort(keys, kind="stable")
        row, column, cosine = row[order], column[order], cosine[order]
        place = np.arange(len(column)) - np.searchsorted(column, column)
        near = place < most
        found.append((row[near], column[near], cosine[near], place[near]))
    row, column, cosine, place = (np.concatenate(part) for part in zip(*found, strict=True))
    return row, column, cosine, place


def _invert(matrix: Array) -> None:
    """Invert a symmetric, positive definite float64 matrix in Fortran's order, in place."""
    from scipy.linalg import lapack  # slow to import, and every rank would wait for it

    factor, failed = lapack.dpotrf(matrix, lower=1, overwrite_a=1)
    inverse, failed_too = lapack.dpotri(factor, lower=1, overwrite_c=1)
    if failed or failed_too or not np.shares_memory(inverse, matrix):
        raise ArithmeticError(f"no inverse of a matrix {matrix.shape}: {failed}, {failed_too}")
    # The lower half is the inverse's; the upper one is left as it was.
    for start in range(0, len(matrix), MIRRORED):
        stop = start + MIRRORED
        corner = np.tril(matrix[start:stop, start:stop])
        matrix[start:stop, start:stop] = corner + np.tril(corner, -1).T
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
