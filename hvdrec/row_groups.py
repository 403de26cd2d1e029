"""Petastorm, told exactly which row groups to read in which order.

Petastorm deals out whole row groups by itself, turns lists into Python objects row by row, and
opens a file twice for each row group. Here it gets a worker class of its own kind, which hands on
Arrow tables, and a reader that takes the row groups it is given, never too many ahead.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Generator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from petastorm.arrow_reader_worker import ArrowReaderWorker
from petastorm.fs_utils import get_filesystem_and_path_or_paths
from petastorm.reader import Reader
from petastorm.workers_pool import EmptyResultError
from petastorm.workers_pool.thread_pool import ThreadPool
from petastorm.workers_pool.ventilator import ConcurrentVentilator

from hvdrec.errors import UserError

# Petastorm calls what its pinned pyarrow has deprecated; it can do nothing about that, nor can we.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\.")

RowGroup = tuple[str, int]


class _ResultReader:
    """Takes a worker's results, (row group, Arrow table or error), as they are."""

    batched_output = True

    def read_next(self, pool: Any, schema: Any, ngram: Any) -> Any:
        try:
            return pool.get_results()
        except EmptyResultError:
            raise StopIteration from None


class _Worker(ArrowReaderWorker):  # type: ignore[misc] # petastorm is untyped
    """Reads a row group and hands on its place among all, with an Arrow table or an error."""

    publish_func: Any

    @staticmethod
    def new_results_queue_reader() -> _ResultReader:
        return _ResultReader()

    def process(self, piece_index: int, *ignored: Any, **also_ignored: Any) -> None:
        piece = self._split_pieces[piece_index]
        columns = list(self._schema.fields)
        result: pa.Table | UserError
        try:
            with pq.ParquetFile(piece.path) as file:
                result = file.read_row_group(piece.row_group, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            result = UserError(
                f"{piece.path}: row group {piece.row_group} cannot be read ({reason}); "
                "run hvdrec prepare again"
            )
        # An exception would be printed by Petastorm, and raised before its turn.
        self.publish_func((piece_index, result))


class _Ventilator(ConcurrentVentilator):  # type: ignore[misc] # petastorm is untyped
    """Counts as processed what was delivered in order, not what came early and is held."""

    def processed_item(self) -> None:
        pass

    def delivered_item(self) -> None:
        super().processed_item()


class _PlannedReader(Reader):  # type: ignore[misc] # petastorm is untyped
    """Reads the planned row groups in the planned order, at most `ahead` of them ahead."""

    def __init__(self, planned: Sequence[RowGroup], ahead: int, *args: Any, **kwargs: Any) -> None:
        self._planned, self._ahead = planned, ahead
        self.indices: list[int] = []
        super().__init__(*args, **kwargs)

    def _filter_row_groups(
        self, dataset: Any, row_groups: Sequence[Any], *ignored: Any
    ) -> tuple[list[int], None]:
        place = {(piece.path, piece.row_group): i for i, piece in enumerate(row_groups)}
        self.indices = [place[group] for group in self._planned]
        return self.indices, None

    def _create_ventilator(self, row_group_indexes: Sequence[int], *ignored: Any) -> _Ventilator:
        return _Ventilator(
            self._workers_pool.ventilate,
            [{"piece_index": index} for index in row_group_indexes],
            max_ventilation_queue_size=self._ahead,
            ventilation_interval=0.001,
        )


def read_row_groups(
    planned: Sequence[RowGroup],
    columns: Sequence[str],
    workers: int,
    stopped: threading.Event,
) -> Generator[pa.Table, None, None]:
    """Yield the planned row groups' tables, in order, read ahead by Petastorm's worker threads.

    planned: (absolute file, index of the row group), none of them without rows. The reader is
    stopped when the generator is closed or `stopped` is set. Raises UserError for a row group that
    cannot be read.
    """
    ahead = workers + 2
    # The paths do not go through a URL, which would end at a '#' or '?' in them.
    filesystem, _ = get_filesystem_and_path_or_paths("file:///")
    reader = _PlannedReader(
        planned,
        ahead,
        filesystem,
        list(dict.fromkeys(file for file, _ in planned)),
        schema_fields=[f"^{column}$" for column in columns],
        worker_class=_Worker,
        reader_pool=ThreadPool(workers, results_queue_size=ahead),
        shuffle_row_groups=False,
        num_epochs=1,
        is_batched_reader=True,
    )
    with reader:
        # Workers finish in any order: hold what came early until its turn.
        early: dict[int, list[pa.Table | UserError]] = {}
        for index in reader.indices:
            while not early.get(index):
                if stopped.is_set():
                    return
                came, result = next(reader)
                early.setdefault(came, []).append(result)
            result = early[index].pop()
            reader.ventilator.delivered_item()
            if isinstance(result, UserError):
                raise result
            yield result
