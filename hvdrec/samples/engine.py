"""The in-process DuckDB engine: reads raw tables, evaluates user SQL and runs Ibis expressions."""

from __future__ import annotations

import glob
import itertools
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa
from ibis.expr.types import Table

from hvdrec.errors import UserError, choices, invalid_file, invalid_value
from hvdrec.samples.columns import compact, concatenate, first_line

SUFFIXES = (".parquet", ".csv", ".csv.gz")
BATCH_ROWS = 262_144
REWRITE = "write the table again"


@contextmanager
def connect() -> Iterator[Engine]:
    """Open an in-memory engine that spills to a temporary directory and uses UTC."""
    with tempfile.TemporaryDirectory(prefix="hvdrec-") as spill, duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET preserve_insertion_order = false")
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(f"SET temp_directory = {_literal(spill)}")
        yield Engine(connection)


@dataclass
class Engine:
    """Everything that is specific to DuckDB. Tables are Ibis expressions over named views.

    Ibis only compiles expressions to SQL and the connection runs them, so the versions of Ibis and
    of DuckDB's Python interface are independent.
    """

    connection: duckdb.DuckDBPyConnection
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _files: list[tuple[Path, str]] = field(default_factory=list)
    _expressions: list[tuple[str, str, str]] = field(default_factory=list)

    def read(self, file: Path, text: Collection[str] = ()) -> Table:
        """Open a Parquet or CSV file, or all files that a glob matches.

        In a CSV file, the columns `text` stay as written ("007") unless they parse as floats.

        Raises:
            UserError: There is no such file, or it is not in the format of its suffix.
        """
        name = str(file)
        if not name.endswith(SUFFIXES):
            raise invalid_file(file, f"must end in one of {choices(SUFFIXES)}", "convert the table")
        if file.is_dir():
            raise invalid_file(file, "is a directory", f"name its files, as in '{name}/*.parquet'")
        paths = [name] if file.is_file() else sorted(glob.glob(name, recursive=True))
        if not paths:
            raise invalid_file(file, "no such file", "check paths.raw and the table's name")
        listed = ", ".join(_literal(path) for path in paths)
        try:
            if name.endswith(".parquet"):
                view = self._view(f"SELECT * FROM read_parquet([{listed}], union_by_name = true)")
            else:
                view = self._view_csv(f"[{listed}], union_by_name = true", text)
            self._files.append((file, view))
            return self._table(view)
        except duckdb.Error as error:
            raise _unreadable(file, error) from None

    def _view_csv(self, arguments: str, text: Collection[str]) -> str:
        view = self._view(f"SELECT * FROM read_csv({arguments})")
        table = self.connection.table(view)
        kept = [
            column
            for column, dtype in zip(table.columns, table.types, strict=True)
            if column in text and str(dtype) != "DOUBLE"
        ]
        if not kept:
            return view
        types = ", ".join(f"{_literal(column)}: 'VARCHAR'" for column in kept)
        return self._view(f"SELECT * FROM read_csv({arguments}, types = {{{types}}})")

    def derive(self, table: Table, column: str, expression: str, key: str) -> Table:
        """Add or replace a column by user SQL over the other columns of the table.

        Raises:
            UserError: The expression, given under this configuration key, is invalid.
        """
        view = self._view(_sql(table))
        others = f"* EXCLUDE ({_quoted(column)})" if column in table.columns else "*"
        try:
            # The line break ends a comment at the end of the expression.
            derived = self._view(
                f"SELECT {others}, ({expression}\n) AS {_quoted(column)} FROM {view}"
            )
            result = self._table(derived)
        except duckdb.Error as error:
            columns = f"the columns are {choices(visible(table))}"
            raise invalid_value(key, expression, first_line(error), columns) from None
        self._expressions.append((key, expression, view))
        return result

    def binds(self, table: Table, expression: str) -> bool:
        """True if the table has all columns that an SQL expression names."""
        try:
            view = self._view(_sql(table))
            _ = self.connection.sql(f"SELECT ({expression}\n) FROM {view} LIMIT 0").columns
        except duckdb.Error:
            return False
        return True

    def materialize(self, table: Table) -> Table:
        """Compute a table once and return the stored result."""
        name = self._name()
        try:
            self.connection.execute(f"CREATE TEMP TABLE {name} AS {_sql(table)}")
        except duckdb.Error as error:
            raise self._explain(error) from None
        return self._table(name)

    def register(self, rows: pa.Table) -> Table:
        """Make rows in memory available as a table."""
        name = self._name()
        self.connection.register(name, rows)
        return self._table(name)

    def collect(self, table: Table) -> dict[str, pa.Array]:
        """Compute a table and return its compact columns, rows in any order.

        Raises:
            UserError: A file or a user's expression fails on some row.
        """
        parts: dict[str, list[pa.Array]] = {column: [] for column in table.columns}
        try:
            reader = self.connection.sql(_sql(table)).to_arrow_reader(BATCH_ROWS)
            for batch in reader:
                for column, array in zip(batch.schema.names, batch.columns, strict=True):
                    parts[column].append(compact(array))
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise self._explain(error) from None
        return {
            column: concatenate(arrays, reader.schema.field(column).type)
            for column, arrays in parts.items()
        }

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
        """Find the file or expression that made a query fail, and build the error that names it."""
        for file, view in self._files:
            if failure := self._failure(f"SELECT hash(v) AS h FROM {view} AS v"):
                return _unreadable(file, failure)
        for key, expression, view in self._expressions:
            if failure := self._failure(f"SELECT hash({expression}\n) AS h FROM {view}"):
                remedy = "correct the expression or the data (TRY_CAST gives null where CAST fails)"
                return invalid_value(key, expression, first_line(failure), remedy)
        return UserError(f"samples: {first_line(error)}", field="samples")

    def _failure(self, query: str) -> Exception | None:
        """Return the error of a query, if it fails. Filtering by a hash reads every value."""
        try:
            self.connection.sql(f"SELECT count(*) FROM ({query}) WHERE h = 0").fetchall()
        except duckdb.Error as error:
            return error
        return None


def visible(table: Table) -> list[str]:
    """List the columns of a table without internal ones, which start with two underscores."""
    return [column for column in table.columns if not column.startswith("__")]


def _ibis_type(dtype: pa.DataType) -> ibis.DataType:
    # Ibis cannot convert this one Arrow type, although it has a type for it.
    if dtype == pa.month_day_nano_interval():
        return ibis.dtype("interval('us')")
    return ibis.schema(pa.schema([("column", dtype)]))["column"]


def _sql(table: Table) -> str:
    return str(ibis.to_sql(table, dialect="duckdb", pretty=False))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _unreadable(file: Path, error: Exception) -> UserError:
    form = "Parquet" if file.name.endswith(".parquet") else "CSV"
    return invalid_file(file, f"not a readable {form} file ({first_line(error)})", REWRITE)
