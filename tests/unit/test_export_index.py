"""The index that export builds: its recall, its manifest entry, and when none is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest

from hvdrec.config import Config
from hvdrec.config.sections import Export
from hvdrec.errors import UserError
from hvdrec.exporting import index as building
from hvdrec.exporting.index import (
    breadth_first,
    lengthened,
    lengths_differ,
    require_index_library,
    write_index,
)
from hvdrec.exporting.precision import compressed
from hvdrec.scoring import hnsw
from hvdrec.scoring.exact import ExactSearch
from hvdrec.scoring.hnsw import INDEX, INDEX_ROWS, HnswSearch
from tests.small_model import small_config

WIDTH, NOTHING = 8, np.empty(0, dtype=np.int64)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An index pays off from 4000 items on, and one thread builds it.

    More threads build the same index, but slowly on a busy machine.
    """
    monkeypatch.setattr(building, "COST", 40)
    monkeypatch.setattr(hnsw, "COST", 40)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def write_vectors(
    folder: Path, items: int, *, spread: float = 0.0, kind: str = "float32", dimensions: int = 3
) -> None:
    """Write embeddings of items and of 40 users, with one column that retrieval does not count.

    They lie near ``dimensions`` axes, as trained ones do; spread: how much their lengths differ.
    """
    random = np.random.default_rng(0)
    axes = random.normal(size=(dimensions, WIDTH))
    for side, rows in (("users", 40), ("items", items)):
        vectors = random.normal(size=(rows, dimensions)) @ axes
        vectors += 0.1 * random.normal(size=vectors.shape)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors *= np.exp(random.normal(0, spread, (rows, 1)))
        whole = np.hstack([vectors, random.normal(size=(rows, 1))]).astype(np.float32)
        stored, scales = compressed(whole, kind)
        (folder / side).mkdir()
        np.save(folder / side / "embeddings.npy", stored)
        if scales is not None:
            np.save(folder / side / "scales.npy", scales)


def share_found(folder: Path, at: int = 100) -> float:
    """Return how much of the best, by a full sort, the written index finds for all users."""
    items, users = (np.load(folder / side / "embeddings.npy") for side in ("items", "users"))
    search = HnswSearch(folder, ExactSearch(items), WIDTH)
    search.open()
    assert search._index.ntotal == len(items)
    hits = 0
    for user in users[:, :WIDTH]:
        best = np.argsort(-(items[:, :WIDTH].astype(np.float64) @ user))[:at]
        hits += len(np.intersect1d(best, search.search(user, at, NOTHING)[0]))
    return hits / (at * len(users))


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_the_reported_recall_is_that_of_the_written_index(tmp_path: Path, spread: float) -> None:
    write_vectors(tmp_path, 8000, spread=spread)
    lines: list[str] = []
    facts = write_index(tmp_path, WIDTH, lines.append)
    assert facts is not None
    assert facts["recall"] == pytest.approx(share_found(tmp_path))
    assert facts["recall"] >= 0.99
    assert (facts["kind"], facts["at"], facts["queries"]) == ("hnsw", 100, 40)
    assert facts["parameters"]["lengths_made_equal"] == (spread > 0)
    assert lines[0] == "index: 0 % of 8000 items"
    assert "at 100; takes" in lines[-1]


def test_the_same_embeddings_give_the_same_file(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_vectors(tmp_path / name, 5000)
        write_index(tmp_path / name, WIDTH)
        files.append((tmp_path / name / INDEX).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_an_index_of_compressed_embeddings(tmp_path: Path, kind: str) -> None:
    write_vectors(tmp_path, 5000, kind=kind)
    facts = write_index(tmp_path, WIDTH)
    assert facts is not None and facts["recall"] > 0.9


def test_effort_grows_until_the_goal_is_reached_or_an_exact_search_is_as_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In every direction alike, and few links: hard to walk through.
    write_vectors(tmp_path, 12_000, dimensions=WIDTH)
    monkeypatch.setattr(building, "LINKS", 2)
    monkeypatch.setattr(building, "GOAL", 0.5)
    first = write_index(tmp_path, WIDTH)
    monkeypatch.setattr(building, "GOAL", 1.1)
    lines: list[str] = []
    last = write_index(tmp_path, WIDTH, lines.append)
    assert first is not None and last is not None
    efforts = [facts["parameters"]["search_effort"] for facts in (first, last)]
    assert efforts[0] < efforts[1] == 280, "400 times the cost of 40 is more than 12,000"
    assert first["recall"] < last["recall"]
    assert "below 1.1" in lines[-1]


def test_few_items_need_no_index(tmp_path: Path) -> None:
    write_vectors(tmp_path, 3999)
    lines: list[str] = []
    assert write_index(tmp_path, WIDTH, lines.append) is None
    assert lines == ["index: not needed, an exact search of 3999 items is faster"]
    assert not (tmp_path / INDEX).exists()


def test_breadth_first_order_by_hand() -> None:
    # 2 leads to 4 and 0, 4 to 2 and 5, 0 to 4 and 1; nothing leads to 3, which leads to 5.
    links = np.array([[4, 1], [-1, -1], [4, 0], [5, -1], [2, 5], [5, -1]], dtype=np.int32)
    order = breadth_first(links, 2)
    assert (order.dtype, order.tolist()) == (np.int32, [2, 4, 0, 5, 1, 3])


def test_neighbours_are_close_in_memory(tmp_path: Path) -> None:
    write_vectors(tmp_path, 6000)
    write_index(tmp_path, WIDTH)
    rows = np.load(tmp_path / INDEX_ROWS)
    assert sorted(rows.tolist()) == list(range(6000))
    index = faiss.read_index(str(tmp_path / INDEX))
    vectors = np.load(tmp_path / "items" / "embeddings.npy")[:, :WIDTH]
    # A vector of the index is that of its row, to a step of int8.
    np.testing.assert_allclose(index.reconstruct_n(0, 50), vectors[rows[:50]], atol=0.02)
    near = np.linalg.norm(vectors[rows[1:]] - vectors[rows[:-1]], axis=1)
    anyhow = np.linalg.norm(vectors[1:] - vectors[:-1], axis=1)
    assert np.median(near) < 0.7 * np.median(anyhow)


def test_lengthened_vectors_have_equal_lengths_and_keep_inner_products() -> None:
    vectors = np.array([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]], dtype=np.float32)
    longer = lengthened(vectors)
    assert longer.dtype == np.float32
    np.testing.assert_allclose(longer[:, 2] ** 2, [75, 100, 0], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(longer, axis=1), 10.0, rtol=1e-6)
    assert longer[:, :2].tolist() == vectors.tolist()
    assert lengths_differ(vectors)
    assert not lengths_differ(np.array([[3.0, 4.0], [5.0004, 0.0]], dtype=np.float32))
    assert not lengths_differ(np.empty((0, 2), dtype=np.float32))


def test_a_missing_library_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    config: Config = small_config()
    require_index_library(config.export)
    with pytest.raises(UserError) as caught:
        require_index_library(Export(index="hnsw"))
    assert (caught.value.field, caught.value.value) == ("export.index", "hnsw")
    assert "faiss is not installed; pip install 'hvdrec[index]'" in str(caught.value)
