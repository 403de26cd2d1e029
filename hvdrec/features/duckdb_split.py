"""Fit in this process: DuckDB streams the files and spills to disk."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvdrec.config.schema import Column, Schema
from hvdrec.features.kinds.training_split import (
    MAGNITUDE_SQL,
    MISSING_SQL,
    SortedNumbers,
    TrainingSplit,
    below,
    pick,
    time_unit,
)

if TYPE_CHECKING:
    import duckdb

MEMORY_MB, MEMORY_PER_THREAD_MB = 1000, 125
"""Memory that DuckDB may use (10^6 bytes), and the least memory that it needs for each thread."""
BATCH_ROWS = 1 << 17
SORTED = "sorted_numbers"


class DuckDBSplit(TrainingSplit):
    """Queries over Parquet files. Memory has a limit; beyond it, DuckDB writes to disk."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, pattern: str, time: str = "") -> None:
        """Open the Parquet files that match a pattern; `time` names the column of times, if any."""
        self._connection = connection
        self._rows = connection.read_parquet(pattern)
        self._time = time

    def values(self, column: Column) -> duckdb.DuckDBPyRelation:
        """Return the values of a raw column, without missing ones, and their days."""
        name = _quoted(column.name)
        value = f"unnest({name})" if column.is_list else name
        values = self._rows.project(f"{value} AS v, {self._day} AS day")
        return values.filter(f"v IS NOT NULL AND v IS DISTINCT FROM {MISSING_SQL[column.dtype]}")

    def occurrences(self, column: Column, after: float | None = None) -> pa.Table:
        """Count the values of a raw column, the most frequent first."""
        counted = "count(*)" if after is None else f"count(*) FILTER (day > {after!r})"
        values = self.values(column).aggregate(f"v, {counted} AS n, max(day) AS day", "v")
        ordered = values.order("n DESC, v").project("v AS value, n AS count, day")
        return ordered.to_arrow_table()

    @cached_property
    def newest_day(self) -> float | None:
        """Day of the newest row, in days since 1970; None if the samples have no times."""
        [(newest,)] = self._rows.aggregate(f"max({self._day})").fetchall()
        return None if newest is None else float(newest)

    def moments(self, column: Column, transform: str) -> tuple[float | None, float | None]:
        """Return mean and population standard deviation; one thread reads the rows in order."""
        value = MAGNITUDE_SQL if transform == "log" else "v"
        query = f"avg({value}) AS m, stddev_pop({value}) AS d"
        # Sums of floats depend on their order.
        self._connection.execute("SET threads = 1")
        try:
            [(mean, deviation)] = self._numbers(column).aggregate(query).fetchall()
        finally:
            self._connection.execute("RESET threads")
        return mean, deviation

    @contextmanager
    def sorted_numbers(self, column: Column) -> Iterator[SortedNumbers]:
        """Sort the distinct numbers in a table, which DuckDB keeps on disk if it is large."""
        self._numbers(column).aggregate("v, count(*) AS n", "v").order("v").create(SORTED)
        try:
            yield _SortedTable(self._connection)
        finally:
            self._connection.execute(f"DROP TABLE {SORTED}")

    @cached_property
    def _day(self) -> str:
        """SQL expression of a row's day."""
        types = dict(zip(self._rows.columns, map(str, self._rows.types), strict=True))
        if self._time not in types:
            return "CAST(NULL AS DOUBLE)"
        name = _quoted(self._time)
        if types[self._time].startswith(("TIMESTAMP", "DATE")):
            return f"epoch({name}) / 86400"
        [(largest,)] = self._rows.aggregate(f"max(abs(CAST({name} AS DOUBLE)))").fetchall()
        return f"CAST({name} AS DOUBLE) / {time_unit(largest) * 86400!r}"

    def _numbers(self, column: Column) -> duckdb.DuckDBPyRelation:
        return self.values(column).project("CAST(v AS DOUBLE) AS v").filter("isfinite(v)")


class _SortedTable(SortedNumbers):
    """The numbers in the table `SORTED`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        [(count,)] = connection.sql(f"SELECT sum(n) FROM {SORTED}").fetchall()
        self.count = int(count or 0)

    def at(self, positions: Sequence[int]) -> NDArray[np.float64]:
        """Return the numbers at positions."""
        wanted, start = np.array(positions, np.int64), 0
        found = np.empty(len(wanted))
        for values, counts in self._batches():
            inside, numbers = pick(wanted, start, values, counts)
            # Adding 0.0 turns -0.0 into 0.0: DuckDB counts both as one value and keeps either.
            found[inside] = numbers + 0.0
            start += int(counts.sum())
        return found

    def largest_below(self, limits: NDArray[Any]) -> NDArray[Any]:
        """Return the largest number below each limit, or -infinity."""
        largest = np.full_like(limits, -np.inf)
        for values, _ in self._batches():
            largest = np.maximum(largest, below(limits, values))
        return largest

    def _batches(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        rows = self._connection.sql(f"SELECT v, n FROM {SORTED} ORDER BY rowid")
        for batch in rows.to_arrow_reader(BATCH_ROWS):
            yield batch.column("v").to_numpy(), batch.column("n").to_numpy()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@contextmanager
def open_duckdb_split(
    samples: Path, schema: Schema, scratch: Path | None = None
) -> Iterator[TrainingSplit]:
    """Open the training split of a samples artifact.

    Args:
        samples: Directory of the artifact.
        schema: The features.
        scratch: Directory for data that does not fit into memory; by default, the system's
            directory for temporary files.
    """
    import duckdb  # slow to import, so not at the top, where every rank would import it

    threads = len(os.sched_getaffinity(0))
    memory = max(MEMORY_MB, MEMORY_PER_THREAD_MB * threads)
    # Escape the path, since it may contain wildcards.
    pattern = glob.escape(str(samples / "train")) + "/*.parquet"
    with (
        tempfile.TemporaryDirectory(prefix="spill-", dir=scratch) as spill,
        duckdb.connect() as connection,
    ):
        connection.execute("SET enable_progress_bar = false")
        connection.execute(f"SET memory_limit = '{memory}MB'")
        connection.execute("SET temp_directory = $1", [spill])
        yield DuckDBSplit(connection, pattern, schema.own_name("time"))
