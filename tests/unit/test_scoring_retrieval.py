"""Exact and index search give the rows and scores of a plain float64 computation."""

from __future__ import annotations

import logging
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec.exporting.precision import compressed, restored
from hvdrec.scoring import exact as exact_module
from hvdrec.scoring import hnsw
from hvdrec.scoring.bundle import stamp_of
from hvdrec.scoring.errors import BundleError, ReplacedError
from hvdrec.scoring.exact import ExactSearch, inner_products
from hvdrec.scoring.hnsw import HnswSearch

NOTHING = np.empty(0, dtype=np.int64)
DTYPES = ["float32", "float16", "int8"]
Array = np.ndarray[Any, Any]


def expected_rows(scores: Array, count: int, excluded: Array, allowed: Array | None) -> list[int]:
    """Return the best rows by a full sort; ties go to the first rows."""
    left = [row for row in range(len(scores)) if row not in set(excluded.tolist())]
    left = [row for row in left if allowed is None or allowed[row]]
    return sorted(sorted(left, key=lambda row: (-scores[row], row))[:count])


@settings(max_examples=200, deadline=None)
@given(
    # Small integers: sums are exact in every dtype, and ties are common.
    vectors=st.lists(st.tuples(*[st.integers(-3, 3)] * 3), max_size=40),
    query=st.tuples(*[st.integers(-3, 3)] * 2),
    count=st.integers(1, 45),
    excluded=st.lists(st.integers(0, 39), max_size=10),
    allowed=st.none() | st.lists(st.booleans(), min_size=40, max_size=40),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([1, 3, 4096]),
)
def test_exact_search_returns_the_best_rows(
    vectors: list[tuple[int, ...]],
    query: tuple[int, ...],
    count: int,
    excluded: list[int],
    allowed: list[bool] | None,
    dtype: str,
    block: int,
) -> None:
    exact = np.array(vectors, dtype=np.float64).reshape(-1, 3)
    left_out = np.array([row for row in excluded if row < len(exact)], dtype=np.int64)
    mask = None if allowed is None else np.array(allowed[: len(exact)], dtype=bool)
    kept = None if mask is None else mask.copy()
    scales = np.full(len(exact), 0.5, np.float32) if dtype == "int8" else None
    scores = exact[:, :2] @ np.array(query) * (0.5 if dtype == "int8" else 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_module, "BLOCK_ROWS", block)
        patch.setattr(exact_module, "GROUP_ROWS", 4)
        search = ExactSearch(exact.astype(dtype), scales)
        rows, found = search.search(np.array(query, np.float32), count, left_out, mask)
    assert rows.tolist() == expected_rows(scores, count, left_out, mask)
    assert found.dtype == np.float32
    assert found.tolist() == scores[rows].tolist()
    assert mask is None or kept is None or mask.tolist() == kept.tolist(), "the mask was changed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 6e4])
@pytest.mark.parametrize("length", [1e-30, 1e-3, 1.0, 1e3, 1e30])
def test_inner_products_of_compressed_vectors_are_those_of_the_restored_vectors(
    dtype: str, size: float, length: float
) -> None:
    random = np.random.default_rng(0)
    stored, scales = compressed((random.uniform(-1, 1, (9000, 8)) * size).astype("f4"), dtype)
    query = (random.normal(size=8) * length).astype(np.float32)
    numbers = restored(stored, scales).astype(np.float64)
    error = np.abs(inner_products(stored, query, scales) - numbers @ query.astype(np.float64))
    assert (error <= 4e-7 * (np.abs(numbers) @ np.abs(query.astype(np.float64)))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 12])
def test_a_search_needs_little_memory_besides_the_scores(dtype: str, width: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(200_000, 16)).astype(np.float32)
    search = ExactSearch(*compressed(vectors, dtype))
    tracemalloc.start()
    try:
        search.search(np.ones(width, np.float32), 10, NOTHING)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The scores take 800 kB, the mask of contenders 200 kB, a block of float32 260 kB.
    assert peak < 1_500_000


