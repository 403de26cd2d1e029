"""DuckDB in process: reading raw tables and evaluating a user's SQL, with errors that name the key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb

from hvdrec.errors import UserError, choices

SUFFIXES = (".parquet", ".csv", ".csv.gz")


@contextlib.contextmanager
def connect() -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database in memory that keeps rows in the order of their files."""
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET preserve_insertion_order = true")
        yield connection


def quoted(name: str) -> str:
    """Return an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def read_table(connection: duckdb.DuckDBPyConnection, file: Path, view: str) -> list[str]:
    """Make a view over a CSV or Parquet file (or a glob of them) and return its columns.

    Raises UserError if there is no such file or if it is not what its suffix says.
    """
    name = str(file)
    if not name.endswith(SUFFIXES):
        raise UserError(f"{file}: must end in one of {choices(SUFFIXES)}; convert the table")
    if not any(file.parent.glob(file.name)) and not any(Path().glob(name.lstrip("/"))):
        raise UserError(f"{file}: no such file; check paths.raw and the table's name")
    reader = "read_parquet" if name.endswith(".parquet") else "read_csv"
    path = name.replace("'", "''")
    try:
        connection.execute(f"CREATE VIEW {quoted(view)} AS SELECT * FROM {reader}('{path}')")
        return columns(connection, view)
    except duckdb.Error as error:
        kind = "Parquet" if reader == "read_parquet" else "CSV"
        raise UserError(
            f"{file}: no readable {kind} ({first_line(error)}); write it again"
        ) from None


def columns(connection: duckdb.DuckDBPyConnection, relation: str) -> list[str]:
    """Return the columns of a table or view."""
    return list(connection.table(relation).columns)


def column_type(connection: duckdb.DuckDBPyConnection, relation: str, column: str) -> str:
    """Return the SQL type of a column."""
    found = connection.table(relation)
    return str(found.types[list(found.columns).index(column)])


def require(file: Path, found: Sequence[str], column: str, key: str) -> None:
    """Raise UserError if a table lacks a column that a configuration key names."""
    if column not in found:
        raise UserError(
            f"{file}: column '{column}' ({key}) is missing; the table has {choices(found)}"
        )


def binds(connection: duckdb.DuckDBPyConnection, relation: str, expression: str) -> bool:
    """Return whether an SQL expression makes sense over a relation's columns."""
    try:
        connection.sql(f"SELECT ({expression}) FROM {quoted(relation)} LIMIT 0")
    except duckdb.BinderException:
        return False
    except duckdb.Error:
        return False
    return True


def check_expression(
    connection: duckdb.DuckDBPyConnection, relation: str, expression: str, key: str
) -> None:
    """Raise UserError, naming the configuration key, if an SQL expression is wrong."""
    try:
        connection.sql(f"SELECT ({expression}) FROM {quoted(relation)} LIMIT 0")
    except duckdb.Error as error:
        raise UserError(
            f"{key} = '{expression}': {first_line(error)}; columns are "
            f"{choices(columns(connection, relation))}"
        ) from None


def first_line(error: Exception) -> str:
    """Return an engine's message without its pointers into the query."""
    return str(error).strip().splitlines()[0]
