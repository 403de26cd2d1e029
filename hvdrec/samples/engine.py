"""Run queries in DuckDB, inside this process: raw tables, a user's SQL and Ibis expressions."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import duckdb
import ibis
import pyarrow as pa
from ibis.expr.types import Table

from hvdrec.config.data_sections import TableFormat
from hvdrec.config.names import PREFIX
from hvdrec.config.schema import RawType
from hvdrec.errors import UserError, choices, invalid_value
from hvdrec.samples.columns import compact, concatenate, reason
from hvdrec.samples.raw_columns import names_differ_in_case
from hvdrec.samples.raw_files import RawFiles, find_files
from hvdrec.samples.raw_tables import Reader, unreadable
from hvdrec.samples.sql import literal, quoted, without_nan
from hvdrec.storage.urls import Location

BATCH_ROWS = 262_144
INTERNAL = f"{PREFIX}join_"
"""Prefix of the names of internal columns."""
DUCKDB_SHARE = 0.6
"""Share of the memory that DuckDB may use. Batches of rows in Python need the rest."""
GB_PER_THREAD = 0.3
SEMANTICS = (
    "SET TimeZone = 'UTC'",
    # Statistics in Parquet files ignore NaN. If DuckDB used them, it would assume that
    # isnan(column) is always false.
    "SET disabled_optimizers = 'statistics_propagation'",
    # Let x / 0 be NULL: NaN and infinity would count as greater than any number.
    "SET ieee_floating_point_ops = false",
)
"""Settings on which the results of expressions depend."""
NULL_BY_ZERO = "SET error_on_division_by_zero = false"
FAILED_ROW = "correct the expression or the data (TRY_CAST gives null where CAST fails)"
"""The remedy for an expression that fails on a row."""
NOTHING: Mapping[str, RawType] = MappingProxyType({})


@contextmanager
def connect(
    formats: Sequence[TableFormat] = (), memory_gb: float = 2.0, folder: Path | None = None
) -> Iterator[Engine]:
    """Open an engine. Data that exceeds the memory moves to files; times are in UTC.

    Args:
        formats: How to read raw tables whose suffix does not tell their format.
        memory_gb: Memory of the whole process (10^9 bytes). DuckDB gets `DUCKDB_SHARE` of it.
        folder: Existing directory for temporary files; None for one in the system's directory.
    """
    with (
        tempfile.TemporaryDirectory(prefix="hvdrec-", dir=folder) as spill,
        duckdb.connect() as connection,
    ):
        # Each thread of a sort needs memory of its own.
        limit = DUCKDB_SHARE * memory_gb
        threads = max(1, min(len(os.sched_getaffinity(0)), int(limit / GB_PER_THREAD)))
        connection.execute(f"SET memory_limit = '{limit * 1000:.0f}MB'")
        connection.execute(f"SET threads = {threads}")
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET preserve_insertion_order = false")
        for setting in SEMANTICS:
            connection.execute(setting)
        with suppress(duckdb.Error):  # older versions have no such setting
            connection.execute(NULL_BY_ZERO)
        connection.execute(f"SET temp_directory = {literal(spill)}")
        yield Engine(connection, Path(spill), formats)


@dataclass
class Engine:
    """Runs queries in DuckDB.

    A table is an Ibis expression over a named view. Ibis only compiles expressions to SQL, which
    the DuckDB connection runs. So the versions of Ibis and DuckDB need not match.
    """

    connection: duckdb.DuckDBPyConnection
    folder: Path
    formats: Sequence[TableFormat] = ()
    warnings: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _files: list[tuple[RawFiles, str]] = field(default_factory=list)
    _expressions: list[tuple[str, str, str]] = field(default_factory=list)

    def read(self, raw: Location, name: str, declared: Mapping[str, RawType] = NOTHING) -> Table:
        """Open a raw table. NaN becomes NULL; the type of a CSV column follows from all its values.

        Args:
            raw: Directory or URL of the raw tables.
            name: Path of a file, a directory or a glob, relative to `raw`; or a URL.
            declared: Column -> its type, for the columns of features and keys.

        Raises:
            UserError: There is no such file, it does not have the format of its suffix, or its
                columns are ambiguous.
        """
        options = next((each for each in self.formats if each.path == name), None)
        files = find_files(raw, name, options)
        reader = Reader(self.connection, self._name, self.warnings.append)
        view = reader.open(files, declared)
        self._files.append((files, view))
        return self._table(view)

    def derive(self, table: Table, column: str, expression: str, key: str) -> Table:
        """Add a column, or replace it, by an SQL expression over the columns of a table.

        Args:
            table: The table.
            column: Name of the new column.
            expression: SQL from the configuration.
            key: Configuration key of the expression, for error messages.

        Raises:
            UserError: The expression is invalid.
        """
        for present in table.columns:
            if present.lower() == column.lower() and present != column:
                raise names_differ_in_case(key, present, column)
        view = self._view(sql(table))
        others = f"* EXCLUDE ({quoted(column)})" if column in table.columns else "*"
        try:
            # If the expression ends with an SQL comment, the line break ends this comment.
            query = f"SELECT {others}, ({expression}\n) AS {quoted(column)} FROM {view}"
            derived = self._view(query)
            dtype = self.connection.table(derived).types[-1]
            value = without_nan(quoted(column), dtype)
            if value != quoted(column):
                query = f"SELECT * REPLACE ({value} AS {quoted(column)}) FROM {derived}"
                derived = self._view(query)
            result = self._table(derived)
        except duckdb.Error as error:
            columns = f"the columns are {choices(visible(table))}"
            raise invalid_value(key, expression, reason(error), columns) from None
        self._expressions.append((key, expression, view))
        return result

    def binds(self, table: Table, expression: str) -> bool:
        """Return True if the table has all columns that an SQL expression uses."""
        try:
            view = self._view(sql(table))
            _ = self.connection.sql(f"SELECT ({expression}\n) FROM {view} LIMIT 0").columns
        except duckdb.Error:
            return False
        return True

    def keep(self, table: Table, by: Sequence[str] = ()) -> Table:
        """Compute a table, store its rows in DuckDB, sorted by some columns, and return it.

        DuckDB numbers the rows of the stored table from 0, in this order, as ``rowid``.
        """
        order = " ORDER BY " + ", ".join(quoted(c) for c in by) if by else ""
        return self.store(sql(table) + order)

    def example(self, table: Table, column: str, bad: str, by: Sequence[str]) -> Any:
        """Return the first value of a column among the rows that meet an SQL condition.

        Args:
            table: The table.
            column: The column.
            bad: The condition; at least one row meets it.
            by: Columns that order the rows.
        """
        order = ", ".join(quoted(c) for c in by)
        query = f"SELECT {quoted(column)} AS v FROM ({sql(table)}) WHERE {bad} "
        return self.one(f"{query} ORDER BY {order} LIMIT 1")["v"]

    def materialize(self, table: Table) -> Table:
        """Compute a table, store the result and return it as a table."""
        return self.store(sql(table))

    def store(self, query: str) -> Table:
        """Run an SQL query, store the result and return it as a table."""
        name = self._name()
        try:
            self.connection.execute(f"CREATE TEMP TABLE {name} AS {query}")
        except duckdb.Error as error:
            raise self._explain(error) from None
        return self._table(name)

    def register(self, rows: pa.Table) -> Table:
        """Return a table of rows that are in memory."""
        name = self._name()
        self.connection.register(name, rows)
        return self._table(name)

    def collect(self, table: Table) -> dict[str, pa.Array]:
        """Compute a table; return its columns, compact (see `columns`), with rows in any order.

        Raises:
            UserError: A file cannot be read, or an expression of the configuration fails on a row.
        """
        parts: dict[str, list[pa.Array]] = {column: [] for column in table.columns}
        try:
            reader = self.connection.sql(sql(table)).to_arrow_reader(BATCH_ROWS)
            for batch in reader:
                for column, array in zip(batch.schema.names, batch.columns, strict=True):
                    parts[column].append(compact(array))
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise self._explain(error) from None
        return {
            column: concatenate(arrays, reader.schema.field(column).type)
            for column, arrays in parts.items()
        }

    def view(self, query: str) -> Table:
        """Return the result of an SQL query as a table, without computing it."""
        return self._table(self._view(query))

    def stream(self, query: str, rows: int = BATCH_ROWS) -> Generator[pa.RecordBatch, None, None]:
        """Run an SQL query; yield its rows in order, in batches of at most `rows` rows.

        Run no other query on this connection until all batches are read.

        Raises:
            UserError: A file cannot be read, or an expression of the configuration fails on a row.
        """
        # Without this, threads return rows of a stored table in any order.
        self.connection.execute("SET preserve_insertion_order = true")
        try:
            for batch in self.connection.sql(query).to_arrow_reader(rows):
                if len(batch):
                    yield batch
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise self._explain(error) from None
        finally:
            self.connection.execute("SET preserve_insertion_order = false")

    def save(self, table: Table, file: Path) -> None:
        """Compute a table and write it to a Parquet file, without holding all rows in memory.

        Raises:
            UserError: A file cannot be read, or an expression of the configuration fails on a row.
        """
        options = "FORMAT parquet, COMPRESSION zstd"
        try:
            self.connection.execute(f"COPY ({sql(table)}) TO {literal(str(file))} ({options})")
        except duckdb.Error as error:
            raise self._explain(error) from None

    def fetch(self, query: str) -> pa.Table:
        """Run an SQL query with a small result and return its rows.

        Raises:
            UserError: A file cannot be read, or an expression of the configuration fails on a row.
        """
        try:
            return self.connection.sql(query).to_arrow_table()
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise self._explain(error) from None

    def one(self, query: str) -> dict[str, Any]:
        """Run an SQL query that returns one row, and return this row."""
        [row] = self.fetch(query).to_pylist()
        return dict(row)

    def first(self, table: Table) -> dict[str, object] | None:
        """Return the first row of a table, or None if it is empty."""
        columns = self.collect(table.limit(1))
        rows: list[dict[str, object]] = pa.table(columns).to_pylist()
        return rows[0] if rows else None

    def _name(self) -> str:
        return f"hvdrec_{next(self._numbers)}"

    def _view(self, query: str) -> str:
        name = self._name()
        self.connection.execute(f"CREATE TEMP VIEW {name} AS {query}")
        return name

    def _table(self, name: str) -> Table:
        schema = self.connection.sql(f"SELECT * FROM {name} LIMIT 0").to_arrow_table().schema
        return ibis.table(
            ibis.schema({field.name: _ibis_type(field.type) for field in schema}), name=name
        )

    def _explain(self, error: Exception) -> UserError:
        """Find the file or expression that made a query fail; build an error that names it."""
        for files, view in self._files:
            if failure := self._failure(f"SELECT hash(v) AS h FROM {view} AS v"):
                return unreadable(files, failure)
        for key, expression, view in self._expressions:
            if failure := self._failure(f"SELECT hash({expression}\n) AS h FROM {view}"):
                return invalid_value(key, expression, reason(failure), FAILED_ROW)
        return UserError(f"samples: {reason(error)}", field="samples")

    def _failure(self, query: str) -> Exception | None:
        """Return the error of a query, or None. The filter on a hash makes it read all values."""
        try:
            self.connection.sql(f"SELECT count(*) FROM ({query}) WHERE h = 0").fetchall()
        except duckdb.Error as error:
            return error
        return None


def visible(table: Table) -> list[str]:
    """List the columns of a table, except internal ones (see `INTERNAL`)."""
    return [column for column in table.columns if not column.startswith(INTERNAL)]


def _ibis_type(dtype: pa.DataType) -> ibis.DataType:
    # Ibis has a corresponding type for this Arrow type, but does not convert it.
    if dtype == pa.month_day_nano_interval():
        return ibis.dtype("interval('us')")
    return ibis.schema(pa.schema([("column", dtype)]))["column"]


def sql(table: Table) -> str:
    """Return the query of a table in DuckDB's SQL."""
    return str(ibis.to_sql(table, dialect="duckdb", pretty=False))