# ---------------------------------------------------------------------------------- the index

COUNT, ITEMS, WIDTH = 20, 3000, 8


def clustered(rows: int, seed: int) -> Array:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(30, WIDTH))
    vectors = centres[random.integers(0, 30, rows)] + random.normal(0, 0.3, (rows, WIDTH))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray((vectors / lengths).astype(np.float32))


VECTORS, QUERIES = clustered(ITEMS, 1), clustered(50, 2)


def build(vectors: Array = VECTORS, metric: int = faiss.METRIC_INNER_PRODUCT) -> Any:
    quantizer: Any = faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexHNSWSQ(vectors.shape[1], quantizer, 8, metric)
    index.train(vectors)
    index.add(vectors)
    index.hnsw.efSearch = 60
    return index


ROWS = np.random.default_rng(3).permutation(ITEMS).astype(np.int32)


def write(path: Path, index: Any, rows: Any = ROWS) -> Path:
    (path / "items").mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(path / "items" / "index.faiss"))
    np.save(path / "items" / "index_rows.npy", rows)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an index that stores the items in another order."""
    return write(tmp_path_factory.mktemp("index"), build(VECTORS[ROWS]))


@pytest.fixture
def index_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the index even if an exact search would be faster."""
    monkeypatch.setattr(hnsw, "COST", 0)


def search_of(path: Path) -> HnswSearch:
    return HnswSearch(path, ExactSearch(VECTORS), WIDTH)


def share_found(search: ExactSearch | HnswSearch, count: int = COUNT) -> float:
    exact = ExactSearch(VECTORS)
    hits = [
        len(np.intersect1d(search.search(q, count, NOTHING)[0], exact.search(q, count, NOTHING)[0]))
        for q in QUERIES
    ]
    return sum(hits) / (count * len(QUERIES))


@pytest.mark.usefixtures("index_only")
def test_the_index_finds_the_rows_of_the_exact_search(path: Path) -> None:
    search = search_of(path)
    assert share_found(search) > 0.97
    rows, scores = search.search(QUERIES[0], COUNT, NOTHING)
    assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()
    # Scores are computed from the stored vectors, not from the int8 vectors of the index.
    np.testing.assert_allclose(scores, VECTORS[rows] @ QUERIES[0], rtol=1e-6)


@pytest.mark.usefixtures("index_only")
@settings(max_examples=60, deadline=None)
@given(
    query=st.integers(0, len(QUERIES) - 1),
    count=st.sampled_from([1, 5, 40, ITEMS, 2 * ITEMS]),
    seed=st.integers(0, 2**20),
    share=st.sampled_from([0.0, 0.001, 0.01, 0.3, 1.0]),
    excluded=st.sampled_from([0, 1, 100, ITEMS]),
    is_filtered=st.booleans(),
)
def test_a_filter_loses_no_item(
    path: Path, query: int, count: int, seed: int, share: float, excluded: int, is_filtered: bool
) -> None:
    random = np.random.default_rng(seed)
    # The nearest rows are excluded, so the index returns too few.
    nearest = np.argsort(-(VECTORS @ QUERIES[query]))
    out = nearest[:excluded] if excluded < ITEMS else random.permutation(ITEMS)
    allowed = random.random(ITEMS) < share if is_filtered else None
    rows, scores = search_of(path).search(QUERIES[query], count, out, allowed)
    possible = set(range(ITEMS)) - set(out.tolist())
    if allowed is not None:
        possible &= set(np.flatnonzero(allowed).tolist())
    assert set(rows.tolist()) <= possible
    assert len(rows) == len(set(rows.tolist())) == min(count, len(possible))
    np.testing.assert_allclose(scores, VECTORS[rows] @ QUERIES[query], rtol=1e-6)


