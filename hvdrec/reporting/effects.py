"""Measure the effects of the scene and of each feature on the scores of a ranker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.evaluation.ranking_metrics import auc

Array = NDArray[Any]
Predict = Callable[[Mapping[str, Array]], Array]
"""Function that maps the encoded features of n rows to their scores [n]."""


def permutation_importance(
    predict: Predict, arrays: Mapping[str, Array], label: Array, weight: Array, seed: int = 0
) -> dict[str, float]:
    """Return, for each feature, the loss of AUC if its values are shuffled among the rows.

    The loss is small for a feature that other features can replace, even if the model uses it
    (Breiman, "Random forests", 2001).

    Args:
        predict: The model.
        arrays: Name of a feature -> values of n rows [n, ...].
        label: Label of each row [n].
        weight: Weight of each row [n].
        seed: Seed of the shuffling.

    Returns:
        Name of a feature -> loss of AUC, largest first; empty if the AUC is not defined.
    """
    counted = weight > 0
    label, weight = label[counted], weight[counted].astype(np.float64)
    if not len(label) or label.min() == label.max():
        return {}
    random = np.random.default_rng(seed)
    whole = auc(predict(arrays)[counted], label, weight)
    losses = {}
    for name, values in arrays.items():
        shuffled = {**arrays, name: values[random.permutation(len(values))]}
        losses[name] = whole - auc(predict(shuffled)[counted], label, weight)
    return dict(sorted(losses.items(), key=lambda each: -each[1]))


def scene_effect(predict: Predict, arrays: Mapping[str, Array], name: str) -> dict[int, Array]:
    """Return, for each value of a scene field, the scores of all rows if they had this value.

    Args:
        predict: The model.
        arrays: Name of a feature -> values of n rows.
        name: The scene feature. Its values are the codes that occur in the rows.

    Returns:
        Code -> scores [n].
    """
    codes = np.unique(arrays[name])
    return {
        int(code): predict({**arrays, name: np.full_like(arrays[name], code)}) for code in codes
    }
