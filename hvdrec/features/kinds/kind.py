"""The interface of a feature kind: how it learns from training data, and its ONNX nodes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hvdrec.config.schema import FIRST_CODE, MISSING_INT, Column, Feature, FeatureKind
from hvdrec.features.kinds.nodes import Nodes
from hvdrec.features.vocabulary import Growth, Vocabulary, first_vocabulary, grown_vocabulary

if TYPE_CHECKING:
    import duckdb

_MISSING_SQL = {"string": "''", "int": f"CAST('{MISSING_INT}' AS BIGINT)", "float": "NULL"}


@dataclass(frozen=True)
class FittedFeature:
    """A feature, and what fitting learned about it from the training split.

    Attributes:
        feature: The feature.
        size: Number of codes, which is also the number of rows of its embedding table; 0 for a
            feature that is a plain number.
        values: The vocabulary, sorted by code; its first value has code FIRST_CODE, and None stands
            for a code that is free. None for a feature without a vocabulary.
        statistics: Numbers that the kind has learned, as JSON values.
        vocabulary: The same values with what is needed to let them grow; None if it is unknown.
        since: Generation in which the feature was added; see `features.vocabulary`.
    """

    feature: Feature
    size: int = 0
    values: Sequence[Any] | None = None
    statistics: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    since: int = 0


class TrainingSplit:
    """Queries over the rows of the training split, for fitting.

    DuckDB streams the files. So memory depends on the number of distinct values of a feature, not
    on the number of rows.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, pattern: str, time: str = "") -> None:
        """Open the Parquet files that match a pattern; `time` names the column of times, if any."""
        self._connection = connection
        self._rows = connection.read_parquet(pattern)
        self._time = time

    def values(self, column: Column) -> duckdb.DuckDBPyRelation:
        """Return the values of a raw column, without missing ones, as column ``v`` of a relation.

        For a column of lists, these are the entries of the lists. Column ``day`` is the day of the
        row; null if the samples have no times.
        """
        name = _quoted(column.name)
        value = f"unnest({name})" if column.is_list else name
        values = self._rows.project(f"{value} AS v, {self._day} AS day")
        return values.filter(f"v IS NOT NULL AND v IS DISTINCT FROM {_MISSING_SQL[column.dtype]}")

    def occurrences(self, column: Column, after: float | None = None) -> pa.Table:
        """Count the values of a raw column.

        Args:
            column: The column.
            after: Count only rows later than this day, in days since 1970; None for all rows.

        Returns:
            Columns ``value``, ``count`` and ``day``: the newest day of a row with this value, null
            if the samples have no times. Rows are sorted by decreasing count, then by value
            (strings by their bytes). So the same data always gives the same codes.
        """
        counted = "count(*)" if after is None else f"count(*) FILTER (day > {after!r})"
        values = self.values(column).aggregate(f"v, {counted} AS n, max(day) AS day", "v")
        ordered = values.order("n DESC, v").project("v AS value, n AS count, day")
        return ordered.to_arrow_table()

    @cached_property
    def newest_day(self) -> float | None:
        """Day of the newest row, in days since 1970; None if the samples have no times."""
        [(newest,)] = self._rows.aggregate(f"max({self._day})").fetchall()
        return None if newest is None else float(newest)

    @cached_property
    def _day(self) -> str:
        """SQL expression of a row's day; numbers are seconds, or ms, us or ns if they are large."""
        types = dict(zip(self._rows.columns, map(str, self._rows.types), strict=True))
        if self._time not in types:
            return "CAST(NULL AS DOUBLE)"
        name = _quoted(self._time)
        if types[self._time].startswith(("TIMESTAMP", "DATE")):
            return f"epoch({name}) / 86400"
        [(largest,)] = self._rows.aggregate(f"max(abs(CAST({name} AS DOUBLE)))").fetchall()
        divisor = next((d for d in (1e9, 1e6, 1e3) if (largest or 0) >= 1e8 * d), 1.0)
        return f"CAST({name} AS DOUBLE) / {divisor * 86400!r}"

    @contextmanager
    def in_row_order(self) -> Iterator[None]:
        """Run queries in the ``with`` body on one thread, so that sums of floats are repeatable."""
        self._connection.execute("SET threads = 1")
        try:
            yield
        finally:
            self._connection.execute("RESET threads")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


