"""Popularity and mean baselines against hand-worked values, and properties of their scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hvdrec.evaluation.baselines import BORDER, PRIOR, Baselines, fit_baselines
from hvdrec.evaluation.retrieval import rank_catalogue, user_item_matrix

Array = NDArray[Any]

USER = np.array([0, 0, 1, 1, 1])
ITEM = np.array([0, 1, 0, 0, 2])
LABEL = np.array([1, 0, 1, 1, 0], dtype=np.float32)
WEIGHT = np.array([1, 1, 1, 0, 2], dtype=np.float32)
MEAN = 2 / 5


def _fitted() -> Baselines:
    return fit_baselines(USER, ITEM, LABEL, WEIGHT, 3, 4)


def test_popularity_is_relative_to_the_most_popular_item() -> None:
    item = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    label = np.array([1, 1, 0, 1, 0, 1, 1, 1, 1], dtype=np.float32)
    fitted = fit_baselines(item, item, label, np.ones(9), 3, 4)
    scores = fitted.scores(np.array([0, 2, 1, 0]), np.array([0, 1, 2, 3]))
    assert scores["popularity"].tolist() == [0.5, 0.25, 1.0, 0.0]


def test_item_mean_is_weighted_and_shrunk_to_the_global_mean() -> None:
    expected = [
        (2 + PRIOR * MEAN) / (2 + PRIOR),
        (0 + PRIOR * MEAN) / (1 + PRIOR),
        (0 + PRIOR * MEAN) / (2 + PRIOR),
        MEAN,  # never seen
    ]
    scores = _fitted().scores(np.array([0, 1, 2, 0]), np.arange(4))
    assert scores["item_mean"].tolist() == pytest.approx(expected)


def test_user_item_mean_adds_user_and_item_effects() -> None:
    user = (1 + PRIOR * MEAN) / (2 + PRIOR)
    item = (2 + PRIOR * MEAN) / (2 + PRIOR)
    scores = _fitted().scores(np.array([0, 2, 0, 2]), np.array([0, 0, 3, 3]))
    expected = [user + item - MEAN, item, user, MEAN]
    assert scores["user_item_mean"].tolist() == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=60))
def test_scores_are_probabilities(rows: list[tuple[int, int, bool]]) -> None:
    user, item, label = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    fitted = fit_baselines(user, item, label.astype(np.float32), np.ones(len(rows)), 4, 6)
    everyone, everything = np.divmod(np.arange(24), 6)
    for name, scores in fitted.scores(everyone, everything).items():
        assert ((scores >= 0) & (scores <= 1)).all(), name


@given(st.integers(0, 2**32 - 1))
def test_item_vectors_rank_the_catalogue_like_the_scores(seed: int) -> None:
    random = np.random.default_rng(seed)
    user, item = random.integers(0, 6, 300), random.integers(0, 20, 300)
    label = (random.random(300) < (item + 1) / 25).astype(np.float32)
    fitted = fit_baselines(user, item, label, np.ones(300), 6, 20)
    none = np.empty(0, dtype=np.int64)
    vectors = fitted.item_vectors()
    assert set(vectors) == {"popularity", "item_mean"}
    for name, column in vectors.items():
        (top,) = rank_catalogue(np.ones((1, 1)), column, user_item_matrix(none, none, 1, 20), 20)
        assert sorted(top.tolist()) == list(range(20))
        descending = fitted.scores(np.zeros(20, dtype=np.int64), top)[name]
        assert (np.diff(descending) <= 1e-7).all()


@given(st.lists(st.floats(-0.5, 1.5), min_size=2, max_size=30, unique=True))
def test_user_item_mean_preserves_the_order_of_the_sums(sums: list[float]) -> None:
    ordered = np.sort(np.array(sums))
    index = np.arange(len(ordered))
    fitted = Baselines(np.zeros(1), np.zeros(1), ordered, 0.0)
    scores = fitted.scores(index, np.zeros_like(index))["user_item_mean"]
    assert ((scores > 0) & (scores < 1)).all()
    assert (np.diff(scores)[np.diff(ordered) > 1e-9] > 0).all()
    inside = (ordered >= BORDER) & (ordered <= 1 - BORDER)
    assert (scores[inside] == ordered[inside]).all()
