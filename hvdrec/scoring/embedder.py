"""One side of a bundle: stored embeddings by key, and the tower for everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import ARGUMENTS, BundleInfo, Field
from hvdrec.scoring.errors import BundleError
from hvdrec.scoring.graph_inputs import MISSING, check_names, key_value, rows_to_inputs
from hvdrec.scoring.session import GraphSession, input_types
from hvdrec.scoring.stores import Store
from hvdrec.scoring.stores.arrays import ArrayStore

Array = NDArray[Any]
BLOCK_ROWS = 4096
MadeOf = Literal["stored", "features", "nothing"]


class Embedder:
    """Embeds users or items, given by key or by raw features."""

    def __init__(
        self, info: BundleInfo, side: str, threads: int, store: Store | None = None
    ) -> None:
        """Take one side of a bundle; ``store`` gives the embeddings instead of its own arrays."""
        self.key_name = info.user_key if side == "user" else info.item_key
        width = info.user_width if side == "user" else info.item_width
        self.store = ArrayStore(info, side, width)
        self._shared = store
        self._source: Store = self.store if store is None else store
        if store is not None and store.dtype != self.store.dtype:
            raise BundleError(
                f"{info.path}: {side} keys are {self.store.dtype}, the given store holds "
                f"{store.dtype}; publish this bundle"
            )
        # Embeddings fit only the graphs of the model that computed them.
        if store is not None and store.model != info.model:
            raise BundleError(
                f"{info.path}: is of model {info.model}, the given store's {side}s are of model "
                f"{store.model}; open the store for this bundle"
            )
        self._argument = ARGUMENTS.get(side, side)
        self._fields = info.side(side)
        self._known = tuple(dict.fromkeys([self.key_name, *(f.name for f in self._fields)]))
        self._key_is_feature = any(field.name == self.key_name for field in self._fields)
        for field in self._fields:
            if field.name == self.key_name and field.dtype != self.store.dtype:
                raise BundleError(
                    f"{info.path}/{side}s/keys.npy: holds keys of type {self.store.dtype}, "
                    f"feature '{field.name}' is of type {field.dtype}; export the bundle again"
                )
        file = info.path / f"{side}_tower.onnx"
        self.graph = GraphSession(file, input_types(self._fields), "embedding", threads)

    def embed(self, entries: Sequence[Any]) -> Array:
        """Return embeddings, float32 [n, width], of keys or mappings of raw features.

        A key that is not stored goes through the tower with everything else missing. Raises
        RequestError for an unknown field or a value of the wrong type.
        """
        rows = None if self._shared is not None else self.store.cached_rows(entries)
        if rows is not None:
            return self.store.take(rows)
        keys = [None if _is_mapping(entry) else self.key(entry) for entry in entries]
        embeddings, found = self._source.lookup(keys)
        computed = np.flatnonzero(~found)
        if not computed.size:
            return embeddings
        raw = [self._raw(entries[i], keys[i]) for i in computed.tolist()]
        embedded = self.compute(raw)
        if computed.size == len(entries):
            return embedded
        embeddings[computed] = embedded
        return embeddings

    def embed_one(self, entry: Any) -> tuple[Array, MadeOf]:
        """Return `embed` of one entry, float32 [1, width], and what it is made of.

        "stored": the embedding of a stored key; "features": raw values that tell something;
        "nothing": no key, a key that is not stored, or raw values that are all missing.
        """
        if not _is_mapping(entry):
            key = self.key(entry)
            embeddings, found = self._source.lookup([key])
            if found[0]:
                return embeddings, "stored"
            return self.compute([self._raw(entry, key)]), "nothing"
        inputs = rows_to_inputs(self._fields, [self._raw(entry, None)])
        told = {field.name for field in self._fields if _tells(field, inputs[field.name])}
        if told == {self.key_name} and self.row(entry) < 0:
            told = set()
        return self.graph.run(inputs), "features" if told else "nothing"

    def row(self, entry: Any) -> int:
        """Return the bundle's row of a key, or of the key among raw values; -1 if it has none."""
        key = self.key(entry.get(self.key_name) if _is_mapping(entry) else entry)
        return int(self.store.rows([key])[0])

    def compute(self, rows: Sequence[Mapping[str, Any]]) -> Array:
        """Return what the tower makes of rows of raw values, float32 [n, width]."""
        inputs = rows_to_inputs(self._fields, rows)
        return self.graph.run_blocks(inputs, rows=len(rows), block=BLOCK_ROWS)

    def key(self, key: Any, argument: str = "") -> str | int | None:
        """Convert a key to its type, None for a missing one; RequestError for another type."""
        return key_value(key, self.store.dtype, argument or self._argument, self.key_name)

    def _raw(self, entry: Any, key: str | int | None) -> Mapping[str, Any]:
        if not _is_mapping(entry):
            return {self.key_name: key}
        check_names(entry, self._known, self._argument)
        if not self._key_is_feature:
            self.key(entry.get(self.key_name), f"{self._argument}.{self.key_name}")
        raw: Mapping[str, Any] = entry
        return raw


def _tells(field: Field, values: Array) -> bool:
    """Return whether a graph's input holds anything but missing values."""
    if field.dtype == "float":
        return not np.isnan(values).all()
    return bool((values != MISSING[field.dtype]).any())


def _is_mapping(entry: Any) -> bool:
    return type(entry) is dict or isinstance(entry, Mapping)