class Kind(FeatureKind):
    """A kind of feature: its raw columns, how it is fitted, its ONNX nodes and its encoded type.

    All else follows from these methods: encoding, shards, the exported graphs, the fields in the
    bundle's manifest and the OpenAPI document of the service.
    """

    @abstractmethod
    def fit(self, feature: Feature, split: TrainingSplit) -> FittedFeature:
        """Learn a vocabulary or statistics from the training split.

        Raises:
            UserError: The values of the column cannot be used.
        """

    def grow(
        self, before: FittedFeature, feature: Feature, split: TrainingSplit, growth: Growth
    ) -> FittedFeature:
        """Go on from what the generation before learned.

        By default, the feature keeps its statistics, or learns them again if they follow. A table
        never shrinks.

        Args:
            before: What was learned before.
            feature: The feature now.
            split: The new training rows.
            growth: The new generation.
        """
        if not growth.follows:
            return replace(before, feature=feature)
        after = self.fit(feature, split)
        return replace(after, size=max(before.size, after.size), since=before.since)

    @abstractmethod
    def compile(self, nodes: Nodes, fitted: FittedFeature, inputs: Sequence[str]) -> str:
        """Add the nodes that turn raw values into codes, or into a number.

        Args:
            nodes: The graph to which nodes are added.
            fitted: The feature, and what fitting learned about it.
            inputs: Names of the tensors to read. First come the raw columns of `columns`: string,
                int64 or double, of shape [rows], or [rows, longest list] for lists, which are
                already cut to ``max_length``. Missing values are "", MISSING_INT or NaN. Then come
                the codes of `sources`, int64 [rows].

        Returns:
            Name of the resulting tensor: int64 codes in the shape of the inputs, or float32 [rows].
        """


def kind_of(feature: Feature) -> Kind:
    """Return the object that fits and encodes the features of this feature's kind."""
    kind = feature.definition
    if not isinstance(kind, Kind):
        raise TypeError(f"feature kind '{feature.kind}' is not a hvdrec.features.kinds.Kind")
    return kind


class VocabularyKind(Kind):
    """A kind that gives each value its code in a fitted vocabulary."""

    has_vocabulary = True

    def fit(self, feature: Feature, split: TrainingSplit) -> FittedFeature:
        """Learn the vocabulary: the values that occur at least ``min_count`` times."""
        [column] = self.columns(feature)
        return _with_vocabulary(
            feature, first_vocabulary(split.occurrences(column), feature.min_count)
        )

    def grow(
        self, before: FittedFeature, feature: Feature, split: TrainingSplit, growth: Growth
    ) -> FittedFeature:
        """Add new values and evict old ones; see `grown_vocabulary`."""
        [column] = self.columns(feature)
        assert before.vocabulary is not None
        seen = split.occurrences(column, growth.counted)
        grown = grown_vocabulary(before.vocabulary, seen, feature.min_count, growth)
        return replace(_with_vocabulary(feature, grown), since=before.since)

    def compile(self, nodes: Nodes, fitted: FittedFeature, inputs: Sequence[str]) -> str:
        """Add the nodes that look up the code of each value."""
        assert fitted.values is not None
        return nodes.vocabulary(inputs[0], fitted.feature.dtype, fitted.values)


def _with_vocabulary(feature: Feature, vocabulary: Vocabulary) -> FittedFeature:
    values = vocabulary.values
    return FittedFeature(feature, FIRST_CODE + len(values), values, vocabulary=vocabulary)
