"""Make samples with Spark: executors read, join and label the rows, DuckDB sorts and stores them.

Spark runs the Ibis expressions: joins, counts and the label join. The SQL of a configuration is in
DuckDB's dialect, so executors run it in DuckDB, a stream of rows at a time. Labelled rows come back
as Parquet files, and DuckDB does the rest in this process. So both engines give the same rows.

Each table of Spark has a twin in DuckDB: a table or view of the same name without rows. It has the
types that the DuckDB engine gives, and it checks expressions before a job starts.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import ibis
import pyarrow as pa
from ibis.expr import operations as ops
from ibis.expr.types import Table

from hvdrec.config.data_sections import TableFormat
from hvdrec.config.schema import RawType
from hvdrec.errors import UserError, invalid_value
from hvdrec.parallel.spark import spark_errors, spark_session
from hvdrec.samples.columns import compact
from hvdrec.samples.engine import FAILED_ROW, NOTHING, NULL_BY_ZERO, SEMANTICS, Engine, connect, sql
from hvdrec.samples.petastorm_values import is_petastorm
from hvdrec.samples.raw_files import RawFiles
from hvdrec.samples.sql import literal, quoted
from hvdrec.storage.urls import Location

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

PORTABLE = {
    "UTINYINT": "SMALLINT",
    "USMALLINT": "INTEGER",
    "UINTEGER": "BIGINT",
    "UBIGINT": "DECIMAL(20,0)",
    "HUGEINT": "DECIMAL(38,0)",
    "UHUGEINT": "DECIMAL(38,0)",
    "TIMESTAMP_S": "TIMESTAMP",
    "TIMESTAMP_MS": "TIMESTAMP",
    "TIMESTAMP_NS": "TIMESTAMP",
    '"NULL"': "INTEGER",
    **dict.fromkeys(("TIME", "TIME WITH TIME ZONE", "INTERVAL", "UUID"), "VARCHAR"),
}
"""Type of DuckDB -> the type with which Spark handles its values."""
NOT_IN_SPARK = re.compile(
    r"TIMESTAMP_NS|\bTIME\b|INTERVAL|UUID|\[\d+\]|ENUM|STRUCT|MAP|UNION|(FLOAT|DOUBLE)\["
)
"""Types of Parquet columns that this process converts before Spark reads them."""
LOCAL_PARTITIONS_PER_CORE = 2
"""Partitions of a shuffle on one machine, where Spark's default of 200 makes short jobs slow."""
INPUT = "hvdrec_input"


@contextmanager
def connect_spark(
    formats: Sequence[TableFormat], memory_gb: float, folder: Path
) -> Iterator[SparkEngine]:
    """Open an engine on the active Spark session, or on a new one.

    Args:
        formats: How to read raw tables that are not described by their suffix.
        memory_gb: Memory of this process (10^9 bytes).
        folder: Existing directory that all executors see, for temporary files.

    Raises:
        UserError: PySpark or Java is missing.
    """
    with (
        spark_session("hvdrec samples") as session,
        connect(formats, memory_gb, folder) as engine,
        _settings(session),
    ):
        spark = SparkEngine(engine.connection, engine.folder, formats, session=session)
        try:
            yield spark
        finally:
            for name in spark.published:
                session.catalog.dropTempView(name)


