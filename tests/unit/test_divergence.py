"""A loss or a weight that is NaN or infinite ends training with the rate to lower."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hvdrec.config.sections import Train
from hvdrec.errors import UserError
from hvdrec.parallel.ranks import World
from hvdrec.storage.json_text import json_text
from hvdrec.training.divergence import check_loss, check_weights, diverged
from hvdrec.training.optimizer import make_optimizer
from hvdrec.training.state import TrainState
from tests.small_model import Setting, small_model, small_tables


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, "train.learning_rate"),
        ({"learning_rate": 1.0}, "train.learning_rate"),
        ({"embedding_learning_rate": 1e30}, "train.embedding_learning_rate"),
        ({"embedding_learning_rate": 0.1, "embedding_optimizer": "adam"}, "train.embedding_"),
    ],
)
def test_the_error_names_the_learning_rate_that_is_furthest_from_usual(
    changes: dict[str, Any], field: str
) -> None:
    error = diverged(Train(**changes), 7, "loss", math.nan)
    assert error.field.startswith(field) and "step 7" in str(error)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_training(loss: float) -> None:
    with pytest.raises(UserError, match="diverged"):
        check_loss(Train(), 3, loss)
    check_loss(Train(), 3, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "moment", "row", "row state"])
def test_no_tensor_of_a_checkpoint_may_be_nan_or_infinite(where: str, value: float) -> None:
    setting = Setting(optimizer="adagrad")
    config = setting.config()
    model = small_model(config, with_tables=False)
    optimizer = make_optimizer(model, config.train)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tables = small_tables(config, small_model(config), World(), setting)
    state = TrainState(config, model, tables, optimizer)
    check_weights(state, 3)
    kernel, parameter = state.tables.kernels[0], next(model.parameters())
    tensors = {
        "weight": parameter.data,
        "moment": optimizer.state[parameter]["exp_avg"],
        "row": kernel.weight,
        "row state": kernel.state["accumulator"],
    }
    tensors[where].view(-1)[-1] = value
    with pytest.raises(UserError, match="step 3"):
        check_weights(state, 3)


def test_json_has_null_for_what_is_not_a_number() -> None:
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, "NaN")}], "d": None}
    assert json_text(value) == '{"a": null, "b": [1.5, null, {"c": [null, "NaN"]}], "d": null}'
