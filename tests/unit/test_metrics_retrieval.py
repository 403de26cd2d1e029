"""Retrieval: the exact top k against sorting everything, and the metrics by hand and by loops."""

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
from hvdrec.evaluation.retrieval import Csr, csr, rank_catalogue, retrieval_metrics, retrieval_sums

Array = NDArray[Any]


def _lists(*rows: list[int]) -> Csr:
    pairs = [(row, item) for row, items in enumerate(rows) for item in items]
    columns = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return csr(columns[:, 0], columns[:, 1], len(rows))


def _metrics(top: Array, relevant: Csr, ks: list[int], items: int) -> dict[str, float]:
    return retrieval_metrics(retrieval_sums(top, relevant, ks, items), ks)


def _row(lists: Csr, row: int) -> list[int]:
    return [int(i) for i in lists.indices[lists.indptr[row] : lists.indptr[row + 1]]]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=40))
def test_csr_holds_each_pair_once_and_sorted(pairs: list[tuple[int, int]]) -> None:
    columns = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    lists = csr(columns[:, 0], columns[:, 1], 5)
    for row in range(5):
        assert _row(lists, row) == sorted({item for r, item in pairs if r == row})
    assert lists.indptr[-1] == len(set(pairs))


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[Array, Array, Csr, int]:
    """Vectors of small whole numbers, so that many scores tie, signs and zeros included."""
    users, items, width = draw(st.integers(0, 7)), draw(st.integers(0, 12)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    seen = random.random((users, items)) < draw(st.sampled_from([0.0, 0.3, 0.95]))
    return (
        random.integers(-2, 3, (users, width)).astype(np.float32),
        random.integers(-2, 3, (items, width)).astype(np.float32),
        csr(*np.nonzero(seen), users),
        draw(st.integers(1, 15)),
    )


@given(catalogues(), st.sampled_from([1, 3, 10, 1 << 21]))
@settings(max_examples=200, deadline=None)
def test_top_k_is_the_head_of_the_sorted_catalogue_whatever_the_block(
    catalogue: tuple[Array, Array, Csr, int], block: int
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


def test_metrics_by_hand() -> None:
    # User 0 hits at places 1 and 3, of 2 relevant; user 1 at place 2, of 5; user 2 never, of 1;
    # user 3 has nothing relevant and does not count, nor does its list for coverage.
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
def top_lists(draw: st.DrawFn) -> tuple[Array, Csr, int]:
    users, items, k = draw(st.integers(1, 9)), draw(st.integers(1, 12)), draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    top = np.full((users, k), -1)
    for user in range(users):
        length = random.integers(0, min(items, k) + 1)
        top[user, :length] = random.permutation(items)[:length]
    relevant = random.random((users, items)) < draw(st.sampled_from([0.0, 0.2, 0.7]))
    return top, csr(*np.nonzero(relevant), users), items


def _slow(top: Array, relevant: Csr, k: int) -> dict[str, float]:
    """The formulas once more, user by user and place by place."""
    sums = dict.fromkeys(("recall", "precision", "hit_rate", "ndcg", "mrr", "map"), 0.0)
    users = [u for u in range(len(top)) if _row(relevant, u)]
    for user in users:
        wanted = set(_row(relevant, user))
        hits = [int(item) in wanted for item in top[user, :k]]
        places = [j for j, hit in enumerate(hits, start=1) if hit]
        possible = min(len(wanted), k)
        sums["recall"] += len(places) / len(wanted)
        sums["precision"] += len(places) / k
        sums["hit_rate"] += bool(places)
        ideal = sum(1 / math.log2(j + 1) for j in range(1, possible + 1))
        sums["ndcg"] += sum(1 / math.log2(j + 1) for j in places) / ideal
        sums["mrr"] += 1 / places[0] if places else 0
        sums["map"] += sum((n + 1) / j for n, j in enumerate(places)) / possible
    return {f"{m}@{k}": total / len(users) if users else math.nan for m, total in sums.items()}


@given(top_lists())
@settings(max_examples=150, deadline=None)
def test_metrics_match_a_loop(lists: tuple[Array, Csr, int]) -> None:
    top, relevant, items = lists
    for k in range(1, top.shape[1] + 1):
        metrics = _metrics(top, relevant, [k], items)
        expected = _slow(top, relevant, k)
        assert {m: metrics[m] for m in expected} == pytest.approx(expected, nan_ok=True)


@given(top_lists(), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_sums_of_two_ranks_are_the_sums_of_one(lists: tuple[Array, Csr, int], at: int) -> None:
    top, relevant, items = lists
    at, ks = min(at, len(top)), [1, top.shape[1]]
    cut = relevant.indptr[at]
    parts = [
        retrieval_sums(top[:at], Csr(relevant.indptr[: at + 1], relevant.indices[:cut]), ks, items),
        retrieval_sums(
            top[at:], Csr(relevant.indptr[at:] - cut, relevant.indices[cut:]), ks, items
        ),
    ]
    fields = {id(getattr(parts[0], f)): f for f in ("values", "users", "recommended")}

    def add_other_rank(own: Array) -> Array:
        return np.asarray(own.astype(np.float64) + getattr(parts[1], fields[id(own)]))

    together = retrieval_metrics(parts[0].reduced(add_other_rank), ks)
    alone = _metrics(top, relevant, ks, items)
    assert together == pytest.approx(alone, abs=1e-12, nan_ok=True)


def test_no_users_give_no_numbers() -> None:
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
    seen = csr(random.integers(0, 40, 900), random.integers(0, 700, 900), 40)
    scores = (users.astype(np.float64) @ items.T.astype(np.float64)).astype(np.float32)
    scores[seen.pairs(0, 40)] = -np.inf
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :50]
    with mock.patch.object(retrieval, "BLOCK_SCORES", block):
        assert np.array_equal(rank_catalogue(users, items, seen, 50), expected)


def test_vectors_of_a_diverged_model_are_refused() -> None:
    vectors = np.array([[math.nan]], dtype=np.float32)
    with pytest.raises(
        UserError, match=r"^item embeddings: some are NaN or infinite; .*clip_norm$"
    ):
        rank_catalogue(np.ones((1, 1)), vectors, _lists([]), 1)
