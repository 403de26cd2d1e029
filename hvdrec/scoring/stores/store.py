"""Stored embeddings, found by key: memory-mapped arrays that many threads read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import BundleInfo, read_array
from hvdrec.scoring.errors import BundleError, choices

Array = NDArray[Any]
CACHED_KEYS = 100_000
STORED_AS = {"<f4": "float32", "<f2": "float16", "|i1": "int8"}


class Store(Protocol):
    """Where embeddings come from: a bundle's own arrays, or a database that many services share."""

    @property
    def dtype(self) -> str:
        """Return the type of a key: "string" or "int"."""

    def __len__(self) -> int:
        """Return the number of stored embeddings."""

    def lookup(self, keys: Sequence[str | int | None]) -> tuple[Array, Array]:
        """Return embeddings float32 [k, width], and bool [k]: whether a key is stored.

        Keys are of the store's type, None is never stored. Rows of keys that are not stored hold
        zeros. Raises StoreError where the store cannot answer. Safe from many threads.
        """


class EmbeddingStore:
    """Users' or items' embeddings with their keys, sorted; nothing is read before it is asked for.

    keys: int64 [n], or UTF-8 in a fixed-width byte array [n]; embeddings: [n, width] of float32,
    float16, or int8 with a float32 scale for each row.
    """

    def __init__(self, info: BundleInfo, side: str, width: int) -> None:
        self.keys = read_array(info.path, f"{side}s/keys.npy")
        self.embeddings = read_array(info.path, f"{side}s/embeddings.npy")
        if self.keys.ndim != 1 or (
            self.keys.dtype.kind != "S" and self.keys.dtype != np.dtype("<i8")
        ):
            raise BundleError(
                f"{info.path}/{side}s/keys.npy: is {self.keys.dtype} of shape {self.keys.shape}, "
                "expected bytes or int64 of one dimension; export the bundle again"
            )
        kind = STORED_AS.get(self.embeddings.dtype.str)
        if (
            kind is None
            or self.embeddings.shape != (len(self.keys), width)
            or not self.embeddings.flags.c_contiguous
        ):
            raise BundleError(
                f"{info.path}/{side}s/embeddings.npy: is {self.embeddings.dtype} of shape "
                f"{self.embeddings.shape}, expected one of {choices(STORED_AS.values())} of "
                f"({len(self.keys)}, {width}), rows first; export the bundle again"
            )
        self.scales: Array | None = None
        if kind == "int8":
            self.scales = read_array(info.path, f"{side}s/scales.npy")
            if self.scales.shape != (len(self.keys),) or self.scales.dtype != np.dtype("<f4"):
                raise BundleError(
                    f"{info.path}/{side}s/scales.npy: is {self.scales.dtype} of shape "
                    f"{self.scales.shape}, expected float32 of ({len(self.keys)},); "
                    "export the bundle again"
                )
        self._as_stored = kind == "float32"
        self._plain: type = str if self.keys.dtype.kind == "S" else int
        # One byte more than the keys have, so that a longer key does not shrink to a stored one.
        self._asked_dtype = f"S{self.keys.dtype.itemsize + 1}"
        self._cache: dict[str | int | None, int] = {}

    @property
    def dtype(self) -> str:
        """Return the type of a key: "string" or "int"."""
        return "string" if self._plain is str else "int"

    def __len__(self) -> int:
        return len(self.keys)

    def cached_rows(self, keys: Sequence[Any]) -> Array | None:
        """Return the rows int64 [k] where all are plain keys that were found before, else None."""
        # True == 1 == 1.0, but only text equals text.
        if self._plain is int and not set(map(type, keys)) <= {int}:
            return None
        try:
            return np.fromiter(map(self._cache.__getitem__, keys), np.int64, len(keys))
        except (KeyError, TypeError):  # not found yet, or no key: a mapping, a list
            return None

    def rows(self, keys: Sequence[str | int | None]) -> Array:
        """Return the rows int64 [k] of keys in their type; -1 for one that is not stored."""
        cache = self._cache
        rows = [cache.get(key, -1) for key in keys]
        asked = [i for i, row in enumerate(rows) if row < 0 and keys[i] is not None]
        found = np.array(rows, dtype=np.int64)
        if not asked or not len(self.keys):
            return found
        wanted: list[Any] = [keys[i] for i in asked]
        found[asked] = searched = self._search(wanted)
        if len(cache) + len(asked) > CACHED_KEYS:
            # Other threads may read the old dictionary meanwhile: it is left as it is.
            self._cache = cache = {}
        pairs = zip(wanted[:CACHED_KEYS], searched.tolist(), strict=False)
        cache.update((key, row) for key, row in pairs if row >= 0)
        return found

    def take(self, rows: Array) -> Array:
        """Return the embeddings of rows, float32 [k, width]."""
        taken = self.embeddings.take(rows, axis=0)
        if self._as_stored:
            return taken
        taken = taken.astype(np.float32)
        if self.scales is not None:
            taken *= self.scales.take(rows)[:, None]
        return taken

    def lookup(self, keys: Sequence[str | int | None]) -> tuple[Array, Array]:
        """Return embeddings float32 [k, width], zeros where a key is not stored, and bool [k]."""
        rows = self.rows(keys)
        found = rows >= 0
        if found.all():
            return self.take(rows), found
        embeddings = np.zeros((len(rows), self.embeddings.shape[1]), dtype=np.float32)
        embeddings[found] = self.take(rows[found])
        return embeddings, found

    def key(self, row: int) -> str | int:
        """Return the key of a row."""
        key = self.keys[row]
        return bytes(key).decode() if self._plain is str else int(key)

    def keys_of(self, rows: Array) -> list[str | int]:
        """Return the keys of rows."""
        keys: list[Any] = self.keys[rows].tolist()
        return [key.decode() for key in keys] if self._plain is str else keys

    def _search(self, keys: Sequence[Any]) -> Array:
        """Return the rows of keys by binary search; -1 where there is none."""
        if self._plain is int:
            asked = np.array(keys, dtype=np.int64)
        else:
            try:
                asked = np.array(keys, dtype=self._asked_dtype)
            except UnicodeEncodeError:  # numpy encodes ASCII alone
                asked = np.array([key.encode() for key in keys], dtype=self._asked_dtype)
        # Of one type: for another, numpy would convert the whole array of keys.
        place = np.searchsorted(self.keys, asked.astype(self.keys.dtype))
        rows = np.minimum(place, len(self.keys) - 1)
        rows[self.keys[rows] != asked] = -1
        if self._plain is str and "\0" in "".join(keys):
            # Fixed-width bytes lose trailing NULs, so equal bytes may be of different keys.
            for i, key in enumerate(keys):
                if "\0" in key and rows[i] >= 0 and self.key(rows[i]) != key:
                    rows[i] = -1
        return rows
