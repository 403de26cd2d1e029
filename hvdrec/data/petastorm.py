"""Read row groups of Parquet files with Petastorm in a given order.

Petastorm itself chooses the order of row groups, converts lists to Python objects row by row, and
opens a file twice for each row group. The subclasses here deliver Arrow tables in the given order
and limit how many row groups are read ahead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
import warnings
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diskcache  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.filesystem as legacy
from petastorm.arrow_reader_worker import ArrowReaderWorker
from petastorm.fs_utils import get_filesystem_and_path_or_paths
from petastorm.local_disk_cache import LocalDiskCache
from petastorm.reader import Reader
from petastorm.workers_pool import EmptyResultError, thread_pool
from petastorm.workers_pool.thread_pool import ThreadPool
from petastorm.workers_pool.ventilator import ConcurrentVentilator

from hvdrec.errors import UserError, choices, invalid_file, invalid_value
from hvdrec.storage.parquet import Checksums, ParquetSource, parquet_files, read_checksums
from hvdrec.storage.urls import Location, retried

# Petastorm calls functions that its pinned pyarrow deprecates; neither side can be changed here.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm\.")

# By default, Petastorm's idle threads poll 1,000 times a second on the cores that train; they
# interrupted a step of 40 ms 100 times. Here they are woken when there is a row group to read, so
# they can sleep longer (in seconds).
thread_pool.IO_TIMEOUT_INTERVAL_S = 0.1

log = logging.getLogger(__name__)
RowGroup = tuple[str, int]
"""Path of a shard in its file system, and index of a row group in it."""
REMEDY = "run hvdrec prepare with --overwrite"


class RowGroupCache:
    """Petastorm's cache of row groups on a local disk, shared by the ranks of a host.

    Row groups are stored as a CRC-32 and an Arrow stream, so that reading them
    unpickles nothing. A damaged one is read from its shard again.
    """

    def __init__(self, directory: Path, size_bytes: int, versions: Mapping[str, str]) -> None:
        """Create or open the cache; if it exceeds `size_bytes`, it evicts the oldest row groups.

        `versions` maps the path of each shard to a text that changes when its content changes.

        Raises:
            UserError: The directory cannot be used.
        """
        self._versions = versions
        self._directory, self._has_warned = directory, False
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            cache = LocalDiskCache(str(directory), size_bytes, expected_row_size_bytes=0)
            self._cache = cache._cache  # Petastorm's own interface stores nothing but new values
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
        """Report a failure of the cache instead of raising it: the shards have all row groups."""
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
    """The file system that holds shards, and the local cache for their row groups.

    Attributes:
        filesystem: An fsspec file system; None for the local one.
        sources: The shards by their paths, whose row groups are verified; others are not.
        cache: The cache; None if row groups are not cached.
    """

    filesystem: Any = None
    sources: Mapping[str, ParquetSource] = field(default_factory=dict)
    cache: RowGroupCache | None = None


def open_shards(directory: Location) -> dict[str, ParquetSource]:
    """Return the shards in a directory, ordered by name: path in its file system -> source.

    Raises:
        UserError: There are no shards, or one is not a Parquet file or damaged.
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
    """List the row groups of all shards in order, and the number of rows of each.

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
    ahead = workers + 2
    store = store or ShardStore()
    files = list(dict.fromkeys(file for file, _ in planned))
    # Petastorm creates the workers with its own arguments only, so ours are class attributes.
    worker = type("_Worker", (_Worker,), {"store": store, "stopped": stopped})

    # A URL would end at a '#' or '?' in a path, so paths are passed as they are.
    filesystem, _ = get_filesystem_and_path_or_paths("file:///")
    if store.filesystem is not None:
        filesystem = _LegacyFileSystem(store.filesystem)

    def open_reader() -> _PlannedReader:
        return _PlannedReader(
            planned,
            ahead,
            filesystem,
            files,
            schema_fields=[f"^{column}$" for column in columns],
            worker_class=worker,
            # The queue is not bounded, because at most `ahead` row groups are read ahead anyway.
            reader_pool=ThreadPool(workers, results_queue_size=0),
            shuffle_row_groups=False,
            num_epochs=1,
            is_batched_reader=True,
        )

    with retried(open_reader, f"{files[0]} and others", stopped=stopped) as reader:
        # Workers finish in any order, so results that come early wait here for their turn.
        early: dict[int, list[pa.Table | Exception]] = {}
        for index in reader.indices:
            while not early.get(index):
                if stopped.is_set():
                    return
                finished, result = next(reader)
                early.setdefault(finished, []).append(result)
            result = early[index].pop()
            reader.ventilator.ventilate_next()
            if isinstance(result, Exception):
                raise result
            yield result


class _LegacyFileSystem(legacy.FileSystem):  # type: ignore[misc] # pyarrow is untyped
    """An fsspec file system with the part of pyarrow's legacy interface that Petastorm uses.

    It raises an error if the store does not answer; fsspec's own `isfile` would return False.
    """

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def isfile(self, path: str) -> bool:
        return bool(self._filesystem.info(path)["type"] == "file")

    def isdir(self, path: str) -> bool:
        return not self.isfile(path)

    def open(self, path: str, mode: str = "rb") -> Any:
        return self._filesystem.open(path, mode, cache_type="none")


class _ResultReader:
    """Passes on the results of workers, (index of the row group, Arrow table or error)."""

    batched_output = True

    def read_next(self, pool: Any, schema: Any, ngram: Any) -> Any:
        try:
            return pool.get_results()
        except EmptyResultError:
            raise StopIteration from None


class _Worker(ArrowReaderWorker):  # type: ignore[misc] # petastorm is untyped
    """Reads a row group and delivers its index with an Arrow table or an error."""

    publish_func: Any
    store: ShardStore
    stopped: threading.Event

    @staticmethod
    def new_results_queue_reader() -> _ResultReader:
        return _ResultReader()

    def process(self, piece_index: int | None, *_: Any, **__: Any) -> None:
        if piece_index is None:
            return  # the thread was only woken to notice that the reader has stopped
        piece = self._split_pieces[piece_index]
        columns = list(self._schema.fields)
        result: pa.Table | Exception

        def read() -> pa.Table:
            return retried(lambda: self._read(piece, columns), piece.path, stopped=self.stopped)

        # Petastorm would print a raised exception and deliver it before earlier results.
        try:
            cache = self.store.cache
            result = cache.get(piece.path, piece.row_group, columns, read) if cache else read()
        except UserError as error:
            result = error
        except (OSError, pa.ArrowException) as error:
            problem = f"row group {piece.row_group} cannot be read ({_one_line(error)})"
            result = invalid_file(piece.path, problem, REMEDY)
        except Exception as error:
            result = error
        self.publish_func((piece_index, result))

    def _read(self, piece: Any, columns: list[str]) -> pa.Table:
        source = self.store.sources.get(piece.path)
        if source is None:
            source = ParquetSource.open(Path(piece.path), None)
        with source.opened() as file:
            return file.read_row_group(piece.row_group, columns=columns, use_threads=False)


class _Ventilator(ConcurrentVentilator):  # type: ignore[misc] # petastorm is untyped
    """Gives a worker the next row group when one has been delivered; needs no thread of its own."""

    def start(self) -> None:
        for _ in range(self._max_ventilation_queue_size):
            self.ventilate_next()

    def ventilate_next(self) -> None:
        if not self.completed():
            self._ventilate_fn(**self._items_to_ventilate[self._current_item_to_ventilate])
            self._current_item_to_ventilate += 1
            if self._current_item_to_ventilate == len(self._items_to_ventilate):
                self._iterations_remaining = 0


class _PlannedReader(Reader):  # type: ignore[misc] # petastorm is untyped
    """Reads the row groups of a list in order, at most `ahead` of them before they are needed."""

    def __init__(self, planned: Sequence[RowGroup], ahead: int, *args: Any, **kwargs: Any) -> None:
        self._planned, self._ahead = planned, ahead
        self.indices: list[int] = []
        super().__init__(*args, **kwargs)

    def _filter_row_groups(
        self, dataset: Any, row_groups: Sequence[Any], *_: Any
    ) -> tuple[list[int], None]:
        index = {(piece.path, piece.row_group): i for i, piece in enumerate(row_groups)}
        self.indices = [index[group] for group in self._planned]
        return self.indices, None

    def _create_ventilator(self, row_group_indexes: Sequence[int], *_: Any) -> _Ventilator:
        return _Ventilator(
            self._workers_pool.ventilate,
            [{"piece_index": index} for index in row_group_indexes],
            max_ventilation_queue_size=self._ahead,
        )

    def stop(self) -> None:
        super().stop()
        for _ in range(self._workers_pool.workers_count):
            self._workers_pool.ventilate(None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
