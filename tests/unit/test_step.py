"""What a training step sets before it computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hvdrec.config import Config
from hvdrec.parallel.ranks import World
from hvdrec.training.optimizer import make_optimizer
from hvdrec.training.pipeline import preparer, steps
from hvdrec.training.step import Trainee, take_step
from tests.small_model import Setting, of_type, small_batch, small_config, small_model, small_tables


def trainee_of(config: Config, setting: Setting) -> Trainee:
    whole = small_model(config)
    tables = small_tables(config, whole, World(), setting)
    model = small_model(config, with_tables=False).train()
    return Trainee(config, model, tables, make_optimizer(model, config.train))


@pytest.mark.parametrize(
    ("schedule", "shares"), [("constant", (1, 1, 1)), ("linear", (1, 0.75, 0))]
)
def test_dropout_falls_as_training_goes_on(schedule: str, shares: tuple[float, ...]) -> None:
    config = small_config("ranking", dropout_schedule=schedule)
    ranker = replace(config.model.ranker, dropout=0.4)
    tower = replace(config.model.tower, input_dropout=0.2)
    config = replace(config, model=replace(config.model, ranker=ranker, tower=tower))
    trainee = trainee_of(config, Setting())
    prepare = preparer(trainee.tables, config, 0, 0)
    for share, progress in zip(shares, (0.0, 0.25, 1.0), strict=True):
        batch = replace(of_type(small_batch(4), torch.float64), tasks=None)
        (step,) = steps([prepare(0, batch)], trainee.tables, torch.device("cpu"))
        take_step(trainee, step, 0, progress)
        now = sorted({dropout.p for dropout, _ in trainee.dropouts})
        assert now == pytest.approx(sorted({0.2 * share, 0.4 * share}))
