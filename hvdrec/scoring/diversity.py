"""Answers whose items differ: maximal marginal relevance."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def diversified(relevance: Array, vectors: Array, k: int, diversity: float) -> Array:
    """Return the places of k candidates in the order in which they are chosen, int64 [min(k, n)].

    Each time the candidate is taken that has the largest
    ``(1 - diversity) * relevance - diversity * similarity``, where similarity is the largest
    cosine of its vector with those taken before (Carbonell and Goldstein: The Use of MMR,
    Diversity-Based Reranking for Reordering Documents and Producing Summaries, 1998). The first
    one is the most relevant. Of equals the first is taken.

    relevance: [n]; vectors: float32 [n, width], where one without a direction resembles nothing;
    diversity: in [0, 1).
    """
    count = min(k, len(relevance))
    chosen = np.empty(count, dtype=np.int64)
    if not count:
        return chosen
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    share = np.multiply(relevance, 1 - diversity, dtype=np.float64)
    left = np.array(relevance, dtype=np.float64)
    similarity = np.full(len(relevance), -np.inf)
    for place in range(count):
        best = chosen[place] = int(np.argmax(left))
        share[best] = -np.inf
        np.maximum(similarity, units @ units[best], out=similarity)
        left = share - diversity * similarity
    return chosen
