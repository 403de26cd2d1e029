"""From a user to the items that are ranked, and from their scores to an answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import BundleInfo
from hvdrec.scoring.diversity import diversified
from hvdrec.scoring.embedder import Embedder
from hvdrec.scoring.errors import invalid_request
from hvdrec.scoring.exact import ExactSearch, ItemSearch
from hvdrec.scoring.graph_inputs import listed
from hvdrec.scoring.hnsw import INDEX, HnswSearch
from hvdrec.scoring.item_data import ItemData

Array = NDArray[Any]
Key = str | int
Source = Literal["stored", "features", "trending"]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A ranked item."""

    item: Key
    """Its key."""
    score: float
    """The ranker's probability in the scene."""
    retrieval_score: float
    """What it was retrieved by: the inner product of the embeddings; the item's popularity where
    no tower was trained for that; for "trending" how often it was liked of late."""
    title: str | None = None
    """What it is called, where the bundle tells."""
    source: Source = "stored"
    """What the answer is made of: the user's stored embedding; the user's features, through the
    tower now; or, where nothing is known of the user, what is trending."""


@dataclass(frozen=True)
class Candidates:
    """Items to rank for a user: rows int64 [n], each once, and what they were retrieved by [n].

    Trending ones come in their order, others in the order of keys.
    """

    user_embedding: Array
    rows: Array
    found_by: Array
    source: Source

    def ordered(self, scores: Array, vectors: Array, k: int, diversity: float) -> Array:
        """Return the places of the k best, best first; scores [n], vectors float32 [n, width]."""
        is_trending = self.source == "trending"
        if diversity:
            relevance = self.found_by / max(1, self.found_by[0]) if is_trending else scores
            return diversified(relevance, vectors, k, diversity)
        if is_trending:
            return np.arange(min(k, len(self.rows)))
        # Places are in the order of keys: equal scores are told apart by key.
        return np.argsort(-scores, kind="stable")[:k]


class CandidateRetriever:
    """Chooses candidates from a bundle's catalogue; safe to share between threads."""

    def __init__(self, info: BundleInfo, users: Embedder, items: Embedder) -> None:
        self._users, self._items = users, items
        self._width = info.retrieval_width
        self.catalogue = ItemData(info, len(users.store), len(items.store))
        exact = ExactSearch(items.store.embeddings, items.store.scales)
        self.search: ItemSearch = exact
        if self._width and info.holds(INDEX):
            self.search = HnswSearch(info.path, exact, self._width, stamps=info.stamps)

    def open(self) -> None:
        """Open what the first requests would wait for."""
        self.search.open()
        self.catalogue.order("trending")
        if not self._width:
            self.catalogue.order("popularity")

    def candidates(
        self,
        user: Any,
        count: int,
        *,
        exclude: Collection[Key] = (),
        allowed: Mapping[str, Collection[Any]] | None = None,
        skip_seen: bool = False,
    ) -> Candidates:
        """Return at most ``count`` items for a user, as `Scorer.recommend` tells."""
        excluded = self._rows(exclude)
        kept = self.catalogue.allowed(allowed)
        if not isinstance(skip_seen, bool | np.bool_):
            raise invalid_request("skip_seen", skip_seen, "must be True or False")
        embedding, made_of = self._users.embed_one(user)
        if skip_seen:
            seen = self.catalogue.seen(self._users.row(user))
            excluded = np.concatenate([excluded, seen]) if seen.size else excluded
        if not np.isfinite(embedding).all():
            raise invalid_request(
                "user", user, "its embedding is not finite", "check its numeric features"
            )
        if made_of == "nothing":
            rows = self.catalogue.first("trending", count, excluded, kept)
            return Candidates(embedding, rows, self.catalogue.trending()[rows], "trending")
        if self._width:
            query = embedding[0, : self._width]
            rows, found_by = self.search.search(query, count, excluded, kept)
        else:
            rows = np.sort(self.catalogue.first("popularity", count, excluded, kept))
            found_by = self.catalogue.popularity()[rows]
        return Candidates(embedding, rows, found_by, made_of)

    def answer(self, candidates: Candidates, scores: Array, order: Array) -> list[Recommendation]:
        """Return the candidates at some places, with their scores [n] of all places."""
        rows = candidates.rows[order]
        columns = (
            self._items.store.keys_of(rows),
            scores[order].tolist(),
            candidates.found_by[order].astype(float).tolist(),
            self.catalogue.titles.of(rows),
        )
        source = candidates.source
        return [Recommendation(*values, source) for values in zip(*columns, strict=True)]

    def _rows(self, exclude: Collection[Key]) -> Array:
        """Return the rows of keys; those that are not stored are nowhere anyway."""
        keys = listed(list(exclude) if isinstance(exclude, Set) else exclude, "exclude")
        rows = self._items.store.cached_rows(keys)
        if rows is None:
            rows = self._items.store.rows([self._items.key(key, "exclude") for key in keys])
        return rows[rows >= 0]
