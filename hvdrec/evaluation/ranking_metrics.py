"""Metrics of predicted probabilities against labels 0 and 1.

All functions take score, label and weight of n rows, each [n]. Weights are not negative; rows with
weight 0 do not count. A metric that is not defined for the rows is NaN. A metric of all rows cannot
be computed from the metrics of parts, so gather the rows of all ranks first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.errors import UserError

Array = NDArray[Any]
EPSILON = 1e-15
BINS = 10


def ranking_metrics(
    score: Array,
    label: Array,
    weight: Array,
    user: Array,
    *,
    threshold: float = 0.5,
    beta: float = 1.0,
) -> dict[str, float]:
    """Return name -> value of all ranking metrics.

    Args:
        score: Probability of each row [n].
        label: Label of each row [n].
        weight: Weight of each row [n].
        user: User of each row, int64 [n].
        threshold: A row counts as predicted positive if its score is at least this value.
        beta: Weight of recall in F-beta.

    Raises:
        UserError: A score is NaN or outside [0, 1].
    """
    score, label, weight, user = _weighted_rows(score, label, weight, user)
    score = score.astype(np.float64)
    wrong = int(np.count_nonzero(~((score >= 0) & (score <= 1))))
    if wrong:
        raise UserError(
            f"scores: {wrong} of {len(score)} are NaN or outside [0, 1]; the model has diverged: "
            "lower train.learning_rate or set train.clip_norm",
            field="scores",
        )
    per_user, users = gauc(score, label, weight, user)
    precision, recall, f_beta = precision_recall_f(score, label, weight, threshold, beta)
    return {
        "auc": auc(score, label, weight),
        "gauc": per_user,
        "gauc_users": users,
        "log_loss": log_loss(score, label, weight),
        "normalized_entropy": normalized_entropy(score, label, weight),
        "calibration": _ratio((weight * score).sum(), (weight * label).sum()),
        "calibration_error": calibration_error(score, label, weight),
        "average_precision": average_precision(score, label, weight),
        "average_precision_at_threshold": average_precision(score, label, weight, threshold),
        "precision": precision,
        "recall": recall,
        "f_beta": f_beta,
        "e_measure": 1.0 - f_beta,
        "base_rate": _ratio((weight * label).sum(), weight.sum()),
        "rows": len(score),
    }


def order_metrics(score: Array, label: Array, weight: Array, user: Array) -> dict[str, float]:
    """Return the ranking metrics that depend only on the order of the scores.

    The scores need not be probabilities. For the arguments see `ranking_metrics`.
    """
    score, label, weight, user = _weighted_rows(score, label, weight, user)
    per_user, users = gauc(score, label, weight, user)
    return {
        "auc": auc(score, label, weight),
        "gauc": per_user,
        "gauc_users": users,
        "average_precision": average_precision(score, label, weight),
        "base_rate": _ratio((weight * label).sum(), weight.sum()),
        "rows": len(score),
    }


def auc(score: Array, label: Array, weight: Array) -> float:
    """Return the area under the ROC curve.

    This is the weighted share of pairs of a positive and a negative row in which the positive row
    has the higher score (Hanley and McNeil, 1982). Pairs with equal scores count half.
    """
    if not len(score):
        return float("nan")
    return float(_group_auc(score, label, weight, np.zeros(len(score), dtype=np.int64))[0][0])


def gauc(score: Array, label: Array, weight: Array, user: Array) -> tuple[float, int]:
    """Return the mean of the users' AUCs, weighted by the users' weights, and the number of users.

    Users whose rows all have the same label have no AUC and do not count (Zhu et al., "Optimized
    cost per click in Taobao display advertising", KDD 2017).
    """
    if not len(score):
        return float("nan"), 0
    _, group = np.unique(user, return_inverse=True)
    areas, weights = _group_auc(score, label, weight, group)
    defined = ~np.isnan(areas)
    if not defined.any():
        return float("nan"), 0
    return float(np.average(areas[defined], weights=weights[defined])), int(defined.sum())


def log_loss(score: Array, label: Array, weight: Array) -> float:
    """Return the weighted mean of -log p(label), with p clipped to [1e-15, 1 - 1e-15]."""
    if not weight.sum():
        return float("nan")
    p = np.clip(score, EPSILON, 1 - EPSILON)
    losses = -np.where(label > 0, np.log(p), np.log1p(-p))
    return float(np.average(losses, weights=weight))


def normalized_entropy(score: Array, label: Array, weight: Array) -> float:
    """Return the log loss divided by the log loss of always predicting the share of positives.

    Below 1, the scores are better than this constant prediction. Source: He et al., "Practical
    lessons from predicting clicks on ads at Facebook", ADKDD 2014.
    """
    rate = _ratio((weight * label).sum(), weight.sum())
    if not 0 < rate < 1:
        return float("nan")
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return log_loss(score, label, weight) / float(entropy)


def calibration_error(score: Array, label: Array, weight: Array, bins: int = BINS) -> float:
    """Return the weighted mean of |mean score - share of positives| over bins of equal weight.

    Rows are sorted by score and divided into `bins` bins of equal weight (expected calibration
    error with adaptive bins, Nixon et al. 2019). Rows with equal scores are all in the same bin:
    the bin of the middle one of these rows.
    """
    total = weight.sum()
    if not total:
        return float("nan")
    distinct, tie = np.unique(score, return_inverse=True)
    weights, positives = np.bincount(tie, weight), np.bincount(tie, weight * label)
    middle = np.cumsum(weights) - weights / 2
    bin_of = np.minimum((middle / total * bins).astype(np.int64), bins - 1)
    difference = np.bincount(bin_of, weights * distinct - positives, minlength=bins)
    return float(np.abs(difference).sum() / total)


def precision_recall_f(
    score: Array, label: Array, weight: Array, threshold: float, beta: float
) -> tuple[float, float, float]:
    """Return precision P, recall R and F-beta if rows with score >= threshold count as positive.

    F-beta = (1 + beta^2) P R / (beta^2 P + R); van Rijsbergen's E-measure is 1 - F-beta. Precision
    is 0 if no row is predicted positive. Recall is 0 if no row is positive.
    """
    predicted = score >= threshold
    hits = (weight * label)[predicted].sum()
    precision = hits / weight[predicted].sum() if weight[predicted].sum() else 0.0
    recall = hits / (weight * label).sum() if (weight * label).sum() else 0.0
    low = beta**2 * precision + recall
    f_beta = (1 + beta**2) * precision * recall / low if low else 0.0
    return float(precision), float(recall), float(f_beta)


def average_precision(
    score: Array, label: Array, weight: Array, threshold: float = -np.inf
) -> float:
    """Return average precision: the sum of precision times gain in recall, from the top score down.

    Rows with equal scores form one step. With a threshold, only the steps with score >= threshold
    are summed.
    """
    positives = (weight * label).sum()
    if not positives:
        return float("nan")
    order = np.argsort(-score, kind="stable")
    score, label, weight = score[order], label[order], weight[order]
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
    hits, seen = np.cumsum(weight * label)[last], np.cumsum(weight)[last]
    gains = np.diff(hits, prepend=0.0) / positives
    inside = score[last] >= threshold
    return float((gains * hits / seen)[inside].sum())


def _group_auc(score: Array, label: Array, weight: Array, group: Array) -> tuple[Array, Array]:
    """Return the AUC of each group of rows and the group's total weight, each [groups].

    The AUC is NaN if all rows of the group have the same label.
    """
    groups = int(group.max()) + 1
    order = np.lexsort((score, group))
    score, group = score[order], group[order]
    positive = (weight * (label > 0))[order]
    negative = (weight * (label <= 0))[order]
    # A run is a series of rows with the same group and score, so pairs within a run are ties.
    starts = np.flatnonzero(np.append(True, (np.diff(group) != 0) | (np.diff(score) != 0)))
    run_positive = np.add.reduceat(positive, starts)
    run_negative = np.add.reduceat(negative, starts)
    run_group = group[starts]
    below = np.cumsum(run_negative) - run_negative
    group_negative = np.bincount(run_group, run_negative, minlength=groups)
    below = below - (np.cumsum(group_negative) - group_negative)[run_group]
    pairs = np.bincount(run_group, run_positive * (below + run_negative / 2), minlength=groups)
    group_positive = np.bincount(run_group, run_positive, minlength=groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        areas = pairs / (group_positive * group_negative)
    areas[(group_positive == 0) | (group_negative == 0)] = np.nan
    return areas, group_positive + group_negative


def _weighted_rows(score: Array, label: Array, weight: Array, user: Array) -> tuple[Array, ...]:
    """Drop rows with weight 0; convert weights to float64."""
    counted = weight > 0
    return score[counted], label[counted], weight[counted].astype(np.float64), user[counted]


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else float("nan")
