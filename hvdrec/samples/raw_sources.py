"""The SQL, or the Arrow source, that reads the files of one format."""

from __future__ import annotations

import codecs
import glob
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from hvdrec.config.names import PREFIX
from hvdrec.errors import choices, invalid_file, invalid_value
from hvdrec.samples.raw_columns import ENCODING_REMEDY, check_names, check_partitions, read_headers
from hvdrec.samples.raw_files import RawFiles
from hvdrec.samples.sql import literal, quoted

FILE = f"{PREFIX}file"
"""Name of the internal column with the path of the file that a row comes from."""
OPTIONS = f"filename = {literal(FILE)}, hive_partitioning = false"
BLOCK = 1 << 22
"""Number of bytes that are decoded at a time."""


@contextmanager
def read_csv(files: RawFiles, scratch: str) -> Iterator[str]:
    """Yield the SQL that reads CSV files as text.

    Files that are not UTF-8 are first converted, a block at a time. The converted copies are in a
    temporary directory in `scratch`, which is removed when the context ends.

    Raises:
        UserError: See `read_headers` and `convert`.
    """
    options = files.options
    quote = literal(options.quote)
    fixed = (
        f"auto_detect = false, header = {str(options.header).lower()}, strict_mode = true, "
        f"quote = {quote}, escape = {quote}, "
        f"nullstr = [{', '.join(map(literal, options.nulls or ('',)))}]"
    )
    with tempfile.TemporaryDirectory(prefix="hvdrec-text-", dir=scratch or None) as folder:
        parts = []
        for header, paths in read_headers(files).items():
            columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in header.names)
            how = (
                f"delim = {literal(header.delimiter)}, columns = {{{columns}}}, {fixed}, {OPTIONS}"
            )
            for original, group in utf8_files(files, paths, Path(folder)):
                source = f"read_csv({sql_paths(group)}, {how})"
                parts.append(f"SELECT {_all_columns(original)} FROM {source}")
        yield " UNION ALL BY NAME ".join(parts)


@contextmanager
def read_json(
    files: RawFiles, scratch: str, connection: duckdb.DuckDBPyConnection
) -> Iterator[str]:
    """Yield the SQL that reads files with one JSON object per line.

    The columns are the keys of the objects in all lines. Single values are read as text, as in CSV
    files, so that the type of a column follows from all its values and no number is rounded. Lists
    and nested objects keep their types.

    Raises:
        UserError: Names of columns differ only in case.
    """
    lines = f"format = 'newline_delimited', records = true, {OPTIONS}"
    how = f"{lines}, sample_size = -1, union_by_name = true"
    with tempfile.TemporaryDirectory(prefix="hvdrec-text-", dir=scratch or None) as folder:
        parts = []
        for original, group in utf8_files(files, files.paths, Path(folder)):
            found = connection.sql(f"SELECT * FROM read_json({sql_paths(group)}, {how}) LIMIT 0")
            types = dict(zip(found.columns, map(str, found.types), strict=True))
            types.pop(FILE)
            check_names(files.file, types)
            check_partitions(files, {name: dict.fromkeys(group) for name in types})
            columns = ", ".join(f"{literal(n)}: {literal(_read_as(t))}" for n, t in types.items())
            source = f"read_json({sql_paths(group)}, {lines}, columns = {{{columns}}})"
            parts.append(f"SELECT {_all_columns(original)} FROM {source}")
        yield " UNION ALL BY NAME ".join(parts)


def _all_columns(original: str | None) -> str:
    """Return the SQL that selects all columns; `original` is the path of a copied file."""
    return "*" if original is None else f"* REPLACE ({literal(original)} AS {FILE})"


def _read_as(dtype: str) -> str:
    """Return the type with which a JSON column is read: text, unless it is a list or nested."""
    return dtype if re.search(r"[\[(]", dtype) and not dtype.startswith("DECIMAL") else "VARCHAR"


