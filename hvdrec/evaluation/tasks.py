"""Metrics of several labels: each task's probabilities on the rows that tell of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.evaluation.baselines import fit_baselines
from hvdrec.evaluation.held_out import Interactions, Scores
from hvdrec.evaluation.ranking import ranking_metrics
from hvdrec.parallel import ranks
from hvdrec.storage.urls import read_tables

Array = NDArray[Any]


def task_report(task_scores: Array, scores: Scores, config: Config) -> dict[str, Any]:
    """Return each task's ranking metrics, over the rows whose label is known, on every rank.

    task_scores: probabilities [n, T] for a split's rows.
    """
    return ranks.run_on_all(
        lambda: {
            task.name: _metrics(task_scores[:, i], scores, i, config)
            for i, task in enumerate(config.tasks)
        }
    )


def task_auc(metrics: Mapping[str, Any], config: Config) -> float:
    """Return the mean of the tasks' AUCs, weighted by share; NaN where none is defined."""
    pairs = [(metrics[task.name]["auc"], task.share) for task in config.tasks]
    defined = [(auc, share) for auc, share in pairs if not math.isnan(auc)]
    total = sum(share for _, share in defined)
    return sum(auc * share for auc, share in defined) / total if total else math.nan


def task_baselines(
    config: Config, train: Interactions, scores: Scores, users: int, items: int
) -> dict[str, Any]:
    """Return the report of popularity and means, fitted to each task's own label.

    train: the rows of the training split; users, items: how many there are.
    """
    table = read_tables(config.paths.of("features") / "train", list(config.task_columns))
    by_name: dict[str, list[Array]] = {}
    for column in config.task_columns:
        label = table[column].to_numpy()
        known = ~np.isnan(label)
        rows = train.where(known)
        fitted = fit_baselines(rows.user, rows.item, label[known], rows.weight, users, items)
        for name, score in fitted.scores(scores.user, scores.item).items():
            by_name.setdefault(name, []).append(score)
    return {
        name: task_report(np.stack(columns, axis=1), scores, config)
        for name, columns in by_name.items()
    }


def _metrics(score: Array, scores: Scores, task: int, config: Config) -> dict[str, float]:
    label = scores.task_labels[:, task]
    known = ~np.isnan(label)
    return ranking_metrics(
        score[known],
        label[known],
        scores.weight[known],
        scores.user[known],
        threshold=config.evaluate.threshold,
        beta=config.evaluate.beta,
    )
