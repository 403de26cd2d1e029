"""Find the files of a raw table, their columns, and column values in the names of directories."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from hvdrec.errors import UserError, choices, invalid_file
from hvdrec.samples.columns import family, is_list

SUFFIXES = (".parquet", ".csv", ".csv.gz")
DELIMITERS = (",", "\t", ";", "|")
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
COMPATIBLE = (
    {"integer", "boolean"},
    {"integer", "decimal"},
    {"integer", "float"},
    {"decimal", "float"},
    {"integer", "string"},
    {"date", "timestamp"},
)
"""Pairs of type families that a column may have in different files of one table: there is a common
type for both."""


@dataclass(frozen=True)
class RawFiles:
    """The files of one raw table.

    Attributes:
        file: Path or glob of the table, for error messages.
        paths: The files, sorted.
        partitions: Column -> its value for each file, from directories such as ``day=2024-05-01``.
    """

    file: Path
    paths: tuple[str, ...]
    partitions: Mapping[str, tuple[str | None, ...]]

    @property
    def is_parquet(self) -> bool:
        """Return True for Parquet files, False for CSV files."""
        return self.paths[0].endswith(".parquet")


@dataclass(frozen=True)
class CsvHeader:
    """The first line of a CSV file: its delimiter and the names of the columns."""

    delimiter: str
    names: tuple[str, ...]


def find_files(raw: Path, name: str) -> RawFiles:
    """Find the files of a table.

    A directory called ``key=value`` becomes a column if it is part of `name` or below it.
    Directories above are ignored.

    Args:
        raw: Directory of the raw tables.
        name: Path of a file, a directory or a glob, relative to `raw`.

    Raises:
        UserError: There is no such file, or its suffix is not one of SUFFIXES.
    """
    file = raw / name
    text = str(file)
    if file.is_dir():
        paths = _files_of(file)
    elif not text.endswith(SUFFIXES):
        problem = f"must be a directory or end in one of {choices(SUFFIXES)}"
        remedy = "convert the table" if file.suffix else "check paths.raw and the table's name"
        raise invalid_file(file, problem, remedy)
    else:
        paths = [text] if file.is_file() else sorted(glob.glob(text, recursive=True))
    if not paths:
        raise invalid_file(file, "no such file", "check paths.raw and the table's name")
    above = len(raw.parts)
    if Path(name).is_absolute():
        patterns = (i for i, part in enumerate(file.parts) if glob.has_magic(part))
        above = next(patterns, len(file.parts))
    found = [_partition(Path(path).parts[above:-1]) for path in paths]
    keys = dict.fromkeys(key for values in found for key in values)
    partitions = {key: tuple(values.get(key) for values in found) for key in keys}
    return RawFiles(file, tuple(paths), partitions)


def _files_of(directory: Path) -> list[str]:
    """List the files of a table in a directory and its subdirectories, sorted by path.

    Names that begin with "_" or "." are skipped, as other readers of Parquet do: Spark and
    Petastorm use them for files that are not part of the table.

    Raises:
        UserError: The directory holds no table, or files of several formats.
    """
    files = [
        str(path)
        for path in sorted(directory.rglob("*"))
        if path.name.endswith(SUFFIXES)
        and path.is_file()
        and not any(part.startswith(("_", ".")) for part in path.relative_to(directory).parts)
    ]
    if not files:
        problem = f"holds no files that end in one of {choices(SUFFIXES)}"
        raise invalid_file(directory, problem, "check paths.raw and the table's name")
    if len({name.endswith(".parquet") for name in files}) > 1:
        problem = "holds both Parquet and CSV files"
        raise invalid_file(directory, problem, f"name some, as in '{directory.name}/*.parquet'")
    return files


def check_parquet(files: RawFiles) -> dict[str, list[str]]:
    """Check that each column has the same name and compatible types in all Parquet files.

    Returns:
        For each column that has integers in some files and floats in others: column -> the files
        with integers. A float can only hold integers up to 2**53.

    Raises:
        UserError: Names of columns differ only in case, or the types of a column have no common
            type.
    """
    types: dict[str, dict[str, pa.DataType]] = {}
    names = []
    for path in files.paths:
        schema = pq.read_schema(path)
        check_names(path, schema.names)
        names += schema.names
        for field in schema:
            types.setdefault(field.name, {})[path] = field.type
    check_names(files.file, dict.fromkeys(names))
    mixed = {}
    for column, by_path in types.items():
        families = {path: _family(dtype) for path, dtype in by_path.items()}
        kinds = set(families.values()) - {"null"}
        if len(kinds) > 1 and kinds not in COMPATIBLE:
            raise _incompatible(files.file, column, families)
        if kinds == {"integer", "float"}:
            mixed[column] = [path for path, kind in families.items() if kind == "integer"]
    _check_partitions(files, types)
    return mixed


def read_headers(files: RawFiles) -> dict[CsvHeader, list[str]]:
    """Group CSV files that have the same delimiter and columns.

    Raises:
        UserError: A file is empty, its first line is not UTF-8, or names of columns differ only in
            case.
    """
    groups: dict[CsvHeader, list[str]] = {}
    for path in files.paths:
        header = read_header(path)
        check_names(path, header.names)
        groups.setdefault(header, []).append(path)
    check_names(files.file, dict.fromkeys(name for header in groups for name in header.names))
    _check_partitions(files, {n: dict.fromkeys(p) for h, p in groups.items() for n in h.names})
    return groups


def read_header(path: str) -> CsvHeader:
    """Read the first line of a CSV file; the most frequent delimiter in it is that of the file.

    Raises:
        UserError: The file is empty or its first line is not UTF-8.
    """
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
        lines = iter(text)
        line = next(lines, "")
        if not line.strip():
            raise invalid_file(path, "has no line with the names of columns", "add one")
        if "\ufffd" in line or "\0" in line:
            problem = "the names of columns are not encoded in UTF-8"
            raise invalid_file(path, problem, "save the file as UTF-8")
        unquoted = re.sub('"[^"]*"', "", line)
        delimiter = max(DELIMITERS, key=unquoted.count)
        row = next(csv.reader(_chain(line, lines), delimiter=delimiter))
    return CsvHeader(delimiter, tuple(name or f"column{i}" for i, name in enumerate(row)))


def check_names(file: object, names: Iterable[str]) -> None:
    """Raise UserError if two columns have the same name, or names that differ only in case."""
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.get(name.lower())
        if twin == name:
            raise invalid_file(file, f"two columns have the name '{name}'", "rename one of them")
        if twin is not None:
            raise names_differ_in_case(file, twin, name)
        seen[name.lower()] = name


def names_differ_in_case(file: object, first: str, second: str) -> UserError:
    """Build the error for two column names that SQL does not distinguish."""
    problem = f"the columns '{first}' and '{second}' differ only in case, which SQL ignores"
    return invalid_file(file, problem, "rename one of them")


def _chain(line: str, lines: Iterable[str]) -> Iterable[str]:
    yield line
    yield from lines


def _partition(directories: Iterable[str]) -> dict[str, str | None]:
    """Return column -> value for names of directories such as ``day=2024-05-01``."""
    pairs = (directory.partition("=") for directory in directories)
    return {
        unquote(key): None if value == NULL_PARTITION else unquote(value)
        for key, sign, value in pairs
        if key and sign
    }


def _family(dtype: pa.DataType) -> str:
    if is_list(dtype):
        return f"list of {_family(dtype.value_type)}"
    name = family(dtype)
    # A timestamp without a time zone does not say which instant it means, so the two differ.
    return f"{name} with time zone" if name == "timestamp" and dtype.tz else name


def _incompatible(file: Path, column: str, families: Mapping[str, str]) -> UserError:
    examples: dict[str, str] = {}
    for path, kind in families.items():
        if kind != "null":
            examples.setdefault(kind, path)
    shown = " and ".join(f"{kind} in {Path(path).name}" for kind, path in examples.items())
    problem = f"column '{column}' is {shown}"
    return invalid_file(file, problem, "write it with one type in all files")


def _check_partitions(files: RawFiles, columns: Mapping[str, Mapping[str, object]]) -> None:
    """Raise UserError for a column that is in some files and in the directory names of others."""
    check_names(files.file, dict.fromkeys([*columns, *files.partitions]))
    for key in files.partitions:
        if 0 < len(columns.get(key, ())) < len(files.paths):
            problem = f"column '{key}' is in some files, and only a directory's name in others"
            raise invalid_file(files.file, problem, "write the column in all files, or in none")
