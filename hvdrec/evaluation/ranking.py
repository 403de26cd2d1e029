"""Metrics of predicted probabilities against labels 0 and 1.

Arrays: score, label, weight are [n]; label holds 0 or 1; weights are not negative. Rows of weight
zero do not count. A metric that is not defined for the rows is NaN. Over ranks there is nothing to
add up: gather the arrays and compute once.
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
    """Return all ranking metrics of n rows.

    user: int64 [n], whose row it is; threshold: score from which a row is predicted positive;
    beta: weight of recall in F-beta. Raises UserError if a score is NaN or outside [0, 1].
    """
    counted = weight > 0
    score, label, weight, user = (a[counted] for a in (score, label, weight, user))
    score, weight = score.astype(np.float64), weight.astype(np.float64)
    wrong = int(np.count_nonzero(~((score >= 0) & (score <= 1))))
    if wrong:
        raise UserError(
            f"scores: {wrong} of {len(score)} are NaN or outside [0, 1]; the model has diverged: "
            "lower train.learning_rate or set train.clip_norm"
        )
    per_user, users = gauc(score, label, weight, user)
    precision, recall, f_beta = precision_recall_f(score, label, weight, threshold, beta)
    total = weight.sum()
    base_rate = _ratio((weight * label).sum(), total)
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
        "base_rate": base_rate,
        "rows": int(counted.sum()),
    }


def order_metrics(score: Array, label: Array, weight: Array, user: Array) -> dict[str, float]:
    """Return those of the ranking metrics that only the order of scores decides.

    For scores that are no probabilities; all else as in `ranking_metrics`.
    """
    counted = weight > 0
    score, label, weight, user = (a[counted] for a in (score, label, weight, user))
    weight = weight.astype(np.float64)
    per_user, users = gauc(score, label, weight, user)
    return {
        "auc": auc(score, label, weight),
        "gauc": per_user,
        "gauc_users": users,
        "average_precision": average_precision(score, label, weight),
        "base_rate": _ratio((weight * label).sum(), weight.sum()),
        "rows": int(counted.sum()),
    }


def auc(score: Array, label: Array, weight: Array) -> float:
    """Return the area under the ROC curve; equal scores count half.

    That is the weighted share of pairs of a positive and a negative that are in the right order
    (Hanley and McNeil, 1982).
    """
    return (
        float(_group_auc(score, label, weight, np.zeros(len(score), dtype=np.int64))[0][0])
        if (len(score))
        else float("nan")
    )


def gauc(score: Array, label: Array, weight: Array, user: Array) -> tuple[float, int]:
    """Return the mean of the users' AUCs, weighted by their impressions, and how many users count.

    Users whose rows are all of one class have no AUC and do not count (Zhu et al., "Optimized cost
    per click in Taobao display advertising", KDD 2017).
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
    """Return the weighted mean of -log p(label), p clipped to [1e-15, 1 - 1e-15]."""
    if not weight.sum():
        return float("nan")
    p = np.clip(score, EPSILON, 1 - EPSILON)
    losses = -np.where(label > 0, np.log(p), np.log1p(-p))
    return float(np.average(losses, weights=weight))


def normalized_entropy(score: Array, label: Array, weight: Array) -> float:
    """Return the log loss over that of always predicting the base rate; below 1 is better.

    Source: He et al., "Practical lessons from predicting clicks on ads at Facebook", ADKDD 2014.
    """
    rate = _ratio((weight * label).sum(), weight.sum())
    if not 0 < rate < 1:
        return float("nan")
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return log_loss(score, label, weight) / float(entropy)


def calibration_error(score: Array, label: Array, weight: Array, bins: int = BINS) -> float:
    """Return the weighted mean of |mean score - share of positives| over bins of equal weight.

    Rows are sorted by score and cut into `bins` parts of equal weight (expected calibration error
    with adaptive bins, Nixon et al. 2019). Equal scores fall into one bin, that of their middle.
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
    """Return precision, recall and F-beta of predicting the rows with score >= threshold positive.

    F-beta = (1 + beta^2) P R / (beta^2 P + R); van Rijsbergen's E-measure is 1 - F. Without any
    predicted (actual) positives precision (recall) is 0.
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
    """Return the sum of precision times gain in recall over falling scores, equal ones together.

    With a threshold only the part of the curve with score >= threshold is summed: what is ranked
    below it adds nothing.
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
    """Return the AUC (NaN where a class is missing) and the weight of each group, [groups]."""
    groups = int(group.max()) + 1
    order = np.lexsort((score, group))
    score, group = score[order], group[order]
    positive = (weight * (label > 0))[order]
    negative = (weight * (label <= 0))[order]
    # Runs of one group and one score: within a run a pair is a tie.
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


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
