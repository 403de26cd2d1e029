"""Shards to batches of tensors, through Petastorm, off the training thread.

The rows of a window (see `order`) lie in arrays that are allocated once and filled row group by row
group; a batch is gathered from them in the window's order, columns of one type together. What is
held at a time is one window (int32 codes, lists padded), some row groups that are read ahead, and
the batches held ready.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from hvdrec.config import Config
from hvdrec.config.schema import KEY_COLUMNS, Schema
from hvdrec.data.batch import Batch
from hvdrec.data.collate import ROW_KEYS, Blocks, Layout, fill
from hvdrec.data.petastorm import (
    RowGroupCache,
    Source,
    find_shards,
    list_row_groups,
    read_row_groups,
)
from hvdrec.data.sampler import Plan, Progress, Window, plan_epoch
from hvdrec.errors import UserError, choices
from hvdrec.storage.urls import Place, Url, read_metadata, version

Array = NDArray[Any]
T = TypeVar("T")


class ShardLoader:
    """Delivers the rows of a split's shards in batches, each row once over all ranks of an epoch.

    A batch has exactly `batch_size` rows and all ranks take the same number of steps; a rank that
    has no rows left gets padding. See `order` for which rows come when. Without `shuffle` a rank
    gets its contiguous part of the rows in the order of the files.

    directory: here or by URL; its `*.parquet` files are the shards, in the order of their names;
    window_rows: rows that are shuffled together; workers: reading threads; prefetch: batches held
    ready; columns: names of the features to read (default: all); tasks: columns of further labels
    to read; pin_memory: into page-locked memory, where CUDA is there; cache_dir, cache_gb: where
    row groups that were read are kept, and how much of them. `rows` counts the rows of all ranks,
    `largest_row_group` those of one, `waited_seconds` is the time the consumer has waited.
    Raises UserError for a directory without shards, a shard that cannot be read or lacks a column.
    """

    def __init__(
        self,
        directory: Place,
        schema: Schema,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int = 0,
        shuffle: bool = True,
        window_rows: int = 262_144,
        workers: int = 2,
        prefetch: int = 4,
        columns: Collection[str] | None = None,
        tasks: Sequence[str] = (),
        pin_memory: bool = False,
        cache_dir: str = "",
        cache_gb: float = 10.0,
    ) -> None:
        names = [feature.name for feature in schema.features]
        for column in columns or ():
            if column not in names:
                raise UserError(f"columns: '{column}' is no feature; known: {choices(names)}")
        self.batch_size = batch_size
        self.waited_seconds = 0.0
        self._features = [f for f in schema.features if columns is None or f.name in columns]
        self._tasks = tuple(tasks)
        self._columns = [*(f.name for f in self._features), *KEY_COLUMNS, *self._tasks]
        self._layout = Layout.of(self._features, self._tasks)
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._shuffle, self._window_rows = shuffle, window_rows
        self._workers, self._prefetch = workers, prefetch
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._files = find_shards(directory)
        self._groups, self._group_rows = list_row_groups(self._files, self._columns)
        self.rows = sum(self._group_rows)
        self.largest_row_group = max(self._group_rows, default=0)
        cache = None
        if cache_dir:
            versions = {path: version(file) for path, file in self._files.items()}
            cache = RowGroupCache(Path(cache_dir), int(1e9 * cache_gb), versions)
        filesystem = directory.filesystem if isinstance(directory, Url) else None
        self._source = Source(filesystem, cache)

    @classmethod
    def of(
        cls, config: Config, split: str, rows: int, rank: int, world_size: int, *, shuffle: bool
    ) -> ShardLoader:
        """Return what delivers a split of a configuration in batches of `rows` to one rank."""
        loader = config.loader
        return cls(
            config.paths.of("features") / split,
            config.schema,
            batch_size=rows,
            rank=rank,
            world_size=world_size,
            seed=config.seed,
            shuffle=shuffle,
            window_rows=loader.shuffle_rows if shuffle else rows,
            workers=loader.workers,
            prefetch=loader.prefetch,
            tasks=config.task_columns,
            pin_memory=config.train.device != "cpu",
            cache_dir=loader.cache_dir,
            cache_gb=loader.cache_gb,
        )

    def code_ranges(self, column: str) -> Iterator[tuple[str, int, int]]:
        """Yield (file, lowest, highest) of an encoded column, from the shards' own statistics."""
        for file in dict.fromkeys(file for file, _ in self._groups):
            metadata = read_metadata(self._files[file])
            place = next(
                i
                for i in range(metadata.num_columns)
                if metadata.schema.column(i).path.split(".")[0] == column
            )
            for group in range(metadata.num_row_groups):
                statistics = metadata.row_group(group).column(place).statistics
                if statistics is not None and statistics.has_min_max:
                    yield file, int(statistics.min), int(statistics.max)

    def plan(self, epoch: int, past: Sequence[Progress] = ()) -> Plan:
        """Return what this rank reads in an epoch, after what its past has delivered."""
        return plan_epoch(
            self._group_rows,
            rank=self._rank,
            world_size=self._world_size,
            batch_size=self.batch_size,
            window_rows=self._window_rows,
            seed=self._seed,
            epoch=epoch,
            shuffle=self._shuffle,
            past=past,
        )

    def steps(self, epoch: int, past: Sequence[Progress] = ()) -> int:
        """Return how many batches `epoch` will deliver, the same on all ranks."""
        return self.plan(epoch, past).steps

    def epoch(self, epoch: int, past: Sequence[Progress] = ()) -> Generator[Batch, None, None]:
        """Deliver an epoch's batches, or what is left of it; they are made in another thread.

        That thread and the readers end with the generator: when it is exhausted, closed or dropped.
        What goes wrong in them is raised here.
        """
        return self.prepared(epoch, lambda number, batch: batch, past)

    def prepared(
        self, epoch: int, prepare: Callable[[int, Batch], T], past: Sequence[Progress] = ()
    ) -> Generator[T, None, None]:
        """Deliver what ``prepare(number, batch)`` makes of an epoch's batches, in their thread.

        number: 0-based, among the batches that are delivered now. See `epoch`.
        """
        with closing(self.epochs(epoch, epoch + 1, prepare, past)) as epochs:
            for items in epochs:
                yield from items

    def epochs(
        self,
        start: int,
        stop: int | None,
        prepare: Callable[[int, Batch], T],
        past: Sequence[Progress] = (),
    ) -> Generator[Iterator[T], None, None]:
        """Deliver the epochs from `start` up to `stop`, or without end; see `prepared`.

        Yields an iterator of each, which is to be exhausted before the next is taken. The next
        epoch is already read while an epoch's last batches wait for their turn. past: of the first.
        """
        ready: queue.Queue[T | BaseException | None] = queue.Queue(self._prefetch)
        stopped = threading.Event()

        def numbers() -> Iterable[int]:
            return itertools.count(start) if stop is None else range(start, stop)

        plans = (self.plan(epoch, past if epoch == start else ()) for epoch in numbers())
        maker = threading.Thread(
            target=self._make,
            args=(plans, prepare, ready, stopped),
            name="hvdrec-loader",
            daemon=True,
        )
        maker.start()
        try:
            for _ in numbers():
                yield self._taken(ready)
        finally:
            stopped.set()
            maker.join()

    def _taken(self, ready: queue.Queue[T | BaseException | None]) -> Iterator[T]:
        """Take what was put for one epoch."""
        while True:
            began = time.perf_counter()
            item = ready.get()
            self.waited_seconds += time.perf_counter() - began
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _make(
        self,
        plans: Iterator[Plan],
        prepare: Callable[[int, Batch], T],
        ready: queue.Queue[T | BaseException | None],
        stopped: threading.Event,
    ) -> None:
        """Put each epoch's batches, then None, or what went wrong, unless the consumer stops."""

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
        except BaseException as error:  # whatever it is, the consumer must hear of it
            put(error)

    def _batches(self, plan: Plan, stopped: threading.Event) -> Generator[Batch, None, None]:
        """Cut batches across windows, carrying the rows that are over into the next."""
        made = held = 0
        pieces: list[Blocks] = []
        with closing(self._windows(plan, stopped)) as windows:
            for window, order in windows:
                start = 0
                while start < len(order):
                    places = order[start : start + self.batch_size - held]
                    pieces.append(
                        {names: np.take(block, places, 0) for names, block in window.items()}
                    )
                    start += len(places)
                    held += len(places)
                    if held == self.batch_size:
                        yield self._batch(pieces)
                        made += 1
                        pieces, held = [], 0
                del window  # one at a time
        for _ in range(plan.steps - made):
            yield self._batch(pieces)
            pieces = []

    def _windows(
        self, plan: Plan, stopped: threading.Event
    ) -> Generator[tuple[Blocks, Array], None, None]:
        """Yield each window's rows, and the places of those to deliver, in their order."""
        wanted = [self._groups[fragment.group] for window in plan.windows for fragment in window]
        if not wanted:
            return
        tables = read_row_groups(wanted, self._columns, self._workers, stopped, self._source)
        with closing(tables):
            for number, window in enumerate(plan.windows):
                order = plan.order(number)[plan.skip if number == 0 else 0 :]
                yield self._read(window, tables), order

    def _read(self, window: Window, tables: Iterator[pa.Table]) -> Blocks:
        """Return the rows of a window's fragments, one behind the other."""
        blocks = self._layout.allocated(sum(fragment.rows for fragment in window))
        start = 0
        for fragment in window:
            table = next(
                tables
            )  # if the consumer has stopped there is none, and nobody hears of it
            self._check_rows(fragment.group, table.num_rows)
            stop = start + fragment.rows
            part = {names: block[start:stop] for names, block in blocks.items()}
            if fragment.chosen is None:
                wanted = table.slice(fragment.start, fragment.rows)
                fill(self._layout.columns(part), wanted, self._features)
            else:
                whole = self._layout.allocated(table.num_rows)
                fill(self._layout.columns(whole), table, self._features)
                for names, block in part.items():
                    np.take(whole[names], fragment.positions(), 0, out=block)
            start = stop
        return blocks

    def _check_rows(self, group: int, rows: int) -> None:
        if rows != self._group_rows[group]:
            file, index = self._groups[group]
            raise UserError(
                f"{file}: row group {index} has {rows} rows, had {self._group_rows[group]} before; "
                "leave shards alone while they are read"
            )

    def _batch(self, pieces: Sequence[Blocks]) -> Batch:
        """Return the pieces' rows with padding behind them."""
        rows = sum(len(piece[ROW_KEYS]) for piece in pieces)
        if len(pieces) == 1 and rows == self.batch_size:
            blocks = pieces[0]
        else:
            blocks = self._layout.allocated(self.batch_size)
            for names, block in blocks.items():
                np.concatenate([block[:0], *(piece[names] for piece in pieces)], out=block[:rows])
                block[rows:] = 0
        tensors: dict[str, torch.Tensor] = {}
        for names, block in blocks.items():
            if names[0] in self._layout.lists:
                tensors[names[0]] = torch.from_numpy(block)
            else:
                # Features stay side by side: so numbers are joined to a model's inputs at once.
                matrix = torch.from_numpy(block)
                is_key = names[0] in KEY_COLUMNS
                columns = matrix.t().contiguous().unbind() if is_key else matrix.unbind(1)
                tensors.update(zip(names, columns, strict=True))
        user, item, label, weight = (tensors.pop(name) for name in KEY_COLUMNS)
        labels = [tensors.pop(name) for name in self._tasks]
        tasks = torch.stack(labels, dim=1) if labels else None
        features = {feature.name: tensors[feature.name] for feature in self._features}
        return Batch(features, user, item, label, weight, rows, tasks)
