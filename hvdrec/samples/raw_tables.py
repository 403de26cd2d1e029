"""Open raw tables in DuckDB. Parquet files become views; text files are read, then given types."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from hvdrec.config.schema import RawType
from hvdrec.errors import UserError, invalid_file, shown
from hvdrec.samples.columns import reason
from hvdrec.samples.petastorm_values import decode_arrays, is_petastorm
from hvdrec.samples.raw_columns import ENCODING_REMEDY, check_parquet
from hvdrec.samples.raw_files import RawFiles
from hvdrec.samples.raw_sources import (
    FILE,
    OPTIONS,
    open_delta,
    open_iceberg,
    read_csv,
    read_json,
    renamed,
    sql_paths,
)
from hvdrec.samples.sql import quoted, without_nan
from hvdrec.samples.text_types import EXACT, converted, find_types

REWRITE = "write the table again"


@dataclass(frozen=True)
class Reader:
    """Opens raw tables.

    Attributes:
        connection: The DuckDB connection in which views and tables are created.
        new_name: Function that returns an unused name.
        warn: Called with a line about something that looks wrong in a table.
    """

    connection: duckdb.DuckDBPyConnection
    new_name: Callable[[], str]
    warn: Callable[[str], None]

    def open(self, files: RawFiles, declared: Mapping[str, RawType]) -> str:
        """Create a view with the rows of all files and return its name.

        NaN becomes NULL, and names of directories such as ``day=2024-05-01`` become columns.

        Args:
            files: The files.
            declared: Column -> type, for the columns of features and keys in text files.

        Raises:
            UserError: A file cannot be read, or columns are ambiguous.
        """
        readers: Mapping[str, Callable[[], str]] = {
            "parquet": lambda: self._parquet(files),
            "csv": lambda: self._text(files, read_csv(files, self._scratch()), declared),
            "json": lambda: self._text(
                files, read_json(files, self._scratch(), self.connection), declared
            ),
            "delta": lambda: self._arrow(files, open_delta(files)),
            "iceberg": lambda: self._arrow(files, open_iceberg(files)),
        }
        self._register(files)
        try:
            rows = readers[files.format]()
            if files.partitions:
                rows = self._partitioned(rows, files, declared)
            return self._view(f"SELECT {self._values(rows)} FROM {rows}")
        except UserError:
            raise
        except (duckdb.Error, pa.ArrowException, OSError, ValueError) as error:
            raise unreadable(files, error) from None

    def _register(self, files: RawFiles) -> None:
        """Let DuckDB read the store of a remote table through fsspec."""
        if files.filesystem:
            protocol = files.filesystem.protocol
            name = protocol if isinstance(protocol, str) else protocol[0]
            if not self.connection.filesystem_is_registered(name):
                self.connection.register_filesystem(files.filesystem)

    def _parquet(self, files: RawFiles) -> str:
        for column, paths in check_parquet(files).items():
            self._require_exact(files.file, column, paths)
        query = f"SELECT * FROM {_parquet(files.paths)}"
        view = self._view(renamed(query, files, self.connection.sql(query).columns))
        if isinstance(files.file, Path) and any(map(is_petastorm, (files.file, files.file.parent))):
            return decode_arrays(self.connection, view, self.new_name)
        return view

    def _arrow(self, files: RawFiles, source: Any) -> str:
        """Store the rows of an Arrow data set or stream, a batch at a time."""
        name, stored = self.new_name(), self.new_name()
        self.connection.register(name, source)
        query = renamed(f"SELECT * FROM {name}", files, source.schema.names)
        self.connection.execute(f"CREATE TEMP TABLE {stored} AS {query}")
        self.connection.unregister(name)
        return stored

    def _scratch(self) -> str:
        """Return the directory in which DuckDB stores temporary data."""
        [(directory,)] = self.connection.sql("SELECT current_setting('temp_directory')").fetchall()
        return str(directory) if directory and Path(directory).is_dir() else ""

    def _require_exact(self, file: object, column: str, paths: Sequence[str]) -> None:
        """Raise UserError if a file has integers that a float cannot hold exactly.

        All values of the column become floats, because other files have floats in it.
        """
        values = f"unnest([min({quoted(column)}), max({quoted(column)})])"
        query = f"SELECT {values} AS value FROM {_parquet(paths)}"
        query = f"SELECT value FROM ({query}) WHERE abs(CAST(value AS HUGEINT)) >= {EXACT}"
        if rows := self.connection.sql(query).fetchall():
            raise _inexact(file, column, rows[0][0], "floats in other files")

    def _text(
        self, files: RawFiles, source: AbstractContextManager[str], declared: Mapping[str, RawType]
    ) -> str:
        """Store the rows of text files, find the types of the columns, and convert the rows.

        `source` yields the SQL that reads the files. When its context ends, it removes temporary
        copies.
        """
        text, typed = self.new_name(), self.new_name()
        with source as query:
            rows = renamed(query, files, self.connection.sql(query).columns)
            self.connection.execute(f"CREATE TEMP TABLE {text} AS {rows}")
        selected = self._typed(text, files.file, declared)
        self.connection.execute(f"CREATE TEMP TABLE {typed} AS SELECT {selected} FROM {text}")
        self.connection.execute(f"DROP TABLE {text}")
        return typed

    def _typed(self, text: str, file: object, declared: Mapping[str, RawType]) -> str:
        """Return the SQL that converts columns of text to the types that fit all their values."""
        table = self.connection.table(text)
        names = [
            name
            for name, dtype in zip(table.columns, table.types, strict=True)
            if dtype == "VARCHAR" and name != FILE
        ]
        found = find_types(self.connection, text, names, declared)
        for name, (integer, decimal) in found.mixed.items():
            raise _inexact(file, name, integer, f"decimals such as {decimal}")
        for name, value in found.odd.items():
            self.warn(f"{file}: column '{name}' is read as text: {shown(value)} is not a number")
        return ", ".join(
            converted(name, found.types[name]) if name in found.types else quoted(name)
            for name in table.columns
        )

    def _partitioned(self, rows: str, files: RawFiles, declared: Mapping[str, RawType]) -> str:
        """Add the columns from names of directories, except columns that the files contain, too."""
        present = {name.lower() for name in self.connection.table(rows).columns}
        added = {n: list(v) for n, v in files.partitions.items() if n.lower() not in present}
        text, parts = self.new_name(), self.new_name()
        table = pa.table(
            {FILE: list(files.paths), **{n: pa.array(v, pa.string()) for n, v in added.items()}}
        )
        self.connection.register(text, table)
        selected = self._typed(text, files.file, declared)
        self.connection.execute(f"CREATE TEMP TABLE {parts} AS SELECT {selected} FROM {text}")
        return self._view(f"SELECT * FROM {rows} JOIN {parts} USING ({FILE})")

    def _values(self, rows: str) -> str:
        """Return the SQL that selects all columns but FILE, with NULL in place of NaN."""
        table = self.connection.table(rows)
        return ", ".join(
            f"{without_nan(quoted(name), dtype)} AS {quoted(name)}"
            for name, dtype in zip(table.columns, table.types, strict=True)
            if name != FILE
        )

    def _view(self, query: str) -> str:
        name = self.new_name()
        self.connection.execute(f"CREATE TEMP VIEW {name} AS {query}")
        return name


def unreadable(files: RawFiles, error: Exception) -> UserError:
    """Build the error for files that DuckDB cannot read, with DuckDB's reason."""
    named = re.search(r"^\s*file = (.+)$", str(error), re.MULTILINE)
    path = named[1].strip() if named and "hvdrec-text-" not in named[1] else files.file
    if files.format == "parquet":
        return invalid_file(path, f"not a readable Parquet file ({reason(error)})", REWRITE)
    kind = {"csv": "CSV file", "json": "JSON lines file"}.get(files.format, "table")
    is_encoding = re.search("unicode|utf-8", str(error).split("Possible")[0], re.IGNORECASE)
    remedy = ENCODING_REMEDY if is_encoding else "correct the file"
    if files.format == "json":
        remedy += ": each line must be one JSON object"
    return invalid_file(path, f"not a readable {kind} ({reason(error)})", remedy)


def _parquet(paths: Sequence[str]) -> str:
    return f"read_parquet({sql_paths(paths)}, union_by_name = true, {OPTIONS})"


def _inexact(file: object, column: str, integer: object, others: str) -> UserError:
    problem = f"column '{column}' mixes integers such as {integer} with {others}"
    problem += "; floats do not hold all integers above 2**53"
    remedy = f"write '{column}' as integers or as text in all files"
    return invalid_file(file, problem, remedy)
