"""Embed users or items: look up stored keys and run the tower for everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from hvdrec.scoring.array_files import Array
from hvdrec.scoring.bundle import ARGUMENTS, BundleInfo, Field
from hvdrec.scoring.errors import invalid_bundle
from hvdrec.scoring.graph_inputs import MISSING, check_names, key_value, rows_to_inputs
from hvdrec.scoring.session import GraphSession, input_types
from hvdrec.scoring.stores import Store
from hvdrec.scoring.stores.arrays import ArrayStore

BLOCK_ROWS = 4096
EmbeddingSource = Literal["stored", "features", "nothing"]


class Embedder:
    """Embeddings of users or of items, from keys or from raw features."""

    def __init__(
        self, info: BundleInfo, side: str, threads: int, store: Store | None = None
    ) -> None:
        """Open the tower and the stored embeddings of a bundle's users or items.

        Args:
            info: The bundle.
            side: "user" or "item".
            threads: Number of threads of one run of the tower.
            store: Source of stored embeddings in place of the bundle's own arrays.

        Raises:
            BundleError: The arrays or the graph contradict the manifest, or the store has keys of
                another type or embeddings of another model.
        """
        self.key_name = info.user_key if side == "user" else info.item_key
        width = info.user_width if side == "user" else info.item_width
        self.store = ArrayStore(info, side, width)
        self._shared = store
        self._source: Store = self.store if store is None else store
        if store is not None and store.dtype != self.store.dtype:
            problem = f"{side} keys are {self.store.dtype}, the given store holds {store.dtype}"
            raise invalid_bundle(info.path, problem, "publish this bundle")
        # The ranker understands only embeddings of the model that it was trained with.
        if store is not None and store.model != info.model:
            problem = f"has model {info.model}, the given store's {side}s have model {store.model}"
            raise invalid_bundle(info.path, problem, "open the store for this bundle")
        self._argument = ARGUMENTS.get(side, side)
        self._fields = info.side(side)
        self._known = tuple(dict.fromkeys([self.key_name, *(f.name for f in self._fields)]))
        self._key_is_feature = any(field.name == self.key_name for field in self._fields)
        for field in self._fields:
            if field.name == self.key_name and field.dtype != self.store.dtype:
                raise invalid_bundle(
                    info.path / f"{side}s/keys.npy",
                    f"holds keys of type {self.store.dtype}, feature '{field.name}' is of type "
                    f"{field.dtype}",
                )
        inputs = input_types(self._fields)
        output = info.tensor("embedding")
        self.graph = GraphSession(info, f"{side}_tower.onnx", inputs, output, threads)

    def embed(self, entries: Sequence[Any]) -> Array:
        """Embed n keys or mappings of raw features; return float32 [n, width].

        For a key that is not stored, the tower computes an embedding with all other features
        missing. Raises RequestError if a field is unknown or a value has the wrong type.
        """
        rows = None if self._shared is not None else self.store.cached_rows(entries)
        if rows is not None:
            return self.store.take(rows)
        keys = [None if _is_mapping(entry) else self.key(entry) for entry in entries]
        embeddings, is_stored = self._source.lookup(keys)
        computed = np.flatnonzero(~is_stored)
        if not computed.size:
            return embeddings
        raw = [self._raw(entries[i], keys[i]) for i in computed.tolist()]
        embedded = self.compute(raw)
        if computed.size == len(entries):
            return embedded
        embeddings[computed] = embedded
        return embeddings

    def embed_one(self, entry: Any) -> tuple[Array, EmbeddingSource]:
        """Embed one entry; return the embedding, float32 [1, width], and its source.

        The source is "stored" for a stored key, "features" if at least one raw feature is not
        missing, otherwise "nothing".
        """
        if not _is_mapping(entry):
            key = self.key(entry)
            embeddings, is_stored = self._source.lookup([key])
            if is_stored[0]:
                return embeddings, "stored"
            return self.compute([self._raw(entry, key)]), "nothing"
        inputs = rows_to_inputs(self._fields, [self._raw(entry, None)])
        present = {field.name for field in self._fields if _has_value(field, inputs[field.name])}
        if present == {self.key_name} and self.row(entry) < 0:
            present = set()
        return self.graph.run(inputs), "features" if present else "nothing"

    def row(self, entry: Any) -> int:
        """Return the row of a key in the bundle's arrays; -1 if the key is not stored.

        ``entry`` is a key, or a mapping of raw features that may contain the key.
        """
        key = self.key(entry.get(self.key_name) if _is_mapping(entry) else entry)
        return int(self.store.rows([key])[0])

    def compute(self, rows: Sequence[Mapping[str, Any]]) -> Array:
        """Run the tower on rows of raw features and return embeddings, float32 [n, width]."""
        inputs = rows_to_inputs(self._fields, rows)
        return self.graph.run_blocks(inputs, rows=len(rows), block=BLOCK_ROWS)

    def key(self, key: Any, argument: str = "") -> str | int | None:
        """Return a key as a string or an integer, as the bundle stores it; None if it is missing.

        ``argument`` is the part of the request that an error names.
        """
        return key_value(key, self.store.dtype, argument or self._argument, self.key_name)

    def _raw(self, entry: Any, key: str | int | None) -> Mapping[str, Any]:
        if not _is_mapping(entry):
            return {self.key_name: key}
        check_names(entry, self._known, self._argument)
        if not self._key_is_feature:
            self.key(entry.get(self.key_name), f"{self._argument}.{self.key_name}")
        raw: Mapping[str, Any] = entry
        return raw


def _has_value(field: Field, values: Array) -> bool:
    """Return True if the array of a field holds at least one value that is not missing."""
    if field.dtype == "float":
        return not np.isnan(values).all()
    return bool((values != MISSING[field.dtype]).any())


def _is_mapping(entry: Any) -> bool:
    return type(entry) is dict or isinstance(entry, Mapping)
