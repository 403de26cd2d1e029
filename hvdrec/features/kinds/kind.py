"""The interface of a feature kind: what it learns from training data, and its ONNX nodes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hvdrec.config.schema import FIRST_CODE, MISSING_INT, Column, Feature, FeatureKind
from hvdrec.features.kinds.nodes import Nodes

if TYPE_CHECKING:
    import duckdb

_MISSING_SQL = {"string": "''", "int": f"CAST('{MISSING_INT}' AS BIGINT)", "float": "NULL"}


@dataclass(frozen=True)
class FittedFeature:
    """A feature with what fitting learned from the training split.

    Attributes:
        feature: The feature.
        size: Number of codes, which is the number of rows of its table; 0 for a plain number.
        values: Vocabulary in the order of its codes, which start at FIRST_CODE; None without one.
        statistics: Numbers that the kind learned, as JSON values.
    """

    feature: Feature
    size: int = 0
    values: Sequence[Any] | None = None
    statistics: Mapping[str, Any] = field(default_factory=dict)


class TrainingSplit:
    """The rows of the training split, for fitting.

    DuckDB streams the files. Memory grows with the distinct values of one feature, not with rows.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, pattern: str) -> None:
        """Open the Parquet files that match a pattern."""
        self._connection = connection
        self._rows = connection.read_parquet(pattern)

    def values(self, column: Column) -> duckdb.DuckDBPyRelation:
        """Return the values of a raw column that are not missing, as column ``v``.

        Lists are unnested.
        """
        name = f'"{column.name}"'
        values = self._rows.project(f"{f'unnest({name})' if column.is_list else name} AS v")
        return values.filter(f"v IS NOT NULL AND v IS DISTINCT FROM {_MISSING_SQL[column.dtype]}")

    def vocabulary(self, column: Column, min_count: int) -> list[Any]:
        """Return the values that occur `min_count` times or more.

        They are sorted by falling count, then by value (strings bytewise), so the same data gives
        the same codes.
        """
        counted = self.values(column).aggregate("v, count(*) AS n", "v")
        frequent = counted.filter(f"n >= {min_count}").order("n DESC, v").project("v")
        values: list[Any] = frequent.to_arrow_table()["v"].to_pylist()
        return values

    @contextmanager
    def in_row_order(self) -> Iterator[None]:
        """Run queries on one thread, so that floating-point sums are the same on every run."""
        self._connection.execute("SET threads = 1")
        try:
            yield
        finally:
            self._connection.execute("RESET threads")


class Kind(FeatureKind):
    """A kind of feature: raw columns, fitting, ONNX nodes and encoded type.

    Encoding, shards, the exported graphs, the bundle's fields and the service's OpenAPI document
    all derive from these methods.
    """

    @abstractmethod
    def fit(self, feature: Feature, split: TrainingSplit) -> FittedFeature:
        """Learn vocabularies or statistics from the training split.

        Raises:
            UserError: The column's values cannot be used.
        """

    @abstractmethod
    def compile(self, nodes: Nodes, fitted: FittedFeature, inputs: Sequence[str]) -> str:
        """Add the nodes that turn raw values into codes, or into a number.

        Args:
            nodes: Where to add nodes.
            fitted: The feature and what fitting learned.
            inputs: Names of the tensors to read: the raw columns of `columns`, string, int64 or
                double [N], or [N, L] for lists (already cut to max_length); then the int64 [N]
                codes of `sources`. Missing raw values are "", MISSING_INT and NaN.

        Returns:
            Name of the result: int64 codes of the inputs' shape, or float32 [N].
        """


def kind_of(feature: Feature) -> Kind:
    """Return the kind of a feature with its code for fitting and encoding."""
    kind = feature.definition
    if not isinstance(kind, Kind):
        raise TypeError(f"feature kind '{feature.kind}' is not a hvdrec.features.kinds.Kind")
    return kind


class VocabularyKind(Kind):
    """A kind whose values get one code each from a fitted vocabulary."""

    has_vocabulary = True

    def fit(self, feature: Feature, split: TrainingSplit) -> FittedFeature:
        """Learn the vocabulary."""
        [column] = self.columns(feature)
        values = split.vocabulary(column, feature.min_count)
        return FittedFeature(feature, FIRST_CODE + len(values), values)

    def compile(self, nodes: Nodes, fitted: FittedFeature, inputs: Sequence[str]) -> str:
        """Look up each value's code."""
        assert fitted.values is not None
        return nodes.vocabulary(inputs[0], fitted.feature.dtype, fitted.values)
