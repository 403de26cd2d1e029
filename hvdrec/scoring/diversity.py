"""Diverse recommendations by maximal marginal relevance."""

from __future__ import annotations

import numpy as np

from hvdrec.scoring.array_files import Array


def diversified(relevance: Array, vectors: Array, k: int, diversity: float) -> Array:
    """Choose k candidates that are relevant and differ from each other.

    The first step chooses the most relevant candidate. Each later step chooses the one with the
    largest ``(1 - diversity) * relevance - diversity * similarity``, where similarity is the
    largest cosine between the candidate's vector and the vector of any candidate chosen before. Of
    candidates with equal values, the one with the smallest index is chosen. See Carbonell and
    Goldstein: The Use of MMR, Diversity-Based Reranking for Reordering Documents and Producing
    Summaries, 1998.

    Args:
        relevance: Relevance of the candidates [n].
        vectors: Embeddings of the candidates, float32 [n, width]. The similarity of a zero vector
            to any other is 0.
        k: Number of candidates to choose.
        diversity: Weight of the similarity, in [0, 1).

    Returns:
        Indices of the chosen candidates in the order in which they were chosen, int64 [min(k, n)].
    """
    count = min(k, len(relevance))
    chosen = np.empty(count, dtype=np.int64)
    if not count:
        return chosen
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    share = np.multiply(relevance, 1 - diversity, dtype=np.float64)
    marginal = np.array(relevance, dtype=np.float64)
    similarity = np.full(len(relevance), -np.inf)
    for step in range(count):
        best = chosen[step] = int(np.argmax(marginal))
        share[best] = -np.inf
        np.maximum(similarity, units @ units[best], out=similarity)
        marginal = share - diversity * similarity
    return chosen
