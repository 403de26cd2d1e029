"""Fit on a cluster: vocabularies and statistics are aggregations of Spark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvdrec.config.schema import Column, Schema
from hvdrec.errors import invalid_value
from hvdrec.features.kinds.training_split import (
    MAGNITUDE_SQL,
    MISSING_SQL,
    SortedNumbers,
    TrainingSplit,
    below,
    pick,
    time_unit,
)
from hvdrec.parallel.spark import spark_errors

if TYPE_CHECKING:
    import duckdb
    from pyspark.sql import DataFrame, SparkSession

FINITE_SQL = "NOT isnan(v) AND abs(v) < CAST('Infinity' AS DOUBLE)"


class SparkSplit(TrainingSplit):
    """Queries over the Parquet files of a directory that all executors see.

    Vocabularies and quantiles are the same as with `DuckDBSplit`; means and deviations may differ
    by rounding.
    """

    def __init__(self, session: SparkSession, folder: Path, time: str = "") -> None:
        """Open the directory; `time` names the column of times, if any."""
        # Spark expands wildcards in a path.
        escaped = re.sub(r"([\\*?\[\]{}])", r"\\\1", str(folder.absolute()))
        reader = session.read.option("pathGlobFilter", "*.parquet")
        self._rows = reader.parquet(f"file://{escaped}")
        self._time = time

    def occurrences(self, column: Column, after: float | None = None) -> pa.Table:
        """Count the values of a raw column, the most frequent first."""
        from pyspark.sql import functions as f

        counted = "count(*)" if after is None else f"count_if(day > {after!r}D)"
        values = self._values(column).groupBy(f.col("v").alias("value"))
        counts = values.agg(f.expr(counted).alias("count"), f.max("day").alias("day"))
        return counts.orderBy(f.col("count").desc(), "value").toArrow()

    @cached_property
    def newest_day(self) -> float | None:
        """Day of the newest row, in days since 1970; None if the samples have no times."""
        [row] = self._rows.selectExpr(f"max({self._day}) AS day").collect()
        return None if row.day is None else float(row.day)

    def moments(self, column: Column, transform: str) -> tuple[float | None, float | None]:
        """Return mean and population standard deviation, up to rounding."""
        value = MAGNITUDE_SQL if transform == "log" else "v"
        query = f"avg({value}) AS m", f"stddev_pop({value}) AS d"
        [row] = self._numbers(column).selectExpr(*query).collect()
        return row.m, row.d

    @contextmanager
    def sorted_numbers(self, column: Column) -> Iterator[SortedNumbers]:
        """Sort the distinct numbers; executors keep them, on disk if they are many."""
        counted = self._numbers(column).groupBy("v").count().selectExpr("v", "count AS n")
        # orderBy would make 200 parts by default, and starting a Python task for each takes time.
        parts = self._rows.sparkSession.sparkContext.defaultParallelism
        table = counted.repartitionByRange(parts, "v").sortWithinPartitions("v").persist()
        try:
            yield _SortedFrame(table)
        finally:
            table.unpersist()

    def values(self, column: Column) -> duckdb.DuckDBPyRelation:
        """Raise UserError: a feature kind that needs a relation of DuckDB cannot run on Spark."""
        problem = f"the kind of feature '{column.name}' fits on a relation of DuckDB"
        raise invalid_value("engine", "spark", problem, "use engine 'duckdb'")

    def _values(self, column: Column) -> DataFrame:
        name = _quoted(column.name)
        value = f"explode({name})" if column.is_list else name
        values = self._rows.selectExpr(f"{value} AS v", f"{self._day} AS day")
        return values.where(f"v IS NOT NULL AND NOT (v <=> {MISSING_SQL[column.dtype]})")

    @cached_property
    def _day(self) -> str:
        """SQL expression of a row's day, as precise as DuckDB's."""
        types = dict(self._rows.dtypes)
        if self._time not in types:
            return "CAST(NULL AS DOUBLE)"
        name, kind = _quoted(self._time), types[self._time]
        if kind == "date":
            return f"CAST(unix_date({name}) AS DOUBLE)"
        if kind.startswith("timestamp"):
            epoch = f"{kind.upper()} '1970-01-01 00:00:00{'Z' if kind == 'timestamp' else ''}'"
            return f"timestampdiff(MICROSECOND, {epoch}, {name}) / 1e6D / 86400D"
        [row] = self._rows.selectExpr(f"max(abs(CAST({name} AS DOUBLE))) AS largest").collect()
        return f"CAST({name} AS DOUBLE) / {time_unit(row.largest) * 86400!r}D"

    def _numbers(self, column: Column) -> DataFrame:
        return self._values(column).selectExpr("CAST(v AS DOUBLE) AS v").where(FINITE_SQL)


class _SortedFrame(SortedNumbers):
    """A sorted table of distinct numbers ``v`` and their counts ``n``, in parts of Spark."""

    def __init__(self, table: DataFrame) -> None:
        self._table = table
        parts = table.mapInArrow(_count_part, "part long, n long").toArrow()
        parts = parts.group_by("part").aggregate([("n", "sum")]).sort_by("part")
        counts = parts["n_sum"].to_pylist()
        starts = np.cumsum([0, *counts]).tolist()
        self._starts = dict(zip(parts["part"].to_pylist(), starts, strict=False))
        self.count = int(starts[-1])

    def at(self, positions: Sequence[int]) -> NDArray[np.float64]:
        """Return the numbers at positions; each part looks up the positions that it holds."""
        wanted, starts = np.array(positions, np.int64), self._starts

        def find(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            start = starts.get(_part(), 0)
            for batch in batches:
                values, counts = _columns(batch)
                inside, numbers = pick(wanted, start, values, counts)
                start += int(counts.sum())
                places = np.flatnonzero(inside)
                yield pa.RecordBatch.from_pydict({"place": places, "v": numbers})

        rows = self._table.mapInArrow(find, "place long, v double").toArrow()
        found = np.empty(len(wanted))
        found[rows["place"].to_numpy()] = rows["v"].to_numpy()
        return found

    def largest_below(self, limits: NDArray[Any]) -> NDArray[Any]:
        """Return the largest number below each limit, or -infinity."""

        def find(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                largest = below(limits, _columns(batch)[0]).astype(np.float64)
                places = np.arange(len(largest))
                yield pa.RecordBatch.from_pydict({"place": places, "v": largest})

        rows = self._table.mapInArrow(find, "place long, v double").toArrow()
        found = np.full_like(limits, -np.inf)
        np.maximum.at(found, rows["place"].to_numpy(), rows["v"].to_numpy().astype(limits.dtype))
        return found


@contextmanager
def open_spark_split(
    session: SparkSession, samples: Path, schema: Schema
) -> Iterator[TrainingSplit]:
    """Open the training split of a samples artifact.

    Args:
        session: The session of Spark.
        samples: Directory of the artifact, which all executors see under this path.
        schema: The features.

    Raises:
        UserError: A job of Spark failed in the ``with`` body.
    """
    with spark_errors():
        yield SparkSplit(session, samples / "train", schema.own_name("time"))


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _count_part(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Return the count of numbers in each batch of this part."""
    for batch in batches:
        total = int(_columns(batch)[1].sum())
        yield pa.RecordBatch.from_pydict({"part": [_part()], "n": [total]})


def _part() -> int:
    from pyspark import TaskContext

    context = TaskContext.get()
    assert context is not None  # the functions that call this run inside tasks
    return context.partitionId()


def _columns(batch: pa.RecordBatch) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    return batch.column("v").to_numpy(), batch.column("n").to_numpy()
