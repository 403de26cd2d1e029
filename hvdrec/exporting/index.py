"""Build a bundle's approximate (HNSW) index over item embeddings, and measure its recall."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.config.sections import Export
from hvdrec.errors import invalid_value
from hvdrec.exporting.precision import restored
from hvdrec.scoring.exact import ExactSearch
from hvdrec.scoring.hnsw import COST, INDEX, INDEX_ROWS, HnswSearch

Array = NDArray[Any]
Notify = Callable[[str], None]
LINKS = 16
"""Number of links of an item in each layer of the index; the lowest layer has twice as many."""
BUILD_EFFORT = 256
"""Number of items that are compared to choose the links of a new item."""
SEARCH_EFFORTS = (100, 140, 200, 280, 400, 560, 800, 1130, 1600, 2260, 3200)
GOAL = 0.99
AT = 100
QUERIES = 1000
PARTS = 10
EQUAL_LENGTHS = 1e-3
"""Vector lengths count as equal up to this relative difference."""


def require_index_library(export: Export) -> None:
    """Raise UserError if an index is configured and faiss is not installed."""
    if export.index == "none":
        return
    try:
        import faiss  # noqa: F401
    except ImportError:
        remedy = "pip install 'hvdrec[index]', or use export.index = 'none'"
        problem = "faiss is not installed"
        raise invalid_value("export.index", export.index, problem, remedy) from None


def write_index(draft: Path, width: int, notify: Notify = lambda _: None) -> dict[str, Any] | None:
    """Build the index over the items of a bundle, unless an exact search is faster anyway.

    The search effort is tuned on up to QUERIES stored users. The smallest effort is chosen with
    which the index finds, on average, the share GOAL of the first AT items of an exact search. If
    no effort achieves this, the largest effort is chosen with which the index is faster than an
    exact search. With the same version of faiss (from 1.15 on), the same embeddings give the same
    file, for any number of threads.

    Args:
        draft: The bundle's directory before it is published.
        width: Number of leading entries of an embedding that retrieval compares.
        notify: Called with lines about the progress.

    Returns:
        The entry of the manifest that describes the index; None if no index was written.
    """
    exact = ExactSearch(*_stored(draft / "items"))
    if len(exact) < SEARCH_EFFORTS[0] * COST:
        notify(f"index: not needed, an exact search of {len(exact)} items is faster")
        return None
    vectors = np.ascontiguousarray(restored(exact.vectors, exact.scales)[:, :width])
    if lengths_differ(vectors):
        vectors = lengthened(vectors)
    index, rows = _build(vectors, notify)
    users, scales = _stored(draft / "users")
    chosen = np.unique(np.linspace(0, len(users) - 1, min(QUERIES, len(users))).astype(np.int64))
    queries = restored(users[chosen], None if scales is None else scales[chosen])[:, :width]
    search = HnswSearch(draft, exact, width)
    search.use(index, rows)
    queries = np.ascontiguousarray(queries)
    recall = _tune(index, search, exact, queries, notify)
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
    """Return True if the vectors' lengths differ.

    If they do, the vector nearest to a query may not have the largest inner product with it.
    """
    lengths = np.linalg.norm(vectors, axis=1)
    least, most = lengths.min(initial=np.inf), lengths.max(initial=0.0)
    return bool(most - least > EQUAL_LENGTHS * most)


def lengthened(vectors: Array) -> Array:
    """Add a column that makes all vectors as long as the longest; see `hvdrec.scoring.hnsw`.

    Returns:
        float32 [n, width + 1].
    """
    squares = np.square(vectors, dtype=np.float64).sum(axis=1)
    missing = np.sqrt(squares.max(initial=0.0) - squares)
    return np.concatenate([vectors, missing[:, None].astype(np.float32)], axis=1)


def breadth_first(links: Array, start: int) -> Array:
    """Order the nodes of a graph by a breadth-first search; unreachable nodes come last.

    Args:
        links: int32 [n, most], the neighbours of each node, padded with -1.
        start: The first node.

    Returns:
        The nodes in order, int32 [n].
    """
    visited = np.zeros(len(links), dtype=bool)
    visited[start] = True
    front = np.array([start])
    order = []
    while len(front):
        order.append(front)
        linked = links[front].ravel()
        linked = linked[linked >= 0]
        linked = linked[~visited[linked]]
        front = linked[np.sort(np.unique(linked, return_index=True)[1])]
        visited[front] = True
    nodes: Array = np.concatenate([*order, np.flatnonzero(~visited)]).astype(np.int32)
    return nodes


def _stored(folder: Path) -> tuple[Array, Array | None]:
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    scales = folder / "scales.npy"
    return embeddings.view(np.ndarray), np.load(scales) if scales.exists() else None


def _build(vectors: Array, notify: Notify) -> tuple[Any, Array]:
    """Return an index, and for each of its entries the row of `vectors` (int32)."""
    import faiss

    quantizer: Any = faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexHNSWSQ(vectors.shape[1], quantizer, LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD_EFFORT
    index.train(vectors)
    for number, part in enumerate(np.array_split(vectors, PARTS)):
        notify(f"index: {number * 100 // PARTS} % of {len(vectors)} items")
        if len(part):
            index.add(part)
    # A search is faster if neighbours are close together in memory.
    order = breadth_first(_lowest_links(index), index.hnsw.entry_point)
    index.permute_entries(order.astype(np.int64))
    return index, order


def _lowest_links(index: Any) -> Array:
    """Return the links of the lowest layer, which has all n items: int32 [n, 2 * LINKS]."""
    import faiss

    library: Any = faiss
    hnsw = index.hnsw
    links = library.rev_swig_ptr(hnsw.neighbors.data(), hnsw.neighbors.size())
    starts = faiss.vector_to_array(hnsw.offsets)[:-1].astype(np.int64)
    lowest: Array = links[starts[:, None] + np.arange(hnsw.nb_neighbors(0))]
    return lowest


def _tune(
    index: Any, search: HnswSearch, exact: ExactSearch, queries: Array, notify: Notify
) -> float:
    """Set the search effort and return the measured recall."""
    at, nothing = min(AT, len(exact)), np.empty(0, dtype=np.int64)
    start = time.perf_counter()
    expected = [exact.search(query, at, nothing)[0] for query in queries]
    exact_seconds = time.perf_counter() - start
    for effort in (effort for effort in SEARCH_EFFORTS if effort * COST <= len(exact)):
        index.hnsw.efSearch = effort
        start = time.perf_counter()
        results = [search.search(query, at, nothing)[0] for query in queries]
        seconds = time.perf_counter() - start
        hits = sum(len(np.intersect1d(*rows)) for rows in zip(results, expected, strict=True))
        recall = hits / max(1, at * len(queries))
        if recall >= GOAL:
            break
    short = "" if recall >= GOAL else f", below {GOAL:g}: these vectors have few near neighbours"
    notify(
        f"index: recall {recall:.4f} at {at}{short}; "
        f"takes {seconds / max(exact_seconds, 1e-9):.3f} of the time of an exact search"
    )
    return recall
