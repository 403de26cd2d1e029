"""Turn batches into steps: find their table rows and request these rows one step ahead."""

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
    """A batch and the table rows that it needs, prepared on the loader's thread.

    Attributes:
        batch: The rows; the last `drawn` of them are negatives from the catalogue, with weight 0.
        lookups: The table rows that the batch needs.
        positives: For each part of the batch (``train.accumulate``), the indices within the part of
            positive rows whose weight is not 0, int64.
        totals: Total weights of this rank's rows: of all rows, of the positive rows, and, for each
            task, of the rows with a known label; float64 [2 + tasks].
        drawn: Number of negatives from the catalogue.
    """

    batch: Batch
    lookups: tuple[GroupLookup, ...]
    positives: tuple[Tensor, ...]
    totals: Tensor
    drawn: int


@dataclass(frozen=True)
class Step:
    """The input of a training step: a batch on the device, and the request for its table rows.

    Attributes:
        batch: As in `Prepared`.
        request: Request for the table rows, which are being exchanged between the ranks.
        positives: As in `Prepared`.
        totals: Sum of `Prepared.totals` over the ranks, which is being computed.
        drawn: As in `Prepared`.
        next_request: Request for the table rows of the next step; None if there is no next step.
    """

    batch: Batch
    request: RowRequest
    positives: tuple[Tensor, ...]
    totals: PendingSum
    drawn: int
    next_request: RowRequest | None = None


@dataclass(frozen=True)
class NegativeSampler:
    """Draws items from the catalogue, each with the same probability, as negatives.

    Attributes:
        features: Name of an item feature -> codes of all items, int64 [items] or
            [items, list length], or numbers, float32 [items].
        items: Number of items.
    """

    features: Mapping[str, NDArray[Any]]
    items: int

    def append_to(self, batch: Batch, count: int, random: np.random.Generator) -> Batch:
        """Return a batch with `count` more rows: random items without a user, with weight 0."""
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
        tables: The embedding tables to look up rows in.
        config: Configuration of the run.
        first_step: Number of the first batch's step, counted from the start of training.
        negatives: Draws this rank's part of ``train.uniform_negatives``; None if that is 0.
    """
    parts, world = config.train.accumulate, tables.world
    drawn = -(-config.train.uniform_negatives // world.size) if negatives else 0
    unknown_rate = config.model.unknown_rate

    def prepare(number: int, batch: Batch) -> Prepared:
        # Random numbers depend only on seed, step and rank, so a resumed run draws the same.
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
    """Turn prepared batches into steps.

    A step is created before the previous step is yielded. So the ids of its table rows are sent
    while the previous step is being computed.
    """
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
