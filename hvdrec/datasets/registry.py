"""What a data set declares of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hvdrec.datasets.download import Source


@dataclass(frozen=True)
class Dataset:
    """A public data set: whose it is, what may be done with it, and where it can be had, in order.

    licence: one line, shown before anything is downloaded. citation: the publication to name. rows:
    how many rows each of its tables has.
    """

    name: str
    description: str
    owner: str
    licence: str
    citation: str
    rows: Mapping[str, int]
    sources: tuple[Source, ...]