def open_delta(files: RawFiles) -> Any:
    """Open the current version of a Delta table as an Arrow data set.

    Raises:
        UserError: The package is missing, or the table cannot be read.
    """
    try:
        from deltalake import DeltaTable
    except ModuleNotFoundError:
        raise _no_package(files, "deltalake", "delta") from None
    try:
        return DeltaTable(str(files.file)).to_pyarrow_dataset()
    except Exception as error:  # its errors have no common base class
        raise invalid_file(files.file, f"not a readable Delta table ({_line(error)})") from None


def open_iceberg(files: RawFiles) -> Any:
    """Open the current snapshot of an Iceberg table as a stream of Arrow batches.

    The table is a directory with ``metadata/*.metadata.json``; the newest of these files is used.

    Raises:
        UserError: The package is missing, or the table cannot be read.
    """
    try:
        from pyiceberg.table import StaticTable
    except ModuleNotFoundError:
        raise _no_package(files, "pyiceberg", "iceberg") from None
    versions = {str(path): path.name for path in (files.file / "metadata").glob("*.metadata.json")}
    if not versions:
        raise invalid_file(files.file, "has no metadata/*.metadata.json", "name an Iceberg table")
    newest = max(versions, key=lambda path: int(re.sub(r"^v|[-.].*$", "", versions[path]) or 0))
    try:
        return StaticTable.from_metadata(newest).scan().to_arrow_batch_reader()
    except Exception as error:  # its errors have no common base class
        raise invalid_file(files.file, f"not a readable Iceberg table ({_line(error)})") from None


def renamed(query: str, files: RawFiles, columns: Sequence[str]) -> str:
    """Add the renaming of ``samples.tables.rename`` to a query.

    Args:
        query: SQL that reads the table.
        files: The table.
        columns: Columns of the query.

    Raises:
        UserError: A column to rename does not exist, or two columns would have one name.
    """
    rename = files.options.rename
    names = [name for name in columns if name != FILE]
    for old in rename:
        if old not in names:
            remedy = f"the columns of {files.file} are {choices(names)}"
            raise invalid_value("samples.tables.rename", old, "no such column", remedy)
    check_names(files.file, (rename.get(name, name) for name in names))
    if not rename:
        return query
    pairs = ", ".join(f"{quoted(old)} AS {quoted(new)}" for old, new in rename.items())
    return f"SELECT * RENAME ({pairs}) FROM ({query})"


def sql_paths(paths: Sequence[str]) -> str:
    """Return paths as an SQL list. DuckDB treats each path as a glob, so escape wildcards."""
    return "[" + ", ".join(literal(glob.escape(path)) for path in paths) + "]"


def utf8_files(
    files: RawFiles, paths: Sequence[str], folder: Path
) -> Iterator[tuple[str | None, list[str]]]:
    """Yield groups of UTF-8 files, each with the path of its original.

    The path is None if the files themselves are UTF-8, so that no copy is needed.
    """
    if codecs.lookup(files.options.encoding).name == "utf-8":
        yield None, list(paths)
        return
    for path in paths:
        copy = Path(tempfile.mkdtemp(dir=folder)) / "copy.txt"
        convert(files, path, copy)
        yield path, [str(copy)]


def convert(files: RawFiles, path: str, copy: Path) -> None:
    """Write a copy of a text file in UTF-8, a block at a time.

    Raises:
        UserError: The file has bytes that its encoding does not allow.
    """
    encoding, lines = files.options.encoding, 1
    decoder = codecs.getincrementaldecoder(encoding)()
    with files.open(path) as source, open(copy, "w", encoding="utf-8", newline="") as target:
        while block := source.read(BLOCK):
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:
                line = lines + bytes(error.object[: error.start]).count(b"\n")
                problem = f"line {line}: not encoded in {encoding} ({error.reason})"
                raise invalid_file(path, problem, ENCODING_REMEDY) from None
            lines += text.count("\n")
            target.write(text)


def _no_package(files: RawFiles, package: str, extra: str) -> Exception:
    problem = f"{extra.capitalize()} tables need the package '{package}', which is not installed"
    return invalid_file(files.file, problem, f"pip install 'hvdrec[{extra}]'")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
