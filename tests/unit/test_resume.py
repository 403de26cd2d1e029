"""Whether a run that has ended trains on."""

from __future__ import annotations

import math

import pytest

from hvdrec.config.sections import Train
from hvdrec.training.checkpoint import Position
from hvdrec.training.resume import continued
from hvdrec.training.trainer import judged

BEFORE = {"epochs": 4, "patience": 2}


@pytest.mark.parametrize(
    ("epoch", "stale", "epochs", "patience", "trains_on", "words"),
    [
        (4, 0, 4, 2, False, "raise train.epochs"),
        (4, 0, 3, 2, False, "raise train.epochs"),
        (4, 1, 9, 2, True, "from epoch 4 to 9"),
        (3, 2, 9, 2, False, "train.patience above 2"),
        (3, 2, 9, 3, True, "from epoch 3 to 9"),
        # Four epochs and no improvement in the last two.
        (4, 2, 9, 2, False, "train.patience above 2"),
        # A search pruned it.
        (2, 0, 4, 2, False, "its caller"),
        (2, 0, 9, 2, False, "its caller"),
    ],
)
def test_a_run_that_has_ended_trains_on_if_epochs_and_patience_allow(
    epoch: int, stale: int, epochs: int, patience: int, trains_on: bool, words: str
) -> None:
    position = Position(epoch=epoch, stale=stale, finished=True)
    after, line = continued(position, BEFORE, Train(epochs=epochs, patience=patience))
    assert after.finished is not trains_on
    assert line is not None and words in line


def test_an_interrupted_run_continues_without_a_word() -> None:
    position = Position(epoch=1, stale=1)
    assert continued(position, BEFORE, Train(epochs=4, patience=2)) == (position, None)


def test_a_metric_that_is_not_a_number_is_never_the_best() -> None:
    position = judged(Position(step=5), math.nan, is_loss=False)
    assert (position.best, position.stale) == (None, 1)
    position = judged(Position(step=9, best=0.5, best_step=5), math.nan, is_loss=True)
    assert (position.best, position.best_step, position.stale) == (0.5, 5, 1)
    position = judged(Position(step=9, best=0.5, best_step=5, stale=1), 0.4, is_loss=True)
    assert (position.best, position.best_step, position.stale) == (0.4, 9, 0)


def test_a_validation_in_the_warm_up_does_not_count_for_early_stopping() -> None:
    position = Position(step=9, best=0.5, best_step=5)
    assert judged(position, 0.4, is_loss=False, counts=False).stale == 0
    assert judged(position, 0.6, is_loss=False, counts=False).best == 0.6
