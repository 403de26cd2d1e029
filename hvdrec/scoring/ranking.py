"""Run a bundle's ranker: score pairs of a user and an item in a scene."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from hvdrec.scoring.array_files import Array
from hvdrec.scoring.batching import Entries, Raw, Request, Scenes
from hvdrec.scoring.bundle import BundleInfo, Field
from hvdrec.scoring.candidates import Key
from hvdrec.scoring.embedder import BLOCK_ROWS, Embedder
from hvdrec.scoring.errors import BundleError, RequestError, invalid_request
from hvdrec.scoring.graph_inputs import as_list, check_names, column
from hvdrec.scoring.session import FLOAT32_TENSOR, INT64_TENSOR, GraphSession, input_types

RankerInputs = dict[str, Array]
"""Inputs of one run of the ranker's graph. A run scores n items for r requests, each with one user
and one scene. ``user_embedding`` is float32 [r, user_width]; each scene field is an array [r];
``item_embedding`` is float32 [n, item_width]; ``request``, int64 [n], is the index of the request
that each item belongs to."""


class PairRanker:
    """Scores pairs of a user and an item: embeds both, then runs the bundle's ranker.

    Safe to share between threads. Many items are scored in blocks of at most BLOCK_ROWS, to bound
    the memory of a run.
    """

    def __init__(self, info: BundleInfo, users: Embedder, items: Embedder, threads: int) -> None:
        """Open the ranker.

        Args:
            info: The bundle.
            users: Embeds users.
            items: Embeds items.
            threads: Number of threads of one run of the ranker.
        """
        self._users, self._items = users, items
        scene = info.side("scene")
        self._fields = {field.name: field for field in scene}
        self._defaults = {field.name: _default(info, field) for field in scene}
        self._outputs = ("score", *info.tasks)
        own = ("user_embedding", "item_embedding", "request")
        self._user, self._item, self._request = map(info.tensor, own)
        embeddings = {self._user: FLOAT32_TENSOR, self._item: FLOAT32_TENSOR}
        self._graph = GraphSession(
            info,
            "ranker.onnx",
            {**embeddings, self._request: INT64_TENSOR, **input_types(scene)},
            info.tensor("score"),
            threads,
            [info.tensor(f"score_{task}") for task in info.tasks],
        )
        self._one_request = np.zeros(BLOCK_ROWS, dtype=np.int64)

    def score(self, user: Key | Raw | None, items: Entries, scene: Raw | None) -> Array:
        """Return the scores of n items, float32 [n]; for the arguments see `Scorer.score`."""
        inputs = self.scene_inputs(scene)
        embedding = self._users.embed([user])
        entries = as_list(items, "items")
        if not entries:
            return np.empty(0, dtype=np.float32)
        return self.score_embedded(inputs, embedding, self._items.embed(entries))

    def score_embedded(self, inputs: RankerInputs, user: Array, items: Array) -> Array:
        """Return the scores of items whose embeddings are known.

        Args:
            inputs: The scene fields of one request, each with one row. Entries for the user and
                the items are added to this dictionary.
            user: Embedding of the user, float32 [1, user_width].
            items: Embeddings of the items, float32 [n, item_width].

        Returns:
            Scores, float32 [n].
        """
        inputs[self._user] = user
        if len(items) > BLOCK_ROWS:
            return self.run(self._embedding_blocks(inputs, items))
        # Most requests take this path, so it avoids the cost of a generator.
        inputs[self._item] = items
        inputs[self._request] = self._one_request[: len(items)]
        return self._graph.run(inputs)

    def score_grid(self, users: Array, scenes: Sequence[Raw], items: Array) -> Array:
        """Score every item for every request.

        Args:
            users: Embedding of each request's user, float32 [r, user_width].
            scenes: Scene of each request, r mappings of fields.
            items: Embeddings of the items, float32 [n, item_width].

        Returns:
            Scores, float32 [r, n].
        """
        fields = {
            name: column(field, [scene.get(name, field.default) for scene in scenes])
            for name, field in self._fields.items()
        }
        parts = []
        step = max(1, BLOCK_ROWS // max(1, len(items)))
        for start in range(0, len(users), step):
            part = slice(start, start + step)
            requests = len(users[part])
            inputs = {name: values[part] for name, values in fields.items()}
            inputs[self._user] = users[part]
            inputs[self._item] = np.tile(items, (requests, 1))
            inputs[self._request] = np.arange(requests).repeat(len(items))
            parts.append(self._graph.run(inputs).reshape(requests, len(items)))
        return np.concatenate(parts)

    def run(self, blocks: Iterable[RankerInputs]) -> Array:
        """Run the ranker on blocks of inputs; return the scores of all their items, float32 [n]."""
        return np.concatenate([np.empty(0, dtype=np.float32), *map(self._graph.run, blocks)])

    def run_tasks(self, blocks: Iterable[RankerInputs]) -> dict[str, Array]:
        """Run the ranker on blocks of inputs; return all its outputs for their n items.

        The result maps "score" and the name of each task to probabilities, float32 [n].
        """
        empty = [np.empty(0, dtype=np.float32)] * len(self._outputs)
        parts = [empty, *map(self._graph.run_all, blocks)]
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return dict(zip(self._outputs, columns, strict=True))

    def run_together(self, requests: Sequence[Request]) -> list[Array]:
        """Score several requests with one run of each graph; return float32 [items] for each."""
        if len(requests) == 1:
            return [self.score(*requests[0])]
        scenes = [{} if scene is None else scene for _, _, scene in requests]
        for scene in scenes:
            check_names(scene, self._fields, "scene")
        inputs = {
            name: column(field, [scene.get(name, field.default) for scene in scenes])
            for name, field in self._fields.items()
        }
        inputs[self._user] = self._users.embed([user for user, _, _ in requests])
        counts = [len(items) for _, items, _ in requests]
        inputs[self._item] = self._items.embed([i for _, items, _ in requests for i in items])
        if not any(counts):
            return [np.empty(0, dtype=np.float32) for _ in requests]
        inputs[self._request] = np.arange(len(requests)).repeat(counts)
        return np.split(self._graph.run(inputs), np.cumsum(counts)[:-1])

    def request_blocks(
        self, user: Key | Raw | None, items: Entries, scene: Raw | None
    ) -> Iterator[RankerInputs]:
        """Yield the ranker's inputs for a request; for the arguments see `Scorer.score`."""
        inputs = self.scene_inputs(scene)
        inputs[self._user] = self._users.embed([user])
        entries = as_list(items, "items")
        if entries:
            yield from self._embedding_blocks(inputs, self._items.embed(entries))

    def _embedding_blocks(self, inputs: RankerInputs, items: Array) -> Iterator[RankerInputs]:
        for start in range(0, len(items), BLOCK_ROWS):
            block = items[start : start + BLOCK_ROWS]
            yield {**inputs, self._item: block, self._request: self._one_request[: len(block)]}

    def row_blocks(
        self, users: Entries, items: Entries, scenes: Scenes | None
    ) -> Iterator[RankerInputs]:
        """Yield the ranker's inputs for rows; for the arguments see `Scorer.score_rows`."""
        check_names({} if scenes is None else scenes, self._fields, "scene")
        columns = {name: as_list(v, f"scene.{name}") for name, v in (scenes or {}).items()}
        users, items = as_list(users, "users"), as_list(items, "items")
        lengths = {"users": len(users), "items": len(items)}
        lengths |= {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            problem = "users, items and scene fields must have the same length"
            raise invalid_request("rows", lengths, problem)
        for start in range(0, len(users), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            rows = len(users[part])
            yield {
                self._user: self._users.embed(users[part]),
                self._item: self._items.embed(items[part]),
                self._request: np.arange(rows),
                **{
                    name: column(field, columns[name][part])
                    if name in columns
                    else self._defaults[name].repeat(rows, axis=0)
                    for name, field in self._fields.items()
                },
            }

    def scene_inputs(self, scene: Raw | None) -> RankerInputs:
        """Return the ranker's inputs for the scene of one request, with defaults filled in."""
        inputs = dict(self._defaults)
        if scene is not None:
            check_names(scene, self._fields, "scene")
            for name, value in scene.items():
                inputs[name] = column(self._fields[name], [value])
        return inputs


def _default(info: BundleInfo, field: Field) -> Array:
    try:
        return column(field, [field.default])
    except RequestError as error:
        text = f"{info.path}: default of a scene field: {error}"
        raise BundleError(text, field=error.field, value=error.value) from None
