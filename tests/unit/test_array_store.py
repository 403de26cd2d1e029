"""Lookups of stored keys, and exact retrieval, against plain Python."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdrec.scoring.bundle import BundleInfo
from hvdrec.scoring.exact import inner_products, largest
from hvdrec.scoring.stores import arrays
from hvdrec.scoring.stores.arrays import ArrayStore

text = st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x1FFFF), max_size=6)
few = st.sampled_from(["", "a", "ab", "b", "a\0", "a\0b", "é", "ab" * 9])
keys_and_queries = st.tuples(
    # Fixed-width bytes cannot hold a trailing NUL, so no bundle has such a key.
    st.lists((text | few).filter(lambda key: not key.endswith("\0")), unique=True, max_size=20),
    st.lists(text | few | st.none(), max_size=20),
)


def make_store(keys: np.ndarray) -> ArrayStore:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "users").mkdir()
        np.save(path / "users" / "keys.npy", keys)
        np.save(path / "users" / "embeddings.npy", np.zeros((len(keys), 1), np.float32))
        return ArrayStore(BundleInfo(path, "", "", "", (), 1, 1, 1, {}), "user", 1)


@settings(max_examples=150, deadline=None)
@given(keys_and_queries)
def test_rows_of_string_keys(drawn: tuple[list[str], list[str | None]]) -> None:
    keys, queries = drawn
    keys.sort(key=str.encode)
    store = make_store(np.array([key.encode() for key in keys], dtype=np.bytes_ if keys else "S1"))
    queries += keys
    expected = [keys.index(query) if query in keys else -1 for query in queries]
    for _ in range(2):  # the second time from the cache
        assert store.rows(queries).tolist() == expected
    assert store.keys_of(np.arange(len(keys))) == keys
    cached = store.cached_rows(keys)
    assert cached is not None
    assert cached.tolist() == list(range(len(keys)))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3), unique=True, max_size=20),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-4, 4), max_size=20),
)
def test_rows_of_integer_keys(keys: list[int], queries: list[int]) -> None:
    keys.sort()
    store = make_store(np.array(keys, dtype=np.int64))
    queries += keys
    expected = [keys.index(query) if query in keys else -1 for query in queries]
    assert store.rows(queries).tolist() == expected
    assert store.rows(queries).tolist() == expected


def test_the_cache_holds_only_stored_keys_of_the_right_type() -> None:
    store = make_store(np.array([1, 2], dtype=np.int64))
    assert store.cached_rows([1]) is None
    store.rows([1, 5])
    assert store.cached_rows([1, 1]).tolist() == [0, 0]  # type: ignore[union-attr]
    for other in ([1, 2], [5], [True], [1.0], [{}], [None]):
        assert store.cached_rows(other) is None


def test_the_cache_stays_within_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "CACHED_KEYS", 10)
    store = make_store(np.arange(100))
    for start in range(0, 100, 7):
        keys = list(range(start, min(100, start + 7)))
        assert store.rows(keys).tolist() == keys
        assert len(store._cache) <= 10
    assert store.rows(list(range(100))).tolist() == list(range(100))
    assert len(store._cache) <= 10


@pytest.mark.parametrize("query", ["77", "no such key, longer than all", "é", "a\0"])
def test_a_lookup_does_not_copy_the_keys(query: str) -> None:
    store = make_store(np.sort(np.arange(100_000).astype(np.bytes_)))
    tracemalloc.start()
    try:
        store.rows([query])
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.integers(-3, 3), max_size=12),
    st.integers(1, 15),
    st.lists(st.integers(0, 11), max_size=12),
    st.sampled_from([1, 2, 3, 64]),
)
def test_largest_scores_with_exclusions(
    scores: list[int], count: int, excluded: list[int], group: int
) -> None:
    excluded = [row for row in excluded if row < len(scores)]
    allowed = [row for row in range(len(scores)) if row not in excluded]
    best = sorted(allowed, key=lambda row: (-scores[row], row))[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvdrec.scoring.exact.GROUP_ROWS", group)
        rows = largest(np.array(scores, np.float32), count, np.array(excluded, np.int64))
    assert rows.tolist() == sorted(best)


def test_inner_products_use_the_first_entries_of_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdrec.scoring.exact.BLOCK_ROWS", 2)
    vectors = np.array([[1, 2, 9], [3, 4, 9], [5, 6, 9]], dtype=np.float32)
    products = inner_products(vectors, np.array([1, 10], dtype=np.float32))
    assert products.tolist() == [21.0, 43.0, 65.0]
    assert products.dtype == np.float32
