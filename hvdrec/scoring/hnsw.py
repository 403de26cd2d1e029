"""Approximate retrieval: a graph of near neighbours (HNSW) that is walked towards the user.

Malkov and Yashunin: Efficient and Robust Approximate Nearest Neighbor ItemSearch Using Hierarchical
Navigable Small World Graphs, 2016; built and read by faiss, which the extra ``index`` installs.
Its vectors are int8, to find their neighbourhood: what it finds is scored with the bundle's own
embeddings. Where lengths differ, the walk does not lead to the largest inner products, but to the
nearest vectors: then the index holds one entry more, which makes all lengths equal (Bachrach et
al.: Speeding Up the Xbox Recommender System Using a Euclidean Transformation for Inner-Product
Spaces, 2014). Neighbours lie near each other in the file, which halves the time of a walk: rows of
the index are not those of the items, and a second file tells which they are.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.scoring.bundle import Stamp, read_array, stamp_of
from hvdrec.scoring.errors import BundleError, ReplacedError
from hvdrec.scoring.exact import ExactSearch, largest, remaining

Array = NDArray[Any]
INDEX = "items/index.faiss"
INDEX_ROWS = "items/index_rows.npy"
COST = 100
"""To find one item in the index takes as long as going through so many vectors."""
SPARE = 1.5
"""What is asked of the index beyond the expected number where only some items are allowed."""


class HnswSearch:
    """Search over a bundle's index, and over all its vectors where that is quicker or better.

    Safe from many threads. Without faiss all is searched exactly, after a warning.
    """

    def __init__(
        self,
        path: Path,
        exact: ExactSearch,
        width: int,
        *,
        stamps: Mapping[str, Stamp] | None = None,
    ) -> None:
        """Take the index of the bundle at ``path`` over ``exact``'s vectors.

        Queries have ``width`` entries. The first search opens the files, which must not be others
        than their ``stamps`` tell.
        """
        self._path = path
        self._stamps = {} if stamps is None else stamps
        self.exact = exact
        self._width = width
        self._lock = threading.Lock()
        self._index: Any = None
        self._rows = np.empty(0, dtype=np.int32)
        self._has_library = True

    @property
    def is_exact(self) -> bool:
        """Return whether what it finds is certain to be the best."""
        return not self._has_library

    def open(self) -> None:
        """Open the index, memory-mapped; BundleError if it is damaged or another one."""
        with self._lock:
            if self._index is None and self._has_library:
                opened = self._opened()
                if opened is not None:
                    self.use(*opened)

    def use(self, index: Any, rows: Array) -> None:
        """Take an index that is open already, and the item's row of each of its vectors."""
        self._rows = rows
        self._index = index  # the last: other threads look at it

    def search(
        self, query: Array, count: int, excluded: Array, allowed: Array | None = None
    ) -> tuple[Array, Array]:
        """Return rows near a query and their inner products; see `ItemSearch.search`.

        What the index gives beyond what is excluded or not allowed is enough, or else the rows that
        are left are all gone through: a filter loses no item.
        """
        if self._index is None:
            self.open()
        kept = None if allowed is None else remaining(allowed, excluded)
        total = len(self.exact)
        left = total if kept is None else int(np.count_nonzero(kept))
        asked = count + len(excluded)
        if kept is not None:
            asked = int(SPARE * count * total / max(1, left)) + 1
        found = self._found(query, min(asked, total), left)
        if kept is not None:
            found = found[kept[found]]
        elif excluded.size:
            found = found[~np.isin(found, excluded)]
        if len(found) < count:
            return self.exact.search(query, count, excluded, allowed)
        found.sort()
        scores = self.exact.products_of(found, query)
        best = largest(scores, count)
        return found[best], scores[best]

    def _found(self, query: Array, asked: int, left: int) -> Array:
        """Return at least ``asked`` rows int64 of the index; none where it would take too long."""
        index = self._index
        if index is None:
            return np.empty(0, dtype=np.int64)
        # The walk goes on until it has met so many near ones, which are all scored then.
        asked = max(asked, min(index.hnsw.efSearch, len(self.exact)))
        if asked * COST > left:
            return np.empty(0, dtype=np.int64)
        import faiss

        library: Any = faiss
        effort = library.SearchParametersHNSW(efSearch=asked)
        long = np.zeros((1, index.d), dtype=np.float32)
        long[0, : self._width] = query
        places = index.search(long, asked, params=effort)[1][0]
        rows: Array = self._rows[places[places >= 0]].astype(np.int64)
        return rows

    def _opened(self) -> tuple[Any, Array] | None:
        """Return the index, memory-mapped, and the rows of its vectors; None without faiss."""
        file = self._path / INDEX
        try:
            import faiss
        except ImportError:
            self._has_library = False
            import logging

            logging.getLogger("hvdrec.scoring").warning(
                "%s: faiss is not installed, all items are gone through instead; "
                "pip install 'hvdrec[index]'",
                file,
            )
            return None
        try:
            index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
        except (OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise BundleError(
                f"{file}: no readable index ({reason}); export the bundle again"
            ) from None
        total = len(self.exact)
        if (
            not isinstance(index, faiss.IndexHNSW)
            or index.metric_type != faiss.METRIC_INNER_PRODUCT
            or index.ntotal != total
            or index.d not in (self._width, self._width + 1)
        ):
            raise BundleError(
                f"{file}: is no HNSW index of {total} items and width {self._width}; "
                "export the bundle again"
            )
        rows = read_array(self._path, INDEX_ROWS)
        if rows.dtype != np.dtype("<i4") or not _is_each_once(rows, total):
            raise BundleError(
                f"{self._path / INDEX_ROWS}: does not hold each row of {total} items once; "
                "export the bundle again"
            )
        self._check_unchanged()
        return index, rows

    def _check_unchanged(self) -> None:
        for name in (INDEX, INDEX_ROWS):
            stamp = self._stamps.get(name)
            if stamp is not None and stamp_of((self._path / name).stat()) != stamp:
                raise ReplacedError(
                    f"{self._path / name}: was replaced after the bundle was loaded; load it again"
                )


def _is_each_once(rows: Array, count: int) -> bool:
    """Return whether rows are a permutation of 0 ... count - 1."""
    if rows.shape != (count,) or (count and (rows.min() < 0 or rows.max() >= count)):
        return False
    met = np.zeros(count, dtype=bool)
    met[rows] = True
    return bool(met.all())
