"""The interface of a feature kind: how it learns from training data, and its ONNX nodes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hvdrec.config.schema import FIRST_CODE, Feature, FeatureKind
from hvdrec.features.kinds.nodes import Nodes
from hvdrec.features.kinds.training_split import TrainingSplit
from hvdrec.features.vocabulary import Growth, Vocabulary, first_vocabulary, grown_vocabulary


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
        vocabulary: The same values, with the data from which later generations go on; None if these
            data are unknown.
        since: Generation in which the feature was added; see `features.vocabulary`.
    """

    feature: Feature
    size: int = 0
    values: Sequence[Any] | None = None
    statistics: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    since: int = 0


class Kind(FeatureKind):
    """A kind of feature: its raw columns, how it is fitted, its ONNX nodes and its encoded type.

    Everything else follows from these methods: encoding, shards, the exported graphs, the fields in
    the bundle's manifest and the OpenAPI document of the service.
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
        """Go on from the fitted feature of the generation before.

        By default, the feature keeps its statistics; with `growth.follows`, it learns them again
        from the new rows. Its embedding table never shrinks.

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
