"""Metrics by slice. A slice is the rows with one value of a column, or with a range of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.evaluation.ranking_metrics import auc, log_loss

Array = NDArray[Any]
MOST_VALUES = 24
"""If a column has more values, the less frequent ones share one slice."""
OTHERS = "(others)"


@dataclass(frozen=True)
class Slice:
    """Metrics of the rows of a slice.

    Attributes:
        name: Value of the rows, or range of their values.
        rows: Number of rows.
        base_rate: Share of positives.
        mean_score: Mean of the scores; equal to the base rate if the slice is calibrated.
        auc: Area under the ROC curve; NaN if all labels are equal.
        log_loss: Mean log loss.
    """

    name: str
    rows: int
    base_rate: float
    mean_score: float
    auc: float
    log_loss: float


def slices_of_values(
    values: Array, score: Array, label: Array, weight: Array, *, ordered: bool = True
) -> list[Slice]:
    """Return the metrics for each value of a column.

    Args:
        values: Value of each row, numbers or strings [n].
        score: Probability of each row [n].
        label: Label of each row [n].
        weight: Weight of each row [n].
        ordered: True to order the slices by value, False by number of rows.
    """
    known, code, count = np.unique(values, return_inverse=True, return_counts=True)
    if len(known) > MOST_VALUES:
        frequent = np.sort(np.argsort(-count, kind="stable")[: MOST_VALUES - 1])
        place = np.full(len(known), len(frequent))
        place[frequent] = np.arange(len(frequent))
        names, code = [*map(str, known[frequent]), OTHERS], place[code]
    else:
        names = [str(value) for value in known]
    slices = _slices(names, code, score, label, weight)
    return slices if ordered else sorted(slices, key=lambda each: -each.rows)


def slices_of_ranges(
    numbers: Array,
    score: Array,
    label: Array,
    weight: Array,
    *,
    bins: int = 10,
    apart: Mapping[float, str] | None = None,
) -> list[Slice]:
    """Return the metrics for ranges of a number; the ranges have about equally many rows.

    Args:
        numbers: The number by which rows are divided, of each row [n].
        score: Probability of each row [n].
        label: Label of each row [n].
        weight: Weight of each row [n].
        bins: Number of ranges.
        apart: Number that has a slice of its own -> name of this slice.
    """
    names: list[str] = []
    code = np.full(len(numbers), -1)
    for number, name in (apart or {}).items():
        if (numbers == number).any():
            code[numbers == number] = len(names)
            names.append(name)
    rest = np.flatnonzero(code < 0)
    if len(rest):
        edges = np.unique(np.quantile(numbers[rest], np.linspace(0, 1, bins + 1)))
        inner = edges[1:-1]
        place = np.searchsorted(inner, numbers[rest], side="right")
        for number in np.unique(place):
            inside = rest[place == number]
            low, high = numbers[inside].min(), numbers[inside].max()
            code[inside] = len(names)
            names.append(f"{low:,.4g}" if low == high else f"{low:,.4g} to {high:,.4g}")
    return _slices(names, code, score, label, weight)


def _slices(
    names: list[str], code: Array, score: Array, label: Array, weight: Array
) -> list[Slice]:
    slices = []
    for number, name in enumerate(names):
        rows = (code == number) & (weight > 0)
        if not rows.any():
            continue
        p, y, w = score[rows], label[rows], weight[rows].astype(np.float64)
        rate, mean = (float((w * values).sum() / w.sum()) for values in (y, p))
        slices.append(Slice(name, int(rows.sum()), rate, mean, auc(p, y, w), log_loss(p, y, w)))
    return slices
