"""Stored embeddings, found by key in memory-mapped arrays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import read_array
from hvdrec.scoring.errors import BundleError

Array = NDArray[Any]
CACHED_KEYS = 100_000


class EmbeddingStore:
    """Users' or items' embeddings with their keys, sorted; nothing is read before it is asked for.

    keys: int64 [n], or UTF-8 in a fixed-width byte array [n]; embeddings: float32 [n, width].
    """

    def __init__(self, path: Path, side: str, width: int) -> None:
        self.keys = read_array(path, f"{side}s/keys.npy")
        self.embeddings = read_array(path, f"{side}s/embeddings.npy")
        if self.keys.ndim != 1 or self.keys.dtype.kind not in "Si":
            raise BundleError(f"{path}/{side}s/keys.npy: holds no keys; export the bundle again")
        if self.embeddings.shape != (len(self.keys), width) or self.embeddings.dtype != np.float32:
            raise BundleError(
                f"{path}/{side}s/embeddings.npy: is {self.embeddings.dtype} of shape "
                f"{self.embeddings.shape}, expected float32 of ({len(self.keys)}, {width}); "
                "export the bundle again"
            )
        self._is_text = self.keys.dtype.kind == "S"
        self._rows: dict[str | int, int] = {}

    @property
    def dtype(self) -> str:
        """Return the type of a key: "string" or "int"."""
        return "string" if self._is_text else "int"

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, keys: Sequence[str | int]) -> Array:
        """Return the rows int64 [k] of keys in their type; -1 for a key that is not stored."""
        known = self._rows
        try:
            return np.array([known[key] for key in keys], dtype=np.int64)
        except KeyError:
            pass
        found = self._search(keys)
        if len(known) + len(keys) > CACHED_KEYS:
            # Other threads may read the old dictionary meanwhile: never shrink it, replace it.
            self._rows = known = {}
        for key, row in zip(keys, found.tolist(), strict=True):
            if row >= 0:
                known[key] = row
        return found

    def key(self, row: int) -> str | int:
        """Return the key of a row."""
        key = self.keys[row]
        return key.decode() if self._is_text else int(key)

    def all_rows_but(self, excluded: Collection[str | int]) -> Array | None:
        """Return a mask bool [n] of the rows whose keys are not excluded, or None for all."""
        if not excluded:
            return None
        rows = self.rows(list(excluded))
        mask = np.ones(len(self.keys), dtype=bool)
        mask[rows[rows >= 0]] = False
        return mask

    def _search(self, keys: Sequence[str | int]) -> Array:
        if not len(self.keys):
            return np.full(len(keys), -1, dtype=np.int64)
        if self._is_text:
            encoded = [str(key).encode() for key in keys]
            asked = np.array(encoded, dtype=np.bytes_)
            # Fixed-width bytes lose trailing NULs: such a key is never stored.
            whole = np.array([not text.endswith(b"\0") for text in encoded], dtype=bool)
        else:
            asked = np.array(keys, dtype=np.int64)
            whole = np.ones(len(keys), dtype=bool)
        place = np.minimum(np.searchsorted(self.keys, asked), len(self.keys) - 1)
        return np.where(whole & (self.keys[place] == asked), place, -1)
