"""The interface of a feature kind: how it learns from training data, and its ONNX nodes."""

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
    """A feature, and what fitting learned about it from the training split.

    Attributes:
        feature: The feature.
        size: Number of codes, which is also the number of rows of its embedding table; 0 for a
            feature that is a plain number.
        values: The vocabulary, sorted by code; its first value has code FIRST_CODE. None for a
            feature without a vocabulary.
        statistics: Numbers that the kind has learned, as JSON values.
    """

    feature: Feature
    size: int = 0
    values: Sequence[Any] | None = None
    statistics: Mapping[str, Any] = field(default_factory=dict)


class TrainingSplit:
    """Queries over the rows of the training split, for fitting.

    DuckDB streams the files. So memory depends on the number of distinct values of a feature, not
    on the number of rows.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, pattern: str) -> None:
        """Open the Parquet files that match a pattern."""
        self._connection = connection
        self._rows = connection.read_parquet(pattern)

    def values(self, column: Column) -> duckdb.DuckDBPyRelation:
        """Return the values of a raw column, without missing ones, as column ``v`` of a relation.

        For a column of lists, these are the entries of the lists.
        """
        name = '"' + column.name.replace('"', '""') + '"'
        values = self._rows.project(f"{f'unnest({name})' if column.is_list else name} AS v")
        return values.filter(f"v IS NOT NULL AND v IS DISTINCT FROM {_MISSING_SQL[column.dtype]}")

    def vocabulary(self, column: Column, min_count: int) -> list[Any]:
        """Return the values that occur `min_count` times or more.

        They are sorted by decreasing count, then by value (strings by their bytes). So the same
        data always gives the same codes.
        """
        counted = self.values(column).aggregate("v, count(*) AS n", "v")
        frequent = counted.filter(f"n >= {min_count}").order("n DESC, v").project("v")
        values: list[Any] = frequent.to_arrow_table()["v"].to_pylist()
        return values

    @contextmanager
    def in_row_order(self) -> Iterator[None]:
        """Run queries in the ``with`` body on one thread, so that sums of floats are repeatable."""
        self._connection.execute("SET threads = 1")
        try:
            yield
        finally:
            self._connection.execute("RESET threads")


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
        values = split.vocabulary(column, feature.min_count)
        return FittedFeature(feature, FIRST_CODE + len(values), values)

    def compile(self, nodes: Nodes, fitted: FittedFeature, inputs: Sequence[str]) -> str:
        """Add the nodes that look up the code of each value."""
        assert fitted.values is not None
        return nodes.vocabulary(inputs[0], fitted.feature.dtype, fitted.values)
