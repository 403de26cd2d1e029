"""Petastorm, told exactly which row groups to read in which order.

Petastorm deals out whole row groups by itself, turns lists into Python objects row by row, and
opens a file twice for each row group. Here it gets a worker class of its own kind, which hands on
Arrow tables, and a reader that takes the row groups it is given, never too many ahead.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.filesystem as legacy
import pyarrow.parquet as pq
from petastorm.arrow_reader_worker import ArrowReaderWorker
from petastorm.fs_utils import get_filesystem_and_path_or_paths
from petastorm.local_disk_cache import LocalDiskCache
from petastorm.reader import Reader
from petastorm.workers_pool import EmptyResultError, thread_pool
from petastorm.workers_pool.thread_pool import ThreadPool
from petastorm.workers_pool.ventilator import ConcurrentVentilator

from hvdrec.errors import UserError, choices
from hvdrec.storage.urls import Place, open_in, parquet_files, read_metadata, retried

# Petastorm calls what its pinned pyarrow has deprecated; it can do nothing about that, nor can we.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\.")

# Its idle threads look for work a thousand times a second, on the cores that train: a step of 40 ms
# was interrupted 100 times. Here they are woken instead, and this is how long they sleep at most.
thread_pool.IO_TIMEOUT_INTERVAL_S = 0.1

RowGroup = tuple[str, int]


class _ResultReader:
    """Takes a worker's results, (row group, Arrow table or error), as they are."""

    batched_output = True

    def read_next(self, pool: Any, schema: Any, ngram: Any) -> Any:
        try:
            return pool.get_results()
        except EmptyResultError:
            raise StopIteration from None


class RowGroupCache:
    """Petastorm's local disk cache of row groups, which the ranks of a host may share.

    versions: path of a shard -> what changes with its contents. Row groups are kept as Arrow
    streams: the cache unpickles nothing that hvdrec wrote. Raises UserError for a directory that
    cannot be used.
    """

    def __init__(self, directory: Path, size_bytes: int, versions: Mapping[str, str]) -> None:
        self._versions = versions
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._kept = LocalDiskCache(str(directory), size_bytes, expected_row_size_bytes=0)
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"loader.cache_dir = '{directory}': cannot be used ({error}); name a directory on "
                "a disk of this host that you may write"
            ) from None

    def get(
        self, file: str, group: int, columns: Sequence[str], read: Callable[[], pa.Table]
    ) -> pa.Table:
        """Return a row group as it is kept, or else read it and keep it."""
        text = json.dumps([file, self._versions[file], group, sorted(columns)])
        key = hashlib.sha256(text.encode()).hexdigest()

        def fill() -> bytes:
            sink = pa.BufferOutputStream()
            table = read()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            return bytes(sink.getvalue().to_pybytes())

        with pa.ipc.open_stream(self._kept.get(key, fill)) as stream:
            return stream.read_all()


class _StoreFiles(legacy.FileSystem):  # type: ignore[misc] # pyarrow is untyped
    """What Petastorm asks of a file system, of the old kind: its pyarrow takes no other from it.

    It raises where the store does not answer, which fsspec's own isfile takes for an absent file.
    """

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def isfile(self, path: str) -> bool:
        return bool(self._filesystem.info(path)["type"] == "file")

    def isdir(self, path: str) -> bool:
        return not self.isfile(path)

    def open(self, path: str, mode: str = "rb") -> Any:
        return open_in(self._filesystem, path)


@dataclass(frozen=True)
class Source:
    """Where shards lie: a file system of fsspec's, or None for this machine's directories."""

    filesystem: Any = None
    cache: RowGroupCache | None = None


class _Worker(ArrowReaderWorker):  # type: ignore[misc] # petastorm is untyped
    """Reads a row group and hands on its place among all, with an Arrow table or an error."""

    publish_func: Any
    source: Source
    stopped: threading.Event

    @staticmethod
    def new_results_queue_reader() -> _ResultReader:
        return _ResultReader()

    def process(self, piece_index: int | None, *ignored: Any, **also_ignored: Any) -> None:
        if piece_index is None:
            return  # woken to see that the reader has stopped
        piece = self._split_pieces[piece_index]
        columns = list(self._schema.fields)
        result: pa.Table | Exception

        def read() -> pa.Table:
            return retried(lambda: self._read(piece, columns), piece.path, stopped=self.stopped)

        try:
            cache = self.source.cache
            result = (
                read() if cache is None else cache.get(piece.path, piece.row_group, columns, read)
            )
        except UserError as error:
            result = error
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            result = UserError(
                f"{piece.path}: row group {piece.row_group} cannot be read ({reason}); "
                "run hvdrec prepare again"
            )
        except Exception as error:
            result = error
        # An exception would be printed by Petastorm, and raised before its turn.
        self.publish_func((piece_index, result))

    def _read(self, piece: Any, columns: list[str]) -> pa.Table:
        if self.source.filesystem is None:
            with pq.ParquetFile(piece.path) as file:
                return file.read_row_group(piece.row_group, columns=columns, use_threads=False)
        with (
            open_in(self.source.filesystem, piece.path) as opened,
            pq.ParquetFile(opened, pre_buffer=True) as file,
        ):
            return file.read_row_group(piece.row_group, columns=columns, use_threads=False)


