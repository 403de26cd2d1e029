"""The scorer: a bundle, opened once and shared by all threads of a service."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import BundleInfo, Field, check_unchanged, read_bundle
from hvdrec.scoring.candidates import CandidateRetriever, Key, Recommendation
from hvdrec.scoring.embedder import BLOCK_ROWS, Embedder
from hvdrec.scoring.errors import (
    BundleError,
    ReplacedError,
    RequestError,
    ScoringError,
    invalid_request,
)
from hvdrec.scoring.graph_inputs import check_count, check_names, check_share, column, listed
from hvdrec.scoring.session import ROWS, VECTORS, GraphSession, input_types
from hvdrec.scoring.stores import Store

if TYPE_CHECKING:
    from hvdrec.scoring.watch import WatchedScorer

Array = NDArray[Any]
Raw = Mapping[str, Any]
Entries = Sequence[Key | Raw | None] | Array
Stores = Callable[[BundleInfo], tuple[Store | None, Store | None]]
Request = tuple[Key | Raw | None, Entries, Raw | None]
ALONE_ITEMS = 64
"""A request of so many items is scored alone: the ranker folds one user into its weights."""


class Scorer:
    """Scores and recommends items from a bundle; made by `load`, safe to share between threads."""

    def __init__(
        self, info: BundleInfo, threads: int, users: Store | None = None, items: Store | None = None
    ) -> None:
        self.info = info
        self._users = Embedder(info, "user", threads, users)
        self._items = Embedder(info, "item", threads, items)
        self._retrieval = CandidateRetriever(info, self._users, self._items)
        scene = info.side("scene")
        self._scene = {field.name: field for field in scene}
        self._defaults = {field.name: _default(info, field) for field in scene}
        pairs = {"user_embedding": VECTORS, "item_embedding": VECTORS, "request": ROWS}
        self._ranker = GraphSession(
            info.path / "ranker.onnx",
            {**pairs, **input_types(scene)},
            "score",
            threads,
            [f"score_{task}" for task in info.tasks],
        )
        self._one_request = np.zeros(BLOCK_ROWS, dtype=np.int64)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int = 1,
        verify: bool = False,
        users: Store | None = None,
        items: Store | None = None,
    ) -> Scorer:
        """Open a bundle.

        threads: of one graph run (a service with many request threads wants 1); verify: compare
        every file's checksum and read what the arrays hold; users, items: where their embeddings
        come from instead of the bundle's own arrays (retrieval is always over the bundle's). A
        tower with large vocabularies is opened by the first request that needs it, or by `warm`.
        Raises BundleError if the bundle is missing, damaged or too new.
        """
        check_count("threads", threads)
        info = read_bundle(Path(path), verify=verify)
        scorer = cls(info, int(threads), users, items)
        if verify:
            from hvdrec.scoring.verify import verify_arrays

            verify_arrays(info)
        check_unchanged(info)
        return scorer

    @classmethod
    def watch(
        cls,
        path: str | Path,
        *,
        interval: float = 1.0,
        threads: int = 1,
        stores: Stores | None = None,
        on_reload: Callable[[Scorer], object] | None = None,
        on_refused: Callable[[ScoringError], object] | None = None,
    ) -> WatchedScorer:
        """Open a bundle and follow its path: a new bundle there replaces the old one.

        Every ``interval`` seconds a thread looks at the path, a directory that is replaced or a
        link that is pointed elsewhere. A new bundle is verified, loaded and tried beside the old
        one and swapped in; calls under way end on the old one. A broken one is refused, logged
        once and handed to ``on_refused``; the old one stays. ``on_reload`` gets the new scorer.
        threads: as in `load`; stores: gives the stores of users and items for a bundle, which is
        asked anew for each, as another model has other embeddings. Raises what `load` raises, for
        the first bundle.
        """
        from hvdrec.scoring.watch import WatchedScorer

        check_count("threads", threads)

        def load(path: Path) -> Scorer:
            info = read_bundle(path, verify=False)
            users, items = stores(info) if stores else (None, None)
            try:
                return cls.load(path, threads=threads, verify=True, users=users, items=items)
            except BundleError:
                # The stores serve the model of `info`; another bundle refuses them.
                if read_bundle(path, verify=False).model == info.model:
                    raise
                raise ReplacedError(
                    f"{path}: was replaced while it was read; load it again"
                ) from None

        return WatchedScorer(
            Path(path), load, interval=interval, on_reload=on_reload, on_refused=on_refused
        )

    def warm(self) -> None:
        """Open what the first requests would wait for, and run each graph once."""
        for tower in (self._users, self._items):
            tower.compute([{}])
        self.score(None, [None])
        self._retrieval.open()

    @property
    def users(self) -> int:
        """Return the number of stored users."""
        return len(self._users.store)

    @property
    def items(self) -> int:
        """Return the number of stored items."""
        return len(self._items.store)

    @property
    def schema(self) -> tuple[Field, ...]:
        """Return the raw features that a request may give, of users, items and the scene."""
        return self.info.fields

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the labels whose probabilities `score_tasks` tells; none in most bundles."""
        return self.info.tasks

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Return the bundle's manifest as it was read."""
        return self.info.manifest

    @property
    def version(self) -> str:
        """Return 12 hexadecimal digits that name the bundle's contents."""
        return self.info.version

    @property
    def model(self) -> str:
        """Return 12 hexadecimal digits that name its graphs: embeddings of one model fit it."""
        return self.info.model

    def score(self, user: Key | Raw | None, items: Entries, scene: Raw | None = None) -> Array:
        """Return a probability for each item, float32 [n], in the order given.

        user: a key, or the raw features of a user (with or without the key), who goes through the
        tower; items: keys, or raw features of items; scene: what is known of the request. A key
        that is not stored goes through its tower as unknown. None and NaN are missing values, and
        so is what is left out, except that a scene field takes its default. Raises RequestError
        for an unknown field or a value of the wrong type.
        """
        inputs = self._scene_inputs(scene)
        inputs["user_embedding"] = self._users.embed([user])
        entries = listed(items, "items")
        if not entries:
            return np.empty(0, dtype=np.float32)
        return self._rank(inputs, self._items.embed(entries))

    def score_tasks(
        self, user: Key | Raw | None, items: Entries, scene: Raw | None = None
    ) -> dict[str, Array]:
        """Return what the score is made of: each task's probabilities by its name, float32 [n].

        ``"score"`` holds what `score` returns for the same arguments. Raises RequestError as
        `score` does, and where the bundle has no tasks.
        """
        self._require_tasks()
        inputs = self._scene_inputs(scene)
        inputs["user_embedding"] = self._users.embed([user])
        entries = listed(items, "items")
        embedded = self._items.embed(entries) if entries else np.empty((0, 0))
        parts = (embedded[i : i + BLOCK_ROWS] for i in range(0, len(embedded), BLOCK_ROWS))
        return self._by_task(
            {**inputs, "item_embedding": part, "request": self._one_request[: len(part)]}
            for part in parts
        )

    def score_many(self, requests: Sequence[Request]) -> list[Array]:
        """Return what `score` returns, for each of many requests (user, items, scene).

        Requests of few items share a run of the graphs; their scores may differ from those of
        `score` in the last bits. Raises RequestError as `score` does, naming the request's place.
        """
        checked = [_checked(number, request) for number, request in enumerate(requests)]
        out: dict[int, Array] = {}
        for numbers in shared_runs([len(items) for _, items, _ in checked]):
            together = [checked[number] for number in numbers]
            try:
                scores = self._score_together(together)
            except RequestError:
                for number, request in zip(numbers, together, strict=True):
                    try:
                        self._score_together([request])
                    except RequestError as error:
                        place = f"requests[{number}]."
                        raise RequestError(
                            f"{place}{error}", field=place + error.field, value=error.value
                        ) from None
                raise
            out.update(zip(numbers, scores, strict=True))
        return [out[number] for number in range(len(checked))]

    def score_rows(
        self,
        users: Entries,
        items: Entries,
        scenes: Mapping[str, Sequence[Any] | Array] | None = None,
    ) -> Array:
        """Return a probability for each row, float32 [n]: users[i], items[i], scenes[name][i].

        Entries are those of `score`. A scene field without a column takes its default. Raises
        RequestError as `score` does, and where the columns differ in length.
        """
        runs = (self._ranker.run(inputs) for inputs in self._row_blocks(users, items, scenes))
        return np.concatenate([np.empty(0, dtype=np.float32), *runs])

    def score_tasks_rows(
        self,
        users: Entries,
        items: Entries,
        scenes: Mapping[str, Sequence[Any] | Array] | None = None,
    ) -> dict[str, Array]:
        """Return what `score_tasks` returns, float32 [n] each, for the rows of `score_rows`."""
        self._require_tasks()
        return self._by_task(self._row_blocks(users, items, scenes))

    def _row_blocks(
        self,
        users: Entries,
        items: Entries,
        scenes: Mapping[str, Sequence[Any] | Array] | None,
    ) -> Iterator[dict[str, Array]]:
        """Yield the ranker's inputs for rows, at most BLOCK_ROWS at a time."""
        check_names({} if scenes is None else scenes, self._scene, "scene")
        columns = {name: listed(values, f"scene.{name}") for name, values in (scenes or {}).items()}
        users, items = listed(users, "users"), listed(items, "items")
        lengths = {"users": len(users), "items": len(items)}
        lengths |= {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            problem = "users, items and scene fields must have the same length"
            raise invalid_request("rows", lengths, problem)
        for start in range(0, len(users), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            yield {
                "user_embedding": self._users.embed(users[part]),
                "item_embedding": self._items.embed(items[part]),
                "request": np.arange(len(users[part])),
                **self._scene_columns(columns, part, len(users[part])),
            }

    def _by_task(self, blocks: Iterable[dict[str, Array]]) -> dict[str, Array]:
        """Return the ranker's outputs of all blocks, the score and each task's."""
        names = ("score", *self.info.tasks)
        parts = [[np.empty(0, dtype=np.float32)] * len(names), *map(self._ranker.run_all, blocks)]
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return dict(zip(names, columns, strict=True))

    def _require_tasks(self) -> None:
        if not self.info.tasks:
            raise RequestError(
                "tasks: this bundle's ranker has a single label; score without tasks, or export a "
                "model with [[tasks]]",
                field="tasks",
            )

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
        """Return the k best items, best first, equal scores in the order of their keys.

        The ``candidates`` (at least k) items whose embeddings have the largest inner product with
        the user's are retrieved, exactly or through the bundle's index, and ranked in the scene.
        Where nothing is known of the user (None, a key that is not stored, raw values that are all
        missing) the answer is what is trending, in that order. There are fewer than k where the
        catalogue ends. user and scene as in `score`.

        exclude: keys to leave out. allowed: an item needs one of the values in each named field,
        {"genres": ["Drama", "War"]}; the fields are those of ``export.filters``. skip_seen: leave
        out what the user, given by the key or with it, met in the log. diversity: in [0, 1); above
        0, each next item is chosen by score and by how little it resembles those before it (maximal
        marginal relevance). Raises RequestError for what does not fit.
        """
        check_count("k", k)
        check_count("candidates", candidates)
        check_share("diversity", diversity)
        inputs = self._scene_inputs(scene)
        count = max(int(k), int(candidates))
        found = self._retrieval.candidates(
            user, count, exclude=exclude, allowed=allowed, skip_seen=skip_seen
        )
        if not found.rows.size:
            return []
        inputs["user_embedding"] = found.user_embedding
        items = self._items.store.take(found.rows)
        scores = self._rank(inputs, items)
        vectors = items[:, : self.info.retrieval_width or None]
        order = found.ordered(scores, vectors, int(k), float(diversity))
        return self._retrieval.answer(found, scores, order)

    def embed_user(self, user: Key | Raw | None) -> Array:
        """Return a user's embedding, float32 [user_width]; user as in `score`."""
        embedding: Array = self._users.embed([user])[0]
        return embedding

    def embed_items(self, items: Entries) -> Array:
        """Return items' embeddings, float32 [n, item_width]; items as in `score`."""
        return self._items.embed(listed(items, "items"))

    def title(self, item: Key) -> str | None:
        """Return a stored item's title, or None."""
        row = int(self._items.store.rows([self._items.key(item)])[0])
        return self._retrieval.catalogue.titles[row] if row >= 0 else None

    def key_dtype(self, side: str) -> str:
        """Return the type of user or item keys: "string" or "int"."""
        return (self._users if side == "user" else self._items).store.dtype

    def _score_together(self, requests: Sequence[Request]) -> list[Array]:
        """Return the scores of requests that share a run of each graph."""
        if len(requests) == 1:
            return [self.score(*requests[0])]
        scenes = [{} if scene is None else scene for _, _, scene in requests]
        for scene in scenes:
            check_names(scene, self._scene, "scene")
        inputs = {
            name: column(field, [scene.get(name, field.default) for scene in scenes])
            for name, field in self._scene.items()
        }
        inputs["user_embedding"] = self._users.embed([user for user, _, _ in requests])
        counts = [len(items) for _, items, _ in requests]
        inputs["item_embedding"] = self._items.embed([i for _, items, _ in requests for i in items])
        if not any(counts):
            return [np.empty(0, dtype=np.float32) for _ in requests]
        inputs["request"] = np.arange(len(requests)).repeat(counts)
        return np.split(self._ranker.run(inputs), np.cumsum(counts)[:-1])

    def _rank(self, inputs: dict[str, Array], items: Array) -> Array:
        """Return the scores of items' embeddings [n, item_width] for one user in one scene."""
        rows = len(items)
        if rows <= BLOCK_ROWS:
            return self._ranker.run(
                {**inputs, "item_embedding": items, "request": self._one_request[:rows]}
            )
        blocks = [items[start : start + BLOCK_ROWS] for start in range(0, rows, BLOCK_ROWS)]
        return np.concatenate([self._rank(inputs, block) for block in blocks])

    def _scene_inputs(self, scene: Raw | None) -> dict[str, Array]:
        inputs = dict(self._defaults)
        if scene is not None:
            check_names(scene, self._scene, "scene")
            for name, value in scene.items():
                inputs[name] = column(self._scene[name], [value])
        return inputs

    def _scene_columns(
        self, columns: Mapping[str, Sequence[Any]], part: slice, rows: int
    ) -> dict[str, Array]:
        return {
            name: column(field, columns[name][part])
            if name in columns
            else self._defaults[name].repeat(rows, axis=0)
            for name, field in self._scene.items()
        }


def shared_runs(counts: Sequence[int]) -> Iterator[list[int]]:
    """Yield the places of requests that are scored together, given how many items each has.

    At most BLOCK_ROWS items are together, and a request of ALONE_ITEMS or more is alone.
    """
    together: list[int] = []
    items = 0
    for place, count in enumerate(counts):
        if count >= ALONE_ITEMS:
            yield [place]
            continue
        if items + count > BLOCK_ROWS:
            yield together
            together, items = [], 0
        together.append(place)
        items += count
    if together:
        yield together


def _checked(number: int, request: Any) -> Request:
    if not isinstance(request, tuple | list) or len(request) != 3:
        problem = "must be three values, user, items and scene"
        raise invalid_request(f"requests[{number}]", request, problem)
    user, items, scene = request
    return user, listed(items, f"requests[{number}].items"), scene


def _default(info: BundleInfo, field: Field) -> Array:
    try:
        return column(field, [field.default])
    except RequestError as error:
        raise BundleError(f"{info.path}: default of a scene field: {error}") from None
