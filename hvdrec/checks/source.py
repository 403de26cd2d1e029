"""Open samples in DuckDB for the checks. Data that does not fit into memory spills to disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from hvdrec.config import Config
from hvdrec.config.schema import Column, Schema
from hvdrec.samples.split import RANDOM, SPLITS
from hvdrec.samples.sql import literal, quoted

SPLIT = "__hvdrec_split"
MEMORY = "2GB"
HELD_OUT = SPLITS[1:]


@dataclass(frozen=True)
class SampleSource:
    """Samples as a view in DuckDB.

    Attributes:
        connection: The DuckDB connection.
        view: SQL name of the view with the rows of all splits; the column `SPLIT` names the split.
        config: Configuration of the run.
        path: Directory of the samples.
    """

    connection: duckdb.DuckDBPyConnection
    view: str
    config: Config
    path: Path

    @property
    def schema(self) -> Schema:
        """The features of the run."""
        return self.config.schema

    @property
    def label(self) -> str:
        """Name of the column of the label."""
        return self.schema.own_name("label")

    @property
    def time(self) -> str:
        """Name of the column of the time; "" if the samples have none."""
        return self.schema.own_name("time") if self.config.samples.time else ""

    @property
    def is_random(self) -> bool:
        """True if the split ignores time."""
        return self.config.samples.split.method in RANDOM

    @property
    def keys(self) -> tuple[str, str]:
        """Names of the user key and the item key."""
        return self.config.samples.user, self.config.samples.item

    def columns(self) -> tuple[Column, ...]:
        """Return the keys and the raw columns of all features, each once."""
        found = {column.name: column for column in self.schema.columns()}
        user, item = self.keys
        first = {user: Column(user, "user", "string"), item: Column(item, "item", "string")}
        return tuple({**first, **found}.values())

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Run a query; return all rows of its (small) result."""
        return self.connection.sql(query).fetchall()

    def by_split(self, expressions: Sequence[str], where: str = "true") -> dict[str, Any]:
        """Return split -> values of aggregate expressions over its rows."""
        query = f"SELECT {', '.join([SPLIT, *expressions])} FROM {self.view} WHERE {where}"
        return {row[0]: row[1:] for row in self.rows(f"{query} GROUP BY {SPLIT}")}


@contextmanager
def open_samples(config: Config, path: Path, against: Path | None) -> Iterator[list[SampleSource]]:
    """Open samples, and those of another run if `against` names their directory."""
    with tempfile.TemporaryDirectory(prefix="hvdrec-") as spill, duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET preserve_insertion_order = false")
        connection.execute("SET TimeZone = 'UTC'")
        # Statistics in Parquet files ignore NaN. If DuckDB used them, it would assume that
        # isnan(column) is always false.
        connection.execute("SET disabled_optimizers = 'statistics_propagation'")
        connection.execute(f"SET memory_limit = {literal(MEMORY)}")
        connection.execute(f"SET temp_directory = {literal(spill)}")
        sources = []
        for name, folder in (("samples", path), ("other_samples", against)):
            if folder is not None:
                parts = (
                    f"SELECT *, {literal(split)} AS {SPLIT} FROM "
                    f"read_parquet({literal(str(folder / split / '*.parquet'))}, "
                    "union_by_name = true, hive_partitioning = false)"
                    for split in SPLITS
                )
                query = " UNION ALL BY NAME ".join(parts)
                connection.execute(f"CREATE TEMP VIEW {name} AS {query}")
                sources.append(SampleSource(connection, name, config, folder))
        yield sources


def is_missing(column: Column) -> str:
    """Return SQL that is true if a value is missing: NULL, NaN, an empty text or list."""
    name = quoted(column.name)
    if column.is_list:
        return f"coalesce(len({name}), 0) = 0"
    if column.dtype == "string":
        return f"coalesce({name}, '') = ''"
    return f"({name} IS NULL OR isnan({name}))" if column.dtype == "float" else f"{name} IS NULL"


def counted(source: SampleSource, what: str, where: str) -> dict[str, float]:
    """Return, for validation and test, the share of rows for which a condition holds."""
    found = source.by_split([f"avg(CAST(({what}) AS INT))"], where)
    return {split: float(found[split][0] or 0) for split in HELD_OUT if split in found}
