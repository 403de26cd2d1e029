"""From batches to steps: what can be done before a step's turn comes is done before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hvdrec.config import Config
from hvdrec.loader import Batch
from hvdrec.models.losses import task_weights
from hvdrec.parallel.find import Found, cuts
from hvdrec.parallel.gradients import PendingSum, begin_global_sum
from hvdrec.parallel.tables import Asked, DistributedTables


@dataclass(frozen=True)
class Prepared:
    """A batch whose table rows and positive rows were found, off the training thread.

    positives: of each part, the places int64 of its positive rows of weight above 0; totals:
    float64 [2 + T], this rank's weight of all rows, of the positive ones, and of those that tell of
    each task.
    """

    batch: Batch
    found: tuple[Found, ...]
    positives: tuple[Tensor, ...]
    totals: Tensor


@dataclass(frozen=True)
class Step:
    """What a training step needs: its rows are on their way, and the batch is on the device."""

    batch: Batch
    asked: Asked
    positives: tuple[Tensor, ...]
    totals: PendingSum


def preparer(
    tables: DistributedTables, config: Config, first_step: int, rank: int
) -> Callable[[int, Batch], Prepared]:
    """Return the function that prepares the batches of steps from `first_step` on."""
    parts = config.train.accumulate

    def prepare(number: int, batch: Batch) -> Prepared:
        # A step's random numbers depend on its place alone: a resumed run repeats them.
        random = np.random.default_rng([config.seed, first_step + number, rank])
        found = tables.find(
            batch.features, parts=parts, unknown_rate=config.model.unknown_rate, random=random
        )
        positive = batch.weight * batch.label
        return Prepared(
            batch,
            found,
            tuple(positive[i:j].nonzero().squeeze(1) for i, j in cuts(len(positive), parts)),
            _totals(batch, positive),
        )

    return prepare


def _totals(batch: Batch, positive: Tensor) -> Tensor:
    totals = torch.stack([batch.weight.double().sum(), positive.double().sum()])
    if batch.tasks is None:
        return totals
    return torch.cat([totals, task_weights(batch.tasks, batch.weight).double().sum(dim=0)])


def steps(
    prepared: Iterable[Prepared], tables: DistributedTables, device: torch.device
) -> Iterator[Step]:
    """Turn prepared batches into steps, one ahead: ids travel while the step before computes."""
    waiting: Step | None = None
    for ready in prepared:
        step = Step(
            ready.batch.to(device),
            tables.ask(ready.found),
            tuple(index.to(device, non_blocking=True) for index in ready.positives),
            begin_global_sum(ready.totals),
        )
        if waiting is not None:
            yield waiting
        waiting = step
    if waiting is not None:
        yield waiting
