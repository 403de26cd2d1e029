"""Co-occurrence and EASE against hand-worked values, loops and least squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hvdrec.evaluation import item_item
from hvdrec.evaluation.item_item import (
    Family,
    ItemItemModel,
    choose,
    cooccurrence,
    ease,
    ease_bytes,
    runs,
)
from hvdrec.evaluation.ranking_metrics import order_metrics, ranking_metrics
from hvdrec.evaluation.retrieval import rank_scores, user_item_matrix

Array = NDArray[Any]

# User 0 took items 0 and 1, user 1 items 0, 1 and 2, user 2 item 2; nobody item 3.
USER = np.array([0, 0, 1, 1, 1, 2, 2])
ITEM = np.array([0, 1, 0, 1, 2, 2, 2])


def _taken() -> Any:
    return user_item_matrix(USER, ITEM, 3, 4)


def _all_scores(model: ItemItemModel, users: int, items: int) -> Array:
    everyone, everything = np.divmod(np.arange(users * items), items)
    return model.scores(everyone, everything).reshape(users, items)


def test_user_item_matrix_has_one_per_distinct_pair() -> None:
    assert _taken().toarray().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0]]


def test_cooccurrence_weights_worked_out_by_hand() -> None:
    # Two users each took items 0, 1 and 2; two took 0 and 1, one 0 and 2, one 1 and 2: cosines
    # 1, 1/2, 1/2.
    model = cooccurrence(_taken(), [1, 3]).fit(3)
    assert model.weights.toarray().tolist() == [
        [0, 1, 0.5, 0],
        [1, 0, 0.5, 0],
        [0.5, 0.5, 0, 0],
        [0, 0, 0, 0],
    ]
    assert _all_scores(model, 3, 4).tolist() == [[1, 1, 1, 0], [1.5, 1.5, 1, 0], [0.5, 0.5, 0, 0]]


def test_cooccurrence_keeps_the_k_most_similar_items_and_breaks_ties_by_index() -> None:
    nearest = cooccurrence(_taken(), [1, 3]).fit(1)  # of item 0: 1; of 1: 0; of 2: 0, not 1
    assert _all_scores(nearest, 3, 4).tolist() == [[1, 1, 0.5, 0], [1, 1, 0.5, 0], [0, 0, 0, 0]]


def test_ease_weights_worked_out_by_hand() -> None:
    # taken' taken + I = [[3, 2, 1], [2, 3, 1], [1, 1, 3]] for items 0, 1, 2, its inverse
    # [[8, -5, -1], [-5, 8, -1], [-1, -1, 5]] / 13; item 3 stands alone.
    model = ease(_taken()).fit(1.0)
    expected = [[0, 5 / 8, 1 / 5, 0], [5 / 8, 0, 1 / 5, 0], [1 / 8, 1 / 8, 0, 0], [0] * 4]
    assert model.weights == pytest.approx(np.array(expected), abs=1e-7)
    scores = [[5 / 8, 5 / 8, 2 / 5, 0], [3 / 4, 3 / 4, 2 / 5, 0], [1 / 8, 1 / 8, 0, 0]]
    assert _all_scores(model, 3, 4) == pytest.approx(np.array(scores), abs=1e-6)


def _random(seed: int, users: int = 30, items: int = 12) -> Array:
    random = np.random.default_rng(seed)
    return random.random((users, items)) < random.random(items) * 0.8


def _sparse(dense: Array) -> Any:
    return user_item_matrix(*np.nonzero(dense), *dense.shape)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 10.0, 300.0]))
@settings(max_examples=30, deadline=None)
def test_ease_equals_least_squares_on_the_other_items(seed: int, l2: float) -> None:
    dense = _random(seed).astype(np.float64)
    with mock.patch.object(item_item, "MIRRORED", 5):
        weights = ease(_sparse(dense)).fit(l2).weights
    items = dense.shape[1]
    for item in range(items):
        others = np.delete(np.arange(items), item)
        penalized = np.concatenate([dense[:, others], math.sqrt(l2) * np.eye(items - 1)])
        target = np.concatenate([dense[:, item], np.zeros(items - 1)])
        solution, *_ = np.linalg.lstsq(penalized, target, rcond=None)
        assert weights[others, item] == pytest.approx(solution, abs=1e-6)
        assert weights[item, item] == 0


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([1, 20, 10**6]))
@settings(max_examples=50, deadline=None)
def test_cooccurrence_matches_a_loop_for_any_block_size(seed: int, k: int, block: int) -> None:
    dense = _random(seed)
    with mock.patch.object(item_item, "BLOCK", block):
        model = cooccurrence(_sparse(dense), [k, 12]).fit(k)
        scores = _all_scores(model, *dense.shape)
    expected = np.zeros(dense.shape)
    for item in range(dense.shape[1]):
        cosine = np.zeros(dense.shape[1], dtype=np.float32)
        for other in range(dense.shape[1]):
            both = np.sum(dense[:, item] & dense[:, other])
            if other != item and both:
                cosine[other] = both / math.sqrt(dense[:, item].sum() * dense[:, other].sum())
        near = np.argsort(-cosine, kind="stable")[:k]
        expected[:, item] = dense[:, near] @ cosine[near]
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("make", [cooccurrence, ease])
def test_catalogue_ranking_agrees_with_row_scores(make: Callable[[Any], Family]) -> None:
    dense = _random(4)
    model = make(_sparse(dense)).fit(20)
    users = np.array([3, 7, 8, 29])
    seen = _sparse(dense[users])
    with mock.patch("hvdrec.evaluation.retrieval.BLOCK_SCORES", 10):
        top = rank_scores(model.score_items(users), len(users), dense.shape[1], seen, 12)
    for row, user in enumerate(users):
        score = _all_scores(model, *dense.shape)[user].round(5)
        unseen = np.flatnonzero(~dense[user]).tolist()
        assert sorted(top[row, : len(unseen)].tolist()) == unseen
        assert (np.diff(score[top[row, : len(unseen)]]) <= 1e-4).all()
        assert (top[row, len(unseen) :] == -1).all()


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 20))
def test_runs_cover_every_element_once_and_stay_small(sizes: list[int], most: int) -> None:
    cut = list(runs(np.array(sizes, dtype=np.int64), most))
    assert [i for run in cut for i in range(len(sizes))[run]] == list(range(len(sizes)))
    for run in cut:
        assert sum(sizes[run][1:]) < most


def test_choose_takes_the_best_setting_for_each_group_of_metrics() -> None:
    def fit(value: float) -> ItemItemModel:
        return ItemItemModel(value, None)

    quality: dict[float, Mapping[str, float]] = {
        1.0: {"auc": math.nan, "recall@10": 0.3},
        2.0: {"auc": 0.6, "recall@10": 0.1},
        3.0: {"auc": 0.6, "recall@10": 0.2},
    }
    chosen = choose(
        Family("ease", "l2", (1.0, 2.0, 3.0), fit),
        {"ranking": "auc", "retrieval": "recall@10"},
        {kind: lambda model: quality[model.taken] for kind in ("ranking", "retrieval")},
    )
    assert chosen == {
        "ranking": {"l2": 2.0, "auc": 0.6},
        "retrieval": {"l2": 1.0, "recall@10": 0.3},
    }


def test_ease_bytes_grow_with_the_square_of_the_items() -> None:
    assert ease_bytes(20_000) == 6_400_000_000


def test_order_metrics_equal_ranking_metrics() -> None:
    random = np.random.default_rng(0)
    score, label = random.random(200), (random.random(200) < 0.4).astype(np.float32)
    weight, user = random.integers(0, 3, 200), random.integers(0, 9, 200)
    full = ranking_metrics(score, label, weight, user)
    metrics = order_metrics(score * 7 - 3, label, weight, user)
    assert {"auc", "gauc", "average_precision", "rows"} < set(metrics)
    assert metrics == pytest.approx({name: full[name] for name in metrics}, abs=1e-12)
