"""Baselines that score an item by the other items that a user took: co-occurrence and EASE.

The score of item i for user u is the sum over items j of taken[u, j] * weights[j, i]. ``taken``,
[users, items], is 1 for the items of the user's positive rows in training, and also in validation
if a test split that is later in time is measured. ``weights``, [items, items], is fitted on
training rows. Its diagonal is 0, so that the fact that a user took an item does not add to the
item's own score. Each model has one setting, which is chosen on the validation split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from hvdrec.evaluation.retrieval import LOW_HALF, ScoreItems, ScoreUsers

Array = NDArray[Any]
NEIGHBOURS = (20, 50, 100, 200)
"""Numbers of similar items that are tried for co-occurrence."""
L2 = (20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)
"""L2 penalties that are tried for EASE."""
KEPT_BYTES = 2**29
"""Largest memory for the weights of all EASE models that are tried. If they need more, the chosen
models are fitted again."""
LARGEST_CATALOGUE = 10_000
"""Largest number of items for which EASE is fitted by default."""
BYTES_PER_PAIR = 16
"""Memory for each pair of items when EASE is fitted: counts and weights in float32, the inverse in
float64."""
BLOCK = 8_000_000
"""Number of products, or of pairs of items, in memory at a time."""
MIRRORED = 1024
"""Number of rows of the symmetric inverse that are copied to the other triangle at a time."""


@dataclass(frozen=True)
class ItemItemModel:
    """A linear model over the items that a user took.

    Attributes:
        taken: 1 for each item that a user took, sparse CSR matrix, float32 [users, items].
        weights: Weight of each taken item (row) for each scored item (column), dense or sparse CSC
            matrix, float32 [items, items].
    """

    taken: Any
    weights: Any

    def score_items(self, users: Array) -> ScoreItems:
        """Return a function for `rank_scores` that computes the scores of users block by block."""
        chosen = self.taken[users]

        def score_block(first: int, last: int) -> ScoreUsers:
            weights = self.weights[:, first:last]

            def score_users(start: int, stop: int) -> Array:
                scores = chosen[start:stop] @ weights
                return np.asarray(scores.toarray() if sparse.issparse(scores) else scores)

            return score_users

        return score_block

    def scores(self, user: Array, item: Array) -> Array:
        """Return the scores of n pairs of user and item index, float64 [n].

        The scores are not probabilities.
        """
        sizes = np.diff(self.taken.indptr)[user]
        scores = np.zeros(len(user))
        by_item = self.weights.T.tocsr() if sparse.issparse(self.weights) else None
        for run in runs(sizes, BLOCK):
            taken = self.taken[user[run]]
            if by_item is not None:
                sums = taken.multiply(by_item[item[run]]).sum(axis=1)
                scores[run] = np.asarray(sums, dtype=np.float64).reshape(-1)
            else:
                row = np.repeat(np.arange(len(item[run])), sizes[run])
                each = self.weights[taken.indices, item[run][row]]
                scores[run] = np.bincount(row, each, minlength=len(item[run]))
        return scores


Measure = Callable[[ItemItemModel], Mapping[str, float]]
"""Function that returns name -> value of the metrics of a model."""


@dataclass(frozen=True)
class Family:
    """A baseline with a setting that is still to be chosen.

    Attributes:
        name: Name of the baseline.
        setting: Name of the setting.
        values: Values to try.
        fit: Function that returns the model for a value.
    """

    name: str
    setting: str
    values: tuple[float, ...]
    fit: Callable[[float], ItemItemModel]


def cooccurrence(taken: Any, values: Sequence[int] = NEIGHBOURS) -> Family:
    """Return the co-occurrence baseline, in which each item has weights for its k nearest items.

    A weight is the cosine of two items, n_ij / sqrt(n_i * n_j), where n_ij users took both items,
    n_i took i and n_j took j (Sarwar et al., "Item-based collaborative filtering recommendation
    algorithms", WWW 2001). The score of an item is the sum of its weights for the items that the
    user took (Deshpande and Karypis, "Item-based top-N recommendation algorithms", TOIS 2004).
    Among equally similar items, those with the smaller index are taken. `values` lists the k
    to try.
    """
    row, column, cosine, rank = _neighbours(taken, max(values))

    def fit(k: float) -> ItemItemModel:
        near = rank < k
        shape = (taken.shape[1], taken.shape[1])
        return ItemItemModel(
            taken, sparse.csc_matrix((cosine[near], (row[near], column[near])), shape=shape)
        )

    return Family("cooccurrence", "neighbours", tuple(values), fit)


def ease(taken: Any, values: Sequence[float] = L2) -> Family:
    """Return the EASE baseline: a linear regression of each item on the user's other items.

    The weights minimize ||taken - taken @ weights||^2 + l2 ||weights||^2 with a zero diagonal. The
    solution has a closed form. With P = (taken' taken + l2 I)^-1, it is
    weights[j, i] = -P[j, i] / P[i, i] for j != i (Steck, "Embarrassingly shallow autoencoders for
    sparse data", WWW 2019). Time grows with items^3, memory with items^2 (see `ease_bytes`).
    """
    both = (taken.T @ taken).toarray()

    def fit(l2: float) -> ItemItemModel:
        return ItemItemModel(taken, linear_weights(both, l2))

    # The chosen models are used again after the choice. Fitting one takes seconds.
    are_kept = len(values) * both.size * np.dtype(np.float32).itemsize <= KEPT_BYTES
    return Family("ease", "l2", tuple(values), cache(fit) if are_kept else fit)


def linear_weights(both: Array, penalty: float | Array) -> Array:
    """Return the EASE weights for P = (both + diag(penalty))^-1.

    Args:
        both: For each pair of items, the number (or total weight) of users who took both,
            [items, items].
        penalty: L2 penalty; a number, or one for each item, float64 [items].

    Returns:
        -P / diag(P), with 0 on the diagonal, float32 [items, items].
    """
    inverse = both.astype(np.float64, order="F")
    inverse[np.diag_indices_from(inverse)] += penalty
    _invert(inverse)
    weights = np.empty(inverse.shape, dtype=np.float32)
    np.divide(inverse, -np.diag(inverse), out=weights, casting="same_kind")
    np.fill_diagonal(weights, 0)
    return weights


def ease_bytes(items: int) -> int:
    """Return the memory in bytes that is needed to fit EASE."""
    return BYTES_PER_PAIR * items**2


def choose(
    family: Family, by: Mapping[str, str], measures: Mapping[str, Measure]
) -> dict[str, dict[str, float]]:
    """Choose the best value of a baseline's setting, separately for each group of metrics.

    The groups are ``ranking``, ``retrieval`` and ``events``.

    NaN is worse than any number. If two values are equally good, the first is chosen.

    Args:
        family: The baseline.
        by: Group -> name of the metric that decides; higher is better.
        measures: Group -> function that measures a model.

    Returns:
        Group -> two entries: name of the setting -> its chosen value, and name of the deciding
        metric -> its value.
    """

    def measure(value: float) -> dict[str, float]:
        model = family.fit(value)
        return {group: float(measures[group](model)[metric]) for group, metric in by.items()}

    tried = [measure(value) for value in family.values]
    chosen = {}
    for group, metric in by.items():
        values = np.array([metrics[group] for metrics in tried])
        best = int(np.argmax(np.where(np.isnan(values), -np.inf, values)))
        chosen[group] = {family.setting: family.values[best], metric: float(values[best])}
    return chosen


def runs(sizes: Array, most: int) -> Iterator[slice]:
    """Cut a sequence into runs whose sizes, without the first, sum to less than `most`."""
    total = np.cumsum(sizes)
    ends = np.flatnonzero(np.diff(total // most, append=-1)) + 1
    start = 0
    for end in ends.tolist():
        yield slice(start, end)
        start = end


def _neighbours(taken: Any, most: int) -> tuple[Array, Array, Array, Array]:
    """Return the `most` most similar items of each item, as four arrays [n].

    The arrays have an entry for each pair: the similar item, the item, their cosine, and the rank,
    from 0, of the similar item among the items similar to the item.
    """
    by_item = taken.tocsc()
    scale = np.sqrt(np.maximum(np.diff(by_item.indptr), 1))
    others = taken.T.tocsr()
    # The column of an item in `pairs` has at most one entry for each item of each user who took it.
    sizes = np.minimum(others @ np.diff(taken.indptr).astype(np.float64), taken.shape[1])
    empty = np.empty(0, dtype=np.int64)
    blocks: list[tuple[Array, ...]] = [(empty, empty, empty.astype(np.float32), empty)]
    for run in runs(sizes, BLOCK):
        pairs = (others @ by_item[:, run]).tocsc()
        pairs.sort_indices()
        column = np.repeat(np.arange(run.start, run.stop), np.diff(pairs.indptr))
        row, apart = pairs.indices, pairs.indices != column
        row, column, both = row[apart], column[apart], pairs.data[apart]
        cosine = (both / (scale[row] * scale[column])).astype(np.float32)
        # The bits of positive floats sort like the numbers. The sort is stable, so items with equal
        # cosines stay in ascending order of their index.
        keys = (column.astype(np.uint64) << np.uint64(32)) | (LOW_HALF - cosine.view(np.uint32))
        order = np.argsort(keys, kind="stable")
        row, column, cosine = row[order], column[order], cosine[order]
        rank = np.arange(len(column)) - np.searchsorted(column, column)
        near = rank < most
        blocks.append((row[near], column[near], cosine[near], rank[near]))
    row, column, cosine, rank = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return row, column, cosine, rank


def _invert(matrix: Array) -> None:
    """Invert a symmetric positive definite float64 matrix in Fortran order, in place."""
    from scipy.linalg import lapack  # not at the top: slow to import, and only one rank needs it

    factor, failed = lapack.dpotrf(matrix, lower=1, overwrite_a=1)
    inverse, failed_too = lapack.dpotri(factor, lower=1, overwrite_c=1)
    if failed or failed_too or not np.shares_memory(inverse, matrix):
        raise ArithmeticError(f"cannot invert a matrix {matrix.shape}: {failed}, {failed_too}")
    # LAPACK fills only the lower triangle.
    for start in range(0, len(matrix), MIRRORED):
        stop = start + MIRRORED
        corner = np.tril(matrix[start:stop, start:stop])
        matrix[start:stop, start:stop] = corner + np.tril(corner, -1).T
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