class _Ventilator(ConcurrentVentilator):  # type: ignore[misc] # petastorm is untyped
    """Gives workers the next row group whenever one was delivered in order, without a thread."""

    def start(self) -> None:
        for _ in range(self._max_ventilation_queue_size):
            self.give_next()

    def give_next(self) -> None:
        if not self.completed():
            self._ventilate_fn(**self._items_to_ventilate[self._current_item_to_ventilate])
            self._current_item_to_ventilate += 1
            if self._current_item_to_ventilate == len(self._items_to_ventilate):
                self._iterations_remaining = 0


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
        )

    def stop(self) -> None:
        super().stop()
        for _ in range(self._workers_pool.workers_count):
            self._workers_pool.ventilate(None)


def find_shards(directory: Place) -> dict[str, Place]:
    """Return the shards of a directory in canonical order, by their path in its file system."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; run hvdrec prepare")
    files = parquet_files(directory)
    if not files:
        raise UserError(f"{directory}: holds no shards; run hvdrec prepare")
    return {str(f.resolve()) if isinstance(f, Path) else f.path: f for f in files}


def list_row_groups(
    files: Mapping[str, Place], columns: Sequence[str]
) -> tuple[list[RowGroup], list[int]]:
    """Return (file, index) and rows of each row group of the shards, in their order."""
    groups: list[RowGroup] = []
    rows: list[int] = []
    for path, file in files.items():
        try:
            metadata = read_metadata(file)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{file}: no readable Parquet ({reason}); run hvdrec prepare again"
            ) from None
        found = metadata.schema.to_arrow_schema().names
        for column in columns:
            if column not in found:
                raise UserError(
                    f"{file}: column '{column}' is missing; the shard has {choices(found)}; "
                    "run hvdrec prepare again"
                )
        for index in range(metadata.num_row_groups):
            groups.append((path, index))
            rows.append(metadata.row_group(index).num_rows)
    return groups, rows


def read_row_groups(
    planned: Sequence[RowGroup],
    columns: Sequence[str],
    workers: int,
    stopped: threading.Event,
    source: Source | None = None,
) -> Generator[pa.Table, None, None]:
    """Yield the planned row groups' tables, in order, read ahead by Petastorm's worker threads.

    planned: (path in the source's file system, index of the row group), none of them without rows.
    The reader is stopped when the generator is closed or `stopped` is set. A source that does not
    answer is asked again, see `storage`. Raises UserError for a row group that cannot be read.
    """
    ahead = workers + 2
    source = source or Source()
    files = list(dict.fromkeys(file for file, _ in planned))
    # Petastorm makes the workers itself, and gives them only what is its own.
    worker = type("_Worker", (_Worker,), {"source": source, "stopped": stopped})

    # The paths do not go through a URL, which would end at a '#' or '?' in them.
    filesystem, _ = get_filesystem_and_path_or_paths("file:///")
    if source.filesystem is not None:
        filesystem = _StoreFiles(source.filesystem)

    def open_reader() -> _PlannedReader:
        return _PlannedReader(
            planned,
            ahead,
            filesystem,
            files,
            schema_fields=[f"^{column}$" for column in columns],
            worker_class=worker,
            # No more than `ahead` are given out, so no worker needs to wait before it puts one.
            reader_pool=ThreadPool(workers, results_queue_size=0),
            shuffle_row_groups=False,
            num_epochs=1,
            is_batched_reader=True,
        )

    reader = retried(open_reader, f"{files[0]} and others", stopped=stopped)
    with reader:
        # Workers finish in any order: hold what came early until its turn.
        early: dict[int, list[pa.Table | Exception]] = {}
        for index in reader.indices:
            while not early.get(index):
                if stopped.is_set():
                    return
                came, result = next(reader)
                early.setdefault(came, []).append(result)
            result = early[index].pop()
            reader.ventilator.give_next()
            if isinstance(result, Exception):
                raise result
            yield result
