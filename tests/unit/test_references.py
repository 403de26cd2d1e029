"""Which metrics a split defines, and what a model must beat on it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hvdrec.config.data_sections import Task
from hvdrec.errors import UserError
from hvdrec.evaluation.baselines import TrainingSums, fit_baselines
from hvdrec.evaluation.references import Reference, describe_worse, undefined_metrics, worse_than
from hvdrec.training.labels import check_training_labels, start_at_base_rate
from tests.small_model import small_config, small_model, with_tasks

USER = np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("label", "weight", "undefined"),
    [
        ([0, 1, 0, 1], [1, 1, 1, 1], set()),
        ([1, 1, 1, 1], [1, 1, 1, 1], {"auc", "gauc"}),
        ([0, 0, 0, 0], [1, 1, 1, 1], {"auc", "gauc"}),
        # The only negative row does not count.
        ([0, 1, 1, 1], [0, 1, 1, 1], {"auc", "gauc"}),
        ([0, 1, 0, 1], [0, 0, 0, 0], {"auc", "gauc", "log_loss"}),
        ([0, 0, 1, 1], [1, 1, 1, 1], {"gauc"}),
    ],
)
def test_a_split_says_which_metrics_it_does_not_define(
    label: list[int], weight: list[int], undefined: set[str]
) -> None:
    found = undefined_metrics(USER, np.array(label, np.float32), np.array(weight, np.float32))
    assert set(found) == undefined and all(found.values())


def test_a_model_is_worse_if_its_loss_is_higher_or_its_auc_lower() -> None:
    references = [
        Reference("base_rate", "log_loss", 0.5),
        Reference("item_mean", "auc", 0.6),
        Reference("popularity", "recall@10", 0.1),
        Reference("base_rate", "log_loss", 0.2, task="click"),
        Reference("user_item_mean", "auc", math.nan),
    ]
    metrics = {"log_loss": 0.6, "auc": 0.6, "tasks": {"click": {"log_loss": 0.3}}}
    worse = worse_than(metrics, references)
    assert [(each["baseline"], each["task"], each["model"]) for each in worse] == [
        ("base_rate", "", 0.6),
        ("base_rate", "click", 0.3),
    ]
    text = describe_worse(worse)
    assert "log_loss 0.6 against 0.5" in text and "task click" in text
    # A metric that is not defined proves nothing.
    assert worse_than({"log_loss": math.nan, "tasks": {"click": {}}}, references) == []


def test_sums_over_parts_give_the_baselines_of_all_rows() -> None:
    random = np.random.default_rng(0)
    user, item = random.integers(0, 5, 50), random.integers(0, 7, 50)
    label, weight = random.integers(0, 2, 50).astype(np.float32), random.random(50)
    sums = TrainingSums(5, 7)
    for part in np.array_split(np.arange(50), 3):
        sums.add(user[part], item[part], label[part], weight[part].astype(np.float32))
    whole = fit_baselines(user, item, label, weight.astype(np.float32), 5, 7)
    np.testing.assert_allclose(sums.baselines().item_mean, whole.item_mean)
    np.testing.assert_allclose(sums.baselines().user_mean, whole.user_mean)
    assert math.isnan(TrainingSums(2, 2).rate)


@pytest.mark.parametrize(
    ("objective", "rates", "field"),
    [
        ("ranking", [1.0], "samples.label"),
        ("joint", [0.0], "samples.label"),
        ("ranking", [0.0], "samples.label"),
        ("retrieval", [0.0], "samples.label"),
        ("joint", [math.nan], "samples.weight"),
        ("retrieval", [math.nan], "samples.weight"),
    ],
)
def test_labels_from_which_nothing_can_be_learned_are_refused(
    objective: str, rates: list[float], field: str
) -> None:
    with pytest.raises(UserError) as error:
        check_training_labels(small_config(objective), rates)
    assert error.value.field == field


def test_retrieval_needs_positives_only() -> None:
    check_training_labels(small_config("retrieval"), [1.0])


@pytest.mark.parametrize(("rate", "words"), [(1.0, "one class"), (math.nan, "no known label")])
def test_a_task_needs_both_labels(rate: float, words: str) -> None:
    config = with_tasks(small_config())
    with pytest.raises(UserError, match=words) as error:
        check_training_labels(config, [0.5, 0.5, rate])
    assert "tasks[1]" in str(error.value)


@pytest.mark.parametrize("tasks", [False, True])
def test_a_new_ranker_predicts_the_base_rates(tasks: bool) -> None:
    config: Any = with_tasks(small_config(), task_hidden=(3,)) if tasks else small_config()
    model = small_model(config)
    rates = [0.005, *(0.25 for _ in config.tasks)]
    start_at_base_rate(model, rates)
    assert model.ranker is not None
    biases = [layer.bias.sigmoid() for layer in model.ranker.outputs()]
    expected = torch.tensor([[rate] for rate in (rates[1:] if tasks else rates)])
    torch.testing.assert_close(torch.stack(biases).float(), expected)
    assert all(isinstance(task, Task) for task in config.tasks)