@contextmanager
def _settings(session: SparkSession) -> Iterator[None]:
    """Let Spark compute in UTC, write timestamps as DuckDB does, and use few partitions locally."""
    settings = {
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    }
    context, shuffle = session.sparkContext, "spark.sql.shuffle.partitions"
    if (context.master or "").startswith("local") and not context.getConf().contains(shuffle):
        settings[shuffle] = str(LOCAL_PARTITIONS_PER_CORE * context.defaultParallelism)
    before = {name: str(session.conf.get(name)) for name in settings}
    for name, value in settings.items():
        session.conf.set(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            session.conf.set(name, value)


@dataclass(frozen=True)
class _Chain:
    """SQL in DuckDB that turns the rows of one table into those of a view.

    Attributes:
        base: The table of Spark.
        views: The names of the views, each over the one before it or over `base`, and their SQL.
    """

    base: str
    views: tuple[tuple[str, str], ...]


@dataclass
class SparkEngine(Engine):
    """An engine whose tables are views of Spark; tables that it stores are those of DuckDB.

    Attributes:
        session: The session of Spark.
        published: Names of the temporary views in it.
    """

    session: Any = None
    published: list[str] = field(default_factory=list)
    _chains: dict[str, _Chain] = field(default_factory=dict)
    _views: list[tuple[str, str]] = field(default_factory=list)
    _derived: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Connect Ibis with the session."""
        session: SparkSession = self.session
        self._backend = ibis.pyspark.connect(session)

    def read(self, raw: Location, name: str, declared: Mapping[str, RawType] = NOTHING) -> Table:
        """Open a raw table as `Engine.read`.

        Executors read local Parquet files. This process converts all other tables to such files.
        """
        view = super().read(raw, name, declared).get_name()
        files, _ = self._files[-1]
        types = self._types(view)
        if not _is_plain(files, types):
            return self._from_duckdb(f"SELECT * FROM {view}")
        table = self._twin(f"SELECT * FROM {view}")
        with spark_errors():
            frame = self.session.read.schema(self._spark_schema(table)).parquet(*files.paths)
            self._publish(table, _without_nan(frame))
        return self._table(table)

    def derive(self, table: Table, column: str, expression: str, key: str) -> Table:
        """Add a column as `Engine.derive`; executors evaluate the expression in DuckDB.

        Raises:
            UserError: The expression is invalid, or needs other rows than its own.
        """
        if _has_window(expression):
            problem = "is a window over several rows, which executors see only in parts"
            remedy = "compute the column in the raw table, or use engine 'duckdb'"
            raise invalid_value(key, expression, problem, remedy)
        start = len(self._views)
        result = super().derive(table, column, expression, key).get_name()
        views = tuple(self._views[start:])
        source = _row_wise_source(table)
        if source in self._chains:
            before = self._chains[source]
            chain = _Chain(before.base, (*before.views, *views))
        elif source is not None:
            chain = _Chain(source, views)
        else:
            (base, _), *rest = views
            self._publish(base, self._frame(table))
            chain = _Chain(base, tuple(rest))
        self._derived.append((key, expression, result))
        return self._streamed(result, chain)

    def materialize(self, table: Table) -> Table:
        """Compute a table, keep the result in the executors and return it as a table."""
        twin = self._twin(sql(table))
        with self._expressions_named():
            self._publish(twin, self._frame(table).localCheckpoint())
        return self._table(twin)

    def view(self, query: str) -> Table:
        """Compute an SQL query in DuckDB and return its result as a table of Spark."""
        return self._from_duckdb(query)

    def keep(self, table: Table, by: Sequence[str] = ()) -> Table:
        """Compute a table in Spark, and store it in DuckDB, sorted by some columns."""
        path = self.folder / self._name()
        with self._expressions_named():
            self._frame(table).write.parquet(str(path))
        types = self._types(f"({sql(table)})")
        order = " ORDER BY " + ", ".join(quoted(c) for c in by) if by else ""
        files = f"read_parquet({literal(f'{path}/*.parquet')})"
        stored = self.store(f"SELECT {_cast(types)} FROM {files}{order}")
        shutil.rmtree(path)
        return stored

    def example(self, table: Table, column: str, bad: str, by: Sequence[str]) -> Any:
        """Return the first value of a column among the rows that meet an SQL condition."""
        return super().example(self.keep(table), column, bad, by)

    def collect(self, table: Table) -> dict[str, pa.Array]:
        """Compute a table; return its columns, compact, with rows in any order."""
        with self._expressions_named():
            found = self._frame(table).toArrow()
        schema = (
            self.connection.sql(f"SELECT * FROM ({sql(table)}) LIMIT 0").to_arrow_table().schema
        )
        columns = zip(found.column_names, found.cast(schema).columns, strict=True)
        return {name: compact(column.combine_chunks()) for name, column in columns}

    def save(self, table: Table, file: Path) -> None:
        """Compute a table and write it to a Parquet file."""
        super().save(self.keep(table), file)

    @contextmanager
    def _expressions_named(self) -> Iterator[None]:
        """Turn errors of Spark into a UserError; name the expression that fails, if one does."""
        from pyspark.errors import PySparkException

        try:
            with spark_errors():
                yield
        except UserError as error:
            for key, expression, view in self._derived:
                try:
                    self.session.table(view).count()
                except PySparkException as failure:
                    if found := re.search(r"(\w+ Error: .*)", str(failure)):
                        raise invalid_value(key, expression, found[1], FAILED_ROW) from None
            raise error

    def _view(self, query: str) -> str:
        name = super()._view(query)
        self._views.append((name, query))
        return name

    def _frame(self, table: Table) -> DataFrame:
        frame: DataFrame = self.session.sql(self._backend.compile(table))
        return frame

    def _publish(self, name: str, frame: DataFrame) -> None:
        frame.createOrReplaceTempView(name)
        self.published.append(name)

    def _twin(self, query: str) -> str:
        """Store the columns of a query, without rows, in DuckDB; return the name of the table."""
        name = self._name()
        self.connection.execute(f"CREATE TEMP TABLE {name} AS SELECT * FROM ({query}) LIMIT 0")
        return name

    def _types(self, source: str) -> dict[str, Any]:
        relation = self.connection.sql(f"SELECT * FROM {source} LIMIT 0")
        return dict(zip(relation.columns, relation.types, strict=True))

    def _spark_schema(self, source: str) -> Any:
        from pyspark.sql.pandas.types import from_arrow_schema

        query = f"SELECT {_cast(self._types(source), PORTABLE)} FROM {source} LIMIT 0"
        found = self.connection.sql(query).to_arrow_table().schema
        return from_arrow_schema(found, prefer_timestamp_ntz=True)

    def _from_duckdb(self, query: str) -> Table:
        """Compute an SQL query in DuckDB and open the result in Spark."""
        twin = self._twin(query)
        path = literal(str(self.folder / f"{twin}.parquet"))
        rows = f"SELECT {_cast(self._types(twin), PORTABLE)} FROM ({query})"
        self.connection.execute(f"COPY ({rows}) TO {path} (FORMAT parquet)")
        with spark_errors():
            reader = self.session.read.schema(self._spark_schema(twin))
            self._publish(twin, reader.parquet(str(self.folder / f"{twin}.parquet")))
        return self._table(twin)

    def _streamed(self, view: str, chain: _Chain) -> Table:
        """Let executors compute a view of DuckDB from rows of Spark; return it as a table."""
        from pyspark.sql.pandas.types import to_arrow_schema

        schema = self._spark_schema(view)
        first = (chain.base, f"SELECT {_cast(self._types(chain.base))} FROM {INPUT}")
        query = f"SELECT {_cast(self._types(view), PORTABLE)} FROM {view}"
        work = _run_in_duckdb((first, *chain.views), query, to_arrow_schema(schema))
        with spark_errors():
            self._publish(view, self.session.table(chain.base).mapInArrow(work, schema))
        self._chains[view] = chain
        return self._table(view)


def _run_in_duckdb(
    views: Sequence[tuple[str, str]], query: str, schema: pa.Schema
) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Return a function that runs SQL over a stream of rows, called `INPUT`, in an executor."""
    settings, optional = (*SEMANTICS, "SET threads = 1"), NULL_BY_ZERO

    # Spark sends a nested function by value, so executors need not import this module.
    def work(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from contextlib import suppress
        from itertools import chain

        import duckdb
        import pyarrow as pa

        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            return
        rows = pa.RecordBatchReader.from_batches(first.schema, chain([first], batches))
        with duckdb.connect() as connection:
            for setting in settings:
                connection.execute(setting)
            with suppress(duckdb.Error):
                connection.execute(optional)
            connection.register("hvdrec_input", rows)
            for name, text in views:
                connection.execute(f"CREATE TEMP VIEW {name} AS {text}")
            for batch in connection.sql(query).to_arrow_reader(10_000):
                yield from pa.Table.from_batches([batch]).cast(schema).to_batches()

    return work


def _is_plain(files: RawFiles, types: Mapping[str, Any]) -> bool:
    """Return True if executors can read the files of a raw table as they are."""
    return (
        files.format == "parquet"
        and isinstance(files.file, Path)
        and not (files.partitions or files.options.rename)
        and not any(map(is_petastorm, (files.file, files.file.parent)))
        and not any(NOT_IN_SPARK.search(str(dtype)) for dtype in types.values())
    )


def _without_nan(frame: DataFrame) -> DataFrame:
    from pyspark.sql import functions as f

    floats = [name for name, dtype in frame.dtypes if dtype in ("float", "double")]
    values = {name: f.col(f"`{name.replace('`', '``')}`") for name in floats}
    return frame.withColumns({n: f.when(~f.isnan(v), v) for n, v in values.items()})


def _row_wise_source(table: Table) -> str | None:
    """Return the name of the only table of an expression that works on each row by itself."""
    node = table.op()
    if node.find((ops.Reduction, ops.WindowFunction, ops.Analytic, ops.Subquery)):
        return None
    while isinstance(node, ops.Project | ops.Filter | ops.DropColumns):
        node = node.parent
    return str(node.name) if isinstance(node, ops.UnboundTable) else None


def _has_window(expression: str) -> bool:
    return any(
        kind == duckdb.token_type.keyword and re.match(r"over\b", expression[start:], re.IGNORECASE)
        for start, kind in duckdb.tokenize(expression)
    )


def _cast(types: Mapping[str, Any], names: Mapping[str, str] | None = None) -> str:
    """Return SQL that casts columns to their types, or to those that `names` gives instead."""
    columns = []
    for column, dtype in types.items():
        text = str(dtype)
        if names and dtype.id == "enum":
            text = "VARCHAR"
        elif names:
            text = re.sub(
                r'"NULL"|[A-Z_]+( WITH TIME ZONE)?', lambda m: names.get(m[0], m[0]), text
            )
            text = re.sub(r"\[\d+\]", "[]", text)
        name = quoted(column)
        columns.append(name if text == '"NULL"' else f"CAST({name} AS {text}) AS {name}")
    return ", ".join(columns)
