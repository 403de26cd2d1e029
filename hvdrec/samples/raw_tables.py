"""Open raw tables in DuckDB. Parquet files become views; CSV files are read as text, then typed."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa

from hvdrec.config.names import PREFIX
from hvdrec.config.schema import RawType
from hvdrec.errors import UserError, invalid_file, shown
from hvdrec.samples.columns import reason
from hvdrec.samples.petastorm_values import decode_arrays, is_petastorm
from hvdrec.samples.raw_files import RawFiles, check_parquet, read_headers
from hvdrec.samples.sql import literal, quoted, without_nan
from hvdrec.samples.text_types import EXACT, converted, find_types

FILE = f"{PREFIX}file"
"""Name of the internal column with the path of the file that a row comes from."""
CSV = (
    "auto_detect = false, header = true, strict_mode = true, "
    """quote = '"', escape = '"', nullstr = ''"""
)
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
            declared: Column -> type, for the columns of features and keys in CSV files.

        Raises:
            UserError: A file cannot be read, or columns are ambiguous.
        """
        try:
            rows = self._parquet(files) if files.is_parquet else self._csv(files, declared)
            if files.partitions:
                rows = self._partitioned(rows, files, declared)
            return self._view(f"SELECT {self._values(rows)} FROM {rows}")
        except UserError:
            raise
        except (duckdb.Error, pa.ArrowException, OSError, ValueError) as error:
            raise unreadable(files.file, error) from None

    def _parquet(self, files: RawFiles) -> str:
        for column, paths in check_parquet(files).items():
            self._require_exact(files.file, column, paths)
        view = self._view(f"SELECT * FROM {_parquet(files.paths)}")
        if any(is_petastorm(folder) for folder in (files.file, files.file.parent)):
            return decode_arrays(self.connection, view, self.new_name)
        return view

    def _require_exact(self, file: Path, column: str, paths: Sequence[str]) -> None:
        """Raise UserError if a file has integers that a float cannot hold exactly.

        The column becomes one of floats, because other files have floats in it.
        """
        values = f"unnest([min({quoted(column)}), max({quoted(column)})])"
        query = f"SELECT {values} AS value FROM {_parquet(paths)}"
        query = f"SELECT value FROM ({query}) WHERE abs(CAST(value AS HUGEINT)) >= {EXACT}"
        if rows := self.connection.sql(query).fetchall():
            raise _inexact(file, column, rows[0][0], "floats in other files")

    def _csv(self, files: RawFiles, declared: Mapping[str, RawType]) -> str:
        """Read CSV files as text, find the types of the columns, and store the converted rows."""
        parts = []
        for header, paths in read_headers(files).items():
            columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in header.names)
            options = f"delim = {literal(header.delimiter)}, columns = {{{columns}}}, {CSV}"
            parts.append(f"SELECT * FROM read_csv({_paths(paths)}, {options}, {OPTIONS})")
        text, typed = self.new_name(), self.new_name()
        self.connection.execute(f"CREATE TEMP TABLE {text} AS {' UNION ALL BY NAME '.join(parts)}")
        selected = self._typed(text, files.file, declared)
        self.connection.execute(f"CREATE TEMP TABLE {typed} AS SELECT {selected} FROM {text}")
        self.connection.execute(f"DROP TABLE {text}")
        return typed

    def _typed(self, text: str, file: Path, declared: Mapping[str, RawType]) -> str:
        """Return the SQL that converts columns of text to the types that all their values have."""
        names = [name for name in self.connection.table(text).columns if name != FILE]
        found = find_types(self.connection, text, names, declared)
        for name, (integer, decimal) in found.mixed.items():
            raise _inexact(file, name, integer, f"decimals such as {decimal}")
        for name, value in found.odd.items():
            self.warn(f"{file}: column '{name}' is read as text: {shown(value)} is not a number")
        return ", ".join([*(converted(name, found.types[name]) for name in names), FILE])

    def _partitioned(self, rows: str, files: RawFiles, declared: Mapping[str, RawType]) -> str:
        """Add the columns from names of directories, except those that are in the files."""
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


def unreadable(file: Path, error: Exception) -> UserError:
    """Build the error for a file that DuckDB cannot read, with DuckDB's reason."""
    named = re.search(r"^\s*file = (.+)$", str(error), re.MULTILINE)
    path = named[1].strip() if named else file
    if str(path).endswith(".parquet") or not file.name.endswith((".csv", ".csv.gz")):
        return invalid_file(path, f"not a readable Parquet file ({reason(error)})", REWRITE)
    is_encoding = re.search("unicode|utf-8", str(error).split("Possible")[0], re.IGNORECASE)
    remedy = "save the file as UTF-8" if is_encoding else "correct the file"
    return invalid_file(path, f"not a readable CSV file ({reason(error)})", remedy)


OPTIONS = f"filename = {literal(FILE)}, hive_partitioning = false"


def _parquet(paths: Sequence[str]) -> str:
    return f"read_parquet({_paths(paths)}, union_by_name = true, {OPTIONS})"


def _paths(paths: Sequence[str]) -> str:
    # DuckDB treats each path as a glob, so escape wildcards.
    return "[" + ", ".join(literal(glob.escape(path)) for path in paths) + "]"


def _inexact(file: Path, column: str, integer: object, others: str) -> UserError:
    problem = f"column '{column}' mixes integers such as {integer} with {others}"
    problem += "; floats do not hold all integers above 2**53"
    remedy = f"write '{column}' as integers or as text in all files"
    return invalid_file(file, problem, remedy)
