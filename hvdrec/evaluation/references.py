"""Examine a split without a model: find undefined metrics, and measure simple baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isnan, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.evaluation.baselines import TrainingSums
from hvdrec.evaluation.ranking_metrics import auc, gauc, log_loss
from hvdrec.storage.parquet import read_metadata, read_parts, read_tables

Array = NDArray[Any]
MEANS = ("item_mean", "user_item_mean")
LOSSES = ("log_loss",)
BY_EVENT = "events."
"""Prefix of a metric of retrieval event by event, such as ``events.hit_rate@10``."""


@dataclass(frozen=True)
class Reference:
    """The value of a metric that a baseline reaches on a split.

    Attributes:
        baseline: Name of the baseline. ``base_rate`` predicts the share of positives among the
            training rows for every row; for the other baselines see `baselines`.
        metric: Name of the metric; with the prefix `BY_EVENT` for a metric by event.
        value: Value of the metric.
        task: Name of the task; empty for the main label.
    """

    baseline: str
    metric: str
    value: float
    task: str = ""


@dataclass(frozen=True)
class LabelFacts:
    """Facts about the labels of the training split and of another split, usually validation.

    Attributes:
        rates: Weighted share of positive rows in the training split, for the main label, then for
            each task; NaN if the total weight is 0.
        undefined: Ranking metric -> the reason why it is not defined on the other split. Metrics
            that are defined are not listed.
        references: Metrics of the baselines on the other split.
    """

    rates: Sequence[float]
    undefined: Mapping[str, str] = field(default_factory=dict)
    references: Sequence[Reference] = ()

    def to_dict(self) -> dict[str, Any]:
        """Convert the facts to plain values, which ranks can send to each other."""
        return asdict(self)

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> LabelFacts:
        """Build the facts from the result of `to_dict`."""
        references = [Reference(**each) for each in plain["references"]]
        return LabelFacts(plain["rates"], plain["undefined"], references)


def label_facts(config: Config, split: str = "validation") -> LabelFacts:
    """Read the labels of the training split, shard by shard, and of another split.

    Only one rank needs to call this.
    """
    features, columns = (
        config.paths.of("features"),
        [*config.schema.row_columns, *config.task_columns],
    )
    count = {s: read_metadata(features / f"{s}s.parquet").num_rows for s in ("user", "item")}
    sums, tasks = TrainingSums(count["user"], count["item"]), np.zeros((len(config.tasks), 2))
    for part in read_parts(features / "train", columns):
        user, item, label, weight, *labels = (part[name].to_numpy() for name in columns)
        sums.add(user, item, label, weight)
        for row, values in zip(tasks, labels, strict=True):
            row += [weight[~np.isnan(values)].sum(), np.nansum(weight * values)]
    rates = [sums.rate, *(positive / total if total else nan for total, positive in tasks)]
    held_out = read_tables(features / split, columns)
    user, item, label, weight, *labels = (held_out[name].to_numpy() for name in columns)
    undefined = undefined_metrics(user, label, weight)
    if config.tasks:
        shares = [task.share for task in config.tasks]
        undefined |= _undefined_tasks(labels, weight, shares)
    if config.train.objective == "retrieval":
        return LabelFacts(rates, undefined)
    if config.tasks:
        names = [task.name for task in config.tasks]
        references = _task_references(names, rates[1:], labels, weight)
        return LabelFacts(rates, undefined, references)
    scores = sums.baselines().scores(user, item)
    references = [Reference("base_rate", "log_loss", _constant_loss(sums.rate, label, weight))]
    for name in MEANS:
        score = scores[name]
        references.append(Reference(name, "log_loss", log_loss(score, label, weight)))
        references.append(Reference(name, "auc", _auc(score, label, weight)))
    return LabelFacts(rates, undefined, references)


def undefined_metrics(user: Array, label: Array, weight: Array) -> dict[str, str]:
    """Return each ranking metric that is not defined for n rows -> the reason.

    Args:
        user: User of each row, int64 [n].
        label: Label of each row, float32 [n].
        weight: Weight of each row, float32 [n].
    """
    counted = weight > 0
    user, label, weight = user[counted], label[counted], weight[counted]
    if not len(label):
        return dict.fromkeys(("auc", "gauc", "log_loss"), "no row has a weight")
    if label.min() == label.max():
        return dict.fromkeys(("auc", "gauc"), f"all labels are {label[0]:g}")
    if gauc(np.zeros(len(label)), label, weight, user)[1] == 0:
        return {"gauc": "no user has rows of both labels"}
    return {}


def worse_than(metrics: Mapping[str, Any], references: Iterable[Reference]) -> list[dict[str, Any]]:
    """Return the references that are better than a model, each with the model's value.

    Args:
        metrics: Metrics of the model on the same rows; ``tasks`` holds the metrics of each task,
            ``events`` the metrics by event. A metric that is missing or not defined is not
            compared.
        references: Metrics of the baselines.
    """
    worse = []
    for reference in references:
        own, name = metrics, reference.metric
        if reference.task:
            own = metrics["tasks"][reference.task]
        elif name.startswith(BY_EVENT):
            own, name = metrics.get("events", {}), name.removeprefix(BY_EVENT)
        value = own.get(name)
        if value is None or isnan(value) or isnan(reference.value):
            continue
        is_loss = reference.metric in LOSSES
        if value > reference.value if is_loss else value < reference.value:
            worse.append({**asdict(reference), "model": value})
    return worse


def describe_worse(worse: Iterable[Mapping[str, Any]]) -> str:
    """Format the result of `worse_than`, such as ``base_rate (log_loss 0.7 against 0.03)``."""
    texts = []
    for each in worse:
        metric = each["metric"]
        if metric.startswith(BY_EVENT):
            metric = f"{metric.removeprefix(BY_EVENT)} by event"
        if each["task"]:
            metric += f" of task {each['task']}"
        texts.append(
            f"{each['baseline']} ({metric} {each['model']:.4g} against {each['value']:.4g})"
        )
    return ", ".join(texts)


def _undefined_tasks(
    labels: Sequence[Array], weight: Array, shares: Sequence[float]
) -> dict[str, str]:
    """Return ``task_auc`` -> the reason, if this metric is not defined; otherwise an empty result.

    The metric is defined if at least one task with a share other than 0 has a defined AUC.
    """
    for values, share in zip(labels, shares, strict=True):
        known = values[~np.isnan(values) & (weight > 0)]
        if share and len(known) and known.min() < known.max():
            return {}
    return {"task_auc": "no task has both labels"}


def _task_references(
    names: Sequence[str], rates: Sequence[float], labels: Sequence[Array], weight: Array
) -> list[Reference]:
    """Return, for each task, the log loss of always predicting its base rate."""
    references = []
    for name, rate, values in zip(names, rates, labels, strict=True):
        known = ~np.isnan(values)
        loss = _constant_loss(rate, values[known], weight[known])
        references.append(Reference("base_rate", "log_loss", loss, name))
    return references


def _constant_loss(rate: float, label: Array, weight: Array) -> float:
    return nan if isnan(rate) else log_loss(np.full(len(label), rate), label, weight)


def _auc(score: Array, label: Array, weight: Array) -> float:
    return auc(score[weight > 0], label[weight > 0], weight[weight > 0].astype(np.float64))
