"""Read row groups of Parquet files with Petastorm in a given order.

Petastorm's own reader chooses the order of row groups itself and converts lists to Python objects
row by row. This module uses Petastorm's thread pool with workers of its own, which deliver Arrow
tables. The workers get the row groups in the wanted order and read only a few ahead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diskcache  # type: ignore[import-untyped]
import pyarrow as pa

import hvdrec.data.petastorm_compat  # noqa: F401 # adds what Petastorm imports

# isort: split
from petastorm.local_disk_cache import LocalDiskCache
from petastorm.workers_pool import thread_pool
from petastorm.workers_pool.thread_pool import ThreadPool
from petastorm.workers_pool.ventilator import ConcurrentVentilator
from petastorm.workers_pool.worker_base import WorkerBase

from hvdrec.errors import UserError, choices, invalid_file, invalid_value
from hvdrec.storage.parquet import Checksums, ParquetSource, parquet_files, read_checksums
from hvdrec.storage.urls import Location, retried

# By default, Petastorm's idle threads look for work 1,000 times a second, on the cores that train;
# together they interrupted a training step of 40 ms 100 times. A new row group wakes a thread at
# once, so the threads can wait longer between two looks (in seconds).
thread_pool.IO_TIMEOUT_INTERVAL_S = 0.1

log = logging.getLogger(__name__)
RowGroup = tuple[str, int]
"""Path of a shard in its file system, and index of a row group in the shard."""
REMEDY = "run hvdrec prepare with --overwrite"


class RowGroupCache:
    """Petastorm's cache of row groups on a local disk, shared by the ranks of a host.

    Each row group is stored as an Arrow stream with a CRC-32, not as a pickle. A damaged row group
    is read from its shard again.
    """

    def __init__(self, directory: Path, size_bytes: int, versions: Mapping[str, str]) -> None:
        """Create or open the cache, which evicts the oldest row groups if it exceeds `size_bytes`.

        `versions` maps the path of each shard to a text that changes when the shard's content
        changes.

        Raises:
            UserError: The directory cannot be used.
        """
        self._versions = versions
        self._directory, self._has_warned = directory, False
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            cache = LocalDiskCache(str(directory), size_bytes, expected_row_size_bytes=0)
            self._cache = cache._cache  # Petastorm's own interface cannot replace a stored value
        except (OSError, sqlite3.Error) as error:
            raise invalid_value(
                "loader.cache_dir",
                str(directory),
                f"cannot be used ({error})",
                "name a writable directory on a local disk",
            ) from None

    def get(
        self, file: str, group: int, columns: Sequence[str], read: Callable[[], pa.Table]
    ) -> pa.Table:
        """Return a row group from the cache; if it is missing, call `read` and store the result."""
        text = json.dumps(["crc", file, self._versions[file], group, sorted(columns)])
        key = hashlib.sha256(text.encode()).hexdigest()

        stored = self._stored(key)
        if stored is not None:
            with pa.ipc.open_stream(stored) as stream:
                return stream.read_all()
        table = read()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        data = sink.getvalue().to_pybytes()
        with self._warned():
            self._cache.set(key, zlib.crc32(data).to_bytes(4, "little") + data)
        return table

    def _stored(self, key: str) -> memoryview | None:
        """Return the stored Arrow stream; None if there is none, or if it is damaged."""
        stored = None
        with self._warned():
            stored = self._cache.get(key)
        if stored is None:
            return None
        data = memoryview(stored) if isinstance(stored, bytes) else memoryview(b"")
        if int.from_bytes(data[:4], "little") != zlib.crc32(data[4:]) or len(data) < 4:
            self._warn("a row group differs from its checksum")
            return None
        return data[4:]

    @contextmanager
    def _warned(self) -> Iterator[None]:
        """Warn instead of raising if the cache fails; the shards hold all row groups, too."""
        try:
            yield
        except (OSError, sqlite3.Error, ValueError, TypeError, diskcache.Timeout) as error:
            self._warn(_one_line(error))

    def _warn(self, problem: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning("%s: %s; shards are read instead", self._directory, problem)


@dataclass(frozen=True)
class ShardStore:
    """Shards, and the local cache for their row groups.

    Attributes:
        sources: Path of a shard -> the shard with its checksums. Files without an entry are read
            without verification.
        cache: The cache; None if row groups are not cached.
    """

    sources: Mapping[str, ParquetSource] = field(default_factory=dict)
    cache: RowGroupCache | None = None


def open_shards(directory: Location) -> dict[str, ParquetSource]:
    """Return the shards in a directory, sorted by name: path in the file system -> shard.

    Raises:
        UserError: There are no shards, or one is damaged or is not a Parquet file.
    """
    if not directory.is_dir():
        raise invalid_file(directory, "no such directory", "run hvdrec prepare")
    files = parquet_files(directory)
    if not files:
        raise invalid_file(directory, "contains no shards", "run hvdrec prepare")
    checksums = read_checksums(directory)
    return {
        str(file.resolve()) if isinstance(file, Path) else file.path: _open_shard(file, checksums)
        for file in files
    }


def _open_shard(file: Location, checksums: Checksums | None) -> ParquetSource:
    try:
        return ParquetSource.open(file, checksums)
    except (OSError, pa.ArrowException) as error:
        problem = f"not a readable Parquet file ({_one_line(error)})"
        raise invalid_file(file, problem, REMEDY) from None


def list_row_groups(
    sources: Mapping[str, ParquetSource], columns: Sequence[str]
) -> tuple[list[RowGroup], list[int]]:
    """List the row groups of all shards, in the order of `sources`, and the number of rows of each.

    Raises:
        UserError: A shard lacks one of the columns.
    """
    groups: list[RowGroup] = []
    rows: list[int] = []
    for path, source in sources.items():
        metadata = source.metadata
        names = metadata.schema.to_arrow_schema().names
        for column in columns:
            if column not in names:
                problem = f"column '{column}' is missing; the shard has {choices(names)}"
                raise invalid_file(source.file, problem, REMEDY)
        for index in range(metadata.num_row_groups):
            groups.append((path, index))
            rows.append(metadata.row_group(index).num_rows)
    return groups, rows


def read_row_groups(
    planned: Sequence[RowGroup],
    columns: Sequence[str],
    workers: int,
    stopped: threading.Event,
    store: ShardStore | None = None,
) -> Generator[pa.Table, None, None]:
    """Yield the table of each row group in `planned`, in this order; threads read ahead.

    The row groups must not be empty. The threads end when the generator is closed or `stopped` is
    set.

    Raises:
        UserError: A row group cannot be read.
    """
    job = _Job(planned, list(columns), store or ShardStore(), stopped)
    # The queue need not be bounded: at most `workers` + 2 row groups are handed out at a time.
    pool = ThreadPool(workers, results_queue_size=0)
    ventilator = _Ventilator(pool.ventilate, len(planned), ahead=workers + 2)
    pool.start(_Worker, job, ventilator)
    try:
        # Workers finish in any order, so results that come early wait here for their turn.
        early: dict[int, pa.Table | Exception] = {}
        for index in range(len(planned)):
            while index not in early:
                if stopped.is_set():
                    return
                finished, result = pool.get_results()
                early[finished] = result
            result = early.pop(index)
            ventilator.ventilate_next()
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        pool.stop()
        for _ in range(workers):
            pool.ventilate(None)  # wakes a worker, which notices that the pool has stopped
        pool.join()


@dataclass(frozen=True)
class _Job:
    """The data that all workers of a pool share. A worker receives indices into `planned`."""

    planned: Sequence[RowGroup]
    columns: list[str]
    store: ShardStore
    stopped: threading.Event


class _Worker(WorkerBase):  # type: ignore[misc] # petastorm is untyped
    """Reads row groups. Delivers for each its index in the plan and an Arrow table or an error."""

    args: _Job
    publish_func: Any

    def process(self, piece_index: int | None) -> None:
        if piece_index is None:
            return
        job = self.args
        file, group = job.planned[piece_index]
        result: pa.Table | Exception

        def read() -> pa.Table:
            return retried(lambda: self._read(file, group), file, stopped=job.stopped)

        # Petastorm would print a raised exception and deliver it before results of earlier row
        # groups.
        try:
            cache = job.store.cache
            result = cache.get(file, group, job.columns, read) if cache else read()
        except UserError as error:
            result = error
        except (OSError, pa.ArrowException) as error:
            problem = f"row group {group} cannot be read ({_one_line(error)})"
            result = invalid_file(file, problem, REMEDY)
        except Exception as error:
            result = error
        self.publish_func((piece_index, result))

    def _read(self, file: str, group: int) -> pa.Table:
        source = self.args.store.sources.get(file) or ParquetSource.open(Path(file), None)
        with source.opened() as parquet:
            return parquet.read_row_group(group, columns=self.args.columns, use_threads=False)


class _Ventilator(ConcurrentVentilator):  # type: ignore[misc] # petastorm is untyped
    """Hands out a further row group after each delivered one; needs no thread of its own."""

    def __init__(self, ventilate: Callable[..., None], count: int, ahead: int) -> None:
        items = [{"piece_index": index} for index in range(count)]
        super().__init__(ventilate, items, max_ventilation_queue_size=ahead)

    def start(self) -> None:
        for _ in range(self._max_ventilation_queue_size):
            self.ventilate_next()

    def ventilate_next(self) -> None:
        if not self.completed():
            self._ventilate_fn(**self._items_to_ventilate[self._current_item_to_ventilate])
            self._current_item_to_ventilate += 1
            if self._current_item_to_ventilate == len(self._items_to_ventilate):
                self._iterations_remaining = 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
