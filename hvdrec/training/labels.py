"""Examine the labels before training: check them, choose a metric and set the output biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from hvdrec.config import Config, with_fields
from hvdrec.errors import UserError, invalid_file, invalid_value
from hvdrec.evaluation.popularity import (
    PopularityByEvent,
    popularity_by_event,
    popularity_reference,
)
from hvdrec.evaluation.references import LabelFacts, label_facts
from hvdrec.models.recommender import Recommender
from hvdrec.parallel import ranks


def read_label_facts(config: Config) -> LabelFacts:
    """Read facts about the labels on the first rank and send them to all ranks.

    All ranks must call this at the same time.

    Raises:
        UserError: The training split has labels from which nothing can be learned.
    """

    def read() -> dict[str, object] | None:
        if not ranks.current().is_first:
            return None
        facts = label_facts(config)
        check_training_labels(config, facts.rates)
        return facts.to_dict()

    return LabelFacts.from_dict(ranks.broadcast_object(ranks.run_on_all(read)))


def check_training_labels(config: Config, rates: Sequence[float]) -> None:
    """Check that a model can learn from the labels of the training split.

    Args:
        config: Configuration of the run.
        rates: Weighted share of positive rows, for the main label, then for each task; NaN if all
            rows have weight 0.

    Raises:
        UserError: All weights are zero, or a label has the same value in all rows.
    """
    rate, folder = rates[0], config.paths.of("features") / "train"
    again = "then run hvdrec samples and hvdrec prepare again"
    if math.isnan(rate):
        problem = "no training row has a weight above 0"
        raise invalid_value("samples.weight", config.samples.weight, problem, f"change it, {again}")
    if rate == 0 and config.train.objective != "ranking":
        problem = "is 0 in all training rows: there is no positive to retrieve"
        raise invalid_value("samples.label", config.samples.label, problem, f"change it, {again}")
    if config.train.objective == "retrieval":
        return
    if not config.tasks and rate in (0, 1):
        raise _constant("samples.label", config.samples.label, rate, again)
    for i, (task, share) in enumerate(zip(config.tasks, rates[1:], strict=True)):
        if math.isnan(share):
            problem = f"task '{task.name}' has no known label in the training split"
            raise invalid_file(folder, problem, f"change tasks[{i}].label, {again}")
        if share in (0, 1):
            raise _constant(f"tasks[{i}].label", task.label, share, again)


def _constant(field: str, label: str, rate: float, again: str) -> UserError:
    """Build the error for a label that has the same value in all training rows."""
    problem = f"is {rate:g} in all training rows: a ranker cannot learn from one class"
    remedy = f"change it, {again}"
    if rate == 1 and field == "samples.label":
        remedy = (
            f"set samples.negatives.per_positive to draw negatives, {again}; or set "
            "train.objective = 'retrieval'"
        )
    return invalid_value(field, label, problem, remedy)


def with_defined_metric(config: Config, facts: LabelFacts) -> tuple[Config, LabelFacts, list[str]]:
    """Choose a validation metric that is defined on the validation split.

    All ranks must call this at the same time.

    Returns:
        Three values. The first is the configuration with the name of the metric. The second is the
        facts; for a retrieval metric, its value for the popularity baseline is added. The third is
        lines to show to the user; empty if the metric is the first choice.

    Raises:
        UserError: ``train.metric`` names a metric that is not defined on the validation split.
    """
    reasons: list[str] = []
    for name in _candidates(config):
        chosen = with_fields(config, {"train.metric": name})
        reason = facts.undefined.get(name, "")
        if name in ("recall", "ndcg"):
            reference, notes = popularity_reference(config, metric_name(chosen))
            reason = "; ".join(notes) if math.isnan(reference.value) else ""
            facts = replace(facts, references=[*facts.references, reference])
        if not reason:
            said = [] if not reasons else [_instead(name, reasons)]
            return chosen, facts, said
        reasons.append(f"{metric_name(chosen)} is not defined on the validation split ({reason})")
    remedy = "set it to 'auto', which takes a metric that is defined"
    raise invalid_value("train.metric", config.train.metric, reasons[0], remedy)


def with_popularity_by_event(
    config: Config, facts: LabelFacts
) -> tuple[LabelFacts, PopularityByEvent | None, list[str]]:
    """Replace the popularity baseline, if there is one, by popularity event by event.

    All ranks must call this at the same time.

    Returns:
        The facts; the events with the new baseline, None if the baseline is not replaced; and lines
        to show to the user if events cannot be read.
    """
    others = [each for each in facts.references if each.baseline != "popularity"]
    if len(others) == len(facts.references):
        return facts, None, []
    by_event, reason = popularity_by_event(config)
    if by_event is None:
        return facts, None, [reason] if reason else []
    return replace(facts, references=[*others, by_event.reference]), by_event, []


def _candidates(config: Config) -> tuple[str, ...]:
    """Return names of metrics in the order in which they are tried."""
    if config.train.metric != "auto":
        return (config.train.metric,)
    if config.train.objective == "retrieval":
        return ("recall", "none")
    first = "task_auc" if config.tasks else "auc"
    return (first, "log_loss", *(("recall",) if config.train.objective == "joint" else ()), "none")


def _instead(name: str, reasons: Sequence[str]) -> str:
    what = "there is no early stopping, and the last checkpoint is the best"
    if name != "none":
        what = f"{name} decides which checkpoint is the best"
    return f"train.metric = 'auto': {'; '.join(reasons)}; {what}"


def metric_name(config: Config) -> str:
    """Return the name of the validation metric that early stopping watches."""
    if config.train.metric != "auto":
        name: str = config.train.metric
    elif config.tasks:
        name = "task_auc"
    else:
        name = "recall" if config.train.objective == "retrieval" else "auc"
    return f"{name}@{config.evaluate.k[0]}" if name in ("recall", "ndcg") else name


def start_at_base_rate(model: Recommender, rates: Sequence[float]) -> None:
    """Set the output biases of a new ranker so that it predicts the share of positive rows.

    Args:
        model: A new model; nothing is done if it has no ranker.
        rates: Share of positive training rows, strictly between 0 and 1, for the main label, then
            for each task.
    """
    if model.ranker is None:
        return
    with torch.no_grad():
        for head, rate in zip(
            model.ranker.outputs(), rates[1:] if model.tasks else rates[:1], strict=True
        ):
            head.bias.fill_(math.log(rate / (1 - rate)))
