"""Building a bundle's approximate index, and measuring what it finds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.errors import UserError
from hvdrec.exporting.precision import restored
from hvdrec.scoring.exact import ExactSearch
from hvdrec.scoring.hnsw import COST, INDEX, INDEX_ROWS, HnswSearch

Array = NDArray[Any]
Notify = Callable[[str], None]
LINKS = 16
"""Links of an item in each layer; twice as many in the lowest."""
BUILD_EFFORT = 256
"""Items that are looked at when the links of a new one are chosen."""
SEARCH_EFFORTS = (100, 140, 200, 280, 400, 560, 800, 1130, 1600, 2260, 3200)
GOAL = 0.99
AT = 100
QUERIES = 1000
PARTS = 10
EQUAL_LENGTHS = 1e-3
"""Lengths that differ by no more than this share count as equal."""


def require_index_library(config: Config) -> None:
    """Raise UserError where an index is wished for and faiss is not installed."""
    if config.export.index == "none":
        return
    try:
        import faiss  # noqa: F401
    except ImportError:
        raise UserError(
            f"export.index = '{config.export.index}': faiss is not installed; "
            "pip install 'hvdrec[index]', or export with export.index = 'none'"
        ) from None


def write_index(draft: Path, width: int, notify: Notify = lambda _: None) -> dict[str, Any] | None:
    """Build the index of a draft's items and return what its manifest says of it.

    Where there are so few items that going through all is quicker, none is written.

    The search effort is the smallest that finds on average GOAL of the AT items that the exact
    search finds, for the embeddings of stored users, as many as QUERIES, spread evenly. Where none
    does, it is the largest that is still quicker than going through all items. width: entries of
    the embeddings that retrieval counts. The same embeddings give the same file with the same
    version of faiss, from 1.15 on, however many threads build it.
    """
    exact = ExactSearch(*_stored(draft / "items"))
    if len(exact) < SEARCH_EFFORTS[0] * COST:
        notify(f"index: none is needed, going through {len(exact)} items is quicker")
        return None
    vectors = np.ascontiguousarray(restored(exact.vectors, exact.scales)[:, :width])
    if lengths_differ(vectors):
        vectors = lengthened(vectors)
    index, rows = _built(vectors, notify)
    users, scales = _stored(draft / "users")
    chosen = np.unique(np.linspace(0, len(users) - 1, min(QUERIES, len(users))).astype(np.int64))
    queries = restored(users[chosen], None if scales is None else scales[chosen])[:, :width]
    search = HnswSearch(draft, exact, width)
    search.use(index, rows)
    queries = np.ascontiguousarray(queries)
    recall = _tuned(index, search, exact, queries, notify)
    import faiss

    faiss.write_index(index, str(draft / INDEX))
    np.save(draft / INDEX_ROWS, rows, allow_pickle=False)
    return {
        "kind": "hnsw",
        "library": f"faiss {faiss.__version__}",
        "parameters": {
            "links": LINKS,
            "build_effort": BUILD_EFFORT,
            "search_effort": int(index.hnsw.efSearch),
            "vectors": "int8",
            "lengths_made_equal": vectors.shape[1] > width,
        },
        "recall": recall,
        "at": min(AT, len(vectors)),
        "queries": len(queries),
    }


def lengths_differ(vectors: Array) -> bool:
    """Return whether the largest inner product may be another one than that of the nearest."""
    lengths = np.linalg.norm(vectors, axis=1)
    least, most = lengths.min(initial=np.inf), lengths.max(initial=0.0)
    return bool(most - least > EQUAL_LENGTHS * most)


def lengthened(vectors: Array) -> Array:
    """Return vectors [n, width + 1], all as long as the longest; see `hvdrec.scoring.hnsw`."""
    squares = np.square(vectors, dtype=np.float64).sum(axis=1)
    missing = np.sqrt(squares.max(initial=0.0) - squares)
    return np.concatenate([vectors, missing[:, None].astype(np.float32)], axis=1)


def _stored(folder: Path) -> tuple[Array, Array | None]:
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    scales = folder / "scales.npy"
    return embeddings.view(np.ndarray), np.load(scales) if scales.exists() else None


def _built(vectors: Array, notify: Notify) -> tuple[Any, Array]:
    """Return an index and, of each of its vectors, the row int32 in ``vectors``."""
    import faiss

    kind: Any = faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexHNSWSQ(vectors.shape[1], kind, LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD_EFFORT
    index.train(vectors)
    for number, part in enumerate(np.array_split(vectors, PARTS)):
        notify(f"index: {number * 100 // PARTS} % of {len(vectors)} items")
        if len(part):
            index.add(part)
    order = breadth_first(_lowest_links(index), index.hnsw.entry_point)
    index.permute_entries(order.astype(np.int64))
    return index, order


def _lowest_links(index: Any) -> Array:
    """Return the links int32 [vectors, 2 LINKS] of the layer that has all; -1 for none."""
    import faiss

    library: Any = faiss
    hnsw = index.hnsw
    links = library.rev_swig_ptr(hnsw.neighbors.data(), hnsw.neighbors.size())
    starts = faiss.vector_to_array(hnsw.offsets)[:-1].astype(np.int64)
    found: Array = links[starts[:, None] + np.arange(hnsw.nb_neighbors(0))]
    return found


def breadth_first(links: Array, start: int) -> Array:
    """Return places int32 [n] in the order in which they are met from ``start``, each once.

    links: int32 [n, most], -1 for none. What no link leads to comes last.
    """
    met = np.zeros(len(links), dtype=bool)
    met[start] = True
    front = np.array([start])
    order = []
    while len(front):
        order.append(front)
        linked = links[front].ravel()
        linked = linked[linked >= 0]
        linked = linked[~met[linked]]
        front = linked[np.sort(np.unique(linked, return_index=True)[1])]
        met[front] = True
    found: Array = np.concatenate([*order, np.flatnonzero(~met)]).astype(np.int32)
    return found


def _tuned(
    index: Any, search: HnswSearch, exact: ExactSearch, queries: Array, notify: Notify
) -> float:
    """Set the search effort and return the recall that was measured with it."""
    at, nothing = min(AT, len(exact)), np.empty(0, dtype=np.int64)
    start = time.perf_counter()
    truth = [exact.search(query, at, nothing)[0] for query in queries]
    slow = time.perf_counter() - start
    for effort in (effort for effort in SEARCH_EFFORTS if effort * COST <= len(exact)):
        index.hnsw.efSearch = effort
        start = time.perf_counter()
        found = [search.search(query, at, nothing)[0] for query in queries]
        quick = time.perf_counter() - start
        hits = sum(len(np.intersect1d(*rows)) for rows in zip(found, truth, strict=True))
        recall = hits / max(1, at * len(queries))
        if recall >= GOAL:
            break
    short = "" if recall >= GOAL else f", short of {GOAL:g}: these vectors have few near neighbours"
    notify(
        f"index: finds {recall:.4f} of the {at} nearest{short}; "
        f"takes {quick / max(slow, 1e-9):.3f} of the time that all items take"
    )
    return recall