def test_few_items_are_searched_exactly(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = search_of(path)
    search.open()
    searches: list[int] = []
    index = search._index.search
    monkeypatch.setattr(hnsw, "COST", 40)
    monkeypatch.setattr(
        search._index, "search", lambda *a, **b: (searches.append(a[1]), index(*a, **b))[1]
    )
    # One item of the index costs 40 vectors: 100 items exceed 3000 vectors, 60 items 2000.
    assert share_found(search, 100) == 1.0
    rows, _ = search.search(QUERIES[0], COUNT, NOTHING, np.arange(ITEMS) < 2000)
    assert len(rows) == COUNT
    assert searches == []
    search.search(QUERIES[0], 75, NOTHING)
    search.search(QUERIES[0], COUNT, NOTHING, np.arange(ITEMS) < 2500)
    assert searches == [75, 60]


@pytest.mark.usefixtures("index_only")
def test_many_threads_get_the_results_of_one(path: Path) -> None:
    search = search_of(path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: search.search(QUERIES[i % 50], 5, NOTHING), range(400)))
    for i, (rows, scores) in enumerate(found):
        expected = search.search(QUERIES[i % 50], 5, NOTHING)
        assert rows.tolist() == expected[0].tolist()
        assert scores.tobytes() == expected[1].tobytes()


def test_without_faiss_the_search_is_exact_after_a_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    search = search_of(path)
    with caplog.at_level(logging.WARNING, "hvdrec.scoring"):
        assert share_found(search) == 1.0
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}/items/index.faiss: faiss is not installed, retrieval searches all items instead; "
        "pip install 'hvdrec[index]'"
    ]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def scrambled(data: bytes) -> bytes:
    """Overwrite the links of an index."""
    middle = len(data) // 2
    return data[:middle] + b"\x7f" * 4000 + data[middle + 4000 :]


@pytest.mark.parametrize("damage", [cut, scrambled, lambda _: b"", lambda _: b"no index" * 99])
def test_a_damaged_index_is_refused(
    path: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    copy = Path(shutil.copytree(path, tmp_path / "b"))
    file = copy / "items" / "index.faiss"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        BundleError, match=r"index\.faiss: is not a readable index .*export the bundle"
    ):
        search_of(copy).open()


@pytest.mark.parametrize(
    "make",
    [
        lambda: build(VECTORS[:-1]),
        lambda: build(np.hstack([VECTORS, VECTORS])),
        lambda: build(metric=faiss.METRIC_L2),
        lambda: faiss.IndexFlatIP(WIDTH),
    ],
    ids=["items", "width", "metric", "index type"],
)
def test_an_index_of_other_items_is_refused(tmp_path: Path, make: Callable[[], Any]) -> None:
    write(tmp_path, make())
    with pytest.raises(
        BundleError, match=r"is not an HNSW index of 3000 items and width 8; export"
    ):
        search_of(tmp_path).open()


@pytest.mark.parametrize(
    "rows",
    [
        ROWS.astype(np.int64),
        ROWS[:-1],
        np.append(ROWS[:-1], ROWS[0]),
        ROWS - 1,
        ROWS + 1,
        ROWS[None],
    ],
    ids=["type", "fewer", "one twice", "too low", "too high", "dimensions"],
)
def test_index_rows_must_be_a_permutation_of_the_items(tmp_path: Path, rows: Any) -> None:
    write(tmp_path, build(), rows)
    with pytest.raises(BundleError, match=r"index_rows\.npy: does not hold each row of 3000 items"):
        search_of(tmp_path).open()


@pytest.mark.parametrize("name", ["items/index.faiss", "items/index_rows.npy"])
def test_an_index_that_was_replaced_after_loading_is_refused(
    path: Path, tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(path, tmp_path / "b"))
    stamps = {name: stamp_of((copy / name).stat())}
    HnswSearch(copy, ExactSearch(VECTORS), WIDTH, stamps=stamps).open()
    (tmp_path / "new").write_bytes((copy / name).read_bytes())
    (tmp_path / "new").rename(copy / name)
    with pytest.raises(ReplacedError, match=f"{name}: was replaced after the bundle was loaded"):
        HnswSearch(copy, ExactSearch(VECTORS), WIDTH, stamps=stamps).open()
