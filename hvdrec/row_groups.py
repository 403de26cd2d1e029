"""Petastorm, told exactly which row groups to read in which order.

Petastorm deals out whole row groups by itself, and its lists become Python objects row by row.
Here it gets a worker class of its own kind, which hands on Arrow tables, and a reader that takes
the row groups it is given.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from petastorm.arrow_reader_worker import ArrowReaderWorker
from petastorm.fs_utils import get_filesystem_and_path_or_paths
from petastorm.reader import Reader
from petastorm.workers_pool import EmptyResultError
from petastorm.workers_pool.thread_pool import ThreadPool

# Petastorm calls what its pinned pyarrow has deprecated; it can do nothing about that, nor can we.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\.")

RowGroup = tuple[str, int]
POLL_SECONDS = 0.1


class _TableQueueReader:
    """Takes (row group, Arrow table) pairs as they are."""

    batched_output = True

    def read_next(self, pool: Any, schema: Any, ngram: Any) -> Any:
        try:
            return pool.get_results()
        except EmptyResultError:
            raise StopIteration from None


class _TableWorker(ArrowReaderWorker):  # type: ignore[misc] # petastorm is untyped
    """Reads a row group and hands it on as an Arrow table with its place among the row groups."""

    publish_func: Any

    @staticmethod
    def new_results_queue_reader() -> _TableQueueReader:
        return _TableQueueReader()

    def process(
        self, piece_index: int, worker_predicate: Any, shuffle_row_drop_partition: Any
    ) -> None:
        publish = self.publish_func
        self.publish_func = lambda table: publish((piece_index, table))
        try:
            super().process(piece_index, worker_predicate, shuffle_row_drop_partition)
        finally:
            self.publish_func = publish


class _PlannedReader(Reader):  # type: ignore[misc] # petastorm is untyped
    """Reads the planned row groups in the planned order."""

    def __init__(self, planned: Sequence[RowGroup], *args: Any, **kwargs: Any) -> None:
        self._planned = planned
        self.indices: list[int] = []
        super().__init__(*args, **kwargs)

    def _filter_row_groups(
        self, dataset: Any, row_groups: Sequence[Any], *ignored: Any
    ) -> tuple[list[int], None]:
        place = {(piece.path, piece.row_group): i for i, piece in enumerate(row_groups)}
        self.indices = [place[group] for group in self._planned]
        return list(self.indices), None


def read_row_groups(
    planned: Sequence[RowGroup], columns: Sequence[str], workers: int, stopped: threading.Event
) -> Iterator[pa.Table]:
    """Yield the planned row groups' tables, in order, read ahead by Petastorm's worker threads.

    planned: (absolute file, index of the row group), none of them without rows. The reader is
    stopped when the generator is closed or `stopped` is set.
    """
    urls = [f"file://{file}" for file in dict.fromkeys(file for file, _ in planned)]
    filesystem, paths = get_filesystem_and_path_or_paths(urls)
    reader = _PlannedReader(
        planned,
        filesystem,
        paths,
        schema_fields=[f"^{column}$" for column in columns],
        worker_class=_TableWorker,
        reader_pool=ThreadPool(workers, results_queue_size=workers + 2),
        shuffle_row_groups=False,
        num_epochs=1,
        is_batched_reader=True,
    )
    with reader:
        # Workers finish in any order: hold what came early until its turn.
        early: dict[int, list[pa.Table]] = {}
        for index in reader.indices:
            while not early.get(index):
                if stopped.is_set():
                    return
                came, table = next(reader)
                early.setdefault(came, []).append(table)
            yield early[index].pop()
