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
"""Inputs of the ranker's graph: for r requests ``user_embedding`` float32 [r, user_width] and scene
fields [r]; for n items ``item_embedding`` float32 [n, item_width] and ``request`` int64 [n], the
index of the item's request."""


class PairRanker:
    """The ranker of a bundle, with the embedders of both sides; safe to share between threads.

    Blocks of inputs hold at most BLOCK_ROWS items, to bound the memory of a run.
    """

    def __init__(self, info: BundleInfo, users: Embedder, items: Embedder, threads: int) -> None:
        """Open the ranker; ``threads`` is the number of threads of one run."""
        self._users, self._items = users, items
        scene = info.side("scene")
        self._fields = {field.name: field for field in scene}
        self._defaults = {field.name: _default(info, field) for field in scene}
        self._outputs = ("score", *info.tasks)
        embeddings = {"user_embedding": FLOAT32_TENSOR, "item_embedding": FLOAT32_TENSOR}
        self._graph = GraphSession(
            info,
            "ranker.onnx",
            {**embeddings, "request": INT64_TENSOR, **input_types(scene)},
            "score",
            threads,
            [f"score_{task}" for task in info.tasks],
        )
        self._one_request = np.zeros(BLOCK_ROWS, dtype=np.int64)

    def score(self, user: Key | Raw | None, items: Entries, scene: Raw | None) -> Array:
        """Return the scores of items, float32 [n]; arguments are those of `Scorer.score`."""
        inputs = self.scene_inputs(scene)
        inputs["user_embedding"] = self._users.embed([user])
        entries = as_list(items, "items")
        if not entries:
            return np.empty(0, dtype=np.float32)
        return self.score_embedded(inputs, self._items.embed(entries))

    def score_embedded(self, inputs: RankerInputs, items: Array) -> Array:
        """Return the scores, float32 [n], of item embeddings, float32 [n, item_width].

        ``inputs`` are the other inputs of one request; they are changed.
        """
        if len(items) > BLOCK_ROWS:
            return self.run(self._embedding_blocks(inputs, items))
        # Without a generator: this is the path of most requests.
        inputs["item_embedding"] = items
        inputs["request"] = self._one_request[: len(items)]
        return self._graph.run(inputs)

    def run(self, blocks: Iterable[RankerInputs]) -> Array:
        """Return the scores of all blocks, float32 [n]."""
        return np.concatenate([np.empty(0, dtype=np.float32), *map(self._graph.run, blocks)])

    def run_tasks(self, blocks: Iterable[RankerInputs]) -> dict[str, Array]:
        """Return "score" and the probability of each task for all blocks, float32 [n] each."""
        empty = [np.empty(0, dtype=np.float32)] * len(self._outputs)
        parts = [empty, *map(self._graph.run_all, blocks)]
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return dict(zip(self._outputs, columns, strict=True))

    def run_together(self, requests: Sequence[Request]) -> list[Array]:
        """Return the scores of each request, float32 [n]; all share a run of each graph."""
        if len(requests) == 1:
            return [self.score(*requests[0])]
        scenes = [{} if scene is None else scene for _, _, scene in requests]
        for scene in scenes:
            check_names(scene, self._fields, "scene")
        inputs = {
            name: column(field, [scene.get(name, field.default) for scene in scenes])
            for name, field in self._fields.items()
        }
        inputs["user_embedding"] = self._users.embed([user for user, _, _ in requests])
        counts = [len(items) for _, items, _ in requests]
        inputs["item_embedding"] = self._items.embed([i for _, items, _ in requests for i in items])
        if not any(counts):
            return [np.empty(0, dtype=np.float32) for _ in requests]
        inputs["request"] = np.arange(len(requests)).repeat(counts)
        return np.split(self._graph.run(inputs), np.cumsum(counts)[:-1])

    def request_blocks(
        self, user: Key | Raw | None, items: Entries, scene: Raw | None
    ) -> Iterator[RankerInputs]:
        """Yield the inputs for a request; arguments are those of `Scorer.score`."""
        inputs = self.scene_inputs(scene)
        inputs["user_embedding"] = self._users.embed([user])
        entries = as_list(items, "items")
        if entries:
            yield from self._embedding_blocks(inputs, self._items.embed(entries))

    def _embedding_blocks(self, inputs: RankerInputs, items: Array) -> Iterator[RankerInputs]:
        for start in range(0, len(items), BLOCK_ROWS):
            block = items[start : start + BLOCK_ROWS]
            yield {**inputs, "item_embedding": block, "request": self._one_request[: len(block)]}

    def row_blocks(
        self, users: Entries, items: Entries, scenes: Scenes | None
    ) -> Iterator[RankerInputs]:
        """Yield the inputs for rows; arguments are those of `Scorer.score_rows`."""
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
                "user_embedding": self._users.embed(users[part]),
                "item_embedding": self._items.embed(items[part]),
                "request": np.arange(rows),
                **{
                    name: column(field, columns[name][part])
                    if name in columns
                    else self._defaults[name].repeat(rows, axis=0)
                    for name, field in self._fields.items()
                },
            }

    def scene_inputs(self, scene: Raw | None) -> RankerInputs:
        """Return the inputs for the scene of one request; omitted fields have their default."""
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
