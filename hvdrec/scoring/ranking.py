"""Run a bundle's ranker: score pairs of embeddings in a scene."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hvdrec.scoring.array_files import Array
from hvdrec.scoring.bundle import BundleInfo, Field
from hvdrec.scoring.embedder import BLOCK_ROWS
from hvdrec.scoring.errors import BundleError, RequestError
from hvdrec.scoring.graph_inputs import as_list, check_names, column
from hvdrec.scoring.session import FLOAT32_TENSOR, INT64_TENSOR, GraphSession, input_types

Raw = Mapping[str, Any]
RankerInputs = dict[str, Array]
"""Inputs of the ranker's graph: for r requests ``user_embedding`` float32 [r, user_width] and scene
fields [r]; for n items ``item_embedding`` float32 [n, item_width] and ``request`` int64 [n], the
index of the item's request."""


class SceneRanker:
    """The ranker of a bundle and the fields of its scene; safe to share between threads."""

    def __init__(self, info: BundleInfo, threads: int) -> None:
        """Open the ranker; ``threads`` is the number of threads of one run.

        Raises:
            BundleError: The graph or the default of a scene field does not fit the manifest.
        """
        scene = info.side("scene")
        self._fields = {field.name: field for field in scene}
        self._defaults = {field.name: _default(info, field) for field in scene}
        self._outputs = ("score", *info.tasks)
        embeddings = {"user_embedding": FLOAT32_TENSOR, "item_embedding": FLOAT32_TENSOR}
        self._graph = GraphSession(
            info.path / "ranker.onnx",
            {**embeddings, "request": INT64_TENSOR, **input_types(scene)},
            "score",
            threads,
            [f"score_{task}" for task in info.tasks],
        )
        self._one_request = np.zeros(BLOCK_ROWS, dtype=np.int64)

    def scene_inputs(self, scene: Raw | None) -> RankerInputs:
        """Return the inputs for the scene of one request; omitted fields have their default.

        Raises:
            RequestError: A field is unknown, or a value has the wrong type.
        """
        inputs = dict(self._defaults)
        if scene is not None:
            check_names(scene, self._fields, "scene")
            for name, value in scene.items():
                inputs[name] = column(self._fields[name], [value])
        return inputs

    def scenes_inputs(self, scenes: Sequence[Raw | None]) -> RankerInputs:
        """Return the inputs for the scenes of r requests, [r] for each field."""
        mappings = [{} if scene is None else scene for scene in scenes]
        for scene in mappings:
            check_names(scene, self._fields, "scene")
        return {
            name: column(field, [scene.get(name, field.default) for scene in mappings])
            for name, field in self._fields.items()
        }

    def scene_columns(
        self, scenes: Mapping[str, Sequence[Any] | Array] | None
    ) -> dict[str, Sequence[Any]]:
        """Check columns of scene values, one for each field, and return them as lists.

        Raises:
            RequestError: A field is unknown, or a column is not a list.
        """
        check_names({} if scenes is None else scenes, self._fields, "scene")
        return {name: as_list(values, f"scene.{name}") for name, values in (scenes or {}).items()}

    def columns_inputs(
        self, columns: Mapping[str, Sequence[Any]], part: slice, rows: int
    ) -> RankerInputs:
        """Return the inputs for a part of the columns, ``rows`` long; see `scene_columns`."""
        return {
            name: column(field, columns[name][part])
            if name in columns
            else self._defaults[name].repeat(rows, axis=0)
            for name, field in self._fields.items()
        }

    def blocks(self, inputs: RankerInputs, items: Array) -> Iterable[RankerInputs]:
        """Yield the inputs of one request for item embeddings, at most BLOCK_ROWS at a time."""
        for start in range(0, len(items), BLOCK_ROWS):
            block = items[start : start + BLOCK_ROWS]
            yield {**inputs, "item_embedding": block, "request": self._one_request[: len(block)]}

    def run(self, blocks: Iterable[RankerInputs]) -> Array:
        """Return the scores of all blocks, float32 [n]."""
        parts = [self._graph.run(inputs) for inputs in blocks]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty(0, dtype=np.float32), *parts])

    def run_tasks(self, blocks: Iterable[RankerInputs]) -> dict[str, Array]:
        """Return "score" and the probability of each task for all blocks, float32 [n] each."""
        empty = [np.empty(0, dtype=np.float32)] * len(self._outputs)
        parts = [empty, *map(self._graph.run_all, blocks)]
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return dict(zip(self._outputs, columns, strict=True))


def _default(info: BundleInfo, field: Field) -> Array:
    try:
        return column(field, [field.default])
    except RequestError as error:
        text = f"{info.path}: default of a scene field: {error}"
        raise BundleError(text, field=error.field, value=error.value) from None
