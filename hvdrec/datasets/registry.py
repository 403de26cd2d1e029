"""What a data set declares of itself."""

from __future__ import annotations

from dataclasses import dataclass

from hvdrec.datasets.download import Source


@dataclass(frozen=True)
class Dataset:
    """A public data set: its licence in one line, and where it can be had, in order."""

    name: str
    description: str
    licence: str
    sources: tuple[Source, ...]
