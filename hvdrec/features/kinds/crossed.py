"""The kind ``crossed``."""

from __future__ import annotations

from collections.abc import Sequence

from hvdrec.config.schema import FIRST_CODE, MISSING, Column, Feature
from hvdrec.features.kinds.kind import FittedFeature, Kind, TrainingSplit
from hvdrec.features.kinds.nodes import Nodes, hash_coefficients


class Crossed(Kind):
    """The combination of several features' codes, hashed into a fixed number of buckets.

    The features may be on one side. With ``side = "scene"`` they may be on any sides; the ranker
    then combines the scene's codes with those that are stored with users and items.
    """

    def check(self, feature: Feature) -> None:
        """Raise UserError unless ``columns`` names two or more different features."""
        if len(set(feature.columns)) < max(2, len(feature.columns)):
            columns = "crossed needs the names of two or more features, each once"
            raise feature.invalid("columns", columns)

    def columns(self, feature: Feature) -> tuple[Column, ...]:
        """Return nothing: a crossed feature reads the codes of other features."""
        return ()

    def sources(self, feature: Feature) -> tuple[str, ...]:
        """Return the features to combine."""
        return feature.columns

    def fit(self, feature: Feature, split: TrainingSplit) -> FittedFeature:
        """Learn nothing: the size follows from the number of buckets."""
        return FittedFeature(feature, FIRST_CODE + feature.buckets)

    def compile(self, nodes: Nodes, fitted: FittedFeature, inputs: Sequence[str]) -> str:
        """Hash the codes; missing if any of them is missing."""
        coefficients = hash_coefficients(fitted.feature.name, len(inputs))
        code = nodes.buckets(inputs, coefficients, fitted.feature.buckets)
        # The product of codes can overflow to 0; their minimum cannot.
        least = nodes.add("Min", *inputs)
        missing = nodes.add("Equal", least, nodes.integer(MISSING))
        return nodes.add("Where", missing, nodes.integer(MISSING), code)
