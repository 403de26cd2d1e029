"""From raw tables to labelled, split samples."""

from hvdrec.samples.make import make

__all__ = ["make"]
