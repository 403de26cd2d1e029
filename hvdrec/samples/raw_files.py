"""Find the files of a raw table: local or remote, one file, a directory or a glob."""

from __future__ import annotations

import glob
import gzip
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast
from urllib.parse import unquote

from hvdrec.config.data_sections import TableFormat
from hvdrec.errors import choices, invalid_file
from hvdrec.storage.urls import Location, Url, as_location, is_url

Format = Literal["csv", "json", "parquet", "delta", "iceberg"]
SUFFIXES: Mapping[str, Format] = {
    ".parquet": "parquet",
    **dict.fromkeys((".csv", ".csv.gz", ".tsv", ".tsv.gz"), "csv"),
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"), "json"),
}
"""Suffix of a file -> its format."""
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
NO_FILE = "check paths.raw and the table's name"


@dataclass(frozen=True)
class RawFiles:
    """The files of one raw table.

    Attributes:
        file: Path, URL or glob of the table, for error messages.
        paths: The files, sorted. A Delta or Iceberg table has one entry: its directory.
        format: Format of the files.
        options: How to read them, as configured.
        partitions: Column -> its value for each file, from directories such as ``day=2024-05-01``.
    """

    file: Location
    paths: tuple[str, ...]
    format: Format
    options: TableFormat
    partitions: Mapping[str, tuple[str | None, ...]]

    @property
    def filesystem(self) -> Any:
        """The fsspec file system of a remote table; None for local files."""
        return self.file.filesystem if isinstance(self.file, Url) else None

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """Open one of the files; the contents of a .gz file are decompressed."""
        opened = self.filesystem.open if self.filesystem else open
        with opened(path, "rb") as file, ExitStack() as stack:
            is_compressed = path.endswith(".gz")
            yield cast(BinaryIO, stack.enter_context(gzip.open(file)) if is_compressed else file)


def table_location(raw: Location, name: str) -> Location:
    """Return the path or URL of a table; `name` is relative to `raw`, absolute, or a URL."""
    return as_location(name) if is_url(name) else raw / name


def find_files(raw: Location, name: str, options: TableFormat | None = None) -> RawFiles:
    """Find the files of a table.

    A directory called ``key=value`` becomes a column if it is part of `name` or below it.
    Directories above are ignored.

    Args:
        raw: Directory or URL of the raw tables.
        name: Path or URL of a file, a directory or a glob, relative to `raw`.
        options: How to read the table; None to derive this from the suffix.

    Raises:
        UserError: There is no such file, or its format is unknown.
    """
    file = table_location(raw, name)
    known = options or TableFormat(path=name)
    if lake := _lake_format(file, known):
        return RawFiles(file, (str(file),), lake, known, {})
    paths = _matching(file, any_suffix=options is not None)
    if not paths:
        raise invalid_file(file, "no such file", NO_FILE)
    formats = {known.format or format_of(path) or "csv" for path in paths}
    if len(formats) > 1:
        problem = f"holds files of several formats: {choices(sorted(formats))}"
        raise invalid_file(file, problem, f"name some, as in '{file.name}/*.parquet'")
    above = _fixed_depth(raw, name)
    found = [_partition(path.split("/")[above:-1]) for path in paths]
    keys = dict.fromkeys(key for values in found for key in values)
    partitions = {key: tuple(values.get(key) for values in found) for key in keys}
    return RawFiles(file, tuple(paths), formats.pop(), known, partitions)


def format_of(path: str) -> Format | None:
    """Return the format that belongs to the suffix of a file; None if the suffix is unknown."""
    return next((name for suffix, name in SUFFIXES.items() if path.endswith(suffix)), None)


def _lake_format(file: Location, options: TableFormat) -> Literal["delta", "iceberg"] | None:
    """Return "delta" or "iceberg" for a table in such a format, otherwise None.

    These formats keep a log of the current files of a table. The directory also holds files of old
    versions, so reading all files in it would be wrong.
    """
    if options.format in ("delta", "iceberg"):
        return options.format
    if options.format or glob.has_magic(str(file)):
        return None
    if (file / "_delta_log").is_dir():
        return "delta"
    metadata = file / "metadata"
    return "iceberg" if metadata.is_dir() and any(metadata.glob("*.metadata.json")) else None


def _matching(file: Location, *, any_suffix: bool) -> list[str]:
    """List the files of a table that is a file, a directory or a glob, sorted.

    Raises:
        UserError: The suffix of the name is unknown, or a directory holds no table.
    """
    if file.is_dir():
        return _files_of(file, any_suffix=any_suffix)
    if not any_suffix and format_of(str(file)) is None:
        problem = f"must be a directory or end in one of {choices(SUFFIXES)}"
        remedy = NO_FILE
        if file.name.count("."):
            remedy = "convert the table, or declare its format in [[samples.tables]]"
        raise invalid_file(file, problem, remedy)
    if isinstance(file, Url):
        system = file.filesystem
        paths = [file.path] if file.is_file() else system.glob(file.path)
        return sorted(map(system.unstrip_protocol, paths))
    if file.is_file():
        return [str(file)]
    return [path for path in sorted(glob.glob(str(file), recursive=True)) if Path(path).is_file()]


def _files_of(directory: Location, *, any_suffix: bool) -> list[str]:
    """List the files of a table in a directory and its subdirectories, sorted by path.

    Names that begin with "_" or "." are skipped, as other readers of Parquet do: Spark and
    Petastorm use them for files that are not part of the table.

    Raises:
        UserError: The directory holds no table.
    """
    if isinstance(directory, Url):
        names = sorted(directory.sizes())
        above = directory.filesystem.unstrip_protocol(directory.path)
    else:
        above = str(directory)
        below = (path for path in directory.rglob("*") if path.is_file())
        names = sorted(str(path.relative_to(directory)) for path in below)
    files = [
        f"{above}/{name}"
        for name in names
        if (any_suffix or format_of(name))
        and not any(part.startswith(("_", ".")) for part in name.split("/"))
    ]
    if not files:
        problem = f"holds no files that end in one of {choices(SUFFIXES)}"
        raise invalid_file(directory, problem, NO_FILE)
    return files


def _fixed_depth(raw: Location, name: str) -> int:
    """Return how many leading parts of a file's path are directories above the table."""
    file = table_location(raw, name)
    parts = str(file).split("/")
    if is_url(name) or Path(name).is_absolute():
        return next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return len(str(raw).split("/")) if str(raw) != "." else 0


def _partition(directories: Iterable[str]) -> dict[str, str | None]:
    """Return column -> value for names of directories such as ``day=2024-05-01``."""
    pairs = (directory.partition("=") for directory in directories)
    return {
        unquote(key): None if value == NULL_PARTITION else unquote(value)
        for key, sign, value in pairs
        if key and sign
    }
