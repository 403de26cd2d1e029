"""Approximate retrieval through an HNSW graph of near neighbours.

See Malkov and Yashunin: Efficient and Robust Approximate Nearest Neighbor Search Using Hierarchical
Navigable Small World Graphs, 2016. faiss, which the extra ``index`` installs, builds and searches
the graph.

The graph stores int8 vectors. They only select candidates, which are then scored with the bundle's
own embeddings. HNSW finds the nearest vectors. These are also the vectors with the largest inner
products if all vectors have the same length. So vectors of different lengths get one more entry
that makes the lengths equal (Bachrach et al.: Speeding Up the Xbox Recommender System Using a
Euclidean Transformation for Inner-Product Spaces, 2014). The index stores vectors that are
neighbours close together, which halves the time of a search. So the vectors are in another order
than the items; a second file holds the item row of each vector.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hvdrec.scoring.array_files import Array, read_array
from hvdrec.scoring.bundle import Stamp, replaced, stamp_of
from hvdrec.scoring.errors import first_line, invalid_bundle
from hvdrec.scoring.exact import ExactSearch, largest, remaining

INDEX = "items/index.faiss"
INDEX_ROWS = "items/index_rows.npy"
COST = 100
"""An index search that fetches n items takes as long as an exact search over `COST` * n items."""
SPARE = 1.5
"""If a filter allows only some items, more items are fetched from the index, so that enough of them
are allowed. This factor adds a reserve, since allowed items may be rarer near a query than
elsewhere."""


class HnswSearch:
    """Searches a bundle's index, or all vectors where that is faster or finds more items.

    Safe to share between threads. If faiss is not installed, the first search logs a warning and
    every search reads all vectors.
    """

    def __init__(
        self,
        path: Path,
        exact: ExactSearch,
        width: int,
        *,
        stamps: Mapping[str, Stamp] | None = None,
    ) -> None:
        """Prepare to search; the first search, or `open`, opens the files of the index.

        Args:
            path: Directory of the bundle.
            exact: Exact search over the same items.
            width: Width of a query.
            stamps: `BundleInfo.stamps`, to detect files that were replaced after the manifest was
                read; None to skip the check.
        """
        self._path = path
        self._stamps = {} if stamps is None else stamps
        self.exact = exact
        self._width = width
        self._lock = threading.Lock()
        self._index: Any = None
        self._rows = np.empty(0, dtype=np.int32)
        self._has_library = True

    def open(self) -> None:
        """Memory-map the index.

        Raises:
            BundleError: The index is damaged, was built for other items or was replaced.
        """
        with self._lock:
            if self._index is None and self._has_library:
                opened = self._opened()
                if opened is not None:
                    self.use(*opened)

    def use(self, index: Any, rows: Array) -> None:
        """Use an open faiss index; ``rows`` holds the item row of each vector in the index."""
        self._rows = rows
        self._index = index  # last, since other threads check it

    def search(
        self, query: Array, count: int, excluded: Array, allowed: Array | None = None
    ) -> tuple[Array, Array]:
        """Return rows near a query and their inner products; see `ExactSearch.search`.

        If the index returns fewer than ``count`` rows that are allowed and not excluded, all
        vectors are searched instead, so a filter never makes the result too short.
        """
        if self._index is None:
            self.open()
        kept = None if allowed is None else remaining(allowed, excluded)
        total = len(self.exact)
        left = total if kept is None else int(np.count_nonzero(kept))
        wanted = count + len(excluded)
        if kept is not None:
            wanted = int(SPARE * count * total / max(1, left)) + 1
        rows = self._near(query, min(wanted, total), left)
        if kept is not None:
            rows = rows[kept[rows]]
        elif excluded.size:
            rows = rows[~np.isin(rows, excluded)]
        if len(rows) < count:
            return self.exact.search(query, count, excluded, allowed)
        rows.sort()
        scores = self.exact.products_of(rows, query)
        best = largest(scores, count)
        return rows[best], scores[best]

    def _near(self, query: Array, wanted: int, left: int) -> Array:
        """Return about ``wanted`` rows from the index, int64; no rows if exact search is faster.

        Args:
            query: float32 [width].
            wanted: Number of rows to fetch.
            left: Number of vectors that an exact search would score.
        """
        index = self._index
        if index is None:
            return np.empty(0, dtype=np.int64)
        # The search visits at least efSearch near items in any case, so fetch all of them.
        wanted = max(wanted, min(index.hnsw.efSearch, len(self.exact)))
        if wanted * COST > left:
            return np.empty(0, dtype=np.int64)
        import faiss

        library: Any = faiss
        parameters = library.SearchParametersHNSW(efSearch=wanted)
        padded = np.zeros((1, index.d), dtype=np.float32)
        padded[0, : self._width] = query
        indices = index.search(padded, wanted, params=parameters)[1][0]
        rows: Array = self._rows[indices[indices >= 0]].astype(np.int64)
        return rows

    def _opened(self) -> tuple[Any, Array] | None:
        """Return the memory-mapped index and the item row of each vector; None without faiss."""
        file = self._path / INDEX
        try:
            import faiss
        except ImportError:
            self._has_library = False
            import logging

            logging.getLogger("hvdrec.scoring").warning(
                "%s: faiss is not installed, retrieval searches all items instead; "
                "pip install 'hvdrec[index]'",
                file,
            )
            return None
        try:
            index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
        except (OSError, RuntimeError) as error:
            raise invalid_bundle(file, f"is not a readable index ({first_line(error)})") from None
        total = len(self.exact)
        if (
            not isinstance(index, faiss.IndexHNSW)
            or index.metric_type != faiss.METRIC_INNER_PRODUCT
            or index.ntotal != total
            or index.d not in (self._width, self._width + 1)
        ):
            problem = f"is not an HNSW index of {total} items and width {self._width}"
            raise invalid_bundle(file, problem)
        rows = read_array(self._path, INDEX_ROWS)
        if rows.dtype != np.dtype("<i4") or not _is_permutation(rows, total):
            problem = f"does not hold each row of {total} items once"
            raise invalid_bundle(self._path / INDEX_ROWS, problem)
        for name in (INDEX, INDEX_ROWS):
            stamp = self._stamps.get(name)
            if stamp is not None and stamp_of((self._path / name).stat()) != stamp:
                raise replaced(self._path / name, "after the bundle was loaded")
        return index, rows


def _is_permutation(rows: Array, count: int) -> bool:
    """Return True if ``rows`` is a permutation of 0 to ``count - 1``."""
    if rows.shape != (count,) or (count and (rows.min() < 0 or rows.max() >= count)):
        return False
    seen = np.zeros(count, dtype=bool)
    seen[rows] = True
    return bool(seen.all())
