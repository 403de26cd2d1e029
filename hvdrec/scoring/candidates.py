"""Retrieve the items to rank for a user, and build recommendations from their scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hvdrec.scoring.array_files import Array
from hvdrec.scoring.bundle import BundleInfo
from hvdrec.scoring.diversity import diversified
from hvdrec.scoring.embedder import Embedder
from hvdrec.scoring.errors import invalid_request
from hvdrec.scoring.exact import ExactSearch
from hvdrec.scoring.graph_inputs import as_list
from hvdrec.scoring.hnsw import INDEX, HnswSearch
from hvdrec.scoring.item_data import ItemData

Key = str | int
CandidateSource = Literal["stored", "features", "trending"]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A recommended item."""

    item: Key
    """Key of the item."""
    score: float
    """Probability of a positive label that the ranker predicts for the item in this scene."""
    retrieval_score: float
    """Score that selected the item for ranking: the inner product of the user's and the item's
    embedding, the popularity if the model has no retrieval, or the trending count if ``source`` is
    "trending"."""
    title: str | None = None
    """Title of the item; None if the bundle has none."""
    source: CandidateSource = "stored"
    """How the items were selected: "stored" by the user's stored embedding, "features" by an
    embedding computed from raw features, "trending" by trending counts, since nothing is known
    about the user."""


@dataclass(frozen=True)
class Candidates:
    """Items that were retrieved for a user and will be ranked.

    No item occurs twice. If `source` is "trending", the items are sorted by trending count, the
    largest first; otherwise they are sorted by key.
    """

    user_embedding: Array
    """Embedding of the user, float32 [1, user_width]."""
    rows: Array
    """Row of each item in the bundle's arrays, int64 [n]."""
    retrieval_scores: Array
    """`Recommendation.retrieval_score` of each item [n]."""
    source: CandidateSource
    """`Recommendation.source` of all items."""

    def ordered(self, scores: Array, vectors: Array, k: int, diversity: float) -> Array:
        """Return the indices of the k best candidates, best first, int64 [min(k, n)].

        Args:
            scores: Score of each candidate by the ranker [n].
            vectors: Embedding of each candidate, float32 [n, width].
            k: Number of candidates to return.
            diversity: Weight of the similarity between candidates; see `diversified`.
        """
        is_trending = self.source == "trending"
        if diversity:
            counts = self.retrieval_scores
            relevance = counts / max(1, counts[0]) if is_trending else scores
            return diversified(relevance, vectors, k, diversity)
        if is_trending:
            return np.arange(min(k, len(self.rows)))
        # Candidates are sorted by key, so a stable sort leaves equal scores in the order of keys.
        return np.argsort(-scores, kind="stable")[:k]


class CandidateRetriever:
    """Retrieves candidates from a bundle's items; safe to share between threads."""

    def __init__(self, info: BundleInfo, users: Embedder, items: Embedder) -> None:
        """Open the item data of a bundle and its index for approximate retrieval, if it has one."""
        self._users, self._items = users, items
        self._width = info.retrieval_width
        self.item_data = ItemData(info, len(users.store), len(items.store))
        exact = ExactSearch(items.store.embeddings, items.store.scales)
        self._search: ExactSearch | HnswSearch = exact
        if self._width and info.holds(INDEX):
            self._search = HnswSearch(info.path, exact, self._width, stamps=info.stamps)

    def open(self) -> None:
        """Do now what the first requests would wait for: open the index, sort items by counts."""
        if isinstance(self._search, HnswSearch):
            self._search.open()
        self.item_data.order("trending")
        if not self._width:
            self.item_data.order("popularity")

    def retrieve(
        self,
        user: Any,
        count: int,
        *,
        exclude: Collection[Key] = (),
        allowed: Mapping[str, Collection[Any]] | None = None,
        skip_seen: bool = False,
    ) -> Candidates:
        """Return at most ``count`` items for a user; for the arguments see `Scorer.recommend`."""
        excluded = self._rows(exclude)
        kept = self.item_data.allowed(allowed)
        if not isinstance(skip_seen, bool | np.bool_):
            raise invalid_request("skip_seen", skip_seen, "must be True or False")
        embedding, source = self._users.embed_one(user)
        if skip_seen:
            seen = self.item_data.seen(self._users.row(user))
            excluded = np.concatenate([excluded, seen]) if seen.size else excluded
        if not np.isfinite(embedding).all():
            problem = "its embedding is not finite"
            raise invalid_request("user", user, problem, "check its numeric features")
        if source == "nothing":
            rows = self.item_data.first("trending", count, excluded, kept)
            counts = self.item_data.counts("trending")[rows]
            return Candidates(embedding, rows, counts, "trending")
        if self._width:
            query = embedding[0, : self._width]
            rows, scores = self._search.search(query, count, excluded, kept)
        else:
            rows = np.sort(self.item_data.first("popularity", count, excluded, kept))
            scores = self.item_data.counts("popularity")[rows]
        return Candidates(embedding, rows, scores, source)

    def recommendations(
        self, candidates: Candidates, scores: Array, order: Array
    ) -> list[Recommendation]:
        """Build recommendations in a given order.

        Args:
            candidates: n candidates.
            scores: Score of each candidate by the ranker, float32 [n].
            order: Indices of the candidates to recommend, int64 [at most n].
        """
        rows = candidates.rows[order]
        columns = (
            self._items.store.keys_of(rows),
            scores[order].tolist(),
            candidates.retrieval_scores[order].astype(float).tolist(),
            self.item_data.titles[rows],
        )
        source = candidates.source
        return [Recommendation(*values, source) for values in zip(*columns, strict=True)]

    def _rows(self, exclude: Collection[Key]) -> Array:
        """Return the item rows of the keys to exclude; keys that are not stored are skipped."""
        keys = as_list(list(exclude) if isinstance(exclude, Set) else exclude, "exclude")
        rows = self._items.store.cached_rows(keys)
        if rows is None:
            rows = self._items.store.rows([self._items.key(key, "exclude") for key in keys])
        return rows[rows >= 0]
