"""From batches to steps: what can be done before a step's turn comes is done before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import nan
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdrec.config import Config
from hvdrec.data.batch import Batch
from hvdrec.embeddings.lookup import GroupLookup, drop_to_unknown, part_bounds
from hvdrec.embeddings.sharded import DistributedTables, RowRequest
from hvdrec.models.losses import task_weights
from hvdrec.parallel.gradients import PendingSum, start_global_sum


@dataclass(frozen=True)
class Prepared:
    """A batch whose table rows and positive rows were found, off the training thread.

    positives: of each part, the places int64 of its positive rows of weight above 0; totals:
    float64 [2 + T], this rank's weight of all rows, of the positive ones, and of those that tell of
    each task; drawn: how many rows at the end are negatives from the catalogue, of weight 0.
    """

    batch: Batch
    found: tuple[GroupLookup, ...]
    positives: tuple[Tensor, ...]
    totals: Tensor
    drawn: int


@dataclass(frozen=True)
class Step:
    """What a training step needs: its rows are on their way, and the batch is on the device.

    following: the rows of the step after it, if there is one.
    """

    batch: Batch
    asked: RowRequest
    positives: tuple[Tensor, ...]
    totals: PendingSum
    drawn: int
    following: RowRequest | None = None


@dataclass(frozen=True)
class Catalogue:
    """All items, to draw negatives from.

    features: name -> codes int64 [items] or [items, max_length], or float32 [items].
    """

    features: Mapping[str, NDArray[Any]]
    items: int

    def appended(self, batch: Batch, count: int, random: np.random.Generator) -> Batch:
        """Return a batch with `count` rows behind it: random items, of no user, of weight 0."""
        drawn = random.integers(0, self.items, count)

        def behind(column: Tensor, more: NDArray[Any] | None = None) -> Tensor:
            if more is None:
                return torch.cat([column, column.new_zeros(count, *column.shape[1:])])
            return torch.cat([column, torch.from_numpy(more[drawn]).to(column.dtype)])

        return Batch(
            {
                name: behind(column, self.features.get(name))
                for name, column in batch.features.items()
            },
            behind(batch.user_index),
            behind(batch.item_index, np.arange(self.items)),
            behind(batch.label),
            behind(batch.weight),
            batch.rows,
            None
            if batch.tasks is None
            else torch.cat([batch.tasks, batch.tasks.new_full((count, batch.tasks.shape[1]), nan)]),
        )


def preparer(
    tables: DistributedTables,
    config: Config,
    first_step: int,
    rank: int,
    catalogue: Catalogue | None = None,
) -> Callable[[int, Batch], Prepared]:
    """Return the function that prepares the batches of steps from `first_step` on.

    catalogue: where this rank draws its part of train.uniform_negatives from, if there are any.
    """
    parts = config.train.accumulate
    drawn = -(-config.train.uniform_negatives // tables.world.size) if catalogue else 0
    draws = bool(catalogue or config.model.unknown_rate)

    def prepare(number: int, batch: Batch) -> Prepared:
        # A step's random numbers depend on its place alone: a resumed run repeats them.
        place = [config.seed, first_step + number, rank]
        random = np.random.default_rng(place) if draws else None
        if catalogue and random:
            batch = catalogue.appended(batch, drawn, random)
        codes: Mapping[str, Tensor] = batch.features
        if config.model.unknown_rate and random:
            codes = drop_to_unknown(tables.schema, codes, config.model.unknown_rate, random)
        found = tables.look_up(codes, parts)
        positive = batch.weight * batch.label
        return Prepared(
            batch,
            found,
            tuple(
                torch.from_numpy(np.flatnonzero(positive[i:j].numpy()))
                for i, j in part_bounds(len(positive), parts)
            ),
            _totals(batch, positive),
            drawn,
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
            tables.request_rows(ready.found),
            tuple(index.to(device, non_blocking=True) for index in ready.positives),
            start_global_sum(ready.totals),
            ready.drawn,
        )
        if waiting is not None:
            yield replace(waiting, following=step.asked)
        waiting = step
    if waiting is not None:
        yield waiting
