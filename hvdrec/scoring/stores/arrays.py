"""Look up the embeddings of a bundle in memory-mapped arrays with sorted keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.array_files import read_array, unexpected_array
from hvdrec.scoring.bundle import BundleInfo
from hvdrec.scoring.errors import choices

Array = NDArray[Any]
CACHED_KEYS = 100_000
FLOAT32 = {"<f4": "float32"}
EMBEDDING_DTYPES = {**FLOAT32, "<f2": "float16", "|i1": "int8"}


class ArrayStore:
    """The `Store` of a bundle's own embeddings. Opening the store does not read the embeddings.

    Attributes:
        model: `BundleInfo.model` of the bundle.
        keys: Sorted keys, int64 [n] or fixed-width UTF-8 bytes [n].
        embeddings: float32, float16 or int8 [n, width].
        scales: Factors of int8 rows, float32 [n]; None for other dtypes.
    """

    def __init__(self, info: BundleInfo, side: str, width: int) -> None:
        """Map the arrays of a bundle's users or items.

        Args:
            info: The bundle.
            side: "user" or "item".
            width: Width of an embedding.

        Raises:
            BundleError: An array has the wrong dtype or shape.
        """
        self.model = info.model
        self.keys = read_array(info.path, f"{side}s/keys.npy")
        if self.keys.ndim != 1 or not (self.keys.dtype.kind == "S" or self.keys.dtype.str == "<i8"):
            raise unexpected_array(info, f"{side}s/keys.npy", self.keys, "bytes or int64 [n]")
        rows = len(self.keys)
        self.embeddings = _read(info, f"{side}s/embeddings.npy", EMBEDDING_DTYPES, (rows, width))
        self.scales: Array | None = None
        if self.embeddings.dtype == np.int8:
            self.scales = _read(info, f"{side}s/scales.npy", FLOAT32, (rows,))
        self._is_float32 = self.embeddings.dtype == np.float32
        self._key_type: type = str if self.keys.dtype.kind == "S" else int
        # One byte wider than the keys: numpy cuts text that is too wide, which could make a longer
        # key equal to a stored one.
        self._query_dtype = f"S{self.keys.dtype.itemsize + 1}"
        self._cache: dict[str | int | None, int] = {}

    @property
    def dtype(self) -> str:
        """Type of the keys: ``"string"`` or ``"int"``."""
        return "string" if self._key_type is str else "int"

    def __len__(self) -> int:
        """Number of stored embeddings."""
        return len(self.keys)

    def cached_rows(self, keys: Sequence[Any]) -> Array | None:
        """Return the rows of k keys, int64 [k], if all are cached; None if not.

        Most requests need only this fast lookup. ``keys`` may contain mappings of raw features,
        which are never cached.
        """
        # In Python, True == 1 == 1.0, so check the type of integer keys. A string never equals a
        # number, so string keys need no check.
        if self._key_type is int and not set(map(type, keys)) <= {int}:
            return None
        try:
            return np.fromiter(map(self._cache.__getitem__, keys), np.int64, len(keys))
        except (KeyError, TypeError):  # not cached, or not hashable: a mapping or a list
            return None

    def rows(self, keys: Sequence[str | int | None]) -> Array:
        """Look up the rows of k keys, int64 [k]; -1 for None and keys that are not stored."""
        cache = self._cache
        cached = [cache.get(key, -1) for key in keys]
        missed = [i for i, row in enumerate(cached) if row < 0 and keys[i] is not None]
        rows = np.array(cached, dtype=np.int64)
        if not missed or not len(self.keys):
            return rows
        queries: list[Any] = [keys[i] for i in missed]
        rows[missed] = searched = self._search(queries)
        if len(cache) + len(missed) > CACHED_KEYS:
            # Assign a new dictionary, since other threads may be reading the old one.
            self._cache = cache = {}
        pairs = zip(queries[:CACHED_KEYS], searched.tolist(), strict=False)
        cache.update((key, row) for key, row in pairs if row >= 0)
        return rows

    def take(self, rows: Array) -> Array:
        """Return the embeddings of ``rows``, int64 [k], as float32 [k, width]."""
        taken = self.embeddings.take(rows, axis=0)
        if self._is_float32:
            return taken
        taken = taken.astype(np.float32)
        if self.scales is not None:
            taken *= self.scales.take(rows)[:, None]
        return taken

    def lookup(self, keys: Sequence[str | int | None]) -> tuple[Array, Array]:
        """Look up embeddings by key; see `Store.lookup`."""
        rows = self.rows(keys)
        is_stored = rows >= 0
        if is_stored.all():
            return self.take(rows), is_stored
        embeddings = np.zeros((len(rows), self.embeddings.shape[1]), dtype=np.float32)
        embeddings[is_stored] = self.take(rows[is_stored])
        return embeddings, is_stored

    def keys_of(self, rows: Array) -> list[str | int]:
        """Return the keys of rows, int64 [k]."""
        keys: list[Any] = self.keys[rows].tolist()
        return [key.decode() for key in keys] if self._key_type is str else keys

    def _search(self, keys: Sequence[Any]) -> Array:
        """Find the rows of keys by binary search; -1 for keys that are not stored."""
        if self._key_type is int:
            queries = np.array(keys, dtype=np.int64)
        else:
            try:
                queries = np.array(keys, dtype=self._query_dtype)
            except UnicodeEncodeError:  # numpy encodes only ASCII
                queries = np.array([key.encode() for key in keys], dtype=self._query_dtype)
        # If the queries had another dtype, numpy would convert all stored keys.
        position = np.searchsorted(self.keys, queries.astype(self.keys.dtype))
        rows = np.minimum(position, len(self.keys) - 1)
        rows[self.keys[rows] != queries] = -1
        if self._key_type is str and "\0" in "".join(keys):
            # numpy drops trailing NULs, so equal bytes may come from different keys.
            for i, key in enumerate(keys):
                if "\0" in key and rows[i] >= 0 and self.keys_of(rows[i : i + 1]) != [key]:
                    rows[i] = -1
        return rows


def _read(info: BundleInfo, name: str, dtypes: Mapping[str, str], shape: tuple[int, ...]) -> Array:
    array = read_array(info.path, name)
    if array.dtype.str not in dtypes or array.shape != shape or not array.flags.c_contiguous:
        raise unexpected_array(
            info, name, array, f"one of {choices(dtypes.values())} of {shape}, row-major"
        )
    return array
