"""Exact top-k retrieval against sorting, and its metrics against hand-worked values and loops."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hvdrec.errors import UserError
from hvdrec.evaluation import retrieval
from hvdrec.evaluation.retrieval import (
    rank_catalogue,
    retrieval_metrics,
    retrieval_sums,
    user_item_matrix,
)

Array = NDArray[Any]


ITEMS = 16


def _lists(*rows: list[int]) -> Any:
    pairs = [(row, item) for row, items in enumerate(rows) for item in items]
    columns = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return user_item_matrix(columns[:, 0], columns[:, 1], len(rows), ITEMS)


def _metrics(top: Array, relevant: Any, ks: list[int], items: int) -> dict[str, float]:
    return retrieval_metrics(retrieval_sums(top, relevant, ks, items), ks)


def _row(lists: Any, row: int) -> list[int]:
    return [int(i) for i in lists.indices[lists.indptr[row] : lists.indptr[row + 1]]]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=40))
def test_user_item_matrix_has_sorted_distinct_items_per_user(pairs: list[tuple[int, int]]) -> None:
    columns = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    lists = user_item_matrix(columns[:, 0], columns[:, 1], 5, 7)
    for row in range(5):
        assert _row(lists, row) == sorted({item for r, item in pairs if r == row})
    assert lists.indptr[-1] == len(set(pairs))


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[Array, Array, Any, int]:
    """Vectors of small whole numbers, so that many scores tie, signs and zeros included."""
    users, items, width = draw(st.integers(0, 7)), draw(st.integers(0, 12)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    seen = random.random((users, items)) < draw(st.sampled_from([0.0, 0.3, 0.95]))
    return (
        random.integers(-2, 3, (users, width)).astype(np.float32),
        random.integers(-2, 3, (items, width)).astype(np.float32),
        user_item_matrix(*np.nonzero(seen), users, items),
        draw(st.integers(1, 15)),
    )


@given(catalogues(), st.sampled_from([1, 3, 10, 1 << 21]))
@settings(max_examples=200, deadline=None)
def test_top_k_matches_sorting_the_catalogue_for_any_block_size(
    catalogue: tuple[Array, Array, Any, int], block: int
) -> None:
    users, items, seen, k = catalogue
    with mock.patch.object(retrieval, "BLOCK_SCORES", block):
        top = rank_catalogue(users, items, seen, k)
    assert top.shape == (len(users), k)
    assert top.dtype == np.int64
    for user in range(len(users)):
        unseen = sorted(set(range(len(items))) - set(_row(seen, user)))
        best = sorted(unseen, key=lambda i: (-float(users[user] @ items[i]), i))[:k]
        assert top[user].tolist() == best + [-1] * (k - len(best))


def test_negative_zero_ties_with_zero() -> None:
    users = np.array([[1.0]], dtype=np.float32)
    items = np.array([[-0.0], [0.0], [-1.0], [1.0]], dtype=np.float32)
    assert rank_catalogue(users, items, _lists([]), 4).tolist() == [[3, 0, 1, 2]]


def test_metrics_worked_out_by_hand() -> None:
    # User 0 has hits at ranks 1 and 3 of 2 relevant items; user 1 at rank 2 of 5; user 2 none of 1.
    # User 3 has no relevant items and does not count, not even for coverage.
    top = np.array([[4, 0, 5], [1, 2, -1], [0, 1, 2], [7, 8, 9]])
    relevant = _lists([4, 5], [2, 6, 7, 8, 9], [3], [])
    metrics = _metrics(top, relevant, [2, 3], 10)
    second, third = 1 / math.log2(3), 1 / math.log2(4)
    expected = {
        "recall@2": (1 / 2 + 1 / 5 + 0) / 3,
        "precision@2": (1 / 2 + 1 / 2 + 0) / 3,
        "hit_rate@2": 2 / 3,
        "ndcg@2": (1 / (1 + second) + second / (1 + second)) / 3,
        "mrr@2": (1 + 1 / 2) / 3,
        "map@2": (1 / 2 + (1 / 2) / 2) / 3,
        "coverage@2": 4 / 10,  # 0, 1, 2 and 4
        "recall@3": (1 + 1 / 5) / 3,
        "precision@3": (2 / 3 + 1 / 3) / 3,
        "hit_rate@3": 2 / 3,
        "ndcg@3": ((1 + third) / (1 + second) + second / (1 + second + third)) / 3,
        "mrr@3": (1 + 1 / 2) / 3,
        "map@3": ((1 + 2 / 3) / 2 + (1 / 2) / 3) / 3,
        "coverage@3": 5 / 10,
        "users": 3,
    }
    assert metrics == pytest.approx(expected)
    assert list(metrics) == list(expected)


@st.composite
def top_lists(draw: st.DrawFn) -> tuple[Array, Any, int]:
    users, items, k = draw(st.integers(1, 9)), draw(st.integers(1, 12)), draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    top = np.full((users, k), -1)
    for user in range(users):
        length = random.integers(0, min(items, k) + 1)
        top[user, :length] = random.permutation(items)[:length]
    relevant = random.random((users, items)) < draw(st.sampled_from([0.0, 0.2, 0.7]))
    return top, user_item_matrix(*np.nonzero(relevant), users, items), items


def _slow(top: Array, relevant: Any, k: int) -> dict[str, float]:
    """Compute the same formulas user by user and rank by rank."""
    sums = dict.fromkeys(("recall", "precision", "hit_rate", "ndcg", "mrr", "map"), 0.0)
    users = [u for u in range(len(top)) if _row(relevant, u)]
    for user in users:
        wanted = set(_row(relevant, user))
        hits = [int(item) in wanted for item in top[user, :k]]
        ranks = [j for j, hit in enumerate(hits, start=1) if hit]
        possible = min(len(wanted), k)
        sums["recall"] += len(ranks) / len(wanted)
        sums["precision"] += len(ranks) / k
        sums["hit_rate"] += bool(ranks)
        ideal = sum(1 / math.log2(j + 1) for j in range(1, possible + 1))
        sums["ndcg"] += sum(1 / math.log2(j + 1) for j in ranks) / ideal
        sums["mrr"] += 1 / ranks[0] if ranks else 0
        sums["map"] += sum((n + 1) / j for n, j in enumerate(ranks)) / possible
    return {f"{m}@{k}": total / len(users) if users else math.nan for m, total in sums.items()}


@given(top_lists())
@settings(max_examples=150, deadline=None)
def test_metrics_match_a_loop(lists: tuple[Array, Any, int]) -> None:
    top, relevant, items = lists
    for k in range(1, top.shape[1] + 1):
        metrics = _metrics(top, relevant, [k], items)
        expected = _slow(top, relevant, k)
        assert {m: metrics[m] for m in expected} == pytest.approx(expected, nan_ok=True)


@given(top_lists(), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_sums_of_two_ranks_give_the_metrics_of_one(lists: tuple[Array, Any, int], at: int) -> None:
    top, relevant, items = lists
    at, ks = min(at, len(top)), [1, top.shape[1]]
    first = retrieval_sums(top[:at], relevant[:at], ks, items)
    second = retrieval_sums(top[at:], relevant[at:], ks, items)
    together = retrieval_metrics(first + second, ks)
    alone = _metrics(top, relevant, ks, items)
    assert together == pytest.approx(alone, abs=1e-12, nan_ok=True)


def test_metrics_are_nan_without_users() -> None:
    metrics = _metrics(np.array([[0]]), _lists([]), [1], 3)
    assert metrics.pop("users") == 0
    assert metrics.pop("coverage@1") == 0
    assert all(math.isnan(value) for value in metrics.values())


@pytest.mark.parametrize("block", [64, 1000, 2_000_000])
def test_top_k_of_real_vectors_does_not_depend_on_the_block(block: int) -> None:
    random = np.random.default_rng(3)
    users = random.normal(size=(40, 64)).astype(np.float32)
    items = random.normal(size=(700, 64)).astype(np.float32)
    items[500:600] = items[:100]  # exact ties far apart
    seen = user_item_matrix(random.integers(0, 40, 900), random.integers(0, 700, 900), 40, 700)
    scores = (users.astype(np.float64) @ items.T.astype(np.float64)).astype(np.float32)
    scores[seen.nonzero()] = -np.inf
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :50]
    with mock.patch.object(retrieval, "BLOCK_SCORES", block):
        assert np.array_equal(rank_catalogue(users, items, seen, 50), expected)


def test_vectors_that_are_not_finite_are_refused() -> None:
    vectors = np.array([[math.nan]], dtype=np.float32)
    with pytest.raises(UserError, match=r"NaN or infinite.*clip_norm$") as caught:
        rank_catalogue(np.ones((1, 1)), vectors, _lists([]), 1)
    assert caught.value.field == "item embeddings"
