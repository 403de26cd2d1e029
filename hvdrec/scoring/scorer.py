"""The public class `Scorer`. A service opens a bundle once and shares the scorer among threads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import update_wrapper
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from hvdrec.scoring.array_files import Array
from hvdrec.scoring.batching import (
    Entries,
    Raw,
    Request,
    Scenes,
    checked_request,
    name_invalid,
    require_tasks,
    shared_runs,
)
from hvdrec.scoring.bundle import BundleInfo, Field, check_unchanged, read_bundle
from hvdrec.scoring.candidates import CandidateRetriever, Key, Recommendation
from hvdrec.scoring.embedder import Embedder
from hvdrec.scoring.errors import (
    BundleError,
    RequestError,
    ScoringError,
)
from hvdrec.scoring.explanation import Explainer, Explanation
from hvdrec.scoring.graph_inputs import as_list, check_count, check_share
from hvdrec.scoring.ranking import PairRanker
from hvdrec.scoring.stores import Store
from hvdrec.scoring.trial import try_scorer
from hvdrec.scoring.verify import verify_arrays
from hvdrec.scoring.watch import BundleWatcher, load_unreplaced

Stores = Callable[[BundleInfo], tuple[Store | None, Store | None]]
P = ParamSpec("P")
R = TypeVar("R")


class Scorer:
    """Scores and recommends the items of a bundle; safe to share between threads.

    Callers pass a user or an item as its key, or as a mapping of its raw features, which may
    include the key. For a key that is not stored, the tower computes an embedding with all other
    features missing. The scene is the context of a request: time, place, device, placement.
    Features that are None, NaN or omitted are missing values; a scene field that is omitted takes
    its default. Methods raise `RequestError` for an unknown field or a value of the wrong type.

    >>> scorer = Scorer.load("bundle/")  # doctest: +SKIP
    >>> scorer.score("1", ["1193", "661"], {"hour": 21})  # doctest: +SKIP
    array([0.81, 0.42], dtype=float32)

    Attributes:
        info: Contents of the bundle's manifest.
    """

    def __init__(
        self, info: BundleInfo, threads: int, users: Store | None = None, items: Store | None = None
    ) -> None:
        """Open the graphs and arrays of a bundle. Callers use `load` instead."""
        self.info = info
        self._users = Embedder(info, "user", threads, users)
        self._items = Embedder(info, "item", threads, items)
        self._retriever = CandidateRetriever(info, self._users, self._items)
        self._ranker = PairRanker(info, self._users, self._items, threads)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int = 1,
        verify: bool = True,
        users: Store | None = None,
        items: Store | None = None,
    ) -> Scorer:
        """Open a bundle.

        `warm` or the first request that needs it opens a tower with a large vocabulary.

        Args:
            path: Directory of the bundle.
            threads: Number of threads of one graph run; 1 suits a service with many threads.
            verify: True to compare the checksum of each file and to check the arrays' contents,
                which reads every file once; False to compare only sizes, types and shapes.
            users: Source of the users' embeddings in place of the bundle's own arrays.
            items: Source of the items' embeddings for scoring; retrieval uses the bundle's arrays.

        Raises:
            BundleError: The bundle is missing, damaged or has another format.
            ReplacedError: The bundle was replaced by another one during each of three tries.
        """
        check_count("threads", threads)
        arguments = (Path(path), int(threads), verify, lambda _: (users, items))
        return load_unreplaced(lambda: cls._load(*arguments))

    @classmethod
    def watch(
        cls,
        path: str | Path,
        *,
        interval: float = 1.0,
        threads: int = 1,
        verify: bool = True,
        stores: Stores | None = None,
        on_reload: Callable[[Scorer], object] | None = None,
        on_refused: Callable[[ScoringError], object] | None = None,
    ) -> WatchedScorer:
        """Open a bundle and watch its path; when a new bundle appears there, switch to it.

        To publish a bundle, replace the directory at the path; if the path is a link, point it at
        the new bundle. The new bundle is verified, loaded and tried, then it takes over. If one of
        these steps fails, the error is logged and the old bundle stays in use.

        Args:
            path: Directory of the bundle, or a link to it.
            interval: Seconds between two checks of the path.
            threads: As in `load`.
            verify: As in `load`, for the first bundle and for each reload.
            stores: Function that opens the embedding stores of users and items for a bundle. It is
                called for each new bundle, since every model has its own embeddings.
            on_reload: Called with the new scorer when it has taken over.
            on_refused: Called with the error if a new bundle is refused.

        Raises:
            BundleError: The first bundle is missing, damaged or has another format.
            StoreError: The stores of the first bundle do not answer.
        """
        check_count("threads", threads)

        def load(path: Path) -> Scorer:
            return cls._load(path, int(threads), verify, stores, tries=True)

        return WatchedScorer(
            Path(path), load, interval=interval, on_reload=on_reload, on_refused=on_refused
        )

    @classmethod
    def _load(
        cls, path: Path, threads: int, verify: bool, stores: Stores | None, tries: bool = False
    ) -> Scorer:
        """Open a bundle; raise ReplacedError if another bundle replaces it during the load."""
        info = read_bundle(path, verify=verify)
        users, items = stores(info) if stores else (None, None)
        try:
            scorer = cls(info, threads, users, items)
            if verify:
                verify_arrays(info)
            if tries:
                try_scorer(scorer)
        except BundleError:
            check_unchanged(info)  # the error may come from a mix of the files of two bundles
            raise
        check_unchanged(info)
        return scorer

    def warm(self) -> None:
        """Open the files that the first requests would wait for, and run each graph once."""
        for embedder in (self._users, self._items):
            embedder.compute([{}])
        self.score(None, [None])
        self._retriever.open()

    @property
    def users(self) -> int:
        """Number of stored users."""
        return len(self._users.store)

    @property
    def items(self) -> int:
        """Number of stored items."""
        return len(self._items.store)

    @property
    def schema(self) -> tuple[Field, ...]:
        """Raw features of users, items and the scene that a request may contain."""
        return self.info.fields

    @property
    def tasks(self) -> tuple[str, ...]:
        """Labels whose probabilities `score_tasks` returns; empty in most bundles."""
        return self.info.tasks

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The bundle's manifest as parsed from JSON."""
        return self.info.manifest

    @property
    def version(self) -> str:
        """Version of the bundle: 12 hexadecimal digits of a hash of all its contents."""
        return self.info.version

    @property
    def model(self) -> str:
        """Version of the graphs, 12 hexadecimal digits; embeddings must be of the same version."""
        return self.info.model

    def score(self, user: Key | Raw | None, items: Entries, scene: Raw | None = None) -> Array:
        """Score items for a user in a scene.

        Args:
            user: Key or mapping of raw features; None for an unknown user.
            items: n keys or mappings of raw features.
            scene: Values of scene fields.

        Returns:
            Probabilities in the order of the items, float32 [n].
        """
        return self._ranker.score(user, items, scene)

    def score_tasks(
        self, user: Key | Raw | None, items: Entries, scene: Raw | None = None
    ) -> dict[str, Array]:
        """Score items as `score` does and return each task's probabilities as well.

        Returns:
            A mapping of "score" and the name of each task to probabilities, float32 [n].

        Raises:
            RequestError: The bundle has no tasks, or an argument is not valid.
        """
        require_tasks(self.info)
        return self._ranker.run_tasks(self._ranker.request_blocks(user, items, scene))

    def score_many(self, requests: Sequence[Request]) -> list[Array]:
        """Score many requests; requests with few items are scored together, which is faster.

        Args:
            requests: Tuples (user, items, scene), each with the arguments of one call of `score`.

        Returns:
            The probabilities of each request's items, float32, as of `score` up to rounding.
        """
        checked = [checked_request(index, request) for index, request in enumerate(requests)]
        scores: dict[int, Array] = {}
        for run in shared_runs([len(items) for _, items, _ in checked]):
            together = [checked[index] for index in run]
            try:
                parts = self._ranker.run_together(together)
            except RequestError:
                for index in run:
                    name_invalid(self.score, index, checked[index])
                raise
            scores.update(zip(run, parts, strict=True))
        return [scores[index] for index in range(len(checked))]

    def score_rows(self, users: Entries, items: Entries, scenes: Scenes | None = None) -> Array:
        """Score n rows, each with its own user ``users[i]``, item ``items[i]`` and scene.

        Args:
            users: n keys or mappings of raw features.
            items: n keys or mappings of raw features.
            scenes: Mapping of scene fields to n values each; other fields take their default.

        Returns:
            Probabilities, float32 [n].

        Raises:
            RequestError: The columns have different lengths, or a value is not valid.
        """
        return self._ranker.run(self._ranker.row_blocks(users, items, scenes))

    def score_tasks_rows(
        self, users: Entries, items: Entries, scenes: Scenes | None = None
    ) -> dict[str, Array]:
        """Score n rows as `score_rows` does and return each task's probabilities as well.

        The result is a mapping as in `score_tasks`.
        """
        require_tasks(self.info)
        return self._ranker.run_tasks(self._ranker.row_blocks(users, items, scenes))

    def recommend(
        self,
        user: Key | Raw | None,
        scene: Raw | None = None,
        k: int = 10,
        *,
        candidates: int = 500,
        exclude: Collection[Key] = (),
        allowed: Mapping[str, Collection[Any]] | None = None,
        skip_seen: bool = False,
        diversity: float = 0.0,
    ) -> list[Recommendation]:
        """Recommend items to a user in a scene: retrieve candidates, then rank them.

        The candidates are the items whose embeddings have the largest inner products with the
        user's embedding. Exact search or the bundle's index finds them. If nothing is known about
        the user (None, a key that is not stored, only missing features), the items with the largest
        trending counts are returned, the largest first.

        Args:
            user: As in `score`.
            scene: As in `score`.
            k: Largest number of items to return.
            candidates: Number of items to retrieve and rank, at least ``k``.
            exclude: Keys of items to leave out.
            allowed: Field of ``export.filters`` -> allowed values, such as ``{"genres": ["War"]}``.
                An item must have at least one of the values of each field.
            skip_seen: True to leave out the items that a stored user has seen.
            diversity: In [0, 1). Above 0, an item similar to a higher-ranked one moves down; see
                `diversified`.

        Returns:
            Up to k recommendations, best first. Items with equal scores are sorted by key.
        """
        check_count("k", k)
        check_count("candidates", candidates)
        check_share("diversity", diversity)
        inputs = self._ranker.scene_inputs(scene)
        count = max(int(k), int(candidates))
        retrieved = self._retriever.retrieve(
            user, count, exclude=exclude, allowed=allowed, skip_seen=skip_seen
        )
        if not retrieved.rows.size:
            return []
        items = self._items.store.take(retrieved.rows)
        scores = self._ranker.score_embedded(inputs, retrieved.user_embedding, items)
        vectors = items[:, : self.info.retrieval_width or None]
        order = retrieved.ordered(scores, vectors, int(k), float(diversity))
        return self._retriever.recommendations(retrieved, scores, order)

    def explain(
        self,
        user: Key | Raw | None,
        items: Entries,
        scene: Raw | None = None,
        *,
        history: int = 5,
    ) -> list[Explanation]:
        """Explain the scores of items: what the user, the item and the scene contribute.

        Give the user and the items as mappings of raw features to see the contributions of their
        parts. A user or item that is given by key has a single contribution. This runs the ranker
        about a hundred times per item.

        Args:
            user: As in `score`.
            items: As in `score`.
            scene: As in `score`.
            history: Largest number of history entries in each explanation; 0 for none.

        Returns:
            An explanation for each item. Its contributions add up to its score minus its reference.
        """
        explainer = Explainer(self.info, self._users, self._items, self._ranker)
        return explainer.explain(user, items, scene, history)

    def embed_user(self, user: Key | Raw | None) -> Array:
        """Return a user's embedding, float32 [user_width]; ``user`` is as in `score`."""
        embedding: Array = self._users.embed([user])[0]
        return embedding

    def embed_items(self, items: Entries) -> Array:
        """Return the embeddings of n items, float32 [n, item_width]; ``items`` is as in `score`."""
        return self._items.embed(as_list(items, "items"))

    def title(self, item: Key) -> str | None:
        """Return the title of a stored item; None if it is not stored or has no title."""
        row = self._items.row(item)
        return self._retriever.item_data.titles[np.array([row])][0] if row >= 0 else None

    def key_dtype(self, side: str) -> str:
        """Return the type of keys, "string" or "int"; ``side`` is "user" or "item"."""
        return (self._users if side == "user" else self._items).store.dtype

    def some_users(self, count: int) -> list[Key]:
        """Return the keys of the first `count` stored users, for trials and displays."""
        return list(self._users.store.keys_of(np.arange(min(count, self.users))))


def _delegated(
    method: Callable[Concatenate[Scorer, P], R],
) -> Callable[Concatenate[WatchedScorer, P], R]:
    """Return a method of `WatchedScorer` that calls a method of its current scorer."""

    def call(self: WatchedScorer, /, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = getattr(self.current, method.__name__)(*args, **kwargs)
        return result

    update_wrapper(call, method)
    return call


class WatchedScorer(BundleWatcher[Scorer]):
    """A scorer that switches to each new bundle at its path; returned by `Scorer.watch`.

    A call uses the bundle that is current when the call begins. Safe to share between threads.
    """

    score = _delegated(Scorer.score)
    score_tasks = _delegated(Scorer.score_tasks)
    score_many = _delegated(Scorer.score_many)
    recommend = _delegated(Scorer.recommend)
    explain = _delegated(Scorer.explain)
