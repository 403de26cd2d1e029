"""Facts about the lists that a model retrieves: coverage, popularity, novelty and diversity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class ListFacts:
    """Facts about n lists of k items.

    Attributes:
        coverage: Share of the catalogue that is in at least one list.
        popularity: Mean, over the listed items, of the share of users who took the item in
            training.
        novelty: Mean of -log2 of this share, in bits. An item that nobody took counts as taken by
            one user.
        diversity: Mean of 1 - cosine over the pairs of items in a list.
        concentration: Gini coefficient of the numbers of lists that contain each item; 0 if they
            are equal for all items.
    """

    coverage: float
    popularity: float
    novelty: float
    diversity: float
    concentration: float


def list_facts(lists: Array, count: Array, users: int, vectors: Array) -> ListFacts:
    """Describe lists.

    Args:
        lists: Items of each list, int64 [n, k]; a list with fewer items ends with -1.
        count: Number of positive training rows of each item [items].
        users: Number of users.
        vectors: Vector of each item [items, width].
    """
    shown = lists[lists >= 0]
    share = np.maximum(count[shown], 1) / max(users, 1)
    times = np.sort(np.bincount(shown, minlength=len(count))).astype(np.float64)
    rank = np.arange(1, len(times) + 1)
    total = times.sum()
    gini = float((2 * rank - len(times) - 1) @ times / (len(times) * total)) if total else np.nan
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1)
    distances = []
    for items in lists:
        own = unit[items[items >= 0]]
        if len(own) > 1:
            cosines = own @ own.T
            pairs = len(own) * (len(own) - 1)
            distances.append(1 - (cosines.sum() - np.trace(cosines)) / pairs)
    return ListFacts(
        float((times > 0).mean()),
        float((count[shown] / max(users, 1)).mean()) if len(shown) else np.nan,
        float(-np.log2(share).mean()) if len(shown) else np.nan,
        float(np.mean(distances)) if distances else np.nan,
        gini,
    )
