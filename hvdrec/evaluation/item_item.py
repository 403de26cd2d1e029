"""Baselines that score an item by the other items that a user took: co-occurrence and EASE.

Both score user u and item i by sum_j taken[u, j] * weights[j, i]. `taken` [users, items] holds 1
for the positives of the rows known of a user: those of training, and of validation where a later
test split is measured. `weights` [items, items], fitted on training rows, has a zero diagonal, so a
row's own interaction adds nothing to its score, even for a training row. Each model has one
setting, which is chosen on validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from hvdrec.evaluation.retrieval import LOW_HALF, ScoreItems, ScoreUsers

Array = NDArray[Any]
NEIGHBOURS = (20, 50, 100, 200)
"""Numbers of similar items to choose from."""
L2 = (20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)
"""L2 penalties of EASE to choose from."""
LARGEST_CATALOGUE = 10_000
"""Largest catalogue for which EASE is fitted by default, in items."""
BYTES_PER_PAIR = 16
"""Memory of fitting EASE: counts and weights in float32, the inverse in float64."""
BLOCK = 8_000_000
"""Products, or pairs of items, in memory at a time."""
MIRRORED = 1024
"""Rows of the inverse that are mirrored at a time."""


@dataclass(frozen=True)
class ItemItemModel:
    """A linear model over the items that a user took.

    Attributes:
        taken: Sparse CSR, float32 [users, items].
        weights: float32 [items, items], dense or sparse CSC.
    """

    taken: Any
    weights: Any

    def score_items(self, users: Array) -> ScoreItems:
        """Return the scores of users, int64 [u], block by block, as `rank_scores` takes them."""
        chosen = self.taken[users]

        def score_block(first: int, last: int) -> ScoreUsers:
            weights = self.weights[:, first:last]

            def score_users(start: int, stop: int) -> Array:
                scores = chosen[start:stop] @ weights
                return np.asarray(scores.toarray() if sparse.issparse(scores) else scores)

            return score_users

        return score_block

    def scores(self, user: Array, item: Array) -> Array:
        """Return the scores of rows of user and item indices, float64 [n]; not probabilities."""
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
"""Returns a model's metrics by name."""


@dataclass(frozen=True)
class Family:
    """Item-item models that differ in one setting.

    Attributes:
        name: Name of the baseline.
        setting: Name of the setting.
        values: Values to choose from.
        fit: Returns the model for a value.
    """

    name: str
    setting: str
    values: tuple[float, ...]
    fit: Callable[[float], ItemItemModel]


def cooccurrence(taken: Any, values: Sequence[int] = NEIGHBOURS) -> Family:
    """Return co-occurrence models, whose weights are the cosines of the k most similar items.

    The cosine of items i and j is the number of users who took both, divided by the root of the
    product of the numbers of users who took each (Sarwar et al., "Item-based collaborative
    filtering recommendation algorithms", WWW 2001; sums over sets of items as in Deshpande and
    Karypis, "Item-based top-N recommendation algorithms", TOIS 2004). Ties go to the smaller item
    index.
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
    """Return EASE models: each item regressed on a user's other items, in closed form.

    The weights minimize ||taken - taken @ weights||^2 + l2 ||weights||^2 with a zero diagonal: with
    P = (taken' taken + l2 I)^-1, weights[j, i] = -P[j, i] / P[i, i] for j != i (Steck,
    "Embarrassingly shallow autoencoders for sparse data", WWW 2019). Time grows with items^3,
    memory with items^2 (see `ease_bytes`).
    """
    both = (taken.T @ taken).toarray()

    def fit(l2: float) -> ItemItemModel:
        return ItemItemModel(taken, linear_weights(both, l2))

    return Family("ease", "l2", tuple(values), fit)


def linear_weights(both: Array, penalty: float | Array) -> Array:
    """Return the EASE weights for P = (both + diag(penalty))^-1.

    Args:
        both: Number (or total weight) of users who took both items, [items, items].
        penalty: One L2 penalty, or one per item, float64 [items].

    Returns:
        -P / diag(P) off the diagonal and 0 on it, float32 [items, items].
    """
    inverse = both.astype(np.float64, order="F")
    inverse[np.diag_indices_from(inverse)] += penalty
    _invert(inverse)
    weights = np.empty(inverse.shape, dtype=np.float32)
    np.divide(inverse, -np.diag(inverse), out=weights, casting="same_kind")
    np.fill_diagonal(weights, 0)
    return weights


def ease_bytes(items: int) -> int:
    """Return the memory that fitting EASE needs, in bytes."""
    return BYTES_PER_PAIR * items**2


def choose(
    family: Family, by: Mapping[str, str], measures: Mapping[str, Measure]
) -> dict[str, dict[str, float]]:
    """Choose the best setting for each group of metrics, ``ranking`` or ``retrieval``.

    NaN is worse than any number; the first of equal values wins.

    Args:
        family: The models to choose from.
        by: The metric that decides in each group; higher is better.
        measures: The function that measures a model in each group.

    Returns:
        For each group, the chosen value of the setting and the metric it reached.
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
    """Cut a sequence into runs; the sizes of a run, but for its first, sum to less than `most`."""
    total = np.cumsum(sizes)
    ends = np.flatnonzero(np.diff(total // most, append=-1)) + 1
    start = 0
    for end in ends.tolist():
        yield slice(start, end)
        start = end


def _neighbours(taken: Any, most: int) -> tuple[Array, Array, Array, Array]:
    """Return each item's most similar items: neighbour, item, cosine, rank from 0, each [n]."""
    by_item = taken.tocsc()
    scale = np.sqrt(np.maximum(np.diff(by_item.indptr), 1))
    others = taken.T.tocsr()
    # Upper bound of a column's entries: every user who took the item adds all of their items.
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
        # The bits of positive floats sort like the numbers; a stable sort keeps rows ascending.
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
    from scipy.linalg import lapack  # slow to import; only the rank that fits needs it

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
