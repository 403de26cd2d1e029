"""Check the columns of the files of a raw table: names, types, headers of CSV files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hvdrec.errors import UserError, choices, invalid_file
from hvdrec.samples.columns import family, is_list
from hvdrec.samples.raw_files import RawFiles

DELIMITERS = (",", "\t", ";", "|")
ENCODING_REMEDY = (
    "save the file as UTF-8, or declare its encoding in [[samples.tables]], such as "
    "encoding = 'latin-1'"
)
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
class CsvHeader:
    """The delimiter of a CSV file and the names of its columns."""

    delimiter: str
    names: tuple[str, ...]


def check_parquet(files: RawFiles) -> dict[str, list[str]]:
    """Check that each column has the same name and compatible types in all Parquet files.

    Returns:
        Column -> the files in which it has integers, for each column that has floats in other
        files. All values of such a column become floats, which hold integers exactly only up to
        2**53.

    Raises:
        UserError: Names of columns differ only in case, or the types of a column have no common
            type.
    """
    types: dict[str, dict[str, pa.DataType]] = {}
    names = []
    for path in files.paths:
        with files.open(path) as file:
            schema = pq.read_schema(file)
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
    check_partitions(files, types)
    return mixed


def read_headers(files: RawFiles) -> dict[CsvHeader, list[str]]:
    """Group CSV files that have the same delimiter and columns.

    Raises:
        UserError: A file is empty, its first line cannot be decoded or does not have the declared
            columns, or names of columns differ only in case.
    """
    groups: dict[CsvHeader, list[str]] = {}
    for path in files.paths:
        header = read_header(files, path)
        check_names(path, header.names)
        groups.setdefault(header, []).append(path)
    check_names(files.file, dict.fromkeys(name for header in groups for name in header.names))
    check_partitions(files, {n: dict.fromkeys(p) for h, p in groups.items() for n in h.names})
    return groups


def read_header(files: RawFiles, path: str) -> CsvHeader:
    """Read the first line of a CSV file.

    If no delimiter is configured, it is the one of `DELIMITERS` that is most frequent in the line.

    Raises:
        UserError: The file is empty, its first line cannot be decoded, or the line does not have as
            many fields as there are configured columns.
    """
    options = files.options
    with files.open(path) as file:
        encoding = "utf-8-sig" if options.encoding == "utf-8" else options.encoding
        text = io.TextIOWrapper(file, encoding=encoding, errors="replace", newline="")
        lines = iter(text)
        line = next(lines, "")
        if not line.strip():
            problem = "has no line with the names of columns" if options.header else "is empty"
            raise invalid_file(path, problem, "add one" if options.header else "provide rows")
        if "\ufffd" in line or "\0" in line:
            problem = f"the first line is not encoded in {options.encoding.upper()}"
            raise invalid_file(path, problem, ENCODING_REMEDY)
        quote = options.quote
        unquoted = re.sub(f"{quote}[^{quote}]*{quote}", "", line) if quote else line
        delimiter = options.delimiter or max(DELIMITERS, key=unquoted.count)
        row = _first_row(_chain(line, lines), delimiter, quote)
    if options.columns and len(options.columns) != len(row):
        problem = f"has {len(row)} columns in the first line, samples.tables declares "
        problem += f"{len(options.columns)}: {choices(options.columns)}"
        raise invalid_file(path, problem, "correct columns or delimiter of [[samples.tables]]")
    names = options.columns or tuple(
        (name if options.header else "") or f"column{i}" for i, name in enumerate(row)
    )
    return CsvHeader(delimiter, names)


def _first_row(lines: Iterable[str], delimiter: str, quote: str) -> list[str]:
    """Parse the first row. Python's reader knows only delimiters of one character."""
    if len(delimiter) > 1:
        return next(iter(lines)).rstrip("\r\n").split(delimiter)
    if not quote:
        return next(csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE))
    return next(csv.reader(lines, delimiter=delimiter, quotechar=quote))


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


def _family(dtype: pa.DataType) -> str:
    if is_list(dtype):
        return f"list of {_family(dtype.value_type)}"
    name = family(dtype)
    # A timestamp without a time zone does not define an instant, so it is in another family than
    # one with a time zone.
    return f"{name} with time zone" if name == "timestamp" and dtype.tz else name


def _incompatible(file: object, column: str, families: Mapping[str, str]) -> UserError:
    examples: dict[str, str] = {}
    for path, kind in families.items():
        if kind != "null":
            examples.setdefault(kind, path)
    shown = " and ".join(f"{kind} in {Path(path).name}" for kind, path in examples.items())
    problem = f"column '{column}' is {shown}"
    return invalid_file(file, problem, "write it with one type in all files")


def check_partitions(files: RawFiles, columns: Mapping[str, Mapping[str, object]]) -> None:
    """Raise UserError if some files have a column, and only the directories of others name it."""
    check_names(files.file, dict.fromkeys([*columns, *files.partitions]))
    for key in files.partitions:
        if 0 < len(columns.get(key, ())) < len(files.paths):
            problem = f"column '{key}' is in some files, and only a directory's name in others"
            raise invalid_file(files.file, problem, "write the column in all files, or in none")
