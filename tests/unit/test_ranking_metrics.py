"""Ranking metrics against hand-worked values and scikit-learn, for any order of the rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import (
    average_precision_score,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)

from hvdrec.errors import UserError
from hvdrec.evaluation import ranking_metrics as ranking
from hvdrec.evaluation.ranking_metrics import ranking_metrics

Array = NDArray[Any]


def _arrays(*columns: list[float]) -> tuple[Array, ...]:
    return tuple(np.array(column, dtype=np.float32) for column in columns)


def _ones(label: Array) -> Array:
    return np.ones(len(label), dtype=np.float32)


@st.composite
def scored_rows(draw: st.DrawFn) -> tuple[Array, Array, Array, Array]:
    """Rows with many tied scores, unequal weights (some zero) and both labels."""
    n = draw(st.integers(2, 60))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([2, 5, 1000]))
    score = (random.integers(1, levels + 1, n) / (levels + 1)).astype(np.float32)
    label = random.integers(0, 2, n).astype(np.float32)
    label[:2] = 0, 1
    weight = random.choice([0.0, 0.5, 1.0, 2.75], n).astype(np.float32)
    weight[:2] = 1
    return score, label, weight, random.integers(0, 6, n)


@given(scored_rows(), st.sampled_from([0.2, 0.5, 0.8]), st.sampled_from([0.5, 1.0, 2.0]))
@settings(max_examples=150, deadline=None)
def test_metrics_match_scikit_learn(
    rows: tuple[Array, Array, Array, Array], threshold: float, beta: float
) -> None:
    score, label, weight, user = rows
    metrics = ranking_metrics(score, label, weight, user, threshold=threshold, beta=beta)
    wide = score.astype(np.float64)
    predicted = wide >= threshold
    p, r, f, _ = precision_recall_fscore_support(
        label,
        predicted,
        beta=beta,
        average="binary",
        sample_weight=weight,
        zero_division=0.0,
    )
    expected = {
        "auc": roc_auc_score(label, wide, sample_weight=weight),
        "average_precision": average_precision_score(label, wide, sample_weight=weight),
        "log_loss": log_loss(label, wide, sample_weight=weight),
        "precision": p,
        "recall": r,
        "f_beta": f,
        "e_measure": 1 - f,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(
        expected, abs=1e-12, nan_ok=True
    )


@given(scored_rows())
@settings(max_examples=100, deadline=None)
def test_gauc_matches_the_weighted_mean_of_scikit_learn_auc_per_user(
    rows: tuple[Array, Array, Array, Array],
) -> None:
    score, label, weight, user = rows
    areas, impressions = [], []
    for one in np.unique(user):
        own = (user == one) & (weight > 0)
        if len(np.unique(label[own])) == 2:
            areas.append(roc_auc_score(label[own], score[own], sample_weight=weight[own]))
            impressions.append(weight[own].sum())
    counted = weight > 0
    value, users = ranking.gauc(*(a[counted] for a in (score, label, weight, user)))
    assert users == len(areas)
    expected = np.average(areas, weights=impressions) if areas else math.nan
    assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(scored_rows(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_metrics_do_not_depend_on_the_order_of_rows(
    rows: tuple[Array, Array, Array, Array], seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(rows[0]))
    shuffled = ranking_metrics(*(column[order] for column in rows))
    metrics = ranking_metrics(*rows)
    assert shuffled == pytest.approx(metrics, abs=1e-12, nan_ok=True)


@given(scored_rows())
@settings(max_examples=60, deadline=None)
def test_a_row_of_weight_two_counts_as_two_rows(rows: tuple[Array, Array, Array, Array]) -> None:
    score, label, _, user = rows
    weight = np.where(np.arange(len(score)) % 3 == 0, 2.0, 1.0)
    once = ranking_metrics(score, label, weight, user)
    again = np.concatenate((np.arange(len(score)), np.flatnonzero(weight == 2)))
    twice = ranking_metrics(score[again], label[again], _ones(again), user[again])
    del once["rows"], twice["rows"]
    assert once == pytest.approx(twice, abs=1e-12, nan_ok=True)


def test_auc_and_gauc_worked_out_by_hand() -> None:
    # User 0: the positive (0.6) is above one negative (0.2) and tied with the other: (1 + 1/2) / 2.
    # User 1: the positive is below: 0. User 2 has positives only and does not count.
    score, label = _arrays([0.6, 0.2, 0.6, 0.3, 0.4, 0.9], [1, 0, 0, 1, 0, 1])
    user = np.array([0, 0, 0, 1, 1, 2])
    value, users = ranking.gauc(score, label, _ones(label), user)
    assert users == 2
    assert value == pytest.approx((3 * 0.75 + 2 * 0.0) / 5)
    # All: positives 0.6, 0.3, 0.9 against negatives 0.2, 0.6, 0.4: 1.5 + 1 + 3 of wins, of 9 pairs.
    # 0.6 beats 0.2 and 0.4, ties 0.6: 2.5; 0.3 beats 0.2: 1; 0.9 beats all: 3.
    assert ranking.auc(score, label, _ones(label)) == pytest.approx(6.5 / 9)


def test_users_need_not_be_contiguous_or_sorted() -> None:
    score, label = _arrays([0.6, 0.4, 0.2, 0.3], [1, 1, 0, 0])
    user = np.array([10**12, -5, 10**12, -5])
    assert ranking.gauc(score, label, _ones(label), user) == (1.0, 2)


def test_log_loss_and_calibration_worked_out_by_hand() -> None:
    score, label = _arrays([0.75, 0.5, 0.25, 0.5], [1, 0, 0, 0])
    weight = _ones(label)
    expected = -(2 * math.log(0.75) + 2 * math.log(0.5)) / 4
    metrics = ranking_metrics(score, label, weight, np.zeros(4, dtype=np.int64))
    assert metrics["log_loss"] == pytest.approx(expected)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert metrics["normalized_entropy"] == pytest.approx(expected / entropy)
    # Mean score 0.5, mean label 0.25.
    assert metrics["calibration"] == pytest.approx(2.0)
    # Three bins, because tied scores share one: (|0.25 - 0| + 2 |0.5 - 0| + |0.75 - 1|) / 4.
    assert metrics["calibration_error"] == pytest.approx(1.5 / 4)


def test_calibration_error_uses_ten_bins_of_equal_weight() -> None:
    score = (np.arange(1000) + 0.5) / 1000
    label = (np.arange(1000) % 2 == 0).astype(np.float32)
    # Each bin of 100 rows has mean label 1/2 and mean scores 0.05, 0.15, ..., 0.95.
    expected = np.mean([abs(0.05 + 0.1 * b - 0.5) for b in range(10)])
    assert ranking.calibration_error(score, label, _ones(label)) == pytest.approx(expected)


def test_predicting_the_base_rate_has_normalized_entropy_one() -> None:
    label = np.array([1, 0, 0, 0], dtype=np.float32)
    rate = np.full(4, 0.25, dtype=np.float32)
    assert ranking.normalized_entropy(rate, label, _ones(label)) == pytest.approx(1.0)


def test_log_loss_of_a_certain_mistake_is_finite() -> None:
    score, label = _arrays([1.0, 0.0], [0, 1])
    metrics = ranking_metrics(score, label, _ones(label), np.zeros(2, dtype=np.int64))
    assert metrics["log_loss"] == pytest.approx(-math.log(ranking.EPSILON), rel=1e-2)


def test_precision_recall_f_and_e_worked_out_by_hand() -> None:
    score, label = _arrays([0.9, 0.5, 0.6, 0.4, 0.1], [1, 1, 0, 1, 0])
    weight = _ones(label)
    # From 0.5 up: two hits of three predicted (the threshold itself counts), of three positives.
    at_half = ranking.precision_recall_f(score, label, weight, 0.5, 1.0)
    assert at_half == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    # P = 1, R = 1/3: F2 = 5 * 1/3 / (4 * 1 + 1/3) = 5/13.
    above = ranking.precision_recall_f(score, label, weight, 0.7, 2.0)
    assert above == pytest.approx((1.0, 1 / 3, 5 / 13))
    metrics = ranking_metrics(score, label, weight, np.zeros(5, int), threshold=0.7, beta=2.0)
    assert metrics["e_measure"] == pytest.approx(8 / 13)


def test_average_precision_at_a_threshold_worked_out_by_hand() -> None:
    score, label = _arrays([0.9, 0.8, 0.7, 0.4, 0.3], [1, 0, 1, 1, 0])
    weight = _ones(label)
    # Recall rises by 1/3 at each positive, with precisions 1, 2/3 and 3/4.
    assert ranking.average_precision(score, label, weight) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    at_half = ranking.average_precision(score, label, weight, 0.5)
    assert at_half == pytest.approx((1 + 2 / 3) / 3)
    assert ranking.average_precision(score, label, weight, 0.95) == 0.0
    everything = ranking.average_precision(score, label, weight, 0.0)
    assert everything == ranking.average_precision(score, label, weight)


@pytest.mark.parametrize("only", [0.0, 1.0])
def test_order_metrics_are_nan_for_one_class(only: float) -> None:
    label = np.full(3, only, dtype=np.float32)
    score = np.array([0.2, 0.5, 0.7], dtype=np.float32)
    metrics = ranking_metrics(score, label, _ones(label), np.zeros(3, dtype=np.int64))
    for name in ("auc", "gauc", "normalized_entropy"):
        assert math.isnan(metrics[name]), name
    assert metrics["gauc_users"] == 0
    assert metrics["base_rate"] == only
    assert math.isfinite(metrics["log_loss"])
    assert math.isnan(metrics["average_precision"]) == (only == 0.0)


def test_precision_and_recall_are_zero_without_predicted_positives() -> None:
    score, label = _arrays([0.2, 0.1], [1, 0])
    metrics = ranking_metrics(score, label, _ones(label), np.zeros(2, dtype=np.int64))
    zero = (metrics["precision"], metrics["recall"], metrics["f_beta"])
    assert (*zero, metrics["e_measure"]) == (0.0, 0.0, 0.0, 1.0)


def test_metrics_are_nan_without_rows() -> None:
    empty = np.empty(0, dtype=np.float32)
    metrics = ranking_metrics(empty, empty, empty, np.empty(0, dtype=np.int64))
    assert (metrics.pop("rows"), metrics.pop("gauc_users")) == (0, 0)
    for name in ("auc", "gauc", "log_loss", "calibration", "average_precision", "base_rate"):
        assert math.isnan(metrics[name]), name


def test_rows_of_weight_zero_do_not_count() -> None:
    score, label, weight = _arrays([0.9, 0.2, math.nan], [1, 0, 1], [1, 1, 0])
    metrics = ranking_metrics(score, label, weight, np.array([0, 0, 3]))
    assert (metrics["rows"], metrics["auc"], metrics["gauc_users"]) == (2, 1.0, 1)


def test_scores_that_are_not_probabilities_are_refused() -> None:
    score, label = _arrays([0.9, math.nan, 1.5], [1, 0, 0])
    with pytest.raises(UserError) as caught:
        ranking_metrics(score, label, _ones(label), np.zeros(3, dtype=np.int64))
    assert caught.value.field == "scores"
    text = str(caught.value)
    for part in ("2 of 3", "NaN or outside [0, 1]", "train.learning_rate", "train.clip_norm"):
        assert part in text
