"""Points of the curves that describe how scores order and predict the labels.

All functions take score, label and weight of n rows, each [n]. A curve that is not defined, such as
the ROC curve of rows with a single label, is an empty list of points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.evaluation.ranking_metrics import precision_recall_f

Array = NDArray[Any]
Points = list[tuple[float, float]]
MOST_POINTS = 200
BINS = 10


@dataclass(frozen=True)
class Curves:
    """Curves of one set of scored rows.

    Attributes:
        roc: False positive rate and true positive rate, from high to low scores.
        precision_recall: Recall and precision.
        at_threshold: Recall, precision and F-beta if rows whose score is at least the threshold
            count as positive.
        calibration: Mean score and share of positives of ten bins of equal weight.
        lift: A point for each tenth of the rows, highest scores first: the number of the tenth,
            from 1, and its share of positives divided by the share of positives of all rows.
    """

    roc: Points
    precision_recall: Points
    at_threshold: tuple[float, float, float]
    calibration: Points
    lift: Points


def make_curves(
    score: Array, label: Array, weight: Array, *, threshold: float, beta: float
) -> Curves:
    """Compute the curves of n scored rows; rows with weight 0 do not count."""
    counted = weight > 0
    score, label = score[counted].astype(np.float64), label[counted].astype(np.float64)
    weight = weight[counted].astype(np.float64)
    precision, recall, f_beta = precision_recall_f(score, label, weight, threshold, beta)
    order = np.argsort(-score, kind="stable")
    hits, seen = np.cumsum((weight * label)[order]), np.cumsum(weight[order])
    # A threshold includes all rows with the same score, so only the last of these gives a point.
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True)) if len(order) else order
    hits, seen = hits[last], seen[last]
    positives, total = (float(hits[-1]), float(seen[-1])) if len(hits) else (0.0, 0.0)
    negatives = total - positives
    roc = precision_recall = np.empty((0, 2))
    if positives > 0 and negatives > 0:
        roc = np.stack([(seen - hits) / negatives, hits / positives], axis=1)
        roc = np.concatenate([[[0.0, 0.0]], roc])
    if positives > 0:
        precision_recall = np.stack([hits / positives, hits / seen], axis=1)
    return Curves(
        _thinned(roc),
        _thinned(precision_recall),
        (recall, precision, f_beta),
        _calibration(score, label, weight),
        _lift(score, label, weight),
    )


def _thinned(points: Array) -> Points:
    """Return the first, the last and evenly spread points in between, rounded to 5 decimals."""
    if not len(points):
        return []
    keep = np.unique(np.linspace(0, len(points) - 1, MOST_POINTS).astype(int))
    return [(round(float(x), 5), round(float(y), 5)) for x, y in points[keep]]


def _bins(score: Array, weight: Array) -> Array:
    """Return the bin of each row, from low to high scores; bins have about equal weight."""
    order = np.argsort(score, kind="stable")
    middle = np.cumsum(weight[order]) - weight[order] / 2
    number = np.empty(len(score), dtype=np.int64)
    number[order] = np.minimum((middle / weight.sum() * BINS).astype(np.int64), BINS - 1)
    return number


def _calibration(score: Array, label: Array, weight: Array) -> Points:
    if not len(score):
        return []
    number = _bins(score, weight)
    sums = [
        np.bincount(number, values, BINS) for values in (weight * score, weight * label, weight)
    ]
    return [(p / w, y / w) for p, y, w in zip(*(each.tolist() for each in sums), strict=True) if w]


def _lift(score: Array, label: Array, weight: Array) -> Points:
    rate = (weight * label).sum() / weight.sum() if len(score) else 0.0
    if not rate:
        return []
    number = BINS - 1 - _bins(score, weight)
    positive, total = (np.bincount(number, values, BINS) for values in (weight * label, weight))
    return [
        (bin_number + 1.0, float(p / w / rate))
        for bin_number, (p, w) in enumerate(zip(positive, total, strict=True))
        if w
    ]
