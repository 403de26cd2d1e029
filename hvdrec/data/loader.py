"""Deliver batches of tensors from encoded shards; a background thread assembles them.

Petastorm reads the row groups of a window, a part of the epoch whose rows are shuffled together
(see `sampler`). Their rows are copied into preallocated arrays, one per dtype. A batch takes rows
from these arrays in shuffled order. Memory holds one window, a few row groups that are read ahead,
and the prefetched batches.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.data_sections import Loader
from hvdrec.config.schema import Schema
from hvdrec.data.batch import Batch
from hvdrec.data.collate import BlockLayout, Blocks, fill
from hvdrec.data.petastorm import (
    RowGroupCache,
    ShardStore,
    list_row_groups,
    open_shards,
    read_row_groups,
)
from hvdrec.data.sampler import EpochPlan, Progress, Window, plan_epoch
from hvdrec.errors import invalid_file
from hvdrec.storage.urls import Location, version

Array = NDArray[Any]
T = TypeVar("T")


class ShardLoader:
    """Delivers the rows of a split in batches; in an epoch, one rank delivers each row once.

    Every batch has exactly `batch_size` rows, and all ranks take the same number of steps; a rank
    that has no rows left delivers padding. `sampler` defines the order of the rows.

    Attributes:
        rows: Number of rows of the split.
        largest_row_group: Number of rows of the largest row group.
        waited_seconds: How long the consumer has waited for batches.
    """

    def __init__(
        self,
        directory: Location,
        schema: Schema,
        options: Loader = Loader(),
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int = 0,
        shuffle: bool = True,
        tasks: Sequence[str] = (),
        pin_memory: bool = False,
    ) -> None:
        """Open all `*.parquet` shards in a directory, sorted by name, and verify their footers.

        Args:
            directory: Directory or URL of the shards.
            schema: The features.
            options: The ``[loader]`` section.
            batch_size: Number of rows in a batch of this rank.
            rank: Number of this rank.
            world_size: Number of ranks.
            seed: Seed of the shuffling.
            shuffle: False to give each rank a contiguous part of the rows in file order.
            tasks: Names of the tasks' label columns, which are read as well.
            pin_memory: True to put batches into page-locked memory if CUDA is available.

        Raises:
            UserError: The directory has no shards, or a shard is unreadable or lacks a column.
        """
        self.batch_size = batch_size
        self.waited_seconds = 0.0
        self._options = options
        self._features = schema.features
        self._tasks = tuple(tasks)
        self._row_columns = schema.row_columns
        self._columns = [*(f.name for f in self._features), *self._row_columns, *self._tasks]
        self._layout = BlockLayout.of(schema, self._tasks)
        self._rank, self._world_size = rank, world_size
        self._seed, self._shuffle = seed, shuffle
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._sources = open_shards(directory)
        self._groups, self._group_rows = list_row_groups(self._sources, self._columns)
        self.rows = sum(self._group_rows)
        self.largest_row_group = max(self._group_rows, default=0)
        cache = None
        if options.cache_dir:
            versions = {path: version(each.file) for path, each in self._sources.items()}
            cache = RowGroupCache(Path(options.cache_dir), int(1e9 * options.cache_gb), versions)
        self._store = ShardStore(self._sources, cache)

    @classmethod
    def from_config(
        cls,
        config: Config,
        split: str,
        batch_size: int,
        rank: int,
        world_size: int,
        *,
        shuffle: bool,
    ) -> ShardLoader:
        """Create a rank's loader of one split, with the options of a configuration."""
        return cls(
            config.paths.of("features") / split,
            config.schema,
            config.loader,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=config.seed,
            shuffle=shuffle,
            tasks=config.task_columns,
            pin_memory=config.train.device != "cpu",
        )

    def code_ranges(self, column: str) -> Iterator[tuple[str, int, int]]:
        """Yield each row group's file and the column's minimum and maximum, from the metadata."""
        for file in dict.fromkeys(file for file, _ in self._groups):
            metadata = self._sources[file].metadata
            index = next(
                i
                for i in range(metadata.num_columns)
                if metadata.schema.column(i).path in (column, f"{column}.list.element")
            )
            for group in range(metadata.num_row_groups):
                statistics = metadata.row_group(group).column(index).statistics
                if statistics is not None and statistics.has_min_max:
                    yield file, int(statistics.min), int(statistics.max)

    def epoch(self, epoch: int, past: Sequence[Progress] = ()) -> Generator[Batch, None, None]:
        """Deliver the batches of an epoch, without the parts in `past` that were already delivered.

        Errors of the background threads are raised here. See `epochs`.
        """
        with closing(self.epochs(epoch, epoch + 1, lambda _, batch: batch, past)) as epochs:
            for batches in epochs:
                yield from batches

    def epochs(
        self,
        start: int,
        stop: int | None,
        prepare: Callable[[int, Batch], T],
        past: Sequence[Progress] = (),
    ) -> Generator[Iterator[T], None, None]:
        """Deliver epochs `start` to `stop` (exclusive), or endlessly if `stop` is None.

        A background thread assembles each batch and calls `prepare(number, batch)`, where `number`
        counts the delivered batches of all epochs from 0. The thread starts to read the next epoch
        while the last batches of the current one wait to be consumed. All threads end when the
        generator is exhausted, closed or deleted. `past` lists the parts of epoch `start` that were
        already delivered.

        Yields:
            For each epoch, an iterator over the results of `prepare`; exhaust it before the next.
        """
        ready: queue.Queue[T | BaseException | None] = queue.Queue(self._options.prefetch)
        stopped = threading.Event()

        def numbers() -> Iterable[int]:
            return itertools.count(start) if stop is None else range(start, stop)

        plans = (self._plan(epoch, past if epoch == start else ()) for epoch in numbers())
        producer = threading.Thread(
            target=self._produce,
            args=(plans, prepare, ready, stopped),
            name="hvdrec-loader",
            daemon=True,
        )
        producer.start()
        try:
            for _ in numbers():
                yield self._consume(ready)
        finally:
            stopped.set()
            producer.join()

    def _plan(self, epoch: int, past: Sequence[Progress]) -> EpochPlan:
        return plan_epoch(
            self._group_rows,
            rank=self._rank,
            world_size=self._world_size,
            batch_size=self.batch_size,
            # Without shuffling, the size of a window does not affect the order; a small one saves
            # memory.
            window_rows=self._options.shuffle_rows if self._shuffle else self.batch_size,
            seed=self._seed,
            epoch=epoch,
            shuffle=self._shuffle,
            past=past,
        )

    def _consume(self, ready: queue.Queue[T | BaseException | None]) -> Iterator[T]:
        """Yield the items of one epoch from the queue; raise an item that is an exception."""
        while True:
            began = time.perf_counter()
            item = ready.get()
            self.waited_seconds += time.perf_counter() - began
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _produce(
        self,
        plans: Iterator[EpochPlan],
        prepare: Callable[[int, Batch], T],
        ready: queue.Queue[T | BaseException | None],
        stopped: threading.Event,
    ) -> None:
        """Queue each epoch's prepared batches, then None; on a failure, queue the exception."""

        def put(item: T | BaseException | None) -> bool:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        number = 0
        try:
            for plan in plans:
                with closing(self._batches(plan, stopped)) as batches:
                    for batch in batches:
                        pinned = batch.pin_memory() if self._pin_memory else batch
                        if not put(prepare(number, pinned)):
                            return
                        number += 1
                if not put(None):
                    return
        except BaseException as error:  # the consumer raises it, whatever it is
            put(error)

    def _batches(self, plan: EpochPlan, stopped: threading.Event) -> Generator[Batch, None, None]:
        """Yield the batches of an epoch; a batch may take rows from two or more windows."""
        delivered = held = 0
        pieces: list[Blocks] = []
        with closing(self._windows(plan, stopped)) as windows:
            for window, order in windows:
                start = 0
                while start < len(order):
                    rows = order[start : start + self.batch_size - held]
                    pieces.append(
                        {names: np.take(block, rows, 0) for names, block in window.items()}
                    )
                    start += len(rows)
                    held += len(rows)
                    if held == self.batch_size:
                        yield self._batch(pieces)
                        delivered += 1
                        pieces, held = [], 0
                del window  # free it before the next one is allocated
        for _ in range(plan.steps - delivered):
            yield self._batch(pieces)
            pieces = []

    def _windows(
        self, plan: EpochPlan, stopped: threading.Event
    ) -> Generator[tuple[Blocks, Array], None, None]:
        """Yield each window's rows and the order in which to deliver these rows."""
        groups = [self._groups[fragment.group] for window in plan.windows for fragment in window]
        if not groups:
            return
        tables = read_row_groups(groups, self._columns, self._options.workers, stopped, self._store)
        with closing(tables):
            for number, window in enumerate(plan.windows):
                order = plan.order(number)[plan.skip if number == 0 else 0 :]
                yield self._read(window, tables), order

    def _read(self, window: Window, tables: Iterator[pa.Table]) -> Blocks:
        """Read the rows of a window's fragments into one set of blocks."""
        blocks = self._layout.allocate(sum(fragment.rows for fragment in window))
        start = 0
        for fragment in window:
            # `next` raises StopIteration only after the consumer has stopped, so nobody sees the
            # error.
            table = next(tables)
            self._check_rows(fragment.group, table.num_rows)
            stop = start + fragment.rows
            part = {names: block[start:stop] for names, block in blocks.items()}
            if fragment.chosen is None:
                rows = table.slice(fragment.start, fragment.rows)
                fill(self._layout.columns(part), rows, self._features)
            else:
                group = self._layout.allocate(table.num_rows)
                fill(self._layout.columns(group), table, self._features)
                for names, block in part.items():
                    np.take(group[names], fragment.positions(), 0, out=block)
            start = stop
        return blocks

    def _check_rows(self, group: int, rows: int) -> None:
        if rows != self._group_rows[group]:
            file, index = self._groups[group]
            problem = f"row group {index} has {rows} rows, had {self._group_rows[group]} before"
            raise invalid_file(file, problem, "do not change shards while they are read")

    def _batch(self, pieces: Sequence[Blocks]) -> Batch:
        """Concatenate pieces and pad them to `batch_size` rows."""
        rows = sum(len(piece[self._row_columns[:2]]) for piece in pieces)
        if len(pieces) == 1 and rows == self.batch_size:
            blocks = pieces[0]
        else:
            blocks = self._layout.allocate(self.batch_size)
            for names, block in blocks.items():
                np.concatenate([block[:0], *(piece[names] for piece in pieces)], out=block[:rows])
                block[rows:] = 0
        tensors: dict[str, torch.Tensor] = {}
        for names, block in blocks.items():
            matrix = torch.from_numpy(block)
            if names[0] in self._layout.lists:
                tensors[names[0]] = matrix
            else:
                # Feature columns stay views of one matrix, so the model can copy all of them at
                # once.
                is_key = names[0] in self._row_columns
                columns = matrix.t().contiguous().unbind() if is_key else matrix.unbind(1)
                tensors.update(zip(names, columns, strict=True))
        user, item, label, weight = (tensors.pop(name) for name in self._row_columns)
        labels = [tensors.pop(name) for name in self._tasks]
        tasks = torch.stack(labels, dim=1) if labels else None
        features = {feature.name: tensors[feature.name] for feature in self._features}
        return Batch(features, user, item, label, weight, rows, tasks)
