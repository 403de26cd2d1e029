"""Stored embeddings, found by key, and titles: memory-mapped arrays that many threads read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import BundleInfo, read_array
from hvdrec.scoring.errors import BundleError

Array = NDArray[Any]
CACHED_KEYS = 100_000


class EmbeddingStore:
    """Users' or items' embeddings with their keys, sorted; nothing is read before it is asked for.

    keys: int64 [n], or UTF-8 in a fixed-width byte array [n]; embeddings: float32 [n, width].
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
        if (
            self.embeddings.shape != (len(self.keys), width)
            or self.embeddings.dtype != np.dtype("<f4")
            or not self.embeddings.flags.c_contiguous
        ):
            raise BundleError(
                f"{info.path}/{side}s/embeddings.npy: is {self.embeddings.dtype} of shape "
                f"{self.embeddings.shape}, expected float32 of ({len(self.keys)}, {width}), rows "
                "first; export the bundle again"
            )
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
        if not set(map(type, keys)) <= {self._plain}:
            return None
        try:
            return np.fromiter(map(self._cache.__getitem__, keys), np.int64, len(keys))
        except KeyError:
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
        return self.embeddings.take(rows, axis=0)

    def key(self, row: int) -> str | int:
        """Return the key of a row."""
        key = self.keys[row]
        return bytes(key).decode() if self._plain is str else int(key)

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


class Titles:
    """What items are called, where the bundle tells: a UTF-8 blob and its offsets int64 [n + 1]."""

    def __init__(self, info: BundleInfo, items: int) -> None:
        self._offsets: Array | None = None
        if not info.holds("items/titles.npy"):
            return
        self._blob = read_array(info.path, "items/titles.npy")
        self._offsets = read_array(info.path, "items/titles_offsets.npy")
        if (
            self._blob.dtype != np.uint8
            or self._offsets.dtype != np.dtype("<i8")
            or self._offsets.shape != (items + 1,)
            or self._offsets[-1] != self._blob.size
        ):
            raise BundleError(
                f"{info.path}/items/titles_offsets.npy: does not fit {items} items and their "
                "titles; export the bundle again"
            )

    def __getitem__(self, row: int) -> str | None:
        """Return the title of an item's row; None where it has none."""
        if self._offsets is None:
            return None
        start, stop = self._offsets[row : row + 2].tolist()
        return bytes(self._blob[start:stop]).decode() or None
