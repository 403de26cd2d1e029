"""From batches to steps: lookups and sums are prepared before a step needs them."""

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
from hvdrec.models.losses.cross_entropy import task_weights
from hvdrec.parallel.gradients import PendingSum, start_global_sum


@dataclass(frozen=True)
class Prepared:
    """A batch with its lookups, made on the loader's thread.

    Attributes:
        batch: The rows; the last `drawn` are negatives from the catalogue, of weight 0.
        lookups: The table rows that the batch needs.
        positives: For each part of the batch, int64 indices of the positive rows with a weight.
        totals: float64 [2 + T], this rank's weight of all rows, of the positive rows, and of the
            rows with a known label of each task.
        drawn: Number of drawn negatives.
    """

    batch: Batch
    lookups: tuple[GroupLookup, ...]
    positives: tuple[Tensor, ...]
    totals: Tensor
    drawn: int


@dataclass(frozen=True)
class Step:
    """What a training step needs, with the batch on the device and the table rows requested.

    Attributes:
        batch: As in `Prepared`; so are positives and drawn.
        request: The pending table rows.
        totals: The pending sum of `Prepared.totals` over the ranks.
        next_request: The pending table rows of the step after it, if there is one.
    """

    batch: Batch
    request: RowRequest
    positives: tuple[Tensor, ...]
    totals: PendingSum
    drawn: int
    next_request: RowRequest | None = None


@dataclass(frozen=True)
class NegativeSampler:
    """Draws negatives uniformly from all items.

    Attributes:
        features: Item features: name -> codes int64 [items] or [items, L], or float32 [items].
        items: Number of items.
    """

    features: Mapping[str, NDArray[Any]]
    items: int

    def append_to(self, batch: Batch, count: int, random: np.random.Generator) -> Batch:
        """Return a batch with `count` more rows: random items, without a user, of weight 0."""
        drawn = random.integers(0, self.items, count)

        def longer(column: Tensor, values: NDArray[Any] | None = None) -> Tensor:
            if values is None:
                return torch.cat([column, column.new_zeros(count, *column.shape[1:])])
            return torch.cat([column, torch.from_numpy(values[drawn]).to(column.dtype)])

        tasks = batch.tasks
        if tasks is not None:
            tasks = torch.cat([tasks, tasks.new_full((count, tasks.shape[1]), nan)])
        return Batch(
            {
                name: longer(column, self.features.get(name))
                for name, column in batch.features.items()
            },
            longer(batch.user_index),
            longer(batch.item_index, np.arange(self.items)),
            longer(batch.label),
            longer(batch.weight),
            batch.rows,
            tasks,
        )


def make_preparer(
    tables: DistributedTables,
    config: Config,
    first_step: int,
    negatives: NegativeSampler | None = None,
) -> Callable[[int, Batch], Prepared]:
    """Return the function that prepares batches; it runs on the loader's thread.

    Args:
        tables: Looked up.
        config: The run.
        first_step: Number of the first batch's step since the start of training.
        negatives: Draws this rank's part of ``train.uniform_negatives``; None if there are none.
    """
    parts, world = config.train.accumulate, tables.world
    drawn = -(-config.train.uniform_negatives // world.size) if negatives else 0
    unknown_rate = config.model.unknown_rate

    def prepare(number: int, batch: Batch) -> Prepared:
        # Random numbers depend on seed, step and rank only, so a resumed run repeats them.
        random = np.random.default_rng([config.seed, first_step + number, world.rank])
        if negatives:
            batch = negatives.append_to(batch, drawn, random)
        codes: Mapping[str, Tensor] = batch.features
        if unknown_rate:
            codes = drop_to_unknown(tables.schema, codes, unknown_rate, random)
        positive = batch.weight * batch.label
        totals = [batch.weight.double().sum().view(1), positive.double().sum().view(1)]
        if batch.tasks is not None:
            totals.append(task_weights(batch.tasks, batch.weight).double().sum(dim=0))
        return Prepared(
            batch,
            tables.look_up(codes, parts),
            tuple(
                torch.from_numpy(np.flatnonzero(positive[i:j].numpy()))
                for i, j in part_bounds(len(positive), parts)
            ),
            torch.cat(totals),
            drawn,
        )

    return prepare


def steps(
    prepared: Iterable[Prepared], tables: DistributedTables, device: torch.device
) -> Iterator[Step]:
    """Turn prepared batches into steps, one ahead: ids are sent while the step before computes."""
    waiting: Step | None = None
    for ready in prepared:
        step = Step(
            ready.batch.to(device),
            tables.request_rows(ready.lookups),
            tuple(index.to(device, non_blocking=True) for index in ready.positives),
            start_global_sum(ready.totals),
            ready.drawn,
        )
        if waiting is not None:
            yield replace(waiting, next_request=step.request)
        waiting = step
    if waiting is not None:
        yield waiting
