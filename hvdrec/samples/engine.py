"""DuckDB in process: it reads raw tables, evaluates a user's SQL and runs Ibis expressions."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa
from ibis.expr.types import Table

from hvdrec.errors import UserError, choices
from hvdrec.samples.columns import compact, concatenated

SUFFIXES = (".parquet", ".csv", ".csv.gz")
BATCH_ROWS = 262_144


@contextmanager
def connect() -> Iterator[Engine]:
    """Open an engine in memory, which spills to a temporary directory and thinks in UTC."""
    with tempfile.TemporaryDirectory(prefix="hvdrec-") as spill, duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET preserve_insertion_order = false")
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(f"SET temp_directory = {_literal(spill)}")
        yield Engine(connection)


@dataclass
class Engine:
    """What making samples needs of an engine; all that is DuckDB's own stands here.

    Ibis compiles the expressions and the connection runs them, so that no version of Ibis has to
    know this version of DuckDB's Python interface. Tables are Ibis expressions over named views.
    """

    connection: duckdb.DuckDBPyConnection
    _made: int = 0
    _files: list[tuple[Path, str]] = field(default_factory=list)
    _expressions: list[tuple[str, str, str]] = field(default_factory=list)

    def read(self, file: Path, text: Collection[str] = ()) -> Table:
        """Return a CSV or Parquet file, or all files of a glob, as a table.

        text: columns of a CSV file that are wanted as they are written ("007"), unless they are
        floating-point numbers. Raises UserError if there is no such file or if it is not what its
        suffix says.
        """
        name = str(file)
        if not name.endswith(SUFFIXES):
            raise UserError(f"{file}: must end in one of {choices(SUFFIXES)}; convert the table")
        if file.is_dir():
            raise UserError(f"{file}: is a directory; name its files, as in '{name}/*.parquet'")
        paths = [name] if file.is_file() else sorted(glob.glob(name, recursive=True))
        if not paths:
            raise UserError(f"{file}: no such file; check paths.raw and the table's name")
        listed = ", ".join(_literal(path) for path in paths)
        try:
            if name.endswith(".parquet"):
                view = self._view(f"SELECT * FROM read_parquet([{listed}], union_by_name = true)")
            else:
                source = f"SELECT * FROM read_csv([{listed}], union_by_name = true"
                view = self._view(f"{source})")
                found = self.connection.table(view)
                kinds = {
                    column: "'VARCHAR'"
                    for column, kind in zip(found.columns, found.types, strict=True)
                    if column in text and str(kind) != "DOUBLE"
                }
                if kinds:
                    types = ", ".join(f"{_literal(c)}: {kind}" for c, kind in kinds.items())
                    view = self._view(f"{source}, types = {{{types}}})")
            self._files.append((file, view))
            return self._table(view)
        except duckdb.Error as error:
            raise _unreadable(file, error) from None

    def derive(self, table: Table, column: str, expression: str, key: str) -> Table:
        """Add (or replace) a column given as a user's SQL over the table's other columns.

        Raises UserError, naming the configuration's key, if the expression is wrong.
        """
        view = self._view(_sql(table))
        others = f"* EXCLUDE ({_quoted(column)})" if column in table.columns else "*"
        try:
            # The line break ends a comment that the expression may end in.
            derived = self._view(
                f"SELECT {others}, ({expression}\n) AS {_quoted(column)} FROM {view}"
            )
            result = self._table(derived)
        except duckdb.Error as error:
            raise UserError(
                f"{key} = '{expression}': {_first_line(error)}; the columns are "
                f"{choices(visible(table))}"
            ) from None
        self._expressions.append((key, expression, view))
        return result

    def binds(self, table: Table, expression: str) -> bool:
        """Return whether all columns that an SQL expression names are there."""
        try:
            view = self._view(_sql(table))
            _ = self.connection.sql(f"SELECT ({expression}\n) FROM {view} LIMIT 0").columns
        except duckdb.Error:
            return False
        return True

    def cached(self, table: Table) -> Table:
        """Return a table computed once and kept."""
        name = self._name()
        try:
            self.connection.execute(f"CREATE TEMP TABLE {name} AS {_sql(table)}")
        except duckdb.Error as error:
            raise self._blamed(error) from None
        return self._table(name)

    def register(self, rows: pa.Table) -> Table:
        """Return rows in memory as a table."""
        name = self._name()
        self.connection.register(name, rows)
        return self._table(name)

    def collect(self, table: Table) -> dict[str, pa.Array]:
        """Return a table's columns, compact (see `columns.compact`); rows come in any order.

        Raises UserError that names the file or the expression which fails on some row.
        """
        parts: dict[str, list[pa.Array]] = {column: [] for column in table.columns}
        try:
            reader = self.connection.sql(_sql(table)).to_arrow_reader(BATCH_ROWS)
            for batch in reader:
                for column, array in zip(batch.schema.names, batch.columns, strict=True):
                    parts[column].append(compact(array))
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise self._blamed(error) from None
        return {
            column: concatenated(arrays, reader.schema.field(column).type)
            for column, arrays in parts.items()
        }

    def first(self, table: Table) -> dict[str, object] | None:
        """Return a table's first row, or None if it has none."""
        rows = self.collect(table.limit(1))
        values = {column: array.to_pylist() for column, array in rows.items()}
        return {c: v[0] for c, v in values.items()} if all(values.values()) else None

    def _name(self) -> str:
        self._made += 1
        return f"hvdrec_{self._made}"

    def _view(self, query: str) -> str:
        name = self._name()
        self.connection.execute(f"CREATE TEMP VIEW {name} AS {query}")
        return name

    def _table(self, name: str) -> Table:
        schema = self.connection.sql(f"SELECT * FROM {name} LIMIT 0").to_arrow_table().schema
        kinds = {field.name: _ibis_type(field.type) for field in schema}
        return ibis.table(ibis.schema(kinds), name=name)

    def _blamed(self, error: Exception) -> UserError:
        """Return the error of a query as one that names the file or the expression at fault."""
        for file, view in self._files:
            if found := self._failure(f"SELECT hash(v) AS h FROM {view} AS v"):
                return _unreadable(file, found)
        for key, expression, view in self._expressions:
            if found := self._failure(f"SELECT hash({expression}\n) AS h FROM {view}"):
                return UserError(
                    f"{key} = '{expression}': {_first_line(found)}; mend the expression or the "
                    "data (TRY_CAST gives null where CAST fails)"
                )
        return UserError(f"samples: {_first_line(error)}")

    def _failure(self, query: str) -> Exception | None:
        try:
            self.connection.sql(f"SELECT count(*) FROM ({query}) WHERE h = 0").fetchall()
        except duckdb.Error as error:
            return error
        return None


def visible(table: Table) -> list[str]:
    """Return a table's columns without those of our own, which begin with two underscores."""
    return [column for column in table.columns if not column.startswith("__")]


def _ibis_type(kind: pa.DataType) -> ibis.DataType:
    # Ibis cannot read this one type from Arrow, though it has it.
    if kind == pa.month_day_nano_interval():
        return ibis.dtype("interval('us')")
    return ibis.schema(pa.schema([("kind", kind)]))["kind"]


def _sql(table: Table) -> str:
    return str(ibis.to_sql(table, dialect="duckdb", pretty=False))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _unreadable(file: Path, error: Exception) -> UserError:
    kind = "Parquet" if file.name.endswith(".parquet") else "CSV"
    return UserError(f"{file}: no readable {kind} ({_first_line(error)}); write the table again")


def _first_line(error: Exception) -> str:
    """Return an engine's message without its pointers into the query."""
    return str(error).strip().splitlines()[0].rstrip(".")
